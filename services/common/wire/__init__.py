"""The only converters between our types and their protobuf messages; everything that comes in is checked here."""

from services.common.wire.events import (
    Event,
    decision_from_proto,
    event_from_proto,
    event_to_proto,
    usage_from_proto,
    usage_to_proto,
)
from services.common.wire.focus_maps import focus_maps_to_proto
from services.common.wire.images import image_options_from_proto, image_options_to_proto
from services.common.wire.requests import (
    GenerateMessage,
    generate_request_from_proto,
    generate_request_to_proto,
    raw_prompt_from_proto,
    raw_prompt_to_proto,
    samplers_from_proto,
    samplers_to_proto,
    sampling_from_proto,
    sampling_to_proto,
    turns_from_proto,
    turns_to_proto,
)
from services.common.wire.scalars import shortest
from services.common.wire.sizes import RequestSizes
from services.common.wire.tensors import (
    check_tokens,
    data_bytes,
    described,
    outline_from_proto,
    shelve,
    tokens_from_proto,
    tokens_to_proto,
    unshelve,
)

__all__ = [
    "Event",
    "GenerateMessage",
    "RequestSizes",
    "check_tokens",
    "data_bytes",
    "decision_from_proto",
    "described",
    "event_from_proto",
    "event_to_proto",
    "focus_maps_to_proto",
    "generate_request_from_proto",
    "generate_request_to_proto",
    "image_options_from_proto",
    "image_options_to_proto",
    "outline_from_proto",
    "samplers_from_proto",
    "samplers_to_proto",
    "raw_prompt_from_proto",
    "raw_prompt_to_proto",
    "sampling_from_proto",
    "sampling_to_proto",
    "shelve",
    "shortest",
    "tokens_from_proto",
    "tokens_to_proto",
    "turns_from_proto",
    "turns_to_proto",
    "unshelve",
    "usage_from_proto",
    "usage_to_proto",
]
