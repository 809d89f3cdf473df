"""Reads all of a mixture as training would, in several processes, and reports what is in it and what is wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from services.common.errors import FocusError, InternalError, TooLarge
from services.common.media import open_image
from training.data.background import background
from training.data.encoding import ConversationEncoder
from training.data.entries import Conversation
from training.data.faults import KINDS, EntryFault, Fault
from training.data.mixture import ConversationData, Mixture

PART = 64
"""Entries that a process reads at a time."""
BAR = 40
"""Longest bar of a histogram, in letters."""


@dataclass(kw_only=True)
class Report:
    """What was found; parts of it are added up."""

    entries: int = 0
    images: Counter[int] = field(default_factory=Counter)
    """Images of an entry -> usable entries."""
    answers: Counter[int] = field(default_factory=Counter)
    """Answers of an entry -> usable entries."""
    tokens: Counter[int] = field(default_factory=Counter)
    """Tokens of a sequence with all visual tokens -> sequences; empty without a checkpoint."""
    sides: Counter[int] = field(default_factory=Counter)
    """Longest side of an image in pixels -> images."""
    cut: int = 0
    cut_tokens: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for name in ("entries", "images", "answers", "tokens", "sides", "cut", "cut_tokens", "faults"):
            both = getattr(self, name)
            both += getattr(other, name)
            setattr(self, name, both)

    def lines(self, max_length: int | None) -> Iterator[str]:
        """The report for a person; faults first, so that the counts are what is seen at the end."""
        yield from map(str, self.faults)
        usable = self.entries - len(self.faults)
        yield f"entries             {self.entries:>12,}"
        for name, count in (("without image", self.images[0]), ("of one image", self.images[1]),
                            ("of several images", usable - self.images[0] - self.images[1])):  # fmt: skip
            yield f"  {name:<18}{count:>12,}"
        yield f"answers             {self.answers_in_all:>12,}  (of an entry: {spread(self.answers)})"
        yield f"images              {self.sides.total():>12,}"
        yield f"faults              {len(self.faults):>12,}"
        kinds = Counter(fault.kind for fault in self.faults)
        for kind in KINDS:
            if kinds[kind]:
                yield f"  {kind:<18}{kinds[kind]:>12,}"
        if self.tokens:
            yield f"cut at {max_length:,} tokens: {self.cut:,} entries, {self.cut_tokens:,} tokens in all"
            yield f"tokens of a sequence, all visual tokens counted ({spread(self.tokens)})"
            yield from histogram(self.tokens)
        if self.sides:
            yield f"longest side of an image, in pixels ({spread(self.sides)})"
            yield from histogram(self.sides)

    @property
    def answers_in_all(self) -> int:
        return sum(answers * entries for answers, entries in self.answers.items())


def spread(counts: Counter[int]) -> str:
    """Least, median, 99th percentile and most of what is counted."""
    if not counts:
        return "none"
    points = [percentile(counts, share) for share in (0, 0.5, 0.99, 1)]
    return "least {:,}, median {:,}, 99 % {:,}, most {:,}".format(*points)


def percentile(counts: Counter[int], share: float) -> int:
    """The least value that at least this share of what is counted does not exceed."""
    left = share * counts.total()
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return max(counts)


def histogram(counts: Counter[int]) -> Iterator[str]:
    """Lines of a histogram; each bin ends where a power of two or the half way to the next one is."""
    bins: Counter[int] = Counter()
    ends = sorted({base * step // 2 for base in (2**n for n in range(1, 40)) for step in (2, 3)})
    for value, count in counts.items():
        bins[next(end for end in ends if value <= end)] += count
    shown = [end for end in ends if min(bins) <= end <= max(bins)]
    for end in shown:
        yield f"  to {end:>9,}{bins[end]:>12,}  {'#' * -(-BAR * bins[end] // max(bins.values()))}"


class _Checker:
    """One process's view of the data."""

    def __init__(self, mixture: Mixture, checkpoint: str | None, max_length: int | None):
        self.data = ConversationData(mixture)
        self.encoder = None
        if checkpoint is not None:
            self.encoder = ConversationEncoder.from_checkpoint(checkpoint, max_length=max_length)

    def part(self, entries: Sequence[int]) -> Report:
        report = Report(entries=len(entries))
        for entry in entries:
            try:
                self._entry(entry, report)
            except EntryFault as error:
                name = f"{self.data.name(entry)}, {self.data.place(entry)}"
                report.faults.append(Fault.of(error, name))
        return report

    def _entry(self, entry: int, report: Report) -> None:
        conversation, images = self.data.read(entry)
        sides = (
            self._sides(images) if self.encoder is None else self._encode(self.encoder, conversation, images, report)
        )
        report.images[len(images)] += 1
        report.answers[conversation.answers] += 1
        report.sides.update(sides)

    def _encode(
        self, encoder: ConversationEncoder, conversation: Conversation, images: list[bytes], report: Report
    ) -> list[int]:
        tiles = [encoder.tiles(data) for data in images]
        encoded = encoder.encode(conversation, tiles)
        report.tokens[encoded.tokens] += 1
        report.cut += encoded.cut > 0
        report.cut_tokens += encoded.cut
        return [max(one.image_size_hw) for one in tiles]

    def _sides(self, images: list[bytes]) -> list[int]:
        try:
            return [max(open_image(data).size_hw) for data in images]
        except FocusError as error:
            wrong_size = isinstance(error, TooLarge) or "narrower" in str(error)
            raise EntryFault("image_size" if wrong_size else "corrupt_image", str(error)) from None


_checker: _Checker | None = None
"""The checker of this background process."""


def _begin(mixture: Mixture, checkpoint: str | None, max_length: int | None) -> None:
    global _checker
    _checker = _Checker(mixture, checkpoint, max_length)


def _part(first: int, last: int) -> Report:
    assert _checker is not None
    return _checker.part(range(first, last))


def check(
    mixture: Mixture,
    checkpoint: str | None = None,
    *,
    max_length: int | None = None,
    processes: int | None = None,
    progress: Callable[[Report, int], None] | None = None,
) -> tuple[Report, int | None]:
    """Reads every entry once; the report, and the longest length that a sequence may have.

    checkpoint: without one, nothing is tokenised. processes: None as many as there are cores, 0 this one alone.
    progress: called with what has been found so far and the number of entries.
    Raises InvalidInput where the mixture or the checkpoint cannot be opened.
    """
    here = _Checker(mixture, checkpoint, max_length)
    entries, report = len(here.data), Report()
    limit = here.encoder.max_length if here.encoder else None
    firsts = range(0, entries, PART)
    lasts = [min(first + PART, entries) for first in firsts]
    processes = len(os.sched_getaffinity(0)) if processes is None else processes

    def add_up(parts: Iterator[Report]) -> None:
        for part in parts:
            report.add(part)
            if progress:
                progress(report, entries)

    if processes == 0:
        add_up(here.part(range(first, last)) for first, last in zip(firsts, lasts, strict=True))
        return report, limit
    arguments = mixture, checkpoint, max_length
    try:
        with ProcessPoolExecutor(processes, mp_context=background(), initializer=_begin, initargs=arguments) as pool:
            add_up(pool.map(_part, firsts, lasts))
    except BrokenProcessPool:
        raise InternalError(
            "a process that read the data has died, of too little memory perhaps", field="data"
        ) from None
    return report, limit
