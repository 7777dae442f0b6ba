"""When a client tries again, how long it waits before, and what it tells at the end: by numbers alone, nobody is called."""

from __future__ import annotations

import random

import pytest

from cluster.core.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest, MessageTooLarge, NotReady, Overloaded, ProtocolMismatch, Unauthenticated
from router_service.client_attempts import MAX_PAUSE_S, Attempts


def attempts(deadline_s: float = 100.0) -> Attempts:
    return Attempts(deadline_s=deadline_s, rng=random.Random(0))


def test_pauses_grow_are_jittered_and_stay_bounded() -> None:
    tries = attempts()
    pauses = [tries.pause_s(NotReady("down"), 0.0) for _ in range(12)]
    assert pauses[0] <= 0.05
    assert all(0 < pause <= MAX_PAUSE_S for pause in pauses)
    assert max(pauses) > 0.5
    assert len(set(pauses)) == len(pauses)


def test_a_pause_is_never_shorter_than_the_router_asks_for() -> None:
    assert attempts().pause_s(Overloaded("full", retry_after_s=3.0), 0.0) >= 3.0


def test_a_retry_that_cannot_end_in_time_is_not_begun() -> None:
    error = Overloaded("full", retry_after_s=3.0)
    with pytest.raises(Overloaded) as caught:
        attempts(deadline_s=2.0).pause_s(error, 0.0)
    assert caught.value is error


@pytest.mark.parametrize("error", [InvalidRequest("no", field="f"), Unauthenticated("no"), DeadlineExceeded("no"), ProtocolMismatch("no")])
def test_what_no_retry_cures_is_raised_at_once(error: Exception) -> None:
    with pytest.raises(type(error)):
        attempts().pause_s(error, 0.0)


def test_a_deadline_that_passes_during_a_retry_names_what_failed_before() -> None:
    tries = attempts()
    tries.pause_s(NotReady("connection refused"), 0.0)
    with pytest.raises(DeadlineExceeded, match="1 attempts before it failed, the last with: connection refused"):
        tries.pause_s(DeadlineExceeded("too late"), 99.0)


def test_a_last_attempt_that_is_turned_away_does_not_hide_what_failed_before() -> None:
    tries, lost = attempts(), ExpertUnavailable("nobody holds it", failed_rows=(3,))
    tries.pause_s(Overloaded("full", retry_after_s=0.1), 0.0)
    tries.pause_s(lost, 1.0)
    with pytest.raises(ExpertUnavailable) as caught:
        tries.pause_s(Overloaded("0.01 s are left of the deadline", retry_after_s=3.0), 99.0)
    assert caught.value is lost


@pytest.mark.parametrize(
    "last", [Overloaded("0.01 s are left of the deadline", retry_after_s=3.0), MessageTooLarge("over the limit", limit_bytes=8)], ids=["full", "too large"]
)
def test_one_who_was_turned_away_before_or_for_good_hears_of_the_last_time(last: Overloaded) -> None:
    tries = attempts()
    tries.pause_s(NotReady("the stream broke"), 0.0)
    if last.retryable:
        tries.pause_s(Overloaded("full", retry_after_s=0.1), 1.0)
    with pytest.raises(type(last)) as caught:
        tries.pause_s(last, 99.0)
    assert caught.value is last
