"""``python -m sim`` and the ``sim`` command."""

from __future__ import annotations


def main() -> None:
    from sim.cli import app

    app()


if __name__ == "__main__":
    main()
