"""Batches of training sequences from a mixture of data, the same for the same seed, step, micro-batch and rank.

Background processes read, decode and tile ahead. A batch is a function of its entries alone, so their number changes
nothing; a step further on costs nothing to begin at.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from services.common.errors import InvalidInput
from services.common.settings import require
from services.modeling.packing import TrainedSequence
from training.data.ahead import Ahead
from training.data.encoding import Template
from training.data.faults import KINDS, Fault
from training.data.mixture import Mixture, Stage, load_mixture
from training.data.order import epoch_entries, epoch_order, epoch_size, share
from training.data.reading import Read, Reader, ReaderSettings

FAULTS_KEPT = 1000
"""Faults that are kept by name; all are counted."""


class ConversationLoader:
    """Batches for one rank. Not for several threads at once."""

    def __init__(
        self,
        data: Mixture | str | pathlib.Path,
        checkpoint: str | pathlib.Path,
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        root: str = "",
        images: str = "",
        stage: Stage | None = None,
        max_length: int | None = None,
        template: Template = "chat",
        processes: int = 0,
        prefetch: int = 4,
        max_bad_share: float = 0.01,
    ):
        """data: a mixture, its .yaml file (its paths begin in `root`), or a data file, folder or glob (paths of images
        begin in `images`). stage: the sources for one stage alone.

        checkpoint: the folder whose tokenizer, chat template and image sizes decide. batch_size: sequences of a
        micro-batch; accumulation: micro-batches of a step. max_length: most tokens of a sequence, all visual tokens
        counted. processes: background processes, 0 to read in the caller's own; prefetch: micro-batches that they are
        ahead, together. max_bad_share: the share of entries that may be unusable before the run ends.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("accumulation", accumulation, 1),
                                   ("processes", processes, 0), ("prefetch", prefetch, 1)):  # fmt: skip
            require(value >= least, name, value, f"{least} or more")
        require(0 <= max_bad_share <= 1, "max_bad_share", max_bad_share, "a share from 0 to 1")
        mixture = (
            data.of(stage) if isinstance(data, Mixture) else load_mixture(data, root=root, images=images, stage=stage)
        )
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.processes, self.prefetch, self.max_bad_share = processes, prefetch, max_bad_share
        self._settings = ReaderSettings(
            mixture=mixture, checkpoint=str(checkpoint), max_length=max_length, template=template
        )
        self._reader = Reader(self._settings)
        self.data, self.encoder = self._reader.open()
        self._order = lru_cache(maxsize=2)(self._epoch_order)
        self._ahead: Ahead | None = None
        self._counts: Counter[str] = Counter()
        self._before: Counter[str] = Counter()
        self.faults: list[Fault] = []
        """The first unusable entries, by name."""

    @property
    def entries(self) -> int:
        """Entries of an epoch."""
        return epoch_size(self.data.ranges, self._settings.mixture.sources)

    def steps_per_epoch(self, world_size: int) -> int:
        """Steps in which every entry of an epoch has come; the last is filled up with some that have."""
        return math.ceil(self.entries / self.global_batch(world_size))

    def global_batch(self, world_size: int) -> int:
        """Sequences of a step over all ranks and micro-batches."""
        return self.batch_size * self.accumulation * world_size

    def batch(self, step: int, micro: int, rank: int, world_size: int) -> list[TrainedSequence]:
        """A rank's micro-batch of a step, which counts on through the epochs from 0.

        The sequences of a step are the same for every world size and accumulation whose global batch is the same.

        Raises:
            InvalidInput: more than `max_bad_share` of the entries cannot be used; names the last.
            InternalError: a background process has died.
        """
        if self.processes == 0:
            read = self._reader[self.numbers(step, micro, rank, world_size)]
        else:
            self._ahead = self._ahead or Ahead(
                self._reader,
                self.numbers,
                accumulation=self.accumulation,
                processes=self.processes,
                prefetch=self.prefetch,
            )
            read = self._ahead.read((step, micro, rank, world_size))
        if read.error:
            raise InvalidInput(read.error)
        self._count(read)
        return read.sequences

    def identity(self) -> str:
        """Hash (hexadecimal) of what the data is, how it is encoded and in which order it comes."""
        made = self._settings
        facts = self.data.identity(), self.seed, made.template, self.encoder.max_length
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def count_on(self, before: Mapping[str, int]) -> None:
        """Takes the counters of all ranks of an earlier part of the run for what is too much to be unusable."""
        self._before = Counter(before)

    def counters(self) -> dict[str, int]:
        """What this loader has read: `entries`, `bad` and `bad/KIND` of every kind, `cut`, and `tokens` with all visual
        tokens."""
        names = ("entries", "bad", *(f"bad/{kind}" for kind in KINDS), "cut", "tokens")
        return {name: self._counts[name] for name in names}

    def process_ids(self) -> list[int]:
        """Ids of the background processes; none before the first batch."""
        return self._ahead.process_ids() if self._ahead else []

    def close(self) -> None:
        """Ends the background processes."""
        self._ahead = None

    def numbers(self, step: int, micro: int, rank: int, world_size: int) -> tuple[int, ...]:
        """Numbers of the entries of a micro-batch; -1 less its number is an entry that fills up an epoch's end."""
        assert 0 <= micro < self.accumulation and 0 <= rank < world_size
        epoch, within = divmod(step, self.steps_per_epoch(world_size))
        batch_G = self._order(epoch, self.global_batch(world_size))[within]
        return tuple(share(batch_G, micro, rank, self.accumulation, world_size).tolist())

    def _epoch_order(self, epoch: int, batch: int) -> np.ndarray:
        entries = epoch_entries(self.data.ranges, self._settings.mixture.sources, self.seed, epoch)
        return epoch_order(entries, self.data.lengths, batch, self.seed, epoch)

    def _count(self, read: Read) -> None:
        self._counts.update({"entries": len(read.sequences), "cut": read.cut, "tokens": read.tokens})
        for fault in read.faults:
            self._counts.update(("bad", f"bad/{fault.kind}"))
        self.faults += read.faults[: FAULTS_KEPT - len(self.faults)]
        bad, seen = (self._before[name] + self._counts[name] for name in ("bad", "entries"))
        if read.faults and bad > most_bad(self.max_bad_share, seen):
            raise InvalidInput(
                f"{bad} of the first {seen} entries cannot be used, more than max_bad_share {self.max_bad_share}; "
                f"the last: {read.faults[-1]}; `focusllava data check` names them all",
                field="data",
            )


def most_bad(share: float, seen: int) -> float:
    """Unusable entries that may have come among so many: their share, and what chance puts on top (3 sigma and 10)."""
    return share * seen + 3 * math.sqrt(share * seen) + 10
