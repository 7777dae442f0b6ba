"""Every fault there is. A new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, cast

from pydantic import ValidationError

from chaos.core.experiment import Action
from chaos.faults import (
    double_loss,
    drop_replies,
    flip_weights,
    freeze_controller,
    inf_weights,
    kill_actor,
    kill_controller,
    kill_router,
    late_replies,
    lose_gpu,
    lose_node,
    nan_weights,
    slow_actor,
    stop_actor,
    stuck_compute,
)
from chaos.port import FaultKind, FaultSettings, Injection, Order
from cluster.core.errors import ConfigError

ACTORS = frozenset({"actor", "gpu"})
ACTOR = frozenset({"actor"})
GPU = frozenset({"gpu"})
NODE = frozenset({"node"})
ROUTER = frozenset({"router"})
CONTROLLER = frozenset({"controller"})


class _Module(Protocol):
    """What a fault's file defines."""

    Settings: type[FaultSettings]
    inject: Callable[[Order, Injection], Awaitable[None]]
    recover: Callable[[Order, Injection], Awaitable[None]]


def _kind(name: str, module: object, kinds: frozenset[str]) -> FaultKind:
    found = cast("_Module", module)
    summary = (getattr(module, "__doc__", "") or "").strip().splitlines()[0]
    return FaultKind(name, summary, kinds, found.Settings, found.inject, found.recover, getattr(module, "widen", None))


FAULTS: dict[str, FaultKind] = {
    kind.name: kind
    for kind in (
        _kind("kill_actor", kill_actor, ACTOR),
        _kind("stop_actor", stop_actor, ACTORS),
        _kind("stuck_compute", stuck_compute, ACTORS),
        _kind("slow_actor", slow_actor, ACTORS),
        _kind("lose_gpu", lose_gpu, GPU),
        _kind("lose_node", lose_node, NODE),
        _kind("double_loss", double_loss, ACTOR),
        _kind("nan_weights", nan_weights, ACTOR),
        _kind("inf_weights", inf_weights, ACTOR),
        _kind("flip_weights", flip_weights, ACTOR),
        _kind("drop_replies", drop_replies, ACTORS),
        _kind("late_replies", late_replies, ACTORS),
        _kind("kill_controller", kill_controller, CONTROLLER),
        _kind("freeze_controller", freeze_controller, CONTROLLER),
        _kind("kill_router", kill_router, ROUTER),
    )
}


def fault_of(action: Action) -> FaultKind:
    """The fault that an action names. Raises ConfigError for an unknown one, and for a target that it cannot strike."""
    kind = FAULTS.get(action.fault)
    if kind is None:
        message = f"method: {action.name}: unknown fault {action.fault}; known: {', '.join(sorted(FAULTS))}"
        raise ConfigError(message)
    if action.target.kind not in kind.kinds:
        message = f"method: {action.name}: {action.fault} strikes {', '.join(sorted(kind.kinds))}, not a {action.target.kind}"
        raise ConfigError(message)
    return kind


def settings_of(action: Action, arguments: dict[str, object]) -> FaultSettings:
    """The fault's settings of an action. Raises ConfigError that names the argument."""
    try:
        return fault_of(action).settings.model_validate(arguments)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc'])) or 'arguments'}: {item['msg']}" for item in error.errors(include_url=False, include_input=False)]
        message = f"method: {action.name}: arguments: {'; '.join(problems)}"
        raise ConfigError(message) from error
