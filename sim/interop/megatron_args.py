"""Megatron-LM's arguments: from a launch script, a file of arguments or a command line to a scenario's keys.

Names and defaults: megatron/training/arguments.py of Megatron-LM; launchers' names: torch/distributed/run.py and
deepspeed/launcher/runner.py. What has no effect on memory or time (paths, learning rates, logging) is passed over in
silence, whatever else is not understood is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from sim.catalog import load as catalog
from sim.interop.imported import Imported
from sim.interop.shell import read_script
from sim.interop.values import Problem, show

_Values = Mapping[str, list[str]]
_DEFAULT = "Megatron's default"

_WHOLE = {
    "model.num_hidden_layers": ("num-layers", "encoder-num-layers"),
    "model.hidden_size": ("hidden-size",),
    "model.num_attention_heads": ("num-attention-heads",),
    "model.head_dim": ("kv-channels",),
    "model.vocab_size": ("vocab-size", "padded-vocab-size", "pad-vocab-size-to"),
    "model.num_local_experts": ("num-experts",),
    "model.num_experts_per_tok": ("moe-router-topk",),
    "model.moe_intermediate_size": ("moe-ffn-hidden-size",),
    "parallelism.tp": ("tensor-model-parallel-size",),
    "parallelism.pp": ("pipeline-model-parallel-size",),
    "parallelism.cp": ("context-parallel-size",),
    "parallelism.ep": ("expert-model-parallel-size",),
    "training.sequence_length": ("seq-length", "encoder-seq-length"),
    "training.micro_batch_size": ("micro-batch-size",),
    "training.global_batch_size": ("global-batch-size",),
    "megatron.bucket_size": ("ddp-bucket-size",),
    "megatron.suggested_communication_unit_size": ("suggested-communication-unit-size",),
    "megatron.cpu_offloading_num_layers": ("cpu-offloading-num-layers",),
}
"""Path of the scenario -> options of one whole number."""
_FLAGS: dict[str, tuple[str, Any]] = {
    "use-distributed-optimizer": ("parallelism.zero", 1),
    "sequence-parallel": ("parallelism.sp", True),
    "embed-layernorm": ("model.embedding_norm", True),
    "overlap-grad-reduce": ("megatron.overlap_grad_reduce", True),
    "overlap-param-gather": ("megatron.overlap_param_gather", True),
    "accumulate-allreduce-grads-in-fp32": ("megatron.accumulate_allreduce_grads_in_fp32", True),
    "fp8-param-gather": ("megatron.fp8_param_gather", True),
    "use-precision-aware-optimizer": ("megatron.use_precision_aware_optimizer", True),
    "no-gradient-accumulation-fusion": ("megatron.gradient_accumulation_fusion", False),
    "no-rope-fusion": ("megatron.apply_rope_fusion", False),
    "no-bias-swiglu-fusion": ("megatron.bias_swiglu_fusion", False),
    "no-overlap-p2p-communication": ("megatron.overlap_p2p_communication", False),
    "tp-comm-overlap": ("megatron.tp_comm_overlap", True),
    "no-async-tensor-model-parallel-allreduce": ("megatron.async_tensor_model_parallel_allreduce", False),
    "no-check-for-nan-in-loss-and-grad": ("megatron.check_for_nan_in_grad", False),
    "disable-bias-linear": ("model.bias", False),
    "distribute-saved-activations": ("megatron.distribute_saved_activations", True),
    "enable-cuda-graph": ("megatron.cuda_graph_impl", "local"),
    "external-cuda-graph": ("megatron.cuda_graph_impl", "transformer_engine"),
    "use-tp-pp-dp-mapping": ("parallelism.order", "tp-cp-pp-dp"),
}
_VOCABULARIES = {"GPT2BPETokenizer": 50257, "GPTSentencePieceTokenizer": None, "Llama2Tokenizer": 32000}
"""Tokenizers whose vocabulary is always the same (megatron/training/tokenizer/tokenizer.py)."""
_CP_COMM = ("p2p", "all_gather", "a2a")
_SILENT = re.compile(
    r"(lr|min-lr|weight-decay|adam|sgd|start-weight|end-weight|init-method|norm-epsilon|layernorm-epsilon|train-|eval-|"
    r"exit-|log-|save|load|data-|split|seed|tensorboard|wandb|tokenizer|vocab-file|merge-file|distributed-|no-load|"
    r"no-save|finetune|override|use-checkpoint|ckpt|dist-ckpt|async-save|auto-detect|num-workers|dataloader|reset-|"
    r"rotary-|attention-softmax|apply-query|timing-|profile|use-pytorch-profiler|"
    r"manual-gc|eod-|create-attention|no-create-attention|mmap|no-mmap|master|rdzv|node_rank|node-rank|max_restarts|"
    r"max-restarts|tee|redirects|role|hostfile|include|exclude|local-ranks-filter|use-mcore|rampup|"
    r"loss-scale|initial-loss|min-loss|loss-scale-window|hysteresis|lr-|override-|mock-data|straggler|error-|rerun|"
    r"make-vocab|moe-aux|moe-router-load|moe-router-score|moe-router-pre|moe-z-loss|"
    r"empty-unused|one-logger|no-one-logger|ntasks|nodes|cpus|gpus-per|container|mpi|job|output|"
    r"no-initialization|calculate|enable-one|te-rng|use-cpu-init|no-async|iteration|disable-"
    r"straggler|abort-on|kill-|valid-|test-|wait|special-tokens|ddp-average|ddp-num-buckets|use-dist|consumed|test-mode|skip|decoder-first-pipeline)"
)


def options_of(words: list[str]) -> dict[str, list[str]]:
    """Return option -> the words after it up to the next option; the last one wins, as in argparse."""
    found: dict[str, list[str]] = {}
    at: list[str] | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            at = found[name] = [value] if equals else []
        elif at is not None:
            at.append(word)
    return found


def read_megatron_args(
    script: str, environment: Mapping[str, str] | None = None, folder: FilePath | None = None
) -> Imported:
    """Return the scenario that a launch script, or a line of arguments, stands for when run in that environment.

    ``folder`` is the script's own: files that it reads in are looked for there.
    """
    said = Imported()
    words, variables = read_script(script, environment, lambda name: _sourced(folder, name))
    given = {name.replace("_", "-"): values for name, values in options_of(words).items()}
    if "num-layers" not in given and "encoder-num-layers" not in given:
        said.problems.append(
            Problem((), "has no --num-layers: not a command of Megatron-LM", "name the script that starts training")
        )
        return said
    if "tokenizer-type" not in given and ("merge-file" in given or any(w.endswith("pretrain_gpt.py") for w in words)):
        given["tokenizer-type"] = ["GPT2BPETokenizer"]  # args_defaults of pretrain_gpt.py
    read: set[str] = set()

    def whole(path: str, *names: str) -> tuple[int | None, str]:
        for name in names:
            if name in given:
                read.add(name)
                value = given[name][0] if given[name] else ""
                if value.isdigit():
                    return int(value), f"--{name}"
                said.problems.append(_unknown_value(path, name, value))
        return None, ""

    def word(*names: str) -> str | None:
        for name in names:
            if name in given:
                read.add(name)
                return given[name][0] if given[name] else ""
        return None

    def flag(name: str) -> bool:
        if name in given:
            read.add(name)
        return name in given

    if flag("deepspeed"):
        _deepspeed(said, word)
        _cpu_threads(said, words, variables, given)
    else:
        said.say("framework", "megatron", "Megatron-LM's arguments")
    for path, names in _WHOLE.items():
        value, origin = whole(path, *names)
        said.say(path, value, origin)
    for name, (path, switched) in _FLAGS.items():
        if flag(name):
            said.say(path, switched, f"--{name}")
    if "deepspeed" not in given and said.has("parallelism.zero") and not said.has("megatron.overlap_grad_reduce"):
        said.say("megatron.overlap_grad_reduce", False, _DEFAULT)
    _sharding(said, word, flag)
    _cluster(said, whole)
    _model(said, given, whole, word, flag)
    _dropout(said, word)
    _training(said, word, flag)
    _parallelism(said, whole, word)
    for name in given:
        if name not in read and not _SILENT.match(name):
            said.unread.append(f"--{name}")
    return said


def _cpu_threads(
    said: Imported, words: list[str], variables: Mapping[str, str], given: Mapping[str, list[str]]
) -> None:
    """OpenMP threads of a rank: ``OMP_NUM_THREADS`` of the script or before the command, else what torchrun sets."""
    name = "OMP_NUM_THREADS"
    before = (word.partition("=")[2] for word in words if word.startswith(f"{name}="))
    text = next(before, variables.get(name, "")).strip("\"' ")
    torchrun = any(word.rpartition("/")[2] in ("torchrun", "torch.distributed.run") for word in words)
    if text.isdigit() and int(text):
        said.say("training.cpu_threads", int(text), name)
    elif text:
        said.notes.append(f"{name}={text} is not a number here: write training.cpu_threads")
    elif torchrun and given.get("nproc-per-node", ["1"])[:1] != ["1"]:
        said.say("training.cpu_threads", 1, f"torchrun sets {name}=1")


def _deepspeed(said: Imported, word: Any) -> None:
    """Megatron-DeepSpeed: DeepSpeed's engine trains Megatron's model (megatron/arguments.py, ``_add_zero_args``)."""
    said.say("framework", "deepspeed", "--deepspeed")
    stage = word("zero-stage")
    if stage is not None and stage.isdigit():
        said.say("parallelism.zero", int(stage), "--zero-stage")
    elif stage is not None:
        said.problems.append(_unknown_value("parallelism.zero", "zero-stage", stage))
    if config := word("deepspeed-config"):
        said.notes.append(f"--deepspeed_config {config} is not read: name that file too")


def _sourced(folder: FilePath | None, name: str) -> str | None:
    """Return the text of a file that a script reads in, if it lies beside the script."""
    if folder is None:
        return None
    path = folder / FilePath(name.strip("\"'")).name
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError:
        return None


def _sharding(said: Imported, word: Any, flag: Any) -> None:
    """Megatron-FSDP's strategy is a ZeRO stage (``data_parallel_sharding_strategy``, "no_shard" if left out)."""
    strategy = word("data-parallel-sharding-strategy")
    if not (flag("use-megatron-fsdp") | flag("use-custom-fsdp")):
        return
    stage = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}.get(strategy or "no_shard")
    if stage is not None:
        origin = "--data-parallel-sharding-strategy" if strategy else _DEFAULT
        said.say("parallelism.zero", stage, origin)


def _unknown_value(path: str, name: str, value: str) -> Problem:
    """An option whose value a script takes from outside, or that is none."""
    remedy = f"say it: --set {path}=..."
    if value.startswith("$"):
        variable = value.strip("${}()")
        if variable.isidentifier():
            remedy += f", or in the environment: {variable}=... sim import ..."
        return Problem(tuple(path.split(".")), f"--{name} is {value}, which the script does not say", remedy)
    return Problem(tuple(path.split(".")), f"--{name} {show(value)} is not a number", f"write --{name} and a number")


def _cluster(said: Imported, whole: Any) -> None:
    gpus, per_node = whole("cluster.num_gpus", "nproc-per-node", "num-gpus", "ntasks-per-node", "gpus-per-node")
    nodes, how_many = whole("cluster.num_gpus", "nnodes", "num-nodes", "nodes")
    if gpus is not None:
        said.say("cluster.num_gpus", gpus * (nodes or 1), f"{per_node} x {how_many or 'one node'}")


def _model(said: Imported, given: _Values, whole: Any, word: Any, flag: Any) -> None:
    swiglu = flag("swiglu")
    if flag("squared-relu"):
        said.notes.append("--squared-relu: taken as relu; the square is one kernel more")
    said.say("model.hidden_act", "silu" if swiglu else "gelu", "--swiglu" if swiglu else _DEFAULT)
    hidden = said.values.get(("model", "hidden_size"))
    width, origin = whole("model.intermediate_size", "ffn-hidden-size")
    if width is None and hidden is not None:
        # arguments.py: with swiglu two thirds of 4 h, down to a multiple of 64
        width = int(4 * hidden.value * 2 / 3 / 64) * 64 if swiglu else 4 * hidden.value
        origin = _DEFAULT
    said.say("model.intermediate_size", width, origin)
    groups, origin = whole("model.num_key_value_heads", "num-query-groups")
    if flag("group-query-attention"):
        said.say("model.num_key_value_heads", groups or 1, origin or "--group-query-attention")
    norm = word("normalization")
    said.say("model.norm", "rmsnorm" if norm == "RMSNorm" else "layernorm", "--normalization" if norm else _DEFAULT)
    rotary = flag("use-rotary-position-embeddings")
    kind = word("position-embedding-type") or ("rope" if rotary else None)
    names = {"rope": "rope", "none": "none", "learned_absolute": "learned", "absolute": "learned", "rotary": "rope",
             "alibi": "alibi", None: "learned"}  # fmt: skip
    position = names.get(kind)
    if position is None:
        said.notes.append(f"--position-embedding-type {kind}: taken as rope")
        position = "rope"
    said.say("model.position", position, "--position-embedding-type" if kind else _DEFAULT)
    length, origin = whole("model.max_position_embeddings", "max-position-embeddings")
    if position == "learned":
        said.say("model.max_position_embeddings", length, origin)
    if not said.has("model.bias"):
        said.say("model.bias", True, _DEFAULT)
    if flag("add-qkv-bias") and said.values["model", "bias"].value is False:
        said.say("model.attention_bias", True, "--add-qkv-bias")
        said.say("model.attention_output_bias", False, "--add-qkv-bias")
    untied = flag("untie-embeddings-and-output-weights")
    said.say("model.tie_word_embeddings", not untied,
             "--untie-embeddings-and-output-weights" if untied else _DEFAULT)  # fmt: skip
    if not said.has("model.vocab_size"):
        _vocabulary(said, given)


def _vocabulary(said: Imported, given: _Values) -> None:
    """The tokenizer's, where everybody knows how many words that has."""

    def first(*options: str) -> str:
        return next((given[option][0] for option in options if given.get(option)), "")

    kind, name = first("tokenizer-type"), first("tokenizer-model", "tokenizer-name-or-path")
    if known := _VOCABULARIES.get(kind):
        said.say("model.vocab_size", known, f"--tokenizer-type {kind}")
        return
    model = re.sub(r"^meta-|-hf$|-base$|-instruct(-v[\d.]+)?$", "", name.rpartition("/")[2].lower())
    if model in catalog.names("model"):
        said.say("model.vocab_size", catalog.model_config(model)["vocab_size"], f"the tokenizer of {name}")
        return
    which = f"{kind} {name}".strip() or "a tokenizer"
    said.problems.append(
        Problem(
            ("model", "vocab_size"),
            f"the vocabulary is that of {which}, which the script only names",
            "say it: --set model.vocab_size=128256",
        )
    )


def _dropout(said: Imported, word: Any) -> None:
    """0.1 both, unless said (``_add_regularization_args``)."""
    for name, path in (("hidden-dropout", "model.dropout"), ("attention-dropout", "model.attention_dropout")):
        value = word(name)
        try:
            said.say(path, float(value) if value else 0.1, f"--{name}" if value else _DEFAULT)
        except ValueError:
            said.problems.append(_unknown_value(path, name, str(value)))


def _optimizer(said: Imported, word: Any) -> None:
    if (optimizer := word("optimizer")) not in (None, "adam"):
        said.say("training.optimizer", optimizer, "--optimizer")
    for name in ("exp-avg-dtype", "exp-avg-sq-dtype"):
        if dtype := word(name):
            said.say(f"megatron.{name.replace('-', '_')}", dtype, f"--{name}")


def _graphs(said: Imported, word: Any) -> None:
    """``full_iteration`` has been a scope of ``local`` and is an implementation of its own since."""
    graphs = word("cuda-graph-impl")
    if graphs not in ("local", "transformer_engine", "full_iteration"):
        return
    whole = "full_iteration" in (graphs, word("cuda-graph-scope"))
    said.say("megatron.cuda_graph_impl", "local" if whole else graphs, "--cuda-graph-impl")
    if whole:
        said.say("megatron.cuda_graph_scope", "full_iteration", "--cuda-graph-scope")


def _attention(said: Imported, word: Any, flag: Any) -> None:
    """``--use-flash-attn`` sets the backend too (megatron/training/arguments.py)."""
    attention = word("attention-backend")
    kernels = {"flash": "flash-2", "fused": "cudnn", "unfused": "math", "local": "math"}
    if flag("use-flash-attn"):
        said.say("training.attention", "flash-2", "--use-flash-attn")
        if ("framework",) not in said.values or said.values["framework",].value != "deepspeed":
            said.say("megatron.attention_backend", "flash", "--use-flash-attn")
    elif attention in kernels:
        said.say("training.attention", kernels[attention], "--attention-backend")
        if attention == "flash":
            said.say("megatron.attention_backend", "flash", "--attention-backend")


def _training(said: Imported, word: Any, flag: Any) -> None:
    fp8 = word("fp8-format", "fp8")
    recipe = word("fp8-recipe")
    precision = "bf16" if flag("bf16") else "fp16" if flag("fp16") else "fp32"
    origin = f"--{precision}" if precision != "fp32" else "neither --bf16 nor --fp16"
    if fp8:
        said.say("training.precision", "mxfp8" if recipe == "mxfp8" else "fp8", "--fp8-format")
        if recipe in ("delayed", "tensorwise", "blockwise"):
            said.say("megatron.fp8_recipe", recipe, "--fp8-recipe")
    elif word("fp4-format"):
        said.say("training.precision", "nvfp4", "--fp4-format")
    else:
        said.say("training.precision", precision, origin)
    _optimizer(said, word)
    _recompute(said, word, flag)
    _attention(said, word, flag)
    clip = word("clip-grad")
    try:
        said.say("training.gradient_clipping", float(clip) if clip else 1.0, "--clip-grad" if clip else _DEFAULT)
    except ValueError:
        said.problems.append(_unknown_value("training.gradient_clipping", "clip-grad", str(clip)))
    _graphs(said, word)
    if (implementation := word("transformer-impl")) is not None:
        said.say("megatron.transformer_impl", implementation, "--transformer-impl")
    if flag("cross-entropy-loss-fusion"):
        native = word("cross-entropy-fusion-impl") in (None, "native")
        said.say("training.loss", "vocab-parallel-compiled" if native else "fused", "--cross-entropy-loss-fusion")
    if flag("no-masked-softmax-fusion"):
        said.say("megatron.masked_softmax_fusion", False, "--no-masked-softmax-fusion")
    without = flag("no-create-attention-mask-in-dataloader")
    if ("framework",) in said.values and said.values["framework",].value == "deepspeed":
        return
    origin = "--no-create-attention-mask-in-dataloader" if without else _DEFAULT
    said.say("megatron.create_attention_mask_in_dataloader", not without, origin)


def _recompute(said: Imported, word: Any, flag: Any) -> None:
    kind, origin = word("recompute-granularity"), "--recompute-granularity"
    if kind is None and flag("recompute-activations"):
        kind, origin = "selective", "--recompute-activations"
    checkpoints = flag("checkpoint-activations") | flag("deepspeed-activation-checkpointing")
    if kind is None and checkpoints:
        kind, origin = "full", "--checkpoint-activations"
    method, layers = word("recompute-method"), word("recompute-num-layers")
    word("recompute-modules")
    if kind == "full" and method == "block":
        said.notes.append(
            f"--recompute-method block of {layers} layers a stage: taken as full recompute of every layer, "
            "which holds less and takes longer"
        )
    elif kind == "full" and layers not in (None, "1"):
        said.notes.append(f"--recompute-num-layers {layers}: taken as 1, which holds more inputs and fewer at a time")
    said.say("training.recompute", kind or "none", origin if kind else _DEFAULT)


def _parallelism(said: Imported, whole: Any, word: Any) -> None:
    pp = said.values.get(("parallelism", "pp"))
    layers = said.values.get(("model", "num_hidden_layers"))
    per_stage, origin = whole("parallelism.vpp", "num-layers-per-virtual-pipeline-stage")
    chunks, chunks_origin = whole("parallelism.vpp", "num-virtual-stages-per-pipeline-rank")
    if per_stage and pp and layers:
        chunks, chunks_origin = layers.value // pp.value // per_stage, origin
    if chunks and chunks > 1:
        said.say("parallelism.schedule", "interleaved", chunks_origin)
        said.say("parallelism.vpp", chunks, chunks_origin)
    elif pp and pp.value > 1:
        said.say("parallelism.schedule", "1f1b", _DEFAULT)
    if (exchange := word("cp-comm-type")) is not None:
        if exchange in _CP_COMM:
            said.say("parallelism.cp_comm", exchange, "--cp-comm-type")
        else:
            said.notes.append(f"--cp-comm-type {exchange}: taken as the ring")
    uneven = "parallelism.layers_per_stage"
    first = whole(uneven, "decoder-first-pipeline-num-layers")[0]
    last = whole(uneven, "decoder-last-pipeline-num-layers")[0]
    if (first or last) and pp and layers:
        middle = pp.value - bool(first) - bool(last)
        rest = layers.value - (first or 0) - (last or 0)
        if middle > 0 and rest % middle == 0:
            stages = [*([first] if first else []), *[rest // middle] * middle, *([last] if last else [])]
            said.say("parallelism.layers_per_stage", stages, "--decoder-first- and last-pipeline-num-layers")
    if (method := word("pp-partition-method")) is not None and pp and pp.value > 1:
        _partition(said, method, pp.value, layers.value if layers else 0)


def _partition(said: Imported, method: str, pp: int, layers: int) -> None:
    """Megatron-DeepSpeed's stages: as many layers each whose class is named (deepspeed/runtime/pipe/module.py,
    ``_partition_layers``). The embedding comes before the first layer and, tied, after the last."""
    classes = set(method.lower().removeprefix("type:").split("|")) if method.lower().startswith("type:") else set()
    each, rest = divmod(layers + 2, pp)
    if classes == {"transformer", "embedding"} and layers and not rest and each > 1:
        stages = [each - 1, *[each] * (pp - 2), each - 1]
        said.say("parallelism.layers_per_stage", stages, f"--pp-partition-method {method}")
    elif classes != {"transformer"} or layers % pp:
        what = "stages of as many layers each taken; parallelism.layers_per_stage says otherwise"
        said.notes.append(f"--pp-partition-method {method}: {what}")
