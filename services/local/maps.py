"""Focus maps as the client has them, without a server between."""

from __future__ import annotations

from collections.abc import Sequence

from focusllava.focus_maps import FocusMap, FocusMaps
from focusllava.focus_maps import focus_maps as read_maps
from services.checkpoint.config import FocusLlavaConfig
from services.common import wire
from services.common.types import CompressedVisualTokens, PruneDecision
from services.focus_maps.compose import focus_maps


def client_maps(
    images: Sequence[CompressedVisualTokens],
    decision: PruneDecision | None,
    config: FocusLlavaConfig,
    *,
    sampled: bool,
) -> FocusMaps:
    """Makes the maps (`services.focus_maps.compose`) and reads them as a client does."""
    return read_maps(wire.focus_maps_to_proto(focus_maps(images, decision, config, sampled=sampled), decision))


def image_map(tokens: CompressedVisualTokens, config: FocusLlavaConfig, *, sampled: bool) -> FocusMap:
    """The map of one image that nobody has asked about: all tokens kept, none important."""
    return client_maps([tokens], None, config, sampled=sampled).maps[0]
