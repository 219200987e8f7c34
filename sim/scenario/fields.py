"""The keys of a scenario file: one table a section. They are read by it, and the JSON Schema is made from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sim import units
from sim.interop.hf_config import FAMILIES, MODEL_KEYS
from sim.interop.values import (
    Key,
    Problem,
    WrongValueError,
    boolean,
    choice,
    flops,
    frequency,
    integer,
    mapping_schema,
    measured,
    number,
    power,
    rate,
    read_mapping,
    show,
    size,
    text,
)
from sim.scenario.schema import NCCL_VERSION

OLDEST_NCCL = (2, 7)
BACKENDS = ("nccl", "gloo", "alpha-beta")
FRAMEWORKS = ("ddp", "fsdp2", "fsdp1", "deepspeed", "megatron")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4")
RECOMPUTES = ("none", "selective", "selective-op", "full")
ATTENTIONS = ("math", "flash-1", "flash-triton", "flash-2", "flash-3", "sdpa", "cudnn")
OPTIMIZERS = ("adamw", "adam", "sgd", "sgd-momentum", "adafactor", "adam-8bit", "lion", "muon")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-2p", "zb-v", "v-half", "v-min", "dualpipe", "dualpipev")


def _anything(schema: dict[str, Any], doc: str = "", required: bool = False) -> Key:
    """A section or a value that is read later, where its meaning is known."""
    return Key(lambda value: value, schema, doc, required)


def _whole_numbers(doc: str) -> Key:
    one = integer(0, 1000, 4)

    def read(value: object) -> tuple[int, ...]:
        if not isinstance(value, list) or not value:
            raise WrongValueError(
                f"{show(value)} is not a list of whole numbers", "write one number a stage: [2, 3, 3, 2]"
            )
        if len(value) > 4096:
            raise WrongValueError("the list is too long", "write one number a stage")
        return tuple(one.read(item) for item in value)

    return Key(read, {"type": "array", "items": {"type": "integer", "minimum": 0}}, doc)


def _axis_order(value: object) -> tuple[str, ...]:
    axes = tuple(value.split("-")) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if sorted(map(str, axes)) != ["cp", "dp", "pp", "tp"]:
        raise WrongValueError(
            f"{show(value)} is not an order of the axes", "write tp, cp, dp and pp, each once: tp-cp-dp-pp"
        )
    return axes


def _nccl_version(value: object) -> tuple[int, int]:
    """Return (major, minor) of "2.10" or "2.18.3". A number will not do: 2.10 is 2.1."""
    found = re.fullmatch(r"2\.(\d{1,2})(\.\d{1,2})?", value) if isinstance(value, str) else None
    newest = ".".join(map(str, NCCL_VERSION))
    if found is None:
        raise WrongValueError(f"{show(value)} is no version of NCCL", "write it in quotes: nccl: '2.18'")
    version = (2, int(found[1]))
    if not OLDEST_NCCL <= version <= NCCL_VERSION:
        raise WrongValueError(
            f"NCCL {value} is not known",
            f"write one from 2.{OLDEST_NCCL[1]}, the first that sends and receives, to {newest}",
        )
    return version


_FACTOR = number(1e-6, 1.0, "0.8", "What is left of it: 0.8 is four fifths of its speed.")
_SLOW: dict[str, Key] = {"rank": integer(0, 2**20, 17, "The rank.", required=True), "factor": _FACTOR}
_LINK: dict[str, Key] = {
    "between": _anything(
        {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
        "Two devices: [node0.gpu3, node0.nvswitch0], [node0.nic1, leaf], [leaf2, spine].",
    ),
    "factor": _FACTOR,
}


def _faults(value: object) -> dict[str, Any]:
    """Return ``slow`` and ``links`` as lists of their entries."""
    example = "write slow: [{rank: 17, factor: 0.8}] or links: [{between: [node0.nic1, leaf], factor: 0.5}]"
    if not isinstance(value, Mapping) or any(key not in ("slow", "links") for key in value):
        raise WrongValueError(f"{show(value)} are no faults", example)
    found: dict[str, Any] = {}
    for key, table in (("slow", _SLOW), ("links", _LINK)):
        entries = value.get(key, [])
        if not isinstance(entries, list):
            raise WrongValueError(f"{key} is not a list", example)
        found[key] = []
        for entry in entries:
            problems: list[Problem] = []
            read, _ = read_mapping(entry, table, (key,), problems)
            if not problems and set(read) != set(table):
                problems = [Problem((), f"an entry of {key} needs {' and '.join(table)}", example)]
            if problems:
                raise WrongValueError(problems[0].problem, problems[0].remedy)
            if key == "links" and not _two_names(read["between"]):
                raise WrongValueError(f"{show(read['between'])} are not two devices", example)
            found[key].append(read)
    return found


def _two_names(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)


TOP: dict[str, Key] = {
    "name": text("a name", "a name for the report", "What the report calls it; the file's name if left out."),
    "model": _anything({}, "write a name such as llama-2-70b, the path of a config.json, or the config itself", True),
    "cluster": _anything({}, "write 'cluster: {node: dgx-h100, num_nodes: 8}'", True),
    "framework": choice(FRAMEWORKS, "a framework", "write ddp, fsdp2, fsdp1, deepspeed or megatron"),
    "deepspeed": _anything({}, "DeepSpeed's own settings: the path of a ds_config.json, or its content in place."),
    "ddp": _anything({}, "Settings of torch's DistributedDataParallel."),
    "fsdp2": _anything({}, "Settings of torch's fully_shard."),
    "fsdp1": _anything({}, "Settings of torch's FullyShardedDataParallel."),
    "megatron": _anything({}, "Settings of Megatron-LM, by its own names."),
    "allocator": _anything({}, "PyTorch's caching allocator, as PYTORCH_ALLOC_CONF sets it."),
    "parallelism": _anything({}, "What is left out is 1; dp, if left out, is what remains."),
    "training": _anything({}, "write at least sequence_length and micro_batch_size", True),
    "faults": Key(
        _faults,
        {
            "type": "object",
            "properties": {
                "slow": {"type": "array", "items": mapping_schema(_SLOW)},
                "links": {"type": "array", "items": mapping_schema(_LINK)},
            },
            "additionalProperties": False,
        },
        "What is not as good as it should be: slow GPUs, degraded links.",
    ),
    "calibration": text("a path", "the path of a file that sim calibrate wrote", "A file of sim calibrate to go by."),
    "sources": _anything({"type": "object"}, "Where values come from; written by sim into resolved scenarios."),
    "warnings": _anything({"type": "array"}, "What was assumed; written by sim into resolved scenarios."),
}

CLUSTER: dict[str, Key] = {
    "node": text("a node", "a name such as dgx-h100, or the path of a topology file",
                 "write a name such as dgx-h100, or the path of a topology file", required=True),
    "num_nodes": integer(1, 2**17, 1, "Nodes; one if neither this nor num_gpus is given."),
    "num_gpus": integer(1, 2**17, 1, "GPUs in all: a part of one node, or whole nodes."),
    "network": text("a network", "a name, a path, or words such as '800 Gbit/s per node'",
                    "Between nodes: a name, a path, or in words."),
    "gpu": _anything({}, "Facts of the node's GPU, overridden; or another GPU's name."),
    "backend": choice(BACKENDS, "a library of collectives",
                      "Whose collectives: NCCL's, gloo's over TCP, or a plain network of alpha and beta."),
    "nccl": Key(_nccl_version, {"type": "string", "examples": ["2.10"]},
                "NCCL's version, in quotes; the newest that is known if left out."),
    "sharp": boolean("Whether the network's switches reduce for NCCL (NCCL_COLLNET_ENABLE=1 with SHARP's plugin)."),
    "alpha": measured(units.parse_duration, "a duration", "5 us",
                      "Latency of a message under backend: alpha-beta."),
    "beta": rate("Bandwidth of a GPU, each way, under backend: alpha-beta."),
}  # fmt: skip

_PEAK: dict[str, Key] = {name: flops() for name in ("fp32", "tf32", "fp16", "bf16", "fp8", "nvfp4", "int8")}


def _peaks(value: object) -> dict[str, float]:
    problems: list[Problem] = []
    peaks, _ = read_mapping(value, _PEAK, ("cluster", "gpu", "peak_flops"), problems)
    if problems:
        words = problems[0].problem.partition("peak_flops")[2].lstrip(".: ")
        raise WrongValueError(words or problems[0].problem, problems[0].remedy)
    return peaks


GPU: dict[str, Key] = {
    "name": text("a GPU", "a name of 'sim catalog gpu'", "Another GPU of the catalogue."),
    "memory": size("What cudaMemGetInfo calls total."),
    "memory_bandwidth": rate("Of its memory."),
    "power_limit": power("As nvidia-smi -pl sets it."),
    "boost_clock": frequency("The clock at which peak_flops holds."),
    "l2": size("Size of the L2 cache."),
    "num_sms": integer(1, 4096, 132, "Streaming multiprocessors."),
    "cuda_context": size("What the CUDA context takes."),
    "spread": number(0.0, 0.2, "0.017", "Standard deviation of matmuls' speed from GPU to GPU; 0: all alike."),
    "peak_flops": Key(_peaks, mapping_schema(_PEAK), "Dense peaks by precision."),
}

PARALLELISM: dict[str, Key] = {
    "dp": integer(1, 2**17, 8, "Data-parallel ranks; what remains if left out."),
    "tp": integer(1, 2**17, 1, "Tensor parallelism."),
    "pp": integer(1, 2**17, 1, "Pipeline stages."),
    "cp": integer(1, 2**17, 1, "Context parallelism."),
    "ep": integer(1, 2**17, 1, "Expert parallelism."),
    "zero": integer(0, 3, 0, "What is sharded over dp: 1 optimizer, 2 and gradients, 3 and parameters."),
    "sp": boolean("Megatron's sequence parallelism, with tp > 1."),
    "schedule": choice(SCHEDULES, "a pipeline schedule", "Order of the microbatches' passes."),
    "vpp": integer(1, 1000, 1, "Virtual stages of a rank."),
    "layers_per_stage": _whole_numbers("Layers of each stage, where stages are uneven."),
    "cp_comm": choice(("p2p", "all_gather", "a2a"), "an exchange of context parallelism",
                      "A ring of keys and values, an all-gather of them, or heads for sequence (Ulysses)."),
    "order": Key(_axis_order, {"type": "string"}, "Axes as ranks count through them, fastest first: 'tp-cp-dp-pp'."),
}  # fmt: skip

TRAINING: dict[str, Key] = {
    "sequence_length": integer(1, 2**27, 4096, "write the tokens of a sequence, such as 4096", True),
    "micro_batch_size": integer(1, 10**6, 1, "Sequences of a data-parallel rank in one microbatch."),
    "global_batch_size": integer(1, 10**7, 64, "Sequences of an optimizer step, over all ranks."),
    "precision": choice(PRECISIONS, "a precision"),
    "optimizer": choice(OPTIMIZERS, "an optimizer that sim knows"),
    "recompute": choice(RECOMPUTES, "a way to recompute", "What is computed again in backward, not kept."),
    "recompute_interval": integer(1, 10**4, 2, "Every how many blocks one recomputes."),
    "attention": choice(ATTENTIONS, "an attention kernel"),
    "gradient_clipping": number(0, 1e9, "1.0", "Largest norm; 0 is no clipping."),
    "loss": choice(("eager", "compiled", "vocab-parallel", "vocab-parallel-compiled", "fused", "kernel", "chunked",
                    "linear-fused"),
                   "a way to compute the loss",
                   "eager: fp32 logits; vocab-parallel: Megatron's; fused: gradient over the logits; "
                   "kernel: flash-attn's; in pieces."),
    "metrics": integer(0, 100, 2, "Cross-entropies of the logits after each backward, beside the loss; Composer: 2."),
    "checkpoint": choice(("torch", "deepspeed"), "a checkpoint function",
                         "Whose runs blocks again; DeepSpeed's goes by its activation_checkpointing, and is the one of"
                         " code: megatron there."),
    "norms": choice(("fused", "composed"), "a way to compute RMSNorms", "One kernel each, or op by op in fp32."),
    "softmax": choice(("fused", "composed"), "a way to compute softmax", "Of attention math in code: huggingface: one"
                      " kernel with scale and mask, or op by op."),
    "compile": boolean("Whether torch.compile fuses the model."),
    "launch_blocking": boolean("CUDA_LAUNCH_BLOCKING=1: the host waits for each kernel."),
    "cpu_threads": integer(0, 4096, 8, "OMP_NUM_THREADS of each rank, for steps on the host; 0: all cores, which the "
                           "ranks of a node share."),
    "sample_length": integer(0, 2**27, 200, "Mean tokens of samples packed into a sequence, each by itself; 0: none."),
    "code": choice(("torch", "huggingface", "megatron"), "model code", "Whose modules run."),
}  # fmt: skip

DDP: dict[str, Key] = {
    "bucket_cap_mb": number(0.001, 1e6, "25", "Largest bucket, MiB; left out: a first one of 1 MiB, then 25."),
    "gradient_as_bucket_view": boolean("Whether gradients live in the buckets."),
    "static_graph": boolean("Whether the graph is the same in every step; the one simulated always is."),
    "find_unused_parameters": boolean("Whether parameters without gradient are looked for."),
    "mixed_precision": choice(("autocast", "pure"), "a way to train in 16 bit",
                              "autocast: fp32 parameters, 16-bit matmuls; pure: all in 16 bit."),
    "optimizer_implementation": choice(("foreach", "fused", "for-loop"), "an implementation", "Of torch's optimizer."),
}  # fmt: skip

_TORCH_DTYPES = ("fp32", "bf16", "fp16")
_SYNCS = ("every", "last")
_IMPLEMENTATIONS = ("foreach", "fused", "for-loop")


def _reshard(value: object) -> bool | int:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value > 1:
        return value
    raise WrongValueError(
        f"{show(value)} is neither true, false nor a number of ranks", "write true, false, or a number such as 8"
    )


FSDP2: dict[str, Key] = {
    "reshard_after_forward": Key(_reshard, {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 2}]},
                                 "false keeps whole parameters, a number keeps slices over so many ranks."),
    "reshard_root": boolean("Whether reshard_after_forward=True is passed for the root too."),
    "param_dtype": choice(_TORCH_DTYPES, "a dtype", "Of the gathered parameters; training.precision if left out."),
    "reduce_dtype": choice(_TORCH_DTYPES, "a dtype", "Of the gradient reduction."),
    "orig_dtype": choice(_TORCH_DTYPES, "a dtype", "In which parameters are sharded and optimized."),
    "shard_size": integer(1, 2**17, 8, "Ranks of a shard group; fewer than dp is HSDP."),
    "wrap": choice(("blocks", "torchtitan"), "a way to wrap",
                   "blocks: each block and the root; torchtitan: embedding and head by themselves too."),
    "gradient_sync": choice(_SYNCS, "a choice", "last: only the last microbatch is reduced, gradients stay whole."),
    "reshard_after_backward": boolean("Whether parameters go after each microbatch, or after the last."),
    "cpu_offload": boolean("CPUOffloadPolicy: shards, gradients and states in pinned memory of the host."),
    "optimizer_implementation": choice(_IMPLEMENTATIONS, "an implementation", "Of torch's optimizer."),
    "float8_recipe": choice(("tensorwise", "rowwise"), "a recipe of torchao", "Scales of fp8: a tensor's or a row's."),
    "async_tensor_parallel": boolean("Whether tp's exchanges run in pieces beside products (needs compile and sp)."),
    "float8_all_gather": boolean("Whether weights of linears are gathered in 8 bits, their scales computed ahead."),
}  # fmt: skip

FSDP1: dict[str, Key] = {
    "sharding_strategy": choice(("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"),
                                "a sharding strategy"),
    "mixed_precision": choice(("DEFAULT", "PURE", "FULL"), "a mixed precision",
                              "DEFAULT reduces gradients in fp32, PURE in 16 bit, FULL keeps everything in fp32; of a "
                              "16-bit model wrapped without any: PURE, with orig_dtype."),
    "orig_dtype": choice(_TORCH_DTYPES, "a dtype", "In which parameters are sharded and optimized."),
    "backward_prefetch": choice(("BACKWARD_PRE", "BACKWARD_POST", "NONE"), "a way to prefetch"),
    "forward_prefetch": boolean("Whether the next unit is gathered before this one's forward."),
    "limit_all_gathers": boolean("Whether the CPU waits where two gathers are in flight."),
    "use_orig_params": boolean("Whether the optimizer sees the original parameters."),
    "cpu_offload": boolean("Whether shards and gradients live in pinned memory of the host."),
    "keep_low_precision_grads": boolean("Whether the optimizer gets gradients in the dtype of the passes."),
    "shard_size": integer(1, 2**17, 8, "Ranks of a shard group of the hybrid strategies; a node's GPUs if left out."),
    "gradient_sync": choice(_SYNCS, "a choice", "last: no_sync() on all microbatches but the last."),
    "optimizer_implementation": choice(_IMPLEMENTATIONS, "an implementation", "Of torch's optimizer."),
}  # fmt: skip

MEGATRON: dict[str, Key] = {
    "use_distributed_optimizer": boolean("Optimizer states sharded over dp, as parallelism.zero: 1."),
    "overlap_grad_reduce": boolean("Whether gradients are reduced beside backward; from Hopper on so with `zero: 1`."),
    "overlap_param_gather": boolean("Whether parameters are gathered beside the next forward; likewise."),
    "accumulate_allreduce_grads_in_fp32": boolean("Whether gradients accumulate in fp32; so for bf16 if left out."),
    "gradient_accumulation_fusion": boolean("Whether matmuls add weight gradients to the buffer themselves."),
    "apply_rope_fusion": boolean("Whether rotary embedding is one kernel, or op by op."),
    "bias_swiglu_fusion": boolean("Whether a gated activation is one kernel, or op by op."),
    "async_tensor_model_parallel_allreduce": boolean(
        "Whether tp sums input gradients beside the weight's product; under deepspeed too (Megatron-DeepSpeed)."
    ),
    "overlap_p2p_communication": boolean("Whether the interleaved schedule's messages run beside passes."),
    "scatter_gather_tensors_in_pipeline": boolean("Whether tp ranks send parts of messages (2021-23, without sp)."),
    "tp_comm_overlap": boolean("Whether tp's exchanges run in pieces beside those of the products (needs sp)."),
    "cuda_graph_impl": choice(("none", "local", "transformer_engine"), "an implementation",
                              "Whose CUDA graphs launch what is captured; the host issues nothing of it one by one."),
    "cuda_graph_scope": choice(("full", "full_iteration"), "a scope",
                               "full: each block's forward and backward; full_iteration: all passes of a step."),
    "check_for_nan_in_grad": boolean("Whether gradients and each microbatch's loss are looked over."),
    "bucket_size": integer(1, 10**12, 40_000_000, "Elements of a gradient bucket."),
    "transformer_impl": choice(("transformer_engine", "local"), "an implementation",
                               "Whose linear layers: Transformer Engine's, or Megatron's own."),
    "masked_softmax_fusion": boolean("Whether the softmax of attention math is one kernel."),
    "create_attention_mask_in_dataloader": boolean("Whether a batch brings a mask: a byte for each pair of tokens;"
                                                   " Megatron's own default is true, NeMo's false."),
    "fp8_recipe": choice(("delayed", "tensorwise", "blockwise"), "an FP8 recipe",
                         "Scales of fp8: of the steps before, of the tensor itself, of blocks."),
    "first_last_layers_bf16": boolean("Whether the first and the last blocks stay in 16 bit under fp8, mxfp8, nvfp4."),
    "num_layers_at_start_in_bf16": integer(0, 10**4, 1, "How many of the first."),
    "num_layers_at_end_in_bf16": integer(0, 10**4, 1, "How many of the last."),
    "attention_backend": choice(("auto", "flash"), "a backend",
                                "auto: Transformer Engine has cuDNN's from Hopper on (Blackwell: for flash-2 too)."),
    "use_megatron_fsdp": boolean("Megatron-FSDP, as parallelism.zero: 2 (optim_grads) or 3 (optim_grads_params)."),
    "suggested_communication_unit_size": integer(1, 10**12, 1_000_000_000,
                                                 "Elements that Megatron-FSDP has under way; 1e9 or two layers."),
    "fp8_param_gather": boolean("Whether quantised weights are kept and gathered in 8 bits, not in 16."),
    "use_precision_aware_optimizer": boolean("Whether the master is what bf16 parameters lack, gradients not copied."),
    "exp_avg_dtype": choice(("fp32", "bf16", "fp16", "fp8"), "a dtype", "Of the first moment, if so."),
    "exp_avg_sq_dtype": choice(("fp32", "bf16", "fp16", "fp8"), "a dtype", "Of the second moment, if so."),
    "cpu_offloading_num_layers": integer(0, 10**4, 20, "Blocks whose saved tensors Transformer Engine keeps on the"
                                                       " host: the first ones."),
    "cpu_offloading_activations": boolean("Whether these blocks' saved tensors go there at all."),
    "nvte_cpu_offload_v1": boolean("Whether it is done as before Transformer Engine 2.10 (NVTE_CPU_OFFLOAD_V1)."),
    "distribute_saved_activations": boolean("Whether recomputed blocks' inputs are kept in parts over tp."),
}  # fmt: skip

ALLOCATOR: dict[str, Key] = {
    "expandable_segments": boolean("Segments that grow in place."),
    "max_split_size": measured(units.parse_size, "a size", "512 MiB", "Larger blocks are not split."),
    "roundup_power2_divisions": integer(0, 2**20, 8, "Steps between powers of two that sizes are rounded to."),
    "garbage_collection_threshold": number(0, 1, "0.8", "Use at which cached blocks are freed.", below=True),
    "memory_fraction": number(0.001, 1, "0.9", "Of the GPU's memory, as set_per_process_memory_fraction allows it."),
    "cublas_workspace": measured(units.parse_size, "a size", "32 MiB", "As CUBLAS_WORKSPACE_CONFIG says."),
}

_ALLOC_CONF = {
    "expandable_segments": "expandable_segments",
    "max_split_size_mb": "max_split_size",
    "roundup_power2_divisions": "roundup_power2_divisions",
    "garbage_collection_threshold": "garbage_collection_threshold",
    "per_process_memory_fraction": "memory_fraction",
}
_ALLOC_CONF_SILENT = ("backend", "pinned_use_cuda_host_register", "pinned_num_register_threads",
                      "release_lock_on_cudamalloc")  # fmt: skip


def allocator_mapping(given: str) -> dict[str, Any]:
    """Return the mapping that a text as of PYTORCH_ALLOC_CONF stands for ("max_split_size_mb:512,...").

    Source: c10/core/AllocatorConfig.cpp. Raises WrongValueError.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in given.split(","))):
        key, colon, value = (side.strip() for side in part.partition(":"))
        if not colon or (key not in _ALLOC_CONF and key not in _ALLOC_CONF_SILENT):
            raise WrongValueError(
                f"{show(part)} is not a setting of PYTORCH_ALLOC_CONF",
                "write as torch does: expandable_segments:True,max_split_size_mb:512",
            )
        if key in _ALLOC_CONF_SILENT:
            continue
        read: Any = value
        if re.fullmatch(r"[0-9]{1,12}", value):
            read = int(value)
        elif re.fullmatch(r"[0-9]*\.[0-9]{1,12}", value):
            read = float(value)
        if key == "max_split_size_mb":
            read = f"{value} MiB"
        found[_ALLOC_CONF[key]] = read
    return found


def scenario_schema() -> dict[str, Any]:
    """Return the JSON Schema of a scenario file."""

    def named_or(table: Mapping[str, Key], what: str) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "description": what}, mapping_schema(table)]}

    in_place = mapping_schema({
        "config": text("a model", "a name", "A model by name or path, whose keys the others here override."),
        **MODEL_KEYS,
    })  # fmt: skip
    in_place["additionalProperties"] = True
    in_place["properties"]["model_type"] = {"enum": list(FAMILIES)}
    cluster = mapping_schema(CLUSTER)
    cluster["properties"]["gpu"] = named_or(GPU, "a GPU of the catalogue")
    sections: dict[str, Any] = {
        "model": {
            "anyOf": [{"type": "string", "description": "a catalogue name, or the path of a config.json"}, in_place]
        },
        "cluster": cluster,
        "deepspeed": {"anyOf": [{"type": "string", "description": "the path of a ds_config.json"}, {"type": "object"}]},
        "ddp": mapping_schema(DDP),
        "fsdp2": mapping_schema(FSDP2),
        "fsdp1": mapping_schema(FSDP1),
        "megatron": mapping_schema(MEGATRON),
        "allocator": named_or(ALLOCATOR, "as PYTORCH_ALLOC_CONF is written"),
        "parallelism": mapping_schema(PARALLELISM),
        "training": mapping_schema(TRAINING),
    }
    schema = mapping_schema(TOP, "A training job, and the machine that it runs on.")
    for key, section in sections.items():
        doc = schema["properties"][key].get("description", "")
        schema["properties"][key] = {**section, "description": doc}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sim scenario", **schema}
