"""The demo's parts that need no cluster: what it prints of one, whom it kills, when tokens came."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.status_facts import Source, StatusFacts
from cluster.core.errors import FleetError
from examples.demo.layout import node_loss_lines, tree_lines
from examples.demo.node_loss import TokenClock, choose_victim, num_same
from examples.demo.run import install_seconds
from examples.demo.settings import DemoSettings, LossText, NodeLoss


def node(name: str, *, alive: bool = True) -> dict[str, Any]:
    return {"name": name, "node_id": f"id-{name}", "alive": alive, "num_gpus": 0 if name == "head" else 1}


def actor(name: str, where: str) -> dict[str, Any]:
    return {"actor_id": name, "node_id": f"id-{where}", "slots": [1, 2], "num_slots": 4}


def control(*, router_on: str = "head", lost: str = "") -> dict[str, Any]:
    return {
        "nodes": [node(name, alive=name != lost) for name in ("node-2", "head", "node-1", "node-3")],
        "routers": [{"router_id": "router-0", "address": "h:1", "node_id": f"id-{router_on}"}],
        "actors": [actor("actor-1", "node-2"), actor("actor-0", "node-1"), actor("actor-2", "node-1")],
    }


def facts(view: dict[str, Any]) -> StatusFacts:
    return StatusFacts("d", Source("h:1"), Source("h:2"), control=view)


def text(**changes: Any) -> LossText:
    values = {
        "killed_at_token": 10,
        "num_tokens": 40,
        "error": "",
        "longest_stall_s": 0.3,
        "usual_gap_s": 0.02,
        "outcomes": {"exact": 80},
        "num_same_tokens": 40,
        "text_before": "def parse(",
        "text_after": "text):\n    pass",
        "exact_again_s": 0.0,
    }
    return LossText(**values | changes)


DEGRADED = text(outcomes={"exact": 71, "shadow": 9}, num_same_tokens=17, num_degraded_tokens=4, first_degraded_s=0.06, exact_again_s=1.25)


def loss(**changes: Any) -> NodeLoss:
    values = {
        "node": "node-2",
        "num_killed": 3,
        "num_failed": 0,
        "exact": text(),
        "frugal": DEGRADED,
        "num_copies": 96,
        "num_copies_wanted": 96,
        "copies_again_s": 12.5,
        "actors_again_s": 20.0,
    }
    return NodeLoss(**values | changes)


def test_the_tree_has_every_node_with_what_it_hosts() -> None:
    head, first, second, third = tree_lines(control())
    assert head.split() == ["head", "0", "GPU", "router-0", "h:1"]
    assert first.split() == ["node-1", "1", "GPU", "actor-0", "2/4", "slots", "actor-2", "2/4", "slots"]
    assert second.split() == ["node-2", "1", "GPU", "actor-1", "2/4", "slots"]
    assert third.split() == ["node-3", "1", "GPU", "-"]
    assert tree_lines({}) == []


def test_the_victim_hosts_actors_and_no_router_and_is_not_the_last_one() -> None:
    assert choose_victim(facts(control()))["name"] == "node-2"
    for view in (control(router_on="node-1"), control(lost="node-2"), {}):
        with pytest.raises(FleetError, match="no node can be lost"):
            choose_victim(facts(view))


def test_tokens_are_counted_after_the_prompt_and_the_mark_is_told_once_it_is_reached() -> None:
    clock = TokenClock(mark=2)
    clock.put("prompt")
    clock.put("a")
    assert not clock.is_under_way.is_set()
    clock.put("b")
    clock.put("c")
    clock.end()
    assert clock.is_under_way.is_set()
    assert len(clock.times_s) == 3
    assert len(clock.gaps_s()) == 2


def test_tokens_with_degraded_choices_are_told_apart_from_those_before_the_loss() -> None:
    counts = iter([1, 1, 3, 3, 4])
    clock = TokenClock(1, lambda: next(counts))
    for token in range(6):
        clock.put(token)
    assert clock.degraded_s(-1.0) == [moment + 1.0 for moment in (clock.times_s[0], clock.times_s[2], clock.times_s[4])]
    assert clock.degraded_s(clock.times_s[2]) == [clock.times_s[4] - clock.times_s[2]]


def test_texts_are_the_same_up_to_the_first_other_token() -> None:
    assert num_same([1, 2, 3], [1, 2, 3]) == 3
    assert num_same([1, 9, 3], [1, 2, 3]) == 1
    assert num_same([1], [1, 2, 3]) == 1
    assert num_same([], [1]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"num_failed": 1},
        {"copies_again_s": None},
        {"exact": text(num_same_tokens=39)},
        {"exact": text(outcomes={"exact": 79, "shadow": 1})},
        {"exact": text(killed_at_token=0)},
        {"exact": text(killed_at_token=40)},
        {"frugal": text(killed_at_token=0)},
        {"frugal": text(error="ExpertUnavailable: gone")},
        {"frugal": text(exact_again_s=None)},
    ],
)
def test_a_loss_is_good_only_if_nobody_noticed_more_than_was_agreed_and_all_is_mended(changes: dict[str, Any]) -> None:
    assert loss().is_good
    assert not loss(**changes).is_good


def test_what_was_not_reached_is_said_so(tmp_path: Path) -> None:
    settings = DemoSettings(out_dir=tmp_path, loss_limit_s=45.0, loss_tokens=40)
    good = node_loss_lines(loss(), settings)
    assert "while two texts were generated, at tokens 10 and 10 of 40; failed requests 0" in good
    assert "exact, 2 replicas    longest stall 300 ms (usual gap 20 ms)   choices: exact 80\n" in good
    assert "text equal to one process, all 40 tokens" in good
    assert "choices: exact 71, shadow 9\n" in good
    assert "first degraded answer 60 ms after   4 tokens with one   exact again 1.2 s after" in good
    assert "text DIFFERS from one process after 17 tokens" in good
    assert "all 96 replicas again 12.5 s after" in good
    assert "def parse( | text):\\n    pass" in good
    bad = node_loss_lines(loss(copies_again_s=None, actors_again_s=None, num_copies=50, frugal=text(exact_again_s=None, first_degraded_s=0.1)), settings)
    assert "exact again NOT within 45 s" in bad
    assert "50 of 96 replicas NOT within 45 s   lost actors replaced NOT within 45 s" in bad
    assert "no answer after the kill was degraded" in node_loss_lines(loss(frugal=text()), settings)


def test_the_time_of_an_installation_is_told_once(tmp_path: Path) -> None:
    assert install_seconds(tmp_path) is None
    (tmp_path / "install_began").write_text("1000\n")
    (tmp_path / "installed.stamp").touch()
    os.utime(tmp_path / "installed.stamp", (1042, 1042))
    assert install_seconds(tmp_path) == 42.0
    assert install_seconds(tmp_path) is None
