"""The GPU's path but for the numbers (test_llm_kernels.py): its calls, its machine code, an engine that runs on it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from services.llm import model
from tests import gpu, tiny_llm
from tests.graph_recorder import Recorder


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_decode_compiles_for_gpus_that_are_not_here(tmp_path: pathlib.Path, capability: int) -> None:
    """Tensor cores, 16-byte copies ahead of their use, shared memory for two programs or more, no register spilled."""
    triton = pytest.importorskip("triton", reason=gpu.NO_TRITON)
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.compile_paged_decode", str(capability), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 8
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel in compiled:
        if kernel["name"] == "_attend_chunks":
            assert kernel["shared"] <= 48 * 1024 and kernel["copies"] > 0 and kernel["products"] > 0, kernel
        run = subprocess.run([tool, "--dump-resource-usage", kernel["cubin"]], capture_output=True, text=True)
        assert "STACK:0 " in run.stdout and "LOCAL:0 " in run.stdout, (kernel, run)


def test_prefill_calls_torchs_flash_attention_as_it_is_declared() -> None:
    """On meta tensors, through the operator that torch registers."""
    from torch.nn.attention.varlen import varlen_attn

    pytest.importorskip("triton", reason=gpu.NO_TRITON)
    from services.llm.kernels.cuda import CudaKernels, segment_starts

    query, key, value = (torch.empty(11, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    out = CudaKernels(varlen_attn).prefill(query[:7], key, value, (4, 3), (8, 3), 0.25)
    assert out.shape == (7, 4, 16) and out.dtype == torch.bfloat16
    starts = segment_starts((3, 1, 4), torch.device("cpu"))
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 3, 4, 8]
    assert segment_starts((3, 1, 4), torch.device("cpu")) is starts, "made once, asked for by every layer"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_engine_on_the_gpus_kernels_gives_the_same_answers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfused layers, flash attention, pages read in place, decode by graphs: all that differs from a CPU's engine."""
    kernels = gpu.kernels()
    if gpu.DEVICE.type == "cuda":
        pytest.skip("compares fp32 engines: a GPU's kernels take bf16 and fp16")
    plain = tiny_llm.engine(family, dtype=torch.float32)
    monkeypatch.setattr(model, "can_pack", lambda *_: False)
    engine = tiny_llm.engine(family, dtype=torch.float32)
    assert not engine.runner.decoder.fused
    recorder = Recorder()
    engine.runner.kernels = kernels
    engine.runner.use_graphs(recorder)
    answers = []
    for target in (plain, engine):
        requests = [
            tiny_llm.request(target, f"r{n}", question=tiny_llm.QUESTIONS[n % 4], images=(40 + n,), image_seed=n,
                             max_tokens=3 + n, threshold=0.8 if n % 2 else None)
            for n in range(3)
        ]  # fmt: skip
        answers.append({name: answer[:2] for name, answer in tiny_llm.run(target, requests).items()})
    assert answers[0] == answers[1]
    assert recorder.replayed > 0
    engine.check_integrity()
