"""Images to visual tokens: decoded on a thread, encoded in batches on the caller's, the latest ones kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from services.common.types import CompressedVisualTokens
from services.encoder.pipeline import EncoderPipeline, PreparedImage
from services.local.request import AskedImage

KEPT_BYTES = 256 * 2**20
"""Most bytes of visual tokens, and of the image files that they belong to, kept for further questions."""


class ImageEncoder:
    """The encoder stage of one process. One thread uses it."""

    def __init__(self, pipeline: EncoderPipeline, max_tiles: int):
        """max_tiles: most tiles in one pass of the vision tower; an image of more goes alone."""
        self.pipeline, self.max_tiles = pipeline, max_tiles
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._decoding: dict[AskedImage, Future[PreparedImage]] = {}
        self._kept: OrderedDict[AskedImage, CompressedVisualTokens] = OrderedDict()

    def is_kept(self, image: AskedImage) -> bool:
        """Whether its visual tokens are there already."""
        return image in self._kept

    def begin(self, images: Iterable[AskedImage]) -> None:
        """Begins to decode and tile what is neither kept nor begun."""
        for image in images:
            if image not in self._kept and image not in self._decoding:
                arguments = (image.data, image.vision_sampler, image.options)
                self._decoding[image] = self._thread.submit(self.pipeline.prepare, *arguments)

    def are_decoded(self, images: Iterable[AskedImage]) -> bool:
        """Whether `encode` need not wait for any of them."""
        return all(
            image in self._kept or (image in self._decoding and self._decoding[image].done()) for image in images
        )

    def tiles(self, image: AskedImage) -> int:
        """Tiles of an image that is not kept; waits for its decoding. Raises as `EncoderPipeline.prepare`."""
        return len(self._decoded(image).tiles.pixels_T3HW)

    def forget(self, images: Iterable[AskedImage]) -> None:
        """Drops what was decoded of images; for whom still wants one it is decoded anew."""
        for image in images:
            if decoding := self._decoding.pop(image, None):
                decoding.cancel()

    def _decoded(self, image: AskedImage) -> PreparedImage:
        self.begin([image])
        return self._decoding[image].result()

    def encode(self, images: Sequence[AskedImage]) -> list[tuple[CompressedVisualTokens, bool]]:
        """Visual tokens of each image, and whether they were kept from before. Raises as `EncoderPipeline.prepare`."""
        if not images:
            return []
        fresh = [image for image in dict.fromkeys(images) if image not in self._kept]
        for batch in self._batches(fresh):
            prepared = [self._decoded(image) for image in batch]
            tokens = self.pipeline.encode(prepared, [image.vision_sampler for image in batch])
            self._kept.update(zip(batch, tokens, strict=True))
            self.forget(batch)
        for image in images:
            self._kept.move_to_end(image)
        found = [(self._kept[image], image not in fresh) for image in images]
        held = sum(map(_bytes_of, self._kept.items()))
        while held > KEPT_BYTES:
            held -= _bytes_of(self._kept.popitem(last=False))
        return found

    def close(self) -> None:
        """Ends its thread."""
        self._thread.shutdown(cancel_futures=True)

    def _batches(self, images: Sequence[AskedImage]) -> Iterator[list[AskedImage]]:
        """Images in order, as many together as `max_tiles` allows."""
        batch: list[AskedImage] = []
        tiles = 0
        for image in images:
            more = self.tiles(image)
            if batch and tiles + more > self.max_tiles:
                yield batch
                batch, tiles = [], 0
            batch, tiles = [*batch, image], tiles + more
        if batch:
            yield batch


def _bytes_of(kept: tuple[AskedImage, CompressedVisualTokens]) -> int:
    image, tokens = kept
    return len(image.data) + tokens.tokens_ND.nbytes
