"""Entries by their numbers, as training sequences; another entry takes the place of one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

import torch.utils.data

from services.common.errors import InvalidInput
from services.modeling.packing import TrainedSequence
from training.data.encoding import ConversationEncoder, Encoded, Template
from training.data.faults import EntryFault, Fault
from training.data.mixture import ConversationData, Mixture

MOST_TRIED = 200
"""Entries that are tried one after another in place of one that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """Entries as sequences."""

    sequences: list[TrainedSequence]
    faults: list[Fault]
    """The unusable ones of the entries themselves, not of those that were tried in place of them."""
    cut: int
    """Sequences that were cut off at the longest length."""
    tokens: int
    """Tokens of the sequences with all visual tokens."""
    error: str = ""
    """Why there are none, as a message for the user: an exception would come from its process with a traceback."""


@dataclass(frozen=True, kw_only=True)
class ReaderSettings:
    """What a reader is made of."""

    mixture: Mixture
    checkpoint: str
    max_length: int | None
    template: Template


class Reader(torch.utils.data.Dataset[Read]):
    """Entries by their numbers. A background process gets the settings alone and opens everything for itself."""

    def __init__(self, settings: ReaderSettings):
        self.settings = settings
        self.data: ConversationData | None = None
        self.encoder: ConversationEncoder | None = None

    def __getstate__(self) -> ReaderSettings:
        return self.settings

    def __setstate__(self, settings: ReaderSettings) -> None:
        self.__init__(settings)  # type: ignore[misc]

    def open(self) -> tuple[ConversationData, ConversationEncoder]:
        if self.data is None or self.encoder is None:
            made = self.settings
            self.data = ConversationData(made.mixture)
            self.encoder = ConversationEncoder.from_checkpoint(
                made.checkpoint, max_length=made.max_length, template=made.template
            )
        return self.data, self.encoder

    def __getitem__(self, numbers: tuple[int, ...]) -> Read:
        try:
            return self._read(numbers)
        except InvalidInput as error:
            return Read(sequences=[], faults=[], cut=0, tokens=0, error=str(error))

    def _read(self, numbers: tuple[int, ...]) -> Read:
        data, encoder = self.open()
        sequences, faults, cut, tokens = [], [], 0, 0
        for number in numbers:
            filling, entry = number < 0, -1 - number if number < 0 else number
            try:
                encoded = data.encode(entry, encoder)
            except EntryFault as error:
                if not filling:  # it has been counted when it came before
                    faults.append(Fault.of(error, data.name(entry)))
                encoded = self._instead(entry)
            sequences.append(encoded.sequence)
            cut += encoded.cut > 0
            tokens += encoded.tokens
        return Read(sequences=sequences, faults=faults, cut=cut, tokens=tokens)

    def _instead(self, entry: int) -> Encoded:
        data, encoder = self.open()
        message = "it is the only one of its kind"
        for other in data.successors(entry, MOST_TRIED):
            try:
                return data.encode(other, encoder)
            except EntryFault as error:
                message = str(Fault.of(error, data.name(other)))
        raise InvalidInput(f"{data.name(entry)} and what follows it cannot be used: {message}", field="data")
