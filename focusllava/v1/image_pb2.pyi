from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageDetail(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_DETAIL_UNSPECIFIED: _ClassVar[ImageDetail]
    IMAGE_DETAIL_LOW: _ClassVar[ImageDetail]
    IMAGE_DETAIL_HIGH: _ClassVar[ImageDetail]
IMAGE_DETAIL_UNSPECIFIED: ImageDetail
IMAGE_DETAIL_LOW: ImageDetail
IMAGE_DETAIL_HIGH: ImageDetail

class ImageOptions(_message.Message):
    __slots__ = ("detail", "reduced_jpeg", "map_share")
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REDUCED_JPEG_FIELD_NUMBER: _ClassVar[int]
    MAP_SHARE_FIELD_NUMBER: _ClassVar[int]
    detail: ImageDetail
    reduced_jpeg: bool
    map_share: float
    def __init__(self, detail: _Optional[_Union[ImageDetail, str]] = ..., reduced_jpeg: _Optional[bool] = ..., map_share: _Optional[float] = ...) -> None: ...
