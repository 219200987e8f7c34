"""Token and position embeddings.

Shapes: tokens int64 [batch, seq], tables [vocab, hidden] and [positions, hidden].
"""

from __future__ import annotations

from sim.ir.ledger import Pointwise, Shape, Tensor, size
from sim.model.tape import Tape, Value

TOKENS = "tokens"
_SORT_ABOVE = 3072
"""More indices than this are sorted first (aten/src/ATen/native/cuda/Embedding.cu, embedding_dense_backward_cuda)."""


def lookup(tape: Tape, module: str, indices: Tensor, rows: Shape, width: Shape, *, out: str) -> Value:
    """``F.embedding``: saves the indices; its gradient is dense, of the whole table, in the table's dtype.

    Scratch of backward: sorted indices and their origin, int64. Leaves out: the partial sums of segments, whose number
    depends on the data.
    """
    table = tape.parameter(f"{module}.weight", rows + width)
    result = Value(Tensor(out, indices.shape + width, tape.precision.stored))
    stored = tape.stored(table)
    tape.op(
        module, (Pointwise("gather", (indices, result.tensor), (result.tensor,)),), reads=(indices.name,),
        writes=(result.tensor,), saves=(indices.name,), parameters=(table.name,), module=module,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        scratch: tuple[Tensor, ...] = ()
        if size(indices.shape) > _SORT_ABOVE:
            scratch = tuple(Tensor(f"{module}.{n}_indices", indices.shape, "int64") for n in ("sorted", "origin"))
        tape.back(
            f"{module}.backward",
            (Pointwise("elementwise", (), (stored,)), Pointwise("scatter", (indices, grad), (grad,))),
            reads=(grad.name, indices.name), scratch=scratch, gradients=(table.name,), releases=(module,),
            module=module,
        )  # fmt: skip

    tape.node(emit)
    return result


def positions(tape: Tape, seq: Shape) -> Tensor:
    """``torch.arange(seq)[None]``: the indices of a learned position table, made in each forward."""
    made = Tensor("position_ids", seq, "int64")
    tape.op("position_ids", (Pointwise("elementwise", (), (made,)),), writes=(made,))
    return made
