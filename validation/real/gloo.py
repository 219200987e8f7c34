"""torch's collectives over gloo between real processes: what each rank sends over TCP, by the kernel's own count.

A worker is started as ``worker FOLDER SIZE...``; Linux only. ``validation/measure/measure_gloo.py`` times these calls.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from validation.real.processes import launch, write

HEADER_BYTES = 48
"""Of a message: gloo gloo/transport/tcp/pair.h, Op::preamble. Each is announced, asked for (by the receiver) and sent;
what is asked for already is not announced."""
SENT_OFFSET = 200
"""Of tcpi_bytes_sent and tcpi_bytes_retrans in struct tcp_info (linux/tcp.h)."""
INFO_BYTES = SENT_OFFSET + 16

Call = Callable[[], object]


def measured(sizes: tuple[int, ...], num_ranks: int) -> list[dict[str, Any]]:
    """Return what each rank sent in one call: by ``kind size``, bytes."""
    return launch(__file__, tuple(map(str, sizes)), num_ranks)


def sent_bytes() -> int:
    """Return the bytes that this process has sent over TCP connections so far."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as end:
                if end.type == socket.SOCK_STREAM and end.family in (socket.AF_INET, socket.AF_INET6):
                    end.getpeername()
                    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_BYTES)
                    sent, again = struct.unpack_from("QQ", info, SENT_OFFSET)
                    total += sent - again
        except OSError:  # closed meanwhile, or not connected
            continue
    return total


def calls(size: int) -> dict[str, Call]:
    """Return one call of each kind on ``size`` bytes of fp32 on the CPU, counted as nccl-tests does."""
    import torch
    import torch.distributed as dist

    rank, n = dist.get_rank(), dist.get_world_size()
    part = torch.zeros(max(size // 4 // n, 1))
    whole, other = torch.zeros(part.numel() * n), torch.zeros(part.numel() * n)

    def send() -> None:
        """From the first rank to the second, and the tensor back: two messages."""
        if rank == 0:
            dist.send(whole, 1)
            dist.recv(whole, 1)
        elif rank == 1:
            dist.recv(whole, 0)
            dist.send(whole, 0)

    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "reduce": lambda: dist.reduce(whole, 0),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "send": send,
    }


def sent_in(call: Call) -> int:
    """Return what this rank sends in one call, when all ranks are through with what came before."""
    import torch.distributed as dist

    call()
    dist.barrier()
    time.sleep(0.02)
    before = sent_bytes()
    call()
    time.sleep(0.02)  # the other thread may still send
    sent = sent_bytes() - before
    dist.barrier()
    return sent


def main(folder: str, sizes: list[int]) -> None:
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {f"{kind} {size}": sent_in(call) for size in sizes for kind, call in calls(size).items()}
    write(folder, found)


if __name__ == "__main__":
    main(sys.argv[2], list(map(int, sys.argv[3:])))
