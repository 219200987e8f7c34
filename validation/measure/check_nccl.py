"""Hold the times of NCCL's collectives against measured ones; fit the coefficients of sim/cost/nccl/terms.py.

    python validation/measure/check_nccl.py DATA.tsv.gz ... [--write] [--rows] [--system h100-sxm]

DATA is one of two tables, told apart by their columns:

* one node: system, nccl_dir_version, op, dtype, gpus, elements, bytes, latency_us. The published coefficients come from
  ai-dynamo/aiconfigurator (Apache-2.0), systems/data/*/nccl, at commit 095f58a51, 16-bit rows of the newest NCCL.
* several nodes: log, test, ranks, hosts, bytes, time_us, busbw_GBps: nccl-tests logs of xxrjun/nccl-tests-cluster at
  commit 455de4f (Apache-2.0). Only the rates over the network come from it (the constants ``P2P_NET_*`` of
  sim/cost/nccl and the ``net`` entries of nccl_h100_sxm.yaml); its single-node rows are never fitted.

Without ``--write`` nothing is fitted: the errors of the simulator as it stands are printed, by system, collective,
number of GPUs and size. With it, coefficients are fitted on four rows in five (by a checksum of the row) from 512 B up
and written; errors of the fifth are those of rows that the fit did not see. The fit is linear least squares of the
relative error, no coefficient below zero, reweighted towards the mean absolute error. A row belongs to the algorithm
that NCCL's model chooses for it.

Left out: L40S (its host passes 20, 5 and 1.5 GB/s between 2, 4 and 8 GPUs: nothing that a topology would say), and the
site ``cluster00``, whose NICs move a quarter of what the same ones move elsewhere.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import re
import statistics
import zlib
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.catalog import load
from sim.cluster.topology import Cluster, build_cluster
from sim.cost.nccl import terms as nccl_terms
from sim.cost.nccl.durations import kernel_work, message_work
from sim.cost.nccl.messages import p2p_channels
from sim.cost.nccl.plan import plan_collective, plan_point_to_point
from sim.cost.nccl.rings import ring_graph
from sim.cost.nccl.tuning import HW_LATENCY_US, choose, sms_of
from sim.ir.traffic import Traffic
from sim.scenario.schema import ClusterSpec

MEASURED = Path(__file__).parents[2] / "sim/catalog/measured"
NODES = {
    "a100-sxm": "dgx-a100-80gb", "h100-sxm": "dgx-h100", "h200-sxm": "dgx-h200", "b200-sxm": "dgx-b200",
    "b300-sxm": "dgx-b300", "gb200": "gb200-nvl72", "gb300": "gb300-nvl72",
    "rtx-pro-6000": "pcie-8x-rtx-pro-6000-pairs",
}  # fmt: skip
KINDS = {"alltoall": "all_to_all", "sendrecv": "send"}
BANDS = ((65536, "< 64 KiB"), (2**20, "64 KiB - 1 MiB"), (2**26, "1 - 64 MiB"), (2**62, ">= 64 MiB"))
FIT_FROM = 512


class Row(NamedTuple):
    system: str
    version: str
    kind: str
    gpus: int
    """On each node."""
    nodes: int
    tensor_bytes: int
    time_s: float
    site: str

    @property
    def held_out(self) -> bool:
        return zlib.crc32(f"{self.system} {self.kind} {self.gpus} {self.tensor_bytes}".encode()) % 5 == 0


def read(path: Path) -> list[Row]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    table = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    found: dict[Row, list[float]] = defaultdict(list)
    for line in table:
        if "system" in line:
            name = line["system"].replace("_server", "").replace("_", "-")
            if line["dtype"] != "half" or name not in NODES:
                continue
            row = Row(name, line["nccl_dir_version"], KINDS.get(line["op"], line["op"]), int(line["gpus"]), 1,
                      int(line["bytes"]), 0.0, "one node")  # fmt: skip
            found[row].append(float(line["latency_us"]) * 1e-6)
        else:
            log = next(value for key, value in line.items() if key.startswith("log"))
            shape = re.search(r"N(\d+)_G(\d+)", log)
            site = re.search(r"cluster\d+", log)
            if shape is None or site is None or site[0] == "cluster00":
                continue
            kind = line["test"].removesuffix("_perf")
            row = Row("h100-sxm", line["nccl_lib"], KINDS.get(kind, kind), int(shape[2]), int(shape[1]),
                      int(line["bytes"]), 0.0, site[0])  # fmt: skip
            found[row].append(float(line["time_us"]) * 1e-6)
    rows = [row._replace(time_s=statistics.median(times)) for row, times in found.items()]
    newest = {row.system: "0" for row in rows}
    for row in rows:
        if row.site == "one node":
            newest[row.system] = max(
                newest[row.system], row.version, key=lambda v: [int(float(x)) for x in v.split(".")]
            )
    return sorted(row for row in rows if row.site != "one node" or row.version == newest[row.system])


@cache
def machine(system: str, gpus: int, nodes: int) -> Cluster:
    node = load.node(NODES[system])
    trays = max(1, -(-gpus // node.num_gpus)) * nodes
    network = load.network(node.default_network) if node.default_network else None
    return build_cluster(
        ClusterSpec(node=node, gpu=load.gpu(node.gpu), network=network, num_nodes=trays, num_gpus=trays * node.num_gpus)
    )


def ranks(cluster: Cluster, row: Row) -> tuple[int, ...]:
    return tuple(node * cluster.gpus_per_domain + gpu for node in range(row.nodes) for gpu in range(row.gpus))


def plan(row: Row) -> tuple[Cluster, Traffic]:
    cluster = machine(row.system, row.gpus, row.nodes)
    group = ranks(cluster, row)
    if row.kind == "send":
        pairs = [(gpu, group[(i + 1) % len(group)]) for i, gpu in enumerate(group)]
        return cluster, plan_point_to_point(cluster, pairs, row.tensor_bytes, len(group))
    return cluster, plan_collective(cluster, [group], row.kind, row.tensor_bytes)


def predicted_s(row: Row) -> tuple[float, str]:
    """Return the time on idle wires, and the algorithm."""
    cluster, traffic = plan(row)
    total = 0.0
    for phase in traffic.phases:
        slowest = max((num_bytes / cluster.bytes_per_s(link) for link, num_bytes in phase.loads), default=0.0)
        if phase.max_bytes_per_s:
            slowest = max(slowest, phase.stream_bytes / phase.max_bytes_per_s)
        total += phase.latency_s + slowest
    return total, traffic.algorithm


# --- fitting -----------------------------------------------------------------------------------


def terms_of(row: Row) -> tuple[str, str, tuple[float, ...]]:
    """Return (hw, name, terms) of a row, by the functions that the simulator uses."""
    cluster = machine(row.system, row.gpus, row.nodes)
    group = ranks(cluster, row)
    if row.kind == "all_to_all":
        channels = p2p_channels(cluster, len(group), len(group), row.tensor_bytes / len(group), False)
        hw, work = message_work(cluster, group, row.tensor_bytes, channels)
        return hw, "p2p", nccl_terms.terms_of("p2p", hw, work)
    graph = ring_graph(cluster, group)
    choice = choose(cluster, graph, row.kind, row.tensor_bytes)
    channels = sms_of(cluster, graph, choice, row.tensor_bytes)
    hw, work = kernel_work(cluster, graph, choice.name, row.kind, row.tensor_bytes, channels)
    return hw, choice.name, nccl_terms.terms_of(choice.name, hw, work)


def wires_s(row: Row) -> float:
    """Return what the NICs need for a row."""
    cluster, traffic = plan(row)
    loads = traffic.phases[0].loads
    return max((num / cluster.bytes_per_s(link) for link, num in loads if cluster.is_nic(link)), default=0.0)


def fit(rows: list[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    groups: dict[tuple[str, str], list[tuple[Row, tuple[float, ...]]]] = defaultdict(list)
    for row in rows:
        if row.tensor_bytes >= FIT_FROM and (
            row.nodes == 1 or row.kind in ("all_reduce", "all_gather", "reduce_scatter")
        ):
            hw, name, terms = terms_of(row)
            if name in nccl_terms.TERMS:
                groups[hw, name].append((row, terms))
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for (hw, name), members in sorted(groups.items()):
        seen = [(row, terms) for row, terms in members if not row.held_out]
        if len(seen) < len(nccl_terms.TERMS[name]) // 2 + 1:
            continue
        x = _solve(hw, name, seen)
        entry: dict[str, Any] = {}
        for term, value in zip(nccl_terms.TERMS[name], x, strict=True):
            if value <= 0:
                continue
            if term in nccl_terms.TIMES:
                entry[term] = f"{value * 1e6:.4g} us"
            elif term == "share":
                entry[term] = float(f"{1 / value:.4g}")
            else:
                entry[term] = f"{1e-9 / value:.4g} GB/s"
        entries.setdefault(hw, {})[name] = entry
    return entries


def _solve(hw: str, name: str, seen: list[tuple[Row, tuple[float, ...]]]) -> Any:
    """Return coefficients, none below zero, that bring the sums nearest to the measured times.

    Over the network the bytes take what NICs or local wires need, whichever is more: rows that the NICs bind say
    nothing of the wires, and are left out of the rate. LL128 inside a node is chosen for few sizes: too few rows to
    tell more than a start, and hop and share are left at NCCL's own figures.
    """
    times = np.array([row.time_s for row, _ in seen])
    terms = np.array([terms for _, terms in seen]) / times[:, None]
    target = np.ones(len(seen))
    if hw == "net":
        at = nccl_terms.TERMS[name].index("share")
        full = np.array([row.gpus == max(r.gpus for r, _ in seen) for row, _ in seen])
        terms[~full, at] = 0.0
        target -= np.where(full, 0.0, [wires_s(row) / row.time_s for row, _ in seen])
    fixed = np.zeros(terms.shape[1])
    if name == "ring/LL128" and hw != "net":
        at = nccl_terms.TERMS[name].index("hop")
        fixed[at] = HW_LATENCY_US["nvlink" if hw == "nvlink" else "pci"]["ring"][1] * 1e-6
        fixed[nccl_terms.TERMS[name].index("share")] = 1 / 0.92
        target -= terms @ fixed
        terms[:, 1:] = 0.0
    weights = np.ones(len(seen))
    for _ in range(8):
        keep = [i for i in range(terms.shape[1]) if terms[:, i].any()]
        while True:
            x = np.linalg.lstsq(terms[:, keep] * weights[:, None], target * weights, rcond=None)[0]
            if (x >= 0).all() or len(keep) == 1:
                break
            keep.pop(int(x.argmin()))
        full_x = np.zeros(terms.shape[1])
        full_x[keep] = np.maximum(x, 0)
        weights = 1 / np.sqrt(np.maximum(abs(terms @ full_x - target), 0.02))
    return full_x + fixed


def write(
    system: str, entries: dict[str, dict[str, dict[str, Any]]], rows: list[Row], over: list[Row], source: str
) -> None:
    path = MEASURED / f"nccl_{system.replace('-', '_')}.yaml"
    lines = [
        "# Coefficients of sim/cost/nccl/terms.py. start, hop, turn, round, level, peer, simple are times; share is",
        "# that of the wires; the rest are rates.",
        f"gpu: {system}",
        f"source: {source}",
        f"date: '{datetime.date.today().isoformat()}'",
        "script: validation/measure/check_nccl.py",
    ]
    for hw, names in entries.items():
        lines.append(f"{hw}:")
        for name, entry in names.items():
            inside = ", ".join(f"{term}: {value}" for term, value in entry.items())
            lines.append(f"  {name}: {{{inside}}}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    nccl_terms._read.cache_clear()
    lines.append("collectives:  # from 64 KiB up")
    for where, members in (("one_node", rows), ("between_nodes", over)):
        errors = [(row, predicted_s(row)[0] / row.time_s - 1) for row in members if row.tensor_bytes >= 65536]
        for words, held in (("", True), ("_fitted_rows", False)):
            chosen = np.array([error for row, error in errors if row.held_out == held])
            if len(chosen):
                lines.append(
                    f"  residuals_{where}{words}: {{count: {len(chosen)}, median_abs: {np.median(abs(chosen)):.4f}, "
                    f"mean_abs: {np.mean(abs(chosen)):.4f}, mean_signed: {np.mean(chosen):.4f}, "
                    f"p90_abs: {np.quantile(abs(chosen), 0.9):.4f}}}"
                )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- errors ------------------------------------------------------------------------------------


def table(rows: list[Row], show_rows: bool) -> None:
    errors: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        time_s, algorithm = predicted_s(row)
        error = time_s / row.time_s - 1
        band = next(words for limit, words in BANDS if row.tensor_bytes < limit)
        shape = f"{row.gpus} GPUs" if row.nodes == 1 else f"{row.nodes} x {row.gpus}"
        key = (f"{row.site}, {row.system}", row.kind, shape, band)
        errors[key].append(error)
        if row.tensor_bytes >= 65536:
            whole = f"{row.site}" + (" (one node)" if row.site != "one node" and row.nodes == 1 else "")
            errors[f"{row.site}, {row.system}", row.kind, "all", "from 64 KiB"].append(error)
            errors["~ " + whole, "all", "all", "from 64 KiB"].append(error)
            errors["~ " + whole, row.kind, "all", "from 64 KiB"].append(error)
            if row.site == "one node":
                errors["~ held out" if row.held_out else "~ fitted", "all", "all", "from 64 KiB"].append(error)
        if show_rows:
            print(f"{row.system:12} {row.kind:14} {shape:8} {row.tensor_bytes:12} {row.time_s * 1e6:12.1f} us "
                  f"{time_s * 1e6:12.1f} us {error:+7.1%}  {algorithm}")  # fmt: skip
    print(
        f"{'where':28} {'collective':14} {'ranks':8} {'size':16} {'rows':>4} {'mean |e|':>8} {'bias':>7} {'worst':>7}"
    )
    for key in sorted(errors):
        values = errors[key]
        print(f"{key[0]:28} {key[1]:14} {key[2]:8} {key[3]:16} {len(values):4} {np.mean(np.abs(values)):8.1%} "
              f"{np.mean(values):+7.1%} {max(values, key=abs):+7.1%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="fit, and write sim/catalog/measured/nccl_*.yaml")
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--system", default="", help="only this one")
    arguments = parser.parse_args()
    rows = [row for path in arguments.data for row in read(path) if arguments.system in ("", row.system)]
    if arguments.write:
        for system in dict.fromkeys(row.system for row in rows):
            own = [row for row in rows if row.system == system]
            local = [row for row in own if row.site == "one node"]
            over = [row for row in own if row.nodes > 1]
            versions = sorted({row.version for row in local})
            words = f"ai-dynamo/aiconfigurator @095f58a51, systems/data (Apache-2.0), NCCL {', '.join(versions)}"
            entries = fit(local)
            if over:
                words += "; between nodes xxrjun/nccl-tests-cluster @455de4f, cluster01 (Apache-2.0)"
                entries |= {hw: e for hw, e in fit(over).items() if hw == "net"}
            write(system, entries, local, over, words)
    table(rows, arguments.rows)


if __name__ == "__main__":
    main()
