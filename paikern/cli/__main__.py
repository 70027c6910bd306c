"""`python -m paikern.cli`, where the `paikern` command is not on the path."""

from __future__ import annotations

from paikern.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
