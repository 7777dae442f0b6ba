"""The fleet on Ray: the only place where the controller's machines are Ray's. Receives plain actor classes and makes detached, named actors of them.

Names in the deployment's namespace: `controller`, `router-0`, `agent/NODE`, `ACTOR_ID/gGENERATION`. Blocking Ray calls run in a few threads
of their own, everything has a time limit, and no look waits for a process that does not answer (`report_watch`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.core.actor_config import ExpertActorConfig, RouterConfig
from cluster.core.descriptors import DType, Manifest
from cluster.core.errors import FleetError, NotFound, NotReady
from cluster.core.ids import CopyId, Incarnation
from cluster.core.link_frames import derive_link_key
from cluster.core.spec import ShadowSpec
from cluster.core.status import ActorObservation, ActorState, FleetObservation, NodeObservation, RouterObservation
from cluster.fleet_replies import AGENT_PREFIX, NODE_PREFIX_CHARS, ROUTER_NAME, accepted, failure_of, incarnation_of, node_of, observation_of
from cluster.node_agents import NodeAgents
from cluster.report_watch import PATIENCE_S, Look, ReportWatch

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

CALL_TIMEOUT_S = 10.0
SILENT_STOP_S = 1.0
FORCE_TIMEOUT_S = 10.0
NUM_THREADS = 8
MAX_FAILED = 256


@dataclass(frozen=True, slots=True)
class HostedClasses:
    """The plain classes that become actors: `expert_actor(config, link_key)`, `node_agent(store_dir, max_bytes)`, `router(config, secrets)`."""

    expert_actor: type
    node_agent: type
    router: type


@dataclass(slots=True)
class _Hosted:
    """One actor we have a handle of. `start` is its start call while that is under way."""

    handle: Any
    watch: ReportWatch[Any]
    node_id: str = ""
    start: asyncio.Task[None] | None = None
    is_silent: bool = False


@dataclass(slots=True)
class _LookUp:
    """What the GCS says: nodes, and who there is in our namespace."""

    nodes: tuple[NodeObservation, ...]
    names: set[str] = field(default_factory=set)
    handles: dict[str, Any] = field(default_factory=dict)


class RayFleet:
    """One deployment's actors on a running Ray cluster that this process is connected to."""

    def __init__(
        self,
        *,
        namespace: str,
        classes: HostedClasses,
        link_secret: bytes,
        router_secrets: object,
        store_dir: Path,
        store_max_bytes: int | None = None,
        observe_timeout_s: float = 5.0,
    ) -> None:
        self._namespace, self._classes = namespace, classes
        self._link_secret, self._router_secrets = link_secret, router_secrets
        self._store_dir, self._store_max_bytes = store_dir, store_max_bytes
        self._observe_timeout_s = observe_timeout_s
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="ray-calls")
        self._hosted: dict[str, _Hosted] = {}
        self._agents = NodeAgents(self)
        self._addresses: dict[str, str] = {}
        self._head_id = ""
        self._failed: dict[str, str] = {}

    async def observe(self, *, out: Collection[Incarnation] = ()) -> FleetObservation:
        """Look at everything once. Raises FleetError when Ray itself does not answer; a silent actor only is unreachable."""
        known = set(self._hosted)
        found = await self._blocking(lambda: self._look_up(known), self._observe_timeout_s)
        for name in known - found.names:
            self._forget(name)
        for name, handle in found.handles.items():
            self._hosted.setdefault(name, self._watched(name, handle))
        self._addresses = {node.node_id: node.address for node in found.nodes}
        self._head_id = next((node.node_id for node in found.nodes if node.is_head), "")
        alive = {node.node_id for node in found.nodes if node.alive}
        names = sorted(name for name in found.names if name in self._hosted and name not in self._failed)
        silent = {str(incarnation) for incarnation in out}
        looks = (self._observe_one(name, alive, 0.0 if name in silent else PATIENCE_S) for name in names)
        seen = [*await asyncio.gather(*looks), *map(failure_of, self._failed, self._failed.values())]
        return observation_of(asyncio.get_running_loop().time(), found.nodes, seen, self._agents.gpus(alive))

    async def import_model(
        self,
        node_id: str,
        *,
        name: str,
        source: Path,
        dtype: DType | Literal["checkpoint"],
        expected: Manifest | None,
        shadow: ShadowSpec | None = None,
    ) -> Manifest:
        """Read a checkpoint by the node's agent. Raises CheckpointError, FleetError."""
        wanted = None if expected is None else expected.model_dump_json()
        asked = None if shadow is None else shadow.model_dump_json()
        arguments = {"name": name, "source": str(source), "dtype": str(dtype), "expected": wanted, "shadow": asked}
        reply = await self._agents.run_import(node_id, lambda agent: agent.import_model.remote(**arguments))
        return Manifest.model_validate_json(accepted(reply).value)

    async def import_experts(
        self,
        node_id: str,
        *,
        manifest: Manifest,
        source: Path,
        experts: Collection[tuple[int, int]],
        shadows: Collection[tuple[int, int]] = (),
        distrusted: Collection[str] = (),
    ) -> None:
        """Fill the node's store by its agent. Raises CheckpointError, FleetError."""
        arguments = {"manifest": manifest.model_dump_json(), "source": str(source), "experts": list(experts), "shadows": list(shadows)}
        arguments["distrusted"] = list(distrusted)
        accepted(await self._agents.run_import(node_id, lambda agent: agent.import_experts.remote(**arguments)))

    async def import_progress(self) -> dict[str, tuple[int, int]]:
        """What the agents import right now; an agent that does not answer is left out."""
        return await self._agents.progress()

    async def start_actor(self, config: ExpertActorConfig, *, node_id: str, num_gpus: float, num_cpus: float) -> None:
        """Create the actor, or find it, and tell it to start; what comes of it is seen by `observe`."""
        key = derive_link_key(self._link_secret, config.incarnation)
        options = {"num_gpus": num_gpus, "num_cpus": num_cpus, "max_restarts": 0, "enable_task_events": False}
        await self._start(str(config.incarnation), self._classes.expert_actor, (config, key), node_id, options)

    async def stop_actor(self, incarnation: Incarnation, *, timeout_s: float) -> None:
        """Ask it to stop, unless there is no time for it; then end its process, by its node's agent when it does not answer."""
        await self._stop(str(incarnation), timeout_s)

    async def assume(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        """Begin to load copies."""
        await self._command(incarnation, lambda handle: handle.assume.remote(list(copies), epoch))

    async def drain(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        """Begin to drain copies."""
        await self._command(incarnation, lambda handle: handle.drain.remote(list(copies), epoch))

    async def release(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        """Free drained copies' slots."""
        await self._command(incarnation, lambda handle: handle.release.remote(list(copies), epoch))

    async def start_router(self, config: RouterConfig, *, node_id: str) -> None:
        """Create the router, or find it, and tell it to start. Ray restarts its process; `observe` then starts it anew."""
        options = {"num_cpus": 0, "max_restarts": -1}
        await self._start(config.router_id, self._classes.router, (config, self._router_secrets), node_id, options)

    async def stop_router(self, router_id: str, *, timeout_s: float) -> None:
        """Ask it to drain and stop; then end its process."""
        await self._stop(router_id, timeout_s)

    async def stop_agents(self, *, timeout_s: float) -> None:
        """End every node's agent."""
        self._agents.forget()
        await self._blocking(self._kill_agents, timeout_s)

    async def close(self) -> None:
        """Let go of handles and threads."""
        for name in list(self._hosted):
            self._forget(name)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look_up(self, known: set[str]) -> _LookUp:
        """Blocking: ask the GCS for nodes and names, and for handles of names that are new to us."""
        free = ray._private.state.available_resources_per_node()  # noqa: SLF001 - there is no public call for one node's free resources
        nodes = tuple(node_of(entry, free.get(entry["NodeID"], {})) for entry in ray.nodes())
        result = _LookUp(nodes)
        for entry in ray.util.list_named_actors(all_namespaces=True):
            name = entry["name"]
            if entry["namespace"] != self._namespace or not (incarnation_of(name) or ROUTER_NAME.match(name)):
                continue
            if name not in known:
                try:
                    result.handles[name] = ray.get_actor(name, namespace=self._namespace)
                except ValueError:
                    continue
            result.names.add(name)
        return result

    def _watched(self, name: str, handle: Any, *, is_new: bool = False) -> _Hosted:  # noqa: ANN401 - Ray ships no types for handles
        LOG.info("fleet: %s %s", "created" if is_new else "found", name)
        return _Hosted(handle, ReportWatch(lambda: _answer(handle), is_new=is_new))

    def _forget(self, name: str) -> None:
        hosted = self._hosted.pop(name, None)
        if hosted is not None:
            hosted.watch.close()
            if hosted.start is not None:
                hosted.start.cancel()

    async def _observe_one(self, name: str, alive: set[str], patience_s: float) -> ActorObservation | RouterObservation:
        hosted = self._hosted[name]
        look = await hosted.watch.look(self._observe_timeout_s, patience_s)
        state, reason = _state(look)
        hosted.is_silent = state is ActorState.UNREACHABLE
        if look.report is not None and look.report.node_id:
            hosted.node_id = look.report.node_id
        if state is ActorState.UNREACHABLE and hosted.node_id and hosted.node_id not in alive:
            state, reason = ActorState.DEAD, "its node is dead"
        incarnation = incarnation_of(name)
        if incarnation is not None:
            return ActorObservation(incarnation, state, hosted.node_id, look.report, reason, look.silent_s, look.is_outdated)
        if state is ActorState.STARTING and hosted.start is None:
            hosted.node_id = hosted.node_id or self._head_id  # routers live on the head
            self._tell_to_start(name, hosted)
        if look.report is not None:
            report: RouterObservation = look.report
            return report
        return RouterObservation(name, state, hosted.node_id, reason=reason)

    async def _start(self, name: str, kind: type, arguments: tuple[object, ...], node_id: str, options: dict[str, Any]) -> None:
        """Detached, on exactly this node; the start call goes on beside us."""

        def create() -> Any:  # noqa: ANN401 - Ray ships no types for handles
            return ray.remote(kind).options(**self._options(name, node_id), **options).remote(*arguments)

        handle = await self._blocking(create, CALL_TIMEOUT_S)
        self._failed.pop(name, None)
        hosted = self._hosted.get(name)
        if hosted is None:
            hosted = self._hosted[name] = self._watched(name, handle, is_new=True)
        hosted.node_id = hosted.node_id or node_id
        if hosted.start is None:
            self._tell_to_start(name, hosted)

    def _options(self, name: str, node_id: str) -> dict[str, Any]:
        place = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return {
            "name": name,
            "namespace": self._namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_task_retries": 0,
            "scheduling_strategy": place,
        }

    def _tell_to_start(self, name: str, hosted: _Hosted) -> None:
        async def start() -> None:
            try:
                arguments = (hosted.node_id, self._addresses.get(hosted.node_id, "")) if incarnation_of(name) else (hosted.node_id,)
                await hosted.handle.start.remote(*arguments)
            except ray.exceptions.RayTaskError as error:
                await self._give_up(name, hosted, _cause(error))
            except ray.exceptions.RayError as error:
                LOG.warning("fleet: %s went away while starting: %s", name, type(error).__name__)
            finally:
                hosted.start = None

        hosted.start = asyncio.create_task(start(), name=f"start {name}")

    async def _give_up(self, name: str, hosted: _Hosted, why: BaseException) -> None:
        """A start that raises leaves a process that can do nothing: end it, and keep the reason for the next looks."""
        self._failed = {**dict(list(self._failed.items())[1 - MAX_FAILED :]), name: f"{type(why).__name__}: {why}"}
        LOG.warning("fleet: %s could not start: %s", name, self._failed[name])
        with contextlib.suppress(FleetError):
            await self._kill(hosted.handle)

    async def _stop(self, name: str, timeout_s: float) -> None:
        hosted = self._hosted.get(name)
        if hosted is None:
            try:
                handle = await self._blocking(lambda: ray.get_actor(name, namespace=self._namespace), CALL_TIMEOUT_S)
            except NotFound:
                return
            hosted = self._hosted.setdefault(name, self._watched(name, handle))
        report = hosted.watch.last
        is_asked = report is not None and timeout_s > 0 and await self._ask_to_stop(hosted, min(timeout_s, SILENT_STOP_S) if hosted.is_silent else timeout_s)
        if report is not None and not is_asked:
            await self._agents.kill(hosted.node_id, report)  # Ray takes seconds to end a process that hangs
        await self._kill(hosted.handle)

    async def _ask_to_stop(self, hosted: _Hosted, timeout_s: float) -> bool:
        hosted.watch.note_command()
        try:
            async with asyncio.timeout(timeout_s + 1.0):
                await hosted.handle.stop.remote(timeout_s)
        except (TimeoutError, ray.exceptions.RayError):
            return False
        return True

    async def _kill(self, handle: Any) -> None:  # noqa: ANN401 - Ray ships no types for handles
        await self._blocking(lambda: ray.kill(handle, no_restart=True), FORCE_TIMEOUT_S)

    async def _command(self, incarnation: Incarnation, send: Callable[[Any], Awaitable[Any]]) -> None:
        hosted = self._hosted.get(str(incarnation))
        if hosted is None:
            message = f"{incarnation} is not there; it was lost, or has not been seen yet"
            raise FleetError(message)
        hosted.watch.note_command()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reply = await _translated(send(hosted.handle))
        except TimeoutError as error:
            message = f"{incarnation} did not answer a command within {CALL_TIMEOUT_S:g} s"
            raise FleetError(message) from error
        finally:
            hosted.watch.note_command()
        accepted(reply)

    async def create_agent(self, node_id: str) -> Any:  # noqa: ANN401 - Ray ships no types for handles
        """The node's agent, found or made."""
        return await self._blocking(lambda: self._create_agent(node_id), CALL_TIMEOUT_S)

    async def end_agent(self, agent: Any) -> None:  # noqa: ANN401 - Ray ships no types for handles
        """End an agent that does not answer."""
        await self._kill(agent)

    async def answer(self, call: Awaitable[Result]) -> Result:
        """Await a call to an agent."""
        return await _translated(call)

    def _create_agent(self, node_id: str) -> Any:  # noqa: ANN401 - Ray ships no types for handles
        options = self._options(f"{AGENT_PREFIX}{node_id[:NODE_PREFIX_CHARS]}", node_id)
        return ray.remote(self._classes.node_agent).options(**options, num_cpus=0, max_restarts=-1).remote(self._store_dir, self._store_max_bytes)

    def _kill_agents(self) -> None:
        """Blocking."""
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == self._namespace and entry["name"].startswith(AGENT_PREFIX):
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(entry["name"], namespace=self._namespace), no_restart=True)

    async def _blocking(self, call: Callable[[], Result], limit_s: float) -> Result:
        """A blocking Ray call in one of our threads. Raises NotFound for a name that nobody has, FleetError for all else."""
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except TimeoutError as error:
            message = f"Ray did not answer within {limit_s:g} s; is its head node up?"
            raise FleetError(message) from error
        except ValueError as error:
            raise NotFound(str(error), resource="actor") from error
        except (ray.exceptions.RayError, RuntimeError, ConnectionError) as error:
            message = f"Ray refused: {type(error).__name__}: {error}"
            raise FleetError(message) from error


async def _answer(handle: Any) -> Any:  # noqa: ANN401 - Ray ships no types for handles
    return await handle.report.remote()


async def _translated(call: Awaitable[Result]) -> Result:
    """Await a Ray call; what Ray raises becomes FleetError."""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        cause = _cause(error)
        message = f"it raised {type(cause).__name__}: {cause}"
        raise FleetError(message) from error
    except ray.exceptions.RayError as error:
        message = f"the call was lost: {type(error).__name__}"
        raise FleetError(message) from error


def _cause(error: ray.exceptions.RayTaskError) -> BaseException:
    cause = error.cause
    return cause if isinstance(cause, BaseException) else error


def _state(look: Look[Any]) -> tuple[ActorState, str]:
    """What a look says of a process."""
    error = look.error
    if look.report is not None:
        return getattr(look.report, "state", ActorState.READY), ""
    if isinstance(error, ray.exceptions.ActorDiedError):
        return ActorState.DEAD, "its process is gone"
    if isinstance(error, NotReady) or (error is None and not look.was_heard):
        return ActorState.STARTING, ""
    if error is None:
        return ActorState.UNREACHABLE, "no report in time"
    return ActorState.UNREACHABLE, f"its report failed: {type(error).__name__}"
