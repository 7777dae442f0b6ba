"""One deployment on real Ray, as users have it: it serves, it is adopted, and it outlives the death of its parts."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from cluster.core.actor_config import TelemetryConfig
from cluster.core.descriptors import DType
from cluster.core.errors import ExpertUnavailable, MoeError
from cluster.core.spec import ActorsSpec, AuthSpec, ClusterSpec, ModelSpec, RouterSpec, TelemetrySpec
from cluster.telemetry.trace_files import SpanRecord, read_spans
from cluster.telemetry.tracing import Tracing
from kit.deployments import Deployment, kill
from kit.models import HIDDEN, NUM_EXPERTS, TOP_K, save_custom
from kit.waiting import wait_until
from router_service.twin import Twin

pytestmark = pytest.mark.cluster
NUM_ACTORS = 4
NUM_TOKENS = 12


@dataclass
class Rig:
    """A deployment of one random model with two replicas of every expert, and its twin."""

    deployment: Deployment
    twin: Twin
    trace_dir: Path

    def expected(self, rows: torch.Tensor) -> torch.Tensor:
        return self.twin.layer(0, rows).hidden_states


def rows(seed: int = 0, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    return torch.randn((num_tokens, HIDDEN), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def spec_of(folder: Path, name: str, model: Path, **changes: Any) -> ClusterSpec:
    actors = changes.pop("actors", {"count": NUM_ACTORS, "num_gpus": 0.25, "free_slots": 4})
    replicas = changes.pop("replicas", 2)
    return ClusterSpec(
        name=name,
        models=(ModelSpec(name="random", path=model, dtype=DType.BF16, replicas=replicas),),
        actors=ActorsSpec(**actors),
        router=RouterSpec(port=0),
        auth=AuthSpec(trusted_trace_tenants=frozenset({"default"})),
        telemetry=TelemetrySpec(sampling_ratio=1.0, trace_dir=folder / "traces", actor_spans=True),
        **changes,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_custom(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="module")
def rig(deploy: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("deployment")
    with deploy(spec_of(folder, "replicated", model)) as deployment:
        yield Rig(deployment, Twin.from_folder(model, DType.BF16), folder / "traces")


@dataclass
class Load:
    """Requests one after the other from a thread of its own, every answer checked, until told to stop."""

    rig: Rig
    timeout_s: float = 30.0
    num_ok: int = 0
    failures: list[str] = field(default_factory=list)
    outcomes: list[dict[str, int]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: self.num_ok > 0 or bool(self.failures), "the load runs")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2 * self.timeout_s)
        assert not self._thread.is_alive()

    def until_more(self, count: int) -> None:
        """Wait for this many further good answers."""
        wanted = self.num_ok + count
        wait_until(lambda: self.num_ok >= wanted or bool(self.failures), f"{count} more answers", timeout_s=self.timeout_s)

    def _run(self) -> None:
        with self.rig.deployment.client(timeout_s=self.timeout_s) as client:
            seed = 0
            while not self._stop.is_set():
                seed += 1
                sent = rows(seed)
                try:
                    reply = client.dispatch(sent, model="random", layer=0, fidelity="exact")
                except MoeError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    return
                if not torch.equal(reply.hidden_states, self.rig.expected(sent)):
                    self.failures.append("an answer differs from the twin's")
                    return
                self.outcomes.append(reply.report.outcomes)
                self.num_ok += 1

    def check(self) -> None:
        assert self.failures == []
        assert all(sum(counts.values()) == NUM_TOKENS * TOP_K == counts["exact"] for counts in self.outcomes)


def test_it_serves_what_the_twin_computes(rig: Rig) -> None:
    with rig.deployment.client() as client:
        for seed in range(5):
            sent = rows(seed, num_tokens=1 + 30 * seed)
            assert torch.equal(client.dispatch(sent, model="random", layer=0).hidden_states, rig.expected(sent))
        info = client.model("random")
        status = client.status()
    assert info.layers[0].num_experts == NUM_EXPERTS
    assert status.state == "SERVING"
    assert status.controller_connected
    assert {model.num_missing for model in status.models} == {0}


def test_replicas_lie_on_two_nodes(rig: Rig) -> None:
    with rig.deployment.client() as client:
        table = client.routing_table()
    for expert in table.experts:
        nodes = {place.node_id for place in expert.replicas}
        assert len(expert.replicas) == 2
        assert len(nodes) == 2


def test_one_request_is_one_trace_over_three_processes(rig: Rig) -> None:
    """From the client through the router to actors on both nodes: every span in the one trace, each below the span that caused it."""
    tracing = Tracing(service="client", instance="test", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=rig.trace_dir))
    with rig.deployment.client(tracing=tracing) as client, tracing.span("test.root") as root:
        client.dispatch(rows(), model="random", layer=0)
    tracing.shutdown(5.0)
    trace_id = root.traceparent.split("-")[1]

    def trace() -> list[SpanRecord]:
        return [span for span in read_spans(rig.trace_dir) if span.trace_id == trace_id]

    def is_complete() -> bool:
        dispatched = {span.span_id for span in trace() if span.name == "moe.dispatch"}
        return bool(dispatched) and dispatched <= {span.parent_id for span in trace() if span.name == "expert.forward"}

    wait_until(is_complete, "every dispatch of the trace has the actor's span below it")
    by_id = {span.span_id: span for span in trace()}
    edges = {(span.name, by_id[span.parent_id].name if span.parent_id in by_id else span.parent_id) for span in by_id.values()}
    assert edges == {
        ("test.root", ""),
        ("moe.client", "test.root"),
        ("moe.request", "moe.client"),
        ("moe.gate", "moe.request"),
        ("moe.plan", "moe.request"),
        ("moe.dispatch", "moe.request"),
        ("moe.combine", "moe.request"),
        ("expert.forward", "moe.dispatch"),
    }
    assert {span.service for span in by_id.values()} == {"client", "router", "expert"}
    forwards = [span for span in by_id.values() if span.name == "expert.forward"]
    actors = rig.deployment.actors()
    assert sum(int(span.attributes["moe.tokens"]) for span in forwards) == NUM_TOKENS * TOP_K
    for span in forwards:
        actor = actors[span.instance.partition("/")[0]]
        assert span.node_id == actor["node_id"]
        assert by_id[span.parent_id].node_id not in {"", span.node_id}


def test_actors_are_replaced_one_by_one_without_a_failed_request(rig: Rig) -> None:
    original = rig.deployment.spec
    changed = original.model_copy(update={"actors": original.actors.model_copy(update={"max_tokens_per_frame": 2048})})
    before = {name: actor["generation"] for name, actor in rig.deployment.actors().items()}
    with Load(rig) as load:
        assert "replicated: serving on" in rig.deployment.apply(changed, "--replace")  # which has waited until the last one was replaced
        assert not rig.deployment.control()["differences"]
        after = {name: actor["generation"] for name, actor in rig.deployment.actors().items()}
        load.until_more(3)
    load.check()
    assert set(after) == set(before)
    assert all(after[name] > before[name] for name in before)


def test_a_killed_expert_actor_fails_no_request_and_comes_back(rig: Rig) -> None:
    victim = min(rig.deployment.actors())
    before = rig.deployment.actors()[victim]
    with Load(rig) as load:
        kill(rig.deployment.pid_of(victim))
        load.until_more(5)
        wait_until(lambda: rig.deployment.actors().get(victim, {}).get("generation", 0) > before["generation"], "a new incarnation", timeout_s=60)
        rig.deployment.until_serving()
        load.until_more(3)
    load.check()


def test_a_killed_controller_is_missed_by_no_request(rig: Rig) -> None:
    before = rig.deployment.control()
    with Load(rig) as load:
        kill(rig.deployment.controller_pid())
        load.until_more(5)
        wait_until(
            lambda: int(rig.deployment.control().get("controller_generation", 0)) > int(before["controller_generation"]), "a new controller", timeout_s=60
        )
        rig.deployment.until_serving()
        load.until_more(3)
    load.check()
    assert int(rig.deployment.control()["epoch"]) >= int(before["epoch"])


def test_a_killed_router_is_back_and_clients_retry_by_themselves(rig: Rig) -> None:
    (router,) = rig.deployment.control()["routers"]
    with Load(rig, timeout_s=30.0) as load:
        kill(int(router["pid"]))
        load.until_more(3)
    load.check()
    (again,) = rig.deployment.control()["routers"]
    assert again["pid"] != router["pid"]
    assert again["address"] == router["address"]


def test_without_any_copy_the_error_names_the_rows(rig: Rig) -> None:
    """Both actors that hold one expert are killed at the same time: it fails by name until it is loaded again, never with a wrong answer."""
    with rig.deployment.client() as client:
        table = client.routing_table()
        expert = table.experts[0]
        holders = [place.actor_id for place in expert.replicas]
        pids = [rig.deployment.pid_of(holder) for holder in holders]
        ids = torch.full((4, 1), expert.index, dtype=torch.int32)
        ids[0] = -1
        weights = torch.ones((4, 1))
        for pid in pids:
            kill(pid)
        caught: list[MoeError] = []

        def failed_or_healed() -> bool:
            try:
                client.dispatch(rows(num_tokens=4), model="random", layer=expert.layer, top_k=(ids, weights), timeout_s=0.3)
            except MoeError as error:
                caught.append(error)
                return isinstance(error, ExpertUnavailable)
            return True

        wait_until(failed_or_healed, "an honest answer")
        for error in caught:
            if isinstance(error, ExpertUnavailable):
                assert error.failed_rows == (1, 2, 3)
        rig.deployment.until_serving()
        reply = client.dispatch(rows(num_tokens=4), model="random", layer=expert.layer, top_k=(ids, weights))
        assert reply.report.outcomes["exact"] == 3


def test_a_model_is_added_and_removed_while_another_serves(rig: Rig, tmp_path: Path) -> None:
    original = rig.deployment.spec
    second = ModelSpec(name="second", path=save_custom(tmp_path / "second", dtype=torch.float32), dtype=DType.FP32)
    with Load(rig) as load, rig.deployment.client() as client:
        rig.deployment.apply(original.model_copy(update={"models": (*original.models, second)}))
        twin = Twin.from_folder(second.path, DType.FP32)
        sent = rows().float()
        reply = client.dispatch(sent, model="second", layer=0)
        assert torch.allclose(reply.hidden_states, twin.layer(0, sent).hidden_states, rtol=1e-5, atol=1e-6)
        rig.deployment.apply(original)
        rig.deployment.until_serving()
        wait_until(lambda: {model.name for model in client.status().models} == {"random"}, "the second model is gone")
        load.until_more(3)
    load.check()


def test_one_slot_in_each_actor_serves_too(deploy: Any, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "one-layer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_layers": [0]}))
    spec = spec_of(tmp_path, "single", folder, replicas=1, actors={"count": NUM_EXPERTS, "slots_per_actor": 1, "free_slots": 0, "num_gpus": 0.0})
    with deploy(spec) as deployment, deployment.client() as client:
        assert [len(actor["slots"]) for actor in deployment.actors().values()] == [1] * NUM_EXPERTS
        sent = rows()
        assert torch.equal(client.dispatch(sent, model="random", layer=0).hidden_states, Twin.from_folder(model, DType.BF16).layer(0, sent).hidden_states)
