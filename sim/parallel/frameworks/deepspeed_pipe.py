"""DeepSpeed's pipeline engine around a stage's ZeRO: tied weights, what all stages agree on, and the step's loss.

Source: deepspeed/runtime/pipe/engine.py and module.py of DeepSpeed 0.19; deepspeed/runtime/utils.py, ``CheckOverflow``
and zero/stage_1_and_2.py, ``_model_parallel_all_reduce``.

* A ``TiedLayerSpec`` has a copy on each of its stages. At the end of the batch, before data-parallel gradients are
  reduced, its gradients are added over the stages that have it (``ReduceTiedGrads``).
* A stage has a part of the model, so overflow and the norm go over the model's ranks too (``get_model_parallel_group``
  of the grid: all stages, and their tensor-parallel ranks).
* The first and the last stage load each microbatch before its forward: the copy is from pageable memory or waited for
  (``.to(device)`` in ``_exec_load_micro_batch``), so the host goes on when all before it is done, on the last stage
  the message it has just received. Megatron's batch function copies sizes, broadcasts them over the tensor-parallel
  ranks, reads them back, then copies and broadcasts the tokens (``broadcast_data`` in megatron/core/tensor_parallel/
  data.py, ``get_batch_pipe`` in Megatron-DeepSpeed's pretrain_gpt.py).
* After the step the last stage averages the loss over its data-parallel ranks, and all stages hear of it: two fp32
  numbers (``_aggregate_total_loss``).

Leaves out: the shapes sent ahead of the first activation of all (1 KiB, ``_send_tensor_meta``), one number between
neighbours when the engine is made, the copies of a batch themselves (some KiB), and the masks and positions that
Megatron's batch function makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sim.ir.ledger import DTYPE_BYTES, DType
from sim.ir.program import COMPUTE, Chunk, HostWait, Instruction, Mark
from sim.parallel.frameworks.deepspeed_base import Stage0
from sim.parallel.frameworks.deepspeed_stage3 import Stage3
from sim.parallel.frameworks.deepspeed_stage12 import Stage12
from sim.parallel.frameworks.flat import Communicator, host_sync

_AGREED: tuple[tuple[str, int, DType], ...] = (("overflow", 1, "uint8"), ("norm", 4, "fp32"))
"""What the host reads last of each is the answer of all ranks: event, bytes, dtype."""

SIZES_BYTES = 8 * 5
"""int64 sizes of one tensor, ``_MAX_DATA_DIM`` of megatron/core/tensor_parallel/data.py of them."""


@dataclass(frozen=True, slots=True)
class Pipe:
    """Where the stage stands.

    ``tied``         elements of its weights that another stage has too
    ``model_ranks``  ranks that hold one replica together, on the axis "model"
    ``stages``       of the pipeline; ``is_first``, ``is_last`` this one
    ``tp``           tensor-parallel ranks
    ``broadcast_bytes``  of the tokens of a microbatch that these hear of from one of them; 0: each loads its own
    """

    tied: tuple[int, ...]
    model_ranks: int
    stages: int
    is_first: bool
    is_last: bool
    tp: int
    broadcast_bytes: int
    dp: int
    dp_axis: str
    dtype: DType


class DeepSpeedPipe:
    """A stage's ZeRO with what the pipeline engine adds."""

    def __init__(self, zero: Stage0 | Stage12 | Stage3, pipe: Pipe) -> None:
        self.zero, self.pipe = zero, pipe
        self.passes_differ = zero.passes_differ
        self.setup = zero.setup
        self.after_first_step = zero.after_first_step
        self.pre_forward = zero.pre_forward
        self.post_forward = zero.post_forward
        self.pre_backward = zero.pre_backward
        self.post_backward = zero.post_backward
        self.gradient_ready = zero.gradient_ready
        self.last = True

    def begin_microbatch(self, first: bool, last: bool) -> None:
        self.last = last
        self.zero.begin_microbatch(first, last)

    def load(self) -> Iterable[Instruction]:
        """``LoadMicroBatch``."""
        if not (self.pipe.is_first or self.pipe.is_last):
            return ()
        out: list[Instruction] = [Mark("forward", "batch"), *host_sync("batch")]
        if self.pipe.broadcast_bytes and self.pipe.tp > 1:
            group = Communicator("tp", self.pipe.tp)
            out.extend(group.blocking("sizes", "broadcast", SIZES_BYTES, "int64", COMPUTE))
            out.extend(host_sync("sizes"))
            out.extend(group.blocking("tokens", "broadcast", self.pipe.broadcast_bytes, "int64", COMPUTE))
        return out

    def end_of_backward(self) -> Iterable[Instruction]:
        """``ReduceTiedGrads``, then ``ReduceGrads``."""
        out: list[Instruction] = []
        if self.last:
            group = Communicator("embedding", 2)
            for count in self.pipe.tied:
                num_bytes = count * DTYPE_BYTES[self.pipe.dtype]
                out.extend(group.blocking("tied weight", "all_reduce", num_bytes, self.pipe.dtype, COMPUTE))
        out.extend(self.zero.end_of_backward())
        return out

    def optimizer_step(self, first_step: bool) -> Chunk:
        pipe = self.pipe
        model = Communicator("model", pipe.model_ranks)
        out: list[Instruction] = []
        step = self.zero.optimizer_step(first_step)
        last = {i.event: at for at, i in enumerate(step) if isinstance(i, HostWait)}
        for at, instruction in enumerate(step):
            out.append(instruction)
            for event, num_bytes, dtype in _AGREED:
                if last.get(event) == at + 1:  # before the event by which the host reads what all have agreed on
                    record = out.pop()
                    out.extend(model.blocking(event, "all_reduce", num_bytes, dtype, COMPUTE))
                    out.append(record)
        out.append(Mark("optimizer", "loss"))
        if pipe.is_last and pipe.dp > 1:
            out.extend(Communicator(pipe.dp_axis, pipe.dp).blocking("loss", "all_reduce", 4, "fp32", COMPUTE))
        out.extend(Communicator("pp", pipe.stages).blocking("loss", "broadcast", 8, "fp32", COMPUTE))
        return tuple(out)
