"""What a real process did: the collectives and messages that it issued, and the bytes that it holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group

from validation.real.live import LiveBytes

COUNTED = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
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
SCALAR_BYTES = 64
"""Smaller storages are scalars (losses, norms, step counts, flags): they are left out of live bytes."""


class Recorder(LiveBytes):
    """Write down each collective issued while the mode is on: (kind, bytes as nccl-tests count them, ranks)."""

    def __init__(self, collectives: list[tuple[str, int, int]] | None = None) -> None:
        super().__init__(SCALAR_BYTES, keeps_history=False)
        self.collectives = [] if collectives is None else collectives

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is NotImplemented:
            return result
        namespace, _, name = str(func._schema.name).partition("::")  # type: ignore[attr-defined]
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
