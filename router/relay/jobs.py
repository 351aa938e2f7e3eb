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

    async def chat(self, job_id: str, request: ChatRequest) -> Job:
        """Raises RequestError. The answer may by default take the rest of the context."""
        text, ids = await self.chat_prompt(request)
        plan = await self._answers.chat(request, text)
        return self._job(job_id, request, [ids], "messages", self._settings.max_context, plan)

    async def chat_prompt(self, request: ChatPrompt) -> tuple[str, list[int]]:
        """What the chat template makes of the messages, as text and as token ids. Raises RequestError."""
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
        offered = [tool.for_model() for tool in request.offered_tools] if template.knows_tools else []

        def tokenize() -> tuple[str, list[int]]:
            messages = conversation.messages(request, self._answers.tools, template_knows_tools=template.knows_tools)
            variables = request.chat_template_kwargs or {}
            if request.continue_final_message:
                text = template.render_open(messages, tools=offered or None, variables=variables)
            else:
                generates = request.add_generation_prompt is not False
                text = template.render(
                    messages, add_generation_prompt=generates, tools=offered or None, variables=variables
                )
            return text, self.tokenizer.encode(text, special=bool(request.add_special_tokens))

        num_chars = sum(len(message.content) for message in request.messages) + len(str(request.offered_tools))
        return await off_loop(tokenize, num_chars)

    async def completion(self, job_id: str, request: CompletionRequest) -> Job:
        """Raises RequestError."""
        special = request.add_special_tokens is not False

        def token_ids(prompt: str | list[int]) -> list[int]:
            if isinstance(prompt, str):
                return self.tokenizer.encode(prompt, special=special)
            self.check_vocabulary(prompt, "prompt")
            return prompt

        prompts = await off_loop(
            lambda: [token_ids(prompt) for prompt in request.prompt], sum(map(len, request.prompt))
        )
        plan = await self._answers.completion(request)
        job = self._job(job_id, request, prompts, "prompt", _COMPLETION_TOKENS, plan)
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
        self, job_id: str, request: Request, prompts: list[list[int]], param: str, default_tokens: int, plan: Plan
    ) -> Job:
        self.check_vocabulary(request.stop_token_ids or (), "stop_token_ids")
        self.check_vocabulary(request.allowed_token_ids or (), "allowed_token_ids")
        self.check_vocabulary(request.logit_bias or (), "logit_bias")
        bad_words = self.tokenizer.spellings(request.bad_words or ())
        context = self.max_context
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
