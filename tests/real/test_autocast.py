"""torch.autocast keeps its copies of parameters until its region ends, though checkpointing lets go of all else."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.real


@pytest.mark.parametrize("reentrant", [False, True])
def test_copies_live_until_the_region_ends(reentrant: bool) -> None:
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    from validation.real.live import LiveBytes

    width, blocks = 64, [nn.Linear(64, 64, bias=False) for _ in range(3)]
    x = torch.randn(8, width, requires_grad=True)
    with LiveBytes(smallest_bytes=64) as live:
        with torch.autocast("cpu", torch.bfloat16):
            y = x
            for block in blocks:
                y = checkpoint(block, y, use_reentrant=reentrant)
            inside = live.live
        cached = inside - live.live
    assert cached - 3 * 2 * width * width in (0, 2 * 8 * width)  # and at most the leaf that was an input
