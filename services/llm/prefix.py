"""What a block of prompt tokens is known by, so that a later request with the same beginning finds it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from services.common.types import CompressedVisualTokens
from services.llm.prompt import Prompt


def block_keys(prompt: Prompt, images: Sequence[CompressedVisualTokens], block_size: int) -> tuple[bytes, ...]:
    """One key a full block of the prompt: a hash of the key before it and of the block's own tokens.

    A text token counts by its id, a visual token by its image and its index there. So equal keys mean equal tokens
    from the prompt's first one on, at equal positions.
    """
    content = array("q", prompt.input_ids)
    for first, last in prompt.visual_spans:
        content[first:last] = array("q", range(-1, first - last - 1, -1))  # no text token has a negative id
    digests = [_image_digest(image) for image in images]
    keys: list[bytes] = []
    key = b""
    for start in range(0, len(content) - block_size + 1, block_size):
        end = start + block_size
        block = hashlib.blake2b(key + content[start:end].tobytes(), digest_size=32)
        for (first, last), digest in zip(prompt.visual_spans, digests, strict=True):
            if first < end and start < last:
                block.update(digest)
        key = block.digest()
        keys.append(key)
    return tuple(keys)


def _image_digest(image: CompressedVisualTokens) -> bytes:
    """What decides an image's visual tokens: its bytes, the model, and what the vision-guided sampler chose."""
    branches = image.branch_ids_M.cpu().numpy().tobytes()
    parts = (image.content_hash, image.model_fingerprint, image.map_hw, len(image.tokens_ND), branches)
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).digest()
