"""A GPU that is pretended: tensors compute on the CPU, and two that would lie on different devices may not meet.

What depends on values, as which tokens are kept, is computed, so a whole step runs, unlike on the meta device.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("xpu", 0)
"""The name that pretended tensors give for their device: no GPU's that the code has kernels of its own for."""
CPU = torch.device("cpu")
MOVES = ("aten::copy_", "aten::_to_copy")
"""Operations that may read from one device and write to another."""
NEW = (torch.Tensor.new_tensor, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full,
       torch.Tensor.new_empty)  # fmt: skip
TO_CPU = (torch.Tensor.cpu,)
NEEDS_CPU = (torch.Tensor.numpy, torch.Tensor.__array__)


class PretendedGpu(TorchFunctionMode):
    """While it is entered, tensors live where `device=` and `.to` put them, and results where their inputs are.

    Numbers, and tensors without a dimension, may meet any device's, as CUDA has it. Indices on the CPU may not: CUDA
    would copy them, and wait.
    """

    def __init__(self, *modules: nn.Module):
        """modules: parameters and buffers that lie on the GPU."""
        super().__init__()
        self.faults: list[str] = []
        """What met and where, each line of our code once."""
        self._there: weakref.WeakSet[Any] = weakref.WeakSet()
        self.making = CPU
        """Where the function that runs makes tensors of its own."""
        self._operations = _Operations(self)
        for module in modules:
            self.put(tensor for tensor in (*module.parameters(), *module.buffers()))

    def put(self, tensors: Iterable[torch.Tensor]) -> None:
        """Has these tensors lie on the GPU."""
        for tensor in tensors:
            self._there.add(tensor.untyped_storage())

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies on the GPU."""
        return tensor.untyped_storage() in self._there

    def fault(self, what: str) -> None:
        """Remembers that tensors met, and the lines of this repository that led there."""
        own = [frame for frame in traceback.extract_stack() if "/site-packages/" not in frame.filename
               and "pretended_gpu" not in frame.filename]  # fmt: skip
        place = next((f for f in reversed(own) if "/services/" in f.filename or "/training/" in f.filename), own[-1])
        line = f"{place.filename.split('/services/')[-1].split('/training/')[-1]}:{place.lineno}: {what}: {place.line}"
        if line not in self.faults:
            self.faults.append(line)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if self.has(args[0]) else CPU
        if function in NEEDS_CPU and self.has(args[0]):
            self.fault(f"{name} of a tensor on the GPU")
        if function is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if function in TO_CPU:
            return self._moved(args[0], args[0], CPU)
        wanted = kwargs.pop("device", None)
        if wanted is None and function in NEW:
            wanted = GPU if self.has(args[0]) else CPU
        device = CPU if wanted is None else torch.device(wanted)
        if wanted is None and any(isinstance(leaf, torch.Tensor) and self.has(leaf) for leaf in tree_leaves(args)):
            device = GPU  # what a function makes for itself, as `one_hot` its zeros
        before, self.making = self.making, device
        try:
            result = function(*args, **kwargs)
        finally:
            self.making = before
        if wanted is not None and isinstance(result, torch.Tensor):
            self._place(result, device)
        return result

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = kwargs.pop("device", None)
        rest = []
        for value in args:
            if isinstance(value, str | torch.device):
                wanted = value
            elif isinstance(value, torch.Tensor):
                wanted = GPU if self.has(value) else CPU
                rest.append(value.dtype)
            else:
                rest.append(value)
        changed = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor  # type: ignore[call-overload]
        return changed if wanted is None else self._moved(tensor, changed, torch.device(wanted))

    def _moved(self, source: torch.Tensor, changed: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A copy on the device, the tensor itself where it lies there."""
        if self.has(source) == (device.type == GPU.type):
            return changed
        result = changed.clone() if changed is source else changed
        self._place(result, device)
        return result

    def _place(self, tensor: torch.Tensor, device: torch.device) -> None:
        if device.type == GPU.type:
            self._there.add(tensor.untyped_storage())
        else:
            self._there.discard(tensor.untyped_storage())

    def __enter__(self) -> Self:
        self._operations.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._operations.__exit__(*exc)


class _Operations(TorchDispatchMode):
    """Looks at every operation's tensors, forward and backward."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in given if self._gpu.has(tensor)]
        name = function._schema.name
        here = [tensor for tensor in given if tensor.ndim and not self._gpu.has(tensor)]
        if there and here and name not in MOVES:
            self._gpu.fault(f"{name.removeprefix('aten::')} of {_shapes(there)} on the GPU and {_shapes(here)} not")
        result = function(*args, **(kwargs or {}))
        if there or (not given and self._gpu.making == GPU):
            self._gpu.put(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def _shapes(tensors: list[torch.Tensor]) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)
