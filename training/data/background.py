"""How processes that read data are started: by a server that has imported what they need, once for all of them.

They share its memory for that, and they start without waiting for the imports. A fork of the training process itself
would copy locks that its threads hold, CUDA's and Ray's.
"""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.context import ForkServerContext

IMPORTED = ["training.data.loading", "transformers.models.llama.configuration_llama"]
"""Modules that the server imports. The second brings what the config of any decoder takes seconds to import."""


def background() -> ForkServerContext:
    """The context to start processes in. The server starts with the first of them and ends with this process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
