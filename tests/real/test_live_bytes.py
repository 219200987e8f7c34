"""What is live at the peak of a layer's forward and backward equals the ledger, to the byte, against real modules.

The ledger is replayed by its own rules (a storage lives until its last reader of the pass, longer while saved), the
module runs under a dispatch mode that follows every storage. Parameters' gradients count in both.
"""

from __future__ import annotations

import itertools

import pytest

from sim.ir.ledger import DTYPE_BYTES, Layer, Op
from tests.real.test_saved_bytes import (
    EMBEDDINGS,
    FUSED,
    MODELS,
    SEQ,
    Mode,
    block_causes,
    ledger_of,
    norm_on_cpu,
    tables_for,
    torch_dtype,
)

pytestmark = pytest.mark.real


def replay(layer: Layer, *, given: tuple[str, ...] = (), gradient_dtype: str = "fp32") -> tuple[int, int, int]:
    """Return (peak of forward, bytes kept after it, peak of backward) of one layer, input and output counted.

    Scratch of fused attention is left out: the CPU's kernel hides its own.
    """
    saved: dict[str, set[str]] = {}
    for op in layer.forward:
        for name in op.saves:
            saved.setdefault(name, set()).add(op.name)
    live: dict[str, int] = {}
    if layer.input is not None:
        live[layer.input.name] = layer.input.num_bytes
    border = {"input", "output", "loss"} - set(given)
    forward_peak = _walk(layer, layer.forward, live, saved, border, gradient_dtype)
    kept = sum(live.values())
    for name in border - set(saved) - {"input"}:
        live.pop(name, None)
    if layer.output is not None:
        live["grad:output"] = layer.output.num_bytes
    return forward_peak, kept, _walk(layer, layer.backward, live, saved, {"grad:input"}, gradient_dtype)


def _walk(
    layer: Layer, ops: tuple[Op, ...], live: dict[str, int], saved: dict[str, set[str]], border: set[str], dtype: str
) -> int:
    """Run ops on the live set; return the peak."""
    last = {name: i for i, op in enumerate(ops) for name in (*(t.name for t in op.writes), *op.reads)}
    sizes = {p.name: p.num_elements * DTYPE_BYTES[dtype] for p in layer.parameters}
    peak = 0
    for i, op in enumerate(ops):
        live |= {t.name: t.num_bytes for t in (*op.writes, *op.keeps)}
        live |= {f"gradient of {name}": sizes[name] for name in op.gradients}
        scratch = 0 if op.region == "core_attention" else sum(t.num_bytes for t in op.scratch)
        peak = max(peak, sum(live.values()) + scratch)
        for savers in saved.values():
            savers -= set(op.releases)
        for name in list(live):
            held = saved.get(name) or name in border or name.startswith("gradient of ") or last.get(name, -1) > i
            if not held:
                del live[name]
    return peak


KERNELS = ("flash-2", "math")
DTYPES = ("fp32", "bf16")
EAGER = ("llama", "llama_mha", "llama_mqa", "gemma_mlp", "gpt", "opt", "bloom", "mpt", "neox", "falcon_40b")
PLAIN = ("gpt", "opt", "no_bias", "falcon_7b")
CASES = [
    *itertools.product(("huggingface",), EAGER, KERNELS, DTYPES),
    *itertools.product(("huggingface",), ("opt_350m",), KERNELS, ("fp32",)),
    *itertools.product(("torch",), PLAIN, KERNELS, ("fp32",)),
    *itertools.product(("torch",), PLAIN, ("flash-2",), ("bf16",)),
]


@pytest.mark.parametrize(("code", "name", "kernel", "dtype"), CASES)
def test_block(code: str, name: str, kernel: str, dtype: str) -> None:
    """The block's output is scaled by ones, so that its gradient arrives as a tensor that nobody else holds."""
    import torch

    from validation.real import modules
    from validation.real.live import LiveBytes

    config, mode = MODELS[name], _mode(dtype)
    block = modules.Block(config, code, "sdpa" if kernel == "flash-2" else kernel, fused=name in FUSED)
    block = block.to(torch_dtype(dtype))
    tables = tables_for(config, code, torch_dtype(dtype))
    leaf = torch.randn(2, SEQ, config.hidden_size, dtype=torch_dtype(dtype), requires_grad=True)
    ones, gradient = torch.ones_like(leaf), torch.randn_like(leaf).detach()
    with LiveBytes() as live:
        x = leaf.clone()
        output = block(x, tables)
        forward_peak, kept = live.peak, live.live
        scaled = output * ones.detach()
        del x, output
        beside, live.peak = scaled.untyped_storage().nbytes(), 0
        scaled.backward(gradient)
    causes = sum(block_causes(config, code, kernel, mode, 2).values())
    expected = replay(ledger_of(config, code, kernel, mode).layers[1], gradient_dtype=dtype)
    measured = (forward_peak, kept, live.peak - beside)
    assert measured == tuple(part + causes for part in expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("code", "name"), [("huggingface", "llama"), ("huggingface", "gpt"), ("torch", "gpt")])
def test_head_and_loss(code: str, name: str, dtype: str) -> None:
    import torch

    from validation.real import modules
    from validation.real.live import LiveBytes

    config = EMBEDDINGS[name]
    head = modules.Head(config, code).to(torch_dtype(dtype))
    labels = torch.randint(config.vocab_size, (2, SEQ))
    leaf = torch.randn(2, SEQ, config.hidden_size, dtype=torch_dtype(dtype), requires_grad=True)
    with LiveBytes() as live:
        x = leaf.clone()
        loss = head(x, labels)
        forward_peak, kept = live.peak, live.live
        del x
        live.peak = 0
        loss.backward()
    cause = norm_on_cpu(config, code, _mode(dtype), 2 * SEQ, config.hidden_size)
    expected = replay(ledger_of(config, code, "flash-2", _mode(dtype)).layers[-1], gradient_dtype=dtype)
    held = 4 + 4  # the loss that we hold, and the one that backward() was called with
    assert (forward_peak, kept, live.peak - held) == tuple(part + cause for part in expected)


def _mode(dtype: str) -> Mode:
    return ("fp32", False) if dtype == "fp32" else ("bf16", False)
