"""What a router is told once, at its start. Plain values, so that nothing here depends on where models live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from afd.credentials import OPEN, Credentials
from afd.types import Role


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """`tokenizer_config` and `generation_config` are the model's JSON files of those names, parsed ({}: it has none);
    in the former, chat_template is one template and every *_token a plain string.

    `max_context` is in tokens, prompt and answer together; where an attention worker takes less, that counts.
    `vocab_size` is the model's: token ids at or above it are refused.

    A lost attention worker's requests go on at another one; `replay_s` is how long they wait for one. It is lost when
    its connection breaks or the cluster view says so; when, with requests, it neither sends anything nor answers
    for `silence_s`; and when it goes without a token or a finished step for `deadline_s`, which should be longer than
    the workers' own deadlines, whose errors say more.
    """

    model_name: str
    max_context: int
    vocab_size: int
    tokenizer_json: Path
    tokenizer_config: Mapping[str, object] = field(default_factory=dict)
    generation_config: Mapping[str, object] = field(default_factory=dict)
    tool_parser: str = "hermes"  # a name in router.answers.tools.registry
    reasoning_parser: str = "none"  # none, or a name in router.answers.reasoning.registry
    policy: str = "prefix"  # a name in router.relay.policy.POLICIES
    max_queue: int = 1024  # requests that wait for their first token, over all workers; past it they are refused
    request_timeout_s: float | None = None  # longest a request may take, whatever it asks for
    drain_s: float = 5.0  # how long requests in flight may finish on shutdown
    deadline_s: float = 60.0
    silence_s: float = 10.0
    replay_s: float = 60.0
    credentials: Credentials = OPEN  # what attention workers are shown
    connect_s: float = 10.0  # longest wait for an attention worker to accept the router's connection
    poll_s: float = 0.2  # how often the cluster view is read
    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 100
    api_keys: Sequence[str] = field(default=(), repr=False)  # clients must send one of them; (): nobody is asked
    cors_origins: Sequence[str] = ()  # of web pages that may call; "*": any
    trust_request_chat_template: bool = False
    fingerprint: str = "fp_afd"  # `system_fingerprint` of answers: another one where the same seed may answer otherwise
    otlp_endpoint: str = ""  # an OpenTelemetry collector's OTLP/HTTP; "": no spans
    usd_per_hour: Mapping[Role, float] = field(default_factory=dict)  # of one worker; {}: costs are not counted
