"""`moelastic bench`: runs the benchmark of the source tree in a process of its own; it is no part of the installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from cluster.core.errors import ConfigError
from cluster.local.settings import PROJECT_ROOT


def run_bench(options: Sequence[str]) -> int:
    """Run it with these options; its exit code. Raises ConfigError where the source tree is not there."""
    tests = PROJECT_ROOT / "tests"
    if not (tests / "bench" / "__main__.py").exists():
        message = f"the benchmark lies in the source tree and {tests / 'bench'} does not exist; run it from a checkout: `pip install -e .[dev]`"
        raise ConfigError(message)
    paths = [str(tests), str(PROJECT_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    return subprocess.run([sys.executable, "-m", "bench", *options], env=environment, cwd=PROJECT_ROOT, check=False).returncode  # noqa: S603  (our own)
