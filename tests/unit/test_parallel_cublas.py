"""Workspaces have the sizes that PyTorch chooses."""

from __future__ import annotations

from sim.ir.program import Alloc
from sim.parallel.cublas import workspace_bytes, workspaces


def test_before_hopper_two_of_4_mib_and_eight_of_16_kib():
    assert workspace_bytes((7, 0)) == workspace_bytes((8, 9)) == 2 * 4 * 2**20 + 8 * 16 * 2**10 == 8_519_680


def test_from_hopper_on_32_mib():
    assert workspace_bytes((9, 0)) == workspace_bytes((10, 0)) == 33_554_432


def test_forward_and_backward_threads_have_one_each():
    assert sum(i.storage.num_bytes for i in workspaces((8, 0)) if isinstance(i, Alloc)) == 17_039_360
