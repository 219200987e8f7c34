"""JSON Schema of a topology file, for editors and other programs. ``load`` is what decides."""

from __future__ import annotations

from typing import Any

from sim.catalog import load


def topology_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a node file under ``topologies/``."""
    wire = r"^(?:(?:every\s+)?\S+\s+to\s+\S+|among\s+\S+)\s+by\s+(?:\d{1,4}\s*x\s+)?\S+$"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sim topology",
        "description": "One kind of node: its devices and the wires between them.",
        "oneOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/alias"}],
        "$defs": {
            "alias": {
                "type": "object",
                "required": ["alias_of"],
                "additionalProperties": False,
                "properties": {"alias_of": {"type": "string"}},
            },
            "node": {
                "type": "object",
                "required": ["gpu", "host_memory", "host_memory_bandwidth", "cpu_cores", "devices", "wires"],
                "additionalProperties": False,
                "properties": {
                    "title": {"type": "string"},
                    "gpu": {"enum": list(load.names("gpu"))},
                    "network": {"enum": list(load.names("network"))},
                    "cpu_vendor": {"enum": list(load.CPU_VENDORS), "default": "intel"},
                    "sources": {"type": "object", "additionalProperties": {"type": "string"}},
                    "host_memory": _fact("string", "512 GB"),
                    "host_memory_bandwidth": _fact("string", "409.6 GB/s"),
                    "cpu": _fact("string", "2x AMD EPYC 7742"),
                    "cpu_cores": _fact("integer", 128),
                    "power": _fact("string", "6.5 kW"),
                    "nvswitch_multicast": _fact("boolean", True),
                    "nvlink_domain_nodes": _fact("integer", 18),
                    "wiring": _fact("string", "NV12 between all GPUs"),
                    "devices": {
                        "type": "object",
                        "required": ["gpu", "cpu"],
                        "additionalProperties": False,
                        "properties": {kind: {"type": "integer", "minimum": 0} for kind in load.DEVICE_KINDS},
                    },
                    "wires": {
                        "type": "array",
                        "items": {"type": "string", "pattern": wire, "examples": ["gpu[0-7] to nvswitch0 by nvlink4"]},
                    },
                },
            },
        },
    }


def _fact(kind: str, example: object) -> dict[str, Any]:
    """A plain value, or one with its provenance."""
    value = {"type": kind, "examples": [example]}
    return {
        "anyOf": [
            value,
            {
                "type": "object",
                "required": ["value"],
                "additionalProperties": False,
                "properties": {
                    "value": value,
                    "kind": {"enum": list(load.FACT_KINDS)},
                    "source": {"type": "string"},
                    "note": {"type": "string"},
                },
            },
        ]
    }
