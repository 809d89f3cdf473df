"""What the processes of a start import: each module here takes a tenth of a second to seconds of a slow core."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODEL_CODE = {"torch._dynamo", "sympy", "transformers.modeling_utils"}
DEPLOYER = (
    "import cluster.deploy, cluster.app as app; app.gateway({'network': 'a test'}); app.encoder({}); app.llm({}); "
    "import services.gateway.deployment"
)
STAGES = "import services.encoder.deployment, services.llm.deployment"


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [(DEPLOYER, {*MODEL_CODE, "setuptools"}), (STAGES, {"setuptools"})],
    ids=["deployer and gateway", "stages"],
)
def test_a_process_imports_nothing_heavy_that_it_does_not_use(code: str, unwanted: set[str]) -> None:
    report = f"import sys; print(*sorted({unwanted} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
