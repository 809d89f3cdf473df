"""The paged KV cache on a GPU, from the A100 on: Triton kernels that write K and V, and decode attention on the pages.

The keys of a sequence are cut into chunks, one program each, and a second kernel puts the chunks together (flash
decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Where it is cut depends on the sequence alone, so
its answer does not depend on the batch. Shapes depend on the batch and the width of the block tables alone, so a CUDA
graph can hold both kernels.

Legend: see services/llm/kernels/__init__.py; R = H // G query heads a key head, C chunks, K tokens of a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

CHUNK = 128
"""Tokens a program: one sequence of 2,900 on 8 key heads makes 184, for the 108 multiprocessors of an A100."""
PARTS = 16
"""Chunks whose results are put together at a time: one after another each would wait for memory."""
TILE = 64
"""Tokens at a time: at head width 128 that is 38 KiB of shared memory and 144 registers, three programs a processor."""
WARPS, STAGES = 4, 2


def paged_decode(
    query_nHd: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    rows_nB: torch.Tensor,
    lengths_n: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """See `Kernels.decode`; bf16 and fp16. The tensors are contiguous in d, and so are the block tables."""
    (sequences, heads, width), (_, size, groups, _) = query_nHd.shape, key_pool.shape
    chunks = triton.cdiv(rows_nB.shape[1] * size, CHUNK)
    part_nHCd = query_nHd.new_empty(sequences, heads, chunks, width, dtype=torch.float32)
    weight_nHC = part_nHCd.new_empty(sequences, heads, chunks)
    out_nHd = torch.empty_like(query_nHd, memory_format=torch.contiguous_format)
    padded = max(16, triton.next_power_of_2(width))  # tensor cores take 16 rows and columns or more
    _attend_chunks[sequences, groups, chunks](
        query_nHd,
        key_pool,
        value_pool,
        rows_nB,
        lengths_n,
        part_nHCd,
        weight_nHC,
        scaling * math.log2(math.e),
        *query_nHd.stride()[:2],
        *key_pool.stride()[:3],
        *value_pool.stride()[:3],
        rows_nB.stride(0),
        repeats=heads // groups,
        padded_repeats=max(16, triton.next_power_of_2(heads // groups)),
        width=width,
        padded_width=padded,
        page=size,
        chunk=CHUNK,
        tile=TILE,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    _put_together[sequences, heads](
        part_nHCd,
        weight_nHC,
        lengths_n,
        out_nHd,
        chunks,
        width=width,
        padded_width=padded,
        chunk=CHUNK,
        parts=PARTS,
        num_warps=WARPS,
    )
    return out_nHd


def store(
    key_SGd: torch.Tensor, value_SGd: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor,
    slots_S: torch.Tensor,
) -> None:  # fmt: skip
    """See `Kernels.store`."""
    tokens, groups, width = key_SGd.shape
    if tokens:
        row = groups * width
        _store[(tokens,)](
            key_SGd,
            value_SGd,
            key_pool,
            value_pool,
            slots_S,
            *key_SGd.stride()[:2],
            *value_SGd.stride()[:2],
            row=row,
            padded_row=triton.next_power_of_2(row),
            width=width,
            num_warps=WARPS,
        )


@triton.jit
def _attend_chunks(
    query_nHd,
    key_pool,
    value_pool,
    rows_nB,
    lengths_n,
    part_nHCd,
    weight_nHC,
    scaling,
    query_stride_n,
    query_stride_H,
    key_stride_row,
    key_stride_token,
    key_stride_G,
    value_stride_row,
    value_stride_token,
    value_stride_G,
    rows_stride_n,
    repeats: tl.constexpr,
    padded_repeats: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    page: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
):
    """The mean of a chunk's values by the softmax of its scores, and log2 of the sum of their exponentials."""
    sequence, group, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = index * chunk
    end = tl.minimum(start + chunk, tl.load(lengths_n + sequence))
    if start >= end:
        return
    d = tl.arange(0, padded_width)
    repeat = tl.arange(0, padded_repeats)
    head = group * repeats + repeat
    in_d, in_R = d < width, repeat < repeats
    query_Rd = tl.load(
        query_nHd + sequence * query_stride_n + head[:, None] * query_stride_H + d[None, :],
        mask=in_R[:, None] & in_d[None, :],
        other=0.0,
    )
    highest_R = tl.full([padded_repeats], float("-inf"), tl.float32)
    total_R = tl.zeros([padded_repeats], tl.float32)
    sum_Rd = tl.zeros([padded_repeats, padded_width], tl.float32)
    for first in range(start, end, tile):
        token_K = first + tl.arange(0, tile)
        in_K = token_K < end
        row_K = tl.load(rows_nB + sequence * rows_stride_n + token_K // page, mask=in_K, other=0)
        in_Kd = in_K[:, None] & in_d[None, :]
        key_K = key_pool + row_K * key_stride_row + token_K % page * key_stride_token + group * key_stride_G
        value_K = value_pool + row_K * value_stride_row + token_K % page * value_stride_token + group * value_stride_G
        key_Kd = tl.load(key_K[:, None] + d[None, :], mask=in_Kd, other=0.0)
        value_Kd = tl.load(value_K[:, None] + d[None, :], mask=in_Kd, other=0.0)
        score_RK = tl.where(in_K[None, :], tl.dot(query_Rd, tl.trans(key_Kd)) * scaling, float("-inf"))
        new_R = tl.maximum(highest_R, tl.max(score_RK, 1))
        fade_R = tl.exp2(highest_R - new_R)
        weight_RK = tl.exp2(score_RK - new_R[:, None])
        total_R = total_R * fade_R + tl.sum(weight_RK, 1)
        sum_Rd = sum_Rd * fade_R[:, None] + tl.dot(weight_RK.to(value_Kd.dtype), value_Kd)
        highest_R = new_R
    heads, chunks = tl.num_programs(1) * repeats, tl.num_programs(2)
    place_R = (sequence * heads + head).to(tl.int64) * chunks + index
    tl.store(
        part_nHCd + place_R[:, None] * width + d[None, :], sum_Rd / total_R[:, None], mask=in_R[:, None] & in_d[None, :]
    )
    tl.store(weight_nHC + place_R, highest_R + tl.log2(total_R), mask=in_R)


@triton.jit
def _put_together(
    part_nHCd,
    weight_nHC,
    lengths_n,
    out_nHd,
    chunks,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    chunk: tl.constexpr,
    parts: tl.constexpr,
):
    """The mean of the chunks' means, each weighted by what its softmax summed to."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    d, part = tl.arange(0, padded_width), tl.arange(0, parts)
    place = (sequence * tl.num_programs(1) + head).to(tl.int64)
    count = tl.cdiv(tl.load(lengths_n + sequence), chunk)
    highest, total = float("-inf"), 0.0
    sum_d = tl.zeros([padded_width], tl.float32)
    for first in range(0, count, parts):
        index_P = first + part
        in_P = index_P < count
        weight_P = tl.load(weight_nHC + place * chunks + index_P, mask=in_P, other=float("-inf"))
        part_Pd = tl.load(
            part_nHCd + (place * chunks + index_P)[:, None] * width + d[None, :],
            mask=in_P[:, None] & (d < width)[None, :],
            other=0.0,
        )
        new = tl.maximum(highest, tl.max(weight_P, 0))
        fade, share_P = tl.exp2(highest - new), tl.exp2(weight_P - new)
        sum_d = sum_d * fade + tl.sum(part_Pd * share_P[:, None], 0)
        total = total * fade + tl.sum(share_P, 0)
        highest = new
    tl.store(out_nHd + place * width + d, (sum_d / total).to(out_nHd.dtype.element_ty), mask=d < width)


@triton.jit
def _store(
    key_SGd,
    value_SGd,
    key_pool,
    value_pool,
    slots_S,
    key_stride_S,
    key_stride_G,
    value_stride_S,
    value_stride_G,
    row: tl.constexpr,
    padded_row: tl.constexpr,
    width: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, padded_row)
    to = tl.load(slots_S + token) * row + j
    key = tl.load(key_SGd + token * key_stride_S + j // width * key_stride_G + j % width, mask=j < row)
    value = tl.load(value_SGd + token * value_stride_S + j // width * value_stride_G + j % width, mask=j < row)
    tl.store(key_pool + to, key, mask=j < row)
    tl.store(value_pool + to, value, mask=j < row)
