"""What a compiled block keeps for backward equals the plan of the layer, to the byte, against torch's own partitioner.

A real block is traced by torch.compile; AOTAutograd cuts the joint graph (min_cut_rematerialization_partition, with
Inductor's decompositions), and the tensors that its forward graph hands to backward are counted. No kernel is compiled.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import pytest

from sim.parallel.emit import Recompute
from sim.parallel.fuse import compile_block
from tests.real.test_saved_bytes import FUSED, MODELS, SEQ, ledger_of, tables_for, torch_dtype
from tests.real.test_selective_checkpoint import policy

pytestmark = pytest.mark.real

BATCH = 2
CASES = [
    *((name, "none") for name in ("llama", "llama_mha", "llama_mqa", "gemma_mlp", "gpt", "opt", "falcon_7b", "neox")),
    *((name, "full") for name in ("llama", "gpt")),
    *((name, "selective-op") for name in ("llama", "llama_mqa", "gemma_mlp")),
]
RNG_STATE = 16


def is_view(node: Any) -> bool:
    """Whether a node of the graph shares the storage of its argument; parts of a split do."""
    if node.target is operator.getitem:
        return "split" in str(node.args[0].target)
    return any(word in str(node.target) for word in ("view", "permute", "alias", "split"))


def kept_by_torch(block: Any, x: Any, tables: Any) -> int:
    """Bytes of the storages that the compiled forward keeps, parameters and tables left out."""
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found: dict[str, int] = {}

    def forward(graph: Any, inputs: Any) -> Any:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        for node in outputs[1:]:
            source = node
            while source.op == "call_function" and is_view(source):
                source = source.args[0]
            value = source.meta["val"]
            outside = source.op == "placeholder" and (value.dim() < 3 or value.is_complex())
            # a table in conjugate is a view of it; the random state belongs to a checkpoint, not to the block
            if not outside and "conj" not in str(source.target) and value.dtype != torch.uint8:
                found[source.name] = value.numel() * value.element_size()
        return graph

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda graph, inputs: graph, decompositions=select_decomp_table(),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )  # fmt: skip
    torch._dynamo.reset()
    torch.compile(block, backend=backend)(x, tables).sum().backward()
    return sum(found.values())


@pytest.mark.parametrize(("name", "recompute"), CASES)
def test_kept_bytes(name: str, recompute: str) -> None:
    import torch
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from validation.real import modules

    config, dtype = MODELS[name], torch_dtype("bf16")
    block = modules.Block(config, "torch", "sdpa", fused=name in FUSED).to(dtype)
    tables = tables_for(config, "torch", dtype)
    x = torch.randn(BATCH, SEQ, config.hidden_size, dtype=dtype, requires_grad=True)
    if recompute == "full":
        block = checkpoint_wrapper(block, preserve_rng_state=False)
    elif recompute == "selective-op":
        block = checkpoint_wrapper(block, context_fn=policy, preserve_rng_state=False)
    layer = ledger_of(config, "torch", "flash-2", ("bf16", False)).layers[1]
    compiled = compile_block(layer, Recompute(recompute, reentrant=False))  # type: ignore[arg-type]
    sizes = {t.name: t.num_bytes for op in layer.forward for t in (*op.writes, *op.keeps)}
    assert layer.input is not None
    sizes[layer.input.name] = layer.input.num_bytes
    kept = {saved for op in compiled.forward for saved in op.saves}
    expected = sum(sizes[saved] for saved in sorted(kept))
    causes = {"random state of flash": -RNG_STATE if "attention.rng_state" in kept else 0}
    statistics = [sizes[saved] for saved in sorted(kept) if saved.endswith((".mean", ".rstd"))]
    if config.norm == "layernorm":
        causes["mean and rstd are in the input's dtype on the CPU"] = -sum(statistics) // 2
    if config.parallel_block and config.num_block_norms == 2:
        causes["two norms of one input share mean and rstd, as one expression"] = -sum(statistics) // 4
    if config.hidden_act == "relu":
        causes["the mask is made of the result, of which a view is kept"] = sizes["activated"] // 2
    assert kept_by_torch(block, x, tables) == expected + sum(causes.values())
