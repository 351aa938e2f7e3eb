// OpenAI's Node client behind pipes: what to do as a line of JSON on stdin, what came of it as a line on stdout.
// ../drivers.py has the other end, and the same in Python.
"use strict";

const readline = require("node:readline");
const OpenAI = require("openai");

let held = null; // the stream that "open" began and "close" aborts

const operations = {
  chat: (client, body) => answer(client.chat.completions.create(body)),
  "chat helper": (client, body) => client.chat.completions.stream(body).finalChatCompletion(),
  "chat parse": (client, body) => client.chat.completions.parse(body),
  completions: (client, body) => answer(client.completions.create(body)),
  models: async (client) => (await client.models.list()).data,
  model: (client, body) => client.models.retrieve(body.model),
};

function connect({ api_key: apiKey, timeout_s: seconds }) {
  const options = { maxRetries: 0, timeout: 1000 * (seconds ?? 60) };
  return new OpenAI(apiKey ? { ...options, apiKey } : options); // else, like the URL, from the environment
}

// The answer, or the chunks of a streamed one: `partial` has those that came before an error.
async function answer(promise, partial = []) {
  const given = await promise;
  if (!(Symbol.asyncIterator in given)) return { ...given, _request_id: given._request_id };
  try {
    for await (const chunk of given) partial.push(chunk);
  } catch (error) {
    error.partial = partial;
    throw error;
  }
  return partial;
}

async function open(client, { what, body }) {
  const endpoint = what === "chat" ? client.chat.completions : client.completions;
  held = await endpoint.create({ ...body, stream: true });
  const { value } = await held[Symbol.asyncIterator]().next();
  return [value];
}

async function run(task) {
  if (task.do === "close") return held.controller.abort();
  const client = connect(task.options);
  return task.do === "open" ? open(client, task) : operations[task.what](client, task.body);
}

async function record(task) {
  try {
    return { given: (await run(task)) ?? null };
  } catch (error) {
    const { status, code, param, message, requestID, partial, headers } = error;
    const retry = headers?.get?.("retry-after");
    return { error: error.constructor.name, status, code, param, message, request_id: requestID, partial, retry };
  }
}

(async () => {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    process.stdout.write(`${JSON.stringify(await record(JSON.parse(line)))}\n`);
  }
})();
