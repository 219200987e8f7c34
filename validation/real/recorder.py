"""What a real process did: the collectives it issued, and the bytes that it still holds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

COUNTED = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
}
"""Operator of ``c10d`` -> kind, and the argument whose size counts: output of an all-gather, input of the others."""
FUNCTIONAL = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}
"""Operator of ``_c10d_functional`` -> kind."""


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Write down each collective issued while the mode is on: (kind, bytes as nccl-tests count them, ranks)."""

    def __init__(self, collectives: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.collectives = collectives

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it takes itself apart first, with this mode still on
        namespace, _, name = str(func._schema.name).partition("::")  # type: ignore[attr-defined]
        result = func(*args, **(kwargs or {}))
        if namespace == "c10d" and name in COUNTED:
            kind, argument = COUNTED[name]
            group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            self.collectives.append((kind, _size(args[argument]), group.size()))
        elif namespace == "_c10d_functional" and name in FUNCTIONAL:
            kind = FUNCTIONAL[name]
            whole = result if kind == "all_gather" else args[0]
            self.collectives.append((kind, _size(whole), int(_resolve_process_group(args[-1]).size())))
        return result


def _size(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(_size(each) for each in value)
    return int(value.numel() * value.element_size())


def live_bytes(before: set[int], smallest_bytes: int) -> int:
    """Return the bytes of all storages that a Python object reaches, each counted once, without those from before."""
    time.sleep(0.02)  # gloo's threads let go of their tensors a moment after the call returns
    gc.collect()
    return sum(num_bytes for pointer, num_bytes in storages(smallest_bytes).items() if pointer not in before)


def storages(smallest_bytes: int) -> dict[int, int]:
    """Return address -> bytes of the storages of so many bytes or more: scalars are left out.

    A DTensor has none but its local tensor's.
    """
    found: dict[int, int] = {}
    for tensor in [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]:
        gradient = None
        with suppress(RuntimeError):  # FSDP1's views of a flat parameter that is gone
            gradient = tensor.grad if tensor.is_leaf else None
        for each in (tensor, gradient):
            local = each.to_local() if isinstance(each, DTensor) else each
            if local is not None and local.device.type == "cpu" and local.layout == torch.strided:
                storage = local.untyped_storage()
                if storage.nbytes() >= smallest_bytes:
                    found[storage.data_ptr()] = storage.nbytes()
    return found
