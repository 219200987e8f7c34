"""Searches that are killed, on this machine and on real Dask and Ray clusters: they end with the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from plan_world import ONE_NODE, plan_of

from sim.planner.run import Runner
from sim.planner.search import search

pytestmark = pytest.mark.real

PLAN = ONE_NODE + "axes: {tp: [1, 2], pp: 1, micro_batch_size: [1, 2], recompute: none}\n"
FILES = ("plan.json", "plan.html", "ranked.csv", "recommended.yaml", "pareto.svg")


def _start(file: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sim", "plan", str(file), "--out", str(out), "--quiet", "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the search and the workers that it started, without warning."""
    with contextlib.suppress(ProcessLookupError):  # it has ended before
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(PLAN)
    whole = _start(file, tmp_path / "whole")
    began = time.monotonic()
    answered, _ = whole.communicate()
    took = time.monotonic() - began
    assert json.loads(answered)["searched"]["simulated"] >= 2
    kills = 0
    for share in (0.3, 0.5, 0.7):
        process = _start(file, tmp_path / "killed")
        time.sleep(took * share)
        kills += process.poll() is None
        _kill(process)
    assert kills
    assert _start(file, tmp_path / "killed").wait() == 0
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_is_in_the_cache_is_not_simulated_again(tmp_path: Path) -> None:
    plan = plan_of(PLAN)
    first, second = Runner(tmp_path, jobs=1), Runner(tmp_path, jobs=1)
    found, again = search(plan, first), search(plan, second)
    assert first.num_simulated == len(found.tried)
    assert second.num_simulated == 0
    assert [one.outcome for one in found.tried] == [one.outcome for one in again.tried]
    next(tmp_path.glob("*.json")).write_text('{"version": 2, "fi')  # as a full disk leaves it
    third = Runner(tmp_path, jobs=1)
    assert [one.outcome for one in search(plan, third).tried] == [one.outcome for one in found.tried]
    assert third.num_simulated == 1


def test_a_dask_cluster_loses_a_worker() -> None:
    distributed = pytest.importorskip("distributed")
    plan = plan_of(PLAN, "axes.recompute=[none, full]")
    with Runner(jobs=1) as here:
        expected = search(plan, here, exhaustive=True)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        pid = next(iter(cluster.workers.values())).pid
        with Runner(executor="dask", address=cluster.scheduler_address) as runner:
            killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
            killer.start()
            found = search(plan, runner, exhaustive=True)
            assert not killer.is_alive(), "the search was over before a worker was killed"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [one.outcome for one in found.tried] == [one.outcome for one in expected.tried]


def test_a_ray_cluster_loses_a_worker() -> None:
    """Its actor starts again, and does again what it was doing."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sim[ray]'")
    plan = plan_of(PLAN, "axes.recompute=[none, full]")
    with Runner(jobs=1) as here:
        expected = search(plan, here, exhaustive=True)
    killed: list[int] = []
    killer = threading.Thread(target=_kill_an_actor, args=(killed,), daemon=True)
    killer.start()
    with Runner(jobs=2, executor="ray") as runner:
        found = search(plan, runner, exhaustive=True)
        assert killed, "the search was over before a worker was killed"
        assert runner.width == 2
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], 0)
    assert [one.outcome for one in found.tried] == [one.outcome for one in expected.tried]


def _kill_an_actor(killed: list[int]) -> None:
    """Kill the first of Ray's pool actors that has a task of ours under way, descended from this process."""
    while not killed:
        time.sleep(0.05)
        for process in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                pid = int(process.name)
                if (process / "cmdline").read_bytes().startswith(b"ray::PoolActor.run_batch") and _is_ours(pid):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return


def _is_ours(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def test_more_processes_than_a_wave_has_candidates_find_the_same() -> None:
    plan = plan_of(PLAN, "axes.recompute=[none, full]")
    with Runner(jobs=1) as one, Runner(jobs=8) as many:
        few, ahead = search(plan, one), search(plan, many)
        assert many.num_simulated >= one.num_simulated
    assert [found.outcome for found in few.tried] == [found.outcome for found in ahead.tried]
    assert [(d.candidate, d.by and d.by.candidate) for d in few.discarded] == [
        (d.candidate, d.by and d.by.candidate) for d in ahead.discarded
    ]
