"""What the launcher becomes: a few megabytes that lead the cluster's session, adopt its orphans and reap them.

It starts nothing and stops nothing: killing it leaves the cluster running.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Reap children until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    main()
