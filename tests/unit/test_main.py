"""The ``sim`` command as shells start it."""

from __future__ import annotations

import sys

import pytest

from sim import cli
from sim.__main__ import EXIT_INTERRUPTED, main


def test_ctrl_c_ends_it_in_silence(monkeypatch, capsys) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, EXIT_INTERRUPTED) == (130, 130)
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_while_modules_are_imported_ends_it_in_silence(monkeypatch, capsys) -> None:
    class Interrupts:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "sim.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "sim.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")
