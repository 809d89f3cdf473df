"""Attention as its definition reads, one query at a time in float64; what every kernel is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attend_one(query_Hd: torch.Tensor, key_KGd: torch.Tensor, value_KGd: torch.Tensor, scaling: float) -> torch.Tensor:
    """One query over all of its keys, [H, d] in float64."""
    heads, groups = query_Hd.shape[0], key_KGd.shape[1]
    out = []
    for head in range(heads):
        group = head // (heads // groups)
        weights_K = (key_KGd[:, group].double() @ query_Hd[head].double() * scaling).softmax(dim=0)
        out.append(weights_K @ value_KGd[:, group].double())
    return torch.stack(out)


def prefill_oracle(
    query_SHd: torch.Tensor,
    key_KGd: torch.Tensor,
    value_KGd: torch.Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    scaling: float,
) -> torch.Tensor:
    """Causal attention over packed segments, the last query aligned with the last key. [S, H, d] in float64."""
    out = []
    parts = (query_SHd.split(list(query_lens)), key_KGd.split(list(key_lens)), value_KGd.split(list(key_lens)))
    for query, key, value in zip(*parts, strict=True):
        for index in range(len(query)):
            seen = len(key) - len(query) + index + 1
            out.append(attend_one(query[index], key[:seen], value[:seen], scaling))
    return torch.stack(out)


def decode_oracle(
    query_nHd: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    rows_nB: torch.Tensor,
    lengths_n: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """One query a sequence over its pages. [n, H, d] in float64."""
    out = []
    for query_Hd, rows_B, length in zip(query_nHd, rows_nB, lengths_n.tolist(), strict=True):
        key_KGd, value_KGd = (pool[rows_B].flatten(0, 1)[:length] for pool in (key_pool, value_pool))
        out.append(attend_one(query_Hd, key_KGd, value_KGd, scaling))
    return torch.stack(out)


def varlen_oracle(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """The documented meaning of `torch.nn.attention.varlen.varlen_attn` when causal, its checks included."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[0] == cu_seq_k[0] == 0
    query_lens, key_lens = (starts.diff().tolist() for starts in (cu_seq_q, cu_seq_k))
    assert max(query_lens) <= max_q and max(key_lens) <= max_k
    return prefill_oracle(query, key, value, query_lens, key_lens, scale).to(query.dtype)
