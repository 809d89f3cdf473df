"""The GPU's path but for the numbers (test_kernels.py): its calls, its machine code, an engine that runs on it."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from services.common.types import TokenEvent, TokenLogprob
from services.compute import linear
from services.compute.merged_linear import MergedLinear
from services.llm import model
from services.llm.kernels.reference_attention import ReferenceKernels
from services.sampler.text_guided import apply_rotary
from tests import gpu, tiny_llm
from tests.fakes.graph_recorder import Recorder

ON_GPU = pytest.mark.skipif(gpu.DEVICE.type != "cuda", reason="needs a GPU")


ELSEWHERE = pytest.mark.compile_gpus


@pytest.mark.parametrize("capability", [80, *(pytest.param(other, marks=ELSEWHERE) for other in (89, 90))])
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: pathlib.Path, capability: int) -> None:
    """Attention: tensor cores, 16-byte copies ahead of their use, shared memory for two programs or more. All: no
    register spilled."""
    triton = pytest.importorskip("triton", reason=gpu.NO_TRITON)
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.compile_kernels", str(capability), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 24
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel in compiled:
        if kernel["name"] == "_attend_chunks":
            assert kernel["shared"] <= 48 * 1024 and kernel["copies"] > 0 and kernel["products"] > 0, kernel
        run = subprocess.run([tool, "--dump-resource-usage", kernel["cubin"]], capture_output=True, text=True)
        assert "STACK:0 " in run.stdout and "LOCAL:0 " in run.stdout, (kernel, run)


def test_prefill_calls_torchs_flash_attention_as_it_is_declared() -> None:
    """Calls it on meta tensors, through the operator that torch registers."""
    from torch.nn.attention.varlen import varlen_attn

    pytest.importorskip("triton", reason=gpu.NO_TRITON)
    from services.llm.kernels.cuda_attention import CudaKernels, segment_starts

    query, key, value = (torch.empty(11, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    out = CudaKernels(varlen_attn).prefill(query[:7], key, value, (4, 3), (8, 3), 0.25)
    assert out.shape == (7, 4, 16) and out.dtype == torch.bfloat16
    starts = segment_starts((3, 1, 4), torch.device("cpu"))
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 3, 4, 8]
    assert segment_starts((3, 1, 4), torch.device("cpu")) is starts, "made once, asked for by every layer"


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("heads, width", [(4, 8), (9, 12), (16, 64)])
def test_rotary_embedding_in_place(tokens: int, heads: int, width: int) -> None:
    elementwise = gpu.elementwise()
    x = torch.randn(tokens, 2 * heads, width, dtype=gpu.DTYPE, device=gpu.DEVICE)
    cos, sin = torch.randn(2, tokens, width, dtype=gpu.DTYPE, device=gpu.DEVICE).unbind()
    expected, rest = apply_rotary(x[:, ::2].double(), cos.double(), sin.double()), x[:, 1::2].clone()
    elementwise.rotate_(x[:, ::2], cos, sin)
    torch.testing.assert_close(x[:, ::2].double(), expected, **gpu.TOLERANCE)
    assert torch.equal(x[:, 1::2], rest), "the heads between are another's"


@pytest.mark.parametrize("tokens, width", [(0, 8), (1, 8), (3, 1100)])
def test_gate_in_place(tokens: int, width: int) -> None:
    """Gate and up are the two halves of one product."""
    whole = torch.randn(tokens, 2 * width, dtype=gpu.DTYPE, device=gpu.DEVICE).mul_(4)
    gate, up = whole.split(width, dim=1)
    expected, rest = torch.nn.functional.silu(gate.double()) * up.double(), up.clone()
    gpu.elementwise().silu_mul_(gate, up)
    torch.testing.assert_close(gate.double(), expected, **gpu.TOLERANCE)
    assert torch.equal(up, rest)


@pytest.mark.parametrize("tokens, width", [(0, 8), (3, 24), (2, 64)])
def test_norm(tokens: int, width: int) -> None:
    hidden = torch.randn(tokens, width, dtype=gpu.DTYPE, device=gpu.DEVICE)
    weight = torch.randn(width).to(gpu.DEVICE, gpu.DTYPE)
    exact = torch.nn.functional.rms_norm(hidden.double(), (width,), weight.double(), 1e-5)
    torch.testing.assert_close(gpu.elementwise().rms_norm(hidden, weight, 1e-5).double(), exact, **gpu.TOLERANCE)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("groups, width", [(1, 16), (3, 8), (8, 12)])
def test_keys_and_values_go_into_their_slots(tokens: int, groups: int, width: int) -> None:
    kernels = gpu.kernels()
    both = torch.randn(tokens, 2 * groups, width, dtype=gpu.DTYPE, device=gpu.DEVICE)
    key, value = both.split(groups, dim=1)
    pools = [torch.randn(4, 3, groups, width, dtype=gpu.DTYPE, device=gpu.DEVICE) for _ in range(2)]
    expected = [pool.clone() for pool in pools]
    slots = torch.randperm(12)[:tokens].to(gpu.DEVICE)
    kernels.store(key, value, *pools, slots)
    ReferenceKernels().store(key, value, *expected, slots)
    assert all(torch.equal(pool, other) for pool, other in zip(pools, expected, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_merged_layers_are_one_product(bias: bool) -> None:
    layers = [torch.nn.Linear(16, outputs, bias=bias) for outputs in (12, 4, 8)]
    x = torch.randn(5, 16)
    apart = [layer(x) for layer in layers]
    weights = [layer.weight.clone() for layer in layers]
    merged = MergedLinear(*layers)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1, "no weight is there twice"
    for first in range(3):
        outputs = merged(x, first)
        assert len({output.untyped_storage().data_ptr() for output in outputs}) == 1
        for output, other in zip(outputs, apart[first:], strict=True):
            torch.testing.assert_close(output, other)


def test_layers_that_cannot_be_one_product_are_merged_all_the_same() -> None:
    layers = [torch.nn.Linear(16, 8, bias=bias) for bias in (True, False)]
    x = torch.randn(5, 16)
    assert all(torch.equal(one, layer(x)) for one, layer in zip(MergedLinear(*layers)(x), layers, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_engine_on_the_gpus_kernels_gives_the_same_answers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers of torch, flash attention, pages read in place, decode by graphs: all that differs from a CPU's
    engine."""
    kernels, elementwise = gpu.kernels(), gpu.elementwise()
    if gpu.DEVICE.type == "cuda":
        pytest.skip("compares fp32 engines: a GPU's kernels take bf16 and fp16")
    plain = tiny_llm.engine(family, dtype=torch.float32)
    monkeypatch.setattr(linear, "onednn_multiplies", lambda *_: False)
    monkeypatch.setattr(model, "choose_elementwise", lambda *_: elementwise)
    engine = tiny_llm.engine(family, dtype=torch.float32)
    assert engine.runner.decoder.elementwise is elementwise and not engine.runner.decoder.decodes_whole
    recorder = Recorder()
    engine.runner.kernels = kernels
    engine.runner.use_graphs(recorder)
    answers = []
    for target in (plain, engine):
        requests = [
            tiny_llm.request(target, f"r{n}", question="How many?", images=(9 + n,), image_seed=n,
                             max_tokens=2 + n, threshold=0.8 if n % 2 else None)
            for n in range(3)
        ]  # fmt: skip
        answers.append({name: answer[:2] for name, answer in tiny_llm.run(target, requests).items()})
    assert answers[0] == answers[1]
    assert recorder.replayed > 0
    engine.check_integrity()


@ON_GPU
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_engine_on_a_gpu_is_as_sure_of_its_tokens_as_one_in_fp32(family: str) -> None:
    """Log probabilities of prefill and of decode by graphs, as long as both say the same; two tokens may be level."""
    sure = []
    for options in ({"dtype": torch.bfloat16, "device": gpu.DEVICE}, {"dtype": torch.float32, "device": "cpu"}):
        engine = tiny_llm.engine(family, **options)
        engine.warm_up()
        assert not engine.has_work() and engine.stats().completion_tokens == 0
        for n in range(6):
            asked = {"question": tiny_llm.QUESTIONS[n % 4], "images": (40 + 30 * n,), "image_seed": n, "max_tokens": 6}
            engine.submit(tiny_llm.request(engine, f"r{n}", **asked, keep_ratio=0.5 if n % 2 else None, logprobs=1))
        answers: dict[str, list[TokenLogprob]] = {f"r{n}": [] for n in range(6)}
        while engine.has_work():
            for name, event in engine.step():
                if isinstance(event, TokenEvent):
                    answers[name] += [token.chosen for token in event.logprobs]
        engine.check_integrity()
        sure.append(answers)
    compared = 0
    for name, ours in sure[0].items():
        for one, other in zip(ours, sure[1][name], strict=True):
            assert abs(one.logprob - other.logprob) < 0.2, (name, ours, sure[1][name])
            compared += 1
            if one.token_id != other.token_id:
                break
    assert compared > 12, "half of them part at once: that is no rounding"


@ON_GPU
def test_graphs_are_recorded_while_other_threads_pin_memory() -> None:
    """Threads that check requests pin memory."""
    engine = tiny_llm.engine(dtype=torch.bfloat16, device=gpu.DEVICE)
    ended = threading.Event()

    def pin() -> None:
        while not ended.is_set():
            torch.empty(random.randrange(1, 2**22)).pin_memory()

    with ThreadPoolExecutor(2) as pool:
        pinning = [pool.submit(pin) for _ in range(2)]
        try:
            engine.warm_up()
        finally:
            ended.set()
    assert not any(one.exception() for one in pinning)
    assert len(tiny_llm.run(engine, [tiny_llm.request(engine)])["r"][0]) == 8


@ON_GPU
def test_a_gpu_out_of_pages_answers_everyone() -> None:
    engine = tiny_llm.engine(dtype=torch.bfloat16, device=gpu.DEVICE, kv_cache_bytes=400 * 2**10)
    requests = tiny_llm.mixed_requests(engine, 60)
    answers = tiny_llm.run(engine, requests)
    assert {name: len(answer[0]) for name, answer in answers.items()} == {
        request.request_id: request.sampling.max_tokens for request in requests
    }
    assert engine.stats().preemptions > 0
    engine.check_integrity()
