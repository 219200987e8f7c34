"""The error tree.

    SimError                    everything that `sim` raises on purpose
    ├── ScenarioError           bad input: every finding at once; exit code 2
    ├── DeadlockError           a program whose ranks wait for each other (a defect of a lowering)
    ├── CollectiveMismatchError two ranks meet in one collective with different kinds or sizes
    └── ContentionError         a transfer that was taken to be alone shares links; the pipeline folds without that

*Does not fit* is not an error: it is a value in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong in an input file.

    ``file`` and ``line`` (1-based; 0 where no line applies) say where, ``problem`` what is
    wrong, ``remedy`` what to write instead (may be empty only where nothing can be suggested).
    """

    file: str
    line: int
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.problem}" + (f"\n    {self.remedy}" if self.remedy else "")


class SimError(Exception):
    """Anything that `sim` raises on purpose."""


class ScenarioError(SimError):
    """Bad input. Carries every finding, in the order of the file."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(sorted(findings, key=lambda f: (f.file, f.line)))
        super().__init__("\n".join(map(str, self.findings)))


class DeadlockError(SimError):
    """The programs ended with ranks that still wait. One argument, the message."""


class ContentionError(SimError):
    """A transfer on a ``lone`` communicator met another on its links. One argument, the message."""


class CollectiveMismatchError(SimError):
    """Ranks met in one collective with different kinds or sizes. One argument, the message."""
