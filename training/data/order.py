"""The entries of an epoch and their order: whole batches of like entries, as LLaVA's group_by_modality_length.

Legend: N entries of the data, E entries of an epoch, G entries of a global batch, B batches of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.data.mixture import SourceSettings


def epoch_size(ranges: Sequence[tuple[int, int]], sources: Sequence[SourceSettings]) -> int:
    """E: entries of an epoch by the sources' counts and weights."""
    return sum(_drawn(last - first, source) for (first, last), source in zip(ranges, sources, strict=True))


def epoch_entries(
    ranges: Sequence[tuple[int, int]], sources: Sequence[SourceSettings], seed: int, epoch: int
) -> np.ndarray:
    """int64 [E]: the entries of an epoch, source by source; a source that does not come whole is drawn from anew."""
    chosen = []
    for number, ((first, last), source) in enumerate(zip(ranges, sources, strict=True)):
        whole, rest = divmod(_drawn(last - first, source), last - first)
        chosen += [np.arange(first, last)] * whole
        if rest:
            draw = np.random.default_rng((seed, epoch, number + 1))
            chosen.append(np.sort(first + draw.permutation(last - first)[:rest]))
    return np.concatenate(chosen)


def epoch_order(entries_E: np.ndarray, lengths_N: np.ndarray, batch: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [B, G]: the epoch's batches, each of entries with images or of entries without, the longest first.

    What is left of each kind shares the last batches. The last one is filled up with entries that have come before,
    each as -1 less its number. `lengths_N` is negative for entries without an image. The order depends on the
    arguments alone.
    """
    draw = np.random.default_rng((seed, epoch, 0))
    grouped, left = [], []
    for mine_E in (lengths_N[entries_E] > 0, lengths_N[entries_E] <= 0):
        shuffled = draw.permutation(entries_E[mine_E])
        full = len(shuffled) // batch * batch
        grouped.append(shuffled[:full].reshape(-1, batch))
        left.append(shuffled[full:])
    batches_BG = np.concatenate(grouped)
    batches_BG = batches_BG[draw.permutation(len(batches_BG))]
    rest = np.concatenate(left)
    if len(rest):
        missing = -len(rest) % batch
        filling = -1 - np.resize(np.concatenate((batches_BG.ravel()[:missing], rest)), missing)
        batches_BG = np.concatenate((batches_BG, np.concatenate((rest, filling)).reshape(-1, batch)))
    words_BG = np.abs(lengths_N[np.where(batches_BG < 0, -1 - batches_BG, batches_BG)].astype(np.int64))
    longest_first = np.argsort(-words_BG, axis=1, kind="stable")
    return np.take_along_axis(batches_BG, longest_first, axis=1)


def share(batch_G: np.ndarray, micro: int, rank: int, micros: int, world_size: int) -> np.ndarray:
    """One rank's part of one micro-batch of a global batch, the longest entries spread over the ranks.

    The parts of all micro-batches and ranks are the whole batch, whatever their numbers.
    """
    size = len(batch_G) // (micros * world_size)
    # Turned on by the batch, or one rank would get the shortest entry of every batch, and with it most unusable ones.
    rank = (rank + int(batch_G.sum())) % world_size
    block = batch_G[micro * size * world_size : (micro + 1) * size * world_size].reshape(size, world_size)
    turned = block[:, rank].copy()
    turned[1::2] = block[1::2, world_size - 1 - rank]
    return turned


def _drawn(entries: int, source: SourceSettings) -> int:
    return max(1, round(source.weight * (source.count or entries)))
