"""Vision-guided sampler: compresses each region of the feature map at the scale that it needs (Sec. 3.2, Eq. 1-2).

Legend: H, W feature map, D width, w window, M regions in raster order, K branches, C cells of all branches of a region,
N base-tile tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from services.common.errors import InvalidInput

Choice = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]
"""Branches decided from outside: (p float32 [M, K], rows and columns of regions) -> branch ids int64 [M]."""

TokenOrder = Literal["region", "row"]
"""How a sampled map's tokens follow each other.

region: region by region in raster order, row-major inside a region, one newline closing each row of regions.
row: by row, then column, of a token's top left corner, one newline closing each row of the map in which a token begins;
with every region at 1x1 that is LLaVA-NeXT's own sequence.
"""

DROP = (0, 0)
"""The kernel of a branch that emits nothing: with a window of 1 a token is kept or dropped (Tab. 4)."""


@dataclass(frozen=True, kw_only=True)
class SampledMap:
    """One image's feature map after the sampler."""

    tokens_ND: torch.Tensor
    """In the sampler's TokenOrder, newlines included."""
    newlines: int
    branch_ids_M: torch.Tensor
    """int64 [M]: the branch that each region chose."""
    probs_MK: torch.Tensor
    """float32 [M, K]: the selector's distribution."""
    logits_MK: torch.Tensor
    """float32 [M, K]: what it is the softmax of. Where p has underflowed to zero, these still tell regions apart."""
    region_grid: tuple[int, int]
    """Rows and columns of regions."""


def split_regions(map_HWD: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Cuts the map into regions [M, w, w, D]; returns them, which tokens are real (bool [M, w, w]) and the grid.

    Edge regions are partial: what lies beyond the map is marked unreal and never enters a pool.
    """
    height, width, depth = map_HWD.shape
    rows, cols = -(-height // window), -(-width // window)
    padded = nn.functional.pad(map_HWD, (0, 0, 0, cols * window - width, 0, rows * window - height))
    regions = padded.view(rows, window, cols, window, depth).transpose(1, 2).reshape(-1, window, window, depth)
    real = torch.zeros(rows * window, cols * window, dtype=torch.bool, device=map_HWD.device)
    real[:height, :width] = True
    real = real.view(rows, window, cols, window).transpose(1, 2).reshape(-1, window, window)
    return regions, real, (rows, cols)


def pool(
    regions_MwwD: torch.Tensor, real_Mww: torch.Tensor, kernel: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Max-pools with kernel = stride over the real tokens only; returns [M, cells, D] and which cells are real.

    Unreal cells hold zeros. DROP has no cells.
    """
    regions, window, _, depth = regions_MwwD.shape
    height, width = kernel
    if kernel == DROP:
        return regions_MwwD.new_zeros(regions, 0, depth), real_Mww.new_zeros(regions, 0)
    cells = (regions, window // height, height, window // width, width)
    real_cells = real_Mww.view(cells).amax((2, 4)).flatten(1)
    if kernel == (1, 1):
        return regions_MwwD.flatten(1, 2), real_cells
    masked = regions_MwwD.masked_fill(~real_Mww.unsqueeze(-1), -torch.inf)
    pooled = masked.view(*cells, depth).amax((2, 4)).flatten(1, 2)
    return pooled.masked_fill(~real_cells.unsqueeze(-1), 0), real_cells


def emit(
    pooled: Sequence[tuple[torch.Tensor, torch.Tensor]],
    branches: Sequence[tuple[int, int]],
    branch_ids_M: torch.Tensor,
    newline_D: torch.Tensor,
    *,
    grid: tuple[int, int],
    window: int,
    order: TokenOrder,
) -> tuple[torch.Tensor, int]:
    """The cells of the branch that each region chose, in order: tokens [N, D] with newlines, and how many newlines.

    pooled: what `pool` gives for each branch; grid: rows and columns of regions.
    """
    cells_MCD = torch.cat([cells for cells, _ in pooled], dim=1)
    chosen = [real & (branch_ids_M == branch)[:, None] for branch, (_, real) in enumerate(pooled)]
    emitted_MC = torch.cat(chosen, dim=1)
    device, (rows, cols) = cells_MCD.device, grid
    region_M1 = torch.arange(rows * cols, device=device)[:, None]
    if order == "region":
        # The newline is one more cell, emitted by the last region of each row.
        newline_M1D = newline_D.to(cells_MCD.dtype).expand(len(cells_MCD), 1, -1)
        emitted_MC = torch.cat((emitted_MC, (region_M1 + 1) % cols == 0), dim=1)
        return torch.cat((cells_MCD, newline_M1D), dim=1)[emitted_MC], rows
    top_C, left_C = (torch.tensor(corners, device=device) for corners in zip(*_corners(branches, window), strict=True))
    row_N = (region_M1 // cols * window + top_C)[emitted_MC]
    col_N = (region_M1 % cols * window + left_C)[emitted_MC]
    begins = torch.zeros(rows * window, dtype=torch.bool, device=device)
    begins[row_N] = True
    newline_row_L = begins.nonzero()[:, 0]
    width = cols * window  # the column of newlines
    order_N = torch.cat((row_N * (width + 1) + col_N, newline_row_L * (width + 1) + width)).argsort()
    newline_LD = newline_D.to(cells_MCD.dtype).expand(len(newline_row_L), -1)
    return torch.cat((cells_MCD[emitted_MC], newline_LD))[order_N], len(newline_row_L)


def _corners(branches: Sequence[tuple[int, int]], window: int) -> list[tuple[int, int]]:
    """Row and column, inside a region, of the top left corner of each branch's cells."""
    kernels = (kernel for kernel in branches if kernel != DROP)
    return [(top, left) for height, width in kernels
            for top in range(0, window, height) for left in range(0, window, width)]  # fmt: skip


class SelectorLinear(nn.Linear):
    """The selector's layer. It computes in float32, whatever its weights are stored in."""

    def reset_parameters(self) -> None:
        """Starts at full resolution: a region is coarsened once the loss says so, never by chance."""
        super().reset_parameters()  # draws, so that what is drawn after it stays as it was
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.bias.copy_(self.first_bias())

    def first_bias(self) -> torch.Tensor:
        """What the bias starts from, float32 [K]."""
        return 0.5 * (torch.arange(self.out_features, device=self.bias.device) == 0).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


class Selector(nn.Module):
    """Chooses a branch for each region, from its similarity to the base tile or from the region itself."""

    def __init__(self, width: int, base_tokens: int, branches: int, *, selector_input: str, similarity: str,
                 region_pool: str, temperature: float):  # fmt: skip
        super().__init__()
        self.selector_input, self.similarity, self.region_pool = selector_input, similarity, region_pool
        self.temperature = temperature
        self.linear = SelectorLinear(base_tokens if selector_input == "base_tile" else 3 * width, branches)

    def forward(self, regions_MwwD: torch.Tensor, real_Mww: torch.Tensor, base_ND: torch.Tensor) -> torch.Tensor:
        """Returns the logits of p, float32 [M, K]."""
        # Called as a module: ZeRO-3 gathers a module's weights when it is called.
        return self.linear(self.features(regions_MwwD, real_Mww, base_ND)) * self.temperature

    def features(self, regions_MwwD: torch.Tensor, real_Mww: torch.Tensor, base_ND: torch.Tensor) -> torch.Tensor:
        """What the linear layer reads, float32 [M, its inputs]."""
        real = real_Mww.flatten(1).unsqueeze(-1)
        tokens = regions_MwwD.flatten(1, 2).float()
        mean_MD = (tokens * real).sum(1) / real.sum(1)
        max_MD = tokens.masked_fill(~real, -torch.inf).amax(1)
        if self.selector_input == "region":
            spread_MD = ((tokens - mean_MD.unsqueeze(1)).square() * real).sum(1).div(real.sum(1)).add(1e-6).sqrt()
            return nn.functional.layer_norm(torch.stack((mean_MD, max_MD, spread_MD), 1), mean_MD.shape[-1:]).flatten(1)
        else:
            region_MD, base_ND = mean_MD if self.region_pool == "mean" else max_MD, base_ND.float()
            if base_ND.shape[0] != self.linear.in_features:
                raise InvalidInput(
                    f"has {base_ND.shape[0]} tokens, the selector expects {self.linear.in_features}", field="base tile"
                )
            if self.similarity == "normalized":
                # Raw inner products saturate the softmax; what all tokens share says nothing of a region.
                base_ND = nn.functional.layer_norm(base_ND, base_ND.shape[-1:])
                centre_D = base_ND.mean(0)
                region_MD = nn.functional.normalize(
                    nn.functional.layer_norm(region_MD, centre_D.shape) - centre_D, dim=-1
                )
                base_ND = nn.functional.normalize(base_ND - centre_D, dim=-1)
            return region_MD @ base_ND.T


class VisionGuidedSampler(nn.Module):
    """Eq. 1 at inference; in training the chosen branch carries the selector's gradient through `probability_gate`."""

    def __init__(
        self,
        width: int,
        base_tokens: int,
        *,
        window: int = 4,
        branches: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 4)),
        similarity: str = "inner_product",
        region_pool: str = "mean",
        selector_input: str = "base_tile",
        probability_gate: str = "paper",
        selector_temperature: float = 1.0,
        token_order: TokenOrder = "region",
    ):
        super().__init__()
        self.window, self.branches, self.probability_gate = window, tuple(branches), probability_gate
        self.token_order: TokenOrder = token_order
        self.selector = Selector(
            width,
            base_tokens,
            len(branches),
            selector_input=selector_input,
            similarity=similarity,
            region_pool=region_pool,
            temperature=selector_temperature,
        )

    @property
    def coarseness_K(self) -> torch.Tensor:
        """float32 [K]: log2 of how many tokens one token of a branch stands for; DROP is a step past a whole window."""
        kernels = (float(2 * self.window**2 if kernel == DROP else kernel[0] * kernel[1]) for kernel in self.branches)
        return torch.tensor(list(kernels)).log2()

    def forward(self, map_HWD: torch.Tensor, base_ND: torch.Tensor, newline_D: torch.Tensor,
                choose: Choice | None = None, *, finer: float = 0.0,
                logits_MK: torch.Tensor | None = None) -> SampledMap:  # fmt: skip
        """Compresses one image's unpadded feature map with its base-tile features as context.

        `choose` decides in the selector's place, as an experiment's control; then there is no gate either.
        `logits_MK` are the selector's, where `logits_of` computed them before.
        `finer` moves the selector's logits towards detail, by so much a halving of resolution.
        """
        regions, real, grid = split_regions(map_HWD, self.window)
        with torch.autocast(map_HWD.device.type, enabled=False):
            if logits_MK is None:
                logits_MK = self.selector(regions, real, base_ND)
            if finer:
                logits_MK = logits_MK - finer * self.coarseness_K.to(logits_MK.device)
            probs_MK = logits_MK.softmax(dim=-1)
        branch_ids_M = choose(probs_MK, grid) if choose else probs_MK.argmax(dim=1)
        gated = self.training and torch.is_grad_enabled() and choose is None
        pooled = [pool(regions, real, kernel) for kernel in self.branches]
        if gated:
            cells = [cells_MCD for cells_MCD, _ in pooled]
            pooled = [(self._gate(cells, real, probs_MK, k), real_cells) for k, (_, real_cells) in enumerate(pooled)]
        tokens_ND, newlines = emit(pooled, self.branches, branch_ids_M, newline_D, grid=grid, window=self.window,
                                   order=self.token_order)  # fmt: skip
        return SampledMap(tokens_ND=tokens_ND, newlines=newlines, branch_ids_M=branch_ids_M, probs_MK=probs_MK,
                          logits_MK=logits_MK, region_grid=grid)  # fmt: skip

    def logits_of(self, maps: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Sequence[torch.Tensor]:
        """The selector's logits of several images, [M, K] each, from (map_HWD, base_ND): its layer is called once."""
        features = []
        with torch.autocast(maps[0][0].device.type, enabled=False):
            for map_HWD, base_ND in maps:
                regions, real, _ = split_regions(map_HWD, self.window)
                features.append(self.selector.features(regions, real, base_ND))
            logits_MK = self.selector.linear(torch.cat(features)) * self.selector.temperature
        return logits_MK.split([len(each) for each in features])

    def _gate(self, cells: Sequence[torch.Tensor], real: torch.Tensor, probs_MK: torch.Tensor,
              branch: int) -> torch.Tensor:  # fmt: skip
        """Gives the cells of one branch the selector's gradient; see docs/method.md for the three gates.

        cells: [M, C, D] of every branch, as pooled.
        """
        pooled_MCD = cells[branch]
        probs_MK = probs_MK.to(pooled_MCD.dtype)
        prob_M11 = probs_MK[:, branch, None, None]
        if self.probability_gate == "paper":
            return pooled_MCD * prob_M11
        if self.probability_gate == "straight_through":
            # 1 + (p - sg(p)), since p / sg(p) is 0/0 once p underflows; the difference first, for it is exactly zero.
            return pooled_MCD * (1 + (prob_M11 - prob_M11.detach()))
        with torch.no_grad():
            others = [self._resize(other_MCD, real, kernel, self.branches[branch])
                      for other_MCD, kernel in zip(cells, self.branches, strict=True)]  # fmt: skip
        surplus_MK = probs_MK - probs_MK.detach()
        return pooled_MCD + torch.einsum("mk,kmcd->mcd", surplus_MK, torch.stack(others))

    def _resize(
        self, pooled_MCD: torch.Tensor, real: torch.Tensor, source: tuple[int, int], target: tuple[int, int]
    ) -> torch.Tensor:
        """Brings one branch's cells to another's grid: nearest repeat, then the target's max-pool; dropped is zero."""
        if DROP in (source, target):
            count = (self.window // target[0]) * (self.window // target[1]) if target != DROP else 0
            return pooled_MCD.new_zeros(len(pooled_MCD), count, pooled_MCD.shape[-1])
        rows, cols = self.window // source[0], self.window // source[1]
        full = pooled_MCD.unflatten(1, (rows, cols)).repeat_interleave(source[0], 1).repeat_interleave(source[1], 2)
        return pool(full, real, target)[0]
