"""Train a small GPT under FSDP2 (``fully_shard``) and FSDP1 on the CPU with gloo, and write down what they really did.

``python -m validation.real.fsdp2 2`` prints, for each case, the collectives of a steady step (kind, bytes, ranks) and
the live bytes of every rank at its borders, as JSON. :func:`measure` is for tests.
"""

from __future__ import annotations

import gc
import json
import sys
from contextlib import nullcontext
from typing import Any

from validation.real.processes import first_with_all_live_bytes, launch, write

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


def measure(num_ranks: int) -> dict[str, dict[str, Any]]:
    """Run the cases with so many processes: case -> what rank 0 wrote down, ``live_bytes`` of all ranks."""
    return first_with_all_live_bytes(launch(__file__, (), num_ranks))


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
    write(folder, found)
    torch.distributed.destroy_process_group()


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps of one case; write down the last."""
    import torch
    from torch.nn import functional

    from validation.real.gpt import Gpt
    from validation.real.recorder import Recorder, live_bytes, storages

    torch.manual_seed(0)
    gc.collect()
    before = set(storages(SMALLEST_BYTES))
    sizes = case.get("sizes", EVEN)
    model = Gpt(
        **sizes, num_layers=NUM_LAYERS, sequence=SEQUENCE, checkpoint="inside" if case.get("checkpoint") else ""
    )
    shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    model = wrap1(case, model) if "strategy" in case else wrap2(case, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    collectives: list[tuple[str, int, int]] = []
    recorder = Recorder(collectives)
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
            with model.no_sync() if "strategy" in case and whole else nullcontext(), recorder:
                logits = model(tokens)
                marks.append(len(collectives))
                functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
            marks.append(len(collectives))
            del logits, tokens
            live.append(live_bytes(before, SMALLEST_BYTES) if counts else 0)
        with recorder:
            if case.get("clipping") and "strategy" in case:
                model.clip_grad_norm_(case["clipping"])
            elif case.get("clipping"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), case["clipping"])
            optimizer.step()
        live.append(live_bytes(before, SMALLEST_BYTES) if counts else 0)
        optimizer.zero_grad()
        live.append(live_bytes(before, SMALLEST_BYTES) if counts else 0)
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2])
    else:
        print(json.dumps(measure(int(sys.argv[1]) if sys.argv[1:] else 2), indent=1))
