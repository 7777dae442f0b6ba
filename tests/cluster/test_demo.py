"""The demo's own function, small: a real job, the shipped model, scores and text equal to one process."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from cluster.local.cluster import LocalCluster
from examples.demo.layout import Layout
from examples.demo.run import run_demo
from examples.demo.settings import DemoSettings

pytestmark = pytest.mark.cluster


def test_the_demo_serves_scores_and_generates_as_one_process_does(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    file = io.StringIO()
    """Without the loss of a node, which `test_node_loss` has a cluster of its own for."""
    settings = DemoSettings(
        out_dir=tmp_path / "run", num_nodes=2, gpus_per_node=2, num_actors=2, heldout_bytes=1200, context=64, max_new_tokens=8, loses_node=False
    )
    report = run_demo(settings, cluster=shared_cluster, layout=Layout(Console(file=file, width=200)))
    assert report.is_good, file.getvalue()
    assert set(report.domains) == {"code", "prose", "markup"}
    for result in report.domains.values():
        assert result.bits_per_byte == result.twin_bits_per_byte
        assert sum(result.usage.values()) % (4 * 2) == 0
    assert report.outcomes["exact"] == sum(report.outcomes.values())
    assert set(report.trace_services) == {"client", "router", "expert"}
    written = {path.name for path in settings.out_dir.iterdir()}
    assert {"report.json", "trace.json", "traces", "cluster.yaml", "deploy.log"} <= written
    assert json.loads((settings.out_dir / "report.json").read_text())["model"] == "tiny-moe-lm"
    assert "install " in file.getvalue()
    assert "96 replicas, 32 shadows" in file.getvalue()
    slots = re.findall(r"actor-[01] (\d+)/\d+ slots", file.getvalue())
    assert len(slots) == 2
    assert sum(map(int, slots)) == 96 + 32
    for word in ("Score", "Generate", "Usage", "Trace", "Everything stopped, nothing left behind."):
        assert word in file.getvalue()
