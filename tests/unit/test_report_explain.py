"""Where every value is from."""

from __future__ import annotations

import io
import json

import pytest
from report_scenarios import write

from sim.report.explain import explanation, given_document, print_explanation, value_words
from sim.report.layout import Screen
from sim.report.report import json_text
from sim.scenario.load import load_scenario

TEXT = """model: llama-2-7b
cluster:
  node: dgx-h100
framework: deepspeed
deepspeed: ds.json
training:
  sequence_length: 4096
  micro_batch_size: 1
  global_batch_size: 8
  precision: bf16
"""


@pytest.fixture
def content(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": True}}))
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    overrides = ("training.sequence_length=2048",)
    return explanation(load_scenario(path, overrides), given_document(path, overrides)), path


def origin(content, key):
    (value,) = [value for value in content["values"] if value["key"] == key]
    return value["kind"], value["from"]


def test_a_given_value_has_its_line(content):
    content, path = content
    assert origin(content, "cluster.node") == ("given", f"{path}:3")
    assert origin(content, "training.micro_batch_size") == ("given", f"{path}:8")


def test_an_override_says_so(content):
    content, _ = content
    assert origin(content, "training.sequence_length") == ("given", "--set")


def test_a_value_of_a_file_that_is_named_has_that_file(content):
    content, path = content
    assert origin(content, "deepspeed.zero_optimization.overlap_comm") == ("given", f"ds.json ({path}:5)")


def test_a_default_says_whose(content):
    content, _ = content
    assert origin(content, "model.hidden_size") == ("default", "the catalogue's llama-2-7b")
    kind, words = origin(content, "deepspeed.zero_optimization.reduce_bucket_size")
    assert kind == "default"
    assert words.startswith("DeepSpeed's default")


def test_every_value_has_an_origin_and_every_fact_a_source(content):
    content, _ = content
    assert all(value["from"] for value in content["values"])
    assert {"gpu", "node", "link nvlink4"} <= set(content["facts"])
    for device in content["facts"].values():
        for fact in device["facts"]:
            assert fact["kind"] in ("datasheet", "measured", "assumed", "derived", "user"), fact
            assert fact["source"], fact


def test_a_fact_that_the_file_overrides_is_the_users(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.replace("deepspeed: ds.json\n", "").replace("dgx-h100", "dgx-h100\n  gpu: {memory: 70 GiB}"))
    content = explanation(load_scenario(path), given_document(path, ()))
    (memory,) = [fact for fact in content["facts"]["gpu"]["facts"] if fact["name"] == "total_memory_bytes"]
    assert memory["kind"] == "user"


def test_coefficients_say_which_file_and_how_well_they_fit(content):
    content, _ = content
    families = {family["family"]: family for family in content["cost"]}
    assert families["gemm"]["file"] == "sim/catalog/measured/gemm_h100_sxm.yaml"
    assert families["gemm"]["fits"][0]["count"] > 0
    assert 0 <= families["gemm"]["fits"][0]["median_abs"] < 1
    assert {fit["kind"] for fit in families["memory-bound"]["fits"]} <= {"measured", "assumed"}


def test_a_gpu_that_was_not_measured_says_who_stands_for_it(tmp_path):
    path = write(tmp_path, "zero_3")
    overrides = ("cluster.node=pcie-8x-a10", "cluster.num_nodes=1")
    content = explanation(load_scenario(path, overrides), given_document(path, overrides))
    assert content["cost"][0]["words"].startswith("stands for a10: ")


@pytest.mark.parametrize("width", [80, 120])
def test_a_person_reads_it_within_the_width(content, width):
    content, _ = content
    file = io.StringIO()
    print_explanation(Screen(file, width), content, quiet=False)
    for line in file.getvalue().splitlines():
        assert len(line) <= width or len(line.rpartition(" ")[0]) < width, line  # only a single word may run on
    assert "gemm kernels" in file.getvalue()
    file = io.StringIO()
    print_explanation(Screen(file, width), content, quiet=True)
    assert "datasheet" not in file.getvalue()


def test_it_is_json(content):
    content, _ = content
    assert json.loads(json_text(content))["scenario"] == "mine"


def test_values_read_as_in_the_file():
    assert [value_words(v) for v in (None, True, 512, 50_000_000, 0.5, "x")] == [
        "null", "true", "512", "50,000,000", "0.5", "x"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "of_collectives"),
    [
        ("nccl", ["nccl own", "nccl other"]),
        ("gloo", ["gloo"]),
        ("alpha-beta\n  alpha: 5 us\n  beta: 50 GB/s", ["alpha beta"]),
    ],
)
def test_certainty_of_collectives_is_that_of_the_library_that_runs(tmp_path, backend, of_collectives):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.replace("node: dgx-h100", f"node: dgx-h100\n  backend: {backend}").replace("ds.json", "{}"))
    keys = [row["key"] for row in explanation(load_scenario(path), given_document(path, ()))["time"]]
    assert [key for key in keys if key.startswith(("nccl", "gloo", "alpha"))] == of_collectives
