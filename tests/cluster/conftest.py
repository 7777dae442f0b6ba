"""One local cluster for everything that needs Ray and does not break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from cluster.core.spec import ClusterSpec
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import RunFolder
from cluster.local.settings import LocalSettings
from kit.deployments import Deployment, deployed


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A head and two nodes of two logical GPUs; whoever deploys on it takes its deployment down again."""
    cluster = LocalCluster.start(LocalSettings(name="tests", num_nodes=2, gpus_per_node=2), RunFolder(tmp_path_factory.mktemp("shared_cluster")))
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def deploy(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[ClusterSpec], AbstractContextManager[Deployment]]:
    """Deploy on the shared cluster for the length of a `with` block."""

    def make(spec: ClusterSpec) -> AbstractContextManager[Deployment]:
        return deployed(shared_cluster, spec, tmp_path_factory.mktemp(spec.name))

    return make
