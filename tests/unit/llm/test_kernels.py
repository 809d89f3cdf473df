"""Every attention kernel against a naive float64 oracle: ragged lengths, grouped heads, prefixes, pages."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from services.llm.kernels import Kernels, choose_kernels
from services.llm.kernels.cpu_attention import CpuKernels
from services.llm.kernels.reference_attention import ReferenceKernels
from tests import gpu
from tests.attention_oracle import decode_oracle, prefill_oracle
from tests.processor import HAS_COMPILER, cpu_kernels

TORCH_THREADS = 2
CPU = torch.device("cpu")
DTYPES = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
"""Largest error of an output of size one."""
KERNELS = {"reference": ReferenceKernels, "cpu": cpu_kernels, "cuda": gpu.kernels}
EVERY = [*itertools.product(("reference", "cpu"), DTYPES), ("cuda", gpu.DTYPE)]
NO_NUMBERS = [
    (kernels, dtype, float(value))
    for kernels, dtype in EVERY
    for value in ("nan", "inf")
    if (kernels, value) != ("reference", "inf")  # torch's own kernels make zeros of it in bf16, NaN in fp32
]
SEGMENTS = {
    "one token": ([1], [1]),
    "ragged": ([3, 1, 17, 5], [3, 1, 17, 5]),
    "chunks after a prefix": ([4, 9, 1], [30, 9, 140]),
    "several query and key blocks": ([1030, 7], [1030, 7]),
    "some segments without a query": ([0, 1, 0, 3], [17, 40, 3, 3]),
    "a chunk over several blocks": ([300], [411]),
}
HEADS = {"grouped": (6, 2), "in pairs": (6, 3), "one key head": (4, 1), "ungrouped": (2, 2)}


def made(kernels: str) -> tuple[Kernels, torch.device]:
    """The kernels, and the device that they run on."""
    return KERNELS[kernels](), gpu.DEVICE if kernels == "cuda" else CPU


def random_tensors(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("kernels, dtype", EVERY, ids=str)
def test_prefill(kernels: str, segments: str, heads: str, dtype: torch.dtype) -> None:
    (query_lens, key_lens), (query_heads, key_heads), width = SEGMENTS[segments], HEADS[heads], 16
    query, key, value = random_tensors(
        (sum(query_lens), query_heads, width),
        (sum(key_lens), key_heads, width),
        (sum(key_lens), key_heads, width),
        dtype=dtype,
    )
    target, device = made(kernels)
    scaling = 0.3
    on_device = (tensor.to(device) for tensor in (query, key, value))
    out = target.prefill(*on_device, query_lens, key_lens, scaling).cpu()
    assert out.shape == query.shape and out.dtype == dtype
    torch.testing.assert_close(
        out.double(), prefill_oracle(query, key, value, query_lens, key_lens, scaling), rtol=0, atol=DTYPES[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_takes_the_strided_views_of_a_decoder_layer(dtype: torch.dtype) -> None:
    query, key, value = random_tensors((4, 150, 16), (2, 150, 16), (2, 150, 16), dtype=dtype)
    views = [tensor.transpose(0, 1) for tensor in (query, key, value)]
    for kernels in (ReferenceKernels(), cpu_kernels()):
        out = kernels.prefill(*views, [100, 50], [100, 50], 0.25)
        expected = prefill_oracle(*views, [100, 50], [100, 50], 0.25)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lens", [[1], [3, 17], [64, 64], [65, 65], [577], [1030, 7]], ids=str)
def test_without_a_mask_each_query_sees_all_keys_of_its_segment(
    lens: list[int], heads: str, dtype: torch.dtype
) -> None:
    (query_heads, key_heads), width, tokens = HEADS[heads], 16, sum(lens)
    query, key, value = random_tensors(
        (tokens, query_heads, width), (tokens, key_heads, width), (tokens, key_heads, width), dtype=dtype
    )
    cpu_kernels()  # loads the operators
    out = torch.ops.focusllava.packed_attention(query, key, value, lens, lens, 0.3, causal=False)
    exact = []
    for q, k, v in zip(*(tensor.double().split(lens) for tensor in (query, key, value)), strict=True):
        k, v = (t.repeat_interleave(query_heads // key_heads, 1) for t in (k, v))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * 0.3).softmax(-1)
        exact.append(torch.einsum("hqk,khd->qhd", weights, v))
    torch.testing.assert_close(out.double(), torch.cat(exact), rtol=0, atol=DTYPES[dtype])


@pytest.mark.parametrize("query_scale, key_offset", [(1, 0), (3, 0), (6, 0), (1, 3)])
def test_bf16_prefill_is_as_exact_as_sdpa(query_scale: float, key_offset: float) -> None:
    """Scores go up to 30, and keys have a common offset such as Qwen2's bias makes."""
    tokens, heads, width = 700, 2, 64
    query, key, value = random_tensors(*[(tokens, heads, width)] * 3, dtype=torch.float32)
    query = (query * query_scale + key_offset / 2).bfloat16()
    key, value = (key + key_offset).bfloat16(), value.bfloat16()
    scaling = width**-0.5
    exact = F.scaled_dot_product_attention(
        *(tensor.double().transpose(0, 1) for tensor in (query, key, value)), is_causal=True
    ).transpose(0, 1)
    sdpa = F.scaled_dot_product_attention(
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)), is_causal=True
    )[0].transpose(0, 1)
    ours = cpu_kernels().prefill(query, key, value, [tokens], [tokens], scaling)

    def error(out: torch.Tensor) -> float:
        return float((out.double() - exact).norm() / exact.norm())

    assert error(ours) < 1.1 * error(sdpa)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[1], [4, 5, 1, 16], [300, 2, 256, 129], [3] * 9])
@pytest.mark.parametrize("width, size", [(8, 4), (16, 4), (64, 6), (128, 4)])
@pytest.mark.parametrize("kernels, dtype", EVERY, ids=str)
def test_decode(kernels: str, width: int, size: int, lengths: list[int], heads: str, dtype: torch.dtype) -> None:
    query_heads, key_heads = HEADS[heads]
    needed = [-(-length // size) for length in lengths]
    rows = sum(needed) + 1
    query, key_pool, value_pool = random_tensors(
        (len(lengths), query_heads, width),
        (rows, size, key_heads, width),
        (rows, size, key_heads, width),
        dtype=dtype,
        seed=len(lengths),
    )
    key_pool[-1] = value_pool[-1] = 0
    shuffled = random.Random(0).sample(range(rows - 1), rows - 1)
    rows_nB = torch.full((len(lengths), max(needed) + 3), rows - 1)
    for index, count in enumerate(needed):
        rows_nB[index, :count] = torch.tensor([shuffled.pop() for _ in range(count)])
    target, device = made(kernels)
    expected = decode_oracle(query, key_pool, value_pool, rows_nB, torch.tensor(lengths), 0.25)
    pools = key_pool.to(device), value_pool.to(device)
    before = [pool.clone() for pool in pools]
    out = target.decode(query.to(device), *pools, rows_nB.to(device), torch.tensor(lengths, device=device), 0.25).cpu()
    assert out.shape == query.shape and out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=DTYPES[dtype])
    assert all(map(torch.equal, pools, before))


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("kernels, dtype", [("cpu", torch.float32), ("cuda", gpu.DTYPE)], ids=str)
def test_decode_of_a_long_sequence_is_the_same_in_any_batch(kernels: str, dtype: torch.dtype, width: int) -> None:
    shapes = (3, 4, width), (240, 4, 2, width), (240, 4, 2, width)
    target, device = made(kernels)
    query, key_pool, value_pool = (tensor.to(device) for tensor in random_tensors(*shapes, dtype=dtype))
    rows_nB = torch.arange(240, device=device).view(3, 80)
    lengths_n = torch.tensor([150, 320, 131], device=device)
    whole = target.decode(query, key_pool, value_pool, rows_nB, lengths_n, 0.25)
    for index, blocks in enumerate((38, 80, 33)):
        one = slice(index, index + 1)
        alone = target.decode(query[one], key_pool, value_pool, rows_nB[one, :blocks], lengths_n[one], 0.25)
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize("broken", ["query", "key"])
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("kernels, dtype, value", NO_NUMBERS, ids=str)
def test_what_is_no_number_shows_in_what_sees_it(
    kernels: str, width: int, dtype: torch.dtype, value: float, broken: str
) -> None:
    """NaN comes out, not plausible numbers, whose size is up to 2; another sequence of the batch is not touched."""
    target, device = made(kernels)
    shapes = (2, 4, width), (50, 16, 2, width), (50, 16, 2, width)
    query, key_pool, value_pool = (tensor.abs_() for tensor in random_tensors(*shapes, dtype=dtype))
    rows_nB, lengths_n = torch.arange(50).view(2, 25), torch.tensor([400, 390])
    plain = decode_oracle(query, key_pool, value_pool, rows_nB, lengths_n, 0.25)
    (query[0] if broken == "query" else key_pool[20, 5])[..., 3] = value
    out = target.decode(*(x.to(device) for x in (query, key_pool, value_pool, rows_nB, lengths_n)), 0.25).cpu()
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1].double(), plain[1], rtol=0, atol=2 * DTYPES[dtype])

    lens, at = [20, 700, 30], 500
    query, key, values = (
        tensor.abs_() for tensor in random_tensors(*[(750, heads, width) for heads in (4, 2, 2)], dtype=dtype)
    )
    plain = prefill_oracle(query, key, values, lens, lens, 0.25)
    (query if broken == "query" else key)[20 + at, :, 3] = value
    out = target.prefill(*(x.to(device) for x in (query, key, values)), lens, lens, 0.25).cpu()
    sees = torch.zeros(750, dtype=torch.bool)
    sees[20 + at : 21 + at if broken == "query" else 720] = True
    assert out[sees].isnan().all()
    if kernels == "reference" and broken == "key":
        sees[20:720] = True  # a mask adds to a score, and NaN stays what it is
    torch.testing.assert_close(out[~sees].double(), plain[~sees], rtol=0, atol=2 * DTYPES[dtype])


@pytest.mark.parametrize("where", [[0], [5], list(range(12))], ids=["first", "one", "all"])
@pytest.mark.parametrize("value", [float("-inf"), 3e38, -3e38])
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("kernels, dtype", [("cpu", dtype) for dtype in DTYPES], ids=str)
def test_scores_past_all_bounds_weigh_what_sdpa_has_them_weigh(
    kernels: str, dtype: torch.dtype, width: int, value: float, where: list[int]
) -> None:
    """A score of minus infinity weighs nothing, and where all do, so does their sum."""
    target, _ = made(kernels)
    query, key, values = random_tensors((12, 4, width), (12, 2, width), (12, 2, width), dtype=dtype)
    query.abs_().clamp_(max=1)
    key[where, :, 3] = value
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, values)), is_causal=True, scale=0.25, enable_gqa=True
    )[0].transpose(0, 1)
    assert expected.isfinite().all()
    out = target.prefill(query, key, values, [12], [12], 0.25)
    torch.testing.assert_close(out, expected, rtol=0, atol=DTYPES[dtype])
    rows_nB, lengths_n = torch.zeros(12, 1, dtype=torch.int64), torch.arange(1, 13)
    out = target.decode(query, key[None], values[None], rows_nB, lengths_n, 0.25)
    torch.testing.assert_close(out, expected, rtol=0, atol=DTYPES[dtype])


def test_the_device_chooses_the_kernels() -> None:
    assert isinstance(choose_kernels(CPU, torch.float32), CpuKernels if HAS_COMPILER else ReferenceKernels)
    assert isinstance(choose_kernels(CPU, torch.float64), ReferenceKernels)
    assert isinstance(choose_kernels(torch.device("meta"), torch.bfloat16), ReferenceKernels)
