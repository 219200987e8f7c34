"""The result as data: every field that is promised, and sums that hold exactly."""

from __future__ import annotations

import json

import pytest
import report_scenarios
from report_scenarios import answered

from sim.ir.footprint import CATEGORIES
from sim.pipeline import simulate
from sim.report.metrics import PARTS
from sim.report.report import json_text, result
from sim.scenario.load import load_scenario

EVERY = pytest.mark.parametrize("name", report_scenarios.TEXTS)
FIELDS = {
    "": "schema_version scenario fits world_size step memory communication pipeline warnings",
    "step": "time_s compute_s exposed_communication_s bubble_s optimizer_s other_s tokens_per_s tokens_per_s_per_gpu "
    "model_flops model_flops_per_s_per_gpu mfu hfu flops_formula",
    "memory": "capacity_bytes peak_allocated_bytes peak_reserved_bytes peak_device_bytes host_capacity_bytes "
    "host_bytes_per_node ranks",
    "pipeline": "schedule num_stages num_microbatches bubble_fraction",
}
RANK = "rank num_ranks stage peak_allocated_bytes peak_reserved_bytes peak_device_bytes at_peak beside"
COMMUNICATION = "kind axis count tensor_bytes wire_bytes time_s exposed_s algorithm bus_bytes_per_s"


@EVERY
def test_every_promised_field_is_there(name):
    content = answered(name).report.to_dict()
    for section, fields in FIELDS.items():
        assert set(fields.split()) <= set(content[section] if section else content), section
    for rank in content["memory"]["ranks"]:
        assert set(RANK.split()) <= set(rank)
        assert tuple(rank["at_peak"]) == CATEGORIES
        assert {"fragmentation", "cuda_context", "nccl", "libraries"} <= set(rank["beside"])
    for entry in content["communication"]:
        assert set(COMMUNICATION.split()) <= set(entry)


@EVERY
def test_the_parts_of_a_step_add_up_in_the_order_in_which_they_are_listed(name):
    step = answered(name).report.to_dict()["step"]
    total = 0.0
    for part in PARTS:
        total += step[f"{part}_s"]
    assert total == step["time_s"]
    assert sum(step["ticks"][part] for part in PARTS) == step["ticks"]["time"]


@EVERY
def test_the_account_of_each_rank_adds_up_to_the_byte(name):
    for rank in answered(name).report.to_dict()["memory"]["ranks"]:
        beside = dict(rank["beside"])
        assert sum(rank["at_peak"].values()) == rank["peak_allocated_bytes"]
        assert rank["peak_allocated_bytes"] + beside.pop("fragmentation") == rank["peak_reserved_bytes"]
        assert rank["peak_reserved_bytes"] + sum(beside.values()) == rank["peak_device_bytes"]
        assert min(beside.values()) >= 0


@EVERY
def test_memory_is_that_of_the_fullest_rank_and_all_ranks_are_there(name):
    content = answered(name).report.to_dict()
    memory = content["memory"]
    for quantity in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes"):
        assert memory[quantity] in [rank[quantity] for rank in memory["ranks"]]
    assert memory["peak_device_bytes"] == max(rank["peak_device_bytes"] for rank in memory["ranks"])
    assert sum(rank["num_ranks"] for rank in memory["ranks"]) == content["world_size"]


def test_rates_are_counts_over_the_time_of_the_step():
    step = answered("zero_3").report.to_dict()["step"]
    tokens = 64 * 512
    assert step["tokens_per_s"] == tokens / step["time_s"]
    assert step["tokens_per_s_per_gpu"] == pytest.approx(step["tokens_per_s"] / 16)
    # 989.4 TFLOP/s: the dense bf16 peak of an H100
    assert step["mfu"] == pytest.approx(step["model_flops"] / step["time_s"] / 16 / 989.4e12)
    assert 0 < step["exposed_communication_s"] < step["time_s"]


def test_recompute_executes_a_forward_pass_of_the_blocks_more_than_is_useful():
    step = answered("zero_3").report.to_dict()["step"]
    # model: 3 passes' worth; executed: 4 of the blocks (flash's backward has a fifth matmul), 3 of the head
    assert step["mfu"] < step["hfu"] < 4 / 3 * step["mfu"] * 1.05


@pytest.mark.parametrize("cp_comm", ["p2p", "all_gather"])
def test_pieces_of_causal_attention_count_in_full_too(cp_comm, tmp_path):
    """Four ranks have a quarter of the sequence each, and execute together what one GPU would."""
    text = (
        "model: {hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2, num_attention_heads: 4, "
        "vocab_size: 512}\ncluster: {node: dgx-h100, num_gpus: GPUS}\nframework: fsdp2\nparallelism: {cp: GPUS"
        f", cp_comm: {cp_comm}}}\ntraining: {{sequence_length: 8192, micro_batch_size: 1, global_batch_size: 1}}\n"
    )
    executed = []
    for gpus in (1, 4):
        file = tmp_path / f"{gpus}.yaml"
        file.write_text(text.replace("GPUS", str(gpus)), encoding="utf-8")
        executed.append(simulate(load_scenario(file, ())).report.executed_flops)
    assert executed[0] == executed[1]


def test_exposed_communication_is_no_longer_than_communication():
    for name in ("zero_3", "zero_2", "ddp"):
        for entry in answered(name).report.to_dict()["communication"]:
            assert 0 <= entry["exposed_s"] <= entry["time_s"]
            assert entry["count"] > 0
            assert entry["bus_bytes_per_s"] == pytest.approx(entry["wire_bytes"] / entry["time_s"])


def test_what_does_not_fit_says_when_who_and_by_how_much():
    report = answered("too_large").report
    assert not report.fits
    content = report.to_dict()
    assert not content["fits"]
    (rank,) = content["memory"]["ranks"]
    lost = rank["out_of_memory"]
    assert lost["requested_bytes"] > 0
    assert 0 < lost["short_bytes"] <= lost["requested_bytes"]
    assert lost["step"] in ("setup", "first", "steady")
    assert rank["holders"]
    assert sum(holder["bytes"] for holder in rank["holders"]) <= rank["peak_allocated_bytes"]


@EVERY
def test_json_reads_back_as_the_same_values(name):
    content = result(answered(name).report, ())
    assert json.loads(json_text(content)) == content


def test_json_refuses_what_is_not_a_number():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"time_s": float("nan")})
