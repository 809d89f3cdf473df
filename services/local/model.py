"""LocalModel: a checkpoint's two stages in this process, asked as a server is asked.

    turns -> request.py -> images.py (encoder pipeline, batches of tiles) -> engine -> stream.py -> answer

Whoever waits for an answer advances all of them: a `step` encodes at most one batch of images, then runs one step of
the engine.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Self, Unpack

import torch

from focusllava.messages import Images, Settings, Turn, user
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.finding import find_checkpoint
from services.checkpoint.sizing import default_tiles, size_encoder
from services.checkpoint.store import stage_elements
from services.common.errors import FocusError, StageUnavailable, with_field
from services.common.media import MediaLimits
from services.common.settings import build_settings
from services.common.types import CompressedVisualTokens, ImageOptions
from services.compute.memory import device_memory
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from services.llm.engine_stats import StepFailed
from services.llm.settings import LanguageModelSettings
from services.local.images import ImageEncoder
from services.local.request import AskedImage, AskedRequest, read_request, services_errors
from services.local.stream import LocalAnswer, LocalStream
from services.text.token_texts import TokenTexts


class LocalModel:
    """Both stages of one checkpoint in this process. One thread uses it.

        with LocalModel("checkpoints/focusllava-tiny") as model:
            print(model.ask("docs/assets/sample.png", "What number is on the red card?").text)

    A request's settings are those of FocusClient (`focusllava.messages.Settings`). Errors are FocusError, as the stages
    raise it: it names the field.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        device: str = "auto",
        dtype: str = "auto",
        *,
        media: MediaLimits | None = None,
        wait_for_images: bool = True,
        **engine: Any,
    ):
        """Loads the checkpoint, and sets torch's threads and the allocator of this process as a served replica does.

        device: "auto", "cpu", "cuda" or another device of torch; dtype: "auto", "float32", "bfloat16" or "float16";
        media: limits of images; wait_for_images: False lets running answers go on while an image is decoded, as a
        server does, so that timing decides which requests make a batch; engine: other fields of LanguageModelSettings,
        such as kv_cache_bytes. Sizes that are not given follow from the checkpoint and the memory, as in serving.

        Raises InvalidInput naming the field.
        """
        given = {"checkpoint": str(find_checkpoint(checkpoint)), "device": device, "dtype": dtype, **engine}
        settings = build_settings(LanguageModelSettings, given)
        place, weights = settings.place()
        self.engine = _load_engine(settings, place, weights)
        self.pipeline = EncoderPipeline.from_checkpoint(settings.checkpoint, dtype=weights, device=place, limits=media)
        self._wait_for_images = wait_for_images
        self._images = ImageEncoder(self.pipeline, default_tiles(on_gpu=torch.device(place).type == "cuda"))
        self._texts = TokenTexts(self.engine.renderer.tokenizer, self.engine.grammars.token_bytes)
        self._ids = itertools.count()
        self._waiting: deque[tuple[weakref.ref[LocalStream], AskedRequest]] = deque()
        self._running: weakref.WeakValueDictionary[str, LocalStream] = weakref.WeakValueDictionary()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every request, and the threads and processes beside this one. The weights go with the object."""
        self._closed = True
        for stream in (*(ref() for ref, _ in self._waiting), *self._running.values()):
            if stream is not None:
                stream.close()
        self._images.close()
        self.engine.grammars.close()

    def ask(
        self,
        images: Images,
        question: str,
        *,
        history: Sequence[Turn] = (),
        detail: str | None = None,
        reduced_jpeg: bool | None = None,
        map_share: float | None = None,
        **settings: Unpack[Settings],
    ) -> LocalAnswer:
        """Asks about no, one or several images, each read as `ImageFile` says, after the turns of `history`."""
        with services_errors():
            asked = user(question, images=images, detail=detail, reduced_jpeg=reduced_jpeg, map_share=map_share)
        return self.chat([*history, asked], **settings)

    def chat(self, turns: Sequence[Turn], **settings: Unpack[Settings]) -> LocalAnswer:
        """Answers the last of the turns."""
        return self.stream(turns, **settings).result()

    def stream(self, turns: Sequence[Turn], **settings: Unpack[Settings]) -> LocalStream:
        """Answers the last of the turns piece by piece. Streams that are open together are computed in one batch."""
        if self._closed:
            raise StageUnavailable("the model is closed")
        asked = read_request(turns, **settings)
        stream = LocalStream(asked, self.engine.config, self.step, self._abort)
        self._waiting.append((weakref.ref(stream), asked))
        return stream

    def generate(self, conversations: Iterable[Sequence[Turn]], **settings: Unpack[Settings]) -> list[LocalAnswer]:
        """Answers the last turn of every conversation, in one batch. The first that fails is raised and ends all."""
        streams: list[LocalStream] = []
        try:
            streams += [self.stream(turns, **settings) for turns in conversations]
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def encode(
        self, images: Sequence[bytes], *, vision_sampler: bool = True, options: ImageOptions | None = None
    ) -> list[CompressedVisualTokens]:
        """Visual tokens of image files; questions about them with this sampler and these options use the same.

        Raises InvalidInput or TooLarge naming what is wrong with an image.
        """
        options = options or ImageOptions()
        asked = [AskedImage(data=image, vision_sampler=vision_sampler, options=options) for image in images]
        return [tokens for tokens, _ in self._images.encode(asked)]

    def step(self) -> None:
        """Encodes a batch of images at most, then runs one step of the engine; what comes of it goes to the streams."""
        assert self._waiting or self.engine.has_work(), "nobody waits for anything"
        self._admit()
        try:
            events = self.engine.step()
        except StepFailed as failed:
            events = list(failed.events)
            for request_id in failed.request_ids:
                if stream := self._running.pop(request_id, None):
                    stream.fail(failed)
        except BaseException:  # an interrupt: nobody may find what the step has left unfinished
            for request_id, stream in list(self._running.items()):
                self.engine.abort(request_id, broken=True)
                stream.close()
            raise
        for request_id, event in events:
            if stream := self._running.get(request_id):
                stream.deliver(self._texts.filled_in(event))
            else:  # its stream was dropped
                self.engine.abort(request_id)

    def _admit(self) -> None:
        """Hands waiting requests to the engine, in order: as many as one batch of tiles and its queue have room for."""
        for _, asked in itertools.islice(self._waiting, self._images.max_tiles):
            self._images.begin(asked.images)
        ready: list[tuple[LocalStream, AskedRequest]] = []
        batch: set[AskedImage] = set()
        tiles = done = 0
        places = self.engine.scheduler.max_running - len(self.engine.scheduler.waiting)
        for ref, asked in itertools.islice(self._waiting, max(places, 0)):
            stream, busy = ref(), bool(ready) or self.engine.has_work()
            if stream is not None and not stream.ended:
                if busy and not self._wait_for_images and not self._images.are_decoded(asked.images):
                    break
                try:
                    more = self._tiles(asked, batch)
                except Exception as error:
                    stream.fail(error)
                else:
                    if ready and tiles + more > self._images.max_tiles:
                        break
                    ready.append((stream, asked))
                    batch.update(asked.images)
                    tiles += more
            done += 1
        encoded = iter(self._images.encode([image for _, asked in ready for image in asked.images]))
        for _ in range(done):  # only now: where encoding fails, all wait on
            self._images.forget(self._waiting.popleft()[1].images)
        for stream, asked in ready:
            self._enqueue(stream, asked, list(itertools.islice(encoded, len(asked.images))))

    def _tiles(self, asked: AskedRequest, batch: set[AskedImage]) -> int:
        """Tiles that a request adds to a batch of images. Raises FocusError naming the image that is wrong."""
        tiles = 0
        for image, field in zip(asked.images, asked.fields, strict=True):
            if not self._images.is_kept(image) and image not in batch:
                try:
                    tiles += self._images.tiles(image)
                except FocusError as error:
                    raise with_field(error, field) from None
        return tiles

    def _enqueue(
        self, stream: LocalStream, asked: AskedRequest, images: Sequence[tuple[CompressedVisualTokens, bool]]
    ) -> None:
        """Hands a request to the engine; images: visual tokens of each, and whether they were there before."""
        request_id = str(next(self._ids))  # a caller may give several requests one id
        request = dataclasses.replace(
            asked.request, request_id=request_id, images=tuple(tokens for tokens, _ in images)
        )
        try:
            sequence = self.engine.prepare(request)
            self.engine.enqueue(sequence)
        except FocusError as error:
            stream.fail(error)
        else:
            self._running[request_id] = stream
            stream.begin(sequence, images)

    def _abort(self, stream: LocalStream) -> None:
        if stream.engine_id is not None:
            self._running.pop(stream.engine_id, None)
            self.engine.abort(stream.engine_id)


def _load_engine(settings: LanguageModelSettings, device: str, dtype: torch.dtype) -> Engine:
    """The engine as a replica loads it, in what the encoder leaves of the memory that both share."""
    gpu_part = 1.0
    if torch.device(device).type == "cuda":  # GPU only
        memory, config = device_memory(device), FocusLlavaConfig.load(settings.checkpoint)
        encoder = size_encoder(
            config, stage_elements(settings.checkpoint, "encoder"), dtype=dtype, on_gpu=True, room=memory.free
        )
        most = settings.memory_share * memory.total
        gpu_part = (min(most, memory.free) - encoder.bytes) / most
    sizes = settings.sizes(settings.checkpoint, device, dtype, memory_share=settings.memory_share, gpu_part=gpu_part)
    engine = Engine.from_checkpoint(settings.checkpoint, settings.sized(sizes), dtype=dtype, device=device)
    if torch.device(device).type == "cuda":  # GPU only
        engine.warm_up()
    return engine
