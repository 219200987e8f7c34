"""What all of DeepSpeed's stages have in common, and stage 0.

Source: deepspeed/runtime/engine.py and fp16/fused_optimizer.py, unfused_optimizer.py of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import DTYPE_BYTES, DType, Layer
from sim.ir.program import COMPUTE, Alloc, Chunk, Free, Instruction, Mark, Storage
from sim.parallel.frameworks.flat import (
    Communicator,
    Steps,
    Trained,
    accumulate,
    copy,
    flat_storage,
    host_sync,
    in_place,
    pointwise,
    trained_parameters,
)
from sim.parallel.frameworks.plan import Plan

ALLREDUCE_ELEMENTS = 500_000_000
"""``MEMORY_OPT_ALLREDUCE_SIZE`` in deepspeed/runtime/engine.py: stage 0's bucket, which no setting changes."""


class DeepSpeed:
    """Hooks that do nothing, the list of parameters, and gradients that accumulate in ``param.grad``.

    The methods are called in host order. ``first`` and ``last`` say which microbatch is being written.
    """

    def __init__(self, layers: Sequence[Layer], settings: DeepSpeedSettings, plan: Plan) -> None:
        self.layers = tuple(layers)
        self.settings = settings
        self.plan = plan
        self.parameters, self.owner = trained_parameters(self.layers)
        self.num_elements = sum(p.num_elements for p in self.parameters)
        self.dtype: DType = plan.parameter_dtype
        self.element = DTYPE_BYTES[plan.parameter_dtype]
        self.nccl = Communicator(plan.dp_axis, plan.dp)
        self.steps = Steps(plan)
        self.first = self.last = True
        self.gradients: dict[int, Storage] = {}
        self.clipping = settings.gradient_clipping

    passes_differ = False

    def after_first_step(self) -> Chunk:
        return ()

    def begin_microbatch(self, first: bool, last: bool) -> None:
        """Say which microbatch of the step is written next: ``last`` is the gradient accumulation boundary."""
        self.first, self.last = first, last
        self.nccl.reset()

    def load(self) -> Iterable[Instruction]:
        """Synchronise, as ``ThroughputTimer`` does when a forward begins (deepspeed/utils/timer.py).

        ``timers.throughput`` of the configuration is on, and synchronised, unless it says otherwise. It does so after
        ``step()`` of each microbatch, too: when the next one begins nothing has been issued since.
        """
        return host_sync("throughput timer") if self.settings.throughput_timer_waits else ()

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        return ()

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        return ()

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        return ()

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        return ()

    # pieces

    def model_storages(self) -> dict[int, Storage]:
        """Return one storage for each parameter, as the model has them before DeepSpeed touches it."""
        return {p.index: Storage(p.name, p.num_elements * self.element, "parameters") for p in self.parameters}

    def model_buffers(self) -> list[Instruction]:
        return [
            Alloc(Storage(f"{layer.kind}.{t.name}", t.num_bytes, "buffers"))
            for layer in self.layers
            for t in layer.buffers
        ]

    def keep(self, parameter: Trained, gradient: Storage) -> list[Instruction]:
        """``AccumulateGrad``: the first gradient is taken as it is, later ones are added to it.

        What outlives its microbatch is a storage of the rank, not of the microbatch: the same block changes hands.
        """
        if self.first:
            own = Storage(f"grad.{parameter.name}", gradient.num_bytes, "gradients")
            self.gradients[parameter.index] = own
            return [Free(gradient), Alloc(own)]
        return [accumulate("accumulate gradient", parameter.num_elements, self.dtype, self.dtype), Free(gradient)]


class Stage0(DeepSpeed):
    """Replicated states. At the boundary all gradients are all-reduced, in buckets that are copies of them.

    16-bit parameters have an fp32 master and states made at the start (FP16_Optimizer, also for bf16); fp32 ones are
    stepped as they are. With an optimizer that is not FusedAdam nothing is flattened (FP16_UnfusedOptimizer).
    """

    def setup(self) -> Chunk:
        out: list[Instruction] = [Mark("setup", "model")]
        model = self.model_storages()
        out.extend(Alloc(s) for s in model.values())
        out.extend(self.model_buffers())
        out.append(Mark("setup", "optimizer"))
        if not self.plan.master:
            return tuple(out)
        if self.plan.fused and self.plan.optimizer != "sgd":
            clones = [Storage("clone", s.num_bytes, "temporary") for s in model.values()]
            out.extend(Alloc(s) for s in clones)
            out.append(Alloc(flat_storage("parameters.flat", self.num_elements, self.dtype, "parameters")))
            out.extend(Free(s) for s in clones)
            out.extend(Free(s) for s in model.values())
            half = flat_storage("clone", self.num_elements, self.dtype, "temporary")
            out.append(Alloc(half))
            out.append(Alloc(flat_storage("master", self.num_elements, "fp32", "optimizer")))
            out.append(Free(half))
            zeros = [flat_storage("grad.master", self.num_elements, "fp32", "temporary")]
        else:
            out.extend(
                Alloc(flat_storage(f"master.{p.name}", p.num_elements, "fp32", "optimizer")) for p in self.parameters
            )
            zeros = [flat_storage("grad.master", p.num_elements, "fp32", "temporary") for p in self.parameters]
        out.extend(Alloc(s) for s in zeros)
        out.extend(Alloc(s) for s in self.steps.states(self._stepped()))
        out.extend(self.steps.update(self._stepped()))
        out.extend(Free(s) for s in zeros)
        return tuple(out)

    def _stepped(self) -> list[tuple[str, int]]:
        """Return the tensors that the optimizer steps: one flat one, or each parameter."""
        if self.plan.master and self.plan.fused and self.plan.optimizer != "sgd":
            return [("master", self.num_elements)]
        return [(p.name, p.num_elements) for p in self.parameters]

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        return self.keep(self.owner[layer, parameter], gradient)

    def end_of_backward(self) -> Iterable[Instruction]:
        """``buffered_allreduce_fallback``: flatten until a bucket is over the size, all-reduce, average, copy back."""
        if not self.last:
            return ()
        out: list[Instruction] = []
        bucket: list[int] = []
        for parameter in self.parameters:
            bucket.append(parameter.num_elements)
            if sum(bucket) > ALLREDUCE_ELEMENTS:
                out.extend(self._reduce(bucket))
                bucket = []
        if bucket:
            out.extend(self._reduce(bucket))
        return out

    def _reduce(self, bucket: Sequence[int]) -> list[Instruction]:
        total = sum(bucket)
        dtype = self._communication_dtype()
        storages = []
        out: list[Instruction] = []
        if len(bucket) > 1:  # flattening one tensor is a view
            storages.append(flat_storage("bucket", total, self.dtype, "buffers"))
            out.append(Alloc(storages[0]))
            out.append(copy("bucket.flatten", total, self.dtype, self.dtype))
        if dtype != self.dtype:
            storages.append(flat_storage("bucket.cast", total, dtype, "buffers"))
            out.append(Alloc(storages[-1]))
            out.append(copy("bucket.cast", total, self.dtype, dtype))
        out.extend(self.nccl.blocking("gradients", "all_reduce", total * DTYPE_BYTES[dtype], dtype, COMPUTE))
        if self.plan.dp > 1:
            out.append(in_place("bucket.average", total, dtype))
        if dtype != self.dtype:
            out.append(copy("bucket.cast back", total, dtype, self.dtype))
        out.extend(copy("bucket.copy back", count, self.dtype, self.dtype) for count in bucket)
        out.extend(Free(s) for s in storages)
        return out

    def _communication_dtype(self) -> DType:
        return communication_dtype(self.settings, self.dtype)

    def optimizer_step(self, first_step: bool) -> Chunk:
        if not self.plan.master:
            return self._step_fp32(first_step)
        out: list[Instruction] = [Mark("optimizer", "overflow")]
        sizes = [p.num_elements for p in self.parameters]
        flat = self.plan.fused and self.plan.optimizer != "sgd"
        out.extend(self.steps.finite(sizes, self.dtype, each_on_host=True))
        out.append(Mark("optimizer", "gradients"))
        casts = [flat_storage("grad.fp32", count, "fp32", "gradients") for count in sizes]
        for storage, count in zip(casts, sizes, strict=True):
            out += [Alloc(storage), copy("grad.cast", count, self.dtype, "fp32")]
        if flat:
            whole = flat_storage("grad.flat", self.num_elements, "fp32", "gradients")
            out += [Alloc(whole), copy("grad.flatten", self.num_elements, "fp32", "fp32")]
            out.extend(Free(s) for s in casts)
            casts = [whole]
            out.extend(self._drop_gradients())
        out.append(pointwise("norm", "reduce", ((self.num_elements, "fp32"),), ()))
        out.extend(host_sync("norm"))
        out.append(in_place("unscale", self.num_elements, "fp32"))
        out.append(Mark("optimizer", "step"))
        out.extend(self.steps.update(self._stepped()))
        out.extend(copy("update parameter", count, "fp32", self.dtype) for count in sizes)
        out.extend(Free(s) for s in casts)
        if not flat:
            out.extend(self._drop_gradients())
        return tuple(out)

    def _step_fp32(self, first_step: bool) -> Chunk:
        """torch's way: the engine clips the gradients, the optimizer makes its states when it first needs them."""
        self.nccl.reset()
        out: list[Instruction] = [Mark("optimizer", "step")]
        sizes = [p.num_elements for p in self.parameters]
        if self.clipping:
            out.extend(pointwise("norm", "reduce", ((count, "fp32"),), ()) for count in sizes)
            # clip_grad_norm_ in deepspeed/runtime/utils.py adds the norm up over the ranks that share the model, and
            # averages it over the others
            model = Communicator("model", self.plan.model_ranks)
            out.extend(model.blocking("norm of the model", "all_reduce", DTYPE_BYTES["fp32"], "fp32", COMPUTE))
            out.extend(self.nccl.blocking("norm", "all_reduce", DTYPE_BYTES["fp32"], "fp32", COMPUTE))
            out.extend(in_place("clip", count, "fp32") for count in sizes)
        if first_step:
            out.extend(Alloc(s) for s in self.steps.states(self._stepped()))
        out.extend(self.steps.update(self._stepped()))
        out.extend(self._drop_gradients())
        return tuple(out)

    def _drop_gradients(self) -> list[Instruction]:
        return [Free(s) for s in self.gradients.values()]


def communication_dtype(settings: DeepSpeedSettings, parameter_dtype: DType) -> DType:
    """Return the dtype in which gradients travel: the model's, unless the settings say another (engine.py)."""
    return named_dtype(settings.communication_data_type) or parameter_dtype


def named_dtype(name: str | None) -> DType | None:
    """Return a dtype of a ds_config, which may be written in three ways."""
    names: dict[str, DType] = {
        "fp16": "fp16", "float16": "fp16", "half": "fp16",
        "bf16": "bf16", "bfp16": "bf16", "bfloat16": "bf16",
        "fp32": "fp32", "float32": "fp32", "float": "fp32",
    }  # fmt: skip
    return names.get(name) if name else None
