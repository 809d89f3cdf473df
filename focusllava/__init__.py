"""FocusLLaVA's client: questions about images, answered over gRPC as they are generated."""

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
