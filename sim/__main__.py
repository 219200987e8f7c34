"""``python -m sim`` and the ``sim`` command."""

from __future__ import annotations


def main() -> None:
    from sim.cli import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
