"""One step over the decoder. `ModelRunner.run` takes one of two ways:

    only decodes     decode    all layers of one token a sequence; on a GPU the replay of a CUDA graph
    anything else    lower     layers 0..k-1 of all tokens, then the text-guided selection where a prompt is complete
                     extend    the scheduler adds first chunks of what was selected
                     upper     layers k..L-1 of what goes on

Both go through `Decoder.run_layers`, which draws the three ways through a layer.

Legend: S tokens of a packed half step, n sequences that decode, N visual tokens, K of them kept, T instruction tokens,
D width, V vocabulary, m sequences that get a next token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.common.types import PruneDecision, SamplerSettings
from services.llm.attention import DecodeBatch, PackedStep
from services.llm.kernels import choose_kernels
from services.llm.kernels.decode_graphs import Capture, DecodeGraphs, cuda_capture
from services.llm.kv_cache import LOWER, UPPER, KVCache
from services.llm.model import Decoder, Rotary
from services.llm.scheduler import Chunk, Step
from services.llm.sequence import Sequence
from services.sampler.text_guided import keep


@dataclass(frozen=True, kw_only=True)
class HalfStep:
    """What the upper half needs of the lower one."""

    hidden_nD: torch.Tensor
    """Decoding tokens between the halves."""
    position_n: torch.Tensor
    rows_LnB: list[torch.Tensor]
    upper_lengths_n: torch.Tensor


class ModelRunner:
    """Runs steps for sequences that hold their pages already. Called in inference mode."""

    def __init__(self, decoder: Decoder, cache: KVCache, prune_layer: int):
        self.decoder, self.cache, self.prune_layer = decoder, cache, prune_layer
        self.kernels = choose_kernels(decoder.device, decoder.dtype)
        self._batch = DecodeBatch(cache)
        self.graphs: DecodeGraphs | None = None
        if decoder.device.type == "cuda":  # GPU only
            self.use_graphs(cuda_capture())

    def use_graphs(self, capture: Capture) -> None:
        """Has steps that only decode recorded from now on, once a shape, then replayed."""
        self.graphs = DecodeGraphs(self._whole_pass, capture, null_row=self.cache.null_row)

    def record_graphs(self, most: int) -> bool:
        """Records now what up to `most` sequences of any length will replay; False where there are no graphs."""
        if self.graphs is not None:
            blocks = self._batch.most_blocks(self.decoder.context)
            layers = [group.num_layers for group in self.cache.groups]
            self.graphs.record(most, blocks, layers, self.cache.key.device)
        return self.graphs is not None

    def run(self, step: Step, extend: Callable[[Step], None]) -> tuple[torch.Tensor, list[Sequence]]:
        """Returns logits [m, V] and their m sequences: all that decode or end their prefill.

        extend: adds to the step, once it has selected, what goes on in its upper half."""
        if step.only_decodes:
            return self.decode(step), step.decode
        half = self.lower(step)
        extend(step)
        return self.upper(step, half)

    def decode(self, step: Step) -> torch.Tensor:
        """A step that only decodes: logits [n, V]."""
        numbers_3n = _decoding(step).to(self.decoder.device)
        rows = self._batch.rows([s.request_id for s in step.decode])
        logits_nV = (self.graphs or self._whole_pass)(numbers_3n[0], numbers_3n[1:], rows)
        for sequence in step.decode:
            sequence.kv_lens = [length + 1 for length in sequence.kv_lens]
        return logits_nV

    def lower(self, step: Step) -> HalfStep:
        """Layers 0..k-1 of the step, then the selection of what goes on in prompts that are complete."""
        decoder, device, n = self.decoder, self.decoder.device, len(step.decode)
        numbers_3n = _decoding(step)
        ids = [numbers_3n[0], *(c.sequence.tokens(c.start, c.start + c.count) for c in step.lower)]
        positions = [numbers_3n[1], *(torch.arange(c.start, c.start + c.count) for c in step.lower)]
        position_S = torch.cat(positions).to(device)
        upper_lengths_n = numbers_3n[2].to(device) + 1
        rows_LnB = self._batch.rows([s.request_id for s in step.decode]) if n else []
        hidden_SD = self.cache.hidden.new_empty(0, decoder.config.hidden_size)  # no token may be left for these layers
        if len(position_S):
            hidden_SD = decoder.embed(torch.cat(ids).to(device))
            self._put_visual_tokens(hidden_SD, n, step.lower)
            packed = PackedStep(
                self.cache,
                self.kernels,
                LOWER,
                rows_LnB=rows_LnB[LOWER] if n else None,
                lengths_n=position_S[:n] + 1 if n else None,
                chunks=step.lower,
            )
            hidden_SD = decoder.run_layers(hidden_SD, decoder.rotary(position_S), 0, self.prune_layer, packed)
        if step.lower:
            places = [
                self.cache.hidden_index(chunk.sequence.request_id, index_S)
                for chunk, index_S in zip(step.lower, positions[1:], strict=True)
            ]
            self.cache.hidden.flatten(0, 1).index_copy_(0, torch.cat(places), hidden_SD[n:])
        for chunk in step.lower:
            chunk.sequence.kv_lens[LOWER] += chunk.count
        for sequence in step.selecting:
            if sequence.pruning and sequence.decision is None:
                sequence.decision = self._decide(sequence, sequence.pruning)
            sequence.select()
        return HalfStep(
            hidden_nD=hidden_SD[:n], position_n=position_S[:n], rows_LnB=rows_LnB, upper_lengths_n=upper_lengths_n
        )

    def upper(self, step: Step, half: HalfStep) -> tuple[torch.Tensor, list[Sequence]]:
        """Layers k..L-1; returns what `run` does."""
        decoder, device, n = self.decoder, self.decoder.device, len(step.decode)
        index = [chunk.sequence.upper_index[chunk.start : chunk.start + chunk.count] for chunk in step.upper]  # type: ignore[index]
        hidden, positions = [half.hidden_nD], [half.position_n]
        for chunk, index_S in zip(step.upper, index, strict=True):
            place_S = self.cache.hidden_index(chunk.sequence.request_id, index_S)
            hidden.append(self.cache.hidden.flatten(0, 1)[place_S])
            positions.append(index_S.to(device))
        if not n and not step.upper:
            return torch.empty(0, 0), []
        ends = [c.start + c.count == len(c.sequence.upper_index) for c in step.upper]  # type: ignore[arg-type]
        sequences = [*step.decode, *(c.sequence for c, end in zip(step.upper, ends, strict=True) if end)]
        packed = PackedStep(
            self.cache,
            self.kernels,
            UPPER,
            rows_LnB=half.rows_LnB[UPPER] if n else None,
            lengths_n=half.upper_lengths_n if n else None,
            chunks=step.upper,
            last_rows=ends,
        )
        rotary = decoder.rotary(torch.cat(positions))
        hidden_mD = decoder.run_layers(torch.cat(hidden), rotary, self.prune_layer, decoder.num_layers, packed)
        for sequence in step.decode:
            sequence.kv_lens = [length + 1 for length in sequence.kv_lens]
        for chunk in step.upper:
            chunk.sequence.kv_lens[UPPER] += chunk.count
        for sequence in sequences[n:]:
            sequence.in_prefill = False
            self.cache.end_prefill(sequence.request_id)
        if not sequences:
            return torch.empty(0, 0), []
        return decoder.logits(hidden_mD), sequences

    def _whole_pass(self, tokens_n: torch.Tensor, held_2n: torch.Tensor, rows_LnB: list[torch.Tensor]) -> torch.Tensor:
        """Logits [n, V]. held_2n: tokens before it in each KV cache group; in the lower one that is its position."""
        decoder, cache = self.decoder, self.cache
        rotary = decoder.rotary(held_2n[LOWER])
        hidden_nD = decoder.embed(tokens_n)
        for group, (first, last) in enumerate(((0, self.prune_layer), (self.prune_layer, decoder.num_layers))):
            packed = PackedStep(cache, self.kernels, group, rows_LnB=rows_LnB[group], lengths_n=held_2n[group] + 1)
            hidden_nD = decoder.run_layers(hidden_nD, rotary, first, last, packed)
        for pool in (cache.key, cache.value):  # sequences that fill a graph up have written there
            pool[cache.null_row].zero_()
        return decoder.logits(hidden_nD)

    def _put_visual_tokens(self, hidden_SD: torch.Tensor, start: int, chunks: list[Chunk]) -> None:
        """Visual tokens take the place of their placeholders' embeddings; the chunks begin at row `start`."""
        rows, features = [], []
        for chunk in chunks:
            sequence = chunk.sequence
            bounds = torch.tensor([chunk.start, chunk.start + chunk.count])
            first, last = torch.searchsorted(sequence.visual_N, bounds).tolist()
            if first < last:
                assert sequence.visual_ND is not None
                rows.append(sequence.visual_N[first:last] - chunk.start + start)
                features.append(sequence.visual_ND[first:last])
            start += chunk.count
        if rows:
            device = hidden_SD.device
            parts = [part.to(device, hidden_SD.dtype, non_blocking=True) for part in features]
            hidden_SD.index_copy_(0, torch.cat(rows).to(device), torch.cat(parts) if len(parts) > 1 else parts[0])

    def _decide(self, sequence: Sequence, pruning: SamplerSettings) -> PruneDecision:
        """Eq. 6-9 on the hidden states entering layer k of the instruction and of every visual token."""
        instruction = torch.tensor(sequence.prompt.instruction_positions)
        position_S = torch.cat([instruction, sequence.visual_N])
        rotary: Rotary = self.decoder.rotary(position_S.to(self.decoder.device))
        hidden_SD = self.cache.hidden.flatten(0, 1)[self.cache.hidden_index(sequence.request_id, position_S)]
        importance_N = self.decoder.visual_importance(hidden_SD, rotary, self.prune_layer, len(instruction)).cpu()
        return PruneDecision(
            kept=keep(importance_N, pruning),
            importance=importance_N,
            layer=self.prune_layer,
            threshold=pruning.threshold,
            keep_ratio=pruning.keep_ratio,
        )


def _decoding(step: Step) -> torch.Tensor:
    """int64 [3, n], CPU: last tokens of the sequences that decode, and the tokens held in each KV cache group."""
    return torch.tensor(
        [[s.output_ids[-1] for s in step.decode], *([s.kv_lens[g] for s in step.decode] for g in (LOWER, UPPER))],
        dtype=torch.int64,
    )
