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


def test_transformer_engine_has_a_workspace_of_its_own() -> None:
    """get_cublas_workspace_size_bytes: 32 MiB from Hopper on, else 4."""
    sizes = [
        [i.storage.num_bytes for i in workspaces(cc, transformer_engine=True) if isinstance(i, Alloc)] for cc in CCS
    ]
    assert [chunk[-1] for chunk in sizes] == [4 * 2**20, 32 * 2**20]
    assert all(len(chunk) == 3 for chunk in sizes)


def test_cublas_workspace_config_counts_for_both_threads() -> None:
    """CUBLAS_WORKSPACE_CONFIG=:4096:8 is 8 times 4 MiB."""
    chunk = workspaces((8, 0), 8 * 4096 * 1024)
    assert [i.storage.num_bytes for i in chunk if isinstance(i, Alloc)] == [32 * 2**20] * 2


CCS = ((8, 0), (9, 0))
