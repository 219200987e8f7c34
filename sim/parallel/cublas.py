"""cuBLAS workspaces: what PyTorch takes from its own allocator for every handle and stream that multiplies matrices.

Source: aten/src/ATen/cuda/CublasHandlePool.cpp. ``getCurrentCUDABlasHandle`` keeps its pool window in a thread-local,
so autograd's thread, which runs backward, has a handle of its own; ``getCUDABlasWorkspace`` keeps one workspace for
each (handle, stream). ``parseChosenWorkspaceSize``: ":4096:2:16:8" in KiB, and 32 MiB from Hopper on (PyTorch pull
requests 120925 and 175344).
"""

from __future__ import annotations

from sim.ir.program import Alloc, Chunk, Instruction, Mark, Storage

_KIB = 2**10


def workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """Return the size of one workspace."""
    return 32 * 1024 * _KIB if compute_capability >= (9, 0) else (2 * 4096 + 8 * 16) * _KIB


def transformer_engine_bytes(compute_capability: tuple[int, int]) -> int:
    """Return the workspace that Transformer Engine keeps for its own calls of cublasLt, 32 MiB from Hopper, else 4.

    Source: ``get_cublas_workspace_size_bytes`` in transformer_engine/pytorch/module/base.py.
    """
    return (32 if compute_capability >= (9, 0) else 4) * 1024 * _KIB


def workspaces(
    compute_capability: tuple[int, int], given_bytes: int | None = None, *, transformer_engine: bool = False
) -> Chunk:
    """Return the allocation of the two workspaces: the forward thread's and the backward thread's. They stay.

    ``given_bytes`` is what CUBLAS_WORKSPACE_CONFIG asks for; ``transformer_engine``: one more of its own.
    """
    size = workspace_bytes(compute_capability) if given_bytes is None else given_bytes
    found: list[Instruction] = [
        Mark("forward", "cublas"),
        Alloc(Storage("cublas workspace (forward)", size, "buffers")),
        Alloc(Storage("cublas workspace (backward)", size, "buffers")),
    ]
    if transformer_engine:
        own = transformer_engine_bytes(compute_capability)
        found.append(Alloc(Storage("cublas workspace (transformer engine)", own, "buffers")))
    return tuple(found)
