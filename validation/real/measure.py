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

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from sim.scenario.load import load_scenario
from sim.scenario.schema import Scenario
from validation.real.processes import launch

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


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3:])
