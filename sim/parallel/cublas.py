"""cuBLAS workspaces: what PyTorch takes from its own allocator for every handle and stream that multiplies matrices.

Source: aten/src/ATen/cuda/CublasHandlePool.cpp. ``getCurrentCUDABlasHandle`` keeps its pool window in a thread-local,
so autograd's thread, which runs backward, has a handle of its own; ``getCUDABlasWorkspace`` keeps one workspace for
each (handle, stream). ``parseChosenWorkspaceSize``: ":4096:2:16:8" in KiB, and 32 MiB from Hopper on (PyTorch pull
requests 120925 and 175344).
"""

from __future__ import annotations

from sim.ir.program import Alloc, Chunk, Mark, Storage

_KIB = 2**10


def workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """Return the size of one workspace."""
    return 32 * 1024 * _KIB if compute_capability >= (9, 0) else (2 * 4096 + 8 * 16) * _KIB


def workspaces(compute_capability: tuple[int, int]) -> Chunk:
    """Return the allocation of the two workspaces: the forward thread's and the backward thread's. They stay."""
    size = workspace_bytes(compute_capability)
    return (
        Mark("forward", "cublas"),
        Alloc(Storage("cublas workspace (forward)", size, "buffers")),
        Alloc(Storage("cublas workspace (backward)", size, "buffers")),
    )
