"""What ``sim run --memory`` shows: memory at the peak, by module, by phase, by kind, from the allocator's record.

A record has every allocation with its category, module and phase, so each view is one pass over it. Bytes are as
requested; the allocator's rounding stands in the report's account. Modules are the layers as the program marks them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sim.ir.footprint import CATEGORIES, BlockEvent, Footprint
from sim.report.layout import Cell, Line, Screen, grid, title
from sim.units import format_bytes, format_duration

VIEWS = ("at-peak", "by-module", "by-phase", "by-kind")
_KINDS = CATEGORIES[:-1]
MAX_ROWS = 24


@dataclass(slots=True)
class _Held:
    """What one module, phase or kind holds: now, at its own most, at the step's peak, and after the last forward."""

    now: int = 0
    most: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    after_forward: int = 0


def memory_views(footprint: Footprint) -> dict[str, Any]:
    """Return all views of one rank's recorded footprint as plain data.

    ``at_peak``: names that hold most; ``by_module``: for each module the bytes at the peak by kind, the most that it
    ever holds, and what is left of it when forward ends; ``by_phase``: of each phase of each step the peak and its
    kinds; ``by_kind``: of each kind the most it ever holds, when, and its bytes at the peak.
    """
    modules: dict[str, _Held] = {}
    kinds: dict[str, _Held] = {kind: _Held() for kind in _KINDS}
    phases: dict[tuple[str, str], tuple[int, dict[str, int], str]] = {}
    when: dict[str, str] = {}
    live: dict[int, BlockEvent] = {}
    total, peak, after = 0, _peak_index(footprint), _last_forward(footprint)
    for index, event in enumerate(footprint.events):
        if event.action == "alloc":
            live[event.address] = event
            sign, made = 1, event
        elif event.action == "free_completed" and event.address in live:
            sign, made = -1, live.pop(event.address)
        else:
            continue
        size = sign * made.num_bytes
        total += size
        module, kind = modules.setdefault(_module(made), _Held()), kinds[made.category]
        for held in (module, kind):
            held.now += size
        module.most = max(module.most, module.now)
        if kind.now > kind.most:
            kind.most, when[made.category] = kind.now, f"{event.phase} of {event.module}".strip()
        key = (event.step, event.phase)
        if total > phases.get(key, (0, {}, ""))[0]:
            phases[key] = (total, {name: held.now for name, held in kinds.items()}, event.module)
        if index == peak:
            _note_peak(live, modules, kinds)
        if index == after:
            for held in modules.values():
                held.after_forward = held.now
    return {
        "at_peak": [
            {"name": h.name, "category": h.category, "module": h.module, "phase": h.phase, "count": h.count,
             "bytes": h.num_bytes}
            for h in footprint.holders
        ],
        "by_module": [
            {"module": name, "at_peak_bytes": sum(held.at_peak.values()), "at_peak": held.at_peak,
             "most_bytes": held.most, "after_forward_bytes": held.after_forward}
            for name, held in modules.items()
        ],
        "by_phase": [
            {"step": step, "phase": phase, "peak_bytes": most, "in": module, "by_kind": by_kind}
            for (step, phase), (most, by_kind, module) in phases.items()
        ],
        "by_kind": [
            {"kind": name, "at_peak_bytes": sum(held.at_peak.values()), "most_bytes": held.most,
             "most_in": when.get(name, "")}
            for name, held in kinds.items()
        ],
    }  # fmt: skip


def _note_peak(live: dict[int, BlockEvent], modules: dict[str, _Held], kinds: dict[str, _Held]) -> None:
    for each in live.values():
        for held in (modules[_module(each)], kinds[each.category]):
            held.at_peak[each.category] = held.at_peak.get(each.category, 0) + each.num_bytes


def _module(event: BlockEvent) -> str:
    return event.module or event.phase


def _peak_index(footprint: Footprint) -> int:
    """Return the event after which most is live in the step of the peak."""
    total = most = 0
    found = -1
    live: dict[int, int] = {}
    for index, event in enumerate(footprint.events):
        if event.action == "alloc":
            live[event.address] = event.num_bytes
            total += event.num_bytes
        elif event.action == "free_completed":
            total -= live.pop(event.address, 0)
        if event.step == footprint.peak_step and total > most:
            most, found = total, index
    return found


def _last_forward(footprint: Footprint) -> int:
    """Return the last event of a forward pass in the step of the peak."""
    steps = [i for i, e in enumerate(footprint.events) if e.step == footprint.peak_step and e.phase == "forward"]
    return steps[-1] if steps else -1


def print_views(screen: Screen, views: dict[str, Any], view: str) -> None:
    """Print one view as a table."""
    screen.show([(), *_lines(views, view, min(screen.width, 140))])


def _lines(views: dict[str, Any], view: str, width: int) -> Iterator[Line]:
    rows: list[tuple[Cell, ...]] = []
    header: tuple[str, ...]
    if view == "at-peak":
        yield title("Who holds memory at the peak", "of the fullest rank")
        rows += [
            (
                h["name"],
                f"{h['count']} x",
                format_bytes(h["bytes"]),
                h["category"],
                f"{h['phase']} {h['module']}".strip(),
            )
            for h in views["at_peak"][:MAX_ROWS]
        ]
        header, align = ("name", "count", "bytes", "kind", "made in"), "lrrll"
    elif view == "by-module":
        yield title("Memory by module", "of the fullest rank; at the peak, at most, and when forward ends")
        order = sorted(views["by_module"], key=lambda m: (-m["at_peak_bytes"], m["module"]))
        rows += [
            (m["module"], format_bytes(m["at_peak_bytes"]), *(_size(m["at_peak"].get(kind, 0)) for kind in _KINDS),
             format_bytes(m["most_bytes"]), _size(m["after_forward_bytes"]))
            for m in order[:MAX_ROWS]
        ]  # fmt: skip
        header, align = ("module", "at peak", *_KINDS, "at most", "after forward"), "l" + "r" * (len(_KINDS) + 3)
    elif view == "by-phase":
        yield title("Memory by phase", "of the fullest rank; its own peak in each")
        rows += [
            (f"{p['step']} {p['phase']}", p["in"], format_bytes(p["peak_bytes"]),
             *(_size(p["by_kind"].get(kind, 0)) for kind in _KINDS))
            for p in views["by_phase"]
        ]  # fmt: skip
        header, align = ("phase", "in", "peak", *_KINDS), "ll" + "r" * (len(_KINDS) + 1)
    else:
        yield title("Memory by kind", "of the fullest rank")
        rows += [
            (k["kind"], _size(k["at_peak_bytes"]), format_bytes(k["most_bytes"]), k["most_in"])
            for k in views["by_kind"]
        ]
        header, align = ("kind", "at peak", "at most", "most in"), "lrrl"
    yield from grid([[(name, "dim") for name in header], *rows], align, width)


def _size(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes else ""


def print_answers(screen: Screen, memory: dict[str, Any], time_s: float, answers: list[dict[str, Any]]) -> None:
    """Print what each change does to memory and time, beside the scenario as it is."""
    rows: list[tuple[Cell, ...]] = [
        ("as it is", format_bytes(memory["peak_allocated_bytes"]), "", format_bytes(memory["peak_device_bytes"]), "",
         format_duration(time_s), "")
    ]  # fmt: skip
    for answer in answers:
        words = " ".join(answer["set"])
        if "problem" in answer:
            rows.append((words, answer["problem"], "", "", "", "", ""))
            continue
        allocated, device = answer["peak_allocated_bytes"], answer["peak_device_bytes"]
        rows.append(
            (words, format_bytes(allocated), _change(allocated, memory["peak_allocated_bytes"]), format_bytes(device),
             _change(device, memory["peak_device_bytes"]), format_duration(answer["time_s"]),
             "" if answer["fits"] else "does not fit")
        )  # fmt: skip
    header = [(name, "dim") for name in ("what if", "allocated", "", "device", "", "a step", "")]
    screen.show([(), title("What if"), *grid([header, *rows], "lrrrrrl", min(screen.width, 140))])


def _change(now: int, before: int) -> str:
    return f"{now / before - 1:+.1%}" if before else ""
