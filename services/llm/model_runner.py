"""The two passes over the decoder: prefill (layers 0..k-1, text-guided pruning, layers k..L-1) and decode.

Legend: S tokens of a packed pass, n sequences, N visual tokens, K of them kept, T instruction tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from services.common.types import PruneDecision
from services.llm.attention import DecodeStep, PrefillStep, decode_rows
from services.llm.kv_cache import KVCache
from services.llm.model import Decoder, Rotary
from services.llm.sequence import Sequence


class ModelRunner:
    """Runs passes for sequences that hold their pages already. Called in inference mode."""

    def __init__(self, decoder: Decoder, cache: KVCache, prune_layer: int):
        self.decoder, self.cache, self.prune_layer = decoder, cache, prune_layer
        self._batch: tuple[tuple[Sequence, ...], list[torch.Tensor]] = ((), [])

    def prefill(self, sequences: Seq[Sequence]) -> torch.Tensor:
        """Whole prompts, packed: fills the KV cache and returns the last tokens' logits [n, V]."""
        decoder, device = self.decoder, self.decoder.device
        lengths = [sequence.prompt_len for sequence in sequences]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        request_ids = [sequence.request_id for sequence in sequences]

        ids_S = torch.tensor([token for s in sequences for token in s.prompt.input_ids], device=device)
        position_S = torch.cat([torch.arange(length) for length in lengths]).to(device)
        visual = [s.prompt.visual_positions() + start for s, start in zip(sequences, starts, strict=True)]
        visual_S = torch.cat(visual).to(device)
        # A placeholder's id may lie outside the embedding table.
        hidden_SD = decoder.embed(ids_S.index_fill(0, visual_S, 0))
        features = [sequence.visual_ND for sequence in sequences if sequence.visual_ND is not None]
        if features:
            hidden_SD[visual_S] = torch.cat(features).to(device, hidden_SD.dtype)

        rotary = decoder.rotary(position_S)
        step: PrefillStep = PrefillStep(self.cache, 0, request_ids, lengths)
        hidden_SD = decoder.run_layers(hidden_SD, rotary, 0, self.prune_layer, step)

        keep_S = torch.ones(len(ids_S), dtype=torch.bool, device=device)
        for sequence, start, visual_N in zip(sequences, starts, visual, strict=True):
            if sequence.threshold < 1:
                visual_N = visual_N.to(device)
                kept_K = self._prune(sequence, start, visual_N, hidden_SD, rotary)
                keep_S[visual_N] = False
                keep_S[visual_N[kept_K]] = True
            sequence.kv_lens = [sequence.prompt_len, sequence.kept_prompt_len]
            sequence.next_position = sequence.prompt_len
            sequence.visual_ND = None

        kept_lengths = [sequence.kept_prompt_len for sequence in sequences]
        if kept_lengths != lengths:
            hidden_SD = hidden_SD[keep_S]
            rotary = (rotary[0][:, keep_S], rotary[1][:, keep_S])
        step = PrefillStep(self.cache, 1, request_ids, kept_lengths)
        hidden_SD = decoder.run_layers(hidden_SD, rotary, self.prune_layer, decoder.num_layers, step)
        last_n = torch.tensor(kept_lengths).cumsum(0).to(device) - 1
        return decoder.logits(hidden_SD[last_n])

    def _prune(
        self, sequence: Sequence, start: int, visual_N: torch.Tensor, hidden_SD: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        """Decides which visual tokens go on (int64 [K], indices into visual_N) and gives back the others' KV cache."""
        instruction_T = torch.tensor(sequence.prompt.instruction_positions, device=self.decoder.device) + start
        kept_K, importance_N = self.decoder.select_visual_tokens(
            hidden_SD, rotary, self.prune_layer, instruction_T, visual_N, sequence.threshold
        )
        sequence.decision = PruneDecision(
            kept=kept_K.cpu(), importance=importance_N.cpu(), layer=self.prune_layer, threshold=sequence.threshold
        )
        removed = sequence.prompt_len - sequence.kept_prompt_len
        self.cache.trim(sequence.request_id, 1, sequence.max_kv_len - removed)
        return kept_K

    def decode(self, sequences: Seq[Sequence]) -> torch.Tensor:
        """One more token of each sequence: returns logits [n, V]."""
        decoder, device = self.decoder, self.decoder.device
        if self._batch[0] != tuple(sequences):
            # Block tables do not change while a sequence decodes: padded once for as long as the batch stays.
            request_ids = [sequence.request_id for sequence in sequences]
            rows = [decode_rows(self.cache, group, request_ids) for group in range(2)]
            self._batch = (tuple(sequences), rows)
        held = [[sequence.kv_lens[group] for sequence in sequences] for group in range(2)]
        numbers = torch.tensor(
            [[s.output_ids[-1] for s in sequences], [s.next_position for s in sequences], *held], device=device
        )
        hidden_nD, rotary = decoder.embed(numbers[0]), decoder.rotary(numbers[1])
        layers = (0, self.prune_layer, decoder.num_layers)
        for group in range(2):
            step = DecodeStep(self.cache, group, self._batch[1][group], numbers[2 + group], max(held[group]))
            hidden_nD = decoder.run_layers(hidden_nD, rotary, layers[group], layers[group + 1], step)
        for sequence in sequences:
            sequence.kv_lens = [length + 1 for length in sequence.kv_lens]
            sequence.next_position += 1
        return decoder.logits(hidden_nD)

    def forget_batch(self) -> None:
        """Must follow every release of block tables."""
        self._batch = ((), [])
