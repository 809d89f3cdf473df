"""The CPU's operators and an engine on them, as on processors that have less than this one.

`make processors` runs every test on them.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys

import pytest
import torch

from services.compute import native, processor
from tests.processor import HAS_COMPILER
from tests.processors import PROCESSORS, ROOT

WITHOUT_BF16 = {"auto": "float32", "brgemm in bf16": False}
EXPECTED = {
    "x86-64-v3": {"kernels": True, "panels": ["torch.float32"], "oneDNN": ["torch.float32"], **WITHOUT_BF16},
    "icelake-server": {"kernels": True, "panels": ["torch.float32"], **WITHOUT_BF16},
    "native, oneDNN without bf16": {"kernels": True, **WITHOUT_BF16},
    "no compiler": {"kernels": False, "panels": []},
}


def branches(march: str) -> set[str]:
    """The macros of a processor that our sources ask for."""
    asked = set(re.findall(r"__A\w+__", "".join(path.read_text() for path in (*native.SOURCES, *native.HEADERS))))
    command = [*native._compiler(), f"-march={march}", "-dM", "-E", "-x", "c++", "/dev/null"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return asked & set(re.findall(r"#define (\w+)", listed))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kinds are of x86-64")
@pytest.mark.parametrize("name", EXPECTED)
def test_operators_and_an_engine_compute_on(name: str) -> None:
    kind = PROCESSORS[name]
    if kind.compiled and not HAS_COMPILER:
        pytest.skip("this machine has no C++ compiler")
    environment = kind.environment()
    if kind.march and branches(kind.march) == branches("native"):
        del environment["FOCUSLLAVA_MARCH"]  # this processor's own build has the same branches of the code
    elif kind.march:
        kind.build()
    if not kind.can_run():
        pytest.skip("compiled, and this processor cannot run it")
    command = [sys.executable, "-m", "tests.check_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    has = json.loads(done.stdout)
    assert {key: has[key] for key in EXPECTED[name]} == EXPECTED[name]
    assert ("no native CPU kernels" in done.stderr) == (not kind.compiled)


def test_what_does_not_compute_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    exact = torch.ones(2, dtype=torch.float64)

    def fails() -> torch.Tensor:
        raise RuntimeError("could not generate a kernel")

    assert processor._computes("right", lambda: torch.ones(2), exact) and not caplog.records
    assert not processor._computes("the product", fails, exact)
    assert not processor._computes("the sum", lambda: torch.tensor([1.0, 1.1]), exact)
    assert not processor._computes("the quotient", lambda: torch.tensor([1.0, float("nan")]), exact)
    for record, named in zip(caplog.records, ("kernel", "the sum.*wrong", "the quotient.*nan"), strict=True):
        assert re.search(named, record.getMessage())
