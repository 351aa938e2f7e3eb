"""From a checked request to a Job: prompts as token ids, what to sample, and how text is made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from afd.errors import RequestError
from router.answers import conversation
from router.answers.answer import Answers, Plan
from router.answers.choice import TextRules
from router.answers.reasoning import registry as reasoning
from router.answers.tools import registry as tool_formats
from router.openai.sampling import SamplingDefaults
from router.openai.schema import ChatPrompt, ChatRequest, CompletionRequest, Request
from router.relay.job import Job
from router.relay.pool import Pool
from router.settings import RouterSettings
from router.text.chat import ChatTemplate
from router.text.tokenizer import Tokenizer, off_loop

MAX_TEXT_BYTES = 4 << 20  # of a text that is tokenized for its own sake
_COMPLETION_TOKENS = 16  # what /v1/completions generates when the client does not say, as at OpenAI


class Jobs:
    """Makes them, with one model's tokenizer, chat template and defaults."""

    def __init__(self, settings: RouterSettings, pool: Pool) -> None:
        """Raises CheckpointError when the model's tokenizer, chat template or generation config is damaged, ConfigError
        for an unknown parser."""
        self.tokenizer = Tokenizer(settings.tokenizer_json)
        self._settings = settings
        self._template = ChatTemplate(settings.tokenizer_config)
        self._answers = Answers(
            tool_formats.create(settings.tool_parser), reasoning.find(settings.reasoning_parser), self.tokenizer
        )
        self._defaults = SamplingDefaults.read(settings.generation_config)
        self._pool = pool

    @property
    def max_context(self) -> int:
        """Tokens, prompt and answer together, of the longest request served now."""
        return self._pool.max_context(self._settings.max_context)

    async def chat(self, job_id: str, request: ChatRequest, num_bytes: int) -> Job:
        """`num_bytes`: how long the request's body was. The answer may by default take the rest of the context.

        Raises RequestError."""
        most = self._most_bytes(request)
        text, ids = await self.chat_prompt(request, num_bytes, most)
        plan = await self._answers.chat(request, text, num_bytes)
        context = self.max_context
        return await off_loop(
            lambda: self._job(job_id, request, [ids], "messages", self._settings.max_context, plan, context), num_bytes
        )

    def _most_bytes(self, request: Request) -> int | None:
        """Of a prompt that could be served; None: that is known once it is tokens."""
        longest = self.tokenizer.most_token_bytes
        return None if longest is None or request.truncate_prompt_tokens is not None else longest * self.max_context

    def _encode(self, text: str, param: str, most_bytes: int | None, *, special: bool) -> list[int]:
        """Raises RequestError for text that cannot have so few tokens as the context, before it makes work."""
        if most_bytes is not None and len(text) * 4 > most_bytes and (size := len(text.encode())) > most_bytes:
            raise RequestError(
                f"{param} has {size} bytes of text, but this server's context has room for {most_bytes} at most; "
                f"shorten {param}",
                param=param,
                code="context_length_exceeded",
            )
        return self.tokenizer.encode(text, special=special)

    async def chat_prompt(
        self, request: ChatPrompt, num_bytes: int, most_bytes: int | None = MAX_TEXT_BYTES
    ) -> tuple[str, list[int]]:
        """What the chat template makes of the messages, as text of at most `most_bytes` and as token ids. `num_bytes`:
        how long the request's body was. Raises RequestError."""
        source = request.chat_template
        if source is not None and not self._settings.trust_request_chat_template:
            raise RequestError(
                "chat_template is not taken from requests by this server (router.trust_request_chat_template)",
                param="chat_template",
                code="unsupported_parameter",
            )

        if request.continue_final_message and request.add_generation_prompt:
            message = "add_generation_prompt and continue_final_message cannot both be true"
            raise RequestError(message, param="continue_final_message")

        template = self._template if source is None else self._template.with_source(source)

        def tokenize() -> tuple[str, list[int]]:
            offered = [tool.for_model() for tool in request.offered_tools] if template.knows_tools else []
            messages = conversation.messages(request, self._answers.tools, template_knows_tools=template.knows_tools)
            variables = request.chat_template_kwargs or {}
            if request.continue_final_message:
                text = template.render_open(messages, tools=offered or None, variables=variables)
            else:
                generates = request.add_generation_prompt is not False
                text = template.render(
                    messages, add_generation_prompt=generates, tools=offered or None, variables=variables
                )
            return text, self._encode(text, "messages", most_bytes, special=bool(request.add_special_tokens))

        return await off_loop(tokenize, num_bytes)

    async def text(self, prompt: str, num_bytes: int, *, special: bool) -> list[int]:
        """The token ids of a text by itself. Raises RequestError."""
        return await off_loop(lambda: self._encode(prompt, "prompt", MAX_TEXT_BYTES, special=special), num_bytes)

    async def completion(self, job_id: str, request: CompletionRequest, num_bytes: int) -> Job:
        """`num_bytes`: how long the request's body was. Raises RequestError."""
        special, most, context = request.add_special_tokens is not False, self._most_bytes(request), self.max_context

        def token_ids(prompt: str | list[int]) -> list[int]:
            if isinstance(prompt, str):
                return self._encode(prompt, "prompt", most, special=special)
            self.check_vocabulary(prompt, "prompt")
            return prompt

        prompts = await off_loop(lambda: [token_ids(prompt) for prompt in request.prompt], num_bytes)
        plan = await self._answers.completion(request, num_bytes)
        job = await off_loop(
            lambda: self._job(job_id, request, prompts, "prompt", _COMPLETION_TOKENS, plan, context), num_bytes
        )
        num_best = max(request.best_of or 0, job.n)
        job = replace(job, n=num_best, best=job.n) if num_best > job.n else job
        if not request.echo:
            return job
        each = range(len(prompts))
        return replace(job, echoes=tuple(self._echo(request.prompt[i], job.prompts[i], len(prompts[i])) for i in each))

    def _echo(self, asked: str | list[int], used: tuple[int, ...], length: int) -> str:
        """A prompt of `length` tokens as the client wrote it, unless only the end of it is `used`."""
        if isinstance(asked, str) and len(used) == length:
            return asked
        return self.tokenizer.decode(used, special=True)

    def check_vocabulary(self, ids: Iterable[int], param: str) -> None:
        """Raises RequestError for the first id that the model does not have."""
        bad = next((token for token in ids if not 0 <= token < self._settings.vocab_size), None)
        if bad is not None:
            message = (
                f"{param} holds token id {bad}; the model's vocabulary has ids 0 to {self._settings.vocab_size - 1}"
            )
            raise RequestError(message, param=param, code="invalid_token_id")

    def _job(
        self,
        job_id: str,
        request: Request,
        prompts: list[list[int]],
        param: str,
        default_tokens: int,
        plan: Plan,
        context: int,
    ) -> Job:
        self.check_vocabulary(request.stop_token_ids or (), "stop_token_ids")
        self.check_vocabulary(request.allowed_token_ids or (), "allowed_token_ids")
        self.check_vocabulary(request.logit_bias or (), "logit_bias")
        bad_words = self.tokenizer.spellings(request.bad_words or ())
        sampling = []
        if (wanted := request.truncate_prompt_tokens) is not None:
            prompts = [_end_of(ids, wanted, context - (request.token_limit or 1)) for ids in prompts]
        for ids in prompts:
            if not ids:
                raise RequestError(f"{param} holds no tokens", param=param, code="empty_prompt")
            limit = request.token_limit
            room = context - len(ids)
            if room < (limit or 1):
                raise RequestError(
                    f"this server's context is {context} tokens, but the prompt has {len(ids)} and "
                    f"the answer may have {limit or 'at least 1'}; shorten {param} or lower max_tokens",
                    param=param,
                    code="context_length_exceeded",
                )
            most = min(default_tokens, room) if limit is None else limit
            sampling.append(replace(self._defaults.sampling(request, most), bad_words=bad_words))
        keep_special = request.skip_special_tokens is False or plan.keep_special
        rules = TextRules(tuple(request.stop), bool(request.include_stop_str_in_output), keep_special, plan.parser)
        return Job(job_id, tuple(map(tuple, prompts)), tuple(sampling), request.n or 1, rules, grammar=plan.grammar)


def _end_of(ids: list[int], wanted: int, room: int) -> list[int]:
    """The last `wanted` tokens; -1: as many as there is room for."""
    num_kept = max(room, 0) if wanted < 0 else wanted
    return ids[max(0, len(ids) - num_kept) :]
