"""Rivals of the vision-guided sampler: what they are given, what they give back, and how their rows are closed.

A rival sees the image only and runs where the vision-guided sampler would, on the projected feature map. The base
tile is the caller's to keep or drop, and counts for nobody.

**Newlines.** Tokens come out in raster order of their source on the map. One newline closes each band of
`newline_rows` map rows in which a token came out; an empty band has none. With 1, the default, a map kept whole is
the unsampled model's sequence; with the sampler's window it pays no more newlines than the sampler, which closes each
row of regions.

**Budget.** A share of the map's tokens, newlines apart: ceil(budget * H * W) tokens come out, exactly, except where a
rival's own text says otherwise. `ReducedMap` counts with and without newlines.

Legend: H, W feature map, D width, N base-tile tokens, S tokens out (newlines among them), K tokens out (newlines
apart), G heads of the vision tower, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from services.common.errors import InvalidInput

Given = TypeVar("Given")


@dataclass(frozen=True, kw_only=True)
class RivalInput:
    """One image. What no rival of the run needs stays None."""

    map_HWD: torch.Tensor
    """Unpadded feature map, as the vision-guided sampler gets it."""
    base_ND: torch.Tensor
    newline_D: torch.Tensor
    attention_HW: torch.Tensor | None = None
    """Attention that each map token's patch received in the vision tower (`tower.attention_received`)."""
    key_HWGd: torch.Tensor | None = None
    """Keys of the same layer."""
    content_hash: str | None = None
    """Names the image; a random choice is seeded by it."""


@dataclass(frozen=True, kw_only=True)
class ReducedMap:
    """One image's feature map after a rival."""

    tokens_SD: torch.Tensor
    """In the map's dtype, newlines among them."""
    source_S: torch.Tensor
    """int64 [S]: raster index of the map token that each is, was merged into or, pooled, begins at; -1 a newline."""

    @property
    def content_tokens(self) -> int:
        """Tokens without newlines."""
        return int((self.source_S >= 0).sum())

    @property
    def newlines(self) -> int:
        return len(self.source_S) - self.content_tokens


class MapRival(Protocol):
    """Reduces one image's feature map. The same input gives the same output; gradients flow through what is kept."""

    @property
    def budget(self) -> float | None:
        """Share of the map's tokens; None leaves the number to the rival."""

    def __call__(self, image: RivalInput) -> ReducedMap:
        """Raises InvalidInput naming a field of `image` that this rival needs and was not given."""


def emit(cells_KD: torch.Tensor, source_K: torch.Tensor, image: RivalInput, newline_rows: int) -> ReducedMap:
    """Cells in ascending order of `source_K` to a sequence with newlines, by the rule above."""
    count, width = len(cells_KD), image.map_HWD.shape[1]
    band_K = source_K // (width * newline_rows)
    closes_K = torch.ones_like(source_K, dtype=torch.bool)
    closes_K[:-1] = band_K[1:] != band_K[:-1]
    before_K = closes_K.cumsum(0) - closes_K.long()
    index_K = torch.arange(count, device=source_K.device)
    # Whatever place no cell takes is a newline, which is cell number `count`.
    order_S = torch.full((count + int(closes_K.sum()),), count, device=source_K.device)
    order_S[index_K + before_K] = index_K
    newline_1D = image.newline_D.to(cells_KD.dtype).unsqueeze(0)
    source_S = torch.cat((source_K, source_K.new_tensor([-1])))[order_S]
    return ReducedMap(tokens_SD=torch.cat((cells_KD, newline_1D))[order_S], source_S=source_S)


def emit_kept(image: RivalInput, kept_K: torch.Tensor, newline_rows: int) -> ReducedMap:
    """Map tokens at these ascending raster indices, unchanged."""
    return emit(image.map_HWD.flatten(0, 1)[kept_K], kept_K, image, newline_rows)


def spread(tokens_M: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of these, evenly spread over their order, the first among them."""
    return tokens_M[torch.arange(count, device=tokens_M.device) * len(tokens_M) // max(count, 1)]


def others(kept_K: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices below `count` that are not kept."""
    left_N = torch.ones(count, dtype=torch.bool, device=kept_K.device)
    left_N[kept_K] = False
    return left_N.nonzero().squeeze(1)


def outliers(score_N: torch.Tensor) -> int:
    """How many scores exceed the third quartile by more than 1.5 interquartile ranges; quartiles interpolate."""
    first, third = score_N.quantile(score_N.new_tensor([0.25, 0.75])).tolist()
    return int((score_N > third + 1.5 * (third - first)).sum())


def needed(value: Given | None, field: str, rival: str) -> Given:
    if value is None:
        raise InvalidInput(f"is missing, {rival} needs it", field=field)
    return value


def check_share(value: float | None, field: str = "budget") -> None:
    if value is not None and not 0 < value <= 1:
        raise InvalidInput(f"is {value}, expected (0, 1]", field=field)


def check_newline_rows(value: int) -> None:
    if value < 1:
        raise InvalidInput(f"is {value}, expected 1 or more", field="newline_rows")
