"""How long `make chaos` takes: every shipped scenario in a little over an hour on two cores, and why each is repeated as often as it is.

A repetition is control_s (1 s: as long as the affected window it is compared with) + what the fault takes + 0.5 s to settle + about 0.6 s of questions.
What the fault takes is the longer of observe_s and WHOLE_S, the time until everything that was lost runs again, most of it the start of Python
processes with torch. Where the figures want at least 50 repetitions of actor faults and 20 of GPUs, those of both loads count together: half under
ANY_COPY and half under EXACT; of stops, 30 and 20. Stops of over 5 s come 5 times. Double losses ask for an outcome, not for a time: 5 of each. What
stands in no row of the table (dropped and late replies, flipped bits, a stopped controller) comes 5 times.
"""

from __future__ import annotations

from collections.abc import Iterable

from chaos.core.experiment import Action, Scenario
from chaos.runner import SETTLE_S
from chaos.scenario_files import ScenarioFile

# An hour was wanted. All of it has taken 62 minutes: lost processes start again behind those that answer, so a lost node takes 22 s to be whole.
LIMIT_S = 4000.0
QUESTIONS_S = 0.6
# A cluster and its deployment, for each of the two configurations; the known answers, the load process and the peak, for each scenario.
DEPLOY_S = 45.0
OPEN_S = 4.0
# For each kind of load: a closed loop, then rates downwards until one is kept up with twice.
PEAK_S = 20.0
NUM_DEPLOYMENTS = 2
NUM_PEAKS = 3
# Means of records on two cores; a stop that the controller ends by a replacement counts as a death.
WHOLE_S = {
    "kill_actor": 8.0,
    "stop_actor": 6.1,
    "stuck_compute": 4.3,
    "lose_gpu": 14.7,
    "lose_node": 21.9,
    "double_loss": 15.2,
    "kill_router": 4.6,
    "kill_controller": 5.8,
}
SHORT_STOP_S = 0.25


def repetition_s(scenario: Scenario) -> float:
    """About how long one repetition takes."""
    spans = [scenario.observe_s]
    frozen_s = sum(_longest_s(action) for action in scenario.method if action.fault == "freeze_controller")  # nothing is repaired before that is over
    for action in scenario.method:
        is_seen_by_nobody = action.fault == "stop_actor" and _longest_s(action) <= SHORT_STOP_S
        spans += [action.at + _longest_s(action) / 2, 0.0 if is_seen_by_nobody else action.at + frozen_s + WHOLE_S.get(action.fault, 0.0)]
    return scenario.control_s + max(spans) + SETTLE_S + QUESTIONS_S


def planned_s(files: Iterable[ScenarioFile]) -> float:
    """About how long these scenarios take, all their repetitions, on clusters that run."""
    return NUM_PEAKS * PEAK_S + sum(OPEN_S + file.scenario.repetitions * repetition_s(file.scenario) for file in files)


def _longest_s(action: Action) -> float:
    return max(action.seconds) if isinstance(action.seconds, tuple) else action.seconds or 0.0
