"""`moelastic status` for people and for machines."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.cli.status_facts import Source, StatusFacts

STYLES = {"SERVING": "green", "ready": "green", "DEGRADED": "yellow", "DRAINING": "yellow"}
NUM_DECISIONS = 5
MAX_EXPERT_ROWS = 64
FRESH_S = 5.0
BAR_WIDTH = 10
BAR_SCALE = 40  # a quarter of a layer's tokens fills the bar
REPLICA = 1


def show(facts: StatusFacts, *, as_json: bool, console: Console | None = None) -> None:
    """Print the status."""
    if as_json:
        sys.stdout.write(json.dumps(dataclasses.asdict(facts) | {"state": facts.state, "epoch": facts.epoch}, indent=2) + "\n")
        return
    (console or Console(highlight=False, soft_wrap=True)).print(view(facts))


def view(facts: StatusFacts) -> RenderableType:
    """Headline, sources that are gone, experts, nodes, last decisions."""
    parts: list[RenderableType] = [_headline(facts)]
    parts += [Text(f"  {kind}: {line}", style="yellow") for kind, line in _troubles(facts)]
    if facts.table:
        parts.append(_experts(facts))
    if facts.control:
        parts += [_nodes(facts.control), *_gpus(facts.control), *_shadows(facts.control), *_quarantined(facts.control), *_decisions(facts.control)]
    elif facts.router:
        parts.append(_links(facts.router))
    return Group(*parts)


def _headline(facts: StatusFacts) -> Text:
    router = facts.router
    served = ", ".join(model["name"] for model in router.get("models", ()) or facts.control.get("models", ())) or facts.name
    line = Text(served, style="bold")
    line.append(f"   {facts.state}", style=STYLES.get(facts.state, "red"))
    line.append(f"   epoch {facts.epoch}")
    if router:
        outcomes = router["outcomes"]
        total = sum(outcomes[name] for name in ("exact", "shadow", "omitted", "generalist", "dense", "dropped"))
        line.append(f"   up {_duration(router['uptime_s'])}   {router['tokens_per_s']:,.0f} tokens/s")
        line.append(f"   p50 {1e3 * router['latency_s_p50']:.1f} ms   p99 {1e3 * router['latency_s_p99']:.1f} ms")
        if total:
            line.append(f"   exact {_percent(outcomes['exact'], total)}   degraded {_percent(total - outcomes['exact'], total)}")
        line.append(f"   failed {router['requests_failed']}/{router['requests_total']}   {facts.router_source.address}{_which_router(facts)}")
    return line


def _which_router(facts: StatusFacts) -> str:
    """Which of several routers behind one address said so; empty where there is only one."""
    siblings = [router for router in facts.control.get("routers", ()) if router["address"] == facts.router_source.address]
    if len(siblings) < 2:  # noqa: PLR2004
        return ""
    name = next((router["router_id"] for router in siblings if router["generation"] == facts.router["router_generation"]), "one")
    return f"   ({name} of the {len(siblings)} routers there)"


def _percent(part: int, total: int) -> str:
    """Never rounded up to 100 % or down to 0 % when it is not."""
    share = 100 * part / total
    return f"{share:.0f} %" if part in {0, total} else f"{min(max(share, 0.01), 99.99):.2f} %"


def _troubles(facts: StatusFacts) -> Iterator[tuple[str, str]]:
    for kind, source, consequence in (
        ("router", facts.router_source, "what follows is the controller's view"),
        ("controller", facts.control_source, "the router keeps serving on the table it has"),
    ):
        if not source.is_answering:
            yield kind, f"{source.address or 'not known'}: {source.problem}; {consequence}"
        elif source.age_s > FRESH_S:
            yield kind, _stale(kind, source)
    if message := facts.control.get("message"):
        yield "goal", message
    for difference in facts.control.get("differences", ()):
        yield "differs", f"{difference}; `moelastic up --replace` replaces it"


def _stale(kind: str, source: Source) -> str:
    return f"its facts are {_duration(source.age_s)} old" if kind == "controller" else f"its table is {_duration(source.age_s)} old"


def _experts(facts: StatusFacts) -> RenderableType:
    table, control = facts.table, facts.control
    names = {node["node_id"]: node["name"] for node in control.get("nodes", ())}
    copies, shares = _slots_of(control, names), _shares(control)
    for place, note in _hot(control).items():
        copies[place].append(note)
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("layer", "expert", "load", "replicas", "shadow", "note"):
        rows.add_column(column, justify="right" if column in {"layer", "expert"} else "left", no_wrap=True)
    experts = sorted(table["experts"], key=lambda entry: (entry["model"], entry["layer"], entry["index"]))
    actors = table["actors"]
    troubled = [entry for entry in experts if not entry["replicas"]]
    shown = (troubled or experts) if len(experts) > MAX_EXPERT_ROWS else experts
    for entry in shown[:MAX_EXPERT_ROWS]:
        place = (entry["model"], entry["layer"], entry["index"])
        rows.add_row(
            str(entry["layer"]),
            str(entry["index"]),
            _bar(shares.get(place)),
            " ".join(_place(actors[position], names) for position in entry["replicas"]) or Text("LOST", style="red"),
            " ".join(_place(actors[position], names) for position in entry["shadows"]) or "-",
            ", ".join(copies.get(place, ())),
        )
    hidden = len(experts) - min(len(shown), MAX_EXPERT_ROWS)
    return Group(rows, Text(f"... and {hidden} more experts, each with a replica; --json lists all", style="dim")) if hidden else rows


def _shares(control: dict[str, Any]) -> dict[tuple[str, int, int], float]:
    """Each expert's share of its layer's tokens, of late."""
    totals: dict[tuple[str, int], float] = defaultdict(float)
    for rate in control.get("rates", ()):
        totals[rate["model"], rate["layer"]] += rate["tokens_per_s"]
    return {
        (rate["model"], rate["layer"], rate["index"]): rate["tokens_per_s"] / totals[rate["model"], rate["layer"]]
        for rate in control.get("rates", ())
        if totals[rate["model"], rate["layer"]] > 0
    }


def _bar(share: float | None) -> str:
    return "-" if share is None else f"{'#' * min(BAR_WIDTH, round(BAR_SCALE * share)):<{BAR_WIDTH}} {100 * share:3.0f}%"


def _place(actor: dict[str, Any], names: dict[str, str]) -> str:
    return f"{names.get(actor['node_id'], actor['node_id'][:8])}/{actor['actor_id']}"


def _slots_of(control: dict[str, Any], names: dict[str, str]) -> dict[tuple[str, int, int], list[str]]:
    """Copies that are on their way: loading or draining somewhere."""
    notes: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for actor in control.get("actors", ()):
        for slot in actor["slots"]:
            if slot["state"] != "ready":
                role = "" if slot["role"] in {REPLICA, "ROLE_REPLICA"} else "shadow "
                notes[slot["model"], slot["layer"], slot["index"]].append(f"{role}{slot['state']} on {_place(actor, names)}")
    return notes


def _hot(control: dict[str, Any]) -> dict[tuple[str, int, int], str]:
    """Experts that have, or should have, further replicas, with the reason."""
    notes: dict[tuple[str, int, int], str] = {}
    for entry in control.get("hot", ()):
        place = entry["model"], entry["layer"], entry["index"]
        notes[place] = f"{entry['reason']}; replicated" if entry["actor_id"] else f"{entry['reason']}; no free slot"
    return notes


def _shadows(control: dict[str, Any]) -> Iterator[Text]:
    """What shadows take, packed by model and expanded by all actors, each beside its limit."""
    for entry in control.get("shadows", ()):
        whole = entry["experts_bytes"] or 1
        packed, limit = (f"{_mebibytes(entry[key])} ({100 * entry[key] / whole:.1f} %)" for key in ("packed_bytes", "packed_max_bytes"))
        yield Text(f"  shadows of {entry['model']}: {packed} packed, at most {limit} of the experts' {_mebibytes(whole)}")
    actors = control["actors"] if control.get("shadows") else ()
    if limit_bytes := sum(actor["expanded_max_bytes"] for actor in actors):
        line = f"  shadows expanded: {_mebibytes(sum(actor['expanded_bytes'] for actor in actors))}, at most {_mebibytes(limit_bytes)}"
        if num_unexpanded := sum(actor["num_unexpanded"] for actor in actors):
            line += f"; {num_unexpanded} times there was no room for one (shadow.expanded_max), and its rows waited for its unpacking"
        yield Text(line)


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"


def _quarantined(control: dict[str, Any]) -> Iterator[Text]:
    names = {node["node_id"]: node["name"] for node in control.get("nodes", ())}
    for entry in control.get("quarantined", ()):
        node_id, _, device = entry["device"].partition("/")
        place = f"{names.get(node_id, node_id[:12])}/{device}"
        yield Text(f"  quarantined: {place}: {entry['reason']}; `moelastic gpu release {place}` ends that", style="red")


def _nodes(control: dict[str, Any]) -> Table:
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("node", "state", "GPUs", "slots", "memory", "actors"):
        rows.add_column(column, no_wrap=column != "actors")
    by_node: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for actor in control["actors"]:
        by_node[actor["node_id"]].append(actor)
    for node in sorted(control["nodes"], key=lambda entry: str(entry["name"])):
        actors = by_node[node["node_id"]]
        state = Text("alive") if node["alive"] else Text(f"DEAD since {_duration(node['since_s'])}" if node["since_s"] else "DEAD", style="red")
        used, num_slots = sum(len(actor["slots"]) for actor in actors), sum(actor["num_slots"] for actor in actors)
        memory = _mebibytes(sum(actor["used_bytes"] for actor in actors))
        rows.add_row(node["name"], state, _gpu_count(node), f"{used}/{num_slots}", memory, _actors(actors))
    return rows


def _gpu_count(node: dict[str, Any]) -> str:
    """Ray's GPUs, logical or real, and the names of the real ones."""
    kinds = Counter(gpu["name"] for gpu in node.get("gpus", ()) if gpu["name"])
    return " ".join([f"{node['num_gpus']:g}", *(f"({count} x {name})" for name, count in sorted(kinds.items()))])


def gpu_troubles(control: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Real GPUs that cannot be read, whose driver told of an error, or that are quarantined: which, what of them, and whether they are out of service."""
    for node in control.get("nodes", ()):
        for gpu in node.get("gpus", ()) if node["alive"] else ():
            error = f"its driver reported Xid {gpu['last_xid']} at {_moment(gpu['last_xid_unix_s'])}" if gpu["last_xid"] else ""
            said = [gpu["problem"] and f"its driver cannot read it: {gpu['problem']}", error, gpu["quarantine"] and f"quarantined: {gpu['quarantine']}"]
            if any(said):
                yield f"{node['name']}/{gpu['device'] or gpu['index']}", "; ".join(filter(None, said)), bool(gpu["problem"] or gpu["quarantine"])


def _gpus(control: dict[str, Any]) -> Iterator[Text]:
    for place, said, is_out in gpu_troubles(control):
        yield Text(f"  GPU {place}: {said}", style="red" if is_out else "yellow")


def _moment(unix_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_s))


def _actors(actors: list[dict[str, Any]]) -> Text:
    line = Text()
    for actor in sorted(actors, key=lambda entry: str(entry["actor_id"])):
        line.append(f"{actor['actor_id']}/g{actor['generation']} ")
        line.append(actor["state"], style=STYLES.get(actor["state"], "yellow"))
        if doubt := actor.get("doubt"):
            line.append(f" {doubt}", style="yellow" if doubt.startswith(("suspected", "trusted")) else "red")
        line.append(f" {actor['reason']}  " if actor["reason"] else "  ")
    return line


def _links(router: dict[str, Any]) -> Table:
    """The router's own view of the actors, for when there is no controller to ask."""
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("actor", "link", "last heard", "queued tokens"):
        rows.add_column(column)
    for link in router["links"]:
        state = Text(link["state"], style=STYLES.get(link["state"], "yellow"))
        rows.add_row(f"{link['actor_id']}/g{link['generation']} {link['address']}", state, f"{link['last_heard_age_s']:.1f} s ago", str(link["queued_tokens"]))
    return rows


def _decisions(control: dict[str, Any]) -> Iterator[Text]:
    latest = sorted(control["decisions"], key=lambda entry: int(entry["sequence"]))[-NUM_DECISIONS:]
    for position, entry in enumerate(latest):
        moment = _moment(entry["unix_time_s"])
        title = "last decisions  " if position == 0 else " " * len("last decisions  ")
        yield Text(f"{title}{moment} {entry['action']} {entry['target']}: {entry['reason']} (epoch {entry['epoch']})")


def _duration(seconds: float) -> str:
    """A duration in its largest fitting unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
