"""What VisionZip and PruMerge read off the vision tower: which patches attention goes to, and their keys.

Both read CLIP's CLS token. Our towers have one: of CLIP's own weights it has learned what an image is of. In a tower
trained from nothing on patch labels it has not: nothing but the patches' own attention reaches it, and in the last
layer that runs its query moves no loss at all. `source="patches"` is what VisionZip itself does for towers without a
CLS token: the mean over all patches' queries. Report both for such a tower.

Layer: the last one that runs, which makes the features (VisionZip's choice; PruMerge takes the layer after it).
Attention is averaged over heads; PruMerge's code takes all heads as one. Tiles go through the tower alone, so
attention sums to about 1 within each tile.

Legend: T tiles, P tokens of a tile (CLS first), G heads, d head width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from services.common.errors import InvalidInput

Source = Literal["cls", "patches"]


def check_source(source: str) -> None:
    """Raises InvalidInput for what is no Source."""
    if source not in get_args(Source):
        raise InvalidInput(f"is {source!r}, expected {' or '.join(get_args(Source))}", field="source")


@torch.no_grad()
def attention_received(
    query_TPGd: torch.Tensor,
    key_TPGd: torch.Tensor,
    scaling: float,
    source: Source = "cls",
) -> torch.Tensor:
    """Softmax over all P keys in float32, averaged over heads and the asking tokens; CLS's own column dropped.

    Returns float32 [T, P - 1], in the order of the patches.
    """
    check_source(source)
    asking = slice(0, 1) if source == "cls" else slice(1, None)
    query_TGQd = query_TPGd[:, asking].float().transpose(1, 2)
    key_TGdP = key_TPGd.float().permute(0, 2, 3, 1)
    return (query_TGQd @ key_TGdP * scaling).softmax(-1).mean((1, 2))[:, 1:]
