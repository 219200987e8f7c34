"""The report as a person reads it in a terminal, 80 columns and more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from rich.table import Table
from rich.text import Text

from sim.ir.footprint import CATEGORIES, Footprint
from sim.report.report import Report
from sim.scenario.schema import Scenario
from sim.units import format_bytes, format_duration, format_flops, format_rate, format_si, seconds

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 24
PART_WORDS = {
    "compute": "compute",
    "exposed_communication": "exposed communication",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "other": "waiting for the host",
}
BESIDE_WORDS = {
    "fragmentation": "fragmentation",
    "cuda_context": "CUDA context",
    "nccl": "NCCL",
    "libraries": "libraries",
}


class RemedyLike(Protocol):
    """What this page needs of a remedy."""

    @property
    def words(self) -> str: ...
    @property
    def overrides(self) -> tuple[str, ...]: ...
    @property
    def fits(self) -> bool: ...
    @property
    def peak_device_bytes(self) -> int: ...
    @property
    def time_s(self) -> float: ...


def print_report(console: Console, scenario: Scenario, report: Report, remedies: Sequence[RemedyLike]) -> None:
    """Print headline, memory, step, communication; where it does not fit, who holds it and what would help."""
    console.print()
    for line in headline(scenario, report):
        console.print(line, soft_wrap=False)
    for footprint in _classes_to_show(report):
        console.print()
        console.print(_memory(footprint, report))
    if not report.fits:
        console.print()
        for line in _out_of_memory(report, remedies):
            console.print(line)
    console.print()
    console.print(_step(report))
    if report.communication:
        console.print()
        console.print(_communication(report))


def headline(scenario: Scenario, report: Report) -> Iterable[Text]:
    """Yield the question and the answer, a line each."""
    cluster, parallelism, training = scenario.cluster, scenario.parallelism, scenario.training
    axes = [f"{axis} {size}" for axis in ("dp", "tp", "pp", "cp", "ep") if (size := getattr(parallelism, axis)) > 1]
    zero = f" ZeRO-{parallelism.zero}" if scenario.framework == "deepspeed" else ""
    machine = f"{cluster.num_nodes} x {cluster.node.name}" if cluster.num_nodes > 1 else cluster.node.name
    yield Text.assemble(
        (scenario.model.name or scenario.name, "bold"),
        f" on {report.world_size} {cluster.gpu.name} ({machine}) · {scenario.framework}{zero}",
        f" · {', '.join(axes) or 'one rank'}",
    )
    yield Text(
        f"sequences of {training.sequence_length:,} · microbatch {training.micro_batch_size} · "
        f"global batch {training.global_batch_size:,} · {training.precision} · recompute {training.recompute}",
        style="dim",
    )
    fullest = report.fullest
    lost = fullest.out_of_memory
    if report.fits:
        spare = report.capacity_bytes - fullest.peak_device_bytes
        yield Text.assemble(
            ("fits", "bold green"),
            f": {format_bytes(fullest.peak_device_bytes)} of {format_bytes(report.capacity_bytes)} ",
            f"on the fullest GPU, {format_bytes(spare)} to spare",
        )
    else:
        over = fullest.peak_device_bytes - report.capacity_bytes
        missing = max(over, lost.short_bytes if lost else 0)
        yield Text.assemble(
            ("does not fit", "bold red"),
            f": {format_bytes(missing)} over the {format_bytes(report.capacity_bytes)} of the fullest GPU",
        )
    plan = report.to_dict()["step"]
    yield Text.assemble(
        ("step ", ""),
        (format_duration(report.time_s), "bold"),
        f" · {format_si(plan['tokens_per_s'])}tokens/s ({format_si(plan['tokens_per_s_per_gpu'])}per GPU)"
        f" · {format_flops(plan['model_flops_per_s_per_gpu'])} per GPU · MFU {plan['mfu']:.1%}",
    )


def _classes_to_show(report: Report) -> list[Footprint]:
    """The fullest class, and where stages differ the first one of each."""
    fullest = report.fullest
    return [fullest, *(f for f in report.footprints if f is not fullest)][:4]


def _memory(footprint: Footprint, report: Report) -> Table:
    ranks = f"{len(footprint.ranks):,} ranks alike" if len(footprint.ranks) > 1 else f"rank {footprint.ranks[0]}"
    where = f"{footprint.peak_phase} of {footprint.peak_module}"
    step = {"first": ", first step", "setup": ", setup"}.get(footprint.peak_step, "")
    table = _table(f"Memory of a GPU at the peak ({where}{step}; {ranks})")
    table.add_column(min_width=22)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(min_width=BAR_WIDTH)
    whole = max(report.capacity_bytes, footprint.peak_device_bytes)

    def row(name: str, num_bytes: int, style: str = "", bar: bool = True) -> None:
        table.add_row(
            Text(name, style=style),
            Text(format_bytes(num_bytes), style=style),
            f"{num_bytes / report.capacity_bytes:.1%}",
            _bar(num_bytes / whole) if bar else "",
        )

    for category in CATEGORIES:
        if footprint.at_peak.get(category, 0):
            row(f"  {category}", footprint.at_peak[category])
    row("allocated by tensors", footprint.peak_allocated_bytes, "bold", bar=False)
    beside = dict(footprint.beside)
    row(f"  {BESIDE_WORDS['fragmentation']}", beside.pop("fragmentation", 0))
    row("reserved by the allocator", footprint.peak_reserved_bytes, "bold", bar=False)
    for name, num_bytes in beside.items():
        row(f"  {BESIDE_WORDS.get(name, name)}", num_bytes)
    row("device", footprint.peak_device_bytes, "bold", bar=False)
    if footprint.host_bytes:
        table.add_row(Text("host memory of the node", style="bold"), format_bytes(report.host_bytes_per_node), "", "")
    return table


def _out_of_memory(report: Report, remedies: Sequence[RemedyLike]) -> Iterable[Text | Table]:
    footprint = next(f for f in report.footprints if f.out_of_memory is not None)
    lost = footprint.out_of_memory
    assert lost is not None
    yield Text.assemble(
        ("out of memory ", "bold red"),
        f"in the {lost.step} step, {lost.phase} of {lost.module}: {lost.name} asks for "
        f"{format_bytes(lost.requested_bytes)}, {format_bytes(lost.short_bytes)} short",
    )
    holders = _table("Who holds it at the peak")
    holders.add_column()
    holders.add_column(justify="right")
    holders.add_column(justify="right")
    holders.add_column()
    for holder in footprint.holders[:6]:
        holders.add_row(
            f"  {holder.name}", f"{holder.count} x", format_bytes(holder.num_bytes), Text(holder.category, style="dim")
        )
    yield holders
    if not remedies:
        return
    fitting = any(remedy.fits for remedy in remedies)
    table = _table("What makes it fit (each simulated)" if fitting else "Nothing tried makes it fit; the nearest")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for remedy in remedies:
        table.add_row(
            f"  {remedy.words}", format_bytes(remedy.peak_device_bytes), f"{format_duration(remedy.time_s)} a step"
        )
        table.add_row(Text("    " + " ".join(f"--set {o}" for o in remedy.overrides), style="dim"), "", "")
    yield table


def _step(report: Report) -> Table:
    table = _table("Time of a step (the slowest rank)")
    table.add_column(min_width=22)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(min_width=BAR_WIDTH)
    for part, word in PART_WORDS.items():
        ticks = report.step_ticks[part]
        if not ticks and part == "bubble":
            continue
        share = ticks / report.time_ticks if report.time_ticks else 0.0
        table.add_row(f"  {word}", format_duration(seconds(ticks)), f"{share:.1%}", _bar(share))
    return table


def _communication(report: Report) -> Table:
    table = _table("Communication of a rank in a step")
    for name in ("  kind", "axis", "count", "bytes", "time", "exposed", "bus bandwidth", "algorithm"):
        table.add_column(name, justify="left" if name in ("  kind", "axis", "algorithm") else "right", no_wrap=True)
    table.show_header = True
    for total in report.communication:
        time_s = seconds(total.time)
        table.add_row(
            f"  {total.kind}",
            total.axis,
            f"{total.count:,}",
            format_bytes(total.tensor_bytes),
            format_duration(time_s),
            format_duration(seconds(total.exposed)),
            format_rate(total.wire_bytes / time_s) if time_s else "-",
            total.algorithm,
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold cyan", header_style="dim", box=None, show_header=False,
        pad_edge=False, padding=(0, 2, 0, 0),
    )  # fmt: skip


def _bar(share: float) -> Text:
    """Return a bar of eighths: full width is 1."""
    eighths = round(max(0.0, min(1.0, share)) * BAR_WIDTH * 8)
    full, rest = divmod(eighths, 8)
    return Text("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else ""), style="cyan")
