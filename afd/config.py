"""The deployment: one frozen, validated object from YAML and flags, built once and handed down.

`load` reads a file, `Deployment.with_flags` lays command-line flags over it. Unknown keys are refused with the place
where they belong. Nothing here looks at the model or the machine: "auto" values are resolved where they are used.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from afd.errors import ConfigError
from afd.topology import Sharding, Topology

PolicyName = Literal["prefix", "least_loaded", "round_robin", "session"]
TransportKind = Literal["auto", "shm", "grpc", "inproc", "collective"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]
Gib = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]


def _http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError("must be a URL like http://127.0.0.1:4318")
    return text


def _origins(origins: list[str]) -> list[str]:
    for origin in origins:
        parts = urlsplit(origin)
        if origin != "*" and (not parts.scheme or not parts.netloc or parts.path or parts.query or parts.fragment):
            raise ValueError(f"holds {origin!r}; an origin is '*' or like https://example.org, without a path")
    return origins


class Resources(_Section):
    """What Ray reserves for each worker of a role (ignored without Ray)."""

    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    accelerator_type: str | None = None
    custom: dict[str, Amount] = Field(default_factory=dict)


class AttentionSection(_Section):
    """Attention workers. A step of one microbatch computes at most `max_batch_tokens` tokens (decodes and prefill
    chunks together), which is also the largest frame on the wire."""

    microbatches: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = "auto"  # auto: by trying, at most 4
    block_size: int = Field(16, ge=1, le=1024)  # tokens per KV block
    kv_cache_gib: Gib | Literal["auto"] = "auto"
    max_batch_tokens: int = Field(512, ge=1, le=65536)
    tpot_target_ms: Annotated[float, Field(gt=0)] | None = None  # prompts' chunks shrink to keep others' steps below it
    prefix_cache: bool = True  # prompts that begin alike share the KV of what they have in common
    max_running: int = Field(256, ge=1)  # requests that hold KV blocks
    max_waiting: int = Field(4096, ge=1)  # requests in the queue; past it a request is refused
    max_context: Count | Literal["auto"] = "auto"  # tokens, prompt and answer; auto: the model's own
    threads: Count | Literal["auto"] = "auto"
    resources: Resources = Resources()

    @property
    def most_microbatches(self) -> int:
        """The largest number that may be in flight."""
        return 4 if self.microbatches == "auto" else self.microbatches


class FfnSection(_Section):
    """FFN workers. `tp` fixes the TP degree of hybrid sharding."""

    sharding: Sharding = "ep"
    tp: int | None = Field(None, ge=1)
    gather_window_us: int = Field(200, ge=0, le=1_000_000)
    replicas: int = Field(1, ge=1, le=16)  # identical workers for each ffn_rank; one may be lost without a pause
    threads: Count | Literal["auto"] = "auto"
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _tp_is_of_hybrid(self) -> FfnSection:
        if self.tp is not None and self.sharding != "hybrid":
            raise ValueError(f"tp {self.tp} is the TP degree of hybrid sharding, but sharding is {self.sharding}")
        return self


class TlsSection(_Section):
    """Certificates for the gRPC between workers and routers: PEM files, read by each process where it runs. Both ends
    of a connection show one, and take only those of `ca`. `name` is in every worker's; None: each worker's has the
    address that it listens on."""

    cert: str = Field(min_length=1)
    key: str = Field(min_length=1)
    ca: str = Field(min_length=1)
    name: str | None = Field(None, min_length=1)


class TransportSection(_Section):
    """How activations travel. `auto` chooses per pair of workers: shared memory on one host, gRPC between hosts."""

    kind: TransportKind = "auto"
    # The address gRPC and collective listen on, and tell peers. node: each worker its own node's, as Ray knows it;
    # auto: 127.0.0.1 where all workers share this host, else node.
    bind: str = Field("auto", min_length=1)
    connect_s: float = Field(60.0, gt=0)
    deadline_s: float = Field(30.0, gt=0)  # longest wait for one answer
    # Poll this long before sleeping; auto: 2000 where every worker of the host can have a core, else 50.
    spin_us: Annotated[int, Field(ge=0, le=1_000_000)] | Literal["auto"] = "auto"
    dispatch_dtype: Literal["auto", "bf16", "fp8"] = "auto"  # auto: the model's; combines are always in the model's
    token_file: str | None = Field(None, min_length=1)  # None: AFD_CLUSTER_TOKEN, or a token for the run
    tls: TlsSection | None = None  # None: gRPC in plain text

    @model_validator(mode="after")
    def _tls_is_of_grpc(self) -> TransportSection:
        if self.tls is not None and self.kind == "collective":
            raise ValueError("tls is gRPC's; kind collective would send activations in plain text all the same")
        return self

    @property
    def address(self) -> str:
        """`bind` for the sockets of one worker; "auto" that no host has resolved is a cluster on this one."""
        return "127.0.0.1" if self.bind == "auto" else self.bind


class ClusterSection(_Section):
    """Who starts the workers: Ray, or plain processes on this machine. RAY_ADDRESS joins an existing cluster."""

    backend: Literal["ray", "local"] = "ray"
    pin_cores: bool = False  # each worker computes on cores of its own, where all workers share one host
    start_s: float = Field(600.0, gt=0)  # longest wait for a worker to load its weights
    silent_s: float = Field(5.0, gt=0)  # a worker that does not say how it is for this long hangs, and is killed
    restarts: int = Field(10, ge=0)  # of one worker within restart_window_s; one more, and it is given up
    restart_window_s: float = Field(600.0, gt=0)
    recover_s: float = Field(60.0, ge=0)  # requests wait this long for a lost FFN rank to be served again; 0: not
    standby_ffn: int = Field(0, ge=0, le=64)  # processes that wait to take a lost FFN worker's place


class PricesSection(_Section):
    """USD per hour of one worker. With both, the metrics say what tokens cost."""

    attention: Amount | None = None
    ffn: Amount | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> PricesSection:
        if (self.attention is None) != (self.ffn is None):
            raise ValueError("needs the prices of both roles, attention and ffn, or of neither")
        return self


class RouterSection(_Section):
    """The HTTP front door."""

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65535)
    drain_s: float = Field(5.0, ge=0)  # how long in-flight requests may finish on shutdown
    policy: PolicyName = "prefix"  # how an attention worker is chosen (router.relay.policy)
    max_queue: int = Field(1024, ge=1)  # requests without a first token yet, over all workers; past it: HTTP 429
    replay_s: float = Field(60.0, ge=0)  # requests that lost their attention worker wait this long for another
    silence_s: float = Field(10.0, ge=2)  # an attention worker with requests that says nothing for this long is lost
    request_timeout_s: Annotated[float, Field(gt=0)] | None = (
        None  # longest a request may take; clients may ask for less
    )
    api_keys_file: str | None = Field(None, min_length=1)  # a key a line; besides them, those in AFD_API_KEYS
    cors_origins: Annotated[list[str], AfterValidator(_origins)] = Field(default_factory=list)
    max_body_mib: float = Field(32.0, gt=0, le=1024)
    max_header_kib: float = Field(64.0, ge=1, le=1024)  # of one request, its first line included
    max_headers: int = Field(100, ge=10, le=10_000)
    trust_request_chat_template: bool = False  # a template is a program, and may run for as long as it likes
    log_format: Literal["text", "json"] | None = None  # None: as AFD_LOG_FORMAT says
    otlp_endpoint: Annotated[str, AfterValidator(_http_url)] | None = None  # None: OTEL_EXPORTER_OTLP_ENDPOINT
    prices: PricesSection = PricesSection()
    tool_parser: Literal["hermes", "step3"] = "hermes"  # how the model writes tool calls
    reasoning_parser: Literal["none", "step3", "deepseek_r1"] = "none"  # how it tells reasoning from the answer


class Deployment(_Section):
    """A whole deployment file (documented default: deploy/local.yaml)."""

    model: str = "smollm2-step3"
    topology: str = "1A1F"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: AttentionSection = AttentionSection()
    ffn: FfnSection = FfnSection()
    transport: TransportSection = TransportSection()
    cluster: ClusterSection = ClusterSection()
    router: RouterSection = RouterSection()

    @field_validator("topology")
    @classmethod
    def _topology_parses(cls, value: str) -> str:
        try:
            return str(Topology.parse(value))
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _nodes_are_rays(self) -> Deployment:
        if self.transport.bind == "node" and self.cluster.backend != "ray":
            raise ValueError(
                f"transport.bind is 'node', the address by which Ray knows a worker's node, but cluster.backend is "
                f"{self.cluster.backend!r}: give the address itself"
            )
        return self

    @property
    def counts(self) -> Topology:
        return Topology.parse(self.topology)

    def with_flags(self, flags: Mapping[str, object]) -> Deployment:
        """A copy with dotted keys replaced, for example {"transport.kind": "shm"}; None values are ignored."""
        data = self.model_dump()
        for key, value in flags.items():
            if value is not None:
                *path, last = key.split(".")
                section = data
                for part in path:
                    section = section[part]
                section[last] = value
        return parse(data, "the command line")


def load(path: Path | None) -> Deployment:
    """Reads a deployment file; None gives the defaults. Raises ConfigError naming the file, the key and the limit."""
    if path is None:
        return Deployment()
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the deployment file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not a mapping of settings")
    return parse(data or {}, str(path))


def parse(data: Mapping[str, Any], source: str) -> Deployment:
    """Validates `data`; `source` is named in the ConfigError that lists everything wrong with it."""
    try:
        return Deployment.model_validate(dict(data))
    except ValidationError as error:
        problems = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(dict.fromkeys(problems))) from error


def _explain(item: Any) -> str:
    # Without the names that pydantic gives to the members of a union, such as "literal['auto']".
    place = ".".join(part for part in map(str, item["loc"]) if not part.startswith(("constrained-", "literal[")))
    if item["type"] != "extra_forbidden":
        problem: str = item["msg"].removeprefix("Value error, ")
        return f"{place} is {item['input']!r}: {problem}" if place else problem
    places = list(_keys(Deployment))
    leaf = str(item["loc"][-1])
    homes = [p for p in places if p.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(
        place, places, n=1, cutoff=0.6
    )
    return f"unknown key {place}" + (
        f" (did you mean {' or '.join(homes)}?)" if homes else f"; known are {', '.join(places)}"
    )


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
