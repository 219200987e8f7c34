"""Which GPU each rank runs on."""

from __future__ import annotations

from collections.abc import Sequence


def place(num_ranks: int, num_gpus: int, gpus: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the GPU of every rank.

    By default rank r runs on GPU r, as torchrun and the DeepSpeed launcher number them: node by node. ``gpus`` names
    another GPU for each rank; no GPU twice.
    """
    placed = tuple(range(num_ranks)) if gpus is None else tuple(gpus)
    assert len(placed) == num_ranks, f"{len(placed)} GPUs named for {num_ranks} ranks"
    assert len(set(placed)) == num_ranks, "two ranks on one GPU"
    assert all(0 <= gpu < num_gpus for gpu in placed), f"a rank outside the {num_gpus} GPUs of the cluster"
    return placed
