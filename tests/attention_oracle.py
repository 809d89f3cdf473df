"""Attention as its definition reads, in float64; what every kernel is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attend(
    query_QHd: torch.Tensor, key_KGd: torch.Tensor, value_KGd: torch.Tensor, seen_QK: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Each query over the keys that it sees, [Q, H, d] in float64."""
    query_QGRd = query_QHd.double().unflatten(1, (key_KGd.shape[1], -1))
    scores_GRQK = torch.einsum("qgrd,kgd->grqk", query_QGRd, key_KGd.double()) * scaling
    weights_GRQK = scores_GRQK.masked_fill(~seen_QK, -torch.inf).softmax(dim=-1)
    return torch.einsum("grqk,kgd->qgrd", weights_GRQK, value_KGd.double()).flatten(1, 2)


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
        last_Q = torch.arange(len(key) - len(query), len(key))
        out.append(attend(query, key, value, torch.arange(len(key)) <= last_Q[:, None], scaling))
    return torch.cat(out)


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
        out.append(attend(query_Hd[None], key_KGd, value_KGd, torch.ones(1, length, dtype=torch.bool), scaling))
    return torch.cat(out)


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
