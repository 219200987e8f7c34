"""Whose collectives run: one table of what each library does with a collective and a message.

To add one: a module with these functions and a row below; its name in ``BACKENDS`` of ``sim/scenario/fields.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import NamedTuple

from sim.cluster.topology import Cluster
from sim.ir.traffic import Link, Traffic

Groups = Sequence[tuple[int, ...]]


class Backend(NamedTuple):
    """What a library does, each on groups or pairs of GPUs that run together.

    ``plan_collective``      (cluster, groups, kind, tensor_bytes) -> traffic
    ``plan_point_to_point``  (cluster, pairs, tensor_bytes, num_ranks, spans) -> traffic of messages in communicators of
                             so many ranks, which stand on several nodes or not
    ``assumption``           (cluster, groups) -> what its times rest on, in words; "" if nothing
    ``links``                (cluster) -> all links that ``Phase.loads`` of its traffic index into
    ``is_nccl``              kernels of NCCL run: they keep buffers on the GPU, and what users measured of them holds
    """

    plan_collective: Callable[[Cluster, Groups, str, int], Traffic]
    plan_point_to_point: Callable[[Cluster, Sequence[tuple[int, int]], int, int, bool], Traffic]
    assumption: Callable[[Cluster, Groups], str]
    links: Callable[[Cluster], Sequence[Link]]
    is_nccl: bool


def _wires(cluster: Cluster) -> Sequence[Link]:
    return cluster.links


_MODULES = {"nccl": "nccl.plan", "gloo": "gloo", "alpha-beta": "alpha_beta"}


@cache
def backend(name: str) -> Backend:
    """Return a library by its name in a scenario; its module is imported then."""
    module = import_module(f"sim.cost.{_MODULES[name]}")
    return Backend(
        module.plan_collective,
        module.plan_point_to_point,
        module.assumption,
        getattr(module, "links", _wires),
        name == "nccl",
    )
