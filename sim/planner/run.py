"""Simulations of a wave: in this process, on all cores, or on a cluster, through a cache that survives a kill.

A trial is found again by the content of its scenario, of the model's file and of the program itself. Entries are
written to a temporary name and renamed, so that a file is whole or absent whenever the process dies.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

from sim.errors import Finding, ScenarioError
from sim.planner.floor import floor_s
from sim.planner.trial import VERSION, is_outcome, trial

EXECUTORS = ("loky", "sequential", "dask", "ray")
AT_ONCE = 4
"""Trials a Ray worker is given at one time: as many are lost at most where the search is killed."""


@cache
def program_digest() -> str:
    """Return a digest of the program's own files: another program may answer otherwise."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    folders = [root, root.parent / "topologies"]
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".yaml", ".json") and p.is_file()):
            if "planner" in path.parts and path.name != "trial.py":
                continue
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(scenario: dict[str, Any], folder: str) -> str:
    """Return the name under which a trial is found again."""
    files = []
    for value in (scenario.get("model"), scenario.get("cluster", {}).get("node")):
        name = value.get("config") if isinstance(value, dict) else value
        if isinstance(name, str) and ("/" in name or name.endswith((".json", ".yaml", ".yml"))):
            path = Path(folder) / name
            files.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
    text = json.dumps([VERSION, program_digest(), scenario, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Runner:
    """Simulates scenarios, those that are new to the cache on ``jobs`` processes of a joblib back end.

    A context: ``address`` is the scheduler of a Dask cluster or the head of a Ray cluster; without one a local cluster
    is started.
    """

    def __init__(
        self,
        cache_dir: Path | None = None,
        jobs: int | None = None,
        executor: str = "loky",
        address: str | None = None,
    ) -> None:
        self._dir = cache_dir
        self._jobs = jobs or num_cores()
        self._executor = "sequential" if executor == "loky" and self._jobs == 1 else executor
        self._address = address
        self._cluster = contextlib.ExitStack()
        self._connected = False
        self._parallel: Any = None
        """joblib's Parallel on a cluster."""
        self._pending: dict[str, Any] = {}
        """Simulations under way on this machine's cores, by key: futures."""
        self._known: dict[str, dict[str, Any]] = {}
        self.num_simulated = 0
        """Trials that were not in the cache."""
        self.not_kept = ""
        """Why trials are not kept any more, if they are not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if any(not future.cancel() and not future.done() for future in self._pending.values()):
            if error[0] is KeyboardInterrupt:  # the executor's thread may miss work that was taken from it: no matter
                threading.excepthook = lambda _: None
            _executor(self._jobs).shutdown(wait=False, kill_workers=True)
        self._pending.clear()
        self._cluster.close()

    @property
    def width(self) -> int:
        """Simulations that run at one time."""
        self._connect()
        return self._jobs

    def run(
        self, scenarios: Sequence[dict[str, Any]], folder: str, ahead: Sequence[dict[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        """Return the outcomes in the order given. Each is in the cache as soon as it is known.

        ``ahead`` are scenarios that will be asked for next, perhaps: they keep processes busy that have nothing to do.
        """
        keys = [key_of(scenario, folder) for scenario in scenarios]
        new: dict[str, dict[str, Any]] = {}
        for key, scenario in zip(keys, scenarios, strict=True):
            if key not in self._known and (found := self._read(key)) is not None:
                self._known[key] = found
            if key not in self._known:
                new[key] = scenario
        later = {key_of(scenario, folder): scenario for scenario in ahead[: 2 * self._jobs]} if new else {}
        later = {key: one for key, one in later.items() if key not in self._known and not self._has(key)}
        for key, outcome in self._simulate(new, later, folder):
            self._known[key] = json.loads(json.dumps(outcome))  # as it comes out of the cache
            self._write(key, outcome)
            self.num_simulated += 1
        return [self._known[key] for key in keys]

    def floor_s(self, scenario: dict[str, Any], folder: str) -> float:
        """Return seconds that no step of this scenario takes less than; in this process."""
        return floor_s(scenario, folder)

    def _has(self, key: str) -> bool:
        return self._dir is not None and self._path(key).exists()

    def _simulate(
        self, new: dict[str, dict[str, Any]], later: dict[str, dict[str, Any]], folder: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what all of ``new`` come to, and what else is known by then."""
        if not new:
            return
        if self._executor == "loky" and (self._pending or len(new) + len(later) > 1):
            yield from self._on_cores(new, later, folder)
            return
        if self._executor in ("loky", "sequential"):
            for key, scenario in new.items():
                yield key, trial(scenario, folder)
            return
        self._connect()
        every = [*new.items(), *list(later.items())[: max(0, self._jobs - len(new))]]
        size = len(every) if self._executor == "dask" else AT_ONCE * self._jobs
        for first in range(0, len(every), size):
            for key, there, outcome in self._parallel(
                _delayed(key, scenario, folder) for key, scenario in every[first : first + size]
            ):
                if there != key:
                    raise _refused(
                        "--executor",
                        "a worker of the cluster has another sim than this machine, or other files of the plan",
                        "install this version of sim on all workers; put model and topology files where all find them "
                        "by the same path",
                    )
                yield key, outcome

    def _on_cores(
        self, new: dict[str, dict[str, Any]], later: dict[str, dict[str, Any]], folder: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Simulate on this machine's cores, which go on with what may come next while the last of ``new`` runs."""
        from concurrent.futures import FIRST_COMPLETED, wait

        pending = self._pending
        for key in [key for key in pending if key not in new and key not in later]:
            if pending[key].cancel():
                del pending[key]
        executor = _executor(self._jobs)
        for key, scenario in (*new.items(), *later.items()):
            if key not in pending:
                pending[key] = executor.submit(_keyed, key, scenario, folder)
        while any(key in pending for key in new):
            wait(pending.values(), return_when=FIRST_COMPLETED)
            for key in [key for key, future in pending.items() if future.done()]:
                yield pending.pop(key).result()

    def _connect(self) -> None:
        """Reach the cluster, once: joblib's back ends of Dask and Ray use the client that is current."""
        if self._connected or self._executor not in ("dask", "ray"):
            return
        self._connected = True
        try:
            parallel = self._dask() if self._executor == "dask" else self._ray()
        except ImportError as error:
            extra = "cluster" if self._executor == "dask" else "ray"
            said = f"{error.name or self._executor} is not installed"
            raise _refused("--executor", said, f"pip install 'sim[{extra}]'") from None
        except (OSError, ValueError, RuntimeError) as error:
            where = (
                f"the cluster at {self._address}" if self._address else f"a {self._executor} cluster on this machine"
            )
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise _refused(
                "--address", f"{where} cannot be reached: {why}",
                "write the address that its scheduler printed: tcp://host:8786 of Dask, host:6379 of Ray",
            ) from None  # fmt: skip
        self._parallel = parallel

    def _dask(self) -> Any:
        from distributed import Client, LocalCluster
        from joblib import Parallel, parallel_config

        if self._address is None:
            cluster = LocalCluster(n_workers=self._jobs, threads_per_worker=1, dashboard_address=None)
            self._cluster.enter_context(cluster)
            client = self._cluster.enter_context(Client(cluster))
        else:
            client = self._cluster.enter_context(Client(self._address))
        self._jobs = max(1, sum(client.nthreads().values()))
        with parallel_config("dask", n_jobs=-1):
            return Parallel(return_as="generator_unordered", batch_size=1)

    def _ray(self) -> Any:
        """Ray's back end returns a list when all is done; its actors stay, and start again where they are killed."""
        import ray
        from joblib import Parallel, parallel_config
        from ray.util.joblib import register_ray

        if not ray.is_initialized():
            if self._address and ":" in self._address and "://" not in self._address:
                host, _, port = self._address.rpartition(":")  # Ray itself waits for a head that is not there for ever
                socket.create_connection((host, int(port)), timeout=10).close()
            local: dict[str, Any] = {} if self._address else {"num_cpus": self._jobs, "include_dashboard": False}
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", **local)
            self._cluster.callback(ray.shutdown)  # ends the actors too
        self._jobs = max(1, int(ray.cluster_resources().get("CPU", 1)))
        register_ray()
        again = {"max_restarts": -1, "max_task_retries": -1}
        with parallel_config("ray", n_jobs=self._jobs, ray_remote_args=again):
            parallel = Parallel(batch_size=1, pre_dispatch="all")
        return parallel.__enter__()

    def _path(self, key: str) -> Path:
        assert self._dir is not None
        return self._dir / f"{key}.json"

    def _read(self, key: str) -> dict[str, Any] | None:
        if self._dir is None:
            return None
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if is_outcome(found) else None

    def _write(self, key: str, outcome: dict[str, Any]) -> None:
        """Keep an outcome, while there is where to: a full disk ends what is kept, not the search."""
        if self._dir is None or self.not_kept:
            return
        name = ""
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._dir, prefix=".", suffix=".new")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(outcome, file)
            Path(name).replace(self._path(key))
        except OSError as error:
            self.not_kept = f"{self._dir} cannot be written: {(error.strerror or str(error)).lower()}"
            if name:
                Path(name).unlink(missing_ok=True)


def _executor(jobs: int) -> Any:
    """Return joblib's own processes, so many; they are kept from one wave to the next."""
    from joblib.externals.loky import get_reusable_executor

    return get_reusable_executor(max_workers=jobs, timeout=300)


def _keyed(key: str, scenario: dict[str, Any], folder: str) -> tuple[str, dict[str, Any]]:
    """In a process of its own, which makes no cycles worth collecting between trials."""
    if gc.isenabled():
        gc.disable()
        gc.freeze()
    return key, trial(scenario, folder)


def _delayed(key: str, scenario: dict[str, Any], folder: str) -> Any:
    from joblib import delayed

    return delayed(_elsewhere)(key, scenario, folder)


def _elsewhere(key: str, scenario: dict[str, Any], folder: str) -> tuple[str, str, dict[str, Any]]:
    """On a cluster's worker, which says by what name it knows the trial: it may have another program or other files."""
    there = key_of(scenario, folder)
    return key, there, trial(scenario, folder) if there == key else {}


def _refused(option: str, problem: str, remedy: str) -> ScenarioError:
    return ScenarioError([Finding(option, 0, problem, remedy)])


def default_cache() -> Path:
    """Return where simulations are kept if nobody says where: the user's cache (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base else Path.home() / ".cache") / "sim" / "plans"


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
