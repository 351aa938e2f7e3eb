"""Connections to the attention workers that are ready, kept in step with the cluster view.

One task polls the view and reconciles; a stream that breaks wakes it. Connecting and asking for status happen in tasks
of their own, so that a slow worker delays nobody. Everything belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence

from afd.credentials import OPEN, Credentials
from afd.errors import TransportError, Unavailable
from afd.rpc.attention_client import AttentionClient, Inbox
from afd.types import ClusterView, GenerateRequest, Role, WorkerView
from router.relay.member import Member
from router.relay.policy import Policy
from router.relay.stranded import Stranded

log = logging.getLogger(__name__)

_STATUS_S = 1.0  # longest wait for a worker's status where somebody waits for the answer
_ASK_S = 0.5  # between two questions for a worker's status: what other routers have sent it counts for the policy
_RECONNECT_S = 1.0  # between a connection that broke and the next one to the same address


class Pool:
    """`watch` gives the latest cluster view; it must be cheap. `start` and `close` on the loop that uses the pool.

    `stranded` are the requests that wait for some worker to be ready again. See RouterSettings for the durations.
    """

    def __init__(
        self,
        watch: Callable[[], ClusterView],
        policy: Policy,
        *,
        deadline_s: float,
        silence_s: float,
        connect_s: float,
        poll_s: float,
        replay_s: float,
        credentials: Credentials = OPEN,
    ) -> None:
        self.stranded = Stranded(self.submit, replay_s)
        self._watch = watch
        self._policy = policy
        self._deadline_s = deadline_s
        self._silence_s = silence_s
        self._connect_s = connect_s
        self._poll_s = poll_s
        self._credentials = credentials
        self._members: dict[int, Member] = {}  # by attention_rank
        self._broken: dict[str, float] = {}  # address: loop time at which its last connection ended
        self._wake = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._reconciler: asyncio.Task[None] | None = None
        self.view = watch()

    async def start(self) -> None:
        """Returns once every worker that is ready now has been tried once."""
        self.view = self._watch()  # the cluster may have become ready since this pool was made
        self._reconcile()
        await asyncio.gather(*(member.task for member in self._members.values() if member.task), return_exceptions=True)
        self._reconciler = asyncio.create_task(self._follow_view())

    async def close(self) -> None:
        """Ends every stream; requests in flight are told."""
        if self._reconciler is not None:
            self._reconciler.cancel()
            await asyncio.gather(self._reconciler, return_exceptions=True)
        self.fail_all("the router is shutting down")
        for attention_rank in list(self._members):
            self._drop(attention_rank, "the router is shutting down")
        await asyncio.gather(*self._closing, return_exceptions=True)

    @property
    def members(self) -> Sequence[Member]:
        """Known workers, by attention_rank."""
        return [self._members[attention_rank] for attention_rank in sorted(self._members)]

    @property
    def problem(self) -> str:
        """One sentence on why no request can be served now, or ""."""
        if self.view.problem:
            return self.view.problem
        if any(member.usable for member in self._members.values()):
            return ""
        workers = [worker for worker in self.view.workers if worker.role is Role.ATTENTION]
        reasons = [f"attention worker {worker.rank} {self._ailment(worker)}" for worker in workers]
        return f"no attention worker can take requests: {'; '.join(reasons) or 'the cluster has none'}"

    def max_context(self, most: int) -> int:
        """Tokens, prompt and answer together, that every connected worker takes: at most `most`, less where the KV
        cache of a worker holds less. A worker that has not said counts for nothing."""
        statuses = [member.status for member in self._members.values() if member.status is not None]
        return min([most, *(status.max_context for status in statuses if status.max_context > 0)])

    def submit(
        self, request: GenerateRequest, inbox: Inbox, session: str = "", tried: Collection[AttentionClient] = ()
    ) -> AttentionClient:
        """Sends `request` to the worker that the policy chooses, none of those `tried` already, and returns its client,
        for cancelling.

        Raises Unavailable with a sentence when no worker can take it.
        """
        if self.view.problem:
            raise Unavailable(self.view.problem)
        usable = [(m, m.client) for m in self.members if m.usable and m.client is not None and m.client not in tried]
        if not usable:
            raise Unavailable(self.problem or "no other attention worker can take the request")
        usable = [(member, client) for member, client in usable if member.answers] or usable
        clients = {member.worker.rank: client for member, client in usable}
        chosen = self._policy.choose(request, session, [member.load(client) for member, client in usable])
        clients[chosen].submit(request, inbox)
        return clients[chosen]

    def fail_all(self, sentence: str) -> None:
        """Ends every request in flight with an error output saying `sentence`; none goes on elsewhere any more."""
        self.stranded.end(sentence)
        for member in self._members.values():
            if member.client is not None:
                member.client.fail(sentence, refused="")

    def hand_over(self, attention_rank: int) -> None:
        """Empties a worker that is to stop: its requests go on at the others, where they left off, and it gets no more
        from this router. An unknown or unconnected worker has none. Returns at once.

        Raises Unavailable, and changes nothing, when no other worker could take them.
        """
        member = self._members.get(attention_rank)
        if member is None or member.client is None:
            return
        if not any(other.usable for other in self._members.values() if other is not member):
            raise Unavailable(f"no other attention worker could take the requests of attention worker {attention_rank}")
        member.leaving = True
        member.client.let_go(f"attention worker {attention_rank} hands its requests over")

    async def refresh(self) -> None:
        """Asks every usable worker for its status, at the same time; one that does not answer keeps its last."""
        asking = [self._ask(member, member.client) for member in self._members.values() if member.client]
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(outcome, Exception):  # not a cancellation: that connection was closed meanwhile
                raise outcome

    async def _follow_view(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._poll_s)
            self._wake.clear()
            try:
                self.view = self._watch()
                self._reconcile()
            except Exception:
                log.exception("the cluster view could not be read; the last one stands")
            self.stranded.retry()

    def _reconcile(self) -> None:
        workers = {worker.rank: worker for worker in self.view.workers if worker.role is Role.ATTENTION}
        for attention_rank in self._members.keys() - workers.keys():
            self._drop(attention_rank, f"attention worker {attention_rank} has left the cluster")
        for attention_rank, worker in workers.items():
            member = self._members.get(attention_rank)
            if member is not None and self._is_over(member, worker):
                why = worker.message or f"attention worker {attention_rank} was lost: it is {worker.state}"
                self._drop(attention_rank, why)
                member = None
            if member is not None:
                member.worker = worker
                self._check_progress(member)
                self._ask_again(member)
            elif worker.state in ("ready", "recovering") and worker.address and not self._just_broken(worker.address):
                self._members[attention_rank] = member = Member(worker)
                member.task = asyncio.create_task(self._connect(member))

    @staticmethod
    def _is_over(member: Member, worker: WorkerView) -> bool:
        """Whether the connection is of no more use: broken, failed to open, or of an earlier life of the worker."""
        broken = member.client.lost != "" if member.client is not None else member.task is None or member.task.done()
        return broken or worker.state in ("starting", "lost") or worker.address != member.worker.address

    def _just_broken(self, address: str) -> bool:
        """Whether to wait with connecting again: a worker that ends every stream must not keep the router busy."""
        return asyncio.get_running_loop().time() < self._broken.get(address, float("-inf")) + _RECONNECT_S

    def _drop(self, attention_rank: int, why: str) -> None:
        member = self._members.pop(attention_rank)
        self._policy.forget(attention_rank)
        now = asyncio.get_running_loop().time()
        self._broken = {a: at for a, at in self._broken.items() if at + _RECONNECT_S > now} | {
            member.worker.address: now
        }
        if member.client is not None:
            member.client.fail(why)
        self._spawn_closing(self._close_member(member))

    def _spawn_closing(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    @staticmethod
    async def _close_member(member: Member) -> None:
        if member.task is not None:
            member.task.cancel()
            await asyncio.gather(member.task, return_exceptions=True)
        if member.client is not None:
            await member.client.close()

    async def _connect(self, member: Member) -> None:
        peer = f"attention worker {member.worker.rank}"
        try:
            client = await AttentionClient.connect(
                member.worker.address,
                peer=peer,
                deadline_s=self._connect_s,
                on_lost=self._wake.set,
                credentials=self._credentials,
            )
        except TransportError as error:
            log.warning("%s", error)
            return
        member.client = client
        log.info("connected to %s at %s", peer, member.worker.address)
        await self._ask(member, client)
        self.stranded.retry()

    async def _ask(self, member: Member, client: AttentionClient) -> None:
        """Takes the worker's status in; steps finished since the last one are a sign of life."""
        member.asked_at = asyncio.get_running_loop().time()
        try:
            status = await client.status(deadline_s=min(_STATUS_S, self._deadline_s))
        except TransportError as error:
            member.unanswered += 1
            log.debug("%s", error)
            return
        member.answered_at, member.unanswered = asyncio.get_running_loop().time(), 0
        if member.status is not None and status.steps > member.status.steps:
            client.heard_at = asyncio.get_running_loop().time()
        member.status, member.own = status, (client.num_requests, client.num_tokens)

    def _ask_again(self, member: Member) -> None:
        due = asyncio.get_running_loop().time() >= member.asked_at + _ASK_S
        if due and member.client is not None and not member.client.lost and (not member.task or member.task.done()):
            member.task = asyncio.create_task(self._ask(member, member.client))

    def _check_progress(self, member: Member) -> None:
        """Fails the requests of a worker that is frozen or cut off, and of one that neither sends tokens nor finishes
        steps. Long prefills and a long queue give no tokens either, so silence makes the router ask whether steps go
        on."""
        client = member.client
        if client is None or client.num_requests == 0:
            return
        now = asyncio.get_running_loop().time()
        silent_s = now - client.heard_at
        if not member.answers and now - max(client.heard_at, member.answered_at) > self._silence_s:
            client.fail(
                f"{client.peer} at {client.address} is silent: for {self._silence_s:g} s (router.silence_s) it gave no "
                f"token and did not say how it is"
            )
        elif silent_s > self._deadline_s:
            client.fail(
                f"{client.peer} at {client.address} gave no token and finished no step for {self._deadline_s:g} s "
                f"(the router's deadline_s)"
            )
        elif silent_s > min(1.0, self._deadline_s / 4) and (member.task is None or member.task.done()):
            member.task = asyncio.create_task(self._probe(member, client))

    async def _probe(self, member: Member, client: AttentionClient) -> None:
        await self._ask(member, client)
        await asyncio.sleep(min(1.0, self._deadline_s / 4))  # one question at a time, and not too many

    def _ailment(self, worker: WorkerView) -> str:
        member = self._members.get(worker.rank)
        if worker.state != "ready":
            return f"is {worker.state}" + (f" ({worker.message})" if worker.message else "")
        if member is not None and member.status is not None and member.status.state == "draining":
            return f"is draining ({member.status.problem})"
        if member is not None and member.client is not None and member.client.lost:
            return f"is lost ({member.client.lost})"
        return "is not connected yet"
