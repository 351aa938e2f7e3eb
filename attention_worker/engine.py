"""READ FIRST. The attention worker's loop: take the microbatch whose answer is here, resume it, send what it yields.

One thread owns everything below (model, KV cache, scheduler, requests, port). Other threads only `submit`, `cancel`,
`drop_owner`, `adopt`, `drain` and `stop`, which leave a note in the inbox and wake the loop.

A step that fails is told to its own requests, and the loop goes on. When an FFN rank has no worker left, every layer
waits for it: microbatches, requests and KV stay as they are, new requests are queued, and the port keeps what was not
answered. `adopt` brings a replacement, which gets exactly that, so the tokens are those that would have come anyway.
Without one for `recover_s` seconds the engine is lost: every request ends with the reason, and new ones are refused.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

import torch

from afd.errors import TransportError
from afd.models.halves import AttentionHalf
from afd.pipeline.timeline import Activity, Timeline
from afd.transport.attention_port import AttentionPort
from afd.transport.base import Link
from afd.transport.frame import Frame, FrameKind
from afd.types import FfnAddress, GenerateRequest, Role, SampledToken, WorkerState
from attention_worker.choice import choose, has_room
from attention_worker.grammar import Grammars
from attention_worker.kv_cache import KvCache
from attention_worker.microbatch import Dispatch, Microbatch
from attention_worker.requests import Publish, Requests
from attention_worker.sampler import Sampler
from attention_worker.scheduler import Batch, Scheduler
from attention_worker.sequence import Sequence
from attention_worker.tuner import MicrobatchTuner

log = logging.getLogger(__name__)

# The loop looks up this often when nothing happens; answers, notes and lost peers wake it at once.
IDLE_S = 1.0

# Longest wait for a step of attention to end, after which a new link is taken.
ADOPT_S = 5.0


class Engine:
    """`port` is connected to every FFN rank. `recover_s`: how long to wait for a rank's replacement; 0: not at all.
    `tuner`, if there is one, sets the scheduler's number of microbatches as it goes; without `grammars`, requests with
    a grammar are refused."""

    def __init__(
        self,
        model: AttentionHalf,
        cache: KvCache,
        scheduler: Scheduler,
        port: AttentionPort,
        publish: Publish,
        *,
        max_context: int,
        max_waiting: int,
        attention_rank: int = 0,
        recover_s: float = 0.0,
        tuner: MicrobatchTuner | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.timeline = Timeline(Role.ATTENTION, attention_rank)
        self.scheduler = scheduler
        self.tuner = tuner
        self.port = port
        spec = model.spec
        self._hidden = spec.hidden
        self.requests = Requests(
            scheduler,
            publish,
            vocab=spec.vocab,
            eos_token_ids=spec.eos_token_ids,
            max_context=max_context,
            max_waiting=max_waiting,
            compile_grammar=self._compile if grammars else None,
        )
        self._grammars = grammars
        sampler = Sampler(spec.eos_token_ids)
        self.microbatches = [
            Microbatch(
                index,
                model,
                cache,
                scheduler,
                sampler,
                self._complete,
                may_begin=self._has_room,
                timeline=self.timeline,
            )
            for index in range(tuner.most if tuner else scheduler.microbatches)
        ]
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # The scheduler found nothing although it has work (no free blocks): ask again only when something changed.
        self._starved = False
        self._recover_s = recover_s
        self._missing_since: float | None = None  # since when an FFN rank has no worker, and
        self._ailment = ""  # why, in a sentence
        self._lost = False
        self._stopping = False

    def run(self) -> None:
        """Until `stop`. The thread that calls this owns the engine."""
        with torch.inference_mode():
            while not self._stopping:
                try:
                    self._turn()
                except TransportError as error:
                    self._miss(error)
                except Exception as error:  # our own bug: say so to everybody rather than hang them
                    log.exception("the engine failed")
                    self._lose(f"the attention worker's engine failed: {error}")
        self._fail_all("the attention worker is stopping")
        if self._grammars:
            self._grammars.close()
        self.requests.flush()

    @property
    def state(self) -> WorkerState:
        """ready, recovering (waits for an FFN rank to come back), draining (new requests are refused) or lost (no FFN
        worker came back); `problem` says why."""
        if self._lost:
            return "lost"
        return "draining" if self.requests.problem else "recovering" if self._ailment else "ready"

    @property
    def problem(self) -> str:
        """One sentence on what keeps it from being ready, or ""."""
        return self.requests.problem or self._ailment

    def _turn(self) -> None:
        self._read_inbox()
        self.requests.flush()
        if self._lost or self._stopping:
            return
        if self._missing_since is not None and time.monotonic() >= self._missing_since + self._recover_s:
            self._lose(f"{self._ailment}; nobody came in its place within {self._recover_s:g} s (cluster.recover_s)")
            return
        # The only wait: a note's wake-up that it takes is followed by a look into the inbox.
        self._collect(0.0 if self._choose() else IDLE_S)
        if microbatch := self._choose():
            self._advance(microbatch)

    # ---- the loop's verbs -----------------------------------------------------------------------------------

    def _choose(self) -> Microbatch | None:
        return choose(self.microbatches, len(self.port.ffn_ranks), self._may_begin)

    def _may_begin(self) -> bool:
        return not self._starved and self._has_room() and self.scheduler.has_work()

    def _has_room(self) -> bool:
        return has_room(self.microbatches, self.scheduler.microbatches)

    def _advance(self, microbatch: Microbatch) -> None:
        """Resumes a microbatch, and sends what it yields."""
        errors = [a.message for a in microbatch.answers.values() if a.kind is FrameKind.ERROR]
        if errors:
            self._fail(microbatch, errors[0])
            return
        try:
            dispatch = microbatch.resume(self.port.ffn_ranks)
        except Exception as error:  # a bug or a full memory: told to the requests it hit, the others go on
            if microbatch.batch is None:
                raise  # nobody's step, so everybody's problem
            log.exception("a step of microbatch %d failed", microbatch.index)
            self._fail(microbatch, f"the attention worker failed in this step: {error}")
            return
        self._starved = microbatch.batch is None
        if dispatch is not None:
            self._send(microbatch, dispatch)

    def _send(self, microbatch: Microbatch, dispatch: Dispatch) -> None:
        microbatch.sent_at = time.monotonic()
        ids, weights = (dispatch.routing.expert_ids, dispatch.routing.weights) if dispatch.routing else (None, None)
        y, step, layer = dispatch.y, dispatch.step, dispatch.layer
        self.timeline.mark(Activity.DISPATCH, microbatch.index, step, layer, y.numel() // self._hidden)
        self.port.dispatch(microbatch.index, step, layer, y, ids, weights)
        self.timeline.mark(Activity.OTHER)

    def _collect(self, timeout_s: float) -> None:
        """Takes answers off the port: waits for the first, then takes all others that are here."""
        if timeout_s:
            self.timeline.mark(Activity.WAIT if any(m.dispatch for m in self.microbatches) else Activity.IDLE)
        frame = self.port.collect(timeout_s)
        if timeout_s and frame is None:
            self.timeline.mark(Activity.OTHER)
        while frame is not None:
            self._mark_answer(frame)
            self.microbatches[frame.microbatch].answers[frame.ffn_rank] = frame
            frame = self.port.collect(0.0)

    def _mark_answer(self, frame: Frame) -> None:
        wire_bytes = 0 if frame.hidden is None else frame.hidden.nbytes
        self.timeline.mark(
            Activity.COLLECT, frame.microbatch, frame.step, frame.layer, frame.num_tokens, wire_bytes, frame.ffn_rank
        )

    def _complete(self, batch: Batch, tokens: list[SampledToken]) -> None:
        self._starved = False
        self.requests.complete(batch, tokens)
        if self.tuner:
            running = len(self.scheduler.running)
            self.scheduler.microbatches = self.tuner.observe(
                time.monotonic(), len(tokens), running, batch.prompt_tokens
            )

    # ---- failures -------------------------------------------------------------------------------------------

    def _fail(self, microbatch: Microbatch, sentence: str) -> None:
        """Ends the requests of one microbatch's step."""
        batch = microbatch.batch
        microbatch.reset()
        self._starved = False
        if batch is not None:
            self.requests.fail([chunk.sequence for chunk in batch.chunks], sentence)

    def _fail_all(self, sentence: str) -> None:
        for microbatch in self.microbatches:
            microbatch.reset()
        self.requests.fail_all(sentence)

    def _miss(self, error: TransportError) -> None:
        """An FFN worker is lost, or (without a peer) the port itself is of no more use."""
        missing = self.port.missing
        if not error.peer or (missing and not self._recover_s):
            self._lose(str(error))
        elif missing:
            log.warning("%s; everything waits for one in its place, for at most %g s", error, self._recover_s)
            if self._missing_since is None:
                self._missing_since, self._ailment = time.monotonic(), str(error)
        else:
            log.warning("%s; another worker of its rank goes on with its work", error)

    def _take_in(self, address: FfnAddress, link: Link) -> None:
        if self._lost or self._stopping:
            link.close()
            return
        self.port.adopt(address, link)
        log.info("%s serves", link.peer)
        if not self.port.missing:
            self._missing_since, self._ailment = None, ""

    def _lose(self, sentence: str) -> None:
        """An FFN rank is gone, and nothing can be computed without it. The port is not used again."""
        log.error("%s", sentence)
        self._lost = True
        self.timeline.mark(Activity.IDLE)
        self.requests.problem = sentence
        self._fail_all(sentence)
        self.requests.flush()

    # ---- other threads' notes -------------------------------------------------------------------------------

    def submit(self, owner: int, request: GenerateRequest) -> None:
        """The outcome, a refusal included, comes through `publish`. `owner` names a router connection."""
        self._note(lambda: self.requests.add(owner, request))

    def cancel(self, owner: int, request_id: str) -> None:
        """Frees the request's blocks within a step; nothing more is published for it."""
        self._note(lambda: self.requests.cancel(owner, request_id))

    def drop_owner(self, owner: int) -> None:
        """Cancels every request of a router connection that ended."""
        self._note(lambda: self.requests.cancel_all_of(owner))

    def adopt(self, address: FfnAddress, link: Link) -> None:
        """Takes a new link to an FFN worker, dialled at `address`, in place of the one that its rank and replica had.
        Called by the worker's `reconnect`; returns when it serves. The link is the engine's from now on, which closes
        it in the end."""
        taken = threading.Event()

        def take() -> None:
            self._take_in(address, link)
            taken.set()

        self._note(take)
        if not taken.wait(ADOPT_S):
            log.warning("the engine has not taken the link to %s within %g s; it will", link.peer, ADOPT_S)

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the others; whether all ended in time."""
        refusing = threading.Event()

        def refuse() -> None:
            self.requests.problem = self.requests.problem or "the attention worker is shutting down"
            refusing.set()

        self._note(refuse)
        deadline = time.monotonic() + timeout_s
        return refusing.wait(timeout_s) and self.requests.none_left.wait(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Ends `run`; requests that are still here are told."""

        def end() -> None:
            self._stopping = True

        self._note(end)

    def _compile(self, sequence: Sequence) -> None:
        assert self._grammars is not None, "a grammar without a compiler"
        self._grammars.compile(
            sequence.request.grammar,
            lambda outcome: self._note(lambda: self.requests.compiled(sequence, outcome)),
            wanted=lambda: not sequence.cancelled,
        )

    def _note(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)
        self.port.wake()

    def _read_inbox(self) -> None:
        """Carries out all notes; without a port to wait at, waits here for one."""
        with contextlib.suppress(Empty):
            note = self._inbox.get(timeout=IDLE_S) if self._lost else self._inbox.get_nowait()
            while True:
                note()
                self._starved = False
                note = self._inbox.get_nowait()
