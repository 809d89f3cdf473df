"""Where the lines between the vision-guided sampler's branches are drawn, set after training.

Training leaves a selector near the shares that its balance loss asks for, and seeds differ. Its biases draw the lines:
moved, every region keeps its place in the order of what needs detail, and more or fewer of them get it. One number
moves all biases along the branches' coarseness, to leave a share of the map; or each branch gets a share of regions.

Legend: M regions, K branches, H x W feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from services.common.errors import InvalidInput
from services.common.settings import require
from services.sampler.vision_guided import VisionGuidedSampler, pool, split_regions

Seen = tuple[torch.Tensor, tuple[int, int]]
"""A selector's view of an image: logits (float32 [M, K], `SampledMap.logits_MK`) and the map's H and W. In place of
logits p would not do: where the softmax saturates it is zero, however far a region is from another branch."""

STEPS = 20
"""Steps of bisection from MOST: down to a ten-thousandth of a logit, below which rounding decides."""
MOST = 64.0
"""Largest move tried, in logits a halving of resolution: all regions change before it, unless logits lie far apart."""
MARGIN = 0.05
"""How far below its first region, in logits, a branch stays that is to have none."""
MOST_ROUNDS = 1000


def tokens_by_branch(map_hw: tuple[int, int], sampler: VisionGuidedSampler) -> torch.Tensor:
    """int64 [M, K]: tokens that each region of the map would become in each branch, newlines not counted."""
    regions, real, _ = split_regions(torch.zeros(*map_hw, 1), sampler.window)
    return torch.stack([pool(regions, real, kernel)[1].sum(1) for kernel in sampler.branches], dim=1)


def finer_for_share(sampler: VisionGuidedSampler, seen: Sequence[Seen], share: float) -> float:
    """How far a selector has to be moved towards detail (`finer` of `VisionGuidedSampler.forward`) to leave at most
    `share` of the tokens of the feature maps seen, as near to it as can be, or as few as their edges allow.
    """
    coarseness_K, share = sampler.coarseness_K, max(share, least_share(sampler, seen))
    return _largest_within(sampler, seen, share, lambda finer: -finer * coarseness_K)[0]


@torch.no_grad()
def set_map_share(sampler: VisionGuidedSampler, seen: Sequence[Seen], share: float) -> float:
    """Moves the selector's biases until it leaves at most `share` of the tokens of the feature maps seen.

    Returns the share met, the largest that is not above. Raises InvalidInput where even the coarsest branch everywhere
    leaves more, or `share` is above 1.
    """
    if not seen:
        raise InvalidInput("is empty, expected the feature maps of one image or more", field="seen")
    if not (least := least_share(sampler, seen)) <= share <= 1:
        raise InvalidInput(f"is {share}, expected {least:.3f} to 1", field="share")
    linear, temperature = sampler.selector.linear, sampler.selector.temperature
    before_K, coarseness_K = linear.bias.clone(), sampler.coarseness_K.to(linear.bias.device)

    def bias(finer: float) -> torch.Tensor:
        """The bias as it will be stored, rounded to the weights' dtype."""
        return before_K - (finer / temperature * coarseness_K).to(before_K)

    def moved(finer: float) -> torch.Tensor:
        return (bias(finer).float() - before_K.float()).cpu() * temperature

    finer, met = _largest_within(sampler, seen, share, moved)
    linear.bias.copy_(bias(finer))
    return met


@torch.no_grad()
def set_branch_shares(sampler: VisionGuidedSampler, seen: Sequence[Seen], shares: Sequence[float]) -> float:
    """Sets the selector's biases so that each branch gets its share of the regions seen, but for rounding.

    shares: one a branch, adding up to 1; the first branch, the finest, gets what the others leave. Returns the share of
    the tokens of the feature maps that is left. Raises InvalidInput for other shares, and where no region was seen.
    """
    branches = len(sampler.branches)
    right = len(shares) == branches and min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-6)
    require(right, "shares", list(shares), f"{branches} that add up to 1, none below 0")
    if not any(len(logits_MK) for logits_MK, _ in seen):
        raise InvalidInput("is empty, expected the feature maps of one image or more", field="seen")
    linear, temperature = sampler.selector.linear, sampler.selector.temperature
    logits_MK = torch.cat([logits_MK.detach().double().cpu() for logits_MK, _ in seen])
    bias_K = linear.bias.double().cpu() + _moves_for_shares(logits_MK, shares) / temperature
    # Moved by the same number they choose the same; small numbers are rounded least when they are stored.
    bias_K = (bias_K - (bias_K.max() + bias_K.min()) / 2).to(linear.bias)
    stored_K = (bias_K.double() - linear.bias.double()).cpu() * temperature
    linear.bias.copy_(bias_K)
    return _left_of(sampler, seen)(logits_MK + stored_K)


def _moves_for_shares(logits_MK: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """What to add to each branch's logits, float64 [K], 0 for the first: the most that gives no other too many regions.

    From far below, each branch in turn is raised as far as its share allows. That takes regions from the others, which
    may rise again; nothing ever falls, so it ends.
    """
    regions, branches = logits_MK.shape
    spread = float(logits_MK.amax() - logits_MK.amin()) + 1
    moves_K = torch.full((branches,), -spread, dtype=torch.float64)
    moves_K[0] = 0
    for _ in range(MOST_ROUNDS):
        before_K = moves_K.clone()
        for branch in range(1, branches):
            others = [other for other in range(branches) if other != branch]
            # A branch gets the regions in which it lacks least to the best of the others.
            lacks_M = ((logits_MK + moves_K)[:, others].amax(1) - logits_MK[:, branch]).sort().values
            allowed = int(shares[branch] * regions + 1e-6)
            last = lacks_M[allowed - 1] if allowed else lacks_M[0] - 2 * MARGIN
            following = lacks_M[allowed] if allowed < regions else last + 2 * MARGIN
            moves_K[branch] = max(float(moves_K[branch]), float((last + following) / 2))
        if (moves_K - before_K).abs().max() < MARGIN / 100:
            break
    return moves_K


def least_share(sampler: VisionGuidedSampler, seen: Sequence[Seen]) -> float:
    """The share that is left with every region at the coarsest branch: more of partial regions than of whole ones."""
    least = sum(int(tokens_by_branch(map_hw, sampler).amin(1).sum()) for _, map_hw in seen)
    return least / sum(height * width for _, (height, width) in seen)


@torch.no_grad()
def _largest_within(
    sampler: VisionGuidedSampler, seen: Sequence[Seen], share: float, moved: Callable[[float], torch.Tensor]
) -> tuple[float, float]:
    """The largest move towards detail that leaves no more than `share`, and what it leaves.

    moved: maps a move to what it adds to the logits, float32 [K].
    """
    logits_MK = torch.cat([logits_MK.detach().float().cpu() for logits_MK, _ in seen])
    left = _left_of(sampler, seen)

    doublings = math.ceil(math.log2(max(1.0, _farthest(sampler, logits_MK) / MOST)))
    low, high = -MOST * 2**doublings, MOST * 2**doublings
    for _ in range(STEPS + doublings):
        middle = (low + high) / 2
        low, high = (middle, high) if left(logits_MK + moved(middle)) <= share else (low, middle)
    return low, left(logits_MK + moved(low))


def _left_of(sampler: VisionGuidedSampler, seen: Sequence[Seen]) -> Callable[[torch.Tensor], float]:
    """Maps logits of all regions seen, [M, K], to the share of the tokens of the feature maps that they leave."""
    tokens_MK = torch.cat([tokens_by_branch(map_hw, sampler) for _, map_hw in seen])
    cells = sum(height * width for _, (height, width) in seen)
    return lambda logits_MK: float(tokens_MK.gather(1, logits_MK.argmax(1, keepdim=True)).sum()) / cells


def _farthest(sampler: VisionGuidedSampler, logits_MK: torch.Tensor) -> float:
    """The largest move, a halving of resolution, that any region seen may need to change its branch."""
    steps = sampler.coarseness_K.unique().diff()
    if not len(steps) or not len(logits_MK):
        return 0.0  # branches that are all alike, or maps without tokens
    # Twice as far: biases that are stored in bfloat16 fall short of where they are moved.
    return 2 * float((logits_MK.amax(1) - logits_MK.amin(1)).max() / steps.min())
