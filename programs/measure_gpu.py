"""Times what `sim calibrate` asks for on one GPU, or on the CPU its host times. Needs torch alone, and nothing of sim.

    python measure_gpu.py < request.json > answer.json

It is a program and no module of `sim`: it runs under whichever Python has the torch that will train, which need not be
the one that `sim` is installed in, and so `sim` itself never imports torch.

A request is {"device": "cuda" | "cpu", "gemm": [...], "attention": [...], "memory": [...], "copies": [...]} with rows
as in a calibration file, without times; the answer has the same rows with ``time_s`` (null where it could not be run,
with ``why``), the machine, and the host's times.

How: each kernel is captured into a CUDA graph so many times that a replay takes some milliseconds, so that no launch of
the host is in it, and replayed for at least a quarter of a second after a warm-up as long: the clock settles as it does
in training. The time is the median of the replays over the kernels of one. The weights of a product change from one to
the next and together exceed the L2, as those of a model's layers do; what the kernel before has just written, its
activations, stays. Copies and the host's loops take the least of their repeats, since whatever disturbs them only
lengthens them.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError as error:
    sys.exit(f"no torch: {error}")

SETTLE_S = 0.25
"""Time that kernels run before they are timed, and while they are."""
REPLAY_S = 2e-3
"""Time of one replay that is aimed at: many kernels where they are short."""
MOST_CALLS = 256
ROTATED_BYTES = 512 * 2**20
"""Weights that take turns: more than any L2."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCKS, WIDTH = 24, 16
KERNELS_FORWARD, KERNELS_BACKWARD = 10, 21
"""Kernels of a GPT block in sim's ledger (validation/measure/host_measured.yaml, torch gpt)."""
REPEATS = 120


@lru_cache(maxsize=1)
def side_stream() -> torch.cuda.Stream:
    """The one stream that is captured: autograd runs a backward where its forward ran, so that both belong there."""
    return torch.cuda.Stream()


def timed(calls: list[Callable[[], Any]]) -> float:
    """Return the seconds of one of ``calls``, which take turns, on an otherwise idle GPU."""
    stream = side_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
        stream.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls[:3]:
            call()
        end.record()
        stream.synchronize()
        once_s = begin.elapsed_time(end) / 1e3 / len(calls[:3])
        number = max(1, min(MOST_CALLS, int(REPLAY_S / max(once_s, 1e-7))))

        def run() -> None:
            for index in range(number):
                calls[index % len(calls)]()

        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
            replay = graph.replay
        except (
            RuntimeError
        ):  # what cannot be captured is long enough for its launch to be hidden, or says so by its time
            torch.cuda.synchronize()
            replay = run
        _until(replay, SETTLE_S)
        times: list[float] = []
        started = time.perf_counter()
        while time.perf_counter() - started < SETTLE_S or len(times) < 5:
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / number)
    return statistics.median(times)


def _until(run: Callable[[], Any], seconds: float) -> None:
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        run()
        torch.cuda.synchronize()


# --- kernels ---------------------------------------------------------------------------------------


def gemm(row: dict[str, Any]) -> float:
    """x w^T as a linear layer's forward, or x^T y as its weight's gradient; several at once where there is a batch."""
    dtype, batch = DTYPES[row["dtype"]], row.get("batch", 1)
    torch.backends.cuda.matmul.allow_tf32 = row["dtype"] == "tf32"
    m, n, k = row["m"], row["n"], row["k"]

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*((batch, *shape) if batch > 1 else shape), dtype=dtype, device="cuda")

    if row.get("over_tokens"):
        a, b = make(k, m), make(k, n)
        return timed([lambda: torch.matmul(a.transpose(-1, -2), b)])
    a = make(m, k)
    turns = max(1, min(64, ROTATED_BYTES // max(1, batch * n * k * a.element_size())))
    weights = [make(n, k) for _ in range(turns)]
    return timed([lambda w=w: torch.matmul(a, w.transpose(-1, -2)) for w in weights])


def attention(row: dict[str, Any]) -> float:
    """One attention by torch's scaled_dot_product_attention, by the row's kernel, or FlashAttention-3."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype, backward = DTYPES[row["dtype"]], row["direction"] == "backward"
    q, k, v = (
        torch.randn(
            row["batch"], row[heads], row[length], row["head_dim"], dtype=dtype, device="cuda", requires_grad=backward
        )
        for heads, length in (("heads", "query"), ("kv_heads", "key"), ("kv_heads", "key"))
    )
    backends = {"flash-2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if row["kernel"] == "flash-3":
        from flash_attn_interface import flash_attn_func

        q, k, v = (t.detach().transpose(1, 2).contiguous().requires_grad_(backward) for t in (q, k, v))

        def forward() -> torch.Tensor:
            out = flash_attn_func(q, k, v, causal=row.get("causal", True))
            return out[0] if isinstance(out, tuple) else out
    elif row["kernel"] in ("sdpa", *backends):
        chosen = backends.get(row["kernel"])

        def forward() -> torch.Tensor:
            options = {"is_causal": row.get("causal", True), "enable_gqa": row["kv_heads"] != row["heads"]}
            if chosen is None:
                return functional.scaled_dot_product_attention(q, k, v, **options)
            with sdpa_kernel(chosen):
                return functional.scaled_dot_product_attention(q, k, v, **options)
    else:
        raise ValueError(f"torch has no {row['kernel']}")
    if not backward:
        with torch.no_grad():
            return timed([forward])
    torch.cuda.synchronize()
    with torch.cuda.stream(side_stream()):
        out = forward()
        seed = torch.randn_like(out)
    return timed([lambda: torch.autograd.grad(out, (q, k, v), seed, retain_graph=True)])


def memory(row: dict[str, Any]) -> float:
    """A kernel of torch that stands for its family and moves so many bytes, in bf16."""
    num_bytes, family = row["bytes"], row["family"]
    width = 4096

    def make(share: float) -> torch.Tensor:
        rows = max(1, round(num_bytes * share / 2 / width))
        return torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")

    with torch.no_grad():
        if family == "elementwise":
            a, b = make(1 / 3), make(1 / 3)
            c = torch.empty_like(a)
            return timed([lambda: torch.add(a, b, out=c)])
        if family in ("copy", "norm", "softmax"):
            a = make(1 / 2)
            b = torch.empty_like(a)
            calls = {
                "copy": lambda: b.copy_(a),
                "norm": lambda: functional.layer_norm(a, (width,)),
                "softmax": lambda: torch.softmax(a, -1),
            }
            return timed([calls[family]])
        if family == "reduce":
            a = make(1.0)
            return timed([lambda: a.sum(0)])
        if family == "amax":
            a = make(1.0)
            return timed([lambda: torch.linalg.vector_norm(a, float("inf"))])
        if family == "gather":
            table, ids = make(1 / 2), torch.randperm(make(1 / 2).shape[0], device="cuda")
            return timed([lambda: functional.embedding(ids, table)])
        if family == "optimizer":  # of foreach's kernels the one that reads two lists and writes one
            mine, theirs = ([make(1 / 12) for _ in range(4)] for _ in range(2))
            return timed([lambda: torch._foreach_add_(mine, theirs)])
    raise ValueError(f"no kernel stands for {family}")


def copies(row: dict[str, Any]) -> float:
    """A copy between pinned memory and the GPU, alone."""
    host = torch.empty(row["bytes"], dtype=torch.uint8, pin_memory=True)
    device = torch.empty(row["bytes"], dtype=torch.uint8, device="cuda")
    target, source = (device, host) if row["direction"] == "host_to_device" else (host, device)
    best = float("inf")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(12):
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best


# --- the host --------------------------------------------------------------------------------------


class Block(nn.Module):
    """A GPT block so small that on a CPU its arithmetic takes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, width = x.shape
        parts = self.qkv(self.first(x)).split((width, width, width), dim=-1)
        q, k, v = (t.view(batch, seq, 2, width // 2).transpose(1, 2) for t in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).contiguous().view(batch, seq, width))
        return x + self.down(functional.gelu(self.up(self.second(x))))


def host() -> dict[str, float]:
    """Return the CPU's seconds a kernel of the block, forward and backward: Python, dispatcher and autograd."""
    torch.set_num_threads(1)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    x = torch.randn(1, 2, WIDTH, requires_grad=True)
    ahead = back = float("inf")
    gc.disable()
    for _ in range(REPEATS):
        start = time.perf_counter()
        y = x
        for block in blocks:
            y = block(y)
        middle = time.perf_counter()
        y.sum().backward()
        ahead, back = min(ahead, middle - start), min(back, time.perf_counter() - middle)
        gc.collect(0)
    gc.enable()
    return {"forward": ahead / BLOCKS / KERNELS_FORWARD, "backward": back / BLOCKS / KERNELS_BACKWARD}


def driver() -> float:
    """Return the seconds that a launch takes beyond what the same call costs on the CPU: runtime and driver."""

    def per_call(device: str) -> float:
        a = torch.zeros(8, device=device)
        best = float("inf")
        for _ in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(400):  # the launch queue holds 1,024: the host never waits
                a.add_(1)
            best = min(best, time.perf_counter() - start)
        return best / 400

    with torch.no_grad():
        return max(per_call("cuda") - per_call("cpu"), 1e-7)


# --- the machine -----------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on."""
    found: dict[str, Any] = {
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "gpu_model": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "num_sms": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": str(torch.version.cuda),
            "driver": _line("/proc/driver/nvidia/version", "NVRM version") or "unknown",
        }
    return found


def _line(path: str, word: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(word)), "")


def main() -> None:
    request = json.load(sys.stdin)
    device = request["device"]
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is False")
    answer: dict[str, Any] = {"machine": machine(device), "host": host()}
    if device == "cuda":
        answer["host"]["driver"] = driver()
        for name, measure in (("gemm", gemm), ("attention", attention), ("memory", memory), ("copies", copies)):
            answer[name] = []
            for row in request.get(name, ()):
                try:
                    answer[name].append({**row, "time_s": measure(row)})
                except Exception as error:  # one shape that does not run must not lose the others
                    why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    answer[name].append({**row, "time_s": None, "why": why})
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                print(".", end="", file=sys.stderr, flush=True)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
