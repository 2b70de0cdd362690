"""The short benchmarks, one after the other; figures go to bench/results/latest.json.

make bench
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench import turns

SHORT = (
    ("training_step", "--size", "small", "quarter"),
    ("sampling",),
    ("first_step",),
    ("sync", "--workers", "1", "2", "4", "8"),
    ("startup",),
    ("preparing", "--size", "small"),
    ("registry_speed", "transfers"),
)


def main() -> int:
    """1 if one of them failed."""
    argparse.ArgumentParser(prog="make bench", description=__doc__).parse_args()
    failed = []
    for module, *words in SHORT:
        print(f"\n{module}", flush=True)
        command = [sys.executable, "-m", f"bench.{module}", *words]
        if subprocess.run(command, cwd=turns.ROOT).returncode:
            failed.append(module)
    print(f"\nwritten to {turns.RESULTS / 'latest.json'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
