"""From a checked request, and the model's own defaults, to the sampling parameters of the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from afd.errors import CheckpointError, RequestError
from afd.rpc.convert import check_sampling
from afd.types import SamplingParams
from router.openai.schema import Request


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's generation_config.json says of sampling, for requests that do not."""

    values: SamplingParams

    @classmethod
    def read(cls, generation_config: Mapping[str, object]) -> SamplingDefaults:
        """Raises CheckpointError for a value that is not a number, or outside its range."""

        def number(name: str, default: float) -> float:
            value = generation_config.get(name)
            if value is None:
                return default
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"{name} in generation_config is {value!r}, not a number")
            return value

        values = SamplingParams(
            temperature=number("temperature", 1.0),
            top_p=number("top_p", 1.0),
            top_k=max(0, int(number("top_k", 0))),
            min_p=number("min_p", 0.0),
            repetition_penalty=number("repetition_penalty", 1.0),
        )
        try:
            check_sampling(values)
        except RequestError as error:
            raise CheckpointError(f"generation_config: {error}") from error
        return cls(values)

    def sampling(self, request: Request, max_tokens: int) -> SamplingParams:
        """The parameters of `request` for an answer of at most `max_tokens` tokens."""
        return replace(
            self.values,
            max_tokens=max_tokens,
            min_tokens=min(request.min_tokens or 0, max_tokens),
            temperature=_given(request.temperature, self.values.temperature),
            top_p=_given(request.top_p, self.values.top_p),
            top_k=self.values.top_k if request.top_k is None else max(0, request.top_k),
            min_p=_given(request.min_p, self.values.min_p),
            seed=None if request.seed is None else request.seed % 2**64,
            repetition_penalty=_given(request.repetition_penalty, self.values.repetition_penalty),
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            ignore_eos=bool(request.ignore_eos),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            logprobs=request.worker_logprobs,
            prompt_logprobs=request.prompt_logprobs,
            logit_bias=tuple(sorted((request.logit_bias or {}).items())),
            allowed_token_ids=tuple(request.allowed_token_ids or ()),
        )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
