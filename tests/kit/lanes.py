"""Lanes without links: segments are computed in this process, or fail, or wait, as a test says."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable

import numpy as np
import torch

from cluster.core.descriptors import DType
from cluster.core.errors import DeadlineExceeded, MoeError
from cluster.core.ids import ExpertId, Incarnation, Role
from cluster.core.routing_table import ActorEndpoint, RoutingTable, TableCopy, TableModel
from router_service.core.segments import OnEnd, SegmentReply, SegmentRequest, Withdraw

Forward = Callable[[ExpertId, str, torch.Tensor], torch.Tensor]
TORCH = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16, DType.FP32: torch.float32}


class FakeLanes:
    """Lanes to actors that compute `forward(expert, version, rows)`. `requests` are submits, `withdrawn` of them; `warmed` shadows, `released` ones."""

    def __init__(self, forward: Forward) -> None:
        self.requests: list[SegmentRequest] = []
        self.withdrawn: list[SegmentRequest] = []
        self.warmed: list[tuple[ExpertId, TableCopy]] = []
        self.released: list[tuple[ExpertId, TableCopy, bool]] = []
        self.queued: Counter[str] = Counter()
        self._forward = forward
        self._failures: defaultdict[str, deque[Exception]] = defaultdict(deque)
        self._broken: dict[str, Exception] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._arrived = asyncio.Condition()

    def fail_next(self, actor_id: str, *errors: Exception) -> None:
        """The actor's next segments end with these errors, one each."""
        self._failures[actor_id].extend(errors)

    def break_actor(self, actor: str, error: Exception) -> None:
        """Every segment of the actor, or of one incarnation of it (`ID/gN`), ends with this error."""
        self._broken[actor] = error

    def hold(self) -> None:
        """Answer nothing from now on, until `let_go`."""
        self._open.clear()

    def let_go(self) -> None:
        """Answer again."""
        self._open.set()

    async def wait_until_submitted(self, count: int) -> None:
        """Until so many segments have been submitted in all."""
        async with asyncio.timeout(10), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)

    def burden(self, actor_id: str) -> float:
        """What the test put into `queued`."""
        return self.queued[actor_id]

    def warm(self, expert: ExpertId, shadow: TableCopy) -> None:
        """Remember the hint."""
        self.warmed.append((expert, shadow))

    def release(self, expert: ExpertId, shadow: TableCopy, *, is_back: bool) -> None:
        """Remember that nobody waits for it, and whether a replica answered."""
        self.released.append((expert, shadow, is_back))

    def begin(self, request: SegmentRequest, on_end: OnEnd) -> Withdraw:
        """Compute, fail or wait."""
        task = asyncio.ensure_future(self._submit(request))

        def ended(_: asyncio.Future[SegmentReply]) -> None:
            if not task.cancelled():
                error = task.exception()
                if error is not None and not isinstance(error, MoeError):
                    raise error
                on_end(task.result() if error is None else error)

        task.add_done_callback(ended)
        return task.cancel

    async def _submit(self, request: SegmentRequest) -> SegmentReply:
        self.requests.append(request)
        async with self._arrived:
            self._arrived.notify_all()
        try:
            async with asyncio.timeout_at(request.deadline_s):
                await self._open.wait()
        except TimeoutError as error:
            message = "expired in the lane"
            raise DeadlineExceeded(message) from error
        except asyncio.CancelledError:
            self.withdrawn.append(request)
            raise
        return self._answer(request)

    def _answer(self, request: SegmentRequest) -> SegmentReply:
        actor_id = request.copy.incarnation.actor_id
        if self._failures[actor_id]:
            raise self._failures[actor_id].popleft()
        for name in (actor_id, str(request.copy.incarnation)):
            if name in self._broken:
                raise self._broken[name]
        rows_ND = torch.from_numpy(np.array(request.rows)).view(TORCH[request.dtype])
        outputs = self._forward(request.expert, request.copy.version, rows_ND).contiguous().view(torch.uint8).numpy()
        assert outputs.shape == request.rows.shape
        return SegmentReply(
            rows=outputs,
            incarnation=request.copy.incarnation,
            version=request.copy.version,
            role=request.copy.role,
            attempt=request.attempt,
            queue_s=0.001,
            compute_s=0.002,
            transfer_s=0.003,
            node_id="node-1",
            bytes_sent=outputs.nbytes,
            bytes_received=outputs.nbytes,
        )


def copy_on(actor_id: str, version: str, *, generation: int = 1, role: Role = Role.REPLICA) -> TableCopy:
    """A published copy."""
    return TableCopy(Incarnation(actor_id, generation), version, role)


def table_of(model: str, copies: dict[tuple[int, int], Iterable[TableCopy]], *, epoch: int = 1) -> RoutingTable:
    """A table of one model from the copies of each (layer, index)."""
    published = {ExpertId(model, layer, index): tuple(each) for (layer, index), each in copies.items()}
    incarnations = {copy.incarnation for each in published.values() for copy in each}
    actors = {inc.actor_id: ActorEndpoint(inc, "127.0.0.1", 1, f"node-of-{inc.actor_id}") for inc in incarnations}
    missing = sum(not each for each in published.values())
    return RoutingTable(epoch, actors, published, {model: TableModel(model, "", len(published), missing)})
