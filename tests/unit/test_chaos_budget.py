from __future__ import annotations

from chaos.faults.table import FAULTS
from chaos.scenario_files import SHIPPED, load, names
from examples.failover.budget import DEPLOY_S, LIMIT_S, NUM_DEPLOYMENTS, WHOLE_S, planned_s, repetition_s

FILES = {name: load(SHIPPED / f"{name}.yaml") for name in names()}
# What the figures ask for; two loads of the same fault count together.
WANTED = {
    ("kill_actor", "kill_actor_exact"): 50,
    ("stop_actor", "stop_actor_exact"): 50,
    ("stop_actor_short",): 50,
    ("stop_actor_long",): 5,
    ("stuck_compute",): 50,
    ("nan_weights", "inf_weights"): 50,
    ("slow_replica",): 50,
    ("lose_gpu", "lose_gpu_exact"): 20,
    ("lose_node",): 20,
}


def test_every_row_is_repeated_as_often_as_its_figure_asks() -> None:
    assert {row: sum(FILES[name].scenario.repetitions for name in row) for row in WANTED} == WANTED


def test_all_shipped_scenarios_fit_into_the_time_that_is_said() -> None:
    assert NUM_DEPLOYMENTS * DEPLOY_S + planned_s(FILES.values()) <= LIMIT_S
    assert set(WHOLE_S) <= set(FAULTS)
    assert repetition_s(FILES["kill_actor"].scenario) > repetition_s(FILES["stop_actor_short"].scenario)


def test_every_fault_has_a_scenario() -> None:
    assert {action.fault for file in FILES.values() for action in file.scenario.method} == set(FAULTS)


def test_a_fault_that_lasts_is_measured_for_as_long_as_it_is_judged() -> None:
    """A control window as long as the affected one; a slow replica's latency over its whole time; and no heal before a time that is judged is over."""
    for name, file in FILES.items():
        scenario = file.scenario
        assert scenario.control_s >= min(scenario.affected_s, 1.0), name
        limit = scenario.assertions.get("exact_again_s")
        if limit is not None and any(action.fault.endswith("_weights") for action in scenario.method):
            assert limit.at_most is not None
            assert scenario.observe_s > limit.at_most, name
    slow = FILES["slow_replica"].scenario
    assert [action.seconds for action in slow.method] == [slow.affected_s]


def test_the_double_losses_ask_who_answered_and_how_others_failed() -> None:
    assert str(FILES["double_loss"].scenario.assertions["lower_rungs"]) == "above 0"
    exact = FILES["double_loss_exact"].scenario
    freeze = exact.method[0]
    assert freeze.fault == "freeze_controller"
    assert isinstance(freeze.seconds, float)
    assert exact.load.timeout_s < freeze.seconds - exact.method[1].at  # whoever asks at the moment of the loss cannot outlast it by trying again
    assert {name: str(exact.assertions[name]) for name in ("failed", "failed_unexplained", "late")} == {
        "failed": "above 0",
        "failed_unexplained": "equal to 0",
        "late": "equal to 0",
    }
