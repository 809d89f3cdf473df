"""Options of how an image is read <-> protobuf."""

from __future__ import annotations

from focusllava.v1 import image_pb2
from services.common.errors import InvalidInput
from services.common.settings import check_settings
from services.common.types import Detail, ImageOptions
from services.common.wire.scalars import scalars

_DETAILS: dict[int, Detail] = {
    image_pb2.IMAGE_DETAIL_UNSPECIFIED: "high",
    image_pb2.IMAGE_DETAIL_HIGH: "high",
    image_pb2.IMAGE_DETAIL_LOW: "low",
}
_DETAIL_VALUES = {"high": image_pb2.IMAGE_DETAIL_HIGH, "low": image_pb2.IMAGE_DETAIL_LOW}


def image_options_to_proto(options: ImageOptions) -> image_pb2.ImageOptions:
    fields = dict(vars(options))  # they bear the same names
    return image_pb2.ImageOptions(detail=_DETAIL_VALUES[fields.pop("detail")], **fields)


def image_options_from_proto(message: image_pb2.ImageOptions, field: str = "options") -> ImageOptions:
    """Raises InvalidInput for a detail that there is not, or a share outside (0, 1]."""
    fields = scalars(message)
    detail = _DETAILS.get(fields.pop("detail", image_pb2.IMAGE_DETAIL_UNSPECIFIED))
    if detail is None:
        raise InvalidInput(
            f"is {message.detail}, expected IMAGE_DETAIL_LOW or IMAGE_DETAIL_HIGH", field=f"{field}.detail"
        )
    options = ImageOptions(detail=detail, **fields)
    check_settings(options, f"{field}.")
    return options
