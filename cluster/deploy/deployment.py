"""Install a deployment on a Ray cluster: find or create its controller, hand it the goal, wait until it is reached. Running it again reconciles.

What is installed is detached: it does not end with this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.controller_actor import ControllerActor, ControllerSettings
from cluster.core.errors import FleetError, MoeError
from cluster.core.spec import ClusterSpec
from cluster.deploy import roots
from cluster.deploy.code_digest import code_digest
from cluster.deploy.connection import Connection
from cluster.deploy.machine_warnings import machine_warnings, worker_niceness
from cluster.deploy.progress import Progress, phase_of, state_line
from cluster.deploy.roots import Prepared

CONTROLLER = "controller"
HEAD_RESOURCE = "node:__internal_head__"
CALL_TIMEOUT_S = 30.0
PREPARE_TIMEOUT_S = 60.0
POLL_S = 0.25
DEGRADED_WAIT_S = 30.0
FORCE_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class _Head:
    node_id: str
    address: str


@contextmanager
def connected(namespace: str) -> Iterator[None]:
    """A driver on the Ray cluster that RAY_ADDRESS names, as it does in every job; never on one that merely runs nearby. Raises FleetError."""
    remedy = "submit this as a job with `ray job submit`, set RAY_ADDRESS, or use `moelastic up --local`"
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        message = f"no Ray cluster to deploy on: RAY_ADDRESS is not set; {remedy}"
        raise FleetError(message)
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="error", configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        message = f"no Ray cluster to deploy on at {address}: {error}; {remedy}"
        raise FleetError(message) from error
    try:
        yield
    finally:
        ray.shutdown()


def deploy(spec: ClusterSpec, progress: Progress, *, replace: bool, wait_s: float, announce: Callable[[Connection], None]) -> tuple[Connection, str]:
    """Bring the cluster to `spec`; returns how it is reached, and what is amiss when it answers but is degraded, else an empty text.

    Raises ConfigError, FleetError or CheckpointError, by name of what is wrong.
    `announce` is told how it is reached as soon as there is a controller to ask: `status` then works while models still load.
    """
    head = _head()
    progress.show("preparing folders and secrets")
    prepared = _on_head(head, roots.prepare, spec.model_dump_json(), timeout_s=PREPARE_TIMEOUT_S)
    controller, control_address = _controller(spec, head, prepared, progress, replace=replace)
    revision, differences = _ask(controller.apply.remote(prepared.spec_json, replace))
    tokens = ClusterSpec.model_validate_json(prepared.spec_json).auth.tokens
    connection = Connection(
        name=spec.name,
        token_path=next(iter(tokens.values()), None),
        control_address=control_address,
        control_token_path=prepared.secrets.control_token_path,
        trace_dir=spec.telemetry.trace_dir,
    )
    announce(connection)
    for difference in differences:
        progress.say(f"differs, replaced only with --replace: {difference}")
    status = _wait_until_serving(controller, progress, revision=revision, deadline_s=time.monotonic() + wait_s)
    niceness = worker_niceness((actor["pid"] for actor in status["actors"] if actor["pid"]), spec.scheduling.niceness)
    for warning in machine_warnings(status["actors"], ray.nodes(), niceness if niceness > spec.scheduling.niceness else 0):
        progress.say(warning)
    address = next(router["address"] for router in status["routers"] if router["state"] == "ready")
    trouble = "" if status["state"] == "SERVING" else status["message"] or "something was lost and is not back"
    return connection.model_copy(update={"router_address": address}), trouble


def take_down(name: str, progress: Progress, *, timeout_s: float) -> bool:
    """End a deployment: routers first, then its actors, at last its controller. Returns whether anything of it ran. Raises FleetError."""
    try:
        controller = ray.get_actor(CONTROLLER, namespace=name)
    except ValueError:
        return _end_orphans(name) > 0
    progress.show("draining routers, stopping expert actors")
    _ask(controller.down.remote(timeout_s), timeout_s=timeout_s + CALL_TIMEOUT_S)
    ray.kill(controller, no_restart=True)
    _end_orphans(name)
    return True


def end_by_force(name: str, progress: Progress) -> bool:
    """End a deployment without asking its controller, which may hang; requests under way fail. Returns whether anything of it ran. Raises FleetError."""
    controller = _find_controller(name)
    if controller is not None:
        progress.show("killing the controller")
        ray.kill(controller, no_restart=True)  # first, or it would start again what is killed after it
    progress.show("killing routers and expert actors")
    return _end_orphans(name) > 0 or controller is not None


def _head() -> _Head:
    nodes = [node for node in ray.nodes() if node["Alive"] and HEAD_RESOURCE in node["Resources"]]
    if not nodes:
        message = "Ray shows no head node that is alive; look at `ray status`"
        raise FleetError(message)
    return _Head(nodes[0]["NodeID"], nodes[0]["NodeManagerAddress"])


def _on_head(head: _Head, work: Any, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:  # noqa: ANN401  # any function and its result
    """Run a function on the head, where the controller keeps its records."""
    if ray.get_runtime_context().get_node_id() == head.node_id:
        return work(*arguments)
    task = ray.remote(work).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(head.node_id, soft=False))
    return _ask(task.remote(*arguments), timeout_s=timeout_s)


def _controller(spec: ClusterSpec, head: _Head, prepared: Prepared, progress: Progress, *, replace: bool) -> tuple[Any, str]:
    """The running controller, or a new one; and where its control service listens."""
    code, settings = code_digest(), _settings_digest(spec)
    found = _find_controller(spec.name)
    if found is not None and prepared.running_digest.split() != [code, settings]:
        if replace:
            progress.show("replacing the controller, whose code or settings are older")
            ray.kill(found, no_restart=True)
            _wait_until_gone(spec.name)
            found = None
        elif not prepared.running_digest.startswith(code):  # what differs in its settings it says itself
            progress.say("differs, replaced only with --replace: the controller runs other code than this")
    if found is None:
        progress.show("starting the controller")
        found = _start_controller(spec, head, prepared, code)
        _on_head(head, roots.record_digest, prepared.state_dir, f"{code} {settings}")
    return found, _ask(found.start.remote())


def _settings_digest(spec: ClusterSpec) -> str:
    """Of the sections that a controller is started with and cannot change while it runs."""
    return hashlib.sha256(f"{spec.control.model_dump_json()}\n{spec.store.model_dump_json()}".encode()).hexdigest()


def _find_controller(name: str) -> Any | None:  # noqa: ANN401  # ray's handles have no type
    try:
        return ray.get_actor(CONTROLLER, namespace=name)
    except ValueError:
        return None


def _start_controller(spec: ClusterSpec, head: _Head, prepared: Prepared, digest: str) -> Any:  # noqa: ANN401
    settings = ControllerSettings(
        deployment=spec.name,
        host=spec.control.host or head.address,
        port=spec.control.port,
        state_dir=prepared.state_dir,
        store_dir=prepared.store_dir,
        link_secret=prepared.secrets.link_secret,
        control_token=prepared.secrets.control_token,
        code_digest=digest,
        observe_timeout_s=spec.control.observe_timeout_s,
        control=spec.control,
        store=spec.store,
        niceness=spec.scheduling.niceness,
    )
    options = ray.remote(ControllerActor).options(
        name=CONTROLLER,
        namespace=spec.name,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=-1,
        num_cpus=0,
        enable_task_events=False,
        # Its records lie on this node.
        scheduling_strategy=NodeAffinitySchedulingStrategy(head.node_id, soft=False),
    )
    return options.remote(settings, partial(roots.make_fleet, store_max_bytes=spec.store.max_bytes))


def _wait_until_serving(controller: Any, progress: Progress, *, revision: int, deadline_s: float) -> dict[str, Any]:  # noqa: ANN401
    """The status once the goal is reached, replacements included; raises FleetError with what keeps it from being.

    A deployment that is degraded is given a while to mend itself; then its status is returned as it is.
    """
    degraded_since_s: float | None = None
    while True:
        status: dict[str, Any] = json.loads(_ask(controller.status_json.remote()))
        progress.show(state_line(status), phase=phase_of(status))
        is_current = status["spec_revision"] >= revision
        if is_current and status["state"] == "FAILED":
            message = f"{status['message']}; what runs keeps running, `moelastic status` shows it"
            raise FleetError(message)
        if is_current and any(router["state"] == "ready" for router in status["routers"]):
            degraded_since_s = (degraded_since_s or time.monotonic()) if status["state"] == "DEGRADED" else None
            if status["state"] == "SERVING" or (degraded_since_s is not None and time.monotonic() > min(degraded_since_s + DEGRADED_WAIT_S, deadline_s)):
                return status
        if time.monotonic() > deadline_s:
            message = f"not serving in time: {state_line(status)}; it goes on by itself, `moelastic status` shows how far; wait longer with --wait-s"
            raise FleetError(message)
        time.sleep(POLL_S)


def _wait_until_gone(name: str) -> None:
    deadline_s = time.monotonic() + CALL_TIMEOUT_S
    while _find_controller(name) is not None:
        if time.monotonic() > deadline_s:
            message = f"the old controller of {name} did not end within {CALL_TIMEOUT_S:.0f} s; look at it with `ray list actors`"
            raise FleetError(message)
        time.sleep(POLL_S)


def _end_orphans(name: str) -> int:
    """End named actors of a deployment that no controller commands any more; returns how many there were. Raises FleetError when one stays."""
    found: set[str] = set()
    deadline_s = time.monotonic() + FORCE_LIMIT_S
    while names := _actor_names(name):
        if time.monotonic() > deadline_s:
            message = f"actors {', '.join(sorted(names)[:8])} of {name} could not be ended within {FORCE_LIMIT_S:.0f} s; look at them with `ray list actors`"
            raise FleetError(message)
        for actor in names - found:
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(actor, namespace=name), no_restart=True)
        found |= names
        time.sleep(POLL_S)
    return len(found)


def _actor_names(name: str) -> set[str]:
    return {entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True) if entry["namespace"] == name}


def _ask(reference: Any, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:  # noqa: ANN401
    """The result of a call; Ray's failures become ours."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MoeError):
            raise cause from None
        message = f"the controller raised {type(cause).__name__}: {cause}"
        raise FleetError(message) from error
    except GetTimeoutError as error:
        message = (
            f"the controller did not answer within {timeout_s:.0f} s; look at its log: `ray logs actor` for the actor named {CONTROLLER};"
            " `moelastic down --force` ends everything without it"
        )
        raise FleetError(message) from error
    except RayActorError as error:
        message = f"the controller ended: {str(error).splitlines()[0]}; run this again: it takes up where it was"
        raise FleetError(message) from error
