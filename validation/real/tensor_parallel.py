"""Train a small Llama under DTensor tensor parallelism on the CPU with gloo, and write down what it really did.

``python -m validation.real.tensor_parallel 2`` prints, for each case, the collectives of forward and of backward (kind,
bytes of the whole tensor) and the bytes that autograd saved on rank 0, as JSON. :func:`measure` is for tests.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from validation.real.processes import launch, write

NUM_LAYERS, SEQUENCE, BATCH = 2, 16, 2
HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 64, 96, 8, 4, 256

CASES: dict[str, dict[str, bool]] = {
    "linear": {},
    "linear-sp": {"sp": True},
    "module": {"module": True},
    "module-sp": {"sp": True, "module": True},
    "loss-parallel": {"loss_parallel": True},
    "module-sp-loss-parallel": {"sp": True, "module": True, "loss_parallel": True},
    "checkpoint": {"checkpoint": True},
    "checkpoint-module-sp": {"sp": True, "module": True, "loss_parallel": True, "checkpoint": True},
}


def measure(num_ranks: int) -> dict[str, dict[str, Any]]:
    """Run the cases with so many processes: case -> what rank 0 wrote down; all ranks must have done the same."""
    written = launch(__file__, (), num_ranks)
    if any(each != written[0] for each in written):
        raise RuntimeError("the ranks differ")
    found: dict[str, dict[str, Any]] = written[0]
    return found


def worker(folder: str) -> None:
    """What each process runs."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {name: run(case) for name, case in CASES.items()}
    write(folder, found)
    torch.distributed.destroy_process_group()


def build(checkpoint: bool, num_ranks: int) -> Any:
    """Return the model, whose attention has a rank's heads. LayerNorm without bias: on the CPU its kernel is fused."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint as run_again

    width = HIDDEN // HEADS

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
            self.k_proj, self.v_proj = (nn.Linear(HIDDEN, KV_HEADS * width, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                f(x).unflatten(-1, (heads // num_ranks, width)).transpose(1, 2)
                for f, heads in ((self.q_proj, HEADS), (self.k_proj, KV_HEADS), (self.v_proj, KV_HEADS))
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o_proj(mixed.transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, FFN, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_layernorm, self.post_attention_layernorm = (nn.LayerNorm(HIDDEN, bias=False) for _ in range(2))
            self.self_attn, self.mlp = Attention(), Mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run_again(self.body, x, use_reentrant=False) if checkpoint else self.body(x)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.self_attn(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
            self.layers = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
            self.norm = nn.LayerNorm(HIDDEN, bias=False)
            self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed_tokens(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(self.norm(x))

    return Llama()


def run(case: dict[str, bool]) -> dict[str, Any]:
    """One forward and backward of one case."""
    import contextlib

    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel
    from torch.nn import functional

    from validation.real.recorder import Recorder

    torch.manual_seed(0)
    num_ranks = torch.distributed.get_world_size()
    model = build(case.get("checkpoint", False), num_ranks)
    divide(model, init_device_mesh("cpu", (num_ranks,)), case)
    collectives: list[tuple[str, int, int]] = []
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []
    parameters = {local(p).untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    with loss_parallel() if case.get("loss_parallel") else contextlib.nullcontext():
        with Recorder(collectives), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(tokens)
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        num_forward = len(collectives)
        with Recorder(collectives):
            loss.backward()
    return {
        "forward": collectives[:num_forward],
        "backward": collectives[num_forward:],
        "saved_bytes": sum(saved.values()),
        "parameter_bytes": sum(local(p).nbytes for p in model.parameters()),
    }


def divide(model: Any, mesh: Any, case: dict[str, bool]) -> None:
    """Parallelise as PyTorch's tutorial does (a plan for each linear), or as torchtitan (for each module's input)."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    stream = Shard(1) if case.get("sp") else Replicate()
    last = Shard(-1) if case.get("loss_parallel") else Replicate()
    parallelize_module(
        model, mesh,
        {
            "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
            "lm_head": ColwiseParallel(
                input_layouts=stream, output_layouts=last, use_local_output=not case.get("loss_parallel")
            ),
        } | ({"norm": SequenceParallel()} if case.get("sp") else {}),
    )  # fmt: skip
    source = Replicate() if case.get("module") else stream
    plan: dict[str, Any] = {
        f"{module}.{name}": ColwiseParallel(input_layouts=source)
        for module, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
        for name in names
    }
    plan |= {name: RowwiseParallel(output_layouts=stream) for name in ("self_attn.o_proj", "mlp.down_proj")}
    if case.get("sp"):
        plan |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
    if case.get("module"):
        plan |= {
            name: PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))
            for name in ("self_attn", "mlp")
        }
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)


def local(tensor: Any) -> Any:
    """Return what of a tensor is on this rank."""
    while hasattr(tensor, "to_local") or hasattr(tensor, "_local_tensor"):
        tensor = tensor._local_tensor
    return tensor.elem if hasattr(tensor, "elem") else tensor  # what an AsyncCollectiveTensor holds


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(sys.argv[2])
    else:
        print(json.dumps(measure(int(sys.argv[1])), indent=1))
