"""Options of how an image is read <-> protobuf."""

from __future__ import annotations

from focusllava.v1 import image_pb2
from services.common.errors import InvalidInput
from services.common.types import Detail, ImageOptions

_DETAILS: dict[int, Detail] = {
    image_pb2.IMAGE_DETAIL_UNSPECIFIED: "high",
    image_pb2.IMAGE_DETAIL_HIGH: "high",
    image_pb2.IMAGE_DETAIL_LOW: "low",
}
_DETAIL_VALUES = {"high": image_pb2.IMAGE_DETAIL_HIGH, "low": image_pb2.IMAGE_DETAIL_LOW}


def image_options_to_proto(options: ImageOptions) -> image_pb2.ImageOptions:
    return image_pb2.ImageOptions(detail=_DETAIL_VALUES[options.detail], reduced_jpeg=options.reduced_jpeg)


def image_options_from_proto(message: image_pb2.ImageOptions, field: str = "options") -> ImageOptions:
    """Raises InvalidInput for a detail that there is not."""
    detail = _DETAILS.get(message.detail)
    if detail is None:
        raise InvalidInput(
            f"is {message.detail}, expected IMAGE_DETAIL_LOW or IMAGE_DETAIL_HIGH", field=f"{field}.detail"
        )
    reduced = message.reduced_jpeg if message.HasField("reduced_jpeg") else None
    return ImageOptions(detail=detail, reduced_jpeg=reduced)
