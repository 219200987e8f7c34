"""What per-op selective checkpointing keeps between the passes equals the plan of the layer, to the byte.

The policy is torchtitan's (torchtitan/distributed/activation_checkpoint.py): fused attention and every second matrix
product are kept, all else runs again. A real block runs under torch.utils.checkpoint with it on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest

from sim.parallel.emit import Recompute, plan_layer
from tests.real.test_saved_bytes import FUSED, MODELS, SEQ, Mode, ledger_of, tables_for, torch_dtype

pytestmark = pytest.mark.real

BATCH = 2
NAMES = ("llama", "llama_mha", "llama_mqa", "gemma_mlp", "gpt", "opt", "falcon_7b", "no_bias")


def policy() -> Any:
    """torchtitan's: save in the forward count as in the recomputed one."""
    import torch
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    aten = torch.ops.aten
    kept = {aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_flash_attention_for_cpu.default}
    counts = {False: 0, True: 0}

    def choose(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        if operator == aten.mm.default:
            counts[context.is_recompute] += 1
            save = counts[context.is_recompute] % 2 == 1
        else:
            save = operator in kept
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_kept_bytes(name: str, dtype: str) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    from validation.real import modules
    from validation.real.live import LiveBytes

    mode: Mode = ("fp32", False) if dtype == "fp32" else ("bf16", False)
    config = MODELS[name]
    block = modules.Block(config, "torch", "sdpa", fused=name in FUSED).to(torch_dtype(dtype))
    tables = tables_for(config, "torch", torch_dtype(dtype))
    leaf = torch.randn(BATCH, SEQ, config.hidden_size, dtype=torch_dtype(dtype), requires_grad=True)
    with LiveBytes() as live, set_checkpoint_early_stop(False):
        x = leaf.clone()
        output = checkpoint(block, x, tables, use_reentrant=False, context_fn=policy)
        kept = live.live
        output.sum().backward()

    layer = ledger_of(config, "torch", "flash-2", mode).layers[1]
    plan = plan_layer(layer, Recompute("selective-op", reentrant=False), mode[0])
    held = [slot for verb, slot, _ in (s for s in plan.forward if isinstance(s, tuple)) if verb == "alloc"]
    freed = {slot for verb, slot, _ in (s for s in plan.forward if isinstance(s, tuple)) if verb == "free"}
    assert layer.input is not None
    assert layer.output is not None
    border = {0: layer.input.num_bytes, 1: layer.output.num_bytes}
    expected = border[0] + sum(
        border[slot] if slot in border else plan.slots[slot - 4].num_bytes for slot in held if slot not in freed
    )
    state = 16  # the random state that CUDA's kernel keeps, the CPU's does not
    assert kept == expected - state
