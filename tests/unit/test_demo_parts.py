"""The demo's parts that need no cluster: what it prints of one, whom it kills, when tokens came."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.status_facts import Source, StatusFacts
from cluster.core.errors import FleetError
from examples.demo.layout import node_loss_lines, tree_lines
from examples.demo.node_loss import TokenClock, choose_victim
from examples.demo.run import install_seconds
from examples.demo.settings import DemoSettings, NodeLoss


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


def loss(**changes: Any) -> NodeLoss:
    values = {
        "node": "node-2",
        "num_killed": 3,
        "killed_at_token": 10,
        "num_tokens": 40,
        "num_failed": 0,
        "error": "",
        "longest_stall_s": 0.3,
        "usual_gap_s": 0.02,
        "outcomes": {"exact": 80},
        "is_text_equal": True,
        "text_before": "def parse(",
        "text_after": "text):\n    pass",
        "num_copies": 64,
        "num_copies_wanted": 64,
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


@pytest.mark.parametrize(
    "changes",
    [
        {"num_failed": 1},
        {"is_text_equal": False},
        {"copies_again_s": None},
        {"outcomes": {"exact": 79, "shadow": 1}},
        {"killed_at_token": 0},
        {"killed_at_token": 40},
    ],
)
def test_a_loss_is_good_only_if_nobody_noticed_and_all_is_mended(changes: dict[str, Any]) -> None:
    assert loss().is_good
    assert not loss(**changes).is_good


def test_what_was_not_reached_is_said_so(tmp_path: Path) -> None:
    settings = DemoSettings(out_dir=tmp_path, loss_limit_s=45.0)
    good, bad = node_loss_lines(loss(), settings), node_loss_lines(loss(copies_again_s=None, actors_again_s=None, num_copies=50), settings)
    assert "failed requests 0   longest stall 300 ms (usual gap 20 ms)" in good
    assert "all 64 copies again 12.5 s after" in good
    assert "def parse( | text):\\n    pass" in good
    assert "50 of 64 copies NOT within 45 s   lost actors replaced NOT within 45 s" in bad


def test_the_time_of_an_installation_is_told_once(tmp_path: Path) -> None:
    assert install_seconds(tmp_path) is None
    (tmp_path / "install_began").write_text("1000\n")
    (tmp_path / "installed.stamp").touch()
    os.utime(tmp_path / "installed.stamp", (1042, 1042))
    assert install_seconds(tmp_path) == 42.0
    assert install_seconds(tmp_path) is None
