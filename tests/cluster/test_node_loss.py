"""A whole node is killed while text is generated: the demo's own function, on a cluster of its own, since what it kills does not come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.cli.status_facts import gather
from cluster.core.errors import FleetError
from cluster.deploy.connection import read_token
from cluster.local import processes
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import RunFolder
from cluster.local.settings import LocalSettings
from examples.demo.models import Models
from examples.demo.node_loss import choose_victim, count_copies, lose_a_node
from examples.demo.settings import DemoSettings
from kit.deployments import deployed
from router_service.client import RouterClient

pytestmark = pytest.mark.cluster
NUM_TOKENS = 48
LIMIT_S = 120.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    made = LocalCluster.start(LocalSettings(name="loss", num_nodes=3), RunFolder(tmp_path / "cluster"))
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.timeout(600)
def test_a_lost_node_costs_no_request_changes_no_token_and_is_replaced(cluster: LocalCluster, tmp_path: Path) -> None:
    settings = DemoSettings(out_dir=tmp_path, num_nodes=3, num_actors=3, gpus_per_actor=0.5, free_slots=24, loss_tokens=NUM_TOKENS, loss_limit_s=LIMIT_S)
    with deployed(cluster, settings.spec(), tmp_path) as deployment:
        connection = deployment.connection
        with RouterClient(connection.router_address, token=read_token(connection.token_path), timeout_s=30.0) as client:
            models = Models.load(settings, client=client)
            models.accept_exact_only()
            before = gather(connection)
            victim = choose_victim(before)
            raylet = next(node.raylet for node in cluster.state.nodes if node.name == victim["name"])
            victims = {actor["pid"] for actor in before.control["actors"] if actor["node_id"] == victim["node_id"]}
            assert processes.is_running(raylet)
            assert victims
            loss = lose_a_node(settings, cluster, connection, models, client)
            assert not processes.is_running(raylet)
            assert not [pid for pid in victims if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
            assert loss.num_killed > len(victims)
            assert loss.is_good, loss
            exact, frugal = loss.exact, loss.frugal
            assert (loss.num_failed, exact.num_tokens, frugal.num_tokens) == (0, NUM_TOKENS, NUM_TOKENS)
            assert exact.is_text_equal
            assert exact.outcomes["exact"] == sum(exact.outcomes.values())
            assert sum(frugal.outcomes.values()) == sum(exact.outcomes.values())
            # How much is degraded is a matter of time: on a busy machine the copies may be there again before the next row is.
            assert frugal.is_text_equal or set(frugal.outcomes) > {"exact"}
            assert (loss.num_copies, loss.num_copies_wanted) == (96, 96)
            assert loss.actors_again_s is not None
            assert count_copies(client, victim["node_id"], {model.name: model.replicas for model in settings.models()}) == 96
        after = gather(connection)
        assert {actor["actor_id"] for actor in after.control["actors"]} == {actor["actor_id"] for actor in before.control["actors"]}
        with pytest.raises(FleetError, match="not a running node"):
            cluster.kill_node(victim["name"])
        with pytest.raises(FleetError, match="head"):
            cluster.kill_node("head")
