"""Text to plain values: what YAML 1.1 would make of them, and what is refused at the door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sim.errors import Finding
from sim.interop.values import Problem
from sim.scenario.document import (
    MAX_FILE_BYTES,
    UnreadableError,
    parse_json,
    parse_value,
    parse_yaml,
    read_text,
)


def yaml_values(text: str) -> dict[str, Any]:
    findings: list[Finding] = []
    document = parse_yaml(text, "f.yaml", findings)
    assert findings == []
    return document.data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),  # YAML 1.1: False
        ("on", "on"),  # YAML 1.1: True
        ("1:30", "1:30"),  # YAML 1.1: 90, sexagesimal
        ("010", "010"),  # YAML 1.1: 8, octal
        ("2024-05-01", "2024-05-01"),  # YAML 1.1: a date
        ("1e12", 1e12),  # YAML 1.1: a text, as it has no dot
        ("1_000_000", 1_000_000),
        ("-3", -3),
        ("0x10", "0x10"),
        (".5", 0.5),
        ("true", True),
        ("~", None),
        ("", None),
        ("'8'", "8"),
        ('"true"', "true"),
        ("!!int 3", 3),
        ("80 GiB", "80 GiB"),
        (".inf", ".inf"),
        ("9" * 40, "9" * 40),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    found = yaml_values(f"a: {text}\n")["a"]
    assert found == value
    assert type(found) is type(value)


def test_keys_are_texts_whatever_yaml_takes_them_for() -> None:
    assert yaml_values("no: 1\n3: 2\ntrue: 3\n~: 4\n") == {"no": 1, "3": 2, "true": 3, "null": 4}


def test_an_alias_is_its_value() -> None:
    assert yaml_values("a: &x {b: 1}\nc: *x\n") == {"a": {"b": 1}, "c": {"b": 1}}


def test_lines_of_paths() -> None:
    document = parse_yaml("a: 1\nb:\n  c: 2\n\n  d: [3,\n   4]\n", "f.yaml", [])
    assert document.lines[("a",)] == 1
    assert document.lines[("b", "c")] == 3
    assert document.lines[("b", "d")] == 5
    assert document.lines[("b", "d", "1")] == 6


def test_a_problem_stands_where_the_nearest_known_path_stands() -> None:
    document = parse_yaml("a: 1\nb:\n  c: 2\n", "f.yaml", [])
    assert document.finding(Problem(("b", "missing"), "x", "y")) == Finding("f.yaml", 2, "x", "y")
    document.origin["b", "c"] = "--set"
    assert document.finding(Problem(("b", "c"), "x", "y")) == Finding("--set", 0, "x", "y")


def test_json_lines_are_those_of_the_nested_key() -> None:
    text = '{\n "stage": 1,\n "zero": {\n  "stage": 2\n }\n}'
    document = parse_json(text, "f.json", "a config")
    assert document.finding(Problem(("zero", "stage"), "x")).line == 4
    assert document.finding(Problem(("stage",), "x")).line == 2


def test_a_value_of_set_is_yaml() -> None:
    assert parse_value("8") == 8
    assert parse_value("[2, 3]") == [2, 3]
    assert parse_value("{memory: 80 GiB}") == {"memory": "80 GiB"}
    assert parse_value("") is None


def test_a_file_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(b"#" * MAX_FILE_BYTES)
    assert len(read_text(file, "f.yaml")) == MAX_FILE_BYTES
    file.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(UnreadableError):
        read_text(file, "f.yaml")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodel: x\n")
    assert yaml_values(read_text(file, "f.yaml")) == {"model": "x"}
