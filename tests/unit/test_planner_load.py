"""A plan file: what is left out, what is written over, in which order prices hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_world import ONE_NODE, TINY, TWO_SITES, plan_of

from sim.errors import ScenarioError
from sim.planner.fields import plan_schema
from sim.planner.load import load_plan, load_plan_text
from sim.planner.space import candidates

ROOT = Path(__file__).parents[2]


def test_six_lines_are_a_plan() -> None:
    plan = load_plan(ROOT / "plans" / "llama3_70b_90_days.yaml")
    assert plan.workload.tokens == 1e12
    assert plan.workload.global_batch_sizes == (512,)  # 4 M tokens of 8,192
    assert plan.goal.deadline_s == 90 * 86400
    assert plan.goal.objective == "cheapest"
    assert [site.num_gpus for site in plan.sites] == [(256, 512, 1024)] * 2
    assert plan.frameworks == ("megatron", "fsdp2", "deepspeed")
    assert any(words.startswith("failures.gpu_mtbf: 79200 h (derived") for words in plan.assumptions)


@pytest.mark.parametrize("file", sorted((ROOT / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_plans(file: Path) -> None:
    assert load_plan(file).sites


@pytest.mark.parametrize(("goal", "objective"), [
    ("{budget: 2 MUSD}", "fastest"), ("{deadline: 3 weeks}", "cheapest"),
    ("{deadline: 3 weeks, budget: 1 MUSD}", "cheapest"),
    ("{fastest: true, budget: $2M}", "fastest"), ("{value_of_time: 10 kUSD/day}", "trade_off"),
])  # fmt: skip
def test_goals(goal: str, objective: str) -> None:
    assert plan_of(TWO_SITES.replace("{deadline: 90 days}", goal)).goal.objective == objective


def test_amounts() -> None:
    plan = plan_of(TWO_SITES, "workload.tokens=15 T tokens", "goal={value_of_time: 86400 USD/day}",
                   "prices.people=0.6 MUSD/year", "workload.global_batch_size=[64, 300]")  # fmt: skip
    assert plan.workload.tokens == 15e12
    assert plan.goal.usd_per_s == 1.0
    assert plan.prices.people_usd_per_s * 365 * 86400 == pytest.approx(600_000)
    assert plan.workload.global_batch_sizes == (64, 128, 256, 300)
    assert plan_of(TWO_SITES, "workload.global_batch_size=4M tokens").workload.global_batch_sizes == (512,)


def test_the_cheapest_offer_is_taken_and_says_where_it_is_from() -> None:
    offer = plan_of(TWO_SITES).sites[0].offer
    assert (offer.provider, offer.term, offer.usd_per_gpu_hour, offer.date) == (
        "hyperstack",
        "reserved",
        2.72,
        "2026-08-26",
    )
    assert plan_of(TWO_SITES, "prices.terms=on-demand").sites[0].offer.usd_per_gpu_hour == 3.20
    assert plan_of(TWO_SITES, "prices.providers=[lambda]").sites[0].offer.usd_per_gpu_hour == 3.99


def test_a_plans_own_price_is_over_its_files_over_the_catalogues(tmp_path: Path) -> None:
    (tmp_path / "us.yaml").write_text(
        "rent:\n- {gpu: h100-sxm-80gb, price: 9 USD/h, date: 2026-11-01}\n- {node: dgx-a100-80gb, price: 8 USD/h}\n"
    )
    text = TWO_SITES + "prices: {file: us.yaml, rent: {dgx-a100-80gb: 7 USD/h}}\n"
    plan = load_plan_text(text, "x.yaml", folder=tmp_path)
    assert [site.offer.usd_per_gpu_hour for site in plan.sites] == [9.0, 7.0]
    assert plan.sites[0].offer.date == "2026-11-01"


def test_what_a_node_cannot_make_is_left_out() -> None:
    plan = plan_of(TWO_SITES, "candidates.num_gpus=[4, 8, 12, 64]")
    assert plan.sites[0].num_gpus == (4, 8, 64)
    assert plan_of(TWO_SITES, "constraints.max_gpus=8").sites[0].num_gpus == (8,)


def test_networks_multiply_the_sites() -> None:
    plan = plan_of(TWO_SITES, "candidates.networks=[ib-ndr-400-rail, 100 Gbit/s RoCE per GPU]")
    assert [site.name for site in plan.sites] == [
        "dgx-h100, ib-ndr-400-rail", "dgx-h100, 100 Gbit/s RoCE per GPU",
        "dgx-a100-80gb, ib-ndr-400-rail", "dgx-a100-80gb, 100 Gbit/s RoCE per GPU",
    ]  # fmt: skip


def test_a_price_is_needed_only_where_money_counts() -> None:
    text = ONE_NODE.replace("dgx-h100", "dgx-h20")
    assert plan_of(text).sites[0].offer.usd_per_gpu_hour == 0
    with pytest.raises(ScenarioError, match="no price is known of dgx-h20's h20-sxm-96gb"):
        plan_of(text, "goal={cheapest: true}")
    cheapest = "goal={cheapest: true}"
    assert plan_of(text, cheapest, "candidates.owned={dgx-h20: 8}").sites[0].offer.usd_per_gpu_hour == 0
    with pytest.raises(ScenarioError, match="no price is known"):  # of the rest
        plan_of(text, cheapest, "candidates.owned={dgx-h20: 4}")


def test_the_schema_names_every_section() -> None:
    properties = plan_schema()["properties"]
    assert set(properties) >= {"model", "workload", "goal", "candidates", "prices", "failures", "storage"}
    assert "deadline" in properties["goal"]["properties"]


def test_all_that_is_wrong_with_an_offer_is_said_at_once(tmp_path) -> None:
    (tmp_path / "prices.yaml").write_text("rent:\n  - {gpu: h100, price: 2.1, date: yesterday}\n  - {price: 2 USD/h}\n")
    text = "model: llama-3-8b\nworkload: {tokens: 1e9, sequence_length: 8192}\nprices: {file: prices.yaml}\n"
    with pytest.raises(ScenarioError) as error:
        load_plan_text(text + "candidates: {nodes: []}\n", "x.yaml", folder=tmp_path)
    said = [(finding.line, finding.problem) for finding in error.value.findings]
    assert said == [
        (2, "rent.0.price: 2.1 is not a price per h"), (2, "rent.0.date: 'yesterday' is not a date"),
        (2, "unknown gpu 'h100'"), (3, "rent.1 says neither gpu nor node"),
        (4, "candidates.nodes: the list is empty"),
    ]  # fmt: skip


def test_an_empty_plan_names_its_own_schema() -> None:
    with pytest.raises(ScenarioError) as error:
        load_plan_text("", "x.yaml")
    assert str(error.value) == "x.yaml: is empty\n    see 'sim schema plan' for what a plan holds"


def test_nodes_above_the_most_gpus_are_left_out_with_a_word() -> None:
    text = (
        TINY + "candidates: {nodes: [dgx-h100, {node: pcie-8x-4090, num_gpus: 16}], num_gpus: 8}\n"
        "constraints: {max_gpus: 8}\n"
    )
    for owned in ((), ("candidates.owned={pcie-8x-4090: 8}",)):  # which the plan names, though it has no place
        plan = plan_of(text, *owned)
        assert [site.name for site in plan.sites] == ["dgx-h100"]
        assert "constraints.max_gpus is below the least of some nodes: 16 of pcie-8x-4090" in plan.assumptions


def test_an_axis_that_a_plan_names_is_kept_by_every_framework() -> None:
    """deepspeed has no tensor parallelism here: it is 1, which tp: 2 does not allow."""
    for given, frameworks in (("2", {"megatron", "fsdp2"}), ("[1, 2]", {"megatron", "fsdp2", "deepspeed"})):
        plan = plan_of(TINY + f"candidates: {{nodes: dgx-h100, num_gpus: 8}}\naxes: {{tp: {given}}}\n")
        found = list(candidates(plan))
        assert {c.framework for c in found} == frameworks
        assert {c.tp for c in found} <= {1, 2}
