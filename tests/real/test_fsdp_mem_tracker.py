"""What torch's FSDPMemTracker counted on big models is what we say, category by category, but for the named causes.

The tracker's figures are committed (``python -m validation.fsdp_mem_tracker`` makes them); ours are worked out anew.
"""

from __future__ import annotations

import pytest
import yaml

from sim.scenario.load import load_scenario_text

pytestmark = pytest.mark.real


@pytest.mark.parametrize("when", ["peak", "end"])
@pytest.mark.parametrize("name", ["8b", "8b-full", "70b", "70b-full"])
def test_every_category_is_the_trackers(name: str, when: str) -> None:
    from validation import fsdp_mem_tracker as script

    case = yaml.safe_load(script.OUT.read_text())["cases"][name]
    scenario = load_scenario_text(yaml.safe_dump(case["scenario"]), name)
    ours, theirs = script.ours(scenario)[when], case["tracker"][when]
    causes = {category: sum(sizes.values()) for category, sizes in script.causes(scenario, when, ours).items()}
    for category in {**theirs, **ours}:
        if category != "Total":
            assert theirs.get(category, 0) == ours.get(category, 0) + causes.get(category, 0), category
    assert theirs["Total"] == ours["Total"] + sum(causes.values())
