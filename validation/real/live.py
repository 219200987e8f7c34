"""Live bytes of a real torch program, storage by storage, as the dispatcher sees them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[misc]
    """Count the bytes of storages made while the mode is on, until they die. Kernels' own scratch is not seen.

    ``history`` has (operator, live bytes, the largest so far) after each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.history: list[tuple[str, int]] = []
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        self.peak = max(self.peak, self.live)
        self.history.append((str(operator), self.live))
        return result

    def _add(self, storage: Any, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given or not storage.nbytes():
            return
        self._known.add(key)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes
