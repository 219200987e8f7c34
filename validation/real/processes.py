"""Start a script of this folder as the ranks of one job on this machine, and collect what each wrote down."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def launch(
    script: str,
    arguments: Sequence[str],
    num_ranks: int,
    timeout_s: float = 300,
    settings: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run the script with ``worker FOLDER arguments...`` once for each rank; return what each wrote down, by rank.

    ``settings`` are further environment variables. If a process fails, all end and the error has what they printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = os.environ | {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", f"validation.real.{Path(script).stem}", "worker", folder, *arguments]
        workers = []
        outputs = []
        try:
            for rank in range(num_ranks):
                environment = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (settings or {})
                workers.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                    )
                )
            for worker in workers:
                outputs.append(worker.communicate(timeout=timeout_s)[0])  # noqa: PERF401
        finally:
            for worker in workers:
                worker.kill()
        if any(worker.returncode for worker in workers):
            raise RuntimeError("\n".join(f"--- rank {rank}\n{text[-4000:]}" for rank, text in enumerate(outputs)))
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def write(folder: str, found: dict[str, Any]) -> None:
    """Write down what this rank found; return when all ranks have."""
    import torch

    (Path(folder) / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
