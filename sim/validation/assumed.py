"""What the words under ``assumed`` of a measured run say of its scenario.

A source does not say everything, and a scenario has to say something: ``assumed`` tells which of its keys are guesses,
and what the run did that the scenario has no word for. A guess is not held against the source: the key is left out, so
that what it stands for is ``sim``'s own default for that framework and GPU. What the run did is set where the scenario
is silent. Words that are not known here are for people.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Path = tuple[str, ...]

GUESSES: Mapping[str, Path] = {
    r"attention (\S+)": ("training", "attention"),
}
"""Words that name a key's value as a guess, where that value is what the scenario says.

Of recompute sim knows no better: a guess of it comes from the memory that a run had, or from what its authors do
elsewhere.
"""

DONE: Mapping[str, tuple[str, Path, object]] = {
    r"overlap: TP overlap": ("megatron", ("megatron", "tp_comm_overlap"), True),
    r"overlap: async TP": ("fsdp2", ("fsdp2", "async_tensor_parallel"), True),
    r"overlap: no overlap of gradient all-reduce.*": ("megatron", ("megatron", "overlap_grad_reduce"), False),
    r"overlap: .*cross-entropy fusion.*": ("megatron", ("training", "loss"), "fused"),
    r"overlap: .*\bcp a2a": ("megatron", ("parallelism", "cp_comm"), "a2a"),
    r"compile: torch\.compile": ("", ("training", "compile"), True),
    r"overlap: none.*": ("megatron", ("megatron", "overlap_grad_reduce"), False),
    r"compile: CUDA graphs": ("megatron", ("megatron", "cuda_graph_impl"), "local"),
}
"""Words of what a run did: (framework that knows the key, or any; key; value)."""


def read_assumed(
    scenario: Mapping[str, Any], assumed: Sequence[str]
) -> tuple[dict[str, Any], tuple[tuple[Path, object], ...]]:
    """Return the scenario as its run's ``assumed`` has it, and each (key, value) changed; None: left to the default."""
    changes = tuple(_changes(scenario, assumed))
    read = dict(scenario)
    for path, value in changes:
        _put(read, path, value)
    return read, changes


def _changes(scenario: Mapping[str, Any], assumed: Sequence[str]) -> Iterator[tuple[Path, object]]:
    for words in assumed:
        for pattern, path in GUESSES.items():
            found = re.fullmatch(pattern, words)
            if found and _get(scenario, path) == found[1]:
                yield path, None
        for pattern, (framework, path, value) in DONE.items():
            if (
                re.fullmatch(pattern, words)
                and framework in ("", scenario.get("framework"))
                and _get(scenario, path) is None
                and _possible(scenario, path, assumed)
            ):
                yield path, value


def _possible(scenario: Mapping[str, Any], path: Path, assumed: Sequence[str]) -> bool:
    """Whether a scenario may have the key: what would be refused beside its others is not set."""
    if path[1] in ("tp_comm_overlap", "async_tensor_parallel"):
        compiled = path[0] == "megatron" or _get(scenario, ("training", "compile")) is True
        tp, sp = (_get(scenario, ("parallelism", axis)) for axis in ("tp", "sp"))
        return sp is True and tp not in (None, 1) and (compiled or "compile: torch.compile" in assumed)
    if path == ("megatron", "cuda_graph_impl"):
        return _get(scenario, ("training", "recompute")) != "full"
    return True


def _get(scenario: Mapping[str, Any], path: Path) -> object:
    section = scenario.get(path[0])
    return section.get(path[1]) if isinstance(section, Mapping) else None


def _put(scenario: dict[str, Any], path: Path, value: object) -> None:
    section = dict(scenario.get(path[0]) or {})
    if value is None:
        section.pop(path[1], None)
    else:
        section[path[1]] = value
    scenario[path[0]] = section
