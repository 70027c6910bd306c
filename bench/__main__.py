"""`python -m bench` runs the comparison, `python -m bench compare A B` sets two results apart."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        from bench.compare_results import main

        raise SystemExit(main(sys.argv[2:]))
    from bench.run_comparison import main

    raise SystemExit(main(sys.argv[1:]))
