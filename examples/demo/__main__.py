"""`python -m examples.demo`, which `make demo` runs."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from cluster.core.errors import MoeError
from examples.demo.run import run_demo
from examples.demo.settings import DemoSettings

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main() -> int:
    """Run the demo; whatever ends it, what it started is stopped first."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description="Serve the shipped model on a local cluster; score and generate text through it."
    )
    parser.add_argument("--out", type=Path, default=None, help="where everything is written; default: runs/TIME")
    parser.add_argument("--nodes", type=int, default=4, help="nodes of one logical GPU, beside the head")
    parser.add_argument("--heldout-bytes", type=int, default=DemoSettings.model_fields["heldout_bytes"].default, help="held-out text of each domain")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    out_dir = options.out or Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        report = run_demo(DemoSettings(out_dir=out_dir.resolve(), num_nodes=options.nodes, heldout_bytes=options.heldout_bytes))
    except MoeError as error:
        sys.stderr.write(f"{error.reason}: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; everything stopped\n")
        return EXIT_INTERRUPTED
    return 0 if report.is_good else EXIT_FAILED


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
