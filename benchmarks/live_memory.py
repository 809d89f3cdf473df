"""Counts the bytes of tensors that are alive, on any device, the meta device included: the peak of a training step.

Operations' own scratch memory inside one kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is entered, every storage that an operation makes counts until nothing holds it."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        """known: tensors that were there before, such as weights, whose storages count for nothing."""
        super().__init__()
        self.live = self.peak = self.largest = 0
        """Bytes alive now, and the most at any time; the elements of the largest tensor that was made."""
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, tensor.numel())

    def _free(self, size: int) -> None:
        self.live -= size

    def __enter__(self) -> Self:
        super().__enter__()
        return self
