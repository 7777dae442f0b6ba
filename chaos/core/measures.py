"""One repetition's observations as numbers. Every number has its name here, once; None is what could not be measured.

The affected set is every request that was alive within `affected_s` of the first fault; the control set those alive in the window before it that had
ended when the fault came: no request that met the fault counts among those that did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chaos.core.observations import Observations, Request, RouterSample, quantile
from cluster.core.ids import ExpertId, Incarnation

LATE_SLACK_S = 0.02
READY = "ready"
EXPLICIT = "EXPERT_UNAVAILABLE"
TRUSTED = frozenset({READY, "suspected"})
Measure = Callable[[Observations], float | None]


def affected(seen: Observations) -> list[Request]:
    """Requests alive within `affected_s` of the first fault."""
    return seen.within(seen.fault_s, seen.fault_s + seen.affected_s)


def control(seen: Observations) -> list[Request]:
    """Requests alive in the control window that met no fault."""
    return [request for request in seen.within(seen.control_s, seen.begun_s) if request.end_s < seen.fault_s]


def latencies_ms(requests: Iterable[Request]) -> list[float]:
    """Of those that were answered, in ms."""
    return [1e3 * request.took_s for request in requests if request.is_ok]


def num_failed(seen: Observations) -> float:
    """Requests that ended in an error."""
    return float(sum(not request.is_ok for request in seen.requests))


def num_failed_unexplained(seen: Observations) -> float:
    """Requests that ended in another error than the one which says that no copy of an expert may answer: neither served nor told why."""
    return float(sum(request.status != EXPLICIT for request in seen.requests if not request.is_ok))


def num_late(seen: Observations) -> float:
    """Requests that ended after their deadline."""
    return float(sum(request.end_s - request.sent_s > seen.timeout_s + LATE_SLACK_S for request in seen.requests))


def availability(seen: Observations) -> float | None:
    """Share of requests that were answered."""
    return 1.0 - num_failed(seen) / len(seen.requests) if seen.requests else None


def num_wrong(seen: Observations) -> float:
    """Answers that are neither the known answer nor what their own plan gives when it is replayed, bit for bit."""
    return float(sum(request.answer in seen.wrong_answers for request in seen.requests if request.answer))


def num_unchecked(seen: Observations) -> float:
    """Answers that could not be replayed, so that nobody knows."""
    return float(sum(request.answer in seen.unchecked_answers for request in seen.requests if request.answer))


def num_unaccounted(seen: Observations) -> float:
    """Choices that ended as nothing, or as two things."""
    return float(sum(abs(sum(request.outcomes) - seen.choices_per_request) for request in seen.requests if request.is_ok))


def num_degraded(seen: Observations) -> float:
    """Choices that no full-precision copy answered."""
    return float(sum(sum(request.outcomes[1:-1]) for request in seen.requests if request.is_ok))


def num_lower_rungs(seen: Observations) -> float:
    """Choices that a rung below the shadow answered for: fewer experts, the generalist or the dense fallback."""
    return float(sum(sum(request.outcomes[2:5]) for request in seen.requests if request.is_ok))


def degraded_share(seen: Observations) -> float | None:
    """The same as a share of all answered choices."""
    total = sum(sum(request.outcomes) for request in seen.requests if request.is_ok)
    return num_degraded(seen) / total if total else None


def num_epoch_regressions(seen: Observations) -> float:
    """Requests that were planned with an older table than one that had ended before they were sent."""
    by_end = sorted((request for request in seen.requests if request.is_ok), key=lambda request: request.end_s)
    newest, ended, count = 0, 0, 0
    for request in sorted(by_end, key=lambda request: request.sent_s):
        while ended < len(by_end) and by_end[ended].end_s < request.sent_s:
            newest = max(newest, by_end[ended].epoch)
            ended += 1
        count += request.epoch < newest
    return float(count)


def num_stale(seen: Observations) -> float:
    """Answers used of an incarnation that had left the routing table before their request was sent.

    An answer by a later table than any that was looked at without the incarnation is none: it may be in that table again.
    """
    left_s: dict[int, float] = {}
    known: set[Incarnation] = set()
    epoch = 0
    for sample in seen.samples:
        if not sample.replicas:
            continue
        listed = {incarnation for copies in (*sample.replicas.values(), *sample.shadows.values()) for incarnation in copies}
        for incarnation in known - listed:
            left_s.setdefault(incarnation.generation, sample.at_s)
        for incarnation in listed - known:
            left_s.pop(incarnation.generation, None)
        known, epoch = listed, sample.epoch
    looked_at = (request for request in seen.requests if request.epoch <= epoch)
    return float(sum(any(request.sent_s > left_s.get(generation, float("inf")) for generation in request.generations) for request in looked_at))


def first_other_ms(seen: Observations) -> float | None:
    """From the fault to the first answer in which another copy, or a lower rung, stood in for one that was struck."""
    if not seen.strikes:
        return None
    lost = _lost_indices(seen)
    ends = [request.end_s for request in seen.requests if request.is_ok and request.end_s >= seen.fault_s and lost & set(request.moved)]
    return 1e3 * (min(ends) - seen.fault_s) if ends else None


def detected_ms(seen: Observations) -> float | None:
    """From the fault to the first sign that the router knew: it noted a loss or an ejection, a look showed one, or another copy answered; an upper bound."""
    if not seen.strikes:
        return None
    struck = {incarnation for strike in seen.strikes for incarnation in strike.incarnations if not strike.experts}
    signs = [1e3 * (sample.at_s - seen.fault_s) for sample in seen.samples if sample.at_s >= seen.fault_s and _distrusts(sample, struck)]
    others = (first_other_ms(seen), seen.counts.get("router_detected_ms"))
    return min([*signs, *(found for found in others if found is not None)], default=None)


def exact_again_s(seen: Observations) -> float | None:
    """From the fault to the end of the last answer that was not exact because of it; 0 when all were exact.

    None: the repetition ended before that can be said. Answers that were not exact for experts that nobody struck alone are `inexact_elsewhere`.
    """
    if not seen.strikes:
        return None
    lost = _lost_indices(seen)
    return _over_s(seen, [request for request in _inexact(seen) if _is_concerned(request, lost)])


def all_exact_again_s(seen: Observations) -> float | None:
    """As `exact_again_s`, with every answer that was not exact, whatever made it so."""
    return _over_s(seen, list(_inexact(seen))) if seen.strikes else None


def _over_s(seen: Observations, bad: list[Request]) -> float | None:
    """From the fault to the end of the last of these answers; 0 without any, None while no exact one was sent after it."""
    if not bad:
        return 0.0
    last_s = max(request.end_s for request in bad)
    is_over = any(request.sent_s > last_s and request.is_exact for request in seen.requests)
    return last_s - seen.fault_s if is_over else None


def num_inexact_elsewhere(seen: Observations) -> float | None:
    """Answers after the fault that were not exact, though no expert that was struck had any part in it: on a busy machine late rows go to shadows."""
    if not seen.strikes:
        return None
    lost = _lost_indices(seen)
    return float(sum(not _is_concerned(request, lost) for request in _inexact(seen)))


def copies_again_s(seen: Observations) -> float | None:
    """From the fault to the first look at the router's table with the wanted replicas of every expert, on ready links, none of them struck."""
    if not seen.strikes:
        return None
    for sample in seen.samples:
        if sample.at_s >= seen.fault_s and sample.replicas and _num_missing(seen, sample) == 0:
            return sample.at_s - seen.fault_s
    return None


def num_missing_copies(seen: Observations) -> float | None:
    """Replicas that were wanting at the last look."""
    looks = [sample for sample in seen.samples if sample.replicas]
    return float(_num_missing(seen, looks[-1])) if looks else None


def gap_ms(seen: Observations) -> float | None:
    """The longest time without an answer, from the fault on."""
    return _longest_gap_ms(seen, seen.fault_s, seen.end_s)


def control_gap_ms(seen: Observations) -> float | None:
    """The longest time without an answer in the control window."""
    return _longest_gap_ms(seen, seen.control_s, seen.begun_s)


def num_ejections(seen: Observations) -> float:
    """Incarnations that a look at the router showed as ejected or closed without having been struck."""
    struck = {incarnation for strike in seen.strikes for incarnation in strike.incarnations}
    ejected = {incarnation for sample in seen.samples for incarnation, state in sample.links.items() if state in {"ejected", "on_trial"}}
    return float(len(ejected - struck))


def amplification(seen: Observations) -> float | None:
    """Rows sent over the rows that the requests needed; by the router's own byte counter where it was read, else by the attempts in the plans."""
    needed = sum(sum(request.outcomes[:2]) for request in seen.requests if request.is_ok)
    if not needed:
        return None
    sent, wanted = seen.counts.get("rows_sent"), seen.counts.get("rows_needed")
    if sent is not None and wanted:
        return sent / wanted
    return 1.0 + sum(request.num_extra_rows for request in seen.requests) / needed


MEASURES: dict[str, Measure] = {
    "failed": num_failed,
    "failed_unexplained": num_failed_unexplained,
    "late": num_late,
    "availability": availability,
    "wrong": num_wrong,
    "unchecked": num_unchecked,
    "unaccounted": num_unaccounted,
    "degraded": num_degraded,
    "lower_rungs": num_lower_rungs,
    "degraded_share": degraded_share,
    "epoch_regressions": num_epoch_regressions,
    "stale": num_stale,
    "first_other_ms": first_other_ms,
    "detected_ms": detected_ms,
    "exact_again_s": exact_again_s,
    "all_exact_again_s": all_exact_again_s,
    "inexact_elsewhere": num_inexact_elsewhere,
    "copies_again_s": copies_again_s,
    "missing_copies": num_missing_copies,
    "gap_ms": gap_ms,
    "control_gap_ms": control_gap_ms,
    "ejections": num_ejections,
    "amplification": amplification,
    "requests": lambda seen: float(len(seen.requests)),
    "whole_again_s": lambda seen: seen.whole_again_s,
    "p50_ms": lambda seen: quantile(latencies_ms(seen.requests), 0.5),
    "p99_ms": lambda seen: quantile(latencies_ms(seen.requests), 0.99),
}


def measure(seen: Observations) -> dict[str, float | None]:
    """Every number of a repetition."""
    return {name: found(seen) for name, found in MEASURES.items()} | dict(seen.counts)


def _lost_indices(seen: Observations) -> set[int]:
    """Experts of the load that a struck copy served, by index: those that a table shortly before the fault placed there."""
    before = [sample for sample in seen.samples if sample.replicas and sample.at_s < seen.fault_s]
    lost: set[int] = set()
    for strike in seen.strikes:
        lost |= {expert.index for expert in strike.experts}
        if before and not strike.experts:
            lost |= {expert.index for expert, copies in before[-1].replicas.items() if copies & strike.incarnations}
    return lost


def _inexact(seen: Observations) -> list[Request]:
    return [request for request in seen.requests if request.end_s >= seen.fault_s and not request.is_exact]


def _is_concerned(request: Request, lost: set[int]) -> bool:
    """Whether the fault may be why this answer is not exact: always, where it is not known which experts were struck, or the request failed."""
    return not lost or not request.is_ok or bool(lost & set(request.moved))


def _distrusts(sample: RouterSample, struck: set[Incarnation]) -> bool:
    """Whether a link to one that was struck is gone, or gets no rows; a suspicion alone does not count."""
    return any(sample.links.get(incarnation) not in TRUSTED for incarnation in struck)


def _num_missing(seen: Observations, sample: RouterSample) -> int:
    missing = 0
    for expert, wanted in seen.wanted_replicas.items():
        copies = {incarnation for incarnation in sample.replicas.get(expert, frozenset()) if sample.links.get(incarnation) == READY}
        missing += max(0, wanted - len(copies - _struck(seen, expert, sample.at_s)))
    return missing


def _struck(seen: Observations, expert: ExpertId, at_s: float) -> set[Incarnation]:
    """Whose copy of this expert does not count at this moment: a killed one's never again, another's until the fault was seen to be gone."""
    found: set[Incarnation] = set()
    for strike in seen.strikes:
        is_over = strike.is_mended and strike.gone_s is not None and at_s >= strike.gone_s
        if strike.at_s <= at_s and not is_over and (not strike.experts or expert in strike.experts):
            found |= strike.incarnations
    return found


def _longest_gap_ms(seen: Observations, begin_s: float, end_s: float) -> float | None:
    moments = sorted(request.end_s for request in seen.requests if request.is_ok and begin_s <= request.end_s <= end_s)
    if not moments:
        return None
    return 1e3 * max(later - earlier for earlier, later in zip([begin_s, *moments], [*moments, end_s], strict=True))
