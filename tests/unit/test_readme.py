"""What README.md shows is what the command prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```console\n\$ sim (run [^\n]*)\n(.*?)```", flags=re.DOTALL)


def test_the_first_command_prints_what_the_readme_shows(update):
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    found = BLOCK.search(text)
    assert found
    done = subprocess.run(
        [sys.executable, "-m", "sim", *found[1].split()],
        capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()) + "\n"
    if update:
        readme.write_text(text[: found.start(2)] + shown + text[found.end(2) :], encoding="utf-8")
    else:
        assert found[2] == shown
