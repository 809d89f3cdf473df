"""FocusLLaVA's client: questions about images, answered over gRPC as they are generated.

`LocalModel` answers in this process, without a server. `FocusLlavaForConditionalGeneration`, `FocusLlavaConfig` and
`FocusLlavaProcessor` are the model for transformers; naming one registers all with the Auto classes. These four are
loaded when they are named: they need the [serve] extra.
"""

from typing import Any

from focusllava.async_client import AsyncAnswerStream, AsyncFocusClient
from focusllava.client import AnswerStream, FocusClient
from focusllava.connection import RetryPolicy
from focusllava.errors import FocusClientError
from focusllava.focus_maps import FocusMap, FocusMaps, FocusRegions
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
    "FocusMap",
    "FocusMaps",
    "FocusRegions",
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


_PARTS = frozenset(("FocusLlavaConfig", "FocusLlavaForConditionalGeneration", "FocusLlavaProcessor", "LocalModel"))


def __getattr__(name: str) -> Any:
    """Loads a part by its name. Raises ModuleNotFoundError, which says what to install, where the extra is missing."""
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from focusllava import extras

    return extras.load(extras.PARTS, name)
