"""An answer's accounting and log probabilities in words, for terminals."""

from __future__ import annotations

import math

from focusllava.messages import Answer


def accounting_lines(answer: Answer) -> list[str]:
    """A few lines: how images were read, visual tokens at each stage, KV cache, time to first token."""
    usage = answer.usage
    lines = []
    for number, image in enumerate(answer.images, start=1):
        source = "from the cache" if image.cached else "encoded"
        lines.append(f"image {number}        {source}{''.join(f'; {note}' for note in image.notes)}")
    if usage.visual_tokens_uncompressed:
        kept = f"{usage.visual_tokens_kept} kept"
        if usage.prune_layer:
            kept += f" from layer {usage.prune_layer} of {usage.num_layers} on"
        lines.append(
            f"visual tokens  {usage.visual_tokens_uncompressed} uncompressed -> {usage.visual_tokens_sampled} "
            f"after the vision-guided sampler -> {kept}"
        )
        lines.append(f"converted      {usage.converted_share_percent:.1f} % of the uncompressed tokens (Sec. 4.4)")
    if usage.compression_level:
        lines.append(f"under load     compressed at level {usage.compression_level} of the server's own")
    lines.append(
        f"KV cache       {_size(usage.kv_bytes)}, without text-guided pruning {_size(usage.kv_unpruned_bytes)}"
    )
    lines.append(
        f"first token    {usage.time_to_first_token_ms:.0f} ms; {usage.completion_tokens} tokens generated, "
        f"end: {answer.finish_reason}"
    )
    return lines


def logprob_lines(answer: Answer) -> list[str]:
    """One line a token: how likely it was, then the alternatives; none unless they were asked for."""
    return [
        "  ".join(f"{token.text!r} {100 * math.exp(token.logprob):.1f} %" for token in (entry.chosen, *entry.top))
        for entry in answer.logprobs
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
