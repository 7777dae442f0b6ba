"""A smoke of the benchmark: tiny experts, one short round; what it says, not how fast it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import abft, failover_cost, leak, overload, shadow_load
from bench.__main__ import take_turns
from bench.document import BEGIN, END, fill_readme, write
from bench.failover_cost import OFF, VARIANTS
from bench.profile import ECHO_AT_ONCE, ECHO_AT_THIS_PACE, PARTS, profile
from bench.report import plot
from bench.rig import running
from bench.settings import ECHO, OURS, SMOKE, WIDE_MODEL
from cluster.local.cluster import LocalCluster

pytestmark = pytest.mark.cluster


def test_bench_reports_every_row_of_every_case_and_where_the_time_of_a_request_goes(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    """One deployment for all of it, since starting one is what takes the time."""
    settings = replace(SMOKE, rows=(OURS,), leak_requests=400, overload_seconds=0.5)
    out = tmp_path / "out"
    with running(settings, tmp_path / "run", shared_cluster) as rig:
        sections = {"peers": take_turns(rig, tmp_path, Console(quiet=True)), "profile": profile(rig), "overload": overload.run(rig), "leak": leak.run(rig)}
    path = write(out, settings, sections)
    plot(out, settings.cases, sections["peers"])
    document = json.loads(path.read_text())
    assert {file.name for file in out.iterdir()} == {"bench.json", "latency.png", "throughput.png"}
    figures = document["peers"]["data"]["figures"]
    wanted = {(case.name, OURS) for case in settings.cases} | {(case.name, ECHO) for case in settings.cases if case.model != WIDE_MODEL}
    assert {(figure["case"], figure["row"]) for figure in figures} == wanted
    assert all(figure["num_calls"] >= 1 and figure["tokens_per_s"] > 0 for figure in figures)
    assert document["peers"]["data"]["largest_difference_from_fp32"].keys() == {OURS}
    parts = document["profile"]["data"]["seconds"]
    assert parts.keys() == {case.name for case in settings.cases if case.callers == 1 and case.model != WIDE_MODEL}
    for found in parts.values():
        assert found.keys() == {*PARTS, "total", ECHO_AT_ONCE, ECHO_AT_THIS_PACE}
        assert all(found[name] > 0 for name in ("client", "gRPC", "gate", "sort", "compute", "combine"))
        assert found["compute"] < found["total"]
    flood = document["overload"]["data"]
    ends = flood["num_answered"] + flood["num_refused"] + flood["num_late"]
    assert flood["num_sent"] == ends > 0
    assert flood["num_failed_otherwise"] == 0
    looks = document["leak"]["data"]["looks"]
    assert looks[-1]["requests"] >= settings.leak_requests
    assert looks[-1]["pending_tokens"] == looks[-1]["frames"] == 0
    assert looks[-1]["heaps"].keys() == looks[-1]["usage"].keys()
    assert all(heap["objects"] > 0 for heap in looks[-1]["heaps"].values())
    check_readme(out, document)


def test_bench_reports_what_readiness_for_failures_costs(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    """Four deployments beside each other, one with a router that judges nobody."""
    sections = {"failover_cost": failover_cost.run(shared_cluster, SMOKE, tmp_path), "abft": abft.run(SMOKE)}
    document = json.loads(write(tmp_path / "out", SMOKE, sections).read_text())
    costs = document["failover_cost"]["data"]["costs"]
    assert {(cost["case"], cost["variant"]) for cost in costs} == {(case.name, variant.name) for case in SMOKE.cost_cases for variant in VARIANTS}
    assert all(cost["num_calls"] >= 1 and cost["tokens_per_s"] > 0 and cost["cpu_s_per_call"] > 0 for cost in costs)
    assert all(cost["ratio"] == 1.0 for cost in costs if cost["variant"] == OFF)
    assert document["abft"]["data"]["caught"].keys() == {"bf16", "fp16", "fp32"}
    assert sum(one["alarms"] for one in document["abft"]["data"]["false_alarms"]) == 0
    check_readme(tmp_path / "out", document)


def test_bench_offers_load_to_shadows_of_every_codec_while_an_actor_stays_lost(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    """The cluster's nodes have two GPUs, and an actor must fill its node so that nobody takes the lost one's place."""
    settings = replace(SMOKE, gpus_per_node=2, overload_seconds=0.5)
    section = shadow_load.run(shared_cluster, settings, tmp_path)
    document = json.loads(write(tmp_path / "out", settings, {"shadow_load": section}).read_text())
    found = {one["codec"]: one for one in document["shadow_load"]["data"]["codecs"]}
    assert found.keys() == {*settings.shadow_codecs}
    for one in found.values():
        assert one["num_sent"] > 0
        assert 0 <= one["num_answered"] <= one["num_sent"]
        assert 0 < one["shadow_share"] < 1
    check_readme(tmp_path / "out", document)


def check_readme(out: Path, document: dict[str, object]) -> None:
    """The page beside the JSON gets every table, and keeps what people wrote."""
    page = out / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill_readme(out)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert all(f"### {name}" in text for name in document)
