"""Whom a scenario would strike: the choice that the seed makes, before anything is injected."""

from __future__ import annotations

import random
from dataclasses import dataclass

from chaos.core.experiment import Action
from chaos.core.targets import Inventory, Target, check_blast_radius, first_layer, select
from chaos.faults.table import fault_of, settings_of
from chaos.port import ClusterPort, FaultSettings
from chaos.scenario_files import ScenarioFile
from chaos.target import LocalTarget

PAIR = 2


@dataclass(frozen=True, slots=True)
class Choice:
    """One action with everything drawn: whom, with which settings, for how long."""

    action: Action
    target: Target
    settings: FaultSettings
    seconds: float | None


def dice(file: ScenarioFile, seed: int, number: int) -> random.Random:
    """The chance of one repetition; the same seed always chooses alike on the same cluster."""
    return random.Random(f"{seed}/{file.name}/{number}")  # noqa: S311  # nothing secret hangs on it


def choose(file: ScenarioFile, inventory: Inventory, *, model: str, rng: random.Random, number: int) -> list[Choice]:
    """Draw every action's target and numbers. Raises ConfigError when nobody fits, or the blast radius is exceeded."""
    choices: list[Choice] = []
    layer = first_layer(inventory, model) if file.scenario.load.layer is None else file.scenario.load.layer
    for action in file.scenario.method:
        kind = fault_of(action)
        target = select(inventory, action.target, model=model, rng=rng, layer=layer, turn=number, avoid=[choice.target for choice in choices])
        if kind.widen is not None:
            target = kind.widen(inventory, target, model)
        arguments = {name: _drawn(value, rng) for name, value in action.arguments.items()}
        seconds = rng.uniform(*action.seconds) if isinstance(action.seconds, tuple) else action.seconds
        choices.append(Choice(action, target, settings_of(action, arguments), seconds))
    check_blast_radius((choice.target for choice in choices), file.scenario.limits)
    return choices


def planned_targets(file: ScenarioFile, target: LocalTarget, seed: int) -> list[str]:
    """Lines for people: what the first repetition would do. Raises ConfigError like `choose`."""
    return described(file, target, model=file.scenario.load.model or target.spec.models[0].name, seed=seed)


def described(file: ScenarioFile, cluster: ClusterPort, *, model: str, seed: int) -> list[str]:
    """The same for any cluster."""
    choices = choose(file, cluster.inventory(), model=model, rng=dice(file, seed, 0), number=0)
    return [
        f"at {choice.action.at:g} s: {choice.action.fault} on {choice.target.name}{f' for {choice.seconds:.2f} s' if choice.seconds else ''}"
        for choice in choices
    ] or ["nothing is struck: a control run"]


def _drawn(value: object, rng: random.Random) -> object:
    """A pair of numbers becomes one between them; anything else stays."""
    if isinstance(value, list) and len(value) == PAIR and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        return rng.uniform(*value)
    return value
