"""Measure what eager torch spends on the host around a kernel, on this machine's CPU, and write it down.

    python validation/measure/measure_host.py validation/measure/host_measured.yaml

Whole blocks of the three codes run at sizes so small that their arithmetic takes next to nothing: what is left is
Python, dispatcher, autograd and allocation, which a GPU's run pays as well, beside the driver's launches. A block's
time is divided by the kernels that the model's ledger has for it, forward and backward apart. Single ops in hot loops
are measured too: their sum is about half of a block's, since a real model's code is not in the caches.

One thread; each figure is the least of many repeats. Needs torch. The clock that the core really runs at is taken from
a chain of dependent additions (one a cycle).
"""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))

CHAIN = 100
REPEATS = 15


def per_call_us(call: Callable[[], object], num_calls: int, inner: int = 20) -> float:
    """Return the time of one of ``num_calls`` calls inside ``call``, in microseconds: least of the repeats."""
    best = float("inf")
    call()
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        best = min(best, time.perf_counter() - start)
    return best / inner / num_calls * 1e6


def chain(step: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] = (1, 1, 8)) -> tuple[float, float]:
    """Return (forward, backward) of one of a chain of steps on a tensor that needs a gradient."""
    x = torch.randn(shape, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x
        for _ in range(CHAIN):
            y = step(y)
        return y

    ahead = per_call_us(forward, CHAIN)
    seed = torch.ones_like(forward())
    best = float("inf")
    for _ in range(REPEATS * 10):
        y = forward()
        start = time.perf_counter()
        torch.autograd.backward(y, seed)
        best = min(best, time.perf_counter() - start)
    return ahead, best / CHAIN * 1e6


class _Same(torch.autograd.Function):
    """A function of Python's own, as Megatron's, apex's and Transformer Engine's are: does nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (_,) = ctx.saved_tensors
        return grad


class _Empty(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def measure() -> dict[str, float]:
    """Return microseconds by what was measured; ``.backward`` is the autograd engine's share with its kernels' ops."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    constant, weight = torch.ones(8), torch.randn(8, 8, requires_grad=True)
    bias, gain = torch.zeros(8, requires_grad=True), torch.ones(8, requires_grad=True)
    pairs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "elementwise": lambda x: x * constant,
        "view": lambda x: x.transpose(0, 1),
        "linear": lambda x: functional.linear(x, weight, bias),
        "linear_no_bias": lambda x: functional.linear(x, weight),
        "norm": lambda x: functional.layer_norm(x, (8,), gain, bias),
        "softmax": lambda x: torch.softmax(x, -1),
        "matmul": lambda x: torch.matmul(x, constant_square),
        "function": _Same.apply,
        "dropout": lambda x: functional.dropout(x, 0.1),
    }
    constant_square = torch.eye(8)[None]
    for name, step in pairs.items():
        found[name], found[f"{name}.backward"] = chain(step)
    q = torch.randn(1, 1, 8, 8)
    found["attention"], found["attention.backward"] = chain(
        lambda x: functional.scaled_dot_product_attention(x, q, q, is_causal=True), (1, 1, 8, 8)
    )
    for reentrant in (True, False):
        name = "checkpoint_reentrant" if reentrant else "checkpoint"
        ahead, back = chain(lambda x, r=reentrant: checkpoint(_plain, x, use_reentrant=r))  # type: ignore[misc]
        found[name] = ahead
        found[f"{name}.backward"] = back
    found["plain"], found["plain.backward"] = chain(_plain)
    empty = _Empty()
    x = torch.randn(1, 1, 8)
    found["module"] = per_call_us(lambda: [empty(x) for _ in range(CHAIN)], CHAIN)
    hooked = _Empty()
    hooked.register_forward_pre_hook(lambda module, args: None)
    hooked.register_forward_hook(lambda module, args, result: None)
    found["module_hooks"] = per_call_us(lambda: [hooked(x) for _ in range(CHAIN)], CHAIN) - found["module"]
    with torch.no_grad():
        found["no_grad"] = per_call_us(lambda: [x * constant for _ in range(CHAIN)], CHAIN)
        found["in_place"] = per_call_us(lambda: [x.mul_(constant) for _ in range(CHAIN)], CHAIN)
    found["accumulate"] = _accumulate(hook=False)
    found["gradient_hook"] = _accumulate(hook=True) - found["accumulate"]
    found["rng_state"] = per_call_us(lambda: [torch.set_rng_state(torch.get_rng_state()) for _ in range(CHAIN)], CHAIN)
    found["python_call"] = per_call_us(lambda: [_nothing(x) for _ in range(CHAIN)], CHAIN)
    found.update(_collectives())
    return found


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)


def _nothing(x: object) -> object:
    return x


def _accumulate(hook: bool) -> float:
    """Return the time of one AccumulateGrad node that adds to a gradient that is there."""
    leaves = [torch.zeros(8, requires_grad=True) for _ in range(CHAIN)]
    for leaf in leaves:
        leaf.grad = torch.zeros(8)
        if hook:
            leaf.register_post_accumulate_grad_hook(lambda _: None)
    seeds = [torch.ones(8) for _ in leaves]
    return per_call_us(lambda: torch.autograd.backward(leaves, seeds), CHAIN)


def _collectives() -> dict[str, float]:
    """Return the time of c10d's own part of a collective: a process group that does nothing stands in for NCCL."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    x, y = torch.zeros(8), torch.zeros(16)
    found = {
        "all_reduce": per_call_us(lambda: [dist.all_reduce(x) for _ in range(CHAIN)], CHAIN),
        "all_gather": per_call_us(lambda: [dist.all_gather_into_tensor(y, x) for _ in range(CHAIN)], CHAIN),
    }

    def exchange() -> None:
        ops = [dist.P2POp(dist.isend, x, 1), dist.P2POp(dist.irecv, x, 1)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    found["batch_isend_irecv"] = per_call_us(lambda: [exchange() for _ in range(CHAIN)], CHAIN)
    dist.destroy_process_group()
    return found


def clock_hz() -> float:
    """Return the clock of the core, from dependent additions; 0 without a C compiler."""
    text = """#include <stdio.h>
#include <time.h>
int main(void) {
    struct timespec a, b; double best = 1e9; unsigned long n = 200000000UL;
    for (int r = 0; r < 5; r++) {
        unsigned long i = n, x = 1;
        clock_gettime(CLOCK_MONOTONIC, &a);
        while (i--) { __asm__ volatile("add $1, %0\\n\\tadd $1, %0\\n\\tadd $1, %0\\n\\tadd $1, %0" : "+r"(x)); }
        clock_gettime(CLOCK_MONOTONIC, &b);
        double s = (b.tv_sec - a.tv_sec) + 1e-9 * (b.tv_nsec - a.tv_nsec);
        if (s < best) best = s;
    }
    printf("%f", 4.0 * n / best);
    return 0;
}"""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "clock.c", Path(folder) / "clock"
        source.write_text(text, encoding="utf-8")
        try:
            subprocess.run(["cc", "-O1", "-o", str(program), str(source)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return 0.0
        return float(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    return f"{found.get('model name', '?')} (family {found.get('cpu family')}, model {found.get('model')})"


# --- whole blocks ----------------------------------------------------------------------------------

NUM_LAYERS = 24
GPT = (
    "{hidden_size: 16, intermediate_size: 64, num_hidden_layers: 24, num_attention_heads: 2, vocab_size: 64, "
    "hidden_act: gelu, norm: layernorm, bias: true, position: learned, max_position_embeddings: 64}"
)
LLAMA = (
    "{hidden_size: 16, intermediate_size: 64, num_hidden_layers: 24, num_attention_heads: 2, vocab_size: 64, "
    "hidden_act: silu, norm: rmsnorm, bias: false, position: rope, max_position_embeddings: 64}"
)
CASES = {
    "torch gpt": ("torch", GPT),
    "torch llama": ("torch", LLAMA),
    "huggingface gpt": ("huggingface", GPT),
    "huggingface llama": ("huggingface", LLAMA),
    "megatron gpt": ("megatron", GPT),
}


def blocks(case: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], int, int]:
    """Return a forward pass through all blocks, and the ledger's kernels of one block, forward and backward."""
    import yaml

    from sim.model.transformer import describe
    from sim.scenario.load import load_scenario_mapping
    from validation.measure.megatron_block import Block as MegatronBlock
    from validation.real.modules import Block, rotary_angles

    code, text = CASES[case]
    scenario = load_scenario_mapping(
        {
            "model": yaml.safe_load(text),
            "cluster": {"node": "dgx-a100-80gb", "num_gpus": 1},
            "framework": "megatron" if code == "megatron" else "ddp",
            "training": {
                "sequence_length": 2, "micro_batch_size": 1, "global_batch_size": 1, "precision": "bf16", "code": code,
                "attention": "flash-2" if code == "megatron" else "sdpa",
            },
        },
        case,
        folder=".",
    )  # fmt: skip
    config = scenario.model
    ledger = describe(config, scenario.training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False)
    block = ledger.layers[1]
    modules: Any
    if code == "megatron":
        modules = nn.ModuleList(MegatronBlock(16, 2) for _ in range(NUM_LAYERS))
        inputs: tuple[Any, ...] = ()
    else:
        fused = config.position == "learned"
        modules = nn.ModuleList(Block(config, code, "sdpa", fused=fused) for _ in range(NUM_LAYERS))
        angles = rotary_angles(2, config.head_dim)
        tables = (torch.polar(torch.ones_like(angles), angles),)
        if code == "huggingface":
            both = torch.cat((angles, angles), -1)
            tables = (both.cos(), both.sin())
        inputs = (tables,)

    def forward(x: torch.Tensor, around: bool = False) -> torch.Tensor:
        for module in modules:
            x = checkpoint(module, x, *inputs, use_reentrant=True) if around else module(x, *inputs)
        return x

    return forward, sum(len(op.kernels) for op in block.forward), sum(len(op.kernels) for op in block.backward)


def block_times(case: str) -> dict[str, float]:
    """Return microseconds a block and a kernel, and what a checkpoint around a block adds to running it again."""
    run, num_forward, num_backward = blocks(case)
    x = torch.randn(2, 1, 16, requires_grad=True) if "megatron" in case else torch.randn(1, 2, 16, requires_grad=True)
    times: dict[bool, tuple[float, float]] = {}
    for around in (False, True):
        ahead = back = float("inf")
        for _ in range(REPEATS * 8):
            start = time.perf_counter()
            y = run(x, around)  # type: ignore[call-arg]
            middle = time.perf_counter()
            y.sum().backward()
            ahead, back = min(ahead, middle - start), min(back, time.perf_counter() - middle)
            gc.collect(0)
        times[around] = (ahead / NUM_LAYERS * 1e6, back / NUM_LAYERS * 1e6)
    (forward, backward), again = times[False], times[True]
    return {
        "kernels_forward": num_forward,
        "kernels_backward": num_backward,
        "block_forward": forward,
        "block_backward": backward,
        "checkpoint": sum(again) - 2 * forward - backward,
        "kernel_forward": forward / num_forward,
        "kernel_backward": backward / num_backward,
    }


def main() -> None:
    gc.disable()
    times = measure()
    out = [
        "# Host time of eager torch around a kernel, in microseconds: least of repeats, one thread, tiny CPU tensors.",
        f"processor: {_processor()}",
        f"clock: {clock_hz() / 1e9:.3f} GHz",
        f"python: {platform.python_version()}",
        f"torch: {torch.__version__}",
        f"date: '{date.today().isoformat()}'",
        "script: validation/measure/measure_host.py",
        "blocks:  # kernels are the ledger's; the rest in microseconds",
        *(f"  {case}: {{{', '.join(f'{k}: {v:.4g}' for k, v in block_times(case).items())}}}" for case in CASES),
        "us:  # hot loops",
        *(f"  {name}: {value:.3f}" for name, value in times.items()),
    ]
    Path(sys.argv[1]).write_text("\n".join(out) + "\n", encoding="utf-8")
    print("\n".join(out))


if __name__ == "__main__":
    main()
