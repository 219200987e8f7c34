"""The section ``training``: batch, precision, optimizer, and whose code the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim.interop.deepspeed_config import DeepSpeedReading, DeepSpeedSettings
from sim.interop.values import Problem, read_mapping
from sim.scenario import fields
from sim.scenario.checks import multiples, write
from sim.scenario.draft import Draft, UnknownError
from sim.scenario.sections.deepspeed import deepspeed_of
from sim.scenario.sections.model import is_gpt
from sim.scenario.sections.resolution import EIGHT_BIT, OWN_DEFAULT, Resolution, plain

MEGATRON_DROPOUT = 0.1
"""``--hidden-dropout`` and ``--attention-dropout`` where they are left out (megatron/training/arguments.py)."""


def read_training(r: Resolution, given: object, framework: str | None) -> None:
    """Fill the draft with the batch, precision, optimizer, and what runs; each default with its source."""
    values, wrong = read_mapping(given, fields.TRAINING, ("training",), r.problems)
    d = r.draft
    if "sequence_length" in values:
        d.sequence_length = values["sequence_length"]
    for key, default, source in (
        ("recompute", "none", "sim's default"),
        ("attention", "sdpa", "torch's scaled_dot_product_attention, which Hugging Face's models call"),
        ("compile", False, "sim's default"),
    ):
        if key not in wrong:
            setattr(d, key, values.get(key, default))
            if key not in values:
                r.sources[f"training.{key}"] = source
    _batch(r, values, wrong)
    for key in ("precision", "optimizer", "gradient_clipping"):
        if key not in wrong:
            _agreed(r, key, values.get(key), framework)
    if "code" not in wrong:
        _code(r, values.get("code"))
        _selective(r, framework)
        _attention(r, "attention" in values, framework)
    d.norms = values.get("norms")
    d.softmax = values.get("softmax")
    d.metrics = values.get("metrics", 0)
    d.launch_blocking = values.get("launch_blocking", False)
    _cpu_threads(r, values.get("cpu_threads"), framework)
    d.sample_length = values.get("sample_length", 0)
    d.recompute_interval = values.get("recompute_interval", 1)
    if d.recompute_interval > 1 and d.knows("recompute") and d.recompute == "none":
        r.warnings.append(f"recompute_interval {d.recompute_interval} changes nothing: recompute is none")
    if "checkpoint" not in wrong and d.knows("code"):
        ours = framework == "deepspeed" and d.code == "megatron"
        d.checkpoint = values.get("checkpoint", "deepspeed" if ours else "torch")
        if "checkpoint" not in values:
            r.sources["training.checkpoint"] = "what the model's code calls"
    if "loss" not in wrong and d.knows("code"):
        # compiling a model, or its blocks, leaves the loss function outside of it
        d.loss = values.get("loss", "vocab-parallel" if d.code == "megatron" else "eager")
        if "loss" not in values:
            r.sources["training.loss"] = "that of the model's code"


def _conflict(r: Resolution, key: str, ours: object, theirs: str, value: object) -> None:
    r.problems.append(
        Problem(
            ("training", key),
            f"training.{key} = {plain(ours)}, but {r.ds_name} says {theirs} {plain(value)}",
            f"write the same in both, or leave training.{key} out",
        )
    )


def _cpu_threads(r: Resolution, given: int | None, framework: str | None) -> None:
    """OpenMP threads of a rank, as its launcher sets them.

    torchrun writes ``OMP_NUM_THREADS=1`` where there is more than one process a node (torch/distributed/run.py,
    ``config_from_args``); the ``deepspeed`` launcher leaves it out, and OpenMP takes all cores. With
    ``--bind_cores_to_rank`` each rank has its part of them, which is what threads that take turns come to.
    """
    d = r.draft
    if given is not None:
        d.cpu_threads = given
        if "sources" in r.doc.data:  # a resolved scenario says everything
            return
        if d.knows("node") and given > d.node.num_cpu_cores:
            r.warnings.append(
                f"cpu_threads {given}: {d.node.name} has {d.node.num_cpu_cores} cores, which the ranks of a node share"
            )
        if given and framework in ("ddp", "megatron"):
            r.warnings.append(f"cpu_threads {given} changes nothing: {framework}'s step is on the GPUs")
    elif framework == "deepspeed":
        d.cpu_threads = 0
        r.sources["training.cpu_threads"] = "all cores: the deepspeed launcher leaves OMP_NUM_THREADS as it is"
    elif d.knows("num_gpus") and d.num_gpus == d.num_nodes:
        d.cpu_threads = 0
        r.sources["training.cpu_threads"] = "all cores: torchrun leaves OMP_NUM_THREADS to one process a node"
    else:
        d.cpu_threads = 1
        r.sources["training.cpu_threads"] = "torchrun sets OMP_NUM_THREADS=1 for several processes a node"


def _batch(r: Resolution, values: Mapping[str, Any], wrong: set[str]) -> None:
    """Micro and global batch: from the scenario, else from DeepSpeed's three numbers."""
    d, reading = r.draft, deepspeed_of(r) or DeepSpeedReading()
    micro, batch = values.get("micro_batch_size"), values.get("global_batch_size")
    total, small, steps = reading.train_batch_size, reading.micro_batch_size, reading.accumulation_steps
    for key, ours, theirs, name in (
        ("micro_batch_size", micro, small, "train_micro_batch_size_per_gpu"),
        ("global_batch_size", batch, total, "train_batch_size"),
    ):
        if ours is not None and theirs is not None and ours != theirs:
            _conflict(r, key, ours, name, theirs)
            return
    if wrong & {"micro_batch_size", "global_batch_size"}:
        if micro is not None:
            d.micro_batch_size = micro
        return
    dp = d.dp if d.knows("dp") else None
    if micro is None and small is not None:
        micro = small
        r.sources["training.micro_batch_size"] = f"{r.ds_name}: train_micro_batch_size_per_gpu"
    if batch is None and total is not None:
        batch = total
        r.sources["training.global_batch_size"] = f"{r.ds_name}: train_batch_size"
    if micro is None:
        micro = _micro_of(r, batch, total is not None, steps, dp)
    if micro is None:
        return
    d.micro_batch_size = micro
    if batch is None and dp:
        batch = micro * dp * (steps or 1)
        words = f"dp x micro_batch_size x {steps} accumulation steps" if steps else "dp x micro_batch_size"
        r.sources["training.global_batch_size"] = words
    if batch is None:
        return
    if steps is not None and dp and batch != micro * dp * steps:
        # deepspeed/runtime/config.py, _batch_assertion
        r.problems.append(
            Problem(
                ("training", "global_batch_size") if "global_batch_size" in values else ("deepspeed",),
                f"a batch of {batch} is not micro_batch_size {micro} * dp {dp} * gradient_accumulation_steps "
                f"{steps} = {micro * dp * steps}",
                f"write {micro * dp * steps} as the batch, or leave gradient_accumulation_steps out",
            )
        )
        return
    d.global_batch_size = batch


def _micro_of(r: Resolution, batch: int | None, in_file: bool, steps: int | None, dp: int | None) -> int | None:
    """Return the microbatch that follows from the batch and DeepSpeed's accumulation steps, if any does.

    ``in_file``: the batch is DeepSpeed's ``train_batch_size``, which says enough without the steps.
    """
    if batch is not None and dp and (in_file or steps is not None):
        # deepspeed/runtime/config.py, _set_batch_related_parameters: one accumulation step unless said
        micro, rest = divmod(batch, dp * (steps or 1))
        if micro and not rest:
            r.sources["training.micro_batch_size"] = f"global_batch_size / (dp x {steps or 1} accumulation steps)"
            return micro
        r.problems.append(
            Problem(
                ("deepspeed",),
                f"a batch of {batch} does not divide over dp {dp}"
                + (f" * gradient_accumulation_steps {steps}" if steps else ""),
                write("train_batch_size", multiples(dp * (steps or 1), batch)),
            )
        )
    elif r.draft.knows("deepspeed") and (dp or batch is None or steps is None):
        parent = ("training",) if ("training",) in r.doc.lines else ()
        r.problems.append(
            Problem(
                parent,
                "training.micro_batch_size is missing",
                "write the sequences of one rank's microbatch, such as 1",
            )
        )
    return None


def _agreed(r: Resolution, key: str, ours: Any, framework: str | None) -> None:
    """A setting that the scenario and the ds_config may both give: they have to agree."""
    d, reading = r.draft, deepspeed_of(r)
    if framework == "deepspeed" and not d.knows("deepspeed") and ours is None:
        return
    theirs, name = None, ""
    if reading is not None:
        theirs = getattr(reading, key)
        name = {"precision": f"{theirs}.enabled", "optimizer": "optimizer.type"}.get(key, key)
    unsaid = key == "precision" and reading is not None and not reading.precision_given
    if unsaid and ours not in (None, "fp32", "tf32"):
        r.warnings.append(
            f"{r.ds_name} enables neither bf16 nor fp16, so DeepSpeed itself would train in fp32; "
            f"training.precision: {ours} is what is simulated"
        )
        theirs = None
    if ours is not None and theirs is not None and not _same(key, ours, theirs):
        if key == "precision":
            _conflict(r, key, ours, *(("bf16 and fp16", "off") if theirs == "fp32" else (name, "true")))
        else:
            _conflict(r, key, ours, name, theirs)
        return
    path = f"training.{key}"
    if ours is not None:
        value = ours
    elif theirs is not None:
        value = theirs
        words = name if key != "precision" else ("neither bf16 nor fp16 is enabled" if theirs == "fp32" else name)
        r.sources[path] = f"{r.ds_name}: {words}"
    elif key == "precision":
        if not d.knows("gpu"):
            return
        value = next((p for p in ("bf16", "fp16", "fp32") if p in d.gpu.peak_flops), "fp32")
        r.sources[path] = f"the best that {d.gpu.name} trains in"
    elif key == "optimizer":
        value = "adamw"
        r.sources[path] = "sim's default"
    else:
        defaults = {
            "deepspeed": (
                DeepSpeedSettings().gradient_clipping,
                "DeepSpeed's default (deepspeed/runtime/constants.py)",
            ),
            "megatron": (1.0, "Megatron's default (megatron/training/arguments.py)"),
        }
        value, r.sources[path] = defaults.get(framework or "", (0.0, "no clipping, as it is left out"))
    setattr(d, key, value)


def _code(r: Resolution, given: str | None) -> None:
    d = r.draft
    if given is not None:
        d.code = given
    else:
        try:
            d.code, words = default_code(d)
        except UnknownError:
            return
        r.sources["training.code"] = words
    _dropout(r)


def _attention(r: Resolution, given: bool, framework: str | None) -> None:
    """Megatron's own layers take FlashAttention only where a flag asks for it; ``megatron`` itself: megatron.py."""
    d = r.draft
    if not given and framework == "deepspeed" and d.knows("code") and d.code == "megatron":
        d.attention = "math"
        r.sources["training.attention"] = "Megatron-DeepSpeed's fused softmax, without --use-flash-attn"


def _selective(r: Resolution, framework: str | None) -> None:
    """Plain torch modules under FSDP have no core of attention to recompute: torchtitan's "selective" is by op."""
    d = r.draft
    if not (d.knows("recompute") and d.knows("code")) or d.recompute != "selective":
        return
    if d.code == "torch" and framework in ("fsdp1", "fsdp2"):
        d.recompute = "selective-op"
        r.sources["training.recompute"] = "selective, which for plain torch modules is torchtitan's policy by op"
        r.warnings.append(
            "recompute: selective is taken as selective-op, torchtitan's policy by op: plain torch modules have no "
            "recompute of the attention core, which is Megatron's (code: megatron)"
        )


def _dropout(r: Resolution) -> None:
    """Megatron drops a tenth unless its command says otherwise; people who train Llamas with it say otherwise."""
    d = r.draft
    try:
        if d.code != "megatron" or not is_gpt(d.model):
            return
    except UnknownError:  # what is wrong with the model is said already
        return
    silent = [key for key in ("dropout", "attention_dropout") if r.sources.get(f"model.{key}") == OWN_DEFAULT]
    for key in silent:
        setattr(d.model, key, MEGATRON_DROPOUT)
        r.sources[f"model.{key}"] = "Megatron's default (megatron/training/arguments.py)"
    if silent:
        r.warnings.append(
            f"{' and '.join(silent)} of the model {'is' if len(silent) == 1 else 'are'} taken as "
            f"{MEGATRON_DROPOUT}, Megatron's default for what its command does not say; write model.dropout: 0 "
            "and model.attention_dropout: 0 for a run without"
        )


def _same(key: str, ours: object, theirs: object) -> bool:
    if key == "precision":
        return ours == theirs or (theirs == "fp32" and ours == "tf32") or (theirs == "bf16" and ours in EIGHT_BIT)
    if key == "optimizer":
        return {ours, theirs} <= {"adam", "adamw"} or ours == theirs
    return ours == theirs


def default_code(d: Draft) -> tuple[str, str]:
    """Return whose modules run, and why: the code that people run under this framework.

    Megatron's for Megatron; also for DeepSpeed where it stands on Megatron's model (Megatron-DeepSpeed): with tensor
    or pipeline parallelism, or for a GPT block with learned positions. Hugging Face's for its Llama-like models,
    named or given by their config, except under fsdp2 (torchtitan). Plain torch for the rest.
    """
    m = d.model
    if d.framework == "megatron":
        return "megatron", "the framework's own model"
    if d.framework == "deepspeed":
        if d.tp > 1 or d.pp > 1:
            return "megatron", "Megatron-DeepSpeed, as DeepSpeed has tp and pp from Megatron"
        if is_gpt(m):
            return "megatron", "Megatron-DeepSpeed, as the model is a GPT with learned positions"
    published = m.at != "place" or m.family
    if d.framework != "fsdp2" and published and m.norm == "rmsnorm":
        return "huggingface", "transformers' modules, as the model is one of its Llama-like ones"
    return "torch", "plain torch modules"
