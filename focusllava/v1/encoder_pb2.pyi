from focusllava.v1 import image_pb2 as _image_pb2
from focusllava.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CheckEncoderRequest(_message.Message):
    __slots__ = ("model_fingerprint",)
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    def __init__(self, model_fingerprint: _Optional[str] = ...) -> None: ...

class CheckEncoderResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("image", "model_fingerprint", "vision_sampler", "options", "shelf")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VISION_SAMPLER_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SHELF_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    model_fingerprint: str
    vision_sampler: bool
    options: _image_pb2.ImageOptions
    shelf: str
    def __init__(self, image: _Optional[bytes] = ..., model_fingerprint: _Optional[str] = ..., vision_sampler: _Optional[bool] = ..., options: _Optional[_Union[_image_pb2.ImageOptions, _Mapping]] = ..., shelf: _Optional[str] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("visual_tokens",)
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    visual_tokens: CompressedVisualTokens
    def __init__(self, visual_tokens: _Optional[_Union[CompressedVisualTokens, _Mapping]] = ...) -> None: ...

class CompressedVisualTokens(_message.Message):
    __slots__ = ("tokens", "branch_ids", "map_height", "map_width", "uncompressed_tokens", "content_hash", "model_fingerprint", "notes", "shelf_name", "image_height", "image_width", "base_branch_ids")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BRANCH_IDS_FIELD_NUMBER: _ClassVar[int]
    MAP_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    MAP_WIDTH_FIELD_NUMBER: _ClassVar[int]
    UNCOMPRESSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    SHELF_NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    BASE_BRANCH_IDS_FIELD_NUMBER: _ClassVar[int]
    tokens: _tensor_pb2.Tensor
    branch_ids: bytes
    map_height: int
    map_width: int
    uncompressed_tokens: int
    content_hash: str
    model_fingerprint: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    shelf_name: str
    image_height: int
    image_width: int
    base_branch_ids: bytes
    def __init__(self, tokens: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., branch_ids: _Optional[bytes] = ..., map_height: _Optional[int] = ..., map_width: _Optional[int] = ..., uncompressed_tokens: _Optional[int] = ..., content_hash: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ..., shelf_name: _Optional[str] = ..., image_height: _Optional[int] = ..., image_width: _Optional[int] = ..., base_branch_ids: _Optional[bytes] = ...) -> None: ...
