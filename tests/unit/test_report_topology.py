"""``sim topology``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_cli import sim  # noqa: F401  the fixture
from test_interop_nccl_tests import HEAD, RANKS, REDUCE

from sim.catalog import load

FOLDER = Path(__file__).parent / "topologies"


def test_a_node_of_the_catalogue(sim):  # noqa: F811
    code, out, err = sim("topology", "dgx-h100")
    assert (code, err) == (0, "")
    assert "  ├─ pcie-switch0  pcie 55.1 GB/s\n  │  ├─ gpu0  pcie 55.1 GB/s\n  │  └─ nic0  pcie 55.1 GB/s\n" in out
    assert "NCCL  24 channels, 360 GB/s expected of its rings" in out
    assert re.search(r"all_reduce +8 +1.00 GiB  nvls/Simple +\S+ ms +4[78]\d\.\d\n", out)  # measured: 464 to 470


def test_bus_bandwidths_of_several_nodes_as_json(sim):  # noqa: F811
    _, out, _ = sim("topology", "dgx-h100", "--nodes", "2", "--json")
    content = json.loads(out)
    assert [len(content["paths"]), len(content["nics"]), content["num_nodes"]] == [8, 8, 2]
    assert {(row["num_ranks"], row["num_nodes"]) for row in content["bus"]} == {(16, 2)}
    assert {row["collective"] for row in content["bus"]} == {
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast",
    }  # fmt: skip


def test_measured_beside_expected_with_signed_errors(sim, tmp_path):  # noqa: F811
    file = tmp_path / "all_reduce_perf.txt"
    text = RANKS.replace("host1", "host0") + HEAD + REDUCE + REDUCE.replace("198.60", "400.00")
    file.write_text(text, encoding="utf-8")
    _, out, _ = sim("topology", "dgx-h100", "--nccl-tests", str(file), "--json")
    first, second = json.loads(out)["bus"]
    assert first["measured_time_s"] == pytest.approx(198.6e-6)
    assert first["error"] == pytest.approx(first["time_s"] / 198.6e-6 - 1)
    assert abs(first["error"]) < 0.15
    assert second["error"] < -0.4
    _, out, _ = sim("topology", "dgx-h100", "--nccl-tests", str(file))
    assert re.search(r"mean error \d+\.\d%, signed -\d+\.\d%, 2 rows", out)


@pytest.mark.parametrize("name", ["dgx-a100.txt", "dgx-1.txt", "ndv5.xml", "p4d-24xl.xml"])
def test_what_it_writes_it_reads(sim, tmp_path, name: str):  # noqa: F811
    written = tmp_path / "mine.yaml"
    code, out, _ = sim("topology", FOLDER / name, "--write", written, "--json")
    assert code == 0
    again = json.loads(sim("topology", written, "--json")[1])
    first = json.loads(out)
    assert [again[key] for key in ("tree", "paths", "nics", "nccl", "bus")] == [
        first[key] for key in ("tree", "paths", "nics", "nccl", "bus")
    ]
    assert load.node(str(written)).gpu == first["gpu"]
    assert [line[2:] for line in written.read_text(encoding="utf-8").splitlines() if line.startswith("# ")][
        : len(first["notes"])
    ] == first["notes"]


def test_a_picture(sim, tmp_path):  # noqa: F811
    code, _, _ = sim("topology", "dgx-2", "--out", tmp_path / "drawn", "--json")
    assert code == 0
    assert (tmp_path / "drawn" / "topology.png").read_bytes().startswith(b"\x89PNG")


def test_graphs_of_a_dump(sim):  # noqa: F811
    _, out, _ = sim("topology", FOLDER / "ncv4-graph.xml")
    assert "  ring                  2  12 GB/s  12 GB/s  SYS, PIX\n" in out
    assert "  ring 1  0 3 2 1\n" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dgx-h1000"], "dgx-h1000: there is no node 'dgx-h1000'\n    did you mean dgx-h100?\n"),
        (["nothing.txt"], "nothing.txt: does not exist\n    give a file, or a name of `sim catalog node`\n"),
        (["dgx-h100", "--gpu", "h100"], "--gpu: there is no GPU 'h100'\n"),
        (["FOLDER/dgx-1.txt", "--nodes", "2"], "--nodes: dgx-1 does not say its network\n    write --network NAME"),
        (["dgx-h100", "--network", "fast"], "--network: 'fast' does not describe a network; write"),
        (["FOLDER/ncv4-graph.xml", "--write", "x.yaml"], "ncv4-graph.xml: graphs are no machine to write or draw\n"),
        (
            ["FOLDER/dgx-1.txt", "--gpu", "rtx-4090"],
            "has NVLinks between GPUs, and rtx-4090 has no NVLink\n    name",
        ),
        (["FOLDER/README.md"], "README.md"),
        (["dgx-h100", "--gpu", "a30"], "--gpu: dgx-h100 says itself which GPU it has\n    leave it out;"),
        (["/dev/null"], "/dev/null: is empty\n    give the output of `nvidia-smi topo -m`"),
    ],
)
def test_what_it_refuses(sim, words: list[str], said: str):  # noqa: F811
    code, out, err = sim("topology", *[word.replace("FOLDER", str(FOLDER)) for word in words])
    assert (code, out) == (2, "")
    assert said in err


def test_more_ranks_than_the_nodes_have_gpus(sim, tmp_path):  # noqa: F811
    file = tmp_path / "all_reduce_perf.txt"
    file.write_text(RANKS.replace("host1", "host0") + HEAD + REDUCE, encoding="utf-8")
    code, _, err = sim("topology", "hgx-a100-4-80gb", "--nccl-tests", file)
    assert code == 2
    assert "8 ranks on 1 nodes do not fit nodes of 4 GPUs\n    give the topology of these nodes\n" in err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_as_windows_writes_them(sim, tmp_path, encoding: str):  # noqa: F811
    text = (FOLDER / "dgx-1.txt").read_text()
    (tmp_path / "dgx-1.txt").write_text(text, encoding=encoding)
    _, expected, _ = sim("topology", FOLDER / "dgx-1.txt")
    assert sim("topology", tmp_path / "dgx-1.txt") == (0, expected, "")


def test_remarks_on_measured_runs_are_notes(sim, tmp_path):  # noqa: F811
    file = tmp_path / "all_reduce_perf.txt"
    file.write_text(RANKS + HEAD + REDUCE + "# error: remote process has exited\n", encoding="utf-8")
    code, out, _ = sim("topology", "dgx-h100", "--nccl-tests", file, "--json")
    assert code == 0
    assert json.loads(out)["notes"] == [f"{file}: line 13: the run failed: error: remote process has exited"]
