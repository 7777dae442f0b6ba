"""A scenario: one YAML file in Chaos Toolkit's words, with a timeline, a load with known answers, limits and numeric assertions.

The keys `title` to `rollbacks` mean what they mean there; `seed` to `repetitions` are ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from chaos.core.tolerance import GivenTolerance

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9_]*$")]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
MAX_SECONDS = 3600.0


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Probe(_Section):
    """One measured value and what it may be. Modes are Litmus': `edge` before and after, `sot`, `eot`, `continuous` as a guard while faults are active."""

    type: Literal["probe"] = "probe"
    name: Name
    tolerance: GivenTolerance
    mode: Literal["sot", "eot", "edge", "continuous"] = "edge"


class SteadyState(_Section):
    """What holds when nothing is wrong: checked before anything is injected, and after everything has recovered."""

    title: Text
    probes: tuple[Probe, ...] = Field(min_length=1, max_length=32)


class Selector(_Section):
    """Who is struck. Chosen by the seed among those that fit; `head` nodes, and nodes that host a router, are never chosen as nodes."""

    kind: Literal["actor", "gpu", "node", "router", "controller"]
    pick: Literal["random", "hottest", "rotate"] = Field("random", description="rotate: another one in every repetition, in order")
    role: Literal["primary", "shadow", "any"] = Field("primary", description="actors that hold a replica, or a shadow, of the load's model")
    node: str | None = Field(None, description="only on this node, by name")
    count: PositiveInt = 1


class Action(_Section):
    """One fault at one time. `at` is seconds after the steady state was met; `seconds` how long it stays before it is undone."""

    type: Literal["action"] = "action"
    name: Name
    at: NonNegativeFloat = Field(le=MAX_SECONDS)
    fault: Name
    target: Selector
    arguments: dict[str, Any] = Field(default_factory=dict, description="the fault's settings; a pair [low, high] for a number is drawn by the seed")
    seconds: PositiveFloat | tuple[PositiveFloat, PositiveFloat] | None = Field(None, description="null: until recovery; a pair is drawn by the seed")


class Rollback(_Section):
    """What must be seen before a repetition counts as recovered, beside each fault's own recovery, which needs no word here.

    Asked for once every fault is undone, unless the run was stopped, and measured over half a second again and again; unseen, the repetition deviated.
    """

    type: Literal["probe"] = "probe"
    name: Name
    tolerance: GivenTolerance
    within_s: PositiveFloat = Field(60.0, le=MAX_SECONDS)


class Load(_Section):
    """Requests with known answers, from a process of its own. With `rate` an open loop, else `callers` that send their next request on an answer."""

    model: str | None = Field(None, description="default: the first one served")
    layer: NonNegativeInt | None = Field(None, description="default: its first MoE layer")
    callers: PositiveInt = 4
    rate: PositiveFloat | None = Field(None, description="requests/s; null and no `share_of_peak`: a closed loop")
    share_of_peak: float | None = Field(None, gt=0.0, le=2.0, description="requests/s as a share of the most that is kept up with just before")
    tokens: PositiveInt = Field(32, le=4096)
    fidelity: Literal["any", "exact"] = "any"
    timeout_s: PositiveFloat = 10.0
    busy_processes: NonNegativeInt = Field(0, le=64, description="processes that only burn a core each, beside the load")


class Limits(_Section):
    """The blast radius: a method that would strike more is refused before anything is injected."""

    actors: NonNegativeInt = 1
    nodes: NonNegativeInt = 0
    routers: NonNegativeInt = 0
    controllers: NonNegativeInt = 0


class Scenario(_Section):
    """One experiment."""

    title: Text
    description: Text
    tags: tuple[str, ...] = ()
    configuration: dict[str, Any] = Field(default_factory=dict, description="values that `${name}` elsewhere in the file stands for")
    steady_state: SteadyState = Field(alias="steady-state-hypothesis")
    method: tuple[Action, ...] = Field(max_length=16, description="empty: a control run")
    rollbacks: tuple[Rollback, ...] = ()
    seed: NonNegativeInt = 0
    load: Load = Load()
    limits: Limits = Limits()
    control_s: PositiveFloat = Field(2.0, le=MAX_SECONDS, description="load without a fault, measured before each repetition: the control run")
    observe_s: PositiveFloat = Field(3.0, le=MAX_SECONDS, description="load after the last fault of a repetition, at least")
    recover_s: PositiveFloat = Field(90.0, le=MAX_SECONDS, description="limit for everything to be whole again after a repetition")
    affected_s: PositiveFloat = Field(1.0, description="requests alive within this time of the fault are affected")
    repetitions: PositiveInt = Field(1, le=10_000)
    assertions: dict[Name, GivenTolerance] = Field(default_factory=dict, description="limits on what the repetitions together measured")

    @model_validator(mode="after")
    def _timeline_is_in_order(self) -> Self:
        times = [action.at for action in self.method]
        if times != sorted(times):
            message = "method: `at` must not go back: list the actions in the order of their times"
            raise ValueError(message)
        names = [action.name for action in self.method]
        if len(set(names)) != len(names):
            message = "method: two actions have the same name; every action needs its own"
            raise ValueError(message)
        return self
