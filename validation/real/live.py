"""Live bytes of a real torch program, storage by storage, as the dispatcher sees them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRAPPERS = (DTensor, AsyncCollectiveTensor)
"""Tensors that hold another one and no bytes of their own."""


class LiveBytes(TorchDispatchMode):  # type: ignore[misc]
    """Count the bytes of storages made while the mode is on, until they die. Kernels' own scratch is not seen.

    ``smallest_bytes``: smaller storages are left out (scalars: losses, norms, step counts). ``history`` has
    (operator, live bytes) after each operator, if ``keeps_history``.
    """

    def __init__(self, smallest_bytes: int = 1, *, keeps_history: bool = True) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.history: list[tuple[str, int]] = []
        self._smallest, self._keeps_history = smallest_bytes, keeps_history
        self._known: dict[int, int] = {}

    def __enter__(self) -> LiveBytes:
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            """FSDP empties and refills storages in place."""
            out = resize(storage, size)
            key = storage._cdata
            if key in self._known:
                self.live += storage.nbytes() - self._known[key]
                self._known[key] = storage.nbytes()
                self.peak = max(self.peak, self.live)
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        if any(issubclass(each, WRAPPERS) for each in types):
            return NotImplemented  # they take themselves apart first, with this mode still on
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, WRAPPERS) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage(), given)
        self.peak = max(self.peak, self.live)
        if self._keeps_history:
            self.history.append((str(operator), self.live))
        return result

    def _add(self, storage: Any, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given or storage.nbytes() < self._smallest:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._known.pop(key)
