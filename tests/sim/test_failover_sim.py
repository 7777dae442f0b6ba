"""A router's data path, liveness, hedging and the controller's core in virtual time, under seeded faults: whatever breaks, the rules hold.

The rules are in `kit.failover_rules`. MOELASTIC_FAILOVER_SEEDS sets how many seeds are run (500; 5000 by hand), MOELASTIC_SIM_SEED replays one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from kit.failover_faults import FAULTS
from kit.failover_world import Ended, Plan, simulate
from kit.sim_actors import SimLink
from router_service.link_client import LinkClient

ROOT = Path(__file__).resolve().parents[2]
ONE_SEED = os.environ.get("MOELASTIC_SIM_SEED")
SEEDS = (int(ONE_SEED),) if ONE_SEED else tuple(range(int(os.environ.get("MOELASTIC_FAILOVER_SEEDS", "500"))))
ADDED_UP = 120
needs_many = pytest.mark.skipif(len(SEEDS) < ADDED_UP, reason="adds up many seeds")
EXACT_AGAIN_LIMIT_S = 10.0


def test_a_simulated_link_has_all_that_a_real_one_offers() -> None:
    """A lane may come to use any of it; mypy cannot tell, since the simulation takes the class's place."""
    link = SimLink(mock.Mock(), on_result=mock.Mock(), on_lost=mock.Mock(), on_progress=mock.Mock())
    offered = {name for name in vars(LinkClient) if not name.startswith("_")} - {"connect"}
    assert len(offered) > 5
    assert {name for name in offered if not hasattr(link, name)} == set()


@cache
def run(seed: int) -> Ended:
    return simulate(Plan.of(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_fault_breaks_a_rule(seed: int) -> None:
    ended = run(seed)
    assert sum(ended.outcomes.values()) == ended.num_requests > 0
    assert ended.exact_again_s < EXACT_AGAIN_LIMIT_S


@needs_many
def test_the_faults_happened_and_were_felt() -> None:
    runs = [run(seed) for seed in SEEDS[:ADDED_UP]]
    kinds = Counter(kind for ended in runs for kind in ended.faults)
    assert set(kinds) == set(FAULTS)
    assert sum(ended.num_ejections for ended in runs) > ADDED_UP / 4
    assert sum(ended.hedged_rows for ended in runs) > 0
    assert sum(ended.resent_rows for ended in runs) > 0
    assert sum(ended.num_shadow_answers for ended in runs) > 0
    outcomes = Counter[str]()
    for ended in runs:
        outcomes.update(ended.outcomes)
    assert set(outcomes) >= {"ok", "data_loss", "unavailable"}
    assert outcomes["ok"] > 0.95 * sum(outcomes.values())


@needs_many
def test_without_faults_nobody_is_ejected_and_nothing_fails() -> None:
    quiet = [ended for ended in map(run, SEEDS[:ADDED_UP]) if not ended.faults]
    assert len(quiet) > ADDED_UP / 20
    for ended in quiet:
        assert ended.num_ejections == 0
        assert set(ended.outcomes) <= {"ok", "data_loss"}
        assert ended.resent_rows == 0


@pytest.mark.parametrize("seed", range(8))
def test_rows_sent_stay_near_rows_asked_over_a_run_that_is_mostly_healthy(seed: int) -> None:
    ended = simulate(
        replace(Plan.of(seed), faults=2, run_s=12.0, calls_per_s=40.0, kinds=("kill_actor", "stop_actor", "stick_compute", "slow_down", "freeze_node"))
    )
    assert ended.asked_rows + ended.hedged_rows + ended.resent_rows <= 1.1 * ended.asked_rows


@pytest.mark.parametrize("kind", FAULTS)
def test_one_fault_of_a_kind_fails_no_request_that_may_be_degraded(kind: str) -> None:
    """Two replicas on actors of their own, and shadows elsewhere: what one fault leaves must do."""
    ended = simulate(Plan(seed=17, faults=1, kinds=(kind,), exact_share=0.0))
    assert ended.faults == [kind]
    assert set(ended.outcomes) <= {"ok", "data_loss"} | ({"deadline"} if kind == "pause_router" else set())


@pytest.mark.parametrize("seed", [2, 78])
def test_a_seed_gives_the_same_history_in_every_process(seed: int) -> None:
    script = f"import logging; logging.disable(50)\nfrom kit.failover_world import *\nprint(simulate(Plan.of({seed})).history)"
    found = {run(seed).history}
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", script]
        found.add(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout.strip())
    assert len(found) == 1
