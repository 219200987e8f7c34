"""``python -m sim`` and the ``sim`` command."""

from __future__ import annotations

EXIT_INTERRUPTED = 130
"""As shells tell a program that Ctrl-C ended: 128 and the number of SIGINT."""


def main() -> None:
    """Run the command line; Ctrl-C ends it in silence, while its modules are being imported too."""
    try:
        from sim.cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
