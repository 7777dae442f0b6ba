"""What a further copy of an expert costs on a node that has it: private and proportional bytes of the actors before and after every slot is doubled."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from bench.layer import random_rows, save_layer
from bench.processes import ACTOR, Usage, pids_of, usage_of
from bench.settings import LAYER, MODEL, Settings
from bench.tables import Section, Table
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, RouterSpec
from cluster.local.cluster import LocalCluster
from kit.deployments import Deployment, deployed

NUM_EXPERTS, NUM_ACTORS, NUM_CALLS, TOKENS = 16, 2, 30, 256
GOAL_BYTES = 5 << 20


def run(cluster: LocalCluster, settings: Settings, folder: Path) -> Section:
    """In each layout deploy once with one replica and once with two, the same traffic before each look."""
    sections = {layout: _measured(cluster, settings, folder, layout) for layout in ("mapped", "packed")}
    return Section([table for section in sections.values() for table in section.tables], {layout: section.data for layout, section in sections.items()})


def _measured(cluster: LocalCluster, settings: Settings, folder: Path, layout: Literal["mapped", "packed"]) -> Section:
    sizes = replace(settings.sizes, num_experts=NUM_EXPERTS)
    model = ModelSpec(name=MODEL, path=save_layer(folder / f"slots-model-{layout}", sizes, sizes.intermediate_size))
    actors = ActorsSpec(count=NUM_ACTORS, slots_per_actor=NUM_EXPERTS, free_slots=0, num_gpus=1 / NUM_ACTORS, layout=layout)
    spec = ClusterSpec(name="bench-slots", models=(model,), actors=actors, router=RouterSpec(port=0))
    (folder / f"slots-{layout}").mkdir()
    with deployed(cluster, spec, folder / f"slots-{layout}") as deployment:
        before = _look(deployment, settings)
        deployment.apply(spec.model_copy(update={"models": (model.model_copy(update={"replicas": NUM_ACTORS}),)}))
        deployment.until_serving()
        after = _look(deployment, settings)
    return section_of(before, after, sizes.hidden_size * sizes.intermediate_size * 3 * 2, layout)


def _look(deployment: Deployment, settings: Settings) -> list[Usage]:
    with deployment.client() as client:
        for seed in range(NUM_CALLS):
            client.dispatch(random_rows(settings.sizes, TOKENS, seed), model=MODEL, layer=LAYER)
    return [usage_of(pid) for pid in pids_of(deployment, ACTOR)]


def section_of(before: list[Usage], after: list[Usage], expert_bytes: int, layout: str) -> Section:
    """Bytes of one further slot, on average."""
    added = NUM_EXPERTS * (NUM_ACTORS - 1)
    private = (sum(usage.private_bytes for usage in after) - sum(usage.private_bytes for usage in before)) / added
    pss = (sum(usage.pss_bytes for usage in after) - sum(usage.pss_bytes for usage in before)) / added
    wanted = f"at most {GOAL_BYTES >> 20} MiB" if layout == "mapped" else "packed matrices are private"
    rows = [
        ("stored bytes of one expert", f"{expert_bytes / 2**20:.2f} MiB", ""),
        (
            "private bytes of a further slot",
            f"{private / 2**20:.2f} MiB",
            wanted,
        ),
        ("proportional bytes of a further slot", f"{pss / 2**20:.2f} MiB", ""),
        ("private bytes of an actor with all of them", f"{max(usage.private_bytes for usage in after) / 2**20:.0f} MiB", "170 MiB with torch imported"),
    ]
    note = f"{NUM_ACTORS} actors on one node; {added} slots more hold experts that the node has already. From /proc/PID/smaps_rollup, after traffic."
    data = {"private_bytes_per_slot": private, "pss_bytes_per_slot": pss, "before": [asdict(usage) for usage in before], "after": [asdict(u) for u in after]}
    return Section([Table(f"a further copy on the same node, layout {layout}", ("", "measured", "goal or reference"), rows, note)], data)
