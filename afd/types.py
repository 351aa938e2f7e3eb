"""Plain values that cross package borders. No tensors: policy code and the router import this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Literal


class DType(IntEnum):
    """Element type of weights and activations; the number is what a frame header carries. FP8 (e4m3) is for dispatches
    alone, with scales beside it."""

    FP32 = 1
    BF16 = 2
    FP8 = 3

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return {DType.FP32: 4, DType.BF16: 2, DType.FP8: 1}[self]


class Role(str, Enum):
    """The two halves of a layer, and of the cluster."""

    ATTENTION = "attention"
    FFN = "ffn"


@dataclass(frozen=True, slots=True)
class Cut:
    """One way a weight is sliced over FFN ranks: `axis` is split by `by` (see afd.topology.FfnShard).

    "ep": into ep equal runs of whole experts. "tp": into tp slices of the intermediate dimension inside an expert.
    "rank": into one slice per FFN rank (dense layers and shared experts, which every rank helps with).
    """

    axis: int
    by: Literal["ep", "tp", "rank"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One checkpoint tensor a model needs: who owns it and how it is cut over FFN ranks.

    `expert` is set where a checkpoint keeps each expert in tensors of its own: only the EP group that owns that
    expert reads it. `optional` tensors may be missing (an LM head tied to the embedding).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    cuts: tuple[Cut, ...] = ()
    expert: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen. Ranges are checked where the request enters (router.openai.schema).

    Penalties follow the OpenAI API (frequency, presence: over generated tokens) and vLLM (repetition: over prompt
    and generated tokens). temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch those filters off.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # how many alternatives beside the sampled token; None: no logprobs at all
    prompt_logprobs: bool = False  # those of the prompt's tokens too; only with `logprobs`
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token_id, what is added to its logit), by token_id
    allowed_token_ids: tuple[int, ...] = ()  # no others; (): all
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of generated tokens that are never completed

    @property
    def named_token_ids(self) -> list[int]:
        """Every token id that these parameters name; all must be in the vocabulary."""
        biased = [token_id for token_id, _ in self.logit_bias]
        return [*self.stop_token_ids, *biased, *self.allowed_token_ids, *(i for word in self.bad_words for i in word)]


FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to continue, as the attention worker sees it. `request_id` is unique per router connection;
    `grammar` is one of llguidance (afd.grammar), and the answer one that it takes; "": any answer.

    A replay has lost its worker and goes on at another: `generated_token_ids` are the answer so far, which counts as
    generated in every respect and is not sent again. With the same seed, the rest is what the first worker would have
    sent.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0  # of those that wait, lower is served earlier
    cache_salt: str = ""  # computed prefixes are shared only between requests with the same
    grammar: str = ""
    generated_token_ids: tuple[int, ...] = ()
    replay: bool = False  # a full queue does not refuse it, and of its priority it goes first

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt_token_ids) + len(self.generated_token_ids)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One generated token; `top_logprobs` are (token_id, logprob) pairs, best first, natural logarithm."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


# Why a worker has nothing of a request, so that another may take it: its queue is full, or it serves nobody (any more).
Refusal = Literal["", "full", "unavailable"]


@dataclass(frozen=True, slots=True)
class GenerateOutput:
    """What one step added to one request. The last output of a request has `finish_reason` set."""

    request_id: str
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the EOS or stop token that ended it, when one did
    error: str = ""  # one sentence, with finish_reason "error"
    client_error: bool = False  # the request itself was at fault (HTTP 400, not 503)
    cached_tokens: int = 0  # of the prompt, found computed already; said with the first token
    refused: Refusal = ""  # with finish_reason "error"
    queue_s: float | None = None  # with the first token: seconds from the worker's taking it to its first step
    prompt: tuple[SampledToken, ...] = ()  # with the first token, for `prompt_logprobs`; its own first has no logprob


@dataclass(frozen=True, slots=True)
class FfnAddress:
    """Where an FFN worker can be reached; transports pick what they can use.

    `host_key` is equal for two processes that can share memory (same boot, network and user
    namespace, user). `replica`
    tells apart the workers that serve the same rank. No two lives of a worker have the same address.
    """

    ffn_rank: int
    host_key: str = ""
    shm: str = ""  # abstract unix socket name
    grpc: str = ""  # host:port
    inproc: str = ""  # name in this process's registry
    collective: str = ""  # host:port of a torch.distributed store
    replica: int = 0

    def same_place(self, other: FfnAddress) -> bool:
        """Whether one of the two has come in the other's place."""
        return (self.ffn_rank, self.replica) == (other.ffn_rank, other.replica)


@dataclass(frozen=True, slots=True)
class ActivityTotals:
    """What a worker has done of one kind since its loop started."""

    seconds: float
    calls: int
    tokens: int
    wire_bytes: int  # of tensors that it took off the wire


@dataclass(frozen=True, slots=True)
class HistogramTotals:
    """`counts[i]` values were at most bounds[i] (and above bounds[i - 1]); the last count is of those above all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class WorkerTotals:
    """Where a worker's time went since its loop started (afd.pipeline.timeline). They only grow.

    `activities` by name; what goes on now counts once it is over. `work`: an attention worker's steps in seconds, an
    FFN worker's calls in tokens. Of every 61st call of experts, `expert_calls` counts the experts that had tokens and
    `expert_tokens` those tokens.
    """

    activities: Mapping[str, ActivityTotals]
    work: HistogramTotals
    expert_calls: int = 0
    expert_tokens: int = 0


# recovering: it waits for another worker to come back, and meanwhile takes requests; lost: for good.
WorkerState = Literal["starting", "ready", "recovering", "draining", "lost"]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the controller sees it. `address` is the gRPC host:port of an attention worker's service.
    `counters` and `totals` are what it said last of itself; None before its loop runs."""

    role: Role
    rank: int  # attention_rank or ffn_rank, by role
    state: WorkerState
    address: str = ""
    pid: int = 0
    node: str = ""
    message: str = ""  # one sentence when lost, draining, recovering, or starting again
    counters: Mapping[str, int] = field(default_factory=dict)
    totals: WorkerTotals | None = None
    replica: int = 0  # of its ffn_rank

    @property
    def label(self) -> str:
        """Its rank, told apart from that of the rank's other replicas."""
        return f"{self.rank}.{self.replica}" if self.replica else str(self.rank)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The whole cluster at one moment. `epoch` names the run; frames of another epoch are refused."""

    epoch: int
    model: str
    topology: str
    workers: tuple[WorkerView, ...] = field(default_factory=tuple)

    @property
    def problem(self) -> str:
        """One sentence on why the cluster cannot serve, or "" when it can."""
        ffn = [w for w in self.workers if w.role is Role.FFN]
        kept = {w.rank for w in ffn if w.state != "lost"}  # ranks that some replica serves, or will again
        return next((w.message for w in ffn if w.rank not in kept), "")
