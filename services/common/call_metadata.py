"""What the metadata of a call says, in gRPC's own contexts and in Ray Serve's."""

from __future__ import annotations

from typing import Any

REQUEST_ID_HEADER = "x-request-id"
"""Metadata over gRPC, and the header over HTTP, with the id of a request."""


def text_metadata(context: Any) -> dict[str, str]:
    """The values in text, by name; binary ones are left out."""
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
