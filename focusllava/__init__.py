"""FocusLLaVA's client: questions about images, answered over gRPC as they are generated.

`LocalModel` answers in this process, without a server. It is loaded when it is named: it needs the [serve] extra.
"""

from typing import Any

from focusllava.async_client import AsyncAnswerStream, AsyncFocusClient
from focusllava.client import AnswerStream, FocusClient
from focusllava.connection import RetryPolicy
from focusllava.errors import FocusClientError
from focusllava.messages import (
    Answer,
    ImageFile,
    ImageInfo,
    ImageSource,
    ModelInfo,
    TokenLogprob,
    TokenLogprobs,
    Turn,
    Usage,
    assistant,
    system,
    user,
)

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncFocusClient",
    "FocusClient",
    "FocusClientError",
    "ImageFile",
    "ImageInfo",
    "ImageSource",
    "ModelInfo",
    "RetryPolicy",
    "TokenLogprob",
    "TokenLogprobs",
    "Turn",
    "Usage",
    "__version__",
    "assistant",
    "system",
    "user",
]


def __getattr__(name: str) -> Any:
    """Loads LocalModel. Raises ModuleNotFoundError, which says what to install, where the extra is missing."""
    if name != "LocalModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from focusllava import extras

    return extras.load(extras.PARTS, name)
