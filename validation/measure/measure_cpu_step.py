"""What a thread of the CPU takes for an element of an optimizer's step: DeepSpeed's CPU Adam, torch's AdamW and SGD,
and what DeepSpeed does around them where states are offloaded.

    python -m pip install torch deepspeed
    python validation/measure/measure_cpu_step.py > validation/measure/cpu_step_measured.yaml

Each kind runs on one thread and on two, on tensors that no cache holds. Of one thread it is the thread's own CPU time,
so that others on the machine do not count as waiting; of two it is the clock on the wall, and they do. Least and median
of the repeats, nanoseconds an element.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout

NUM_ELEMENTS = 64 * 2**20
SHARDS = 32
"""Tensors of torch's AdamW, as many elements each as an eighth of a 4096 by 4096 weight: FSDP steps on shards."""
NUM_REPEATS = 15


def works() -> dict[str, Callable[[], object]]:
    """Return what is measured, by the kind that the simulator has for it, on ``NUM_ELEMENTS`` elements."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    def parameters(count: int) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(NUM_ELEMENTS // count)) for _ in range(count)]
        for each in made:
            each.grad = torch.randn(NUM_ELEMENTS // count) * 1e-3
        return made

    def copied(dtype: torch.dtype) -> Callable[[], object]:
        target, source = torch.zeros(NUM_ELEMENTS, dtype=dtype), torch.randn(NUM_ELEMENTS)
        return lambda: target.copy_(source)

    def overflow() -> object:
        """``has_overflow`` of ZeRO-3's partition: DeepSpeedZeroOptimizer_Stage3._has_inf_or_nan."""
        return half.isinf().any() | half.isnan().any()

    scaled, half = torch.randn(NUM_ELEMENTS), torch.randn(NUM_ELEMENTS).to(torch.bfloat16)
    torch.set_grad_enabled(False)
    return {
        "cpu_adam": DeepSpeedCPUAdam(parameters(1), lr=1e-4, weight_decay=0.1).step,
        "cpu_torch_adam": torch.optim.AdamW(parameters(SHARDS), lr=1e-4, weight_decay=0.1).step,
        "cpu_torch_fused_adam": torch.optim.AdamW(parameters(SHARDS), lr=1e-4, weight_decay=0.1, fused=True).step,
        "cpu_sgd": torch.optim.SGD(parameters(1), lr=1e-4).step,
        "cpu_scale": lambda: scaled.mul_(0.999),
        "cpu_copy": copied(torch.float32),
        "cpu_cast_bf16": copied(torch.bfloat16),
        "cpu_cast_fp16": copied(torch.float16),
        "cpu_overflow": overflow,
    }


def element_ns(work: Callable[[], object], clock: Callable[[], float]) -> tuple[float, float]:
    """Return the least and the median time of ``work``, in nanoseconds an element."""
    work()
    times = []
    for _ in range(NUM_REPEATS):
        start = clock()
        work()
        times.append((clock() - start) / NUM_ELEMENTS * 1e9)
    return min(times), statistics.median(times)


def processor() -> str:
    """Return what ``lscpu`` calls the processor, and its family and model."""
    out = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    facts = dict(line.split(":", 1) for line in out.splitlines() if ":" in line)
    return ", ".join(f"{key.lower()} {facts[key].strip()}" for key in ("Model name", "CPU family", "Model", "CPU(s)"))


def main() -> None:
    out = sys.stdout
    with redirect_stdout(sys.stderr):  # DeepSpeed's log, and its compiler's
        import deepspeed
        import torch

        made = works()
    print(f"date: {datetime.date.today().isoformat()}", file=out)
    print(f"processor: {processor()!r}", file=out)
    print(f"capability: {torch.backends.cpu.get_cpu_capability()}", file=out)
    print(
        f"versions: {{python: {platform.python_version()}, torch: {torch.__version__}, "
        f"deepspeed: {deepspeed.__version__}}}",
        file=out,
    )
    print(f"num_elements: {NUM_ELEMENTS}\nelement_ns:  # [least, median] of {NUM_REPEATS}", file=out)
    for name, work in made.items():
        row = []
        for threads, clock in ((1, time.process_time), (2, time.perf_counter)):
            torch.set_num_threads(threads)
            least, median = element_ns(work, clock)
            row.append(f"threads_{threads}: [{least:.3f}, {median:.3f}]")
        print(f"  {name}: {{{', '.join(row)}}}", file=out, flush=True)


if __name__ == "__main__":
    main()
