"""Train a small GPT under DeepSpeed on the CPU with gloo, and write down what it really did.

``python -m validation.real.deepspeed_zero`` prints, for each case, the live bytes between steps, the collectives of a
steady step, and the order in which modules were entered and gradients came, as JSON. :func:`measure` is for tests.

What a CPU needs: no shared-memory op (it compiles for minutes), ``torch._dynamo`` imported before any hook, and torch's
own AdamW, which DeepSpeed calls untested; the collectives and the bytes do not depend on these.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from validation.real.processes import first_with_all_live_bytes, launch, write

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


def measure(num_ranks: int, names: Sequence[str] = tuple(CASES)) -> dict[str, dict[str, Any]]:
    """Run the cases with so many processes and return what each rank wrote down: case -> measurement of rank 0.

    ``live_bytes`` is of all ranks, the rest of the first.
    """
    return first_with_all_live_bytes(launch(__file__, names, num_ranks, settings={"DS_ACCELERATOR": "cpu"}))


def worker(folder: str, names: Sequence[str]) -> None:
    """What each process runs."""
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.comm.torch

    gc.collect()
    gc.freeze()  # what the imports made is not looked through again
    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    found = {name: run(CASES[name]) for name in names}
    write(folder, found)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps of one case; write down the last."""
    import deepspeed
    import torch

    from validation.real.gpt import GptWithLoss
    from validation.real.recorder import Recorder, live_bytes, storages

    torch.manual_seed(0)
    gc.collect()
    before = set(storages(SMALLEST_BYTES))  # DeepSpeed keeps engines of earlier cases alive
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
    checkpoint = "around" if case.get("checkpoint") else ""
    with deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else nullcontext():
        model = GptWithLoss(HIDDEN, HEADS, VOCABULARY, NUM_LAYERS, SEQUENCE, checkpoint)
    shapes = [(name, getattr(p, "ds_numel", p.numel())) for name, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    log: list[tuple[str, str]] = []
    collectives: list[tuple[str, int, int]] = []
    _log_gradients(engine.module, log)
    if stage == 3:
        _log_modules(engine, log)
    recorder = Recorder(collectives)
    marks: list[int] = []
    after_first = 0
    for step in range(NUM_STEPS):
        log.clear()
        collectives.clear()
        marks.clear()
        for microbatch in range(microbatches):
            tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
            with recorder:
                loss = engine(tokens)
                marks.append(len(collectives))
                engine.backward(loss)
                marks.append(len(collectives))
            log.append(("end", ""))
            del loss, tokens
            if step == NUM_STEPS - 1 and microbatch == 0:
                after_first = live_bytes(before, SMALLEST_BYTES)
            with recorder:
                engine.step()
    found = {
        "parameters": shapes,
        "events": list(log),
        "collectives": list(collectives),
        "marks": list(marks),
        "live_bytes": live_bytes(before, SMALLEST_BYTES),
        "after_first_microbatch": after_first,
    }
    engine.destroy()
    del engine, model, optimizer, recorder
    gc.collect()
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        print(json.dumps(measure(2, sys.argv[1:] or tuple(CASES)), indent=1))
