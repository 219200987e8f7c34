"""What a foreign file says of a scenario: values at paths of a scenario file, and which words of the file gave each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sim.interop.values import Path, Problem


class Said(NamedTuple):
    """A value and where it comes from: an option, a key, or in words what was taken for what the file leaves out."""

    value: Any
    origin: str


@dataclass(slots=True)
class Imported:
    """The scenario that a file stands for, as far as the file says it.

    ``values``  by path of the scenario file, in the order in which they are to stand there
    ``notes``   what a reader of the scenario should know: what was taken, what cannot be said in a scenario
    ``unread``  options or keys that were not understood, and may matter
    """

    values: dict[Path, Said] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def say(self, path: str, value: Any, origin: str) -> None:
        """Set a value; ``None`` says nothing."""
        if value is not None:
            self.values[tuple(path.split("."))] = Said(value, origin)

    def has(self, path: str) -> bool:
        return tuple(path.split(".")) in self.values
