"""`python -m cluster.deploy`: what `ray job submit` runs. Ending this process, or its job, does not end what it deployed.

ray job submit --working-dir . -- python -m cluster.deploy --config examples/configs/tiny_moe_lm.yaml
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
from pathlib import Path

from cluster.config import load_config
from cluster.core.errors import MoeError
from cluster.core.spec import ClusterSpec
from cluster.deploy.connection import PRINTED, Connection
from cluster.deploy.progress import Progress

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main() -> int:
    """Parse, deploy or take down, say how it went."""
    options = _parser().parse_args()
    try:
        spec = load_config(options.config)
        with Progress() as progress:
            return _down(spec, progress, options) if options.down else _up(spec, progress, options)
    except MoeError as error:
        sys.stderr.write(f"{error.reason}: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was deployed stays: `moelastic status` shows it, `moelastic down` ends it\n")
        return EXIT_INTERRUPTED


def _up(spec: ClusterSpec, progress: Progress, options: argparse.Namespace) -> int:
    from cluster.deploy import deployment  # imports ray, which a wrong config should not wait for

    def announce(connection: Connection) -> None:
        if options.connection_file is not None:
            connection.write(options.connection_file)

    if warning := clear_text_warning(spec):
        progress.say(warning)
    with deployment.connected(spec.name):
        connection, trouble = deployment.deploy(spec, progress, replace=options.replace, wait_s=options.wait_s, announce=announce)
    announce(connection)
    if options.print_connection:
        progress.say(f"{PRINTED}{connection.model_dump_json()}")
    progress.say(served_line(connection, trouble))
    return 0


def _down(spec: ClusterSpec, progress: Progress, options: argparse.Namespace) -> int:
    from cluster.deploy import deployment

    with deployment.connected(spec.name):
        ran = deployment.end_by_force(spec.name, progress) if options.force else deployment.take_down(spec.name, progress, timeout_s=options.wait_s)
    if options.connection_file is not None:
        options.connection_file.unlink(missing_ok=True)
    progress.say(f"{spec.name}: {'ended' if ran else 'nothing ran'}")
    return 0


def served_line(connection: Connection, trouble: str) -> str:
    """Where it is reached, and what is amiss, if anything is."""
    token = f"   token file {connection.token_path}" if connection.token_path else "   no token needed"
    state = f"DEGRADED ({trouble}), answers" if trouble else "serving"
    return f"{connection.name}: {state} on {connection.router_address}{token}"


def clear_text_warning(spec: ClusterSpec) -> str:
    """One line when callers' tokens and rows would cross a network unencrypted; empty otherwise."""
    if is_loopback(spec.router.host) or spec.router.tls_cert is not None:
        return ""
    return f"warning: router.host {spec.router.host} without router.tls_cert: tokens and rows travel in clear text; set tls_cert and tls_key, or use 127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether a host to listen on is reached from its own machine alone; a name other than localhost is not known to be."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.deploy", description="Deploy on the Ray cluster that RAY_ADDRESS names; run again to reconcile.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the deployment")
    parser.add_argument("--replace", action="store_true", help="replace actors whose code or config differs, one at a time")
    parser.add_argument("--down", action="store_true", help="end the deployment instead")
    parser.add_argument("--force", action="store_true", help="with --down: kill the controller and every actor at once, for when the controller hangs")
    parser.add_argument("--wait-s", type=float, default=300.0, help="how long to wait until it serves (or has ended)")
    parser.add_argument("--connection-file", type=Path, default=None, help="write addresses and token paths here, for the `moelastic` command")
    parser.add_argument("--print-connection", action="store_true", help="print addresses and token paths in a line of JSON, for whoever reads a job's output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
