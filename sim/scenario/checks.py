"""Rules that relate fields: one rule, one function. Each yields where, what is wrong, and a remedy that works.

A rule reads a ``Draft``; where a value that it needs is not known, it is skipped (``run_rules``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import lcm

from sim.interop.values import Problem, either
from sim.scenario.draft import Draft, UnknownError

Rule = Callable[[Draft], Iterator[Problem]]

MAX_MICROBATCHES = 16_384
IN_A_V = ("zb-v", "v-half", "v-min", "dualpipev")
"""Schedules that go down the ranks and back: rank r holds stages r and 2pp-1-r, whatever vpp says."""
TWO_CHUNKS = (*IN_A_V, "dualpipe")
"""Schedules that give each rank two chunks of the model; DualPipe's are of two copies of it."""
SPLIT_BACKWARD = ("zb-h1", "zb-2p", *TWO_CHUNKS)
"""Schedules with passes of their own for the gradients of weights."""


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def nearest(values: list[int], wanted: int) -> list[int]:
    """Return the one below and the one above of some values, those that exist."""
    below = [v for v in values if v < wanted][-1:]
    return below + [v for v in values if v > wanted][:1]


def multiples(of: int, around: int) -> list[int]:
    """Return the multiples next to a number, at least one of them positive."""
    down = around // of * of
    return [m for m in (down, down + of) if m > 0]


def write(key: str, values: list[int]) -> str:
    return f"write {key}: {either([str(value) for value in values])}"


# --- the model -----------------------------------------------------------------------------------


def kv_heads_divide_heads(d: Draft) -> Iterator[Problem]:
    """Grouped queries: each key and value head serves the same number of query heads."""
    heads, kv = d.model.num_attention_heads, d.model.num_key_value_heads
    if heads % kv:
        yield Problem(
            ("model", "num_key_value_heads"),
            f"model.num_key_value_heads = {kv} does not divide model.num_attention_heads = {heads}",
            write("num_key_value_heads", nearest(divisors(heads), kv)),
        )


def heads_have_a_width(d: Draft) -> Iterator[Problem]:
    """Without ``head_dim`` the hidden size is shared out over the heads."""
    if d.model.knows("head_dim"):
        return
    hidden, heads = d.model.hidden_size, d.model.num_attention_heads
    if hidden % heads:
        yield Problem(
            ("model", "num_attention_heads"),
            f"model.num_attention_heads = {heads} does not divide model.hidden_size = {hidden}",
            write("num_attention_heads", nearest(divisors(hidden), heads)) + ", or give model.head_dim too",
        )


def rope_needs_even_heads(d: Draft) -> Iterator[Problem]:
    """Rotary embedding turns pairs of elements."""
    if d.model.position == "rope" and d.model.head_dim % 2:
        width = d.model.head_dim
        yield Problem(
            ("model", "head_dim"),
            f"model.head_dim = {width} is odd; rotary positions turn pairs of elements",
            write("head_dim", [w for w in (width - 1, width + 1) if w > 0]) + ", or position: learned",
        )


def experts_are_chosen(d: Draft) -> Iterator[Problem]:
    """A token visits some of the experts, not more than there are."""
    experts, chosen = d.model.num_local_experts, d.model.num_experts_per_tok
    if experts is not None and chosen is None:
        yield Problem(
            ("model", "num_local_experts"),
            f"model.num_local_experts = {experts}, but not how many a token visits",
            "write num_experts_per_tok: 2, say",
        )
    if chosen is not None and experts is None:
        yield Problem(
            ("model", "num_experts_per_tok"),
            f"model.num_experts_per_tok = {chosen}, but model.num_local_experts is missing",
            "write how many experts there are, or remove num_experts_per_tok",
        )
    if experts is not None and chosen is not None and chosen > experts:
        yield Problem(
            ("model", "num_experts_per_tok"),
            f"model.num_experts_per_tok = {chosen} is more than model.num_local_experts = {experts}",
            f"write at most {experts}",
        )


def positions_reach(d: Draft) -> Iterator[Problem]:
    """A learned position table has a row for each position."""
    rows, tokens = d.model.max_position_embeddings, d.sequence_length
    if d.model.position == "learned" and tokens > rows:
        yield Problem(
            ("training", "sequence_length"),
            f"training.sequence_length = {tokens} is beyond the model's {rows} learned positions",
            f"write sequence_length: {rows} or less, or raise model.max_position_embeddings to {tokens}",
        )


# --- the mesh ------------------------------------------------------------------------------------


def mesh_fits_cluster(d: Draft) -> Iterator[Problem]:
    """Every GPU is one rank of the mesh: dp * tp * pp * cp ranks."""
    tp, pp, cp, gpus = d.tp, d.pp, d.cp, d.num_gpus
    model_ranks = tp * pp * cp
    axes = " * ".join(f"{name} {value}" for name, value in (("tp", tp), ("pp", pp), ("cp", cp)) if value > 1)
    if d.knows("dp") and model_ranks * d.dp == gpus:
        return
    largest = max((tp, "tp"), (pp, "pp"), (cp, "cp"))[1]
    path = ("parallelism", "dp" if d.knows("dp") else largest)
    if d.knows("dp"):
        product = f"dp {d.dp}" + (f" * {axes}" if axes else "")
        problem = f"parallelism needs {product} = {d.dp * model_ranks} ranks, but the cluster has {gpus} GPUs"
    else:
        problem = f"parallelism needs a multiple of {axes} = {model_ranks} ranks, but the cluster has {gpus} GPUs"
    if gpus % model_ranks == 0:
        yield Problem(path, problem, f"write dp: {gpus // model_ranks}, or leave dp out")
        return
    yield Problem(path, problem, _room_for(d, model_ranks))


def _room_for(d: Draft, model_ranks: int) -> str:
    """Say which clusters the mesh would fill: a part of one node, or whole nodes."""
    per_node, gpus = d.node.num_gpus, d.num_gpus
    also = " and leave num_nodes out" if d.gives_nodes else ""
    if d.knows("dp"):
        needed = model_ranks * d.dp
        if needed <= per_node or needed % per_node == 0:
            return f"write cluster.num_gpus: {needed}{also}"
        return "choose the axes so that their product is the number of GPUs"
    whole = lcm(model_ranks, per_node)
    part = min(per_node, gpus) // model_ranks * model_ranks
    usable = sorted({n for n in (part, gpus // whole * whole, (gpus // whole + 1) * whole) if n})
    return write("cluster.num_gpus", nearest(usable, gpus)) + also


def tensor_parallelism_divides(d: Draft) -> Iterator[Problem]:
    """Tensor parallelism gives each rank the same number of heads and columns."""
    tp, heads = d.tp, d.model.num_attention_heads
    if heads % tp:
        yield Problem(
            ("parallelism", "tp"),
            f"parallelism.tp = {tp} does not divide model.num_attention_heads = {heads}",
            write("tp", nearest(divisors(heads), tp)),
        )
        return
    kv = d.model.num_key_value_heads
    if kv % tp and tp % kv:
        yield Problem(
            ("parallelism", "tp"),
            f"parallelism.tp = {tp} neither divides model.num_key_value_heads = {kv} nor is a multiple of it",
            write("tp", nearest([t for t in divisors(heads) if kv % t == 0 or t % kv == 0], tp)),
        )
        return
    ffn = d.model.intermediate_size
    if ffn % tp:
        yield Problem(
            ("parallelism", "tp"),
            f"parallelism.tp = {tp} does not divide model.intermediate_size = {ffn}",
            write("tp", nearest([t for t in divisors(heads) if ffn % t == 0], tp)),
        )


def _stages_per_rank(d: Draft) -> int:
    """Return the stages of one copy of the model on a rank."""
    if d.pp == 1 or d.schedule == "dualpipe":
        return 1
    return 2 if d.schedule in IN_A_V else d.vpp


def pipeline_has_layers(d: Draft) -> Iterator[Problem]:
    """Each stage has a layer; the embedding and the head may stand for one each, as Megatron counts them."""
    pp, layers, chunks = d.pp, d.model.num_hidden_layers, _stages_per_rank(d)
    if pp > layers + 2:
        yield Problem(
            ("parallelism", "pp"),
            f"parallelism.pp = {pp} stages, but model.num_hidden_layers = {layers}",
            write("pp", nearest(divisors(layers), layers + 1)[:1]) + " or less",
        )
    elif pp > 1 and d.layers_per_stage is None and d.schedule not in TWO_CHUNKS and pp * d.vpp > layers + 2:
        yield Problem(
            ("parallelism", "vpp"),
            f"pp {pp} * vpp {d.vpp} = {pp * d.vpp} virtual stages, but model.num_hidden_layers = {layers}",
            f"write vpp: {max(1, layers // pp)} or less",
        )
    elif pp > 1 and d.layers_per_stage is None and pp * chunks > layers + 2:
        yield Problem(
            ("parallelism", "schedule"),
            f"schedule {d.schedule} has two chunks a rank, {2 * pp} in all, but model.num_hidden_layers = {layers}",
            f"write pp: {max(1, layers // 2)} or less, or another schedule",
        )


def layers_per_stage_adds_up(d: Draft) -> Iterator[Problem]:
    """The list has an entry for each (virtual) stage and adds up to the layers."""
    given, layers = d.layers_per_stage, d.model.num_hidden_layers
    if given is None:
        return
    stages = d.pp * _stages_per_rank(d)
    if len(given) not in (d.pp, stages):
        yield Problem(
            ("parallelism", "layers_per_stage"),
            f"parallelism.layers_per_stage has {len(given)} entries for {stages} stages",
            f"write {stages} numbers that add up to {layers}",
        )
    elif sum(given) != layers:
        yield Problem(
            ("parallelism", "layers_per_stage"),
            f"parallelism.layers_per_stage adds up to {sum(given)}, but model.num_hidden_layers = {layers}",
            f"write {len(given)} numbers that add up to {layers}",
        )


def inner_stages_have_layers(d: Draft) -> Iterator[Problem]:
    """A stage without the embedding or the head needs a layer.

    Numbers for each rank are shared out over its virtual stages, the first of them taking the rest.
    """
    given = d.layers_per_stage
    if given is None or d.pp == 1:
        return
    chunks = _stages_per_rank(d)
    inner: tuple[int, ...]
    if len(given) == d.pp * chunks:
        inner = given[1:-1]
    elif len(given) == d.pp and d.schedule in IN_A_V:  # the first rank has both ends of the model
        inner = tuple(count // 2 for count in given[1:])
    elif len(given) == d.pp:  # the last of a rank's virtual stages has the fewest; those of the last rank end the model
        inner = (*(count // chunks for count in given[:-1]), given[-1] // (chunks - 1) if chunks > 1 else 1)
    else:
        return
    if 0 in inner:
        yield Problem(
            ("parallelism", "layers_per_stage"),
            "parallelism.layers_per_stage leaves a stage with nothing to do",
            "give each stage a layer; only the first and the last, with embedding and head, may go without"
            + (f"; {d.pp} numbers are shared out over {chunks} stages each" if len(given) != d.pp * chunks else ""),
        )


def schedule_is_the_frameworks(d: Draft) -> Iterator[Problem]:
    """DeepSpeed's pipeline engine has one order of passes (``TrainSchedule`` in deepspeed/runtime/pipe/schedule.py).

    Since 0.19 an engine of its own runs DualPipeV with whole backwards (deepspeed/runtime/pipe/dualpipev.py): one
    optimizer over both stages of a rank, which is not simulated.

    torch's runs any order that it is given (``_load_csv`` in torch/distributed/pipelining/schedules.py), but of stages
    that each are on one rank (``stage_index_to_group_rank``): DualPipe has every stage on two.
    """
    if d.framework == "deepspeed" and d.pp > 1 and d.schedule != "1f1b":
        yield Problem(
            ("parallelism", "schedule"),
            "DeepSpeed's dualpipev, with whole backwards, is not simulated yet"
            if d.schedule == "dualpipev"
            else f"schedule {d.schedule} is not DeepSpeed's: its pipeline engine runs 1f1b",
            "write schedule: 1f1b, or framework: megatron",
        )
    if d.framework in ("ddp", "fsdp2") and d.pp > 1 and d.schedule == "dualpipe":
        yield Problem(
            ("parallelism", "schedule"),
            "schedule dualpipe has each stage on two ranks, and a stage of torch's pipelines is on one",
            "write schedule: dualpipev, its half with one copy of the model; or framework: megatron",
        )


def recompute_is_not_split(d: Draft) -> Iterator[Problem]:
    """torch splits a backward by ``autograd.grad`` (torch/distributed/pipelining/_backward.py).

    The reentrant checkpoint refuses that (``CheckpointFunction.backward`` in torch/utils/checkpoint.py); the other runs
    forward again for the gradients of inputs, and again for every group of weights, as each is a graph task of its own.
    """
    if d.framework == "fsdp2" and d.pp > 1 and d.schedule in SPLIT_BACKWARD and d.recompute != "none":
        why = (
            "torch recomputes for every group of weights again"
            if d.code == "torch"
            else "a reentrant checkpoint does not run under autograd.grad"
        )
        yield Problem(
            ("training", "recompute"),
            f"recompute {d.recompute} does not go with schedule {d.schedule}, which splits the backward: {why}",
            "write recompute: none, or schedule: 1f1b or interleaved",
        )


def dual_pipes_are_filled(d: Draft) -> Iterator[Problem]:
    """Both DualPipes start with two microbatches a rank; the one of two directions needs halves of ranks and batch.

    Source: the assertions of ``step`` in deepseek-ai/DualPipe, dualpipe/dualpipe.py and dualpipev.py.
    """
    if d.schedule not in ("dualpipe", "dualpipev") or d.pp == 1:
        return
    if d.schedule == "dualpipe" and d.pp % 2:
        yield Problem(
            ("parallelism", "pp"),
            f"parallelism.pp = {d.pp} is odd, and schedule dualpipe feeds the pipeline from both ends alike",
            write("pp", [d.pp - 1, d.pp + 1]) + ", or schedule: dualpipev",
        )
        return
    turn = d.dp * d.micro_batch_size
    least = 2 * d.pp * turn
    microbatches, rest = divmod(d.global_batch_size, turn)
    if d.global_batch_size < least:
        yield Problem(
            ("training", "global_batch_size"),
            f"{microbatches} microbatches a step are fewer than two a stage, {2 * d.pp}, as schedule {d.schedule} "
            "needs",
            f"write global_batch_size: {least} or more",
        )
    elif d.schedule == "dualpipe" and not rest and microbatches % 2:
        yield Problem(
            ("training", "global_batch_size"),
            f"{microbatches} microbatches a step are odd, and schedule dualpipe feeds the pipeline from both ends "
            "alike",
            write("global_batch_size", [(microbatches - 1) * turn, (microbatches + 1) * turn]),
        )


def virtual_stages_need_a_schedule(d: Draft) -> Iterator[Problem]:
    """Only some schedules give a rank more than one stage."""
    chunks = "two chunks" if d.schedule in TWO_CHUNKS else "one stage"
    if d.vpp > 1 and d.schedule != "interleaved" and not (d.vpp == 2 and d.schedule in TWO_CHUNKS):
        yield Problem(
            ("parallelism", "vpp"),
            f"parallelism.vpp = {d.vpp}, but schedule {d.schedule} has {chunks} a rank",
            "write schedule: interleaved, or leave vpp out",
        )
    if d.vpp > 1 and d.pp == 1:
        yield Problem(
            ("parallelism", "vpp"),
            f"parallelism.vpp = {d.vpp}, but there is no pipeline: pp is 1",
            "leave vpp out, or write pp: 2 or more",
        )
    if d.schedule == "interleaved" and d.vpp == 1 and d.pp > 1:
        yield Problem(
            ("parallelism", "schedule"),
            "parallelism.schedule is interleaved, but vpp is 1",
            "write vpp: 2 or more, or schedule: 1f1b",
        )


def interleaving_needs_full_groups(d: Draft) -> Iterator[Problem]:
    """Interleaving runs microbatches in groups of pp (megatron/core/pipeline_parallel/schedules.py)."""
    if d.schedule != "interleaved" or d.pp == 1 or d.vpp == 1:
        return
    microbatches, rest = divmod(d.global_batch_size, d.dp * d.micro_batch_size)
    if not rest and microbatches % d.pp:
        yield Problem(
            ("training", "global_batch_size"),
            f"{microbatches} microbatches a step do not fill groups of pp = {d.pp}, as schedule interleaved needs",
            write("global_batch_size", [m * d.dp * d.micro_batch_size for m in multiples(d.pp, microbatches)]),
        )


def expert_parallelism_divides(d: Draft) -> Iterator[Problem]:
    """Each rank holds the same number of experts."""
    if d.ep == 1:
        return
    experts = d.model.num_local_experts
    if experts is None:
        yield Problem(("parallelism", "ep"), f"parallelism.ep = {d.ep}, but the model has no experts", "leave ep out")
    elif experts % d.ep:
        yield Problem(
            ("parallelism", "ep"),
            f"parallelism.ep = {d.ep} does not divide model.num_local_experts = {experts}",
            write("ep", nearest(divisors(experts), d.ep)),
        )


def samples_are_packed(d: Draft) -> Iterator[Problem]:
    """Samples in a row of tokens: kernels that take where each begins (``cu_seqlens``), as Megatron calls them."""
    if not d.sample_length:
        return
    where = ("training", "sample_length")
    if d.sample_length > d.sequence_length:
        text = f"training.sample_length = {d.sample_length} is longer than sequence_length = {d.sequence_length}"
        yield Problem(where, text, "leave sample_length out, or write the mean tokens of a sample")
    if d.code != "megatron" or d.attention in ("math", "memory-efficient"):
        text = f"training.sample_length: samples are not packed by code: {d.code} with attention: {d.attention}"
        yield Problem(where, text, "leave sample_length out")
    elif d.cp > 1:
        text = f"training.sample_length with parallelism.cp = {d.cp}: sim does not divide packed samples"
        yield Problem(where, text, "write cp: 1, or leave sample_length out")


def softmax_is_there(d: Draft) -> Iterator[Problem]:
    """Only Hugging Face's attention ``math`` has a softmax of its own that another code's kernel can stand for."""
    if d.softmax is None:
        return
    path, action = ("training", "softmax"), "leave softmax out"
    if d.code != "huggingface" or d.attention != "math":
        if d.code == "megatron" and d.attention == "math":
            action += "; megatron.masked_softmax_fusion says it there"
        text = f"training.softmax: there is none to choose in code: {d.code} with attention: {d.attention}"
        yield Problem(path, text, action)
    elif d.softmax == "fused" and d.model.position == "alibi":
        yield Problem(path, "training.softmax: fused: its kernel adds no ALiBi to the scores", action)
    elif d.softmax == "fused" and d.precision == "fp32":
        yield Problem(path, "training.softmax: fused: its kernel takes scores of 16 bit alone", action)


def context_parallelism_divides(d: Draft) -> Iterator[Problem]:
    """Each rank holds two equal pieces of the sequence, an early and a late one, so that a causal mask is fair."""
    twice = "" if d.framework == "deepspeed" else "2 * "  # by heads, without load balance
    pieces = d.cp * (2 if twice else 1) if d.cp > 1 else 1
    if d.sequence_length % pieces:
        yield Problem(
            ("training", "sequence_length"),
            f"training.sequence_length = {d.sequence_length} does not divide into {twice}cp = {pieces} pieces",
            write("sequence_length", multiples(pieces, d.sequence_length)),
        )


_OPTIMIZERS_OF = {
    "ddp": ("adamw", "adam", "sgd", "sgd-momentum", "adafactor", "adam-8bit", "lion", "muon"),
    "fsdp1": ("adamw", "adam", "sgd", "sgd-momentum", "adam-8bit", "lion"),
    "fsdp2": ("adamw", "adam", "sgd", "sgd-momentum", "adam-8bit", "lion"),
    "deepspeed": ("adamw", "adam", "sgd", "sgd-momentum", "adam-8bit", "lion"),
    "megatron": ("adamw", "adam", "sgd", "sgd-momentum"),
}
"""Adafactor and Muon want whole matrices, which only DDP has; Megatron brings its own optimizers."""


def optimizer_steps_there(d: Draft) -> Iterator[Problem]:
    """Not every optimizer can step what a framework leaves of the parameters."""
    path, known = ("training", "optimizer"), _OPTIMIZERS_OF[d.framework]
    if d.optimizer not in known:
        yield Problem(
            path, f"optimizer {d.optimizer} under framework {d.framework} is not simulated", f"write {either(known)}"
        )
    elif d.framework == "deepspeed" and d.optimizer in ("sgd-momentum", "adam-8bit", "lion"):
        if d.zero == 0:
            yield Problem(path, f"optimizer {d.optimizer} with DeepSpeed needs zero 1 to 3 here", "write zero: 1")
        elif d.offload_optimizer != "none":
            yield Problem(
                path, f"DeepSpeed has no optimizer {d.optimizer} for the host", "write adamw, or leave the offload out"
            )


def metrics_have_the_logits(d: Draft) -> Iterator[Problem]:
    """They are computed by a rank that has the whole logits and the whole model (Composer has neither tp nor pp)."""
    if d.metrics and (d.tp > 1 or d.pp > 1):
        yield Problem(
            ("training", "metrics"),
            f"metrics {d.metrics} are simulated of whole logits on one stage, but tp is {d.tp} and pp {d.pp}",
            "leave metrics out",
        )


def loss_is_the_codes(d: Draft) -> Iterator[Problem]:
    """Megatron's head has its own losses; the ones in pieces are written for a whole vocabulary."""
    path = ("training", "loss")
    usual = (
        ("vocab-parallel", "vocab-parallel-compiled", "fused", "eager")
        if d.code == "megatron"
        else ("eager", "fused", "kernel", "chunked", "linear-fused")
    )
    if d.code == "huggingface" and d.framework == "deepspeed" and d.tp > 1:  # Megatron's, around blocks op by op
        usual = (*usual, "vocab-parallel")
    if d.compile and d.code == "torch":
        usual = ("eager", "compiled", *usual[1:])
    if d.loss == "compiled" and not d.compile:
        yield Problem(path, "loss compiled, but compile is false", "write loss: eager, or compile: true")
    elif d.loss not in usual:
        yield Problem(path, f"loss {d.loss} does not go with code {d.code}", f"write loss: {either(usual)}")
    elif d.tp > 1 and d.loss in ("kernel", "chunked", "linear-fused"):
        yield Problem(path, f"loss {d.loss} needs the whole vocabulary, but tp is {d.tp}", "write loss: eager or fused")
    elif d.loss in ("chunked", "linear-fused") and d.model.head_bias:
        yield Problem(path, f"loss {d.loss} is not simulated with a bias in the head yet", "write loss: eager")


def heads_divide_over_context(d: Draft) -> Iterator[Problem]:
    """Heads for sequence: each rank gets whole key heads (AttnFuncWithCPAndQKVOA2A: "num_gqa_groups % cp_size")."""
    if d.cp > 1 and d.cp_comm == "a2a" and (kv := d.model.num_key_value_heads) % (d.tp * d.cp):
        yield Problem(
            ("parallelism", "cp_comm"),
            f"cp_comm a2a: {kv} key heads do not divide over tp {d.tp} * cp {d.cp}",
            "write framework: megatron, whose ring needs no heads, or fewer context-parallel ranks"
            if d.framework == "deepspeed"
            else "write cp_comm: p2p, or fewer context-parallel ranks",
        )


def exchange_is_the_frameworks(d: Draft) -> Iterator[Problem]:
    """DeepSpeed's sequence parallelism exchanges heads for sequence alone (deepspeed/sequence/layer.py)."""
    if d.framework == "deepspeed" and d.cp > 1 and d.cp_comm != "a2a":
        yield Problem(
            ("parallelism", "cp_comm"),
            f"cp_comm {d.cp_comm} is not DeepSpeed's: Ulysses exchanges heads for sequence",
            "write cp_comm: a2a, or framework: megatron or fsdp2",
        )


def context_parallelism_has_a_kernel(d: Draft) -> Iterator[Problem]:
    """Exchanges are of fused kernels: a ring adds up their outputs by the log-sum-exp, which scores do not have.

    ``math`` has no kernel in torch's context_parallel or Transformer Engine's; scaled_dot_product_attention falls back
    to it where neither flash nor the memory-efficient kernel takes the inputs
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    if d.cp == 1:
        return
    path, usable = ("training", "attention"), "write attention: sdpa or flash-2, or leave cp out"
    if d.attention == "math":
        yield Problem(path, f"attention math does not go with cp {d.cp}, which needs a fused kernel", usable)
        return
    heads, kv = d.model.num_attention_heads, d.model.num_key_value_heads
    if d.attention != "sdpa" or d.code == "megatron" or kv == heads:
        return
    why = (
        f"in {d.precision}" if d.precision in ("fp32", "tf32")
        else "with alibi" if d.model.position == "alibi"
        else f"on {d.gpu.name}" if d.gpu.compute_capability < (8, 0)
        else ""
    )  # fmt: skip
    if why:
        yield Problem(
            path,
            f"attention sdpa falls back to math {why}, as {heads} heads share {kv} key heads; cp {d.cp} needs a fused "
            "kernel",
            f"write num_key_value_heads: {heads}"
            + {"in": ", or precision: bf16", "wi": ", or attention: flash-2", "on": ""}[why[:2]]
            + ", or leave cp out",
        )


def key_heads_divide(d: Draft) -> Iterator[Problem]:
    """Only Megatron's fused projection lets ranks share a key head (megatron/core/transformer/attention.py).

    torch.distributed.tensor.parallel and DeepSpeed's AutoTP split the rows of ``k_proj`` and ``v_proj``.
    """
    if d.tp == 1 or (d.framework in ("megatron", "deepspeed") and d.code == "megatron"):
        return
    heads, kv = d.model.num_attention_heads, d.model.num_key_value_heads
    if heads % d.tp == 0 and kv % d.tp and d.tp % kv == 0:
        yield Problem(
            ("parallelism", "tp"),
            f"parallelism.tp = {d.tp} does not divide model.num_key_value_heads = {kv}, and in {d.framework} with "
            f"{d.code} code no two ranks share a key head",
            write("tp", nearest(divisors(kv), d.tp)[:1]) + ", or framework: megatron",
        )


def embeddings_stay_tied(d: Draft) -> Iterator[Problem]:
    """torch.distributed.pipelining's stages are modules of their own, which share no parameter."""
    if d.framework in ("ddp", "fsdp2") and d.pp > 1 and d.model.tie_word_embeddings:
        yield Problem(
            ("parallelism", "pp"),
            f"parallelism.pp = {d.pp} parts the tied embeddings, and torch's pipeline stages share no parameter",
            "write model.tie_word_embeddings: false, or pp: 1, or framework: megatron",
        )


def sequence_parallelism_divides(d: Draft) -> Iterator[Problem]:
    """Sequence parallelism splits the tokens over the tensor-parallel ranks."""
    if d.sp and d.tp > 1 and (d.sequence_length // d.cp) % d.tp:
        yield Problem(
            ("training", "sequence_length"),
            f"training.sequence_length = {d.sequence_length} does not divide over tp {d.tp} with sp"
            + (f" and cp {d.cp}" if d.cp > 1 else ""),
            write("sequence_length", multiples(d.tp * 2 * d.cp, d.sequence_length)),
        )


# --- the batch -----------------------------------------------------------------------------------


def batch_divides(d: Draft) -> Iterator[Problem]:
    """Each data-parallel rank runs a whole number of microbatches."""
    dp, micro, batch = d.dp, d.micro_batch_size, d.global_batch_size
    if batch % (dp * micro):
        yield Problem(
            ("training", "global_batch_size"),
            f"training.global_batch_size = {batch} is no multiple of dp {dp} * micro_batch_size {micro} = {dp * micro}",
            write("global_batch_size", multiples(dp * micro, batch)),
        )
    elif batch // (dp * micro) > MAX_MICROBATCHES:
        yield Problem(
            ("training", "global_batch_size"),
            f"{batch // (dp * micro)} microbatches a step are more than sim runs ({MAX_MICROBATCHES})",
            f"write global_batch_size: {MAX_MICROBATCHES * dp * micro} or less",
        )


# --- the hardware --------------------------------------------------------------------------------

_UNIT_OF = {"mxfp8": "fp8"}


def _sixteen_bit(d: Draft) -> list[str]:
    return [name for name in ("bf16", "fp16") if name in d.gpu.peak_flops]


def gpu_has_precision(d: Draft) -> Iterator[Problem]:
    """The GPU's matrix units compute in this precision."""
    have = d.gpu.peak_flops
    unit = _UNIT_OF.get(d.precision, d.precision)
    lacks = unit not in have
    if d.precision == "mxfp8" and d.gpu.vendor == "nvidia":
        lacks = lacks or d.gpu.compute_capability < (10, 0)
    if lacks:
        usable = [name for name in ("bf16", "fp16", "fp8", "tf32", "fp32") if name in have]
        yield Problem(
            ("training", "precision"),
            f"GPU {d.gpu.name} does not compute in {d.precision}",
            f"write precision: {either(usable)}",
        )


def attention_kernel_runs(d: Draft) -> Iterator[Problem]:
    """FlashAttention-2 needs Ampere and 16 bit, FlashAttention-3 Hopper (Dao-AILab/flash-attention, README)."""
    path, kernel, gpu = ("training", "attention"), d.attention, d.gpu
    if kernel in ("math", "sdpa"):
        return
    if gpu.vendor == "nvidia":
        if gpu.compute_capability < (8, 0):
            yield Problem(
                path,
                f"attention {kernel} needs an Ampere GPU or newer; {gpu.name} is {gpu.architecture.capitalize()}",
                "write attention: sdpa or math",
            )
            return
        if kernel == "flash-3" and gpu.compute_capability[0] != 9:
            yield Problem(path, f"attention flash-3 needs a Hopper GPU; {gpu.name} is none", "write attention: flash-2")
            return
    elif kernel in ("flash-3", "cudnn"):
        yield Problem(path, f"attention {kernel} needs an NVIDIA GPU", "write attention: flash-2")
        return
    if d.precision in ("fp32", "tf32"):
        usable = _sixteen_bit(d)
        yield Problem(
            path,
            f"attention {kernel} computes in 16 bit, but training.precision is {d.precision}",
            "write attention: sdpa or math" + (f", or precision: {either(usable)}" if usable else ""),
        )


def plain_network_has_numbers(d: Draft) -> Iterator[Problem]:
    """A plain network is its two numbers; they belong to no other."""
    given = {"alpha": d.alpha, "beta": d.beta}
    if d.backend == "alpha-beta":
        example = {"alpha": "5 us, the latency of a message", "beta": "50 GB/s, the bandwidth of a GPU each way"}
        for key, value in given.items():
            if value is None:
                yield Problem(
                    ("cluster", "backend"), f"backend alpha-beta without {key}", f"write {key}: {example[key]}"
                )
        return
    for key, value in given.items():
        if value is not None:
            yield Problem(
                ("cluster", key),
                f"cluster.{key} is given, but backend is {d.backend}",
                f"write backend: alpha-beta, or leave {key} out",
            )


def switches_reduce_in_infiniband(d: Draft) -> Iterator[Problem]:
    """SHARP is of InfiniBand's switches, from EDR on, and NCCL's alone reaches it (nccl-rdma-sharp-plugins)."""
    path = ("cluster", "sharp" if d.sharp else "network")
    if d.network is None or not d.network.sharp:
        if d.sharp:
            problem = "cluster.sharp is true, but there is no network"
            yield Problem(path, problem, "write num_nodes: 2, or leave sharp out")
        return
    if d.network.fabric != "infiniband":
        yield Problem(
            path,
            f"cluster.sharp is true, but {d.network.name} is {d.network.fabric}: SHARP is InfiniBand's",
            "write an InfiniBand network such as ib-ndr-400-rail, or leave sharp out",
        )
    if d.backend != "nccl":
        problem = f"cluster.sharp is true, but backend is {d.backend}"
        yield Problem(path, problem, "write backend: nccl, or leave sharp out")


def gloo_sends_from_the_host(d: Draft) -> Iterator[Problem]:
    """ProcessGroupGloo stages collectives of CUDA tensors in host memory, but its send and recv hand the tensor's own
    address to the socket (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp; docs/source/distributed.md, "Backends")."""
    if d.backend != "gloo":
        return
    if d.pp > 1:
        yield Problem(
            ("parallelism", "pp"),
            f"parallelism.pp = {d.pp}, but gloo sends and receives no GPU tensors",
            "write backend: nccl, or pp: 1",
        )
    if d.cp > 1 and d.cp_comm == "p2p":
        yield Problem(
            ("parallelism", "cp"),
            f"parallelism.cp = {d.cp} with cp_comm p2p, but gloo sends and receives no GPU tensors",
            "write backend: nccl, or cp_comm: all_gather",
        )


def nodes_are_connected(d: Draft) -> Iterator[Problem]:
    """Several nodes need a network."""
    if d.num_nodes > 1 and d.network is None and d.backend != "alpha-beta":
        yield Problem(
            ("cluster", "node"),
            f"{d.num_nodes} nodes of {d.node.name} have no network between them",
            "write cluster.network: a name of 'sim catalog network', or '100 Gbit/s RoCE per node'",
        )


# --- the framework -------------------------------------------------------------------------------


def framework_has_zero(d: Draft) -> Iterator[Problem]:
    """DDP keeps whole copies; FSDP always shards; DeepSpeed's pipeline engine stops at stage 1."""
    path, zero = ("parallelism", "zero"), d.zero
    if d.framework == "ddp" and zero > 0:
        others = {1: "deepspeed", 2: "deepspeed, fsdp1 or fsdp2", 3: "deepspeed, fsdp1 or fsdp2"}[zero]
        yield Problem(
            path,
            f"parallelism.zero = {zero}, but framework ddp keeps whole copies on every rank",
            f"write framework: {others}; or leave zero out",
        )
    if d.framework in ("fsdp1", "fsdp2") and zero < 2:
        yield Problem(
            path,
            f"parallelism.zero = {zero}, but framework {d.framework} shards gradients at least",
            "write zero: 2 or 3" + ("; or framework: ddp" if zero == 0 else "; or framework: deepspeed"),
        )
    if d.framework == "megatron" and zero > 1 and d.pp > 1:
        yield Problem(
            path,
            f"parallelism.zero = {zero} is Megatron-FSDP, which is modelled without pipelines, and pp is {d.pp}",
            "write zero: 1, or pp: 1",
        )
    # deepspeed/runtime/pipe/engine.py: "ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism"
    if d.framework == "deepspeed" and d.pp > 1 and zero > 1:
        yield Problem(
            path,
            f"parallelism.zero = {zero} does not go with pp {d.pp}: DeepSpeed's pipeline engine stops at stage 1",
            "write zero: 1, or pp: 1",
        )


def framework_has_axes(d: Draft) -> Iterator[Problem]:
    """torch's DDP and FSDP1 know one axis, data parallelism; a stage of torch's pipelines may be wrapped in DDP.

    FSDP1 would reduce every microbatch (``backward_maybe_with_nosync`` in torch/distributed/pipelining/stage.py knows
    DDP and FSDP2). DDP's hooks run where gradients accumulate, which ``autograd.grad`` does not do.
    """
    if d.framework not in ("ddp", "fsdp1"):
        return
    if d.framework == "ddp" and d.pp > 1 and d.schedule in SPLIT_BACKWARD:
        yield Problem(
            ("parallelism", "schedule"),
            f"schedule {d.schedule} splits the backward, and DDP's hooks reduce no gradient that autograd.grad makes",
            "write schedule: 1f1b or interleaved; or framework: fsdp2",
        )
    for axis in ("tp", "pp", "cp", "ep"):
        value = getattr(d, axis)
        if value > 1 and not (axis == "pp" and d.framework == "ddp"):
            yield Problem(
                ("parallelism", axis),
                f"parallelism.{axis} = {value}, but framework {d.framework} is data parallelism alone",
                f"write framework: megatron{' or fsdp2' if axis != 'ep' else ''}; or leave {axis} out",
            )


def offload_needs_stage(d: Draft) -> Iterator[Problem]:
    """deepspeed/runtime/zero/config.py: offload_param is valid with stage 3, offload_optimizer with stages 1 to 3.

    A part of the states is offloaded by stage 3 alone (``offload_ratio_check``).
    """
    if d.framework != "deepspeed":
        return
    if d.offload_param != "none" and d.zero != 3:
        yield Problem(
            ("deepspeed",),
            f"DeepSpeed's offload_param needs ZeRO stage 3, and the stage is {d.zero}",
            "write parallelism.zero: 3 (and the stage of the ds_config with it), or remove offload_param",
        )
    if d.offload_optimizer != "none" and d.zero == 0:
        yield Problem(
            ("deepspeed",),
            "DeepSpeed's offload_optimizer needs ZeRO stage 1, 2 or 3, and the stage is 0",
            "write parallelism.zero: 1 (and the stage of the ds_config with it), or remove offload_optimizer",
        )
    ratio = d.deepspeed.fields.get("offload_ratio", 1.0) if d.deepspeed else 1.0
    if ratio < 1 and d.offload_optimizer != "none" and d.zero != 3:
        yield Problem(
            ("deepspeed",),
            f"DeepSpeed's offload_optimizer.ratio = {ratio:g} needs ZeRO stage 3, and the stage is {d.zero}",
            "remove ratio, or write parallelism.zero: 3 (and the stage of the ds_config with it)",
        )


def checkpoints_are_somewhere(d: Draft) -> Iterator[Problem]:
    """What ``configure`` of deepspeed/runtime/activation_checkpointing/checkpointing.py asserts; what would run out."""
    path = ("training", "checkpoint")
    if d.checkpoint == "deepspeed" and d.framework != "deepspeed":
        yield Problem(path, f"checkpoint deepspeed, but framework is {d.framework}", "leave checkpoint out")
        return
    given = d.deepspeed.fields if d.framework == "deepspeed" and d.deepspeed else {}
    if not given.get("contiguous_memory_optimization"):
        return
    name = "contiguous_memory_optimization"
    number = given.get("number_checkpoints")
    blocks = -(-d.model.num_hidden_layers // d.pp) // d.recompute_interval
    if not given.get("partition_activations"):
        yield Problem(
            ("deepspeed",),
            f"DeepSpeed's {name} needs partition_activations",
            "write partition_activations: true beside it",
        )
    elif number is None:
        yield Problem(
            ("deepspeed",),
            f"DeepSpeed's {name} needs number_checkpoints",
            f"write number_checkpoints: {blocks} beside it",
        )
    elif number < blocks and d.recompute == "full":
        yield Problem(
            ("deepspeed",),
            f"number_checkpoints = {number} places are too few for {blocks} recomputed blocks",
            f"write number_checkpoints: {blocks}",
        )


def secondary_partitions_divide(d: Draft) -> Iterator[Problem]:
    """deepspeed/utils/groups.py, ``_create_zero_param_parallel_group``: equal groups of all ranks."""
    size = d.deepspeed.fields.get("zero_hpz_partition_size", 1) if d.framework == "deepspeed" and d.deepspeed else 1
    if d.zero == 3 and size < d.dp and d.dp % size:
        yield Problem(
            ("deepspeed",),
            f"DeepSpeed's zero_hpz_partition_size = {size} does not divide the {d.dp} data-parallel ranks",
            "write the number of GPUs of a node",
        )


def faults_are_somewhere(d: Draft) -> Iterator[Problem]:
    """A slow rank exists, and a degraded link is one of the machine's."""
    for entry in d.faults.get("slow", ()):
        if entry["rank"] >= d.num_gpus:
            yield Problem(
                ("faults",), f"faults.slow: there is no rank {entry['rank']}", f"ranks are 0 to {d.num_gpus - 1}"
            )
    kinds = dict(d.node.devices)
    wired = {frozenset((_switch(kinds, a), _switch(kinds, b))) for a, b, _, _ in d.node.wires}
    for entry in d.faults.get("links", ()):
        a, b = entry["between"]
        if not _is_link(a, b, kinds, wired, d.num_nodes) and not _is_link(b, a, kinds, wired, d.num_nodes):
            yield Problem(
                ("faults",),
                f"faults.links: no wire leads from {a} to {b}",
                "write two devices that a wire joins, as the node's file names them: [node0.gpu0, node0.nvswitch0], "
                "[node0.nic0, leaf], or [leaf0, spine]",
            )


def _switch(kinds: dict[str, str], name: str) -> str:
    """NVSwitches of a node act as one."""
    return "nvswitch" if kinds.get(name) == "nvswitch" else name


def _is_link(a: str, b: str, kinds: dict[str, str], wired: set[frozenset[str]], num_nodes: int) -> bool:
    node, _, device = a.partition(".")
    if b == "spine":
        return a.startswith("leaf") and a[4:].isdigit()
    if not (node.startswith("node") and node[4:].isdigit() and int(node[4:]) < num_nodes):
        return False
    if b == "leaf":
        return kinds.get(device) == "nic"
    return frozenset((_switch(kinds, device), _switch(kinds, b.removeprefix(f"{node}.")))) in wired


RULES: tuple[Rule, ...] = (
    kv_heads_divide_heads,
    heads_have_a_width,
    rope_needs_even_heads,
    experts_are_chosen,
    positions_reach,
    tensor_parallelism_divides,
    pipeline_has_layers,
    layers_per_stage_adds_up,
    inner_stages_have_layers,
    schedule_is_the_frameworks,
    recompute_is_not_split,
    dual_pipes_are_filled,
    virtual_stages_need_a_schedule,
    interleaving_needs_full_groups,
    expert_parallelism_divides,
    context_parallelism_divides,
    samples_are_packed,
    softmax_is_there,
    heads_divide_over_context,
    exchange_is_the_frameworks,
    optimizer_steps_there,
    loss_is_the_codes,
    metrics_have_the_logits,
    context_parallelism_has_a_kernel,
    key_heads_divide,
    embeddings_stay_tied,
    sequence_parallelism_divides,
    batch_divides,
    gpu_has_precision,
    attention_kernel_runs,
    plain_network_has_numbers,
    switches_reduce_in_infiniband,
    gloo_sends_from_the_host,
    nodes_are_connected,
    framework_has_zero,
    framework_has_axes,
    offload_needs_stage,
    checkpoints_are_somewhere,
    secondary_partitions_divide,
    faults_are_somewhere,
)


def run_rules(draft: Draft, rules: tuple[Rule, ...] = RULES) -> Iterator[Problem]:
    """Yield what every rule finds; a rule that needs a value which is not known is skipped."""
    for rule in rules:
        found: list[Problem] = []
        try:
            found.extend(rule(draft))
        except UnknownError:
            continue
        yield from found
