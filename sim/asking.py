"""The questions of ``sim init``: each has a default, is asked again until its answer is good, and becomes a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sim.errors import ScenarioError
from sim.scenario.load import load_scenario_mapping

Ask = Callable[[str, str], str]
"""(question, default) -> answer."""


class _Question(NamedTuple):
    words: str
    path: tuple[str, ...]
    default: str
    whole: bool = False


_QUESTIONS = (
    _Question("Model (a name of 'sim catalog model', or the path of a config.json)", ("model",), "llama-3.1-8b"),
    _Question("Node ('sim catalog node' lists them)", ("cluster", "node"), "dgx-h100"),
    _Question("GPUs in all", ("cluster", "num_gpus"), "8", True),
    _Question("Framework (ddp, fsdp1, fsdp2, deepspeed, megatron)", ("framework",), "fsdp2"),
    _Question("ZeRO stage (0 to 3)", ("parallelism", "zero"), "3", True),
    _Question("Tensor parallelism", ("parallelism", "tp"), "1", True),
    _Question("Pipeline stages", ("parallelism", "pp"), "1", True),
    _Question("Tokens of a sequence", ("training", "sequence_length"), "4096", True),
    _Question("Sequences of a rank in one microbatch", ("training", "micro_batch_size"), "1", True),
    _Question("Precision (bf16, fp16, fp32, fp8)", ("training", "precision"), "bf16"),
    _Question("Recompute (none, selective, selective-op, full)", ("training", "recompute"), "full"),
)
_STAGE_OF = {"ddp": "0", "megatron": "1"}
"""The usual stage where it is not 3."""


def ask_scenario(ask: Ask, say: Callable[[str], None]) -> str:
    """Return a scenario file of the answers. What an answer alone makes wrong is said at once, and asked again."""
    data: dict[str, Any] = {}
    for question in _QUESTIONS:
        default = question.default
        if question.path == ("parallelism", "zero"):
            default = _STAGE_OF.get(data["framework"], default)
        while True:
            answer = ask(question.words, default).strip()
            value: Any = int(answer) if question.whole and answer.isdigit() else answer
            problems = _problems(data, question.path, value)
            if not problems:
                break
            for problem in problems:
                say(problem)
        _put(data, question.path, value)
    batch = _smallest_batch(data)
    answer = ask("Sequences of a step over all ranks", str(batch)).strip()
    _put(data, ("training", "global_batch_size"), int(answer) if answer.isdigit() else answer)
    return _text(data)


def _put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        data = data.setdefault(part, {})
    data[path[-1]] = value


def _problems(data: dict[str, Any], path: tuple[str, ...], value: Any) -> list[str]:
    """Return what the scenario so far, with usual values for what was not asked yet, says of this key alone."""
    trial: dict[str, Any] = {
        "model": "llama-3.1-8b", "cluster": {"node": "dgx-h100", "num_gpus": 8}, "framework": "fsdp2",
        "training": {"sequence_length": 1024, "micro_batch_size": 1},
    }  # fmt: skip
    known = {"model": data.get("model"), "framework": data.get("framework")}
    trial.update({key: found for key, found in known.items() if found and path != ("framework",)})
    trial["cluster"].update(data.get("cluster", {}))
    if path != ("cluster", "num_gpus"):
        trial["parallelism"] = dict(data.get("parallelism", {}))
    _put(trial, path, value)
    try:
        load_scenario_mapping(trial, "answer", simulate=False, file="answer")
    except ScenarioError as error:
        return [
            f"  {finding.problem}" + (f"\n  {finding.remedy}" if finding.remedy else "")
            for finding in error.findings
            if path[-1] in finding.problem or str(value) in finding.problem
        ]
    return []


def _smallest_batch(data: dict[str, Any]) -> int:
    """One microbatch of every data-parallel rank, or four for each stage of a pipeline."""
    parallelism, training = data["parallelism"], data["training"]
    model_ranks = parallelism["tp"] * parallelism["pp"]
    replicas = max(1, data["cluster"]["num_gpus"] // model_ranks)
    microbatches = 4 * parallelism["pp"] if parallelism["pp"] > 1 else 1
    return int(replicas * training["micro_batch_size"] * microbatches)


def _text(data: dict[str, Any]) -> str:
    import yaml

    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=False)
    return "# Does it fit, how long is a step, and where does the time go?\n" + body
