from focusllava.v1 import error_pb2 as _error_pb2
from focusllava.v1 import image_pb2 as _image_pb2
from focusllava.v1 import llm_pb2 as _llm_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChatPart(_message.Message):
    __slots__ = ("text", "image", "image_options")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: bytes
    image_options: _image_pb2.ImageOptions
    def __init__(self, text: _Optional[str] = ..., image: _Optional[bytes] = ..., image_options: _Optional[_Union[_image_pb2.ImageOptions, _Mapping]] = ...) -> None: ...

class ChatTurn(_message.Message):
    __slots__ = ("role", "parts")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    role: _llm_pb2.Role
    parts: _containers.RepeatedCompositeFieldContainer[ChatPart]
    def __init__(self, role: _Optional[_Union[_llm_pb2.Role, str]] = ..., parts: _Optional[_Iterable[_Union[ChatPart, _Mapping]]] = ...) -> None: ...

class ChatRequest(_message.Message):
    __slots__ = ("turns", "sampling", "prune", "vision_sampler_off", "request_id", "continue_final_message", "raw_prompt", "return_map")
    TURNS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRUNE_FIELD_NUMBER: _ClassVar[int]
    VISION_SAMPLER_OFF_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RAW_PROMPT_FIELD_NUMBER: _ClassVar[int]
    RETURN_MAP_FIELD_NUMBER: _ClassVar[int]
    turns: _containers.RepeatedCompositeFieldContainer[ChatTurn]
    sampling: _llm_pb2.SamplingParams
    prune: _llm_pb2.PruneParams
    vision_sampler_off: bool
    request_id: str
    continue_final_message: bool
    raw_prompt: _llm_pb2.RawPrompt
    return_map: bool
    def __init__(self, turns: _Optional[_Iterable[_Union[ChatTurn, _Mapping]]] = ..., sampling: _Optional[_Union[_llm_pb2.SamplingParams, _Mapping]] = ..., prune: _Optional[_Union[_llm_pb2.PruneParams, _Mapping]] = ..., vision_sampler_off: _Optional[bool] = ..., request_id: _Optional[str] = ..., continue_final_message: _Optional[bool] = ..., raw_prompt: _Optional[_Union[_llm_pb2.RawPrompt, _Mapping]] = ..., return_map: _Optional[bool] = ...) -> None: ...

class ChatResponse(_message.Message):
    __slots__ = ("started", "token", "finished", "error", "focus_maps")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FOCUS_MAPS_FIELD_NUMBER: _ClassVar[int]
    started: ChatStarted
    token: _llm_pb2.Token
    finished: _llm_pb2.Finished
    error: _error_pb2.StreamError
    focus_maps: FocusMaps
    def __init__(self, started: _Optional[_Union[ChatStarted, _Mapping]] = ..., token: _Optional[_Union[_llm_pb2.Token, _Mapping]] = ..., finished: _Optional[_Union[_llm_pb2.Finished, _Mapping]] = ..., error: _Optional[_Union[_error_pb2.StreamError, _Mapping]] = ..., focus_maps: _Optional[_Union[FocusMaps, _Mapping]] = ...) -> None: ...

class FocusMaps(_message.Message):
    __slots__ = ("maps", "prune_layer", "threshold", "keep_ratio")
    MAPS_FIELD_NUMBER: _ClassVar[int]
    PRUNE_LAYER_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    KEEP_RATIO_FIELD_NUMBER: _ClassVar[int]
    maps: _containers.RepeatedCompositeFieldContainer[FocusMap]
    prune_layer: int
    threshold: float
    keep_ratio: float
    def __init__(self, maps: _Optional[_Iterable[_Union[FocusMap, _Mapping]]] = ..., prune_layer: _Optional[int] = ..., threshold: _Optional[float] = ..., keep_ratio: _Optional[float] = ...) -> None: ...

class FocusMap(_message.Message):
    __slots__ = ("image", "width", "height", "regions", "boxes", "base_tokens", "kept", "importance")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    BASE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    image: int
    width: int
    height: int
    regions: FocusRegions
    boxes: _containers.RepeatedScalarFieldContainer[float]
    base_tokens: int
    kept: bytes
    importance: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, image: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., regions: _Optional[_Union[FocusRegions, _Mapping]] = ..., boxes: _Optional[_Iterable[float]] = ..., base_tokens: _Optional[int] = ..., kept: _Optional[bytes] = ..., importance: _Optional[_Iterable[float]] = ...) -> None: ...

class FocusRegions(_message.Message):
    __slots__ = ("x", "y", "kernels", "branch_ids")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    BRANCH_IDS_FIELD_NUMBER: _ClassVar[int]
    x: _containers.RepeatedScalarFieldContainer[float]
    y: _containers.RepeatedScalarFieldContainer[float]
    kernels: _containers.RepeatedCompositeFieldContainer[FocusKernel]
    branch_ids: bytes
    def __init__(self, x: _Optional[_Iterable[float]] = ..., y: _Optional[_Iterable[float]] = ..., kernels: _Optional[_Iterable[_Union[FocusKernel, _Mapping]]] = ..., branch_ids: _Optional[bytes] = ...) -> None: ...

class FocusKernel(_message.Message):
    __slots__ = ("height", "width")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class ChatStarted(_message.Message):
    __slots__ = ("request_id", "images", "prompt_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    images: _containers.RepeatedCompositeFieldContainer[ImageInfo]
    prompt_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., images: _Optional[_Iterable[_Union[ImageInfo, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class ImageInfo(_message.Message):
    __slots__ = ("content_hash", "cached", "visual_tokens_uncompressed", "visual_tokens_sampled", "notes")
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_UNCOMPRESSED_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    content_hash: str
    cached: bool
    visual_tokens_uncompressed: int
    visual_tokens_sampled: int
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, content_hash: _Optional[str] = ..., cached: _Optional[bool] = ..., visual_tokens_uncompressed: _Optional[int] = ..., visual_tokens_sampled: _Optional[int] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("name", "model_fingerprint", "text_family", "num_layers", "prune_layer", "prune_threshold", "tile_px", "region_window", "max_context_tokens", "max_image_bytes", "max_images", "server_version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FAMILY_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PRUNE_LAYER_FIELD_NUMBER: _ClassVar[int]
    PRUNE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    TILE_PX_FIELD_NUMBER: _ClassVar[int]
    REGION_WINDOW_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, name: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., text_family: _Optional[str] = ..., num_layers: _Optional[int] = ..., prune_layer: _Optional[int] = ..., prune_threshold: _Optional[float] = ..., tile_px: _Optional[int] = ..., region_window: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_images: _Optional[int] = ..., server_version: _Optional[str] = ...) -> None: ...
