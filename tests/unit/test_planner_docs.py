"""docs/plan.md says what a plan file may say."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from sim.planner.fields import SECTIONS, TOP, plan_schema
from sim.planner.load import load_plan_text

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"


def _rows(schema) -> list[str]:
    rows = ["| key | meaning |", "|---|---|"]
    for key, value in schema["properties"].items():
        words = value.get("description", "")
        needed = " **required**" if key in schema.get("required", ()) else ""
        rows.append(f"| `{key}`{needed} | {words.removeprefix('write ').replace('|', chr(92) + '|')} |")
    return rows


def _tables() -> str:
    schema = plan_schema()
    parts = ["\n".join(_rows(schema))]
    parts += [f"### {name}\n\n" + "\n".join(_rows(schema["properties"][name])) for name in SECTIONS]
    return "\n\n".join(parts)


def test_the_tables_of_keys_are_those_of_the_schema(update) -> None:
    text = PAGE.read_text(encoding="utf-8")
    made = re.sub(
        r"<!-- plan keys -->\n.*?<!-- end -->",
        lambda _: f"<!-- plan keys -->\n{_tables()}\n<!-- end -->",
        text,
        flags=re.S,
    )
    if update:
        PAGE.write_text(made, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == made, "run pytest tests/unit/test_planner_docs.py --update"


def test_the_examples_are_plans() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 2
    for block in blocks:
        assert load_plan_text(block, "plan.md").sites
        assert set(yaml.safe_load(block)) <= set(TOP)


def test_every_file_of_an_answer_is_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in ("plan.json", "plan.html", "ranked.csv", "pareto.svg", "recommended.yaml", "cache/"):
        assert f"`{name}`" in text
