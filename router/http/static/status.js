// The page itself: asks the server once a second while it is looked at, and shows what it says.

const POLL_MS = 1000, TIMEOUT_MS = 5000;
const LATENCY_S = 10, LOOKS = 5, SPARKS = 60; // how far latencies, shares and the curve look back
const KEY = "afd-api-key"; // in the tab's storage

const byId = (id) => document.getElementById(id);
const strip = new Strip(byId("strip"), byId("pointed"));
let answers = []; // answers of one run, oldest first
let rates = [];

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

function swatch(variable) {
  const element = make("span", "swatch");
  element.style.background = `var(${variable})`;
  return element;
}

function meter(name, share, text, className = "") {
  const fill = make("div", `fill ${className}`);
  fill.style.width = `${100 * Math.min(1, share)}%`;
  return make("div", "meter", name, make("div", "track", fill), make("b", "", text));
}

function counts(pairs) {
  const line = make("p", "counts");
  for (const [value, name] of pairs) line.append(make("span", "", make("b", "", value), ` ${name}`));
  return line;
}

function setValue(id, value, unit) {
  byId(id).replaceChildren(value, ...(unit ? [make("small", "", unit)] : []));
}

// ---- workers

const before = (now) => answers.length > 1 ? answers.at(-2) : now;

const label = (worker) => worker.replica ? `${worker.rank}.${worker.replica}` : `${worker.rank}`;

function perSecond(now, worker, name) {
  const then = before(now), old = then.workers.find((w) => w.role === worker.role && label(w) === label(worker));
  const seconds = now.at_s - then.at_s;
  return seconds > 0 && old?.status && worker.status ? Math.max(0, worker.status[name] - old.status[name]) / seconds : null;
}

function busyOf(worker) {
  const looks = answers.slice(-LOOKS).flatMap((answer) => answer.timeline?.workers ?? []);
  const own = looks.filter((w) => w.role === worker.role && w.rank === worker.rank);
  return own.length && worker.state !== "lost" ? mean(own.map((w) => w.busy)) : null;
}

function card(now, worker) {
  const name = `${worker.role === "ffn" ? "FFN" : worker.role} ${label(worker)}`, status = worker.status ?? {};
  const who = make("div", "who", make("h3", "", name), make("span", "pid", worker.pid ? `pid ${worker.pid}` : ""),
    make("span", `statename ${worker.state}`, worker.state));
  const element = make("article", `worker ${worker.state}`, who);
  element.dataset.worker = `${worker.role} ${label(worker)}`;
  if (worker.message) element.append(make("p", "said", worker.message));
  if (worker.state === "lost") return element;
  const busy = busyOf(worker);
  element.append(meter("busy", busy ?? 0, busy === null ? "–" : percent(busy)));
  if (worker.role === "attention") {
    const { blocks_used = 0, blocks_total = 0, running = 0, waiting = 0, microbatches } = status;
    element.append(meter("KV", blocks_total ? blocks_used / blocks_total : 0, `${whole(blocks_used)} / ${whole(blocks_total)}`, "kv"));
    element.append(counts([[short(perSecond(now, worker, "generated_tokens"), 0), "tokens/s"], [whole(running), "running"],
      [whole(waiting), "waiting"], ...(microbatches ? [[whole(microbatches), microbatches > 1 ? "microbatches" : "microbatch"]] : [])]));
  } else {
    element.append(counts([[short(perSecond(now, worker, "calls"), 0), "calls/s"], [short(perSecond(now, worker, "dispatches"), 0), "dispatches/s"],
      ...(status.failures ? [[whole(status.failures), "failures"]] : [])]));
  }
  return element;
}

function showWorkers(now) {
  const busy = answers.slice(-LOOKS).flatMap((answer) => answer.timeline ? [answer.timeline.busy] : []);
  for (const [role, title] of [["attention", "Attention"], ["ffn", "FFN"]]) {
    const share = busy.length ? percent(mean(busy.map((shares) => shares[role]))) : "–";
    const head = make("div", "sidehead", make("h2", "", `${title} workers`), make("span", "more", `${share} busy`));
    byId(role).replaceChildren(head, ...now.workers.filter((w) => w.role === role).map((w) => card(now, w)));
  }
  const t = now.timeline ?? {}, us = (name) => t.phases?.[name] ? `${whole(t.phases[name].median_us)} µs` : "–";
  const line = (value, text) => make("p", "", make("b", "", value), ` ${text}`);
  const then = before(now).counted, experts = now.counted.expert_calls - then.expert_calls;
  if (experts > 0) showWorkers.perExpert = (now.counted.expert_tokens - then.expert_tokens) / experts;
  const group = (arrow, ...lines) => make("div", "group", make("p", "arrow", make("span", "", arrow)), ...lines);
  byId("wire").replaceChildren(
    group("dispatch ▸", line(us("wire"), "on the wire"), line(short(t.tokens_per_dispatch), "tokens each")),
    group("◂ combine", line(us("wire back"), "on the wire"), line(bytes(t.wire_bytes_per_token), "a token")),
    group("FFN", line(short(t.tokens_per_ffn_call), "tokens a call"), line(short(showWorkers.perExpert), "an expert")));
}

// ---- figures

function showFigures(now) {
  const then = before(now), seconds = now.at_s - then.at_s;
  if (seconds > 0) rates = [...rates, (now.counted.generated_tokens - then.counted.generated_tokens) / seconds].slice(-SPARKS);
  setValue("rate", rates.length ? short(rates.at(-1), 0) : "–");
  byId("generated").textContent = whole(now.counted.generated_tokens);
  spark();
  const statuses = now.workers.flatMap((w) => w.role === "attention" && w.status ? [w.status] : []);
  setValue("running", whole(sum(statuses.map((s) => s.running))));
  byId("waiting").textContent = whole(sum(statuses.map((s) => s.waiting)));
  const queued = sum(statuses.map((s) => s.waiting_tokens ?? 0));
  byId("queued").textContent = queued ? `${whole(queued)} prompt tokens queued` : "";
  const old = answers.find((answer) => now.at_s - answer.at_s <= LATENCY_S + 0.5) ?? now;
  for (const [id, name] of [["ttft", "time_to_first_token"], ["itl", "inter_token_latency"]]) {
    setValue(`${id}50`, ...duration(quantile(old.counted[name], now.counted[name], 0.5)));
    byId(`${id}95`).textContent = duration(quantile(old.counted[name], now.counted[name], 0.95)).join(" ");
  }
  const looks = answers.slice(-LOOKS).flatMap((answer) => answer.timeline ? [answer.timeline.efficiency] : []);
  setValue("efficiency", ...(looks.length ? percent(mean(looks)).split(" ") : ["–"]));
}

function spark() {
  const most = Math.max(1, ...rates), step = 300 / (SPARKS - 1), first = 300 - step * (rates.length - 1);
  const points = rates.map((rate, i) => `${(first + i * step).toFixed(1)},${(46 - 43 * rate / most).toFixed(1)}`);
  document.querySelector("#spark .line").setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
  document.querySelector("#spark .area").setAttribute("d", points.length > 1 ? `M${first.toFixed(1)},48L${points.join("L")}L300,48Z` : "");
}

// ---- time

const KINDS = { busy: "--busy", "no work": "--nowork", wire: "--wire", "wire back": "--wire", ffn: "--compute", attention: "--compute",
  queue: "--queue", gather: "--queue", ready: "--queue" };

function showTime(now) {
  strip.show(now.lanes);
  byId("window").textContent = now.lanes ? `in ${short(now.lanes.window_us / 1000, 0)} ms of the last second` : "";
  byId("microbatches").replaceChildren(...(now.lanes?.microbatches ?? [])
    .toSorted((a, b) => a.attention_rank - b.attention_rank || a.microbatch - b.microbatch)
    .map((owner) => make("li", "", swatch(Strip.colour(owner)), `microbatch ${owner.microbatch} of attention ${owner.attention_rank}`)),
    ...(now.lanes ? [make("li", "", swatch("--joined"), "several at once")] : []));
  const looks = answers.slice(-LOOKS).flatMap((answer) => answer.timeline ? [answer.timeline] : []);
  byId("bubbles").replaceChildren(...["attention", "ffn"].map((role) => {
    const causes = looks.length ? meanShares(looks.map((look) => look.bubbles[role])) : [];
    const shares = looks.length ? [["busy", mean(looks.map((look) => look.busy[role]))], ...causes] : [];
    const track = make("div", "track"), legend = make("ul", "legend");
    for (const [name, share] of shares.filter(([, share]) => share >= 0.001)) {
      const colour = KINDS[name] ?? "--work", part = make("div", "fill");
      part.style.cssText = `width: ${100 * share}%; background: var(${colour})`;
      part.title = `${name} ${percent(share)}`;
      track.append(part);
      if (share >= 0.005) legend.append(make("li", "", swatch(colour), name, make("b", "", percent(share))));
    }
    return make("div", "shares", make("h3", "", role === "ffn" ? "FFN" : "attention"), track, legend);
  }));
}

// ---- all of it

function tell(state, kind, problems) {
  byId("state").textContent = state;
  byId("state").className = `pill ${kind}`;
  byId("problems").hidden = !problems.length;
  byId("problems").replaceChildren(...problems.map((sentence) => make("li", "", sentence)));
}

function show(now) {
  const idle = now.workers.some((w) => w.state === "ready") ? now.timeline_problem : "";
  const lost = now.workers.filter((w) => w.state === "lost").map((w) => w.message);
  tell(now.problem ? "cannot serve" : "serving", now.problem ? "bad" : "good", [...new Set([now.problem, ...lost, idle])].filter(Boolean));
  if (answers.at(-1)?.at_s === now.at_s) return; // somebody else's answer, shared
  if (answers.length && answers.at(-1).epoch !== now.epoch) answers = rates = [];
  answers = [...answers, now].slice(-2 * LATENCY_S);
  document.title = `${now.model} – afd`;
  byId("what").textContent = `${now.model} as ${now.topology}, run ${now.epoch}`;
  showFigures(now);
  showWorkers(now);
  showTime(now);
}

async function ask() {
  let answer, response;
  const key = sessionStorage.getItem(KEY), headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    response = await fetch("status/pipeline", { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store", headers });
    byId("keyform").hidden = response.status !== 401;
    answer = await response.json();
    if (!response.ok) throw new Error(answer.error?.message ?? `HTTP ${response.status}`);
  } catch (error) {
    document.body.classList.add("stale");
    const why = error.name === "TypeError" || error.name === "TimeoutError" ? "nothing answers" : error.message;
    tell(response ? "refused" : "no answer", "bad", [`${location.host}: ${why}; trying again, and what is below is old.`]);
    return;
  }
  document.body.classList.remove("stale");
  show(answer);
}

let polling = false;
async function poll() {
  if (polling) return;
  polling = true;
  while (!document.hidden) {
    await ask();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  polling = false;
}

byId("keyform").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
});
byId("zoom").addEventListener("click", ({ target }) => {
  if (target.value === undefined || target.tagName !== "BUTTON") return;
  for (const button of byId("zoom").children) button.setAttribute("aria-pressed", button === target);
  strip.zoom = Number(target.value);
});
document.addEventListener("visibilitychange", poll);
poll();
