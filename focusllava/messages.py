"""What goes into a question and comes out of an answer."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Protocol, TypedDict

from focusllava.errors import FocusClientError
from focusllava.focus_maps import FocusMaps

MAX_IMAGES_BYTES = 256 * 2**20
"""Most bytes of all images of one request: no message carries more."""


class PillowImage(Protocol):
    """The part of PIL.Image.Image that is used here: only who passes one needs Pillow."""

    def save(self, fp: Any, format: str, /, **options: Any) -> None: ...
    def getexif(self) -> Any: ...


ImageSource = str | os.PathLike[str] | bytes | BinaryIO | PillowImage
"""A path, the bytes of an image file, an open binary file, or a PIL image, which is sent as PNG, or TIFF where PNG
has not its mode, with its EXIF orientation."""
Images = ImageSource | Iterable[ImageSource] | None
"""One image, several, or none."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image's part of a turn, with how the server is to read it."""

    data: bytes
    """The bytes of an image file."""
    detail: str | None = None
    """"low" shows the model the whole image in one tile alone, for a fraction of the visual tokens; "high", "auto" and
    None add the tiles of the grid."""
    reduced_jpeg: bool | None = None
    """Whether a large JPEG may be decoded at reduced scale, which is faster and changes its pixels a little; None
    follows the served checkpoint."""
    map_share: float | None = None
    """The largest share of the feature map's tokens that the vision-guided sampler leaves, in (0, 1]: regions that need
    their detail least are coarsened first. None leaves it its own choice."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation; a part is words, an image, or the bytes of an image file."""

    role: str
    parts: tuple[str | bytes | ImageFile, ...]


def user(text: str, *, images: Images = None, detail: str | None = None, reduced_jpeg: bool | None = None,
         map_share: float | None = None) -> Turn:  # fmt: skip
    """A user's turn: the images, each read as `ImageFile` says, then the words.

    Raises FocusClientError where an image cannot be read.
    """
    reading: dict[str, Any] = {"detail": detail, "reduced_jpeg": reduced_jpeg, "map_share": map_share}
    files = [
        ImageFile(data=read_image(image, f"images[{number}]"), **reading)
        for number, image in enumerate(_several(images))
    ]
    plain = all(value is None for value in reading.values())
    return Turn(role="user", parts=(*(file.data if plain else file for file in files), text))


def assistant(text: str) -> Turn:
    """An earlier answer."""
    return Turn(role="assistant", parts=(text,))


def system(text: str) -> Turn:
    """Instructions that stand before the conversation."""
    return Turn(role="system", parts=(text,))


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """How the server read one image."""

    content_hash: str
    cached: bool
    """Its visual tokens came from the server's cache: the encoder did not run."""
    visual_tokens_uncompressed: int
    visual_tokens_sampled: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Accounting of one answer."""

    prompt_tokens: int
    completion_tokens: int
    visual_tokens_uncompressed: int
    """Visual tokens that there would be with both samplers off."""
    visual_tokens_sampled: int
    """Visual tokens after the vision-guided sampler: what layers 0..prune_layer-1 saw."""
    visual_tokens_kept: int
    """Visual tokens after the text-guided sampler: what the layers from prune_layer on saw."""
    prune_layer: int
    num_layers: int
    converted_share_percent: float
    """Converted remaining tokens (Sec. 4.4 of the paper), of the uncompressed count."""
    kv_bytes: int
    kv_unpruned_bytes: int
    time_to_first_token_ms: float
    compression_level: int = 0
    """How far the server's load tightened the samplers for this answer; 0 is not at all."""
    load_map_share: float = 0.0
    """The `map_share` that the load set; 0 is none."""
    load_threshold: float = 0.0
    """The `threshold` that the load set; 0 is none."""

    @property
    def converted_visual_tokens(self) -> float:
        """Converted remaining tokens (Sec. 4.4 of the paper) as a number."""
        return self.converted_share_percent * self.visual_tokens_uncompressed / 100


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, before penalties, temperature and limits of the draw."""

    token_id: int
    text: str
    """The token by itself; U+FFFD where it is only a part of a character."""
    logprob: float
    raw_bytes: bytes = b""
    """The token's own bytes, which may be a part of a character."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """One token of the answer and the likeliest ones at its place, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: str
    """stop, length or abort."""
    images: tuple[ImageInfo, ...]
    usage: Usage
    request_id: str
    focus: FocusMaps | None = None
    """What both samplers chose; None unless the setting `return_map` asked for it."""
    token_ids: tuple[int, ...] = ()
    """The tokens generated, the end-of-answer token included."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One entry a generated token, the end-of-answer token included, where the setting `logprobs` was given."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The served model and its limits."""

    name: str
    model_fingerprint: str
    text_family: str
    num_layers: int
    prune_layer: int
    prune_threshold: float
    tile_px: int
    region_window: int
    max_context_tokens: int
    max_image_bytes: int
    max_images: int
    server_version: str


def read_image(source: ImageSource, name: str = "image") -> bytes:
    """The bytes of an image file; errors call it `name`.

    Raises FocusClientError: INVALID_ARGUMENT where it cannot be read, RESOURCE_EXHAUSTED where no request carries it.
    """
    what = type(source).__name__
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            data = bytes(source)
        elif isinstance(source, str | os.PathLike):
            what = repr(os.fspath(source))
            with open(source, "rb") as file:
                check_size(os.fstat(file.fileno()).st_size, f"{name}: {what}")  # before it is in memory
                data = file.read(MAX_IMAGES_BYTES + 1)  # a device has no size, and may have no end
        elif hasattr(source, "read"):
            data = source.read()
        elif hasattr(source, "save"):
            data = _file_of(source)
        else:
            raise FocusClientError(
                "INVALID_ARGUMENT",
                f"{name}: is a {what}, expected a path, bytes, an open binary file or a PIL image",
            )
    except (OSError, ValueError, TypeError) as error:  # no such file, a closed one, a PIL image that PNG cannot hold
        reason = getattr(error, "strerror", None) or error
        raise FocusClientError("INVALID_ARGUMENT", f"{name}: cannot read {what}: {reason}") from None
    if not isinstance(data, bytes):
        raise FocusClientError("INVALID_ARGUMENT", f"{name}: the file was opened as text, open it in mode 'rb'")
    check_size(len(data), f"{name}: {what}")
    return data


def _file_of(image: PillowImage) -> bytes:
    """A lossless file of the pixels, and the orientation, which Pillow drops unless told. TIFF holds more modes."""
    exif = b""
    with contextlib.suppress(Exception):  # unreadable EXIF says nothing of the pixels
        exif = image.getexif().tobytes()
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG", exif=exif)
    except OSError as error:
        if "cannot write mode" not in str(error):
            raise
        buffer = io.BytesIO()
        image.save(buffer, "TIFF", exif=exif)
    return buffer.getvalue()


def _several(images: Images) -> Iterable[ImageSource]:
    if images is None:
        return ()
    one = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(images, "read")
    return images if isinstance(images, Iterable) and not one else (images,)  # type: ignore[return-value]


def check_size(size: int, name: str) -> None:
    """Raises FocusClientError (RESOURCE_EXHAUSTED) for more bytes of images than a request carries."""
    if size > MAX_IMAGES_BYTES:
        raise FocusClientError(
            "RESOURCE_EXHAUSTED", f"{name}: {size} bytes, a request carries at most {MAX_IMAGES_BYTES} bytes of images"
        )


class SamplerSettings(TypedDict, total=False):
    """Settings of both samplers, which decide what visual tokens the model sees; None is as the checkpoint has it."""

    vision_sampler: Annotated[bool | None, "Whether the vision-guided sampler compresses each image."]
    text_sampler: Annotated[bool | None, "Whether the text-guided sampler keeps what the question asks for alone."]
    threshold: Annotated[float | None, "gamma of Eq. 9, in (0, 1]; 1 keeps every visual token."]
    keep_ratio: Annotated[float | None, "Keep this share of visual tokens instead of by threshold, in (0, 1]."]


class Settings(SamplerSettings, total=False):
    """How to answer: keyword arguments of `ask` and `chat`. What is left out or None takes the server's default.

    A setting that is annotated with a line of help is an option of `focusllava ask` too.
    A draw goes through logit_bias, the penalties, the constraint, temperature, top_k, top_p and min_p, in this order.
    At most one of json_object, json_schema, choice, regex and grammar says what the answer must match; an answer that
    max_tokens cuts off, with the finish reason length, may not.
    """

    max_tokens: Annotated[int | None, "Most tokens to generate."]
    temperature: Annotated[float | None, "Divides the logits, in [0, 2]; 0 is greedy."]
    top_k: Annotated[int | None, "Draw from so many of the likeliest tokens; 0 is all."]
    top_p: Annotated[float | None, "Draw from the fewest likeliest tokens whose probability reaches this, in (0, 1]."]
    min_p: Annotated[float | None, "Leave out tokens below this share of the likeliest one, in [0, 1]."]
    repetition_penalty: Annotated[float | None, "For tokens of prompt and answer, in (0, 2]; 1 is none."]
    """Divides their logits where positive, multiplies them where negative."""
    presence_penalty: Annotated[float | None, "Subtracted once from the logit of each token of the answer, in [-2, 2]."]
    frequency_penalty: Annotated[float | None, "Subtracted each time that a token is in the answer, in [-2, 2]."]
    seed: Annotated[int | None, "Makes draws repeatable."]
    """From -2^63 to 2^64 - 1, where a negative one is that plus 2^64."""
    logprobs: Annotated[int | None, "Report each token's log probability and so many alternatives, 0 to 20."]
    stop: Annotated[str | Sequence[str] | None, "The answer ends before this; may be repeated."]
    stop_token_ids: Sequence[int] | None
    """The answer ends at any of these tokens, which is not part of its text."""
    include_stop_str_in_output: bool
    """What ended the answer, a stop string or the text of a stop token, is part of it."""
    min_tokens: Annotated[int | None, "Fewest tokens to generate, but where a constraint ends the answer."]
    logit_bias: Mapping[int, float] | None
    """Maps token ids to what is added to their logits, in [-100, 100]: -100 practically bans a token, 100 forces it."""
    json_object: bool
    """The answer is a JSON object."""
    json_schema: Mapping[str, Any] | str | None
    """The answer is JSON that this schema accepts; a mapping, or its JSON text."""
    choice: Sequence[str] | None
    """The answer is one of these."""
    regex: str | None
    """The answer as a whole matches this regular expression."""
    grammar: str | None
    """The answer is what this grammar derives: Lark, or GBNF."""
    continue_final_message: bool
    """The answer goes on from the text of the last turn, which is the assistant's."""
    keep_special_tokens: bool
    """Special tokens, but for the one that ends the answer, are part of the text."""
    ignore_eos: bool
    """Generates exactly max_tokens, for benchmarks."""
    return_map: bool
    """The answer's `focus` holds what both samplers chose of each image."""
    request_id: str
    """Names the request in the caller's own logs; the server makes one when empty."""
