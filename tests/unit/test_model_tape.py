"""The tape runs its nodes as autograd does: last first, gradients added in place where nobody else holds them."""

from __future__ import annotations

from sim.ir.ledger import Dim, DType, Pointwise, Tensor
from sim.model.precision import Precision, promote
from sim.model.tape import Tape, Value, add, cast, dropout, linear, pointwise, split

B, S, H = Dim("batch", 2), Dim("seq", 4), Dim("hidden", 8)


def tape_with_input(dtype: DType = "bf16", *, autocast: bool = False) -> tuple[Tape, Value]:
    low: DType = "bf16" if autocast else dtype
    return Tape(Precision.of(dtype, low, autocast=autocast)), Value(Tensor("input", (B, S, H), dtype))


def names(tape: Tape) -> list[str]:
    return [op.name for op in tape.backward]


def project(tape: Tape, name: str, x: Value, out: str, *, bias: bool = False) -> Value:
    return linear(tape, name, x, (Dim("ffn", 8),), (H,), bias=bias, out=out)


def test_a_linear_computes_the_inputs_gradient_first_then_the_weights() -> None:
    tape, x = tape_with_input()
    y = project(tape, "fc", x, "output", bias=True)
    tape.finish_backward(x, y)
    assert names(tape) == ["fc.grad_input", "fc.grad_weight"]
    assert tape.backward[1].gradients == ("fc.bias", "fc.weight")
    assert tape.backward[1].releases == ("fc",)
    assert tape.backward[0].writes[0] == Tensor("grad:input", (B, S, H), "bf16")


def test_three_consumers_add_into_the_first_gradient_that_arrived() -> None:
    """q, k, v of one input: v's comes first and is kept, k's and q's are added to it, no fourth tensor is made."""
    tape, x = tape_with_input()
    q, k, v = (project(tape, n, x, n) for n in "qkv")
    y = add(tape, "sum", add(tape, "part", q, k, "bf16", out="part"), v, "bf16", out="output")
    tape.finish_backward(x, y)
    writes = [t.name for op in tape.backward for t in op.writes]
    assert writes == ["grad:input", "grad:input.2", "grad:input.3"]
    adds = [op for op in tape.backward if op.name.endswith(".accumulate")]
    assert [op.reads for op in adds] == [("grad:input", "grad:input.2"), ("grad:input", "grad:input.3")]
    assert not any(op.writes for op in adds)


def test_a_gradient_that_someone_else_still_holds_is_not_written_over() -> None:
    """x + x + f(x): while f's gradient is pending in the same storage, a sum needs a tensor of its own."""
    tape, x = tape_with_input()
    first = pointwise(tape, "f", (x,), "f", grads=((),))
    second = pointwise(tape, "g", (x,), "g", grads=((),))
    total = add(tape, "sum", first, second, "bf16", out="output")
    tape.finish_backward(x, total)
    # f and g each make a gradient; the later is added into the earlier, which nobody else holds
    assert names(tape) == ["g.backward", "f.backward", "grad:input.2.accumulate"]

    tape, x = tape_with_input()
    middle = pointwise(tape, "f", (x,), "f", grads=((),))
    doubled = add(tape, "double", middle, middle, "bf16", out="doubled")
    kept = add(tape, "keep", doubled, x, "bf16", out="output")
    tape.finish_backward(x, kept)
    # f's output gets the incoming gradient twice, and x's share of it is the same storage: the sum is a new tensor
    assert any(op.name.endswith(".accumulate") and op.writes for op in tape.backward)


def test_a_residual_ends_in_the_storage_of_the_border() -> None:
    """input + f(input): the engine adds in place; the ledger calls the survivor ``grad:input``."""
    tape, x = tape_with_input()
    y = add(tape, "residual", x, project(tape, "fc", x, "branch"), "bf16", out="output")
    tape.finish_backward(x, y)
    assert [t.name for op in tape.backward for t in op.writes] == ["grad:input"]
    assert tape.backward[-1].reads == ("grad:output", "grad:input")


def test_a_split_concatenates_gradients_and_its_parts_hold_no_bytes() -> None:
    tape, x = tape_with_input()
    left, right = split(tape, "split", x, ((B, S, Dim("hidden", 2)), (B, S, Dim("hidden", 6))))
    joined = pointwise(
        tape, "join", (left, right), "output", grads=((left.name,), (right.name,)), shape=(B, S, Dim("hidden", 8))
    )  # fmt: skip
    tape.finish_backward(x, joined)
    assert [t.name for op in tape.forward for t in op.writes] == ["output"]
    assert tape.backward[-1].writes[0].num_bytes == x.tensor.num_bytes


def test_autocast_casts_an_input_for_each_call_and_a_weight_once() -> None:
    tape, x = tape_with_input("fp32", autocast=True)
    a, b = project(tape, "a", x, "a"), project(tape, "b", x, "b")
    y = add(tape, "sum", a, b, "bf16", out="output")
    tape.finish_backward(x, y)
    casts = [op for op in tape.forward if op.name.endswith(".cast")]
    assert [op.writes[0].name for op in casts] == [
        "a.input.cast", "autocast:a.weight", "b.input.cast", "autocast:b.weight",
    ]  # fmt: skip
    # gradients leave in the parameters' dtype: the low gradient is cast, then handed over
    handed = [op for op in tape.backward if op.gradients]
    assert [op.name for op in handed] == ["b.weight.grad.cast", "a.weight.grad.cast"]
    assert tape.backward[-1].writes == () or tape.backward[-1].writes[0].dtype == "fp32"


def test_nothing_happens_where_there_is_nothing_to_do() -> None:
    tape, x = tape_with_input()
    assert cast(tape, "cast", x, "bf16") is x
    assert dropout(tape, "dropout", x, 0.0, out="dropped") is x
    assert tape.forward == []


def test_a_formula_of_several_ops_moves_what_each_of_them_reads_and_writes() -> None:
    """grad * (2 * x.pow(1)): a copy of x, a product with 2, a product with the gradient: 7 tensors read or written."""
    tape, x = tape_with_input("fp32")
    y = pointwise(tape, "pow", (x,), "output", grads=(("input",),), backward_scratch=2)
    tape.finish_backward(x, y)
    (op,) = tape.backward
    assert [len(k.reads) + len(k.writes) for k in op.kernels if isinstance(k, Pointwise)] == [2, 2, 3]
    assert sum(k.moved_bytes for k in op.kernels if isinstance(k, Pointwise)) == 7 * x.tensor.num_bytes


def test_dtypes() -> None:
    assert promote("bf16", "fp32") == promote("fp32", "fp16") == "fp32"
    assert promote("bf16", "bf16") == "bf16"
    tf32 = Precision.of("fp32", "tf32", autocast=False)
    assert (tf32.stored, tf32.low, tf32.gemm) == ("fp32", "fp32", "tf32")
    assert not Precision.of("bf16", "bf16", autocast=True).autocast
