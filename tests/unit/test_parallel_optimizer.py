"""Bytes of optimizer states and temporaries, by the arithmetic of each optimizer."""

from __future__ import annotations

import pytest

from sim.ir.program import Alloc, Free, Instruction
from sim.parallel.optimizer import foreach_step, looped_step, norm_scratch, state_storages

PARAMETERS = [("matrix", 1024 * 512), ("vector", 1000)]
SHAPES = {"matrix": (1024, 512)}


def peak_of(instructions: list[Instruction]) -> int:
    live = peak = 0
    for each in instructions:
        if isinstance(each, Alloc):
            live += each.storage.num_bytes
            peak = max(peak, live)
        elif isinstance(each, Free):
            live -= each.storage.num_bytes
    assert live == 0
    return peak


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adamw", 8 * (1024 * 512 + 1000)),
        ("sgd", 0),
        ("sgd-momentum", 4 * (1024 * 512 + 1000)),
        ("lion", 4 * (1024 * 512 + 1000)),
        # a matrix keeps its rows and its columns, a vector itself
        ("adafactor", 4 * (1024 + 512) + 4 * 1000),
        # two bytes an element and two scales for 256 of them; a small one keeps 32 bit
        ("adam-8bit", 2 * 1024 * 512 + 2 * 4 * 1024 * 512 // 256 + 8 * 1000),
        ("muon", 4 * 1024 * 512 + 8 * 1000),
    ],
)
def test_states(optimizer: str, expected: int) -> None:
    assert sum(s.num_bytes for s in state_storages(optimizer, PARAMETERS, "fp32", SHAPES)) == expected


def test_vectors_have_no_rows() -> None:
    """What ZeRO flattens is a vector to Adafactor: a variance for each element."""
    assert sum(s.num_bytes for s in state_storages("adafactor", PARAMETERS, "fp32")) == 4 * (1024 * 512 + 1000)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adamw", 4 * (1024 * 512 + 1000)),
        ("sgd", 0),
        ("sgd-momentum", 0),
        ("adam-8bit", 0),
        # the clone and the sum, of one parameter at a time
        ("lion", 2 * 4 * 1024 * 512),
        # the update in fp32, two 16-bit matrices, two 16-bit squares of the shorter side
        ("muon", (4 + 2 + 2) * 1024 * 512 + 2 * 2 * 512 * 512),
    ],
)
def test_temporaries(optimizer: str, expected: int) -> None:
    assert peak_of(foreach_step(optimizer, PARAMETERS, "fp32", "fp32", SHAPES)) == expected


def test_one_by_one_adam_has_a_root_a_quotient_and_the_last_quotient() -> None:
    twice = [("a", 100), ("b", 100)]
    assert peak_of(looped_step("adamw", twice, "fp32", "fp32")) == 3 * 4 * 100


def test_norms_are_made_in_chunks_of_the_largest() -> None:
    """Three tensors, the largest of 2.5 chunks of 65,536: 3 x 3 partial norms, 3 norms, and those stacked."""
    assert [s.num_bytes for s in norm_scratch([163_840, 10, 10])] == [4 * 9, 512 * 3, 4 * 3]
