"""The work that every benchmark and every rival gets: random photographs as JPEG files, and one question.

Needs numpy and Pillow only: it also runs in the rivals' environments.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

QUESTION = "What number is on the jersey?"
PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"
"""What the chat template of `benchmarks/random_checkpoint.py` makes of the question."""
SIDE_PX = 672
"""One 672 x 672 image: a base tile and 2 x 2 grid tiles, 576 + 48 * 49 = 2,928 visual tokens."""


@functools.lru_cache(maxsize=64)
def jpeg(seed: int, height: int = SIDE_PX, width: int = SIDE_PX, quality: int = 90) -> bytes:
    """Smooth shapes under fine noise, as a JPEG file.

    The shapes are always the same and the noise is the seed's own: another seed is another file, which is in no cache,
    and the vision-guided sampler keeps nearly as many tokens of it.
    """
    shapes = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    resized = Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).integers(-12, 13, (height, width, 3), dtype=np.int16)
    pixels = np.asarray(resized).astype(np.int16) + noise
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()
