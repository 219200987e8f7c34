"""The allocator's history as a PyTorch memory snapshot, which pytorch.org/memory_viz and torch.cuda._memory_viz open.

The schema is that of ``torch.cuda.memory._snapshot()`` (torch/cuda/memory.py, c10/cuda/CUDACachingAllocator.cpp:
``SegmentInfo``, ``BlockInfo``, ``TraceEntry``). The viewer reads pickle protocols 2 to 4.
"""

from __future__ import annotations

import pickle
from typing import Any

from sim.ir.footprint import BlockEvent, Footprint, Segment

PROTOCOL = 4


def snapshot_bytes(footprint: Footprint) -> bytes:
    """Return the snapshot of one rank, pickled. It must have been recorded (``events`` and ``segments``)."""
    return pickle.dumps(snapshot(footprint), protocol=PROTOCOL)


def snapshot(footprint: Footprint) -> dict[str, Any]:
    """Return the snapshot as plain data."""
    streams = _stream_numbers(footprint)
    return {
        "segments": [_segment(segment, streams) for segment in footprint.segments],
        "device_traces": [[_event(event, streams, time) for time, event in enumerate(footprint.events)]],
        "allocator_settings": {},
        "external_annotations": [],
    }


def _stream_numbers(footprint: Footprint) -> dict[str, int]:
    """Number streams as CUDA shows them: 0 is the default one, the others follow by first use."""
    names = [e.stream for e in footprint.events] + [s.stream for s in footprint.segments]
    return {name: number for number, name in enumerate(dict.fromkeys(["compute", *names]))}


def _segment(segment: Segment, streams: dict[str, int]) -> dict[str, Any]:
    blocks = [
        {
            "address": address,
            "size": num_bytes,
            "requested_size": requested,
            "state": state,
            "frames": _frames(name, "", "") if name else [],
        }
        for address, num_bytes, requested, state, name in segment.blocks
    ]
    allocated = sum(b["size"] for b in blocks if b["state"] == "active_allocated")  # type: ignore[misc]
    active = sum(b["size"] for b in blocks if b["state"] != "inactive")  # type: ignore[misc]
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.num_bytes,
        "allocated_size": allocated,
        "active_size": active,
        "requested_size": sum(b["requested_size"] for b in blocks if b["state"] == "active_allocated"),
        "stream": streams[segment.stream],
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": segment.expandable,
        "frames": [],
        "blocks": blocks,
    }


def _event(event: BlockEvent, streams: dict[str, int], time: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "action": event.action,
        "size": event.num_bytes,
        "stream": streams[event.stream],
        "time_us": time,
        "compile_context": "N/A",
        "user_metadata": "",
        "pool_id": (0, 0),
        "frames": _frames(event.name, event.module, f"{event.step} step, {event.phase}"),
    }
    if event.action == "oom":
        entry["device_free"] = 0
    else:
        entry["addr"] = event.address
    return entry


def _frames(name: str, module: str, phase: str) -> list[dict[str, Any]]:
    """Say whose block it is in the place where the viewer shows a Python stack, innermost first."""
    return [{"filename": where, "line": 0, "name": what} for where, what in ((module, name), ("", phase)) if what]
