"""THE data path of one request: validate, gate, capacity, dispatch, combine, report. Readable top to bottom; nothing here touches Ray or disk.

    run -> _prepare   check the call, choose experts, apply capacity, sort rows by expert     (in a thread when the tensors are large)
        -> _dispatch  pick a copy for each expert, submit to all actors at once; a copy that does not answer is replaced by another at once
        -> _finish    combine in fp32 in a fixed order, account for every choice              (in a thread when the tensors are large)

All rows of one expert in one request go to one copy. Everything ends by the call's deadline; cancelling `run` withdraws what was submitted.
Shape legend: T tokens, D model width, K choices of a token, N rows that experts compute.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.core.errors import DeadlineExceeded, ExpertUnavailable, NotReady, ReplicaError, ReplicaUnavailable
from cluster.core.ids import ExpertId
from cluster.core.routing_table import RoutingTable, TableCopy
from cluster.telemetry.attributes import AttributeValue
from cluster.telemetry.tracing import Span, Tracing
from router_service.core.balance import pick_copy
from router_service.core.choose import Chosen, choose
from router_service.core.combine import combine, finish
from router_service.core.dispatch import DispatchOrder, ExpertRows, order_choices
from router_service.core.dispatch_limits import DispatchBudget, DispatchLimits
from router_service.core.layer_call import THREAD_BYTES, TORCH_DTYPES, GateChoice, LayerCall, LayerReply, Overflow, TopK
from router_service.core.outcomes import Answer, Ledger, Outcome, Plan, Report
from router_service.core.segments import SegmentReply, SegmentRequest
from router_service.core.validate import check_call, check_choices
from router_service.models import ServedLayer, ServedModel, find_model

__all__ = ["GateChoice", "LanesPort", "LayerCall", "LayerReply", "Outcome", "Overflow", "Pipeline", "Plan", "Report", "TopK"]

MAX_ATTEMPTS = 8
MAX_REASON_CHARACTERS = 160
_R = TypeVar("_R")


class LanesPort(Protocol):
    """What the pipeline needs of the lanes to the actors."""

    def begin(self, request: SegmentRequest) -> asyncio.Future[SegmentReply]:
        """Begin to compute one segment; the future fails with ReplicaError when this copy does not answer. Cancelling it withdraws the rows."""
        ...

    def queued_tokens(self, actor_id: str) -> int:
        """Rows that wait for an actor."""
        ...


@dataclass(frozen=True, slots=True)
class _Try:
    """One expert's rows on their way to one copy; `tried` did not answer."""

    rows: ExpertRows
    copy: TableCopy
    tried: tuple[TableCopy, ...] = ()


@dataclass(slots=True)
class _Flight:
    """One request under way: what was planned, and who has answered."""

    call: LayerCall
    layer: ServedLayer
    table: RoutingTable
    chosen: Chosen
    order: DispatchOrder
    rows_NB: NDArray[np.uint8]
    replies: dict[int, SegmentReply] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    def expert(self, index: int) -> ExpertId:
        return ExpertId(self.call.model, self.call.layer, index)


class Pipeline:
    """Runs calls against the table in use. `rng` draws the balancer's pairs; `max_tokens` and `limits` bound one request, `limits` also all together."""

    def __init__(
        self,
        lanes: LanesPort,
        models: Mapping[str, ServedModel],
        table: Callable[[], RoutingTable | None],
        rng: random.Random,
        *,
        tracing: Tracing | None = None,
        max_tokens: int = 65_536,
        limits: DispatchLimits | None = None,
    ) -> None:
        self._lanes = lanes
        self._models = models
        self._table = table
        self._rng = rng
        self._tracing = tracing or Tracing.disabled()
        self._max_tokens = max_tokens
        self._limits = limits or DispatchLimits()
        self.budget = DispatchBudget(self._limits.max_bytes)

    async def run(self, call: LayerCall) -> LayerReply:
        """Run one MoE layer over the call's tokens.

        Raises NotReady, NotFound, InvalidRequest, Overloaded, ExpertUnavailable and DataLoss (with the caller's failed rows), DeadlineExceeded.
        """
        if asyncio.get_running_loop().time() >= call.deadline_s:
            raise _too_late()
        layer, table = self._resolve(call)
        is_large = call.hidden_states.nbytes > THREAD_BYTES
        num_choices = check_choices(call, layer.descriptor, self._limits.choices_per_request(layer.row_bytes))
        try:
            with self.budget.hold(num_choices * layer.row_bytes):
                async with asyncio.timeout_at(call.deadline_s):
                    flight = await _compute(is_large, self._prepare, call, layer, table)
                    await self._dispatch(flight)
                    return await _compute(is_large, self._finish, flight)
        except TimeoutError as error:
            raise _too_late() from error

    def _resolve(self, call: LayerCall) -> tuple[ServedLayer, RoutingTable]:
        table = self._table()
        if table is None:
            message = "this router has no routing table yet; retry in a moment"
            raise NotReady(message)
        return find_model(self._models, call.model).layer(call.layer), table

    def _prepare(self, call: LayerCall, layer: ServedLayer, table: RoutingTable) -> _Flight:
        x_TD = check_call(call, layer.descriptor, layer.dtype, max_tokens=self._max_tokens, num_positions=layer.gate.num_positions)
        if isinstance(call.routing, GateChoice):
            with self._tracing.span("moe.gate", parent=call.traceparent, attributes={"layer": call.layer, "tokens": x_TD.shape[0]}):
                chosen = choose(call.routing, layer.gate, x_TD)
        else:
            chosen = choose(call.routing, layer.gate, x_TD)
        with self._tracing.span("moe.plan", parent=call.traceparent, attributes={"layer": call.layer, "epoch": table.epoch}) as span:
            order = order_choices(chosen.ids_TK)
            rows_ND = x_TD.index_select(0, torch.from_numpy(order.rows_N))
            span.set(choices=order.rows_N.size, segments=len(order.experts))
        return _Flight(call, layer, table, chosen, order, rows_ND.view(torch.uint8).numpy())

    async def _dispatch(self, flight: _Flight) -> None:
        """Get an answer for every expert. Raises ExpertUnavailable with all rows that lack one, and before anything is sent if no copy exists."""
        tries = [self._place(flight, rows, ()) for rows in flight.order.experts]
        self._refuse_lost(flight)
        found = sorted((one for one in tries if one is not None), key=_actor_of)
        await _together([self._ask(flight, list(group)) for _, group in groupby(found, key=_actor_of)])
        self._refuse_lost(flight)

    def _place(self, flight: _Flight, rows: ExpertRows, tried: tuple[TableCopy, ...]) -> _Try | None:
        """The next copy to try, from the newest table: a copy published meanwhile counts. None: the expert is lost to this request."""
        expert = flight.expert(rows.index)
        copies = (self._table() or flight.table).copies_of(expert) if tried else flight.table.copies_of(expert)
        exact = flight.call.fidelity_exact
        copy = pick_copy(copies, tried=tried, exact=exact, queued_tokens=self._lanes.queued_tokens, rng=self._rng)
        if copy is None or len(tried) >= MAX_ATTEMPTS:
            kind = "full-precision copies" if exact else "copies"
            flight.lost[rows.index] = f"none of its {len(tried)} {kind} answered" if tried else f"it has no {kind}"
            return None
        return _Try(rows, copy, tried)

    async def _ask(self, flight: _Flight, tries: Sequence[_Try]) -> None:
        """Submit to one actor and wait; what it does not answer goes to other copies at once."""
        actor_id, attempt = tries[0].copy.incarnation.actor_id, len(tries[0].tried)
        attributes: dict[str, AttributeValue] = {
            "layer": flight.call.layer,
            "epoch": flight.table.epoch,
            "actor_id": actor_id,
            "segments": len(tries),
            "attempt": attempt,
        }
        with self._tracing.span("moe.dispatch", kind="client", parent=_parent(flight, attempt), attributes=attributes) as span:
            traceparent = span.traceparent if self._tracing.names_actors else ""
            waiting = {self._lanes.begin(_request(flight, one, traceparent)): one for one in tries}
            try:
                await self._collect(flight, waiting, span)
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise
            if span.is_recording:
                _describe(span, [reply for one in tries if (reply := flight.replies.get(one.rows.index)) is not None and reply.attempt == attempt])

    async def _collect(self, flight: _Flight, waiting: Mapping[asyncio.Future[SegmentReply], _Try], span: Span) -> None:
        """Take what comes. As soon as a copy does not answer, others are asked for its rows, while the rest is waited for."""
        ended, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        lost: list[tuple[_Try, ReplicaError]] = []
        for one, future, error in [(waiting[future], future, future.exception()) for future in ended]:
            if error is None:
                flight.replies[one.rows.index] = future.result()
            elif isinstance(error, ReplicaError):
                span.event("failover", reason=error.reason)
                lost.append((one, error))
            else:
                raise error
        if lost:
            others = [self._fail_over(flight, one, error) for one, error in lost]
            await _together([*others, self._collect(flight, {future: waiting[future] for future in rest}, span)] if rest else others)

    async def _fail_over(self, flight: _Flight, one: _Try, error: ReplicaError) -> None:
        following = self._place(flight, one.rows, (*one.tried, one.copy))
        if following is not None:
            await self._ask(flight, [following])
        elif one.rows.index in flight.lost:
            flight.lost[one.rows.index] += f"; the last one: {_words(error)}"

    def _refuse_lost(self, flight: _Flight) -> None:
        if not flight.lost:
            return
        spans = [part for part in flight.order.experts if part.index in flight.lost]
        rows = np.unique(np.concatenate([flight.order.rows_N[part.start : part.stop] for part in spans]))
        first = min(flight.lost)
        message = f"expert {flight.expert(first)}: {flight.lost[first]}"
        if len(flight.lost) > 1:
            message += f", and {len(flight.lost) - 1} more experts of this layer likewise"
        message += f"; {rows.size} of {flight.call.hidden_states.shape[0]} rows failed; retry, or see `moelastic status`"
        raise ExpertUnavailable(message, failed_rows=tuple(rows.tolist()))

    def _finish(self, flight: _Flight) -> LayerReply:
        call, chosen = flight.call, flight.chosen
        with self._tracing.span("moe.combine", parent=call.traceparent, attributes={"layer": call.layer, "tokens": chosen.ids_TK.shape[0]}):
            reply_TD = finish(combine(_outputs(flight), flight.order.place_TK, chosen.weights_TK), call.hidden_states.dtype)
        ledger = Ledger(chosen.ids_TK, chosen.weights_TK.numpy(), chosen.dropped_TK)
        for index, reply in flight.replies.items():
            ledger.answered(index, Answer(reply.version, reply.incarnation.generation, reply.role, reply.attempt))
        return LayerReply(reply_TD, ledger.report(epoch=flight.table.epoch, want_plan=call.want_plan))


def _outputs(flight: _Flight) -> torch.Tensor:
    """What the experts computed, [N, D] in dispatch order."""
    answers = [flight.replies[part.index].rows for part in flight.order.experts]
    flat = np.concatenate([*answers, flight.rows_NB[:0]]).reshape(-1)
    return torch.from_numpy(flat).view(TORCH_DTYPES[flight.layer.dtype]).reshape(flight.order.rows_N.size, flight.layer.width)


def _request(flight: _Flight, one: _Try, traceparent: str) -> SegmentRequest:
    return SegmentRequest(
        expert=flight.expert(one.rows.index),
        copy=one.copy,
        dtype=flight.layer.dtype,
        dim=flight.layer.width,
        rows=flight.rows_NB[one.rows.start : one.rows.stop],
        deadline_s=flight.call.deadline_s,
        exact=flight.call.fidelity_exact,
        epoch=flight.table.epoch,
        attempt=len(one.tried),
        traceparent=traceparent or None,
        flow=id(flight),
    )


def _words(error: ReplicaError) -> str:
    """Why a copy did not answer, for the caller: a link's own words hold addresses, which are nobody's business out there."""
    text = "its link was lost or could not be made" if isinstance(error, ReplicaUnavailable) else str(error)[:MAX_REASON_CHARACTERS]
    return f"{error.reason}: {text}"


def _actor_of(one: _Try) -> str:
    return one.copy.incarnation.actor_id


def _parent(flight: _Flight, attempt: int) -> str | None:
    """First tries hang below the call; a later one hangs below the try that it replaces, which is the current span."""
    return flight.call.traceparent if attempt == 0 else None


def _describe(span: Span, replies: Sequence[SegmentReply]) -> None:
    if not replies:
        return
    span.set(
        node_id=replies[0].node_id,
        role=replies[0].role.name.lower(),
        tokens=sum(len(reply.rows) for reply in replies),
        bytes_sent=sum(reply.bytes_sent for reply in replies),
        bytes_received=sum(reply.bytes_received for reply in replies),
        queue_s=max(reply.queue_s for reply in replies),
        compute_s=max(reply.compute_s for reply in replies),
        transfer_s=max(reply.transfer_s for reply in replies),
    )


async def _compute(is_large: bool, work: Callable[..., _R], *arguments: object) -> _R:
    """Tensor work: in a thread when it would hold up the loop, here when a thread costs more than the work."""
    return await asyncio.to_thread(work, *arguments) if is_large else work(*arguments)


async def _together(waits: Sequence[Coroutine[Any, Any, _R]]) -> list[_R]:
    """All results, in order; the first error ends the others, waits for their end and is raised as it is."""
    if len(waits) == 1:
        return [await waits[0]]
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before every expert answered; allow more time, or send fewer tokens at once")
