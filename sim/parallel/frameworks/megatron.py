"""Megatron-Core: gradients accumulate in one buffer, reduced in buckets; an fp32 master is sharded or whole.

Source: megatron/core/distributed/distributed_data_parallel.py, param_and_grad_buffer.py, finalize_model_grads.py,
core/optimizer/distrib_optimizer.py, optimizer.py, clip_grads.py and core/tensor_parallel/layers.py of Megatron-LM.

* A model chunk has one gradient buffer, fp32 for bf16 parameters unless told otherwise. Parameters enter it last first.
  A bucket closes at max(40e6, 1e6 dp) elements, if reductions overlap, on the first pipeline rank's first chunk;
  elsewhere there is one bucket. The distributed optimizer aligns parameters to 64 elements and bucket ends to
  lcm(dp, 128), and keeps the parameters themselves in a flat buffer that is gathered in place.
* Weight gradients of linear layers are added to the buffer by the matmul (``gradient_accumulation_fusion``); other
  gradients are tensors first, and are added by a backward hook. So that hooks run, backward still returns a tensor of
  the weight's shape and dtype, which nothing reads: one for each shape that Transformer Engine keeps for good
  (``get_dummy_wgrad`` in transformer_engine/pytorch/module/base.py, from 2.3), a fresh one for Megatron's own linears:
  the output layer, and all with ``transformer_impl: local`` (megatron/core/tensor_parallel/layers.py).
* Buckets are scaled by 1/dp, then all-reduced or, with the distributed optimizer, reduce-scattered.
* With several stages and overlap, reductions start after the chunk's last backward (``align_grad_reduce``), except on
  the first rank of a pipeline without interleaving, where they hide behind it.
* ``finalize_model_grads``: sums over tp of what sequence parallelism leaves partial, and over the embedding group.
* The step: gradient norm over all ranks that hold parts of the model, clip, one fused Adam kernel, copy the master into
  the parameters, gather them; or gather bucket by bucket as the next forward needs them (``overlap_param_gather``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

from sim.ir.ledger import DTYPE_BYTES, DType, Kernel, Layer
from sim.ir.program import COMPUTE, Alloc, Chunk, Compute, Free, Instruction, Mark, Storage
from sim.parallel.frameworks.flat import (
    Communicator,
    Flat,
    Key,
    accumulate,
    copy,
    flat_storage,
    host_sync,
    in_place,
    padded,
    pointwise,
    wait,
)
from sim.parallel.optimizer import OPTIMIZERS
from sim.parallel.quantise import Recipe, cast_kernels, low_weights
from sim.scenario.schema import MegatronSettings

PARAM_ALIGNMENT = 64
"""``pad_param_start_if_needed``: each parameter starts at a multiple (param_and_grad_buffer.py)."""
BUCKET_ALIGNMENT = 128
"""``pad_bucket_end_if_needed``: the end of a bucket is a multiple of lcm(dp, 128), 256 bytes of 16-bit elements."""
LEAST_BUCKET, LEAST_BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements: ``bucket_size = max(40000000, 1000000 * dp)`` (distributed_data_parallel.py)."""


@dataclass(frozen=True, slots=True)
class MegatronPlan:
    """The job, as one rank's Megatron sees it.

    ``dp``               ranks that hold the same parameters (data and context parallel), ``dp_axis`` their axis
    ``pipeline_rank``    of ``pipeline_ranks``; ``num_chunks`` of each
    ``norm_axis``        ranks whose gradients make one norm: those of one replica, or of the whole job if it is sharded
    ``tp``               tensor-parallel ranks
    ``late_validation``  the norm is not waited for (schedules that end one rank after another)
    ``interleaved``      the schedule is interleaved 1F1B, which says when a chunk's parameters are gathered
    ``recipe``           how linears quantise: their weights in the first microbatch of a step, kept by each module
    ``shards_parameters``  Megatron-FSDP shards the parameters too, not only gradients and states
    """

    dp: int
    dp_axis: str
    parameter_dtype: DType
    optimizer: str = "adamw"
    gradient_clipping: float = 0.0
    tp: int = 1
    pipeline_rank: int = 0
    pipeline_ranks: int = 1
    num_chunks: int = 1
    norm_axis: str = "world"
    norm_ranks: int = 1
    late_validation: bool = False
    recipe: Recipe | None = None
    interleaved: bool = False
    shards_parameters: bool = False


@dataclass(frozen=True, slots=True)
class MegatronStage:
    """A model chunk: its layers, and (layer, parameter) whose gradients another group shares.

    ``tied`` weights are held by another stage too; of ``partial`` ones each tensor-parallel rank has a part of the sum.
    ``index`` is the stage's place in the model. ``mask_bytes`` are of the attention mask that comes with a microbatch.
    """

    layers: tuple[Layer, ...]
    tied: tuple[Key, ...] = ()
    partial: tuple[Key, ...] = ()
    index: int = 0
    mask_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """A run of the buffer that is reduced at once. ``num_elements`` with padding."""

    keys: tuple[Key, ...]
    num_elements: int


def fused_gradients(layer: Layer) -> frozenset[str]:
    """Return the parameters whose gradient the matmul adds to the buffer: the weights of linear layers.

    Those are the ones whose gradient is a matmul (``wgrad_gemm_accum_fp32``); lookups, norms and biases are not. An op
    that makes a bias's gradient too names it first (``sim.model.tape.linear``).
    """
    from sim.ir.ledger import Gemm

    return frozenset(
        op.gradients[-1]
        for op in layer.backward
        if op.gradients and any(isinstance(kernel, Gemm) for kernel in op.kernels)
    )


def main_dtype(settings: MegatronSettings, parameter_dtype: DType) -> DType:
    """Return the dtype of the buffer of gradients (``main_grad``)."""
    fp32 = settings.accumulate_allreduce_grads_in_fp32
    if fp32 is None:  # megatron/training/arguments.py turns it on for bf16; --megatron-fsdp-main-grads-dtype is "auto"
        fp32 = parameter_dtype == "bf16" and not settings.use_megatron_fsdp
    return "fp32" if fp32 else parameter_dtype


def buckets_of(
    sizes: Sequence[tuple[Key, int]], dp: int, bucket_size: int | None, *, aligned: bool, alone: Sequence[Key] = ()
) -> tuple[Bucket, ...]:
    """Return the buckets of (parameter, elements) in module order; ``bucket_size`` None is one bucket.

    Parameters enter last first (``params[::-1]``). ``aligned`` is the distributed optimizer's padding; ``alone`` are
    weights shared between stages, which then have buckets of their own.
    """
    found: list[Bucket] = []
    keys: list[Key] = []
    filled = 0

    def close() -> None:
        nonlocal keys, filled
        if keys:
            found.append(Bucket(tuple(keys), padded(filled, lcm(dp, BUCKET_ALIGNMENT)) if aligned else filled))
        keys, filled = [], 0

    for key, count in reversed(sizes):
        own = aligned and key in alone
        if own:
            close()
        filled = (padded(filled, PARAM_ALIGNMENT) if aligned else filled) + count
        keys.append(key)
        if own or (bucket_size is not None and filled >= bucket_size):
            close()
    close()
    return tuple(found)


class MegatronChunk:
    """Hooks of one model chunk. Writes instructions in host order."""

    def __init__(
        self, number: int, stage: MegatronStage, settings: MegatronSettings, plan: MegatronPlan, nccl: Communicator
    ) -> None:
        self.number, self.stage, self.settings, self.plan, self.nccl = number, stage, settings, plan, nccl
        self.sizes: dict[Key, int] = {}
        self.names: dict[Key, str] = {}
        for index, layer in enumerate(stage.layers):
            elsewhere = {own for own, _, _ in layer.tied}
            for p in layer.parameters:
                if p.name not in elsewhere:
                    self.sizes[index, p.name] = p.num_elements
                    self.names[index, p.name] = f"{layer.kind}.{p.name}"
        self.dtype = plan.parameter_dtype
        self.grad_dtype = main_dtype(settings, plan.parameter_dtype)
        bucketed = settings.overlap_grad_reduce and stage.index == 0
        size = settings.bucket_size or max(LEAST_BUCKET, LEAST_BUCKET_PER_RANK * plan.dp)
        self.sharded = settings.use_distributed_optimizer
        self.buckets = buckets_of(
            list(self.sizes.items()), plan.dp, size if bucketed else None, aligned=self.sharded, alone=stage.tied
        )
        self.num_elements = sum(bucket.num_elements for bucket in self.buckets)
        self.bucket_of = {key: i for i, bucket in enumerate(self.buckets) for key in bucket.keys}
        self.fused = {id(layer): fused_gradients(layer) for layer in stage.layers}
        self.in_module: dict[tuple[int, str], list[Key]] = {}
        for index, layer in enumerate(stage.layers):
            for p in layer.parameters:
                if (index, p.name) in self.sizes:
                    self.in_module.setdefault((index, p.module), []).append((index, p.name))
        recipe = plan.recipe
        self.low = {} if recipe is None else {id(layer): low_weights(layer, recipe) for layer in stage.layers}
        self.casts: dict[int, tuple[Kernel, ...]] = {}
        self.in_8_bit = self._kept_in_8_bit()
        self.first = self.last = True
        self.missing: list[int] = []
        self.gathered: set[int] = set()
        self.issued: set[int] = set()

    def _kept_in_8_bit(self) -> dict[Key, int]:
        """Return the weights that are parameters in 8 bits (``fp8_param_gather``) -> bytes in the flat buffer.

        With a scale a tensor, or blockwise, the buffer holds the quantised rows, which are what is gathered. MXFP8's
        scales belong to shards' rows, so its master is gathered in 16 bit, into the buffer of gradients, and quantised
        there: the flat buffer holds nothing of these (``reuse_grad_buf_for_mxfp8_param_ag``).
        """
        recipe = self.plan.recipe
        if recipe is None or recipe.name == "nvfp4" or not (self.sharded and self.settings.fp8_param_gather):
            return {}  # NVFP4 has an option of its own, fp4_param_gather
        if self.settings.use_megatron_fsdp:
            return {}
        return {
            (index, f"{module}.weight"): 0 if recipe.name == "mxfp8" else recipe.num_bytes(count)
            for index, layer in enumerate(self.stage.layers)
            for module, (count, _) in self.low.get(id(layer), {}).items()
            if (index, f"{module}.weight") in self.sizes
        }

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the flat buffer of parameters, with its padding."""
        kept = self.in_8_bit
        return self.num_elements * DTYPE_BYTES[self.dtype] - sum(
            self.sizes[key] * DTYPE_BYTES[self.dtype] - num_bytes for key, num_bytes in kept.items()
        )

    def gathered_bytes(self, bucket: Bucket) -> int:
        """Bytes of a bucket's parameters on the wire."""
        element = DTYPE_BYTES[self.dtype]
        low = sum(self.sizes[key] * element - n for key in bucket.keys if (n := self.in_8_bit.get(key)))
        return bucket.num_elements * element - low

    @property
    def low_elements(self) -> int:
        """Elements that the optimizer's step quantises itself: those that are gathered in 8 bits."""
        return sum(self.sizes[key] for key, num_bytes in self.in_8_bit.items() if num_bytes)

    @property
    def gathers_ahead(self) -> bool:
        """Whether the interleaved schedule gathers parameters a chunk ahead (``align_param_gather``, the default)."""
        plan, settings = self.plan, self.settings
        return plan.interleaved and settings.overlap_param_gather and self.sharded and plan.dp > 1

    @property
    def gathers_after_step(self) -> bool:
        return self.sharded and not self.settings.overlap_param_gather

    @property
    def gradient_elements(self) -> int:
        """Elements of the buffer of gradients that this rank keeps."""
        return self.num_elements

    def partial_elements(self) -> int:
        """Return the elements of gradients of which each tensor-parallel rank has a part."""
        return sum(self.sizes[key] for key in self.stage.partial)

    def after_update(self) -> list[Instruction]:
        """Return what follows the copy of the master into the parameters."""
        return []

    @property
    def reduces_itself(self) -> bool:
        """Whether buckets are reduced as the last backward fills them."""
        plan = self.plan
        return self.settings.overlap_grad_reduce and (
            plan.pipeline_ranks == 1 or (plan.num_chunks == 1 and plan.pipeline_rank == 0)
        )

    def setup(self) -> list[Instruction]:
        out: list[Instruction] = [Mark("setup", "model")]
        if self.sharded:
            out.append(Alloc(Storage("parameters.flat", self.parameter_bytes, "parameters")))
        else:
            out.extend(
                Alloc(flat_storage(self.names[key], count, self.dtype, "parameters"))
                for key, count in self.sizes.items()
            )
        for index, layer in enumerate(self.stage.layers):
            out.extend(Alloc(Storage(f"{layer.kind}.{t.name}", t.num_bytes, "buffers")) for t in layer.buffers)
            out.extend(
                Alloc(Storage(f"{layer.kind}.{module}.weight.low", beside, "buffers"))
                for module, (_, num_bytes) in self.low.get(id(layer), {}).items()
                if (beside := num_bytes - self.in_8_bit.get((index, f"{module}.weight"), 0))
            )
        out.append(Alloc(flat_storage("gradients.flat", self.num_elements, self.grad_dtype, "gradients")))
        return out

    # passes

    def begin(self, first: bool, last: bool) -> None:
        self.first, self.last = first, last
        self.missing = [len(bucket.keys) for bucket in self.buckets]
        self.gathered = set()
        self.issued = set(range(len(self.buckets))) if self.gathers_ahead else set()
        self.nccl.reset()

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        """``_make_forward_pre_hook``: wait for the parameters of the module, then gather the next bucket.

        In the first microbatch of a step the module then quantises its weight (``quantize_weight`` in
        transformer_engine/pytorch/module/base.py: ``update_workspace``).
        """
        if recomputing or not self.first:
            return ()
        out: list[Instruction] = []
        if self.settings.overlap_param_gather and self.sharded and self.plan.dp > 1:
            out.extend(self._gathered(layer, module))
        low = self.low.get(id(self.stage.layers[layer]), {}).get(module)
        if low is None:
            return out
        kept = self.in_8_bit.get((layer, f"{module}.weight"))
        if not kept:
            out.extend(Compute(f"{module}.weight.quantise", kernel) for kernel in self._weight_casts(low[0]))
        elif low[1] > kept:  # the copy that the other product reads is made of what was gathered
            out.append(pointwise(f"{module}.weight.transpose", "copy", ((kept, "uint8"),), ((low[1] - kept, "uint8"),)))
        return out

    def _weight_casts(self, num_elements: int) -> tuple[Kernel, ...]:
        found = self.casts.get(num_elements)
        if found is None:
            assert self.plan.recipe is not None
            copies = self.plan.recipe.copies
            found = self.casts[num_elements] = cast_kernels(self.plan.recipe, num_elements, copies)
        return found

    def _gathered(self, layer: int, module: str) -> list[Instruction]:
        out: list[Instruction] = []
        for key in self.in_module.get((layer, module), ()):
            bucket = self.bucket_of[key]
            if bucket in self.gathered:
                continue
            out.extend(self.gather(bucket))
            out.append(wait(f"parameters.{self.number}.{bucket}", COMPUTE))
            self.gathered.add(bucket)
            if bucket:
                out.extend(self.gather(bucket - 1))
        return out

    def gather(self, bucket: int) -> list[Instruction]:
        """Gather a bucket that is not under way."""
        if bucket in self.issued:
            return []
        self.issued.add(bucket)
        num_bytes = self.gathered_bytes(self.buckets[bucket])
        event = f"parameters.{self.number}.{bucket}"
        return self.nccl.asynchronous("parameters", "all_gather", num_bytes, self.dtype, COMPUTE, event)

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        """The host reads the loss of each microbatch (``validate_result`` in ``loss_func`` of pretrain_gpt.py)."""
        ends = self.stage.layers[layer].kind == "head" and not module and not recomputing
        return host_sync("check loss for NaN") if ends and self.settings.check_for_nan_in_grad else ()

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        return ()

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        return ()

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        """``_make_backward_post_hook``: ``param.main_grad.add_(param.grad)``, and the gradient goes."""
        key = self.owner_of(layer, parameter)
        out: list[Instruction] = []
        if gradient.num_bytes:
            out.append(accumulate("accumulate gradient", self.sizes[key], self.dtype, self.grad_dtype))
        elif not self.keeps_dummies(self.stage.layers[layer]):
            dummy = flat_storage(f"dummy_wgrad.{self.names[key]}", self.sizes[key], self.dtype, "gradients")
            out.extend((Alloc(dummy), Free(dummy)))
        out.append(Free(gradient))
        if self.last and self.reduces_itself:
            bucket = self.bucket_of[key]
            self.missing[bucket] -= 1
            if not self.missing[bucket]:
                out.extend(self._reduce(bucket, overlapped=True))
        return out

    def end_of_backward(self) -> Iterable[Instruction]:
        return ()

    def through_forward(self) -> tuple[Storage, ...]:
        """What ``forward_step`` holds while the model runs: a mask that causal kernels leave alone.

        Source: pretrain_gpt.py (``get_batch``, ``forward_step``) and megatron/training/utils.py
        (``get_batch_on_this_tp_rank``: on the first and the last stage of a pipeline).
        """
        num_bytes = self.stage.mask_bytes
        return (Storage("batch.attention_mask", num_bytes, "activations"),) if num_bytes else ()

    def owner_of(self, layer: int, parameter: str) -> Key:
        """Return whose gradient it is: a tied weight's second use is reported for its owner."""
        key = (layer, parameter)
        if key in self.sizes:
            return key
        return next(
            (i, name)
            for own, layer_name, name in self.stage.layers[layer].tied
            if own == parameter
            for i, other in enumerate(self.stage.layers)
            if other.name == layer_name
        )

    def keeps_dummies(self, layer: Layer) -> bool:
        """Whether the layer's linears are Transformer Engine's: those of the blocks."""
        return layer.kind == "block" and self.settings.transformer_impl == "transformer_engine"

    def dummies(self) -> dict[tuple[int, ...], int]:
        """Return the shapes of the weights whose gradients are added in place, with their elements."""
        if not self.settings.gradient_accumulation_fusion:
            return {}
        return {
            tuple(d.size for d in p.shape): p.num_elements
            for layer in {id(layer): layer for layer in self.stage.layers if self.keeps_dummies(layer)}.values()
            for p in layer.parameters
            if p.name in self.fused[id(layer)]
        }

    # gradients

    def _reduce(self, number: int, *, overlapped: bool) -> list[Instruction]:
        """``start_grad_sync``: look for NaN, scale, and reduce in place."""
        bucket = self.buckets[number]
        count, dtype = bucket.num_elements, self.grad_dtype
        out: list[Instruction] = []
        if self.settings.check_for_nan_in_grad:
            out.append(pointwise("check for NaN", "reduce", ((count, dtype),), ()))
            out.extend(host_sync("check for NaN"))
        if self.plan.dp == 1:
            return out
        out.append(in_place("scale gradients", count, dtype))
        num_bytes = count * DTYPE_BYTES[dtype]
        kind = "reduce_scatter" if self.sharded else "all_reduce"
        if overlapped:
            event = f"gradients.{self.number}.{number}"
            out.extend(self.nccl.asynchronous("gradients", kind, num_bytes, dtype, COMPUTE, event))  # type: ignore[arg-type]
        else:
            out.extend(self.nccl.blocking("gradients", kind, num_bytes, dtype, COMPUTE))  # type: ignore[arg-type]
        return out

    def start_reductions(self) -> list[Instruction]:
        """``start_grad_sync`` of the whole chunk, from the pipeline schedule."""
        if self.reduces_itself or not self.settings.overlap_grad_reduce:
            return []
        out: list[Instruction] = [Mark("backward", "reduce gradients")]
        for number in range(len(self.buckets)):
            out.extend(self._reduce(number, overlapped=True))
        return out

    def finish_reductions(self) -> list[Instruction]:
        """``finish_grad_sync``: without overlap they run now, else they are waited for."""
        out: list[Instruction] = []
        for number in range(len(self.buckets)):
            if not self.settings.overlap_grad_reduce:
                out.extend(self._reduce(number, overlapped=False))
            elif self.plan.dp > 1:
                out.append(wait(f"gradients.{self.number}.{number}", COMPUTE))
        return out


class Megatron:
    """One rank: its model chunks and their common optimizer."""

    passes_differ = False

    def __init__(self, stages: Sequence[MegatronStage], settings: MegatronSettings, plan: MegatronPlan) -> None:
        self.settings, self.plan = settings, plan
        self.nccl = Communicator(plan.dp_axis, plan.dp)
        chunk = MegatronChunk
        if settings.use_megatron_fsdp:
            from sim.parallel.frameworks.megatron_fsdp import FsdpChunk

            chunk = FsdpChunk
        self.parts = [chunk(i, stage, settings, plan, self.nccl) for i, stage in enumerate(stages)]
        self.in_model_order = sorted(self.parts, key=lambda part: part.stage.index)
        """Ranks that hold the same stages reduce them in one order, whichever chunks they are."""
        self.dtype = plan.parameter_dtype
        self.sharded = settings.use_distributed_optimizer

    def hooks(self, chunk: int) -> MegatronChunk:
        return self.parts[chunk]

    def begin_microbatch(self, chunk: int, first: bool, last: bool) -> None:
        self.parts[chunk].begin(first, last)

    def start_reductions(self, chunk: int) -> Chunk:
        """What the pipeline schedule starts when a chunk's gradients are complete; empty where nothing is to start."""
        self.nccl.reset()
        return tuple(self.parts[chunk].start_reductions())

    def gather_ahead(self, chunk: int) -> Chunk:
        """``param_sync_func``: all buckets of a chunk, where the schedule says when (``align_param_gather``)."""
        part = self.parts[chunk]
        if not part.gathers_ahead:
            return ()
        self.nccl.reset()
        out: list[Instruction] = [Mark("forward", "gather parameters")]
        for bucket in range(len(part.buckets)):
            out.extend(part.gather(bucket))
        return tuple(out)

    @property
    def has_master(self) -> bool:
        return self.dtype != "fp32"

    def stepped(self) -> list[tuple[str, int]]:
        """Return (name, elements) of the fp32 tensors that this rank's optimizer steps: a shard, or all."""
        if self.sharded:
            return [(f"shard.{part.number}", part.num_elements // self.plan.dp) for part in self.parts]
        return [(part.names[key], count) for part in self.parts for key, count in part.sizes.items()]

    def setup(self) -> Chunk:
        """Buffers, then the fp32 master."""
        out: list[Instruction] = []
        for part in self.parts:
            out.extend(part.setup())
        # made by the first backward, which holds less than later steps do
        shapes = {shape: count for part in self.parts for shape, count in part.dummies().items()}
        out.extend(
            Alloc(flat_storage(f"dummy_wgrad.{'x'.join(map(str, shape))}", count, self.dtype, "buffers"))
            for shape, count in shapes.items()
        )
        out.append(Mark("setup", "optimizer"))
        if self.has_master:
            out.extend(Alloc(flat_storage(f"master.{n}", c, self.master_dtype, "optimizer")) for n, c in self.stepped())
        return tuple(out)

    @property
    def reads_gradients_as_they_are(self) -> bool:
        """Whether the optimizer reads 16-bit gradients (``decoupled_grad``), so that they are not copied to fp32.

        ``use_precision_aware_optimizer_no_fp8_or_ds_fp8`` in megatron/core/optimizer/optimizer_config.py: not with
        recipes of FP8 other than the delayed one.
        """
        recipe = self.plan.recipe
        return self.settings.use_precision_aware_optimizer and (recipe is None or recipe.name == "delayed")

    @property
    def master_dtype(self) -> DType:
        """The fp32 master, or the 16 bits of it that bf16 parameters lack (``store_param_remainders``)."""
        kept_in_8_bit = any(part.in_8_bit for part in self.parts)
        return "bf16" if self.reads_gradients_as_they_are and self.dtype == "bf16" and not kept_in_8_bit else "fp32"

    def state_dtype(self, number: int) -> DType:
        """Return the dtype of the optimizer's first, second ... state."""
        settings = self.settings
        if not settings.use_precision_aware_optimizer:
            return "fp32"
        return (settings.exp_avg_dtype, settings.exp_avg_sq_dtype)[number] if number < 2 else "fp32"

    def after_first_step(self) -> Chunk:
        return ()

    def optimizer_step(self, first_step: bool) -> Chunk:
        """``finalize_model_grads``, the optimizer, and zeroing the buffers for the next step."""
        self.nccl.reset()
        plan = self.plan
        out: list[Instruction] = [Mark("backward", "finalize gradients")]
        for part in self.in_model_order:
            out.extend(part.finish_reductions())
        out.extend(self._sums_over_tp())
        out.extend(self._sums_over_embedding())
        stepped = self.stepped()
        total = sum(count for _, count in stepped)
        grad_dtype = self.parts[0].grad_dtype
        out.append(Mark("optimizer", "gradients"))
        copies: list[Storage] = []
        if self.has_master and grad_dtype != "fp32" and not self.reads_gradients_as_they_are:
            # _copy_model_grads_to_main_grads; of fp32 ones it is a view
            copies = [flat_storage(f"grad.{name}", count, "fp32", "gradients") for name, count in stepped]
            out.extend(Alloc(storage) for storage in copies)
            out.append(copy("gradients to fp32", total, grad_dtype, "fp32"))
        used: DType = "fp32" if copies else grad_dtype
        world = Communicator(plan.norm_axis, plan.norm_ranks)
        if self.dtype == "fp16":  # GradScaler: _unscale_main_grads_and_check_for_nan
            out.append(in_place("unscale", total, used))
            out.extend(world.blocking("found_inf", "all_reduce", 4, "fp32", COMPUTE))
            out.extend(host_sync("found_inf"))
        if plan.gradient_clipping:
            out.append(pointwise("norm", "reduce", ((total, used),), ()))
            if plan.late_validation:
                out.extend(world.asynchronous("norm", "all_reduce", 4, "fp32", COMPUTE, "norm"))
            else:
                out.extend(world.blocking("norm", "all_reduce", 4, "fp32", COMPUTE))
                out.extend(host_sync("norm"))
            out.append(in_place("clip", total, used))
        out.append(Mark("optimizer", "step"))
        letters = OPTIMIZERS[plan.optimizer].states
        if first_step:
            out.extend(
                Alloc(flat_storage(f"{state}.{name}", count, self.state_dtype(number), "optimizer"))
                for name, count in stepped
                for number, state in enumerate(letters)
            )
        one: Flat = (total, self.master_dtype)
        states = tuple((total, self.state_dtype(number)) for number in range(len(letters)))
        if self.reads_gradients_as_they_are and self.has_master:  # the kernel writes the parameters too
            states = (*states, (total, self.dtype))
        # FusedAdam: one multi-tensor kernel, no temporaries (apex/optimizers/fused_adam.py)
        out.append(pointwise(plan.optimizer, "optimizer", ((total, used), one, *states), (one, *states)))
        out.extend(Free(storage) for storage in copies)
        out.extend(self._update_parameters(total))
        for part in self.parts:
            out.extend(part.after_update())
        if self.parts[0].gathers_after_step:
            out.append(Mark("optimizer", "gather"))
            for part in self.in_model_order:
                for bucket in part.buckets:
                    num_bytes = part.gathered_bytes(bucket)
                    out.extend(self.nccl.blocking("parameters", "all_gather", num_bytes, self.dtype, COMPUTE))
        out.append(Mark("optimizer", "zero gradients"))
        out.extend(
            pointwise("zero gradients", "elementwise", (), ((part.gradient_elements, part.grad_dtype),))
            for part in self.parts
        )
        return tuple(out)

    def _update_parameters(self, total: int) -> list[Instruction]:
        """Copy the master of ``total`` elements into the parameters; quantise those that are kept in 8 bits.

        Where the optimizer holds the master itself, its kernel has written 16-bit parameters. The all-reduce of the
        largest values of weights (``quantize_param_shard``) is left out.
        """
        low = sum(part.low_elements for part in self.parts) // self.plan.dp
        out: list[Instruction] = []
        if self.has_master and (low or not self.reads_gradients_as_they_are):
            out.append(copy("update parameters", total - low, "fp32", self.dtype))
        if low:
            out.append(pointwise("quantise parameters", "copy", ((low, "fp32"),), ((low, "uint8"),)))
        return out

    def _sums_over_tp(self) -> list[Instruction]:
        """``_allreduce_non_tensor_model_parallel_grads``: what each tp rank has a part of, in one flat tensor."""
        plan = self.plan
        total = sum(part.partial_elements() for part in self.parts)
        if plan.tp == 1 or not total:
            return []
        dtype = self.parts[0].grad_dtype
        flat = flat_storage("gradients.tp", total, dtype, "buffers")
        out: list[Instruction] = [Alloc(flat), copy("flatten", total, dtype, dtype)]
        out.extend(Communicator("tp", plan.tp).blocking("gradients", "all_reduce", flat.num_bytes, dtype, COMPUTE))
        return [*out, copy("copy back", total, dtype, dtype), Free(flat)]

    def _sums_over_embedding(self) -> list[Instruction]:
        """``_allreduce_word_embedding_grads``: the first and the last stage add theirs up.

        Where both are chunks of one rank, as in a V, they are added there: each chunk has a copy in its own buffer.
        """
        out: list[Instruction] = []
        holders = [part for part in self.parts if part.stage.tied]
        if len(holders) > 1:
            for part, other in pairwise(holders):
                for key in part.stage.tied:
                    count = part.sizes[key]
                    out.append(accumulate("add tied embedding", count, other.grad_dtype, part.grad_dtype))
                    out.append(copy("copy tied embedding", count, part.grad_dtype, other.grad_dtype))
            return out
        for part in holders:
            for key in part.stage.tied:
                num_bytes = part.sizes[key] * DTYPE_BYTES[part.grad_dtype]
                group = Communicator("embedding", 2)
                out.extend(group.blocking("tied embedding", "all_reduce", num_bytes, part.grad_dtype, COMPUTE))
        return out
