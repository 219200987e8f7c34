"""Time torch's collectives over gloo between processes of this machine (TCP over its loopback), and write them down.

    torchrun --nproc-per-node 2 validation/measure/measure_gloo.py gloo_loopback.tsv     # adds its rows to the file

Tensors are fp32 in host memory. A row: what the busiest rank and what all of them sent, over TCP with gloo's headers,
by the kernel's count; the median and the least time of a call, of the slowest rank. Needs torch; Linux.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
import warnings
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from validation.real.gloo import Call, calls, sent_in

SIZES = [2**power for power in range(8, 27, 2)]
HEAD = "kind\tranks\ttensor_bytes\tmost_sent_bytes\tall_sent_bytes\tmedian_us\tleast_us"


def measure(kind: str, call: Call, size: int) -> tuple[float, float, list[int]]:
    """Return (median, least) seconds of a call, of the slowest rank, and the bytes that each rank sent in one."""
    for _ in range(2):
        call()
    mine = torch.tensor([sent_in(call)])
    every = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    repeats = 300 if size <= 2**16 else 80 if size <= 2**22 else 20
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(times)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    messages = 2 if kind == "send" else 1
    values = [value / messages for value in slowest.tolist()]
    return statistics.median(values), min(values), [int(one.item()) for one in every]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    kernel = platform.release().partition("-")[0]
    return f"{model}, {os.cpu_count()} cores, Linux {kernel}, torch {torch.__version__}"


def main(path: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    lines = []
    for size in SIZES:
        for kind, call in calls(size).items():
            median_s, least_s, sent = measure(kind, call, size)
            figures = (
                dist.get_world_size(),
                size,
                max(sent),
                sum(sent),
                f"{median_s * 1e6:.1f}",
                f"{least_s * 1e6:.1f}",
            )
            lines.append("\t".join([kind, *map(str, figures)]))
    if dist.get_rank() == 0:
        out = Path(path)
        known = out.read_text() if out.is_file() else ""
        head = [f"# {machine()}; {date.today()}", *([] if HEAD in known else [HEAD])]
        out.write_text(known + "\n".join([*head, *lines]) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
