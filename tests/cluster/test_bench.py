"""A smoke of the benchmark: tiny experts, one short round; what it says, not how fast it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench.__main__ import measure
from bench.profile import PARTS, profile
from bench.rig import running
from bench.settings import SMOKE
from cluster.local.cluster import LocalCluster

pytestmark = pytest.mark.cluster


def test_bench_reports_every_row_of_every_case_and_where_the_time_of_a_request_goes(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    """One deployment for both, since starting one is what takes the time."""
    with running(replace(SMOKE, rows=("moelastic",)), tmp_path / "run", shared_cluster) as rig:
        path = measure(rig, tmp_path, tmp_path / "out", Console(quiet=True))
        parts = profile(rig, Console(quiet=True))
    document = json.loads(path.read_text())
    measured = {(figure["case"], figure["row"]) for figure in document["figures"]}
    assert measured == {*((case.name, "moelastic") for case in SMOKE.cases), ("1 x 1, idle experts", "grpc_echo")}
    assert all(figure["num_calls"] >= 1 and figure["tokens_per_s"] > 0 for figure in document["figures"])
    assert document["largest_difference_from_fp32"].keys() == {"moelastic"}
    assert {file.name for file in path.parent.iterdir()} == {"bench.json", "latency.png", "throughput.png"}
    assert parts.keys() == {case.name for case in SMOKE.cases if case.callers == 1}
    for found in parts.values():
        assert found.keys() == {*PARTS, "total"}
        assert all(found[name] > 0 for name in ("client", "gRPC", "gate", "sort", "compute", "combine"))
        assert found["compute"] < found["total"]
