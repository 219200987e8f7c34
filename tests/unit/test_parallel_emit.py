"""Storages of a toy layer live exactly as long as PyTorch keeps them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import yaml

from sim.ir.ledger import Dim, Gemm, Layer, Op, Parameter, Pointwise, Tensor
from sim.ir.program import Alloc, Chunk, Compute, Free, Instruction, Storage
from sim.model.transformer import describe
from sim.parallel.emit import Emitter, Recompute
from sim.parallel.lower import lower
from sim.parallel.precision import dtypes_of
from sim.scenario.load import load_scenario_text

B, D, F = Dim("batch", 4), Dim("hidden", 8), Dim("ffn", 16)
X = Tensor("x", (B, D), "bf16")
Y = Tensor("y", (B, D), "bf16")
H = Tensor("h", (B, F), "bf16")
A = Tensor("a", (B, F), "bf16")
GA, GH, GX = Tensor("grad:a", (B, F), "bf16"), Tensor("grad:h", (B, F), "bf16"), Tensor("grad:x", (B, D), "bf16")


def block() -> Layer:
    """x -> up -> h -> act -> a -> down -> y, as two linears and an activation that saves its input."""
    up = Op(
        "up", (Gemm((B,), (F,), (D,), "bf16"),), ("x",), (H,), ("x",), parameters=("mlp.up.weight",), module="mlp.up"
    )
    act = Op("act", (Pointwise("elementwise", (H,), (A,)),), ("h",), (A,), ("h",), module="mlp")
    down = Op(
        "down",
        (Gemm((B,), (D,), (F,), "bf16"),),
        ("a",),
        (Y,),
        ("a",),
        parameters=("mlp.down.weight",),
        module="mlp.down",
    )
    backward = (
        Op("down.dgrad", (Gemm((B,), (F,), (D,), "bf16"),), ("grad:y",), (GA,), module="mlp.down"),
        Op(
            "down.wgrad",
            (Gemm((D,), (F,), (B,), "bf16"),),
            ("grad:y", "a"),
            (),
            gradients=("mlp.down.weight",),
            releases=("down",),
            module="mlp.down",
        ),
        Op(
            "act.grad",
            (Pointwise("elementwise", (GA, H), (GH,)),),
            ("grad:a", "h"),
            (GH,),
            releases=("act",),
            module="mlp",
        ),
        Op("up.dgrad", (Gemm((B,), (D,), (F,), "bf16"),), ("grad:h",), (GX,), module="mlp.up"),
        Op(
            "up.wgrad",
            (Gemm((F,), (D,), (B,), "bf16"),),
            ("grad:h", "x"),
            (),
            gradients=("mlp.up.weight",),
            releases=("up",),
            module="mlp.up",
        ),
    )
    parameters = (Parameter("mlp.up.weight", (F, D)), Parameter("mlp.down.weight", (D, F)))
    return Layer("layers", "block", parameters, (up, act, down), backward, X, Y)


def first() -> Layer:
    op = Op("embed", (Pointwise("gather", (), (X,)),), (), (X,))
    back = Op("embed.grad", (Pointwise("scatter", (X,), ()),), ("grad:x",), ())
    return Layer("embed", "embedding", (), (op,), (back,), None, X)


def last() -> Layer:
    """A loss that saves its input."""
    op = Op("loss", (Pointwise("reduce", (Y,), ()),), ("y",), (), ("y",))
    gy = Tensor("grad:y", (B, D), "bf16")
    back = Op("loss.grad", (Pointwise("elementwise", (Y,), (gy,)),), ("y",), (gy,), releases=("loss",))
    return Layer("loss", "head", (), (op,), (back,), Y, None)


class Keep:
    """Hooks that keep gradients and write down what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.gradients: list[Storage] = []

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        self.log.append(f"{'again ' if recomputing else ''}pre {layer} {module}".rstrip())
        return ()

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        self.log.append(f"{'again ' if recomputing else ''}post {layer} {module}".rstrip())
        return ()

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        self.log.append(f"back {layer} {module}".rstrip())
        return ()

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        return ()

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        self.gradients.append(gradient)
        return ()

    def end_of_backward(self) -> Iterable[Instruction]:
        return ()


def live_after(chunk: Chunk, live: Counter[Storage]) -> Counter[Storage]:
    for instruction in chunk:
        if isinstance(instruction, Alloc):
            live[instruction.storage] += 1
        elif isinstance(instruction, Free):
            live[instruction.storage] -= 1
            assert live[instruction.storage] == 0, f"{instruction.storage.name} freed when not live"
    return Counter({s: n for s, n in live.items() if n})


def names(live: Counter[Storage]) -> list[str]:
    return sorted(s.name for s in live)


BLOCK = block()
LAYERS = (first(), BLOCK, BLOCK, last())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_microbatch_leaves_only_gradients(mode, reentrant):
    hooks = Keep()
    passes = Emitter(LAYERS, (), Recompute(mode, reentrant), "bf16").passes(hooks)
    live = live_after(passes.backward, live_after(passes.forward, Counter()))
    assert set(live) == set(hooks.gradients)
    assert len(hooks.gradients) == 4


def test_without_recompute_forward_leaves_what_each_op_saved():
    passes = Emitter(LAYERS, (), Recompute("none"), "bf16").passes(Keep())
    live = live_after(passes.forward, Counter())
    # each block: x, h, a; block 0's y is block 1's x; the last y is saved by the loss
    assert names(live) == sorted(["embedding.x", "block.h", "block.a", "block.y", "block.h", "block.a", "block.y"])


def test_full_recompute_leaves_each_blocks_input():
    passes = Emitter(LAYERS, (), Recompute("full"), "bf16").passes(Keep())
    assert names(live_after(passes.forward, Counter())) == ["block.y", "block.y", "embedding.x"]


def test_reentrant_recompute_runs_everything_again_and_the_other_form_stops_early():
    def again(reentrant: bool) -> list[str]:
        chunk = Emitter(LAYERS, (), Recompute("full", reentrant), "bf16").passes(Keep()).backward
        return [i.op for i in chunk if isinstance(i, Compute) and i.op in ("up", "act", "down")]

    assert again(True) == ["up", "act", "down"] * 2
    assert again(False) == ["up", "act"] * 2  # down saves only its input: packed before its kernel would run


def test_hooks_see_modules_as_torch_does():
    hooks = Keep()
    Emitter(LAYERS, (), Recompute("none"), "bf16").passes(hooks)
    assert hooks.log[:10] == [
        "pre 0", "post 0", "pre 1", "pre 1 mlp", "pre 1 mlp.up", "post 1 mlp.up", "pre 1 mlp.down",
        "post 1 mlp.down", "post 1 mlp", "post 1",
    ]  # fmt: skip


def test_recompute_runs_before_the_backward_hooks_of_the_layer():
    hooks = Keep()
    Emitter(LAYERS, (), Recompute("full"), "bf16").passes(hooks)
    start = hooks.log.index("again pre 2")
    assert hooks.log[start - 1] == "back 3"
    assert hooks.log[hooks.log.index("again post 2") + 1] == "back 2"


def test_autocasts_copies_stay_until_forward_ends_even_under_recompute() -> None:
    """cached_cast keeps a copy of every weight until the region ends: 2 bytes a parameter of the linear layers."""
    text = {
        "model": {
            "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "vocab_size": 256, "tie_word_embeddings": False,
        },
        "cluster": {"node": "dgx-h100", "num_gpus": 2},
        "framework": "ddp",
        "training": {
            "sequence_length": 32, "micro_batch_size": 1, "global_batch_size": 2, "precision": "bf16",
            "recompute": "full",
        },
    }  # fmt: skip
    scenario = load_scenario_text(yaml.safe_dump(text), "autocast.yaml")
    dtypes = dtypes_of(scenario)
    ledger = describe(
        scenario.model, scenario.training, parameter_dtype=dtypes.parameter, compute_dtype=dtypes.compute,
        autocast=dtypes.autocast,
    )  # fmt: skip
    program = lower(ledger, scenario).programs[0]
    forward = next(chunk for name, chunk in program.chunks.items() if name.endswith("forward") or "forward" in name)
    held = most = 0
    for each in forward:
        if isinstance(each, (Alloc, Free)) and ".autocast:" in each.storage.name:
            held += each.storage.num_bytes if isinstance(each, Alloc) else -each.storage.num_bytes
            most = max(most, held)
    block = 4 * 64 * 64 + 3 * 64 * 128
    assert most == 2 * (3 * block + 256 * 64)


def test_every_second_block_is_checkpointed() -> None:
    """torchtitan counts blocks from 1 on and checkpoints those that the interval divides."""
    recompute = Recompute("full", reentrant=False, interval=2)
    assert [recompute.of_block(number).mode for number in range(4)] == ["none", "full", "none", "full"]
    assert Recompute("full").of_block(0).mode == "full"


def test_what_somebody_holds_lives_to_the_end_of_backward() -> None:
    """torch's pipelines keep a last stage's logits until its backward is over: 2 sequences of 32 tokens, 256 words."""
    scenario = load_scenario_text(
        yaml.safe_dump(
            {
                "model": {
                    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
                    "vocab_size": 256,
                },
                "cluster": {"node": "dgx-h100", "num_gpus": 2},
                "framework": "fsdp2",
                "parallelism": {"pp": 2, "schedule": "gpipe"},
                "training": {
                    "sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "precision": "bf16",
                    "attention": "sdpa",
                },
            }
        ),
        "held.yaml",
    )  # fmt: skip
    dtypes = dtypes_of(scenario)
    ledger = describe(
        scenario.model, scenario.training, parameter_dtype=dtypes.parameter, compute_dtype=dtypes.compute,
        autocast=dtypes.autocast,
    )  # fmt: skip
    last = lower(ledger, scenario).programs[-1]
    forward, backward = (next(c for n, c in last.chunks.items() if n.startswith(f"{w}.first")) for w in FIRST)
    logits = next(i.storage for i in forward if isinstance(i, Alloc) and i.storage.name == "head.logits")
    assert logits.num_bytes == 2 * 32 * 256 * 2
    assert not any(isinstance(i, Free) and i.storage is logits for i in forward)
    (freed,) = (i for i in backward if isinstance(i, Free) and i.storage is logits)
    assert freed


FIRST = ("forward", "backward")
