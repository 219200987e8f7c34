"""Frameworks: what each allocates, hooks into and steps."""

from __future__ import annotations

from sim.scenario.schema import Scenario


def warnings_of(scenario: Scenario) -> tuple[str, ...]:
    """Return what of the framework's settings changes memory or time in reality and not here, in words."""
    if scenario.framework != "deepspeed":
        return ()
    from sim.parallel.frameworks.deepspeed import warnings

    precision = scenario.training.precision
    return warnings(scenario.deepspeed, precision in ("bf16", "fp16"), precision == "bf16")
