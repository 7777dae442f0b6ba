"""How the demo looks on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.demo.settings import DemoReport, DemoSettings, DomainResult, LossText, NodeLoss

SHADES = " ░▒▓█"
NAME_WIDTH = 9
STEP_WIDTH = 24
SAMPLE_WIDTH = 110
BEFORE_WIDTH = 40
LOSS_WIDTH = 21


class Layout:
    """Prints the demo's lines."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner on a terminal; nothing elsewhere."""
        with self._console.status(text):
            yield

    def title(self, settings: DemoSettings) -> None:
        """What is about to happen."""
        nodes = f"1 head + {settings.num_nodes} nodes x {settings.gpus_per_node} logical GPU{'s' if settings.gpus_per_node > 1 else ''}"
        self._console.print(Text(f"moelastic demo: {nodes}, model {describe(settings.model)}", style="bold"))

    def step(self, name: str, text: str, seconds: float) -> None:
        """One step of the start."""
        self._console.print(f"  {name:<{STEP_WIDTH}}{text:<64} {seconds:6.1f} s", markup=False)

    def install(self, seconds: float | None) -> None:
        """Whether the environment was made for this run."""
        if seconds is None:
            self._console.print(f"  {'install':<{STEP_WIDTH}}cached", markup=False)
        else:
            self.step("install", "new environment", seconds)

    def tree(self, control: dict[str, Any]) -> None:
        """The cluster: each node with what it hosts."""
        for number, line in enumerate(tree_lines(control)):
            self._console.print(f"  {'cluster' if number == 0 else '':<{STEP_WIDTH}}{line}", markup=False)

    def line(self, name: str, text: str) -> None:
        """One result; further lines of it are indented below."""
        for number, part in enumerate(text.splitlines()):
            self._console.print(Text(f"{name if number == 0 else '':<{NAME_WIDTH}}", style="bold") + Text(part))

    def report(self, report: DemoReport) -> None:
        """Scores, samples, usage, speed."""
        self.line("Score", score_lines(report))
        for domain, result in report.domains.items():
            same = "" if result.is_completion_equal else "   DIFFERS from the same model in one process"
            shown = _quoted(result.completion)[:SAMPLE_WIDTH]
            self.line("Generate", f"{domain:<7} {json.dumps(result.prompt[-36:], ensure_ascii=False)} -> {shown}{same}")
        self.line("Speed", f"{report.scored_tokens_per_s:,.0f} tokens/s scored, {report.generated_tokens_per_s:.1f} tokens/s generated, all through the router")
        self._console.print(
            Text(f"{'Usage':<{NAME_WIDTH}}", style="bold") + Text("share of the choices (%) of each expert, by layer and domain of the scored text")
        )
        self._console.print(usage_table(report.domains))

    def node_loss(self, report: DemoReport, settings: DemoSettings) -> None:
        """What the loss of a node did to the text, and how long it took to mend."""
        if report.node_loss is not None:
            self.line("GPU loss", node_loss_lines(report.node_loss, settings))

    def written(self, report: DemoReport, settings: DemoSettings) -> None:
        """The trace, and where everything lies."""
        spans = f"one forward pass: {report.num_spans} spans on {report.num_traced_nodes} nodes"
        self.line("Trace", f"{spans}, {settings.out_dir / 'trace.json'} (open in Perfetto)\nmoelastic trace last --trace-dir {settings.trace_dir}")
        self.line("Written", f"{settings.out_dir}: report.json, trace.json, traces/, cluster.yaml, deploy.log")


def score_lines(report: DemoReport) -> str:
    """Bits per byte by domain, and whether one process says the same."""
    tokens = sum(result.num_tokens for result in report.domains.values())

    def row(attribute: str) -> str:
        return "   ".join(f"{domain} {getattr(result, attribute):.4f}" for domain, result in report.domains.items())

    equal = all(result.bits_per_byte == result.twin_bits_per_byte for result in report.domains.values())
    furthest = max(abs(result.bits_per_byte - result.eager_bits_per_byte) for result in report.domains.values())
    outcomes = ", ".join(f"{name} {count:,}" for name, count in report.outcomes.items() if count)
    return (
        f"held-out text, {tokens:,} tokens through the router   {row('bits_per_byte')}   bits/byte\n"
        f"{'':<42}in process   {row('twin_bits_per_byte')}   {'equal' if equal else 'DIFFERENT'}\n"
        f"{'':<36}transformers eager   furthest from it {furthest:.1e}   choices: {outcomes}"
    )


def tree_lines(control: dict[str, Any]) -> list[str]:
    """One line for each node: its actors with slots used and there are, and the routers."""
    lines = []
    for node in sorted(control.get("nodes", ()), key=lambda entry: str(entry["name"])):
        routers = [f"{router['router_id']} {router['address']}" for router in control["routers"] if router["node_id"] == node["node_id"]]
        actors = sorted((actor for actor in control["actors"] if actor["node_id"] == node["node_id"]), key=lambda entry: str(entry["actor_id"]))
        hosted = [f"{actor['actor_id']} {len(actor['slots'])}/{actor['num_slots']} slots" for actor in actors]
        lines.append(f"{node['name']:<8} {node['num_gpus']:g} GPU   {'   '.join([*routers, *hosted]) or '-'}")
    return lines


def node_loss_lines(loss: NodeLoss, settings: DemoSettings) -> str:
    """Measured figures only."""
    exact, frugal = loss.exact, loss.frugal
    ends = f"at tokens {exact.killed_at_token} and {frugal.killed_at_token} of {settings.loss_tokens}"
    again = f"all {loss.num_copies_wanted} replicas again" if loss.copies_again_s is not None else f"{loss.num_copies} of {loss.num_copies_wanted} replicas"
    return "\n".join(
        (
            f"{loss.node} killed ({loss.num_killed} processes) while two texts were generated, {ends}; failed requests {loss.num_failed}",
            _loss_row(f"exact, {settings.replicas} replicas", _felt(exact)),
            _loss_row("", f"text {_closeness(exact)}"),
            _loss_row("", _said(exact)),
            _loss_row("any copy, 1 replica", _felt(frugal)),
            _loss_row("and shadows", _degraded(frugal, settings)),
            _loss_row("", f"text {_closeness(frugal)}"),
            _loss_row("", _said(frugal)),
            _loss_row("repair", f"{again} {_after(loss.copies_again_s, settings)}   lost actors replaced {_after(loss.actors_again_s, settings)}"),
        )
    )


def _loss_row(name: str, text: str) -> str:
    return f"{name:<{LOSS_WIDTH}}{text}"


def _felt(text: LossText) -> str:
    """What a caller notices without looking at the text: a pause, and who answered."""
    outcomes = ", ".join(f"{name} {count:,}" for name, count in text.outcomes.items())
    return f"longest stall {1e3 * text.longest_stall_s:.0f} ms (usual gap {1e3 * text.usual_gap_s:.0f} ms)   choices: {outcomes}"


def _degraded(text: LossText, settings: DemoSettings) -> str:
    """From the first answer that was not exact to the last, as its tokens show it."""
    if text.first_degraded_s is None:
        return "no answer after the kill was degraded"
    first = f"first degraded answer {1e3 * text.first_degraded_s:.0f} ms after"
    return f"{first}   {text.num_degraded_tokens} tokens with one   exact again {_after(text.exact_again_s, settings)}"


def _closeness(text: LossText) -> str:
    if text.is_text_equal:
        return f"equal to one process, all {text.num_tokens} tokens"
    return f"DIFFERS from one process after {text.num_same_tokens} tokens {text.error}".rstrip()


def _said(text: LossText) -> str:
    """The text where the node died."""
    return f"{_quoted(text.text_before)[-BEFORE_WIDTH:]} | {_quoted(text.text_after)[:SAMPLE_WIDTH]}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _after(seconds: float | None, settings: DemoSettings) -> str:
    return f"{seconds:.1f} s after" if seconds is not None else f"NOT within {settings.loss_limit_s:.0f} s"


def usage_table(domains: dict[str, DomainResult]) -> Table:
    """A heat map: one row for each layer and domain, one column for each expert."""
    layers = sorted({int(key.partition("/")[0]) for result in domains.values() for key in result.usage})
    experts = sorted({int(key.partition("/")[2]) for result in domains.values() for key in result.usage})
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layer", "domain", *(str(expert) for expert in experts)):
        table.add_column(column, justify="left" if column == "domain" else "right", no_wrap=True)
    for layer in layers:
        for domain, result in domains.items():
            counts = [result.usage.get(f"{layer}/{expert}", 0) for expert in experts]
            total = max(1, sum(counts))
            table.add_row(str(layer), domain, *(_cell(count / total, len(experts)) for count in counts))
    return table


def _cell(share: float, num_experts: int) -> str:
    """A shade beside the number: full where an expert has twice the even share."""
    level = min(len(SHADES) - 1, int(share * num_experts / 2 * (len(SHADES) - 1) + 0.5))
    return f"{SHADES[level]}{100 * share:3.0f}"


def describe(model: Path) -> str:
    """Name, shape and size of a checkpoint, from its own files."""
    config = json.loads((model / "config.json").read_text())
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    count = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for dim in entry["shape"]:
                size *= dim
            count += size
    name = model.parent.name.replace("_", "-")
    num_experts = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
    shape = f"{config['num_hidden_layers']} layers x {num_experts} experts, top-{config['num_experts_per_tok']}"
    return f"{name} ({shape}, {count / 1e6:.1f} M parameters)"
