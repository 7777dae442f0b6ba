"""When `up` returns, and with which word: the deployer's wait on a controller whose statuses are written here."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.core.errors import FleetError
from cluster.deploy import deployment
from cluster.deploy.progress import Progress

ROUTER = {"state": "ready", "address": "h:1"}


def status(state: str, *, revision: int = 2, routers: tuple[dict[str, str], ...] = (ROUTER,), message: str = "") -> dict[str, Any]:
    return {
        "state": state,
        "spec_revision": revision,
        "routers": list(routers),
        "actors": [],
        "num_copies_ready": 1,
        "num_copies_wanted": 2,
        "message": message,
    }


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], float]]:
    """Waits for revision 2 with statuses one a second; the last one stays. Returns the status and the seconds that passed."""

    def waited(*statuses: dict[str, Any], limit_s: float = 300.0) -> tuple[dict[str, Any], float]:
        clock, answers = [1000.0], itertools.chain(statuses, itertools.repeat(statuses[-1]))

        def sleep(_seconds: float) -> None:
            clock[0] += 1.0

        monkeypatch.setattr(deployment, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
        monkeypatch.setattr(deployment, "_ask", lambda answer: answer)
        controller = SimpleNamespace(status_json=SimpleNamespace(remote=lambda: json.dumps(next(answers))))
        found = deployment._wait_until_serving(controller, Progress(Console(file=io.StringIO())), revision=2, deadline_s=1000.0 + limit_s)
        return found, clock[0] - 1000.0

    return waited


def test_it_waits_for_its_own_revision_a_router_and_the_end_of_a_replacement(wait: Any) -> None:
    found, seconds = wait(
        status("SERVING", revision=1),
        status("DEPLOYING", message="2 still to be replaced: actor-0"),
        status("SERVING", routers=({"state": "starting", "address": ""},)),
        status("SERVING"),
    )
    assert found["state"] == "SERVING"
    assert seconds == 3.0


def test_what_is_degraded_has_a_while_to_mend_itself(wait: Any) -> None:
    found, seconds = wait(*[status("DEGRADED")] * 10, status("SERVING"))
    assert (found["state"], seconds) == ("SERVING", 10.0)


def test_what_stays_degraded_is_returned_as_that_with_its_reason(wait: Any) -> None:
    found, seconds = wait(status("DEPLOYING"), status("DEGRADED", message="node-3 is gone"))
    assert (found["state"], found["message"]) == ("DEGRADED", "node-3 is gone")
    assert deployment.DEGRADED_WAIT_S < seconds < deployment.DEGRADED_WAIT_S + 5


def test_a_caller_who_waits_less_is_told_at_the_end_of_that(wait: Any) -> None:
    assert wait(status("DEGRADED"), limit_s=5.0)[0]["state"] == "DEGRADED"
    with pytest.raises(FleetError, match="not serving in time"):
        wait(status("DEPLOYING"), limit_s=5.0)


def test_what_cannot_be_served_fails_by_name_at_once(wait: Any) -> None:
    with pytest.raises(FleetError, match="no such folder; what runs keeps running"):
        wait(status("FAILED", message="no such folder"))
