"""An image of a request with its visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

from focusllava.v1 import encoder_pb2, focus_pb2
from services.gateway.admission import AdmittedImage


@dataclass(frozen=True)
class ReadImage:
    """An image, with the options that its visual tokens are of."""

    image: AdmittedImage
    tokens: encoder_pb2.CompressedVisualTokens
    cached: bool

    def info(self) -> focus_pb2.ImageInfo:
        """What the caller is told of it."""
        tokens = self.tokens
        return focus_pb2.ImageInfo(
            content_hash=tokens.content_hash,
            cached=self.cached,
            visual_tokens_uncompressed=tokens.uncompressed_tokens,
            visual_tokens_sampled=tokens.tokens.shape[0] if tokens.tokens.shape else 0,
            notes=tokens.notes,
        )
