"""`python -m cluster.cli`: the `moelastic` command without an installation."""

from __future__ import annotations

from cluster.cli.app import main

if __name__ == "__main__":
    main()
