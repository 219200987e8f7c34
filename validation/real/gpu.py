"""What a GPU says beside the exact bytes: its allocator, driver, clock and profiler."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path
from typing import Any

import torch


def reset() -> None:
    """Forget the peaks so far: those of model building are not those of training."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()


def memory() -> dict[str, int]:
    """Return the peaks since :func:`reset` and what is held now, bytes.

    ``device``: what the driver says is in use on the whole GPU (``cudaMemGetInfo``), with the contexts and buffers of
    libraries; alone on the GPU it is this process'. ``host`` is the largest resident set of the process.
    """
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_bytes": stats["allocated_bytes.all.peak"],
        "peak_requested_bytes": stats["requested_bytes.all.peak"],
        "peak_reserved_bytes": stats["reserved_bytes.all.peak"],
        "inactive_split_bytes": stats["inactive_split_bytes.all.peak"],
        "num_alloc_retries": stats["num_alloc_retries"],
        "device_bytes": total - free,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def timed(step: Any, num_steps: int) -> list[float]:
    """Return the seconds of each of so many steps, by CUDA's events."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def communication_s(step: Any) -> dict[str, float]:
    """Return the seconds that NCCL's kernels ran in one step, and how much of it no other kernel ran beside."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    spans = [
        ("nccl" in event.name.lower(), event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return exposed(spans)


def exposed(spans: list[tuple[bool, float, float]]) -> dict[str, float]:
    """Return the length of the union of the communication spans, and of what no other span covers; us in, s out."""
    communication = union([(a, b) for ours, a, b in spans if ours])
    other = union([(a, b) for ours, a, b in spans if not ours])
    whole = sum(b - a for a, b in communication)
    covered = sum(max(0.0, min(b, d) - max(a, c)) for a, b in communication for c, d in other)
    return {"communication_s": whole / 1e6, "exposed_communication_s": (whole - covered) / 1e6}


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the same points as spans that do not touch, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def snapshot(step: Any, path: Path) -> None:
    """Write the allocator's history of one step, for ``python -m torch.cuda._memory_viz``."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    step()
    torch.cuda.synchronize()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": _driver(),
    }


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else "unknown"
