"""THE data path of one request: validate, gate, capacity, dispatch, combine, report. Readable top to bottom; nothing here touches Ray or disk.

    run -> _choose    check the call, choose experts, apply capacity                          (in a thread when the tensors are large)
        -> waves      small calls that come while others are under way share the rest
        -> _plan      sort rows by expert
        -> dispatcher pick a copy for each expert, ask all actors at once; a copy that fails or is late is replaced or joined by another
        -> _finish    what no copy answered goes down the ladder; combine in fp32 in a fixed order, account for every choice of each call
        -> recheck    only where the output is not finite: whose fault is it?

All rows of one expert in one wave go to one copy. Everything ends by the call's deadline; cancelling `run` withdraws what was sent for it alone.
Shape legend: T tokens, D model width, K choices of a token, N rows that experts compute.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.core.errors import DeadlineExceeded, ExpertUnavailable, MoeError, NotReady
from cluster.core.ids import Role
from cluster.core.routing_table import RoutingTable
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Tracing, current_traceparent
from router_service.caller import tenant_of_call
from router_service.core.choose import choose
from router_service.core.combine import combine, is_finite, not_finite
from router_service.core.dispatch import ExpertRows, order_choices
from router_service.core.dispatch_limits import DispatchBudget, DispatchLimits
from router_service.core.flight import MAX_ATTEMPTS
from router_service.core.ladder import compute_stand_ins, stand_in
from router_service.core.layer_call import THREAD_BYTES, TORCH_DTYPES, GateChoice, LayerCall, LayerReply, Overflow, TopK
from router_service.core.outcomes import Answer, Ledger, Outcome, Plan, Report
from router_service.core.trust import Trust
from router_service.core.validate import check_call, check_choices
from router_service.core.wave import Share, WaveLimits, joined
from router_service.dispatcher import Dispatcher, Hedging, Job, LanesPort, ShadowsPort
from router_service.fallbacks import Fallbacks, usable_rungs
from router_service.models import ServedLayer, ServedModel, find_model
from router_service.recheck import recheck
from router_service.turns import Turns
from router_service.waves import Waves

__all__ = ["MAX_ATTEMPTS", "GateChoice", "LanesPort", "LayerCall", "LayerReply", "Outcome", "Overflow", "Pipeline", "Plan", "Report", "TopK"]

_R = TypeVar("_R")
_NO_FALLBACKS = Fallbacks({}, {})


@dataclass(slots=True, eq=False)
class _Planned:
    """The calls of one wave, planned: what is asked of whom, and what may stand in for those who do not answer. `whole` is all of them, joined."""

    shares: Sequence[Share]
    whole: Share
    layer: ServedLayer
    job: Job
    rungs: tuple[str, ...]


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
        trust: Trust | None = None,
        hedging: Hedging | None = None,
        shadows: ShadowsPort | None = None,
        max_tokens: int = 65_536,
        limits: DispatchLimits | None = None,
        waves: WaveLimits | None = None,
        metrics: RouterMetrics | None = None,
    ) -> None:
        """`trust` says which copies to avoid; without `hedging` nothing is sent twice because it is late; `shadows` has them made ready."""
        self._models = models
        self._table = table
        self._tracing = tracing or Tracing.disabled()
        self._max_tokens = max_tokens
        self._limits = limits or DispatchLimits()
        self.dispatcher = Dispatcher(lanes, table, rng, tracing=self._tracing, trust=trust, hedging=hedging, shadows=shadows)
        self.budget = DispatchBudget(self._limits.max_bytes)
        self._turns = Turns()
        self._waves = Waves(self._run, waves or WaveLimits(), metrics)

    async def run(self, call: LayerCall) -> LayerReply:
        """Run one MoE layer over the call's tokens.

        Raises NotReady, NotFound, InvalidRequest, Overloaded, ExpertUnavailable and DataLoss (with the caller's failed rows), DeadlineExceeded.
        """
        if asyncio.get_running_loop().time() >= call.deadline_s:
            raise _too_late()
        self._current_table()
        layer = find_model(self._models, call.model).layer(call.layer)
        is_large = call.hidden_states.nbytes > THREAD_BYTES
        num_choices = check_choices(call, layer.descriptor, self._limits.choices_per_request(layer.row_bytes))
        num_bytes = num_choices * layer.row_bytes
        self.budget.take(num_bytes)
        try:
            async with asyncio.timeout_at(call.deadline_s):
                share = await _compute(is_large, self._choose, call, layer)
                return await self._waves.join(share)
        except TimeoutError as error:
            raise _too_late() from error
        finally:
            self.budget.give_back(num_bytes)

    async def _run(self, shares: Sequence[Share], deadline_s: float) -> Sequence[LayerReply | MoeError]:
        """Run the calls of one wave, which have the same layer. What a single call is to blame for is in its place; raises what ends them all."""
        layer, table = shares[0].layer, self._current_table()
        assert isinstance(layer, ServedLayer)  # noqa: S101  (`run` put it there)
        is_large = sum(share.call.hidden_states.nbytes for share in shares) > THREAD_BYTES
        planned = await _compute(is_large, self._plan, shares, layer, table, deadline_s)
        lost = await self.dispatcher.run(planned.job)
        await self._turns.take()  # a frame may have brought the answers of many
        replies, is_fine = await _compute(is_large, self._finish, planned, lost)
        while not is_fine:
            found = await recheck(self.dispatcher, planned.job, lost)
            if found is None:
                return [_finite_or_error(reply) for reply in replies]
            lost = found
            replies, is_fine = await _compute(is_large, self._finish, planned, lost)
        return replies

    def _current_table(self) -> RoutingTable:
        table = self._table()
        if table is None:
            message = "this router has no routing table yet; retry in a moment"
            raise NotReady(message)
        return table

    def _choose(self, call: LayerCall, layer: ServedLayer) -> Share:
        x_TD = check_call(call, layer.descriptor, layer.dtype, max_tokens=self._max_tokens, num_positions=layer.gate.num_positions)
        if isinstance(call.routing, GateChoice):
            with self._tracing.span("moe.gate", parent=call.traceparent, attributes={"layer": call.layer, "tokens": x_TD.shape[0]}):
                return Share(call, layer, x_TD, choose(call.routing, layer.gate, x_TD))
        return Share(call, layer, x_TD, choose(call.routing, layer.gate, x_TD))

    def _plan(self, shares: Sequence[Share], layer: ServedLayer, table: RoutingTable, deadline_s: float) -> _Planned:
        whole = joined(shares)
        call = whole.call
        with self._tracing.span("moe.plan", parent=call.traceparent, attributes={"layer": call.layer, "epoch": table.epoch}) as span:
            order = order_choices(whole.chosen.ids_TK)
            rows_NB = whole.x_TD.contiguous().view(torch.uint8).numpy().take(order.rows_N, axis=0)
            span.set(choices=order.rows_N.size, segments=len(order.experts))
        ladder = () if call.fidelity_exact else _ladder_of(table, call.model)
        rungs = usable_rungs(ladder, layer.fallbacks)
        job = Job(
            model=call.model,
            layer=call.layer,
            dtype=layer.dtype,
            width=layer.width,
            order=order,
            rows_NB=rows_NB,
            table=table,
            deadline_s=deadline_s,
            exact=call.fidelity_exact,
            uses_shadows="shadow" in ladder,
            may_lose=bool(rungs) or len(shares) > 1,  # what one call cannot do without, others may not need
            trace=call.traceparent or current_traceparent(),
            tenant=tenant_of_call.get(),
            is_again=shares[0].is_again,
        )
        return _Planned(shares, whole, layer, job, rungs)

    def _finish(self, planned: _Planned, lost: Mapping[int, str]) -> tuple[Sequence[LayerReply | MoeError], bool]:
        """Combine what was answered, with what the ladder has for what was not; ExpertUnavailable, with its rows, for a call that needs what nothing serves.

        Also whether nothing more is to be done for any call.
        """
        call, job, y_ND = planned.whole.call, planned.job, _outputs(planned.job)
        place_WK, dtype = job.order.place_TK, call.hidden_states.dtype
        with self._tracing.span("moe.combine", parent=call.traceparent, attributes={"layer": call.layer, "tokens": place_WK.shape[0]}):
            if _is_all_exact(job) and not any(share.call.want_plan for share in planned.shares):
                whole_WD = combine(y_ND, place_WK, planned.whole.chosen.weights_TK).to(dtype)
                parts = [whole_WD] if len(planned.shares) == 1 else [whole_WD[start:stop] for _, start, stop in _spans(planned)]
                top_k, epoch = place_WK.shape[1], job.table.epoch
                return [LayerReply(rows_TD, Report(exact=len(rows_TD) * top_k, epoch=epoch)) for rows_TD in parts], is_finite(whole_WD)
            replies = [self._account(planned, share, y_ND, place_WK[start:stop], lost) for share, start, stop in _spans(planned)]
            return replies, all(map(_is_fine, replies))

    def _account(self, planned: _Planned, share: Share, y_ND: torch.Tensor, place_TK: NDArray[np.intp], lost: Mapping[int, str]) -> LayerReply | MoeError:
        """One call's reply, every choice accounted for."""
        chosen, weights_TK, job = share.chosen, share.chosen.weights_TK, planned.job
        asked = np.unique(chosen.ids_TK).tolist()
        ledger = Ledger(chosen.ids_TK, weights_TK.numpy(), chosen.dropped_TK)
        for index in asked:
            if (reply := job.replies.get(index)) is not None:
                ledger.answered(index, Answer(reply.version, reply.incarnation.generation, reply.role, reply.attempt))
        if missed := {index: lost[index] for index in asked if index in lost}:
            degraded = stand_in(chosen.ids_TK, weights_TK, missed, planned.rungs)
            if degraded.unserved_tokens.size:
                return _unavailable(job, share, missed, degraded.unserved_tokens)
            fallbacks = planned.layer.fallbacks or _NO_FALLBACKS
            y_ND, place_TK = compute_stand_ins(degraded, place_TK, y_ND, share.x_TD, fallbacks.compute)
            weights_TK = degraded.weights_TK
            ledger.stood_in(degraded.outcomes_TK, weights_TK.numpy(), fallbacks.versions_by_outcome)
        reply_TD = combine(y_ND, place_TK, weights_TK).to(share.call.hidden_states.dtype)
        return LayerReply(reply_TD, ledger.report(epoch=job.table.epoch, want_plan=share.call.want_plan))


def _spans(planned: _Planned) -> Iterator[tuple[Share, int, int]]:
    """Each call with its rows [start, stop) of the wave."""
    start = 0
    for share in planned.shares:
        stop = start + share.num_tokens
        yield share, start, stop
        start = stop


def _is_fine(reply: LayerReply | MoeError) -> bool:
    """Whether a call needs nothing more: it has failed, or all of its output is finite."""
    return isinstance(reply, MoeError) or is_finite(reply.hidden_states)


def _finite_or_error(reply: LayerReply | MoeError) -> LayerReply | MoeError:
    return reply if isinstance(reply, MoeError) or is_finite(reply.hidden_states) else not_finite(reply.hidden_states)


def _is_all_exact(job: Job) -> bool:
    """Whether every choice is some expert's, and a full-precision copy answered for each: the usual case, which needs no book-keeping by choice."""
    is_answered = len(job.replies) == len(job.order.experts) and job.order.rows_N.size == job.order.place_TK.size
    return is_answered and all(reply.role is Role.REPLICA for reply in job.replies.values())


def _outputs(job: Job) -> torch.Tensor:
    """What the experts computed, [N, D] in dispatch order; rows that nobody computed are zero."""
    dtype, parts = TORCH_DTYPES[job.dtype], [_answer(job, part) for part in job.order.experts]
    return torch.from_numpy(np.concatenate(parts)).view(dtype) if parts else torch.empty((0, job.width), dtype=dtype)


def _answer(job: Job, part: ExpertRows) -> NDArray[np.uint8]:
    reply = job.replies.get(part.index)
    return np.zeros_like(job.rows_NB[part.start : part.stop]) if reply is None else reply.rows


def _ladder_of(table: RoutingTable, model: str) -> tuple[str, ...]:
    entry = table.models.get(model)
    return () if entry is None else entry.ladder


def _unavailable(job: Job, share: Share, missed: Mapping[int, str], rows: NDArray[np.intp]) -> ExpertUnavailable:
    first = min(missed)
    message = f"expert {job.expert(first)}: {missed[first]}"
    if len(missed) > 1:
        message += f", and {len(missed) - 1} more experts of this layer likewise"
    message += f"; {rows.size} of {share.num_tokens} rows failed; retry, or see `moelastic status`"
    return ExpertUnavailable(message, failed_rows=tuple(rows.tolist()))


async def _compute(is_large: bool, work: Callable[..., _R], *arguments: object) -> _R:
    """Tensor work: in a thread when it would hold up the loop, here when a thread costs more than the work."""
    return await asyncio.to_thread(work, *arguments) if is_large else work(*arguments)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before every expert answered; allow more time, or send fewer tokens at once")
