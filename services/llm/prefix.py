"""What a block of prompt tokens is known by, so that a later request with the same beginning finds it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import torch

from services.common.types import CompressedVisualTokens
from services.text.prompt import Prompt


def block_keys(prompt: Prompt, images: Sequence[CompressedVisualTokens], block_size: int) -> tuple[bytes, ...]:
    """One key a full block of the prompt: a hash of the key before it and of the block's own tokens.

    A text token counts by its id, a visual token by its image and its index there. So equal keys mean equal tokens
    from the prompt's first one on, at equal positions, whatever a caller claims of them.
    """
    content = array("q", prompt.input_ids)
    for first, last in prompt.visual_spans:
        content[first:last] = array("q", range(-1, first - last - 1, -1))  # no text token has a negative id
    digests = [image.digest or image_digest(image) for image in images]
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


def image_digest(image: CompressedVisualTokens) -> bytes:
    """The visual tokens themselves, and what they claim to come of: image, model, the vision-guided sampler's choices.

    The claims alone would not do: whoever sends other tokens under an image's hash would change everybody's answers.
    """
    branches = image.branch_ids_M.cpu().numpy().tobytes()
    tokens_ND = image.tokens_ND.cpu()
    kind = (str(tokens_ND.dtype), tuple(tokens_ND.shape))  # equal bytes of another dtype are other numbers
    claims = (image.content_hash, image.model_fingerprint, image.map_hw, kind, branches)
    digest = hashlib.sha256(repr(claims).encode())  # processors have instructions for it, which blake2b lacks
    digest.update(tokens_ND.reshape(-1).view(torch.uint8).numpy().data)  # as bytes: numpy has no bfloat16
    if image.scales_NG is not None:
        digest.update(image.scales_NG.cpu().numpy().tobytes())
    return digest.digest()
