"""Checks the CPU's operators against oracles, then answers with an engine on them; prints what the processor has.

    python -m tests.check_kernels      # one JSON line

It runs as a process of its own: environment variables settle once a process what oneDNN, torch and our build may use.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import nn

from services.compute import processor
from services.compute.linear import fastest_linear
from services.compute.merged_linear import MergedLinear
from services.compute.onednn_linear import Int8Linear
from services.compute.panel_linear import PanelLinear
from services.encoder.attention import attend
from services.llm.kernels import choose_kernels
from services.llm.kernels.cpu_attention import CpuKernels
from tests import tiny_llm
from tests.attention_oracle import decode_oracle, prefill_oracle

CPU = torch.device("cpu")
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact.double(), rtol=ERRORS[dtype], atol=ERRORS[dtype])


def check_attention(dtype: torch.dtype, heads: int, groups: int, width: int) -> None:
    kernels, (queries, keys) = choose_kernels(CPU, dtype), ([70, 1, 9], [300, 1, 9])
    query = torch.randn(sum(queries), heads, width).to(dtype)
    key, value = (torch.randn(sum(keys), groups, width).to(dtype) for _ in range(2))
    arguments = queries, keys, 0.2
    close(kernels.prefill(query, key, value, *arguments), prefill_oracle(query, key, value, *arguments), dtype)
    pools = [torch.randn(40, 16, groups, width).to(dtype) for _ in range(2)]
    rows, lengths = torch.randperm(40).view(2, 20), torch.tensor([300, 7])
    decoded = kernels.decode(query[:2], *pools, rows, lengths, 0.2)
    close(decoded, decode_oracle(query[:2], *pools, rows, lengths, 0.2), dtype)
    key[-1] = float("nan")
    assert kernels.prefill(query, key, value, *arguments)[-1].isnan().all()
    pools[0][rows[0, 3], 2] = float("nan")
    out = kernels.decode(query[:2], *pools, rows, lengths, 0.2)
    assert out[0].isnan().all() and torch.equal(out[1], decoded[1])


def check_encoder_attention(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 145, 3 * 3 * 32).to(dtype)
    query, key, value = qkv.double().unflatten(-1, (3, 3, 32)).permute(2, 0, 3, 1, 4)
    close(
        attend(qkv, 3, 0.2),
        F.scaled_dot_product_attention(query, key, value, scale=0.2).transpose(1, 2).flatten(2),
        dtype,
    )


def check_products(dtype: torch.dtype) -> None:
    plain = [nn.Linear(96, outputs, bias=outputs > 50).to(dtype).requires_grad_(False) for outputs in (32, 70)]
    layers = [[fastest_linear(linear) for linear in plain]] if processor.has_onednn_linear(dtype) else []
    if processor.has_kernels(dtype):
        layers.append([PanelLinear(linear) for linear in plain])
    for tokens in (1, 100):
        x = torch.randn(tokens, 96).to(dtype)
        for pair in layers:
            for linear, out in zip(plain, MergedLinear(*pair)(x), strict=True):
                bias = 0 if linear.bias is None else linear.bias.double()
                close(out, x.double() @ linear.weight.double().T + bias, dtype)
    if processor.has_int8_linear():
        out, exact = Int8Linear(plain[0])(x), plain[0](x).double()
        assert (out.double() - exact).norm() / exact.norm() < 0.02


def check_engine(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)  # as other tests have it; operators are checked with as many as there are
    engine = tiny_llm.engine(dtype=dtype)
    requests = tiny_llm.mixed_requests(engine, 5)
    answers = tiny_llm.run(engine, requests)
    assert all(len(answers[r.request_id][0]) == r.sampling.max_tokens for r in requests)
    engine.check_integrity()


def main() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    for dtype in ERRORS:
        torch.set_num_threads(threads)
        for heads, groups in ((4, 2), (6, 2)):
            for width in (16, 128):
                check_attention(dtype, heads, groups, width)
        with torch.inference_mode():
            check_encoder_attention(dtype)
            check_products(dtype)
        check_engine(dtype)
    has_kernels = processor.has_kernels(torch.bfloat16)
    has = {
        "auto": "bfloat16" if processor.cpu_has_bfloat16() else "float32",
        "kernels": isinstance(choose_kernels(CPU, torch.float32), CpuKernels),
        "brgemm in bf16": has_kernels and torch.ops.focusllava.has_brgemm(torch.bfloat16),
        "panels": [str(dtype) for dtype in ERRORS if processor.has_panels(dtype)],
        "oneDNN": [str(dtype) for dtype in ERRORS if processor.has_onednn_linear(dtype)],
        "int8": processor.has_int8_linear(),
    }
    print(json.dumps(has))


if __name__ == "__main__":
    main()
