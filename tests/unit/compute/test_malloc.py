"""Memory that a pass frees serves the next, in a process with threads: counted in page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

PROGRAM = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from services.compute.malloc import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())

def one_pass():
    arrays = [b"1" * (size << 20) for size in (40, 3, 12)]
    return len(arrays)

def faults(passes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(passes):
        assert pool.submit(one_pass).result() == 3
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / passes

pool = ThreadPoolExecutor(1)
faults(3)
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(faults(30), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024)
"""


def run(how: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_freed_memory_is_kept_and_used_again():
    usual_faults, _ = map(float, run("leave"))
    says, faults, growth_mib = run("keep")
    if platform.libc_ver()[0] == "glibc":
        assert says == "True"
        # One pass writes 55 MiB, 14,080 pages.
        assert usual_faults > 5_000 and float(faults) < 200
    else:
        assert says == "False"
    assert float(growth_mib) < 64
