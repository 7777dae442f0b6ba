"""An output that is not finite although the input is: ask a witness, blame a copy or the rows, and get the answer again where a copy was to blame."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import DataLoss, MoeError, ReplicaError
from cluster.core.ids import Role
from cluster.core.routing_table import TableCopy
from router_service.core.balance import pick_copy
from router_service.core.dispatch import DispatchOrder, ExpertRows
from router_service.core.doubt import Doubt, Question, Verdict, bad_rows, golden_row
from router_service.core.segments import SegmentReply, SegmentRequest
from router_service.core.trust import Rank
from router_service.dispatcher import Dispatcher, Job

NON_FINITE = "non_finite"
MAX_ROUNDS = 4


async def recheck(dispatcher: Dispatcher, job: Job, lost: Mapping[int, str]) -> Mapping[int, str] | None:
    """Replace every answer that is not finite and whose copy is to blame. Gives who is lost now, of all experts; None: every answer is finite.

    Raises DataLoss with the call's rows when these overflow healthy experts; nobody is blamed then. A copy that gave the call such an answer is not
    asked again by it, whoever is believed: what then has no copy left is lost.
    """
    doubtful = [part for part in job.order.experts if part.index in job.replies and bad_rows(job.replies[part.index].rows, job.dtype).size]
    if not doubtful:
        return None
    if job.num_rechecks >= MAX_ROUNDS:
        for part in doubtful:
            del job.replies[part.index]
        return {**lost, **{part.index: f"{MAX_ROUNDS + 1} of its copies answered, with numbers that are not finite" for part in doubtful}}
    job.num_rechecks += 1
    verdicts = await _all([_judge(dispatcher, job, part) for part in doubtful])
    overflown = [part for part, verdict in zip(doubtful, verdicts, strict=True) if verdict is Verdict.OVERFLOW]
    if overflown:
        raise _overflown(job, overflown)
    again = [part for part in doubtful if part.index not in job.replies]
    if not again:
        return lost
    found = await _ask_again(dispatcher, job, again)
    return {**lost, **{index: f"beside copies whose numbers are not finite, {reason}" for index, reason in found.items()}}


async def _all(judges: Sequence[Coroutine[None, None, Verdict]]) -> list[Verdict]:
    """All verdicts; the first judge that raises ends the others, which would go on asking for a call that has ended."""
    tasks = [asyncio.ensure_future(judge) for judge in judges]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _judge(dispatcher: Dispatcher, job: Job, part: ExpertRows) -> Verdict:
    """One expert's answer, judged. A shadow that was made ready for it is let go where the replica's answer stands."""
    ready = _ReadyShadow(dispatcher, job, part)
    verdict = Verdict.OPEN
    try:
        verdict = await _weigh(dispatcher, job, part, ready)
    finally:
        ready.release(is_back=verdict is Verdict.OVERFLOW)
    return verdict


async def _weigh(dispatcher: Dispatcher, job: Job, part: ExpertRows, ready: _ReadyShadow) -> Verdict:
    """One expert's answer: keep a witness's in its place, or take it away."""
    first = job.replies[part.index]
    accused = TableCopy(first.incarnation, first.version, first.role)
    job.avoid.setdefault(part.index, set()).add(accused)
    doubt = Doubt(accused, bad_rows(first.rows, job.dtype).tolist(), lambda asked: _next_full(dispatcher, job, part, asked))
    step: Question | Verdict = doubt.begin()
    answer: SegmentReply | None = None
    num_asked = 0
    while isinstance(step, Question):
        if step.is_golden:
            if dispatcher.trust.rank(job.expert(part.index), accused) is Rank.NEVER:  # another call has convicted it meanwhile
                answer, step = None, Verdict.BLAMED
                break
            ready.warm()
        num_asked += 1
        try:
            answer = await _ask(dispatcher, job, part, step, first.attempt + num_asked)
        except ReplicaError:
            step = doubt.unanswered()
        else:
            bad = bad_rows(answer.rows, job.dtype).tolist()
            if bad:
                job.avoid[part.index].add(step.copy)
            step = doubt.answered(bad)
            if step is Verdict.BLAMED:
                dispatcher.trust.accuse(job.expert(part.index), accused, NON_FINITE, by=job.tenant, now_s=asyncio.get_running_loop().time())
    if step is not Verdict.OVERFLOW:
        del job.replies[part.index]
        if step is Verdict.BLAMED and answer is not None and len(answer.rows) == part.num_rows and answer.incarnation != accused.incarnation:
            job.replies[part.index] = answer
    return step


class _ReadyShadow:
    """The golden row may convict the only full copy there is: a shadow is made ready while it is under way."""

    def __init__(self, dispatcher: Dispatcher, job: Job, part: ExpertRows) -> None:
        self._dispatcher, self._job, self._index = dispatcher, job, part.index
        self._shadow: TableCopy | None = None

    def warm(self) -> None:
        job, expert = self._job, self._job.expert(self._index)
        if self._shadow is not None or not job.uses_shadows:
            return
        copies = (self._dispatcher.table() or job.table).copies_of(expert)
        self._shadow = next((copy for copy in copies if copy.role is Role.SHADOW and copy not in job.avoid[self._index]), None)
        if self._shadow is not None:
            self._dispatcher.shadows.warm(expert, self._shadow)

    def release(self, *, is_back: bool) -> None:
        if self._shadow is not None:
            self._dispatcher.shadows.release(self._job.expert(self._index), self._shadow, is_back=is_back)


async def _ask_again(dispatcher: Dispatcher, job: Job, parts: Sequence[ExpertRows]) -> Mapping[int, str]:
    """Rows whose copy is not to be believed, anew; a shadow may answer them."""
    order = DispatchOrder(tuple(parts), job.order.rows_N, job.order.place_TK)
    rest = Job(
        model=job.model,
        layer=job.layer,
        dtype=job.dtype,
        width=job.width,
        order=order,
        rows_NB=job.rows_NB,
        table=dispatcher.table() or job.table,
        deadline_s=job.deadline_s,
        exact=job.exact,
        uses_shadows=job.uses_shadows,
        may_lose=True,
        trace=job.trace,
        tenant=job.tenant,
        is_again=True,
        avoid=job.avoid,
        replies=job.replies,
    )
    return await dispatcher.run(rest)


def _next_full(dispatcher: Dispatcher, job: Job, part: ExpertRows, asked: Sequence[TableCopy]) -> TableCopy | None:
    expert = job.expert(part.index)
    copies = (dispatcher.table() or job.table).copies_of(expert)
    trust, tried = dispatcher.trust, [*asked, *job.avoid.get(part.index, ())]
    return pick_copy(copies, tried=tried, exact=True, burden=dispatcher.lanes.burden, rng=dispatcher.rng, rank=lambda copy: trust.rank(expert, copy))


async def _ask(dispatcher: Dispatcher, job: Job, part: ExpertRows, question: Question, attempt: int) -> SegmentReply:
    """Put one question and wait. Raises what the lanes end with."""
    rows: NDArray[np.uint8] = golden_row(job.width, job.dtype) if question.is_golden else job.rows_NB[part.start : part.stop]
    request = SegmentRequest(
        expert=job.expert(part.index),
        copy=question.copy,
        dtype=job.dtype,
        dim=job.width,
        rows=rows,
        deadline_s=job.deadline_s,
        exact=job.exact,
        epoch=job.table.epoch,
        attempt=attempt,
    )
    if dispatcher.hedging is not None:
        dispatcher.hedging.budget.resent(len(rows))
    ended: asyncio.Future[SegmentReply | MoeError] = asyncio.get_running_loop().create_future()
    withdraw = dispatcher.lanes.begin(request, lambda outcome: None if ended.done() else ended.set_result(outcome))
    try:
        outcome = await ended
    finally:
        withdraw()
    if isinstance(outcome, MoeError):
        raise outcome
    return outcome


def _overflown(job: Job, parts: Sequence[ExpertRows]) -> DataLoss:
    """The call's rows that no finite answer can be given to."""
    found = [job.order.rows_N[part.start + bad_rows(job.replies[part.index].rows, job.dtype)] for part in parts if part.index in job.replies]
    rows = np.unique(np.concatenate(found)) if found else np.empty(0, np.intp)
    message = f"{rows.size} rows of the output are not finite: they overflow healthy experts in {job.dtype}; send hidden states of a usual scale"
    return DataLoss(message, failed_rows=tuple(rows.tolist()))
