"""Measure scenarios with the real frameworks: the same file that ``sim run`` reads, really trained for a few steps.

``python -m validation.real.measure SCENARIO... [--out runs.yaml] [--steps N]`` starts the ranks of each scenario on
this machine, on its GPUs or, where it has none, on the CPU with gloo. Under ``torchrun`` (or what else sets RANK and
WORLD_SIZE) each process is a rank of the scenarios, which then all have that many GPUs. ``--fake-world N --rank R``
measures rank R of a job of N ranks in one process: the real framework under torch's fake process group, whose
collectives return at once, with whatever is in the buffers. ``--fake-tensors`` computes nothing: tensors have shapes
and no bytes, so that the CPU measures models that it could not hold.

The answer is a file of measured runs, which ``sim validate`` reads. What a CPU can say exactly is in ``exact`` of each
run: bytes of states by category, live bytes at the borders of a step and the most in between, collectives and messages.
A GPU adds what its allocator, driver and profiler say (``validation/real/gpu.py``).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from sim.scenario.load import load_scenario
from sim.scenario.schema import Scenario
from validation.real.processes import ROOT, launch

NUM_STEPS = 4
"""Steps trained, of which the last counts: optimizers make their states in the first, ZeRO-3 checks its record in the
second, DDP builds the buckets of a static graph in the third."""


# --- one rank ------------------------------------------------------------------------------------


def measure_rank(scenario: Scenario, device: Any, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Train a few steps as this process' rank; return what the last one did.

    ``marks``: (border, number of collectives so far, live bytes, most live bytes since the one before) in order.
    """
    import torch

    from validation.real.jobs import make_job
    from validation.real.recorder import Recorder

    torch.manual_seed(0)
    gc.collect()
    recorder = Recorder()
    marks: list[tuple[str, int, int, int]] = []
    states: dict[str, int] = {}
    job: Any = None

    def note(border: str) -> None:
        if not counts:
            return
        if device.type == "cpu":
            time.sleep(0.01)  # gloo's threads let go of their tensors a moment after the call returns
        gc.collect()
        marks.append((border, len(recorder.collectives), recorder.live, recorder.peak))
        recorder.peak = recorder.live
        if border in ("backward", "step"):
            states.update({name: storage_bytes(tensors) for name, tensors in job.states().items()})

    counts = False
    with recorder:
        job = make_job(scenario, device)
        gc.collect()
        setup = recorder.live
        for step in range(num_steps):
            counts = step == num_steps - 1
            recorder.collectives.clear()
            recorder.peak = recorder.live
            job.step(note)
    found = {
        "setup": setup,
        "marks": marks,
        "states": states,
        "collectives": [each for each in recorder.collectives if each[2] > 1],
        "passes": getattr(job, "passes", []),
    }
    if hasattr(job, "close"):
        job.close()
    job = None
    gc.collect()
    return found


def storage_bytes(tensors: Sequence[Any]) -> int:
    """Return the bytes of their storages, each counted once."""
    from validation.real.recorder import SCALAR_BYTES

    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for size in storages.values() if size >= SCALAR_BYTES)


def start_rank(fake_world: int = 0, rank: int = 0) -> Any:
    """Join the process group that the environment tells of, or make a fake one; return this rank's device."""
    import torch
    import torch._dynamo  # before ZeRO-3's hooks: imported under a dispatch mode it fails

    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(1)
    if fake_world:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ.update(RANK=str(rank), WORLD_SIZE=str(fake_world), LOCAL_RANK="0", LOCAL_SIZE="1")
        torch.distributed.init_process_group("fake", rank=rank, world_size=fake_world, store=FakeStore())
    else:
        # a rank that failed leaves the others waiting: not for long on one machine
        patience = None if cuda else timedelta(seconds=60)
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    gc.collect()
    gc.freeze()  # what the imports made is not looked through again
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def worker(folder: str, paths: Sequence[str]) -> None:
    """What each process does that :func:`measure` starts: every scenario of its world size."""
    import torch

    device = start_rank()
    found = {}
    for path in paths:
        try:
            found[path] = measure_rank(load_scenario(path), device)
        except Exception:
            found[path] = {"error": traceback.format_exc()}  # the others go on: it is one launch for all
    (Path(folder) / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    with suppress(RuntimeError):  # somebody failed and is gone: what was found is written down
        torch.distributed.barrier()
    os._exit(0)  # frameworks' threads and destructors have nothing to add


# --- all ranks of a scenario ---------------------------------------------------------------------


def measure(scenarios: Mapping[str, Mapping[str, Any]], *, strict: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Measure scenarios, given as a file would give them: name -> what each rank found. One launch a world size.

    ``strict``: a scenario that fails is an error; else its ranks have ``error``, the traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        by_size: dict[int, dict[str, str]] = {}
        for number, (name, scenario) in enumerate(scenarios.items()):
            path = Path(folder) / f"{number}.yaml"
            path.write_text(yaml.safe_dump(dict(scenario)))
            by_size.setdefault(load_scenario(path).parallelism.world_size, {})[name] = str(path)
        found: dict[str, list[dict[str, Any]]] = {}
        for size, paths in by_size.items():
            ranks = launch(__file__, list(paths.values()), size, timeout_s=600)
            found.update({name: [each[path] for each in ranks] for name, path in paths.items()})
        failed = [f"{name}: {rank['error']}" for name, ranks in found.items() for rank in ranks if "error" in rank]
        if strict and failed:
            raise RuntimeError("\n".join(failed))
        return found


# --- a file of measured runs ---------------------------------------------------------------------


def measure_device(
    scenario: Scenario, device: Any, num_steps: int, snapshots: Path | None, name: str
) -> dict[str, Any]:
    """Train as this process' rank, on a GPU with nothing in the way; return what its allocator, driver and clock say.

    Times are left out under a fake process group, whose collectives take none.
    """
    from torch.distributed import get_backend

    from validation.real import gpu
    from validation.real.jobs import make_job

    def step() -> None:
        job.step(lambda border: None)

    job = make_job(scenario, device)
    gpu.reset()
    step()  # makes the optimizer's states
    found: dict[str, Any] = {"first_step": gpu.memory()}
    for _ in range(num_steps - 1):
        step()
    found["memory"] = gpu.memory()
    if get_backend() != "fake":
        times = gpu.timed(step, num_steps)
        found["step_times_s"] = times
        found |= gpu.communication_s(step)
    if snapshots is not None:
        snapshots.mkdir(parents=True, exist_ok=True)
        found["snapshot"] = f"{name}.{os.environ.get('RANK', '0')}.pickle"
        gpu.snapshot(step, snapshots / found["snapshot"])
    if hasattr(job, "close"):
        job.close()
    return found


def row(name: str, given: dict[str, Any], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one run of a file of measured runs. ``ranks`` are what some or all of the ranks found."""
    on_gpu = [rank["device"] for rank in ranks if "device" in rank]
    measured: dict[str, Any] = {}
    if on_gpu:
        fullest = max(on_gpu, key=lambda each: each["memory"]["peak_allocated_bytes"])
        measured = {
            "peak_allocated_bytes": fullest["memory"]["peak_allocated_bytes"],
            "peak_reserved_bytes": max(each["memory"]["peak_reserved_bytes"] for each in on_gpu),
            "peak_device_bytes": max(each["memory"]["device_bytes"] for each in on_gpu),
        }
        if "step_times_s" in fullest:
            slowest = [max(times) for times in zip(*(each["step_times_s"] for each in on_gpu), strict=True)]
            measured["step_time_s"] = sorted(slowest)[len(slowest) // 2]
    exact = [exact_of(rank) | ({"device": rank["device"]} if "device" in rank else {}) for rank in ranks]
    return {"id": name, "scenario": given, "measured": measured, "exact": {"ranks": exact}}


def exact_of(rank: dict[str, Any]) -> dict[str, Any]:
    """Return what of one rank is exact, collectives of a kind and a group together."""
    totals: dict[tuple[str, int], list[int]] = {}
    for kind, size, num_ranks in rank["collectives"]:
        total = totals.setdefault((kind, num_ranks), [0, 0])
        total[0] += 1
        total[1] += size
    return {
        "rank": rank.get("rank", 0),
        "setup_bytes": rank["setup"],
        "states_bytes": rank["states"],
        "peak_live_bytes": max(peak for _, _, _, peak in rank["marks"]),
        "borders": [
            {"after": border, "live_bytes": live, "peak_live_bytes": peak} for border, _, live, peak in rank["marks"]
        ],
        "collectives": [
            {"kind": kind, "ranks": num_ranks, "count": count, "tensor_bytes": size}
            for (kind, num_ranks), (count, size) in totals.items()
        ],
    }


def write_runs(path: Path, rows: Sequence[dict[str, Any]], notes: Mapping[str, Any]) -> None:
    source = {"title": "validation/real/measure.py", "date": datetime.now(tz=UTC).date().isoformat(), **notes}
    path.write_text(yaml.safe_dump({"source": source, "runs": list(rows)}, sort_keys=False, width=120))


def software() -> dict[str, Any]:
    """Return the versions that the figures depend on, and the GPU's where there is one."""
    import torch

    found: dict[str, Any] = {"versions": {name: version(name) for name in ("torch", "deepspeed") if _installed(name)}}
    if torch.cuda.is_available():
        from validation.real import gpu

        return found | {"machine": gpu.machine()}
    return found | {"machine": {"cpu": platform.processor() or platform.machine()}}


def _installed(name: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(name))
    return False


def as_rank(options: argparse.Namespace) -> None:
    """Measure every scenario as one rank of this job; rank 0 writes the file."""
    import torch

    from validation.real import jobs

    device = start_rank(options.fake_world, options.rank)
    if options.fake_tensors:
        jobs.use_fake_tensors()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = []
    for path in options.scenarios:
        scenario = load_scenario(path)
        if scenario.parallelism.world_size != size:
            sys.exit(f"{path} has {scenario.parallelism.world_size} ranks, this job {size}")
        found: dict[str, Any] = {"rank": rank}
        if device.type == "cuda" and not options.fake_tensors:
            found["device"] = measure_device(scenario, device, options.steps, options.snapshots, path.stem)
            gc.collect()
            torch.cuda.empty_cache()
        found |= measure_rank(scenario, device, options.steps)
        ranks: list[Any] = [found]
        if not options.fake_world:
            ranks = [None] * size
            torch.distributed.all_gather_object(ranks, found)
        rows.append(row(path.stem, yaml.safe_load(path.read_text()), ranks))
    if options.fake_world or rank == 0:
        notes = {"fake_world": {"ranks": size, "rank": rank}} if options.fake_world else {}
        write_runs(options.out, rows, software() | notes)
        print(f"wrote {options.out}", file=sys.stderr)


def refuse(paths: Sequence[Path], parser: argparse.ArgumentParser, *, fake: bool) -> None:
    """End with 2, before any rank starts, where a file is no scenario or one that this program does not train."""
    from sim.errors import ScenarioError
    from validation.real.jobs import unsupported

    problems = []
    for path in paths:
        try:
            scenario = load_scenario(path)
            missing = unsupported(scenario)
            if fake and scenario.framework == "ddp":  # comm.cpp asserts on what the fake group's all-reduce hands back
                missing.append("DDP under --fake-world, which torch's reducer does not run with")
        except ScenarioError as error:
            problems.append(str(error))
            continue
        if missing:
            problems.append(f"{path}: this program does not train {', '.join(missing)}")
    if problems:
        parser.exit(2, "\n".join(problems) + "\n")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m validation.real.measure", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("scenarios", nargs="+", type=Path, help="scenario files")
    parser.add_argument("--out", type=Path, default=Path("runs.yaml"), help="file of measured runs to write")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="steps trained before the one that counts, and it")
    parser.add_argument("--fake-world", type=int, default=0, metavar="N", help="measure one rank of N in this process")
    parser.add_argument("--rank", type=int, default=0, help="which rank, with --fake-world")
    parser.add_argument("--fake-tensors", action="store_true", help="tensors without bytes, with --fake-world")
    parser.add_argument("--snapshots", type=Path, help="folder for the GPU allocator's history of one step")
    options = parser.parse_args(arguments)
    if options.fake_tensors and not options.fake_world:
        parser.error("--fake-tensors needs --fake-world")
    refuse(options.scenarios, parser, fake=bool(options.fake_world))
    if options.fake_world or "RANK" in os.environ:
        as_rank(options)
        return
    by_size: dict[int, list[Path]] = {}
    for path in options.scenarios:
        by_size.setdefault(load_scenario(path).parallelism.world_size, []).append(path)
    rows: list[dict[str, Any]] = []
    for size, paths in by_size.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "runs.yaml"
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "-m"]
            command += ["validation.real.measure", *map(str, paths), "--out", str(out), "--steps", str(options.steps)]
            command += ["--snapshots", str(options.snapshots)] if options.snapshots else []
            subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
            rows += yaml.safe_load(out.read_text())["runs"]
    write_runs(options.out, rows, software())


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:])
