"""The JSON Schema of topology files says what the files that ship say."""

from __future__ import annotations

import re

import pytest
import yaml

from sim.catalog import load
from sim.catalog.json_schema import topology_schema

NODE = topology_schema()["$defs"]["node"]


@pytest.mark.parametrize("name", load.names("node"))
def test_every_file_that_ships_keeps_to_the_schema(name):
    document = yaml.safe_load((load.topologies() / f"{name}.yaml").read_text())
    if set(document) == {"alias_of"}:
        return
    assert set(document) <= set(NODE["properties"])
    assert set(NODE["required"]) <= set(document)
    pattern = re.compile(NODE["properties"]["wires"]["items"]["pattern"])
    assert all(pattern.match(wire) for wire in document["wires"])
    assert document["gpu"] in NODE["properties"]["gpu"]["enum"]
    assert set(document["devices"]) <= set(NODE["properties"]["devices"]["properties"])


def test_the_schema_knows_every_key_that_the_parser_knows(tmp_path):
    # A key that the schema offers is never one that the parser refuses as unknown.
    file = tmp_path / "node.yaml"
    plain = {
        "title": "t", "gpu": "t4", "network": "ethernet-25g", "cpu_vendor": "amd", "sources": {"a": "b"},
        "host_memory": "1 GB", "host_memory_bandwidth": "1 GB/s", "cpu": "c", "cpu_cores": 1, "power": "1 W",
        "nvswitch_multicast": False, "nvlink_domain_nodes": 1, "wiring": "w", "devices": {"gpu": 1, "cpu": 1},
        "wires": ["gpu0 to cpu0 by pcie3-x16"],
    }  # fmt: skip
    assert set(plain) == set(NODE["properties"])
    file.write_text(yaml.safe_dump(plain))
    assert load.node(str(file)).cpu == "c"
