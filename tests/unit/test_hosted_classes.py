"""The plain classes that Ray tests host take what the real ones take: a fleet that calls one can call the other."""

from __future__ import annotations

import inspect

import pytest

from actors.expert_actor import ExpertActor
from actors.node_agent import NodeAgent
from kit.hosted import HostedActor, HostedAgent, HostedRouter
from router_service.hosting import RouterHost

PAIRS = [(ExpertActor, HostedActor), (NodeAgent, HostedAgent), (RouterHost, HostedRouter)]
ONLY_REAL = {("NodeAgent", "gpus")}  # asked by `doctor` only, never by the fleet


def parameters(method: object) -> list[tuple[str, object, bool]]:
    found = inspect.signature(method).parameters.values()  # type: ignore[arg-type]
    return [(each.name, each.kind, each.default is inspect.Parameter.empty) for each in found if not each.name.startswith("_ray")]  # Ray adds its own in place


@pytest.mark.parametrize(("real", "hosted"), PAIRS)
def test_hosted_class_has_every_method_of_the_real_one_with_the_same_parameters(real: type, hosted: type) -> None:
    methods = [name for name in vars(real) if not name.startswith("_") and inspect.isfunction(vars(real)[name])]
    asked = [name for name in methods if (real.__name__, name) not in ONLY_REAL]
    assert asked
    for name in asked:
        assert parameters(getattr(real, name)) == parameters(getattr(hosted, name)), f"{hosted.__name__}.{name}"
