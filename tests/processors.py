"""The kinds of processor that this one can stand for, and every test under each of them.

    make processors                                   # all tests, once a kind
    python -m tests.processors --only x86-64-v3 tests/unit/compute/test_linear.py

A kind is a name that compilers know, the kernels built for it, and oneDNN and torch held to its instructions. What this
processor cannot run is compiled alone.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).parents[1]
V3 = {"avx2", "fma", "bmi2", "f16c"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
ICE_LAKE = V4 | {"avx512_vnni", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq", "avx512ifma", "gfni", "vaes"}


@dataclass(frozen=True, kw_only=True)
class Processor:
    march: str = ""
    """What the kernels are built for; empty: this machine's processor."""
    flags: frozenset[str] = frozenset()
    """Flags of /proc/cpuinfo without which this kind cannot be stood for."""
    variables: dict[str, str] = field(default_factory=dict)
    compiled: bool = True

    def environment(self) -> dict[str, str]:
        march = {"FOCUSLLAVA_MARCH": self.march} if self.march else {}
        return {**os.environ, **march, **self.variables}

    def can_run(self) -> bool:
        return self.flags <= set(pathlib.Path("/proc/cpuinfo").read_text().split())

    def build(self) -> float:
        """Builds the kernels, once; seconds. Raises CalledProcessError with the compiler's words."""
        started = time.monotonic()
        command = [sys.executable, "-m", "services.compute.native"]
        subprocess.run(command, env=self.environment(), cwd=ROOT, check=True, capture_output=True, text=True)
        return time.monotonic() - started


def _limits(onednn: str, aten: str) -> dict[str, str]:
    return {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten}


PROCESSORS = {
    "x86-64-v3": Processor(march="x86-64-v3", flags=frozenset(V3), variables=_limits("AVX2", "avx2")),
    "x86-64-v4": Processor(march="x86-64-v4", flags=frozenset(V4), variables=_limits("AVX512_CORE", "avx512")),
    "icelake-server": Processor(
        march="icelake-server", flags=frozenset(ICE_LAKE), variables=_limits("AVX512_CORE_VNNI", "avx512")
    ),
    "sapphirerapids": Processor(
        march="sapphirerapids", flags=frozenset(ICE_LAKE | {"avx512_bf16", "amx_bf16", "amx_tile", "amx_int8"})
    ),
    "native": Processor(),
    "native, oneDNN without bf16": Processor(variables={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
    "no compiler": Processor(variables={"CXX": "/no/compiler"}, compiled=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PROCESSORS, action="append", help="a kind; all by default")
    options, pytest_arguments = parser.parse_known_args()
    failed = False
    for name in options.only or PROCESSORS:
        processor = PROCESSORS[name]
        try:
            built = f"built in {processor.build():.0f} s" if processor.compiled else "not built"
        except subprocess.CalledProcessError as error:
            failed = True
            print(f"{name}: cannot be built: {error.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        if not processor.can_run():
            print(f"{name}: {built}; this processor cannot run it", flush=True)
            continue
        command = [sys.executable, "-m", "pytest", "-q", *pytest_arguments]
        done = subprocess.run(command, env=processor.environment(), cwd=ROOT, capture_output=True, text=True)
        failed |= done.returncode != 0
        lines = done.stdout.strip().splitlines()
        for line in lines:
            if line.startswith(("FAILED", "ERROR")):
                print(line)
        print(f"{name}: {built}; {lines[-1] if lines else done.stderr.strip()}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
