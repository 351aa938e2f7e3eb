"""Plain values of afd.types to and from the messages of proto/afd/rpc/attention.proto. No grpc, no torch.

Both ends use it: the router's client (afd.rpc.attention_client) and the attention worker's service. What arrives from a
router is checked here against the ranges of SamplingParams; checks that need the model (vocabulary, context) are the
engine's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from afd.errors import RequestError
from afd.rpc import attention_pb2 as pb
from afd.types import FinishReason, GenerateOutput, GenerateRequest, Refusal, SampledToken, SamplingParams

_FINISH_TO_PROTO: dict[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "error": pb.FINISH_REASON_ERROR,
    "cancelled": pb.FINISH_REASON_CANCELLED,
}
_FINISH_FROM_PROTO: dict[int, FinishReason | None] = {number: name for name, number in _FINISH_TO_PROTO.items()}

_REFUSAL_TO_PROTO: dict[Refusal, pb.Refusal] = {
    "": pb.REFUSAL_UNSPECIFIED,
    "full": pb.REFUSAL_FULL,
    "unavailable": pb.REFUSAL_UNAVAILABLE,
}
_REFUSAL_FROM_PROTO: dict[int, Refusal] = {number: name for name, number in _REFUSAL_TO_PROTO.items()}


@dataclass(frozen=True, slots=True)
class AttentionStatus:
    """What an attention worker says of itself: counts since it started, and what it holds now. Blocks are KV pages."""

    attention_rank: int
    state: str = "ready"  # ready, draining or lost
    problem: str = ""  # one sentence when it cannot serve
    running: int = 0  # requests that hold KV blocks
    waiting: int = 0  # requests in the queue
    blocks_total: int = 0
    blocks_used: int = 0
    steps: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0  # computed, recomputation after preemption included
    preemptions: int = 0
    max_context: int = 0  # tokens, prompt and answer together
    microbatches: int = 0
    waiting_tokens: int = 0  # prompt tokens not computed yet
    prefix_queries: int = 0  # tokens of requests admitted since the start
    prefix_hits: int = 0  # those of them whose KV was there already
    running_tokens: int = 0  # of requests that hold KV blocks
    free_tokens: int = 0  # that the free KV blocks hold; those that only cache are free


def request_to_proto(request: GenerateRequest, handle: int = 0) -> pb.Submit:
    """The message that submits `request`. `handle`, if not 0, is for the worker to name it by (afd.rpc.steps)."""
    sampling = request.sampling
    return pb.Submit(
        request_id=request.request_id,
        handle=handle,
        prompt_token_ids=request.prompt_token_ids,
        priority=request.priority,
        cache_salt=request.cache_salt,
        grammar=request.grammar,
        generated_token_ids=request.generated_token_ids,
        replay=request.replay,
        sampling=pb.Sampling(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=sampling.stop_token_ids,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
            logit_bias=dict(sampling.logit_bias),
            allowed_token_ids=sampling.allowed_token_ids,
            bad_words=[pb.TokenIds(ids=ids) for ids in sampling.bad_words],
        ),
    )


def request_from_proto(message: pb.Submit) -> GenerateRequest:
    """Raises RequestError naming the field, its value and its limit. Floats have single precision after the wire."""
    sampling = message.sampling
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else None,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=tuple(sampling.stop_token_ids),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        bad_words=tuple(tuple(word.ids) for word in sampling.bad_words),
    )
    _demand(message.request_id != "", "request_id", message.request_id, "not be empty")
    _demand(len(message.prompt_token_ids) > 0, "prompt_token_ids", [], "hold at least one token")
    check_sampling(params)
    return GenerateRequest(
        message.request_id,
        tuple(message.prompt_token_ids),
        params,
        message.priority,
        message.cache_salt,
        message.grammar,
        tuple(message.generated_token_ids),
        message.replay,
    )


def check_sampling(params: SamplingParams) -> None:
    """Raises RequestError for the first field outside its range. Written so that NaN fails every comparison."""
    _demand(params.max_tokens >= 1, "max_tokens", params.max_tokens, "be at least 1")
    _demand(
        0 <= params.min_tokens <= params.max_tokens,
        "min_tokens",
        params.min_tokens,
        f"lie between 0 and max_tokens {params.max_tokens}",
    )
    _demand(0 <= params.temperature < math.inf, "temperature", params.temperature, "be finite and at least 0")
    _demand(0 < params.top_p <= 1, "top_p", params.top_p, "be above 0 and at most 1")
    _demand(params.top_k >= 0, "top_k", params.top_k, "be at least 0")
    _demand(0 <= params.min_p <= 1, "min_p", params.min_p, "lie between 0 and 1")
    _demand(
        0 < params.repetition_penalty < math.inf,
        "repetition_penalty",
        params.repetition_penalty,
        "be finite and above 0",
    )
    _demand(math.isfinite(params.frequency_penalty), "frequency_penalty", params.frequency_penalty, "be finite")
    _demand(math.isfinite(params.presence_penalty), "presence_penalty", params.presence_penalty, "be finite")
    _demand(params.logprobs is None or params.logprobs >= 0, "logprobs", params.logprobs, "be at least 0")
    _demand(
        not params.prompt_logprobs or params.logprobs is not None,
        "prompt_logprobs",
        params.prompt_logprobs,
        "come with logprobs",
    )
    for token_id, bias in params.logit_bias:
        _demand(math.isfinite(bias), f"logit_bias[{token_id}]", bias, "be finite")
    _demand(all(params.bad_words), "bad_words", params.bad_words, "hold no empty word")


def _demand(holds: bool, param: str, value: object, rule: str) -> None:
    if not holds:
        raise RequestError(f"{param} is {value!r} but must {rule}", param=param)


def output_to_proto(output: GenerateOutput) -> pb.Output:
    """The message for what one step added to one request."""
    return pb.Output(
        request_id=output.request_id,
        tokens=[_token_to_proto(token) for token in output.tokens],
        finish_reason=_FINISH_TO_PROTO[output.finish_reason],
        stop_token_id=output.stop_token_id,
        error=output.error,
        client_error=output.client_error,
        cached_tokens=output.cached_tokens,
        refused=_REFUSAL_TO_PROTO[output.refused],
        queue_s=output.queue_s,
        prompt=[_token_to_proto(token) for token in output.prompt],
    )


def output_from_proto(message: pb.Output) -> GenerateOutput:
    """Raises KeyError for a finish reason or refusal that this version does not know."""
    return GenerateOutput(
        request_id=message.request_id,
        tokens=tuple([_token_from_proto(token) for token in message.tokens]),
        finish_reason=_FINISH_FROM_PROTO[message.finish_reason],
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error=message.error,
        client_error=message.client_error,
        cached_tokens=message.cached_tokens,
        refused=_REFUSAL_FROM_PROTO[message.refused],
        queue_s=message.queue_s if message.HasField("queue_s") else None,
        prompt=tuple([_token_from_proto(token) for token in message.prompt]),
    )


def _token_to_proto(token: SampledToken) -> pb.Token:
    return pb.Token(
        token_id=token.token_id,
        logprob=token.logprob,
        top_logprobs=[pb.TopLogprob(token_id=i, logprob=value) for i, value in token.top_logprobs],
    )


def _token_from_proto(message: pb.Token) -> SampledToken:
    if not message.HasField("logprob"):
        return SampledToken(message.token_id)
    return SampledToken(
        message.token_id, message.logprob, tuple((top.token_id, top.logprob) for top in message.top_logprobs)
    )


def status_to_proto(status: AttentionStatus) -> pb.StatusReply:
    """The message for a worker's status; fields have the same names on both sides."""
    return pb.StatusReply(**{name: getattr(status, name) for name in AttentionStatus.__slots__})


def status_from_proto(message: pb.StatusReply) -> AttentionStatus:
    """A worker's status from its message."""
    return AttentionStatus(**{name: getattr(message, name) for name in AttentionStatus.__slots__})
