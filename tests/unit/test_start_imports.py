"""What the processes of a start import: each module here takes a tenth of a second to seconds of a slow core."""

from __future__ import annotations

import subprocess
import sys

MODEL_CODE = {"torch._dynamo", "sympy", "transformers.modeling_utils"}
DEPLOYER = (
    "import cluster.deploy, cluster.app as app; app.gateway({'network': 'a test'}); app.encoder({}); app.llm({}); "
    "import services.gateway.deployment"
)
STAGES = "import services.encoder.deployment, services.llm.deployment"
TRAINING = "import training.launch"


def report(unwanted: set[str]) -> str:
    return f"print(*sorted({unwanted} & sys.modules.keys()))"


def test_a_process_imports_nothing_heavy_that_it_does_not_use() -> None:
    """First the deployer, the gateway and training's command; then, in the same process, the stages."""
    heavy = {*MODEL_CODE, "setuptools"}
    code = f"import sys; {DEPLOYER}; {report(heavy)}; {TRAINING}; {report(heavy)}; {STAGES}; {report({'setuptools'})}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", "", "", ""], "imported by the deployer or gateway, training, the stages"
