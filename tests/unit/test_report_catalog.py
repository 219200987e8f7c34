"""The catalogue, as it is shown."""

from __future__ import annotations

import io

import pytest

from sim.catalog.describe import KINDS
from sim.errors import ScenarioError
from sim.report.catalog import catalogue, print_catalogue
from sim.report.layout import Screen


def shown(content, width=80):
    file = io.StringIO()
    print_catalogue(Screen(file, width), content)
    return file.getvalue()


def test_everything_is_listed_by_kind():
    content = catalogue(None, None)
    assert tuple(content) == KINDS
    text = shown(content)
    for kind in KINDS:
        assert all(entry["name"] in text for entry in content[kind])
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_of_a_kind_can_be_shown(kind):
    for entry in catalogue(kind, None)[kind][:4]:
        content = catalogue(kind, entry["name"])
        assert content["facts"]
        assert shown(content).startswith(f"{kind} {entry['name']}\n")


def test_a_fact_has_kind_and_source():
    facts = {fact["name"]: fact for fact in catalogue("gpu", "h100-sxm-80gb")["facts"]}
    assert facts["peak_flops.bf16"]["kind"] == "datasheet"
    assert facts["peak_flops.bf16"]["source"]


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("gpux", None, "sim catalog: there is no kind 'gpux' in the catalogue; did you mean gpu?"),
        ("gpu", "h10", "sim catalog gpu: there is no gpu 'h10' in the catalogue; did you mean h100-pcie-80gb or"
         " h100-sxm-80gb?"),
        ("link", "zzzzzzzzz", "sim catalog link: there is no link 'zzzzzzzzz' in the catalogue; "
         "'sim catalog link' lists them"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_one_line_with_the_nearest(kind, name, words):
    with pytest.raises(ScenarioError) as error:
        catalogue(kind, name)
    assert str(error.value) == words
