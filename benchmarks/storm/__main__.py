"""Storms against a cluster of this machine, each with its verdict: 0 where nothing happened that must not.

python -m benchmarks.storm burst
python -m benchmarks.storm burst --rays-places 32
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.storm import burst, fairness, hostile, kills, soak
from cluster.interrupts import signals_interrupt

STORMS = {"burst": burst, "fairness": fairness, "hostile": hostile, "kills": kills, "soak": soak}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.storm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    storms = parser.add_subparsers(dest="storm", required=True)
    for name, storm in STORMS.items():
        storm.add_arguments(storms.add_parser(name, description=storm.__doc__))
    options = parser.parse_args()
    with signals_interrupt():  # the cluster is stopped then, too
        faults = STORMS[options.storm].run(options)
    for fault in faults:
        print(f"fault: {fault}")
    print(f"{options.storm}: {f'{len(faults)} faults' if faults else 'no fault'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
