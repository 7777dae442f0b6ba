"""The `moelastic` command. Every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.core.errors import MoeError

EXIT_FAILED = 1

app = typer.Typer(
    help="moelastic: an elastic expert cluster for Mixture-of-Experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="The schema of a deployment, and whether a file fits it.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="Checkpoints on disk.", no_args_is_help=True)
trace_app = typer.Typer(help="Traces of requests.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(trace_app, name="trace")
gpu_app = typer.Typer(help="Devices that failed again and again.", no_args_is_help=True)
app.add_typer(gpu_app, name="gpu")

RunDir = Annotated[Path | None, typer.Option("--run-dir", help="folder that remembers what `up` deployed; default: .moelastic/local/default")]
Endpoint = Annotated[str | None, typer.Option("--endpoint", help="HOST:PORT of a router; default: the one in the run folder")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="file with the caller's token; default: the one in the run folder")]
Address = Annotated[str | None, typer.Option("--address", help="Ray's job server (http://HOST:8265); default: RAY_API_SERVER_ADDRESS")]


@app.command()
def up(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the deployment; default with --local: the shipped example")] = None,
    local: Annotated[bool, typer.Option("--local", help="start a local cluster first, unless one runs")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="replace actors whose code or config differs, one at a time")] = False,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=64, help="with --local: nodes beside the head")] = 4,
    gpus: Annotated[int, typer.Option("--gpus", min=0, max=16, help="with --local: logical GPUs of each node")] = 1,
    run_dir: RunDir = None,
    address: Address = None,
    wait_s: Annotated[float, typer.Option("--wait-s", min=1.0, help="how long to wait until it serves")] = 300.0,
) -> None:
    """Deploy, or bring a running deployment to the config; safe to run again."""
    from cluster.cli import up_down

    if local:
        up_down.up_local(config, run_dir=run_dir, nodes=nodes, gpus=gpus, replace=replace, wait_s=wait_s)
    else:
        up_down.up_remote(config, run_dir=run_dir, address=address, replace=replace, wait_s=wait_s)


@app.command()
def down(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the deployment; not needed with --local")] = None,
    local: Annotated[bool, typer.Option("--local", help="end the local cluster with everything on it")] = False,
    now: Annotated[bool, typer.Option("--now", help="with --local: let no request finish first")] = False,
    force: Annotated[bool, typer.Option("--force", help="ask nobody: kill the controller, which may hang, then every actor; requests under way fail")] = False,
    run_dir: RunDir = None,
    address: Address = None,
    wait_s: Annotated[float | None, typer.Option("--wait-s", min=1.0, help="limit for requests and actors to finish; default: 60, with --local 15")] = None,
) -> None:
    """End a deployment, or the local cluster, once what is under way has finished; safe to run again."""
    from cluster.cli import up_down

    if local:
        up_down.down_local(run_dir=run_dir, drain_s=0.0 if now or force else wait_s or up_down.LOCAL_DRAIN_S)
    else:
        up_down.down_remote(config, run_dir=run_dir, address=address, wait_s=wait_s or up_down.REMOTE_DRAIN_S, force=force)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    run_dir: RunDir = None,
    endpoint: Endpoint = None,
    token_file: TokenFile = None,
) -> None:
    """What runs, how well, and how old each fact is; answers within a second or two, whatever is gone."""
    from cluster.cli.endpoints import find_connection
    from cluster.cli.status_facts import gather
    from cluster.cli.status_view import show

    facts = gather(find_connection(run_dir, endpoint=endpoint, token_file=token_file))
    show(facts, as_json=as_json)
    raise typer.Exit(0 if facts.is_serving else EXIT_FAILED)


@app.command()
def doctor(run_dir: RunDir = None) -> None:
    """What is missing or left over on this machine, and how to fix it. Fails when something needs fixing."""
    from cluster.cli.doctor import examine, show

    raise typer.Exit(0 if show(examine(run_dir)) else EXIT_FAILED)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to go on from")],
    model: Annotated[Path | None, typer.Option("--model", help="folder of the model; default: the shipped one")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, max=4096)] = 64,
    run_dir: RunDir = None,
    endpoint: Endpoint = None,
    token_file: TokenFile = None,
) -> None:
    """Generate text with the experts in the cluster and everything else in this process."""
    from cluster.cli.endpoints import find_connection
    from cluster.cli.generate import generate_text

    generate_text(find_connection(run_dir, endpoint=endpoint, token_file=token_file), prompt, model=model, max_new_tokens=max_new_tokens)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure this product beside what one would use instead, on this machine; `moelastic bench -- --help` lists the options."""
    from cluster.cli.bench import run_bench

    raise typer.Exit(run_bench(context.args))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def chaos(context: typer.Context) -> None:
    """Strike a local cluster on purpose, if its spec allows it, and judge by numbers what callers notice: run, validate, list, report."""
    from cluster.cli.chaos import run_chaos

    run_chaos(context.args)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a deployment."""
    from cluster.config import schema_json

    typer.echo(schema_json())


@config_app.command("check")
def config_check(config: Annotated[Path, typer.Argument(help="YAML file of a deployment")]) -> None:
    """Say whether a file can be deployed; each thing that is wrong with its place and its remedy."""
    from cluster.config import load_config

    spec = load_config(config)
    missing = [model.path for model in spec.models if not model.path.exists()]
    typer.echo(f"{config}: ok: {spec.name}, {', '.join(model.name for model in spec.models)}")
    for path in missing:
        typer.echo(f"note: {path} does not exist on this machine; it must exist on the nodes")


@checkpoint_app.command("manifest")
def checkpoint_manifest(
    path: Annotated[Path, typer.Argument(help="folder of the checkpoint")],
    name: Annotated[str | None, typer.Option("--name", help="name of the model; default: the folder's")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="element type to serve in: checkpoint, bf16, fp16 or fp32")] = "checkpoint",
) -> None:
    """Write a manifest beside a checkpoint: the SHA-256 of each expert, checked wherever it is served from then on."""
    from cluster.cli.checkpoint import write_manifest_of

    typer.echo(f"wrote {write_manifest_of(path, name=name or path.resolve().name, dtype=dtype)}")


@checkpoint_app.command("calibrate")
def checkpoint_calibrate(
    path: Annotated[Path, typer.Argument(help="folder of the checkpoint")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text like what the model will see; several may be given")],
    memory_fraction: Annotated[float, typer.Option("--memory-fraction", min=0.01, max=1.0, help="share of the experts' bytes that shadows may take")] = 0.15,
    rows: Annotated[int, typer.Option("--rows", min=256, max=1_000_000, help="tokens to run the model on, over all texts")] = 16_384,
    text_bytes: Annotated[int, typer.Option("--text-bytes", min=1024, help="what is read of each text, from its start")] = 200_000,
    scored_bytes: Annotated[int, typer.Option("--scored-bytes", min=512, help="bytes of text, over all texts, that damage is measured on")] = 24_000,
) -> None:
    """Fit what stands in for lost experts, measure it, and write it beside the checkpoint as moelastic.ladder.safetensors."""
    from cluster.cli.checkpoint import calibrate_folder

    calibrate_folder(path, text, memory_fraction=memory_fraction, rows=rows, text_bytes=text_bytes, scored_bytes=scored_bytes, say=typer.echo)


@gpu_app.command("release")
def gpu_release(
    device: Annotated[str, typer.Argument(help="NODE/DEVICE as `moelastic status` shows it; NODE may be the node's name")],
    run_dir: RunDir = None,
) -> None:
    """Trust a quarantined device again: actors and copies may go there from now on."""
    from cluster.cli.endpoints import find_connection
    from cluster.cli.gpu import release

    left = release(find_connection(run_dir), device)
    typer.echo(f"{device} is trusted again; still quarantined: {', '.join(left) or 'none'}")


@trace_app.command("last")
def trace_last(
    run_dir: RunDir = None,
    trace_dir: Annotated[Path | None, typer.Option("--trace-dir", help="folder of the traces; default: the deployment's")] = None,
) -> None:
    """Show the last request as a waterfall: who did what, for how long."""
    from cluster.cli.endpoints import find_trace_dir
    from cluster.cli.trace import show_last

    show_last(find_trace_dir(run_dir, trace_dir))


def main() -> None:
    """Run the command; an error is a line or two, Ctrl-C is quiet."""
    try:
        app()
    except MoeError as error:
        sys.stderr.write(f"{error.reason}: {error}\n")
        sys.exit(EXIT_FAILED)
