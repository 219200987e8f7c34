"""A small GPT as layers, and a rank's program under FSDP written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from held import live

from sim.ir.ledger import DTYPE_BYTES, Dim, Layer, Op, Parameter, Tensor
from sim.ir.program import Alloc, Chunk, Collective, Free, Instruction
from sim.parallel.emit import Emitter, Recompute

Shapes = Sequence[tuple[str, Sequence[int]]]


def gpt_shapes(hidden: int = 64, vocabulary: int = 256, sequence: int = 16, num_layers: int = 4) -> Shapes:
    """Return (name, shape) of the parameters of a GPT as torch lists them."""
    found: list[tuple[str, tuple[int, ...]]] = [
        ("wte.weight", (vocabulary, hidden)),
        ("wpe.weight", (sequence, hidden)),
    ]
    for index in range(num_layers):
        linears = (("qkv", 3 * hidden, hidden), ("proj", hidden, hidden))
        mlp = (("fc1", 4 * hidden, hidden), ("fc2", hidden, 4 * hidden))
        for norm, group in (("ln1", linears), ("ln2", mlp)):
            found += [(f"blocks.{index}.{norm}.{leaf}", (hidden,)) for leaf in ("weight", "bias")]
            for name, rows, columns in group:
                found.append((f"blocks.{index}.{name}.weight", (rows, columns)))
                found.append((f"blocks.{index}.{name}.bias", (rows,)))
    found += [("ln_f.weight", (hidden,)), ("ln_f.bias", (hidden,)), ("head.weight", (vocabulary, hidden))]
    return found


def place(name: str, num_layers: int) -> tuple[int, str]:
    """Return the layer that a parameter is in, and its name there."""
    if name.startswith("blocks."):
        number, _, rest = name.removeprefix("blocks.").partition(".")
        return int(number) + 1, rest
    return (0 if name.startswith(("wte", "wpe")) else num_layers + 1), name


def layers_of(shapes: Shapes) -> tuple[Layer, ...]:
    """Return layers whose modules run one after the other; the head ends in a loss that is no module."""
    num_layers = 1 + max(int(name.split(".")[1]) for name, _ in shapes if name.startswith("blocks."))
    owned: list[list[Parameter]] = [[] for _ in range(num_layers + 2)]
    for name, shape in shapes:
        index, own = place(name, num_layers)
        dims = tuple(Dim(f"dim{i}", size) for i, size in enumerate(shape))
        owned[index].append(Parameter(own, dims))
    block = _chain("block", owned[1], True, True)
    assert all(parameters == owned[1] for parameters in owned[1:-1])
    return (
        _chain("embedding", owned[0], False, True),
        *(block,) * num_layers,
        _chain("head", owned[-1], True, False),
    )


def _chain(kind: Any, parameters: Sequence[Parameter], has_input: bool, has_output: bool) -> Layer:
    one = (Dim("numel", 1),)
    modules = list(dict.fromkeys(p.module for p in parameters)) + ([""] if kind == "head" else [])
    forward, backward = [], []
    for index, module in enumerate(modules):
        names = tuple(p.name for p in parameters if p.module == module)
        last = index == len(modules) - 1
        reads = (f"y{index - 1}" if index else "x",) if index or has_input else ()
        made = "out" if last else f"y{index}"
        writes = (Tensor(made, one, "bf16"),) if has_output or not last else ()
        forward.append(Op(module or "loss", (), reads, writes, reads, parameters=names, module=module))
        grads = tuple(f"grad:{w.name}" for w in writes)
        out = tuple(Tensor(f"grad:{r}", one, "bf16") for r in reads)
        op = f"{module or 'loss'}.backward"
        releases = (module or "loss",)
        backward.append(
            Op(op, (), (*grads, *reads), out, gradients=names[::-1], releases=releases, module=module)
        )  # fmt: skip
    border = Tensor("x", one, "bf16")
    return Layer(
        kind,
        kind,
        tuple(parameters),
        tuple(forward),
        tuple(backward[::-1]),
        border if has_input else None,
        Tensor("out", one, "bf16") if has_output else None,
    )


class Job:
    """Setup, passes of each microbatch and the optimizer steps of a rank, written in order."""

    def __init__(
        self,
        hooks: Any,
        layers: Sequence[Layer],
        dtype: Any,
        num_microbatches: int = 1,
        recompute: Any = "none",
        batch_inputs: Sequence[Tensor] = (),
    ) -> None:
        self.hooks = hooks
        self.emitter = Emitter(layers, batch_inputs, Recompute(recompute, reentrant=False), dtype)
        self.setup: Chunk = hooks.setup()
        self.passes: list[tuple[Chunk, Chunk]] = []
        for index in range(num_microbatches):
            hooks.begin_microbatch(index == 0, index == num_microbatches - 1)
            passes = self.emitter.passes(hooks)
            self.passes.append((passes.forward, passes.backward))
        self.first_step: Chunk = hooks.optimizer_step(True)
        self.step: Chunk = hooks.optimizer_step(False)

    @property
    def micro(self) -> list[Chunk]:
        return [chunk for pair in self.passes for chunk in pair]

    @property
    def two_steps(self) -> list[Chunk]:
        """Setup, the first step and another."""
        return [self.setup, *self.micro, self.first_step, *self.micro, self.step]


def peak(chunks: Sequence[Chunk]) -> tuple[int, dict[str, int]]:
    """Return the most bytes that are held at any time during the last chunk, and by category then."""
    held = live(chunks[:-1])
    total = best = sum(s.num_bytes for s in held.values())
    parts: dict[str, int] = {}
    for each in chunks[-1]:
        if isinstance(each, Alloc):
            held[id(each.storage)] = each.storage
            total += each.storage.num_bytes
            if total > best:
                best, parts = total, {}
                for s in held.values():
                    parts[s.category] = parts.get(s.category, 0) + s.num_bytes
        elif isinstance(each, Free):
            del held[id(each.storage)]
            total -= each.storage.num_bytes
    return best, parts


def collectives(chunk: Iterable[Instruction]) -> list[tuple[str, int, str]]:
    return [(each.kind, each.tensor_bytes, each.axis) for each in chunk if isinstance(each, Collective)]


def num_bytes(count: int, dtype: str) -> int:
    return count * DTYPE_BYTES[dtype]
