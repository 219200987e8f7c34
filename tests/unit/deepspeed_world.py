"""The small GPT whose bytes under real DeepSpeed are known: 53 parameters, 3 716 608 elements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from held import live, live_bytes

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import Dim, Layer, Op, Parameter, Tensor
from sim.ir.program import Alloc, Chunk, Collective, Free, Instruction
from sim.parallel.emit import Emitter, Recompute
from sim.parallel.frameworks.deepspeed import deepspeed
from sim.parallel.frameworks.plan import Plan

H, V, S, NUM_LAYERS = 256, 1024, 128, 4
P = NUM_LAYERS * (12 * H * H + 13 * H) + 2 * V * H + S * H + 2 * H
NUM_PARAMETERS = NUM_LAYERS * 12 + 5

EMBEDDING = (("wte", (V * H,)), ("wpe", (S * H,)))
BLOCK = (
    ("ln1", (H, H)),
    ("qkv", (3 * H * H, 3 * H)),
    ("proj", (H * H, H)),
    ("ln2", (H, H)),
    ("fc1", (4 * H * H, 4 * H)),
    ("fc2", (4 * H * H, H)),
)
HEAD = (("ln_f", (H, H)), ("head", (V * H,)))
LEAVES = ("weight", "bias")


def chain(kind: Any, modules: Iterable[tuple[str, tuple[int, ...]]], has_input: bool, has_output: bool) -> Layer:
    """Return modules that run one after the other, each with the parameters of these sizes."""
    one = (Dim("numel", 1),)
    border = Tensor("x", one, "bf16")
    parameters, forward, backward = [], [], []
    modules = list(modules)
    for index, (module, sizes) in enumerate(modules):
        names = tuple(f"{module}.{leaf}" for leaf in LEAVES[: len(sizes)])
        parameters += [Parameter(name, (Dim("numel", n),)) for name, n in zip(names, sizes, strict=True)]
        made, read = f"y{index}", f"y{index - 1}" if index else "x"
        final = index == len(modules) - 1
        reads = (read,) if index or has_input else ()
        writes = (Tensor("out" if final else made, one, "bf16"),) if has_output or not final else ()
        forward.append(Op(module, (), reads, writes, parameters=names, module=module))
        grad_in = (Tensor(f"grad:{read}", one, "bf16"),) if index or has_input else ()
        grad_out = (f"grad:{'out' if final else made}",) if has_output or not final else ()
        backward.append(Op(f"{module}.grad", (), grad_out, grad_in, gradients=names[::-1], module=module))
    out = Tensor("out", one, "bf16") if has_output else None
    layer_input = border if has_input else None
    return Layer(kind, kind, tuple(parameters), tuple(forward), tuple(backward[::-1]), layer_input, out)


def gpt(num_layers: int = NUM_LAYERS, tied: bool = False) -> tuple[Layer, ...]:
    block = chain("block", BLOCK, True, True)
    head = chain("head", HEAD, True, False)
    if tied:
        head = replace(head, tied=(("head.weight", "embedding", "wte.weight"),))
    return (chain("embedding", EMBEDDING, False, True), *(block,) * num_layers, head)


class Job:
    """A rank's program under DeepSpeed: setup, microbatches and step, written in order."""

    def __init__(
        self,
        stage: int,
        dp: int = 2,
        dtype: Any = "bf16",
        num_microbatches: int = 1,
        recompute: Any = "none",
        layers: tuple[Layer, ...] = (),
        *,
        fused: bool = True,
        clipping: float = 0.0,
        dp_rank: int | None = None,
        gpu_memory_bytes: int = 0,
        **settings: Any,
    ) -> None:
        self.layers = layers or gpt()
        settings = {"overlap_comm": stage == 3, "gradient_clipping": clipping} | settings
        self.settings = DeepSpeedSettings(stage=stage, **settings)
        plan = Plan(
            dp,
            dtype,
            dtype != "fp32",
            num_microbatches,
            "adamw",
            fused=fused,
            dp_rank=dp_rank,
            gpu_memory_bytes=gpu_memory_bytes,
        )
        self.hooks = deepspeed(self.layers, self.settings, plan)
        self.emitter = Emitter(self.layers, (), Recompute(recompute), dtype)
        self.setup = self.hooks.setup()
        if stage == 3:
            self.hooks.use_trace(self.emitter)  # type: ignore[union-attr]
        self.passes: list[tuple[Chunk, Chunk]] = []
        for index in range(num_microbatches):
            self.hooks.begin_microbatch(index == 0, index == num_microbatches - 1)
            passes = self.emitter.passes(self.hooks)
            self.passes.append((passes.forward, passes.backward))
        self.step = self.hooks.optimizer_step(True)
        self.later_step = self.hooks.optimizer_step(False)  # for the same passes

    @property
    def chunks(self) -> list[Chunk]:
        return [self.setup, *(chunk for pair in self.passes for chunk in pair), self.step]

    @property
    def two_steps(self) -> list[Chunk]:
        return [*self.chunks, *(chunk for pair in self.passes for chunk in pair), self.later_step]


def by_category(chunks: Iterable[Chunk]) -> Counter[str]:
    return Counter[str]() + sum(
        (Counter({storage.category: storage.num_bytes}) for storage in live(chunks).values()), Counter[str]()
    )


def peak_bytes(chunks: list[Chunk]) -> int:
    """Return the most that is held at any time during the last chunk."""
    held = live_bytes(chunks[:-1])
    peak = held
    for each in chunks[-1]:
        if isinstance(each, Alloc):
            held += each.storage.num_bytes
            peak = max(peak, held)
        elif isinstance(each, Free):
            held -= each.storage.num_bytes
    return peak


def collectives(chunk: Iterable[Instruction]) -> list[tuple[str, int]]:
    return [(each.kind, each.tensor_bytes) for each in chunk if isinstance(each, Collective)]


def is_host(each: Instruction) -> bool:
    """Whether it allocates or frees memory of the node."""
    return isinstance(each, (Alloc, Free)) and each.storage.place == "host"
