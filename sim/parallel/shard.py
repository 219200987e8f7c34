"""Tensor, sequence and context parallelism: transforms of the ledger.

``shard`` divides the named dimensions of a layer and puts a collective wherever a contraction over a divided dimension
leaves partial sums, or where a tensor that is divided along the sequence is needed whole. Context parallelism comes
first (``shard_cp``: ``seq``, and the exchanges inside attention), tensor and sequence parallelism on its result
(``shard_tp``: ``heads``, ``kv_heads``, ``ffn``, ``vocab``, and ``seq`` between the tensor-parallel regions).

What is left to the lowering: the sum of parameter gradients over dp x cp, and the sum over tp of those that
:func:`partial_gradients` names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sim.ir.ledger import Dim, Layer, Ledger, Tensor

TP_AXIS = "tp"
CP_AXIS = "cp"
CP_RING_AXIS = "cp.ring"
"""Send to the next rank of the context-parallel group, receive from the one before: pairs, not a group."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """How one replica of the model is divided among tp x cp ranks.

    ``sp``       Megatron's sequence parallelism: between tensor-parallel regions activations are divided along ``seq``
    ``cp_comm``  what attention exchanges: a ring of keys and values, an all-gather of them, or heads for sequence
                 (Ulysses); Transformer Engine's ``cp_comm_type``
    ``style``    megatron: tensor_parallel/layers.py and Transformer Engine: one exchange for a module's input, the
                 gathered input not saved but gathered again, gradients' exchanges beside the weight gradient.
                 dtensor: torch.distributed.tensor.parallel: gathered inputs saved, new tensors, nothing overlapped
    ``prepare_module_input``  dtensor: the input is redistributed once for a whole attention or MLP module
                 (PrepareModuleInput, as torchtitan does), not once for each linear
    ``loss_parallel``  logits stay divided along ``vocab``; else they are gathered, as trainers on Megatron's layers do
                 whose loss is F.cross_entropy
    ``async_allreduce``  megatron: input gradients are summed beside the weight's gradient, else before it
    ``each_linear``  megatron: modules of plain code in which each linear is a ColumnParallelLinear of its own: each
                 sums its own input gradient (``copy_to_tensor_model_parallel_region`` in its forward,
                 megatron/core/tensor_parallel/layers.py), a gate's and an up projection's are not added first
    """

    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_comm: Literal["p2p", "all_gather", "a2a"] = "p2p"
    style: Literal["megatron", "dtensor"] = "megatron"
    prepare_module_input: bool = False
    loss_parallel: bool = True
    async_allreduce: bool = True
    each_linear: bool = False

    @property
    def sequence_parallel(self) -> bool:
        return self.sp and self.tp > 1


def shard(layer: Layer, plan: ShardPlan) -> Layer:
    """Return what one rank does of ``layer``: the same object if nothing is divided."""
    if plan.cp > 1:
        from sim.parallel.shard_cp import shard_cp

        layer = shard_cp(layer, plan)
    if plan.tp > 1:
        from sim.parallel.shard_tp import shard_tp

        layer = shard_tp(layer, plan).layer
    return layer


def partial_gradients(layer: Layer, plan: ShardPlan) -> tuple[str, ...]:
    """Return the parameters of an unsharded layer whose gradients each tp rank has only a part of.

    They are kept whole on every rank but see a part of the tokens (norms and biases under sequence parallelism) or of
    the heads (query and key norms; key heads that several ranks share). Megatron sums them over tp once a step
    (megatron/core/distributed/finalize_model_grads.py, _allreduce_non_tensor_model_parallel_grads).
    """
    if plan.tp == 1:
        return ()
    from sim.parallel.shard_tp import shard_tp

    return shard_tp(layer, plan).partial_gradients


def shard_ledger(ledger: Ledger, plan: ShardPlan) -> Ledger:
    """Return one rank's part of a ledger. Layers that are one object stay one object.

    ``matmul_flops`` stays that of the whole replica: tp x cp ranks share it. Tokens and labels are divided along the
    sequence by cp only.
    """
    if plan.tp == plan.cp == 1:
        return ledger
    made: dict[int, Layer] = {}
    for layer in ledger.layers:
        if id(layer) not in made:
            made[id(layer)] = shard(layer, plan)
    return replace(
        ledger,
        layers=tuple(made[id(layer)] for layer in ledger.layers),
        batch_inputs=tuple(divide_seq(tensor, plan.cp) for tensor in ledger.batch_inputs),
    )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def divide_seq(tensor: Tensor, parts: int) -> Tensor:
    """Return the tensor with ``seq`` divided, rounded up where a kernel had padded it."""
    if parts == 1 or all(dim.name != "seq" for dim in tensor.shape):
        return tensor
    shape = tuple(Dim(d.name, ceil_div(d.size, parts)) if d.name == "seq" else d for d in tensor.shape)
    return replace(tensor, shape=shape)
