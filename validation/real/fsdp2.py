"""Train a small GPT under FSDP2 (``fully_shard``) and FSDP1 on the CPU with gloo, and write down what they really did.

``python validation/real/fsdp2.py 2`` prints, for each case, the collectives of a steady step (kind, bytes, ranks) and
the live bytes of every rank at its borders, as JSON. :func:`measure` is for tests.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

NUM_LAYERS, SEQUENCE, BATCH = 4, 16, 1
EVEN = {"hidden": 64, "heads": 4, "vocabulary": 256}
UNEVEN = {"hidden": 65, "heads": 5, "vocabulary": 251}
SMALLEST_BYTES = 32
"""Scalars (step counts, norms) are left out of live bytes; the smallest shard of a parameter has 56 bytes."""
NUM_STEPS = 2
"""The optimizer makes its states in the first; the last is the one that counts."""

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32-root-reshards": {"reshard_root": True},
    "fp32-keep": {"reshard": False},
    "bf16-fp32-reduce": {"param_dtype": "bf16", "reduce_dtype": "fp32"},
    "bf16-uneven": {"param_dtype": "bf16", "sizes": UNEVEN},
    "checkpoint-uneven": {"param_dtype": "bf16", "reduce_dtype": "fp32", "checkpoint": True, "sizes": UNEVEN},
    "accumulate-clip": {"param_dtype": "bf16", "reduce_dtype": "fp32", "microbatches": 3, "clipping": 1.0},
    "accumulate-no-sync": {"param_dtype": "bf16", "reduce_dtype": "fp32", "microbatches": 3, "sync": "last"},
    "accumulate-no-sync-fp32": {"microbatches": 2, "sync": "last", "sizes": UNEVEN},
    "separate": {"param_dtype": "bf16", "reduce_dtype": "fp32", "separate": True, "clipping": 1.0},
    "hsdp": {"replicas": 2, "param_dtype": "bf16", "reduce_dtype": "fp32", "microbatches": 2, "clipping": 1.0},
    "hsdp-fp32": {"replicas": 2, "sizes": UNEVEN},
    "reshard-to-2": {"reshard": 2, "param_dtype": "bf16", "reduce_dtype": "fp32"},
    "fsdp1-full": {"strategy": "FULL_SHARD", "param_dtype": "bf16", "reduce_dtype": "fp32", "clipping": 1.0},
    "fsdp1-full-uneven": {"strategy": "FULL_SHARD", "param_dtype": "bf16", "sizes": UNEVEN, "checkpoint": True},
    "fsdp1-orig-uneven": {"strategy": "FULL_SHARD", "param_dtype": "bf16", "sizes": UNEVEN, "orig": True},
    "fsdp1-accumulate": {"strategy": "FULL_SHARD", "microbatches": 3, "param_dtype": "bf16", "reduce_dtype": "fp32"},
    "fsdp1-no-sync": {"strategy": "FULL_SHARD", "microbatches": 3, "sync": "last", "param_dtype": "bf16"},
    "fsdp1-grad-op": {"strategy": "SHARD_GRAD_OP", "microbatches": 2, "param_dtype": "bf16", "reduce_dtype": "fp32"},
    "fsdp1-post": {"strategy": "FULL_SHARD", "prefetch": "BACKWARD_POST", "forward_prefetch": True},
    "fsdp1-hybrid": {"strategy": "HYBRID_SHARD", "replicas": 2, "param_dtype": "bf16", "reduce_dtype": "fp32"},
}
"""Cases with ``replicas`` or a number for ``reshard`` need four ranks; those with a ``strategy`` are FSDP1's."""


def cases(num_ranks: int) -> tuple[str, ...]:
    """Return the names of the cases that so many ranks can run: two dimensions need four, and only they run there."""
    wide = tuple(name for name, case in CASES.items() if "replicas" in case or case.get("reshard") == 2)
    narrow = tuple(name for name in CASES if name not in wide)
    return narrow if num_ranks < 4 else (*wide, "bf16-fp32-reduce", "checkpoint-uneven")


def measure(num_ranks: int, timeout_s: float = 300) -> dict[str, dict[str, Any]]:
    """Run the cases with so many processes: case -> what rank 0 wrote down, ``live_bytes`` of all ranks."""
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
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, str(Path(__file__).resolve()), "worker", folder]
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


def worker(folder: str) -> None:
    """What each process runs."""
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what the imports made is not looked through again
    torch.distributed.init_process_group("gloo")
    found = {name: run(CASES[name]) for name in cases(torch.distributed.get_world_size())}
    rank = torch.distributed.get_rank()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def build(sizes: dict[str, int], checkpoint: bool) -> Any:
    """Return the model: 12 parameters in a block, 53 in all."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint as run_again

    hidden, heads, vocabulary = sizes["hidden"], sizes["heads"], sizes["vocabulary"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln1 = nn.LayerNorm(hidden)
            self.qkv = nn.Linear(hidden, 3 * hidden)
            self.proj = nn.Linear(hidden, hidden)
            self.ln2 = nn.LayerNorm(hidden)
            self.fc1 = nn.Linear(hidden, 4 * hidden)
            self.fc2 = nn.Linear(4 * hidden, hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run_again(self.body, x, use_reentrant=False) if checkpoint else self.body(x)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            b, s, h = x.shape
            q, k, v = (t.view(b, s, heads, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(mixed.transpose(1, 2).reshape(b, s, h))
            return x + self.fc2(functional.gelu(self.fc1(self.ln2(x))))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(vocabulary, hidden)
            self.wpe = nn.Embedding(SEQUENCE, hidden)
            self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
            self.ln_f = nn.LayerNorm(hidden)
            self.head = nn.Linear(hidden, vocabulary, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.wte(tokens) + self.wpe(torch.arange(SEQUENCE).expand_as(tokens))
            for block in self.blocks:
                x = block(x)
            return self.head(self.ln_f(x))

    return Gpt()


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps of one case; write down the last."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    gc.collect()
    before = set(storages())
    sizes = case.get("sizes", EVEN)
    model = build(sizes, case.get("checkpoint", False))
    shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    model = wrap1(case, model) if "strategy" in case else wrap2(case, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    collectives: list[tuple[str, int, int]] = []
    recorder = _recorder(collectives)
    marks: list[int] = []
    live: list[int] = []
    microbatches = case.get("microbatches", 1)
    for step in range(NUM_STEPS):
        counts = step == NUM_STEPS - 1
        collectives.clear()
        marks.clear()
        live.clear()
        for microbatch in range(microbatches):
            last = microbatch == microbatches - 1
            whole = case.get("sync") == "last" and not last
            if "strategy" not in case:
                model.set_requires_gradient_sync(not whole)
            tokens = torch.randint(sizes["vocabulary"], (BATCH, SEQUENCE))
            with model.no_sync() if "strategy" in case and whole else nullcontext(), recorder():
                logits = model(tokens)
                marks.append(len(collectives))
                functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
            marks.append(len(collectives))
            del logits, tokens
            live.append(live_bytes(before) if counts else 0)
        with recorder():
            if case.get("clipping") and "strategy" in case:
                model.clip_grad_norm_(case["clipping"])
            elif case.get("clipping"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), case["clipping"])
            optimizer.step()
        live.append(live_bytes(before) if counts else 0)
        optimizer.zero_grad()
        live.append(live_bytes(before) if counts else 0)
    found = {"parameters": shapes, "collectives": list(collectives), "marks": list(marks), "live_bytes": list(live)}
    del model, optimizer, recorder
    gc.collect()
    return found


def wrap1(case: dict[str, Any], model: Any) -> Any:
    """Return the model with FSDP1 around each block and around it."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    param, reduce = dtypes[case.get("param_dtype")], dtypes[case.get("reduce_dtype")]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if "replicas" in case else None
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy[case["strategy"]],
        auto_wrap_policy=ModuleWrapPolicy({type(model.blocks[0])}),
        mixed_precision=MixedPrecision(param_dtype=param, reduce_dtype=reduce),
        backward_prefetch=BackwardPrefetch[case.get("prefetch", "BACKWARD_PRE")],
        forward_prefetch=case.get("forward_prefetch", False),
        use_orig_params=case.get("orig", False),
        device_id=torch.device("cpu"),
    )


def wrap2(case: dict[str, Any], model: Any) -> Any:
    """Return the model with ``fully_shard`` on each block and on it."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    world = torch.distributed.get_world_size()
    replicas = case.get("replicas", 1)
    shape, names = ((replicas, world // replicas), ("replicate", "shard")) if replicas > 1 else ((world,), ("shard",))
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    settings = {
        "mesh": init_device_mesh("cpu", shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtypes[case.get("param_dtype")], reduce_dtype=dtypes[case.get("reduce_dtype")]
        ),
    }
    reshard = case.get("reshard", True)
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, **settings)
    if case.get("separate"):  # as torchtitan does
        fully_shard([model.wte, model.wpe], reshard_after_forward=reshard, **settings)
        fully_shard([model.ln_f, model.head], reshard_after_forward=False, **settings)
        fully_shard(model, **settings)
    elif case.get("reshard_root"):
        fully_shard(model, reshard_after_forward=True, **settings)
    else:
        fully_shard(model, **settings)
    return model


def live_bytes(before: set[int]) -> int:
    """Return the bytes of all storages that a Python object reaches, each counted once, without those from before."""
    time.sleep(0.02)  # gloo's threads let go of their tensors a moment after the call returns
    gc.collect()
    return sum(num_bytes for pointer, num_bytes in storages().items() if pointer not in before)


def storages() -> dict[int, int]:
    """Return address -> bytes of the storages that are no scalars. A DTensor has none but its local tensor's."""
    import torch
    from torch.distributed.tensor import DTensor

    found: dict[int, int] = {}
    for tensor in [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]:
        gradient = None
        with suppress(RuntimeError):  # FSDP1's views of a flat parameter that is gone
            gradient = tensor.grad if tensor.is_leaf else None
        for each in (tensor, gradient):
            local = each.to_local() if isinstance(each, DTensor) else each
            if local is not None and local.device.type == "cpu" and local.layout == torch.strided:
                storage = local.untyped_storage()
                if storage.nbytes() >= SMALLEST_BYTES:
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def _recorder(collectives: list[tuple[str, int, int]]) -> Any:
    """Return a dispatch mode that writes down (kind, bytes as nccl-tests count them, ranks) of every collective."""
    import torch
    from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    def size(value: Any) -> int:
        if isinstance(value, (list, tuple)):
            return sum(size(each) for each in value)
        return int(value.numel() * value.element_size())

    # which argument holds the tensor whose size counts: the output of an all-gather, the input of a reduce-scatter
    counted = {
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 0),
        "allgather_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "broadcast_": ("broadcast", 0),
    }

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(issubclass(each, DTensor) for each in types):
                return NotImplemented  # it takes itself apart first, with this mode still on
            namespace, _, name = str(func._schema.name).partition("::")
            if namespace == "c10d" and name in counted:
                kind, argument = counted[name]
                group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
                collectives.append((kind, size(args[argument]), group.size()))
            elif namespace == "_c10d_functional" and name.startswith("all_reduce"):
                collectives.append(("all_reduce", size(args[0]), int(_resolve_process_group(args[-1]).size())))
            return func(*args, **(kwargs or {}))

    return Recorder


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2])
    else:
        print(json.dumps(measure(int(sys.argv[1]) if sys.argv[1:] else 2), indent=1))
