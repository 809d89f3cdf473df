"""Visual tokens as they come to the LLM stage: read from a request or the node's shelf, and left there for the next.

A gateway of another node sends the bytes once; the stage leaves them on its own node's shelf under their digest and
says so, and from then on the gateway names them to whatever replica sees that shelf.
"""

from __future__ import annotations

import dataclasses

from services.common import wire
from services.common.shelf import Shelf
from services.common.types import CompressedVisualTokens, GenerateRequest
from services.llm.prefix import image_digest


class Received:
    """Reads requests. Thread-safe; every method may copy or hash megabytes."""

    def __init__(self, sizes: wire.RequestSizes, shelf: Shelf | None, shelf_bytes: int):
        """sizes: the most that a request may hold; shelf_bytes: most that may lie on the shelf, 0 where nothing may."""
        self._sizes, self.shelf, self._shelf_bytes = sizes, shelf, shelf_bytes

    def read(self, message: wire.GenerateMessage) -> GenerateRequest:
        """The request; each of its images has a digest. Raises InvalidInput, WrongFingerprint or NotOnShelf."""
        self._sizes.check(message)
        request = wire.generate_request_from_proto(message, self.shelf)
        images = tuple(
            image if image.digest else dataclasses.replace(image, digest=image_digest(image))
            for image in request.images
        )
        return dataclasses.replace(request, images=images)

    def names(self, request: GenerateRequest) -> list[str]:
        """Leaves the images of a request that was taken on the shelf; a name each, empty where there is no room."""
        return [self._name(image) for image in request.images]

    def _name(self, image: CompressedVisualTokens) -> str:
        assert image.digest is not None, "`read` gave it one"
        name = image.digest.hex()
        if self.shelf is None or not self._shelf_bytes:
            return ""
        if self.shelf.get(name) is None and not wire.shelve(image, self.shelf, name, self._shelf_bytes):
            return ""
        return name
