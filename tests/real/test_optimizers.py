"""States and temporaries of optimizers, to the byte, against torch's own on the CPU with ``foreach`` asked for."""

from __future__ import annotations

from typing import Any

import pytest

from sim.ir.program import Alloc, Free, Instruction
from sim.parallel.optimizer import foreach_step, looped_step, state_storages

pytestmark = pytest.mark.real

MATRICES = {"a": (96, 64), "b": (64, 256), "c": (128, 32)}
VECTORS = {"d": 256, "e": 64}
PARAMETERS = [(name, rows * columns) for name, (rows, columns) in MATRICES.items()] + list(VECTORS.items())


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


def make(name: str, parameters: list[Any]) -> Any:
    import torch

    return {
        "adamw": lambda: torch.optim.AdamW(parameters, foreach=True),
        "adam": lambda: torch.optim.Adam(parameters, foreach=True),
        "sgd": lambda: torch.optim.SGD(parameters, foreach=True),
        "sgd-momentum": lambda: torch.optim.SGD(parameters, momentum=0.9, foreach=True),
        "adafactor": lambda: torch.optim.Adafactor(parameters, foreach=True),
        "adamw for-loop": lambda: torch.optim.AdamW(parameters, foreach=False),
        "muon": lambda: torch.optim.Muon(parameters),
    }[name]()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "sgd-momentum", "adafactor", "adamw for-loop", "muon"])
def test_states_and_temporaries(name: str, dtype: str) -> None:
    import torch

    from validation.real.live import LiveBytes

    kind = getattr(torch, dtype)
    ours = "fp32" if dtype == "float32" else "bf16"
    shapes = [(*shape,) for shape in MATRICES.values()]
    if name != "muon":
        shapes += [(count,) for count in VECTORS.values()]
    tensors = [torch.nn.Parameter(torch.randn(shape, dtype=kind)) for shape in shapes]
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    optimizer = make(name, tensors)
    with LiveBytes(smallest_bytes=9) as live:  # without step counts and norms
        optimizer.step()
        states = live.live
        live.peak = live.live
        optimizer.step()
        temporaries = live.peak - states
    word = name.split(maxsplit=1)[0]
    held = [(n, count) for n, count in PARAMETERS if name != "muon" or n in MATRICES]
    assert states == sum(s.num_bytes for s in state_storages(word, held, ours, MATRICES))  # type: ignore[arg-type]
    step = looped_step if name.endswith("for-loop") else foreach_step
    extra = {"shapes": MATRICES} if step is foreach_step else {}
    expected = peak_of(step(word, held, ours, ours, **extra))  # type: ignore[arg-type, operator]
    assert temporaries == expected
