"""Train a small GPT under DeepSpeed on the CPU with gloo, and write down what it really did.

``python validation/real/deepspeed_zero.py`` prints, for each case, the live bytes between steps, the collectives of a
steady step, and the order in which modules were entered and gradients came, as JSON. :func:`measure` is for tests.

What a CPU needs: no shared-memory op (it compiles for minutes), ``torch._dynamo`` imported before any hook, and torch's
own AdamW, which DeepSpeed calls untested; the collectives and the bytes do not depend on these.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NUM_LAYERS, HIDDEN, HEADS, SEQUENCE, VOCABULARY, BATCH = 4, 256, 8, 128, 1024, 2
SMALLEST_BYTES = 256
"""Scalars (step counts, norms, flags) are left out of live bytes; the smallest parameter has 512 bytes."""
NUM_STEPS = 4
"""ZeRO-3 checks its record in the second; the last is the one that counts."""

CASES: dict[str, dict[str, Any]] = {
    "zero0-fp32": {"dtype": "fp32", "zero": {"stage": 0}},
    "zero0-bf16-accumulate": {"dtype": "bf16", "microbatches": 2, "zero": {"stage": 0}},
    "zero1-bf16-accumulate": {
        "dtype": "bf16",
        "microbatches": 2,
        "zero": {"stage": 1, "reduce_bucket_size": 1_000_000},
    },
    "zero1-fp32": {"dtype": "fp32", "zero": {"stage": 1, "reduce_bucket_size": 500_000}},
    "zero1-bf16-overlap": {
        "dtype": "bf16",
        "zero": {"stage": 1, "reduce_bucket_size": 500_000, "overlap_comm": True},
    },
    "zero2-bf16-accumulate": {
        "dtype": "bf16",
        "microbatches": 2,
        "zero": {"stage": 2, "reduce_bucket_size": 500_000},
    },
    "zero2-bf16-reduce": {
        "dtype": "bf16",
        "zero": {"stage": 2, "reduce_bucket_size": 500_000, "use_multi_rank_bucket_allreduce": False},
    },
    "zero2-fp32-small-bucket": {"dtype": "fp32", "zero": {"stage": 2, "reduce_bucket_size": 200_000}},
    "zero3-bf16-accumulate": {
        "dtype": "bf16",
        "microbatches": 2,
        "zero": {"stage": 3, "reduce_bucket_size": 500_000},
    },
    "zero3-bf16-textbook": {
        "dtype": "bf16",
        "zero": {
            "stage": 3,
            "reduce_bucket_size": 500_000,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1,
            "stage3_max_reuse_distance": 0,
        },
    },
    "zero3-bf16-checkpoint": {
        "dtype": "bf16",
        "checkpoint": True,
        "zero": {
            "stage": 3,
            "reduce_bucket_size": 300_000,
            "stage3_prefetch_bucket_size": 200_000,
            "stage3_param_persistence_threshold": 1_000,
            "stage3_max_live_parameters": 1_500_000,
            "stage3_max_reuse_distance": 600_000,
            "sub_group_size": 700_000,
        },
    },
    "zero2-bf16-fp32-accumulation": {
        "dtype": "bf16",
        "microbatches": 2,
        "accumulation": "fp32",
        "zero": {"stage": 2, "reduce_bucket_size": 500_000},
    },
    "zero3-bf16-fp32-accumulation": {
        "dtype": "bf16",
        "microbatches": 2,
        "accumulation": "fp32",
        "zero": {"stage": 3, "reduce_bucket_size": 500_000, "reduce_scatter": False},
    },
    "zero3-fp32": {"dtype": "fp32", "zero": {"stage": 3, "reduce_bucket_size": 400_000}},
    "zero3-bf16-hpz": {
        "dtype": "bf16",
        "microbatches": 2,
        "zero": {
            "stage": 3,
            "reduce_bucket_size": 500_000,
            "zero_hpz_partition_size": 2,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 1_000,
            "stage3_max_live_parameters": 1,
            "stage3_max_reuse_distance": 0,
        },
    },
    # on a CPU the GPU's memory and the host's are one: their sum is what is seen
    "zero1-bf16-offload": {
        "dtype": "bf16",
        "microbatches": 2,
        "zero": {"stage": 1, "reduce_bucket_size": 500_000, "offload_optimizer": {"device": "cpu"}},
    },
    "zero2-bf16-offload": {
        "dtype": "bf16",
        "microbatches": 2,
        "zero": {"stage": 2, "reduce_bucket_size": 500_000, "offload_optimizer": {"device": "cpu"}},
    },
    "zero2-fp32-offload": {
        "dtype": "fp32",
        "zero": {"stage": 2, "reduce_bucket_size": 500_000, "offload_optimizer": {"device": "cpu"}},
    },
    "zero2-bf16-fp32-accumulation-offload": {
        "dtype": "bf16",
        "microbatches": 2,
        "accumulation": "fp32",
        "zero": {"stage": 2, "reduce_bucket_size": 500_000, "offload_optimizer": {"device": "cpu"}},
    },
    "zero3-bf16-offload": {
        "dtype": "bf16",
        "microbatches": 2,
        "zero": {
            "stage": 3,
            "reduce_bucket_size": 500_000,
            "sub_group_size": 700_000,
            "offload_optimizer": {"device": "cpu"},
        },
    },
    "zero3-bf16-offload-param": {
        "dtype": "bf16",
        "zero": {
            "stage": 3,
            "reduce_bucket_size": 300_000,
            "stage3_prefetch_bucket_size": 200_000,
            "stage3_param_persistence_threshold": 1_000,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        },
    },
}


def measure(num_ranks: int, names: Sequence[str] = tuple(CASES), timeout_s: float = 300) -> dict[str, dict[str, Any]]:
    """Run the cases with so many processes and return what each rank wrote down: case -> measurement of rank 0.

    ``live_bytes`` is of all ranks, the rest of the first.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = []
        for rank in range(num_ranks):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, str(Path(__file__).resolve()), "worker", folder, *names]
            workers.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs = []
        try:
            for worker in workers:
                outputs.append(worker.communicate(timeout=timeout_s)[0])  # noqa: PERF401
        finally:
            for worker in workers:
                worker.kill()
        if any(worker.returncode for worker in workers):
            raise RuntimeError("\n".join(f"--- rank {rank}\n{text[-4000:]}" for rank, text in enumerate(outputs)))
        written = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return {
        name: written[0][name] | {"live_bytes": [each[name]["live_bytes"] for each in written]} for name in written[0]
    }


def worker(folder: str, names: Sequence[str]) -> None:
    """What each process runs."""
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    found = {name: run(CASES[name]) for name in names}
    rank = torch.distributed.get_rank()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def build(checkpoint: bool) -> Any:
    """Return the model: 12 parameters in a block, 53 in all, 3 716 608 elements."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint as run_again

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln1 = nn.LayerNorm(HIDDEN)
            self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
            self.proj = nn.Linear(HIDDEN, HIDDEN)
            self.ln2 = nn.LayerNorm(HIDDEN)
            self.fc1 = nn.Linear(HIDDEN, 4 * HIDDEN)
            self.fc2 = nn.Linear(4 * HIDDEN, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, s, h = x.shape
            q, k, v = (t.view(b, s, HEADS, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(mixed.transpose(1, 2).reshape(b, s, h))
            return x + self.fc2(functional.gelu(self.fc1(self.ln2(x))))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(VOCABULARY, HIDDEN)
            self.wpe = nn.Embedding(SEQUENCE, HIDDEN)
            self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
            self.ln_f = nn.LayerNorm(HIDDEN)
            self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.wte(tokens) + self.wpe(torch.arange(SEQUENCE))
            for block in self.blocks:
                x = run_again(block, x, use_reentrant=True) if checkpoint else block(x)
            logits = self.head(self.ln_f(x))
            return functional.cross_entropy(logits.float().view(-1, VOCABULARY), tokens.view(-1))

    return Gpt()


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps of one case; write down the last."""
    import deepspeed
    import torch

    torch.manual_seed(0)
    gc.collect()
    before = set(storages(torch))  # DeepSpeed keeps engines of earlier cases alive
    stage = case["zero"]["stage"]
    microbatches = case.get("microbatches", 1)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": microbatches,
        "zero_optimization": case["zero"],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case["dtype"] == "bf16"},
        "data_types": {"grad_accum_dtype": case.get("accumulation", case["dtype"])},
    }
    if stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = build(case.get("checkpoint", False))
    else:
        model = build(case.get("checkpoint", False))
    shapes = [(name, getattr(p, "ds_numel", p.numel())) for name, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    log: list[tuple[str, str]] = []
    collectives: list[tuple[str, int]] = []
    _log_gradients(engine.module, log)
    if stage == 3:
        _log_modules(engine, log)
    recorder = _recorder(collectives)
    marks: list[int] = []
    after_first = 0
    for step in range(NUM_STEPS):
        log.clear()
        collectives.clear()
        marks.clear()
        for microbatch in range(microbatches):
            tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
            with recorder():
                loss = engine(tokens)
                marks.append(len(collectives))
                engine.backward(loss)
                marks.append(len(collectives))
            log.append(("end", ""))
            del loss, tokens
            if step == NUM_STEPS - 1 and microbatch == 0:
                after_first = live_bytes(torch, before)
            with recorder():
                engine.step()
    found = {
        "parameters": shapes,
        "events": list(log),
        "collectives": list(collectives),
        "marks": list(marks),
        "live_bytes": live_bytes(torch, before),
        "after_first_microbatch": after_first,
    }
    engine.destroy()
    del engine, model, optimizer, recorder
    gc.collect()
    return found


def live_bytes(torch: Any, before: set[int]) -> int:
    """Return the bytes of all storages that a Python object reaches, each counted once, without those from before."""
    gc.collect()
    return sum(num_bytes for pointer, num_bytes in storages(torch).items() if pointer not in before)


def storages(torch: Any) -> dict[int, int]:
    """Return address -> bytes of the storages that are no scalars."""
    found: dict[int, int] = {}
    for tensor in [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]:
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            if each is not None and each.device.type == "cpu" and each.layout == torch.strided:
                storage = each.untyped_storage()
                if storage.nbytes() >= SMALLEST_BYTES:
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def _log_gradients(module: Any, log: list[tuple[str, str]]) -> None:
    """Write down when each gradient is there, just before it is accumulated and DeepSpeed's hook runs."""
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda grad, name=name: log.append(("gradient", name)))


def _log_modules(engine: Any, log: list[tuple[str, str]]) -> None:
    """Write down when ZeRO-3 enters and leaves modules."""
    names = {id(module): name for name, module in engine.module.named_modules()}
    offload = engine.optimizer.parameter_offload
    for event, method in (
        ("pre_forward", "pre_sub_module_forward_function"),
        ("post_forward", "post_sub_module_forward_function"),
        ("pre_backward", "pre_sub_module_backward_function"),
        ("post_backward", "post_sub_module_backward_function"),
    ):
        original = getattr(offload, method)

        def logged(module: Any, event: str = event, original: Callable[[Any], None] = original) -> None:
            log.append((event, names[id(module)]))
            original(module)

        setattr(offload, method, logged)


def _recorder(collectives: list[tuple[str, int]]) -> Any:
    """Return a dispatch mode that writes down (kind, bytes as nccl-tests count them) of every collective."""
    from torch.utils._python_dispatch import TorchDispatchMode

    def size(value: Any) -> int:
        while isinstance(value, (list, tuple)):
            value = value[0]
        return int(value.numel() * value.element_size())

    # which argument holds the tensor whose size counts: the output of an all-gather, the input of a reduce-scatter
    counted = {
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "reduce_": ("reduce", 0),
        "broadcast_": ("broadcast", 0),
        "allgather_": ("all_gather_list", 0),
    }

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            namespace, _, name = str(func._schema.name).partition("::")
            if namespace == "c10d" and name in counted:
                kind, argument = counted[name]
                collectives.append((kind, size(args[argument])))
            return func(*args, **(kwargs or {}))

    return Recorder


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        print(json.dumps(measure(2, sys.argv[1:] or tuple(CASES)), indent=1))
