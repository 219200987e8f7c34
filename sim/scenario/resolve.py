"""From what the file says to a complete question: names looked up, defaults filled in, each with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, cast

from sim.catalog.schema import GpuFacts, NetworkFacts, NodeFacts
from sim.errors import Finding, ScenarioError
from sim.interop.deepspeed_config import settings_of
from sim.interop.hf_config import MODEL_KEYS
from sim.interop.values import Problem, dotted, either, near, read_mapping
from sim.scenario import fields
from sim.scenario.checks import run_rules
from sim.scenario.document import Document
from sim.scenario.draft import ModelDraft
from sim.scenario.schema import (
    AllocatorConfig,
    ClusterSpec,
    DdpSettings,
    Faults,
    Fsdp1Settings,
    Fsdp2Settings,
    MegatronSettings,
    ModelConfig,
    Parallelism,
    Scenario,
    Training,
)
from sim.scenario.sections.cluster import read_cluster
from sim.scenario.sections.deepspeed import activations_elsewhere, deepspeed_of, read_deepspeed
from sim.scenario.sections.fsdp import check_fsdp
from sim.scenario.sections.megatron import settle_megatron
from sim.scenario.sections.model import read_model
from sim.scenario.sections.parallelism import read_parallelism
from sim.scenario.sections.resolution import Resolution, path_of
from sim.scenario.sections.settings import check_tensor_parallel_overlap, read_allocator, read_settings
from sim.scenario.sections.training import read_training
from sim.scenario.supported import unsupported

if TYPE_CHECKING:
    from sim.scenario.calibration import Calibration


def resolve(doc: Document, folder: FilePath, findings: list[Finding], simulate: bool) -> Scenario:
    """Return the complete question. Raises ScenarioError with every finding, those of reading included."""
    r = Resolution(doc, folder, findings)
    d = r.draft
    top, wrong = read_mapping(doc.data, fields.TOP, (), r.problems)
    framework: str | None = top.get("framework")
    if framework is None and "framework" not in wrong:
        if top.get("deepspeed") is not None:
            framework = "deepspeed"
            r.sources["framework"] = "deepspeed settings are given"
        else:
            misspelt = any("framework" in near(key, fields.TOP, 1) for key in doc.data if key not in fields.TOP)
            if not misspelt:
                r.problems.append(
                    Problem((), "framework is missing", "write framework: ddp, fsdp2, fsdp1, deepspeed or megatron")
                )
    if framework is not None:
        d.framework = framework
    if "model" in top:
        read_model(r, top["model"])
    if "cluster" in top:
        read_cluster(r, top["cluster"])
    read_deepspeed(r, top.get("deepspeed"), framework)
    reading = deepspeed_of(r)
    d.offload_optimizer = reading.fields.get("offload_optimizer", "none") if reading else "none"
    d.offload_param = reading.fields.get("offload_param", "none") if reading else "none"
    read_parallelism(r, top.get("parallelism"), framework)
    if "training" in top:
        read_training(r, top["training"], framework)
    ddp = read_settings(r, "ddp", fields.DDP, top.get("ddp"), framework, "ddp")
    fsdp2 = read_settings(r, "fsdp2", fields.FSDP2, top.get("fsdp2"), framework, "fsdp2")
    fsdp1 = read_settings(r, "fsdp1", fields.FSDP1, top.get("fsdp1"), framework, "fsdp1")
    megatron = read_settings(r, "megatron", fields.MEGATRON, top.get("megatron"), framework, "megatron")
    settle_megatron(r, megatron, framework)
    check_fsdp(r, fsdp2 if framework == "fsdp2" else fsdp1, framework)
    check_tensor_parallel_overlap(r, megatron, fsdp2)
    allocator = read_allocator(r, top.get("allocator"))
    d.faults = top.get("faults", {})
    calibration = _calibration(r, top.get("calibration"))
    r.problems = [_sent_home(problem) for problem in r.problems]
    r.problems.extend(run_rules(d))
    if simulate:
        taken = {problem.path for problem in r.problems}
        r.problems.extend(problem for problem in unsupported(d) if problem.path not in taken)
    if r.problems or r.findings:
        raise ScenarioError(_distinct([*r.findings, *(doc.finding(problem) for problem in r.problems)]))
    _notices(r, resolved="sources" in top)
    name = top.get("name") or FilePath(doc.file).stem
    if "name" not in top:
        r.sources["name"] = "the file's name"
    scenario = _scenario(r, name, ddp, fsdp2, fsdp1, megatron, allocator, top)
    return scenario if calibration is None else scenario.model_copy(update={"calibration": calibration})


_SECTIONS = {
    "cluster": fields.CLUSTER,
    "cluster.gpu": fields.GPU,
    "parallelism": fields.PARALLELISM,
    "training": fields.TRAINING,
    "ddp": fields.DDP,
    "fsdp2": fields.FSDP2,
    "fsdp1": fields.FSDP1,
    "megatron": fields.MEGATRON,
    "allocator": fields.ALLOCATOR,
    "model": MODEL_KEYS,
}


def _sent_home(problem: Problem) -> Problem:
    """Where an unknown key is known in another section, say so."""
    if not problem.problem.startswith("unknown key ") or not problem.path:
        return problem
    here, key = dotted(problem.path[:-1]), problem.path[-1]
    homes = [section for section, table in _SECTIONS.items() if key in table and section != here]
    if key in fields.TOP and here:
        return problem._replace(remedy=f"{key} stands at the top, not under {here}")
    return problem._replace(remedy=f"write it as {either([f'{home}.{key}' for home in homes])}") if homes else problem


def _calibration(r: Resolution, given: str | None) -> Calibration | None:
    """Return the calibration that the scenario names, if it was measured on the GPU that it asks for."""
    if given is None:
        return None
    from sim.scenario.calibration import read_calibration

    path = path_of(r, given)
    try:
        found = read_calibration(path, str(path))
    except ScenarioError as error:
        for finding in error.findings:
            if finding.line:
                r.findings.append(finding)
            else:  # of the file as a whole: said where it is named
                r.problems.append(Problem(("calibration",), f"{given}: {finding.problem}", finding.remedy))
        return None
    d = r.draft
    if found.gpu and d.knows("gpu") and found.gpu != d.gpu.name:
        problem = f"calibration: {given} was measured on {found.gpu}, and the scenario's GPU is {d.gpu.name}"
        r.problems.append(Problem(("calibration",), problem, "calibrate on the GPU that the scenario asks for"))
    return found


def _distinct(findings: list[Finding]) -> list[Finding]:
    return list(dict.fromkeys(findings))


def _scenario(
    r: Resolution,
    name: str,
    ddp: dict[str, Any],
    fsdp2: dict[str, Any],
    fsdp1: dict[str, Any],
    megatron: dict[str, Any],
    allocator: dict[str, Any],
    top: dict[str, Any],
) -> Scenario:
    d, m = r.draft, r.draft.model
    model = {key: getattr(m, key) for key in ModelConfig.model_fields if m.knows(key)}
    settings = settings_of(deepspeed_of(r), d.zero, d.gradient_clipping)
    if d.framework == "deepspeed":
        reading = deepspeed_of(r)
        given = reading.fields if reading else {}
        for item in dataclasses.fields(settings):
            key = f"deepspeed.{item.name}"
            if item.name not in given and key not in r.sources:
                r.sources[key] = "DeepSpeed's default (deepspeed/runtime/zero/config.py)"
        r.sources["deepspeed.stage"] = "parallelism.zero"
        r.sources["deepspeed.gradient_clipping"] = "training.gradient_clipping"
    carried_sources = top.get("sources")
    sources = dict(r.sources)
    if isinstance(carried_sources, Mapping):
        changed = {dotted(path) for path in r.doc.origin}
        sources.update((key, str(value)) for key, value in carried_sources.items() if key not in changed)
    carried = top.get("warnings")
    warnings = [*(str(item) for item in carried)] if isinstance(carried, list) else []
    warnings += [warning for warning in r.warnings if warning not in warnings]
    return Scenario(
        name=name,
        model=ModelConfig(**model),
        cluster=ClusterSpec(
            node=d.node,
            gpu=d.gpu,
            network=d.network,
            num_nodes=d.num_nodes,
            num_gpus=d.num_gpus,
            written=r.written,
            backend=cast("Any", d.backend),
            alpha_s=d.alpha or 0.0,
            beta_bytes_per_s=d.beta or 0.0,
            nccl=d.nccl,
        ),
        framework=cast("Any", d.framework),
        parallelism=Parallelism(
            dp=d.dp,
            tp=d.tp,
            pp=d.pp,
            cp=d.cp,
            ep=d.ep,
            zero=cast("Any", d.zero),
            sp=d.sp,
            schedule=d.schedule,
            vpp=d.vpp,
            layers_per_stage=d.layers_per_stage,
            order=d.order,
            cp_comm=cast("Any", d.cp_comm),
        ),
        training=Training(
            sequence_length=d.sequence_length,
            micro_batch_size=d.micro_batch_size,
            global_batch_size=d.global_batch_size,
            precision=cast("Any", d.precision),
            optimizer=cast("Any", d.optimizer),
            recompute=cast("Any", d.recompute),
            attention=cast("Any", d.attention),
            gradient_clipping=d.gradient_clipping,
            compile=d.compile,
            code=cast("Any", d.code),
            loss=cast("Any", d.loss),
            norms=cast("Any", d.norms),
            softmax=cast("Any", d.softmax),
            metrics=d.metrics,
            launch_blocking=d.launch_blocking,
            cpu_threads=d.cpu_threads,
            sample_length=d.sample_length,
            recompute_interval=d.recompute_interval,
            checkpoint=cast("Any", d.checkpoint),
        ),
        ddp=DdpSettings(**ddp),
        deepspeed=settings,
        fsdp2=Fsdp2Settings(**fsdp2),
        fsdp1=Fsdp1Settings(**fsdp1),
        megatron=MegatronSettings(**megatron),
        allocator=AllocatorConfig(**allocator),
        faults=Faults(**top.get("faults", {})),
        sources=dict(sorted(sources.items())),
        warnings=tuple(warnings),
    )


def resolve_model(doc: Document, folder: FilePath, given: object) -> tuple[ModelDraft | None, list[Finding]]:
    """Return the model that another kind of document names under its key ``model``, and what is wrong with it."""
    r = Resolution(doc, folder, [])
    read_model(r, given)
    r.problems.extend(run_rules(r.draft))
    return (
        r.draft.model if r.draft.knows("model") else None,
        _distinct([*r.findings, *(doc.finding(problem) for problem in r.problems)]),
    )


def resolve_node(
    doc: Document, folder: FilePath, node: str, network: str | None, at: tuple[str, ...]
) -> tuple[NodeFacts | None, GpuFacts | None, NetworkFacts | None, dict[str, Any], list[Finding]]:
    """Return a node with its GPU and network as another document names them, how a scenario writes them, and mistakes.

    ``at`` is where the document names it.
    """
    r = Resolution(doc, folder, [])
    read_cluster(r, {"node": node, "num_nodes": 2, **({"network": network} if network else {})})
    d = r.draft
    found = [doc.finding(problem._replace(path=at)) for problem in r.problems]
    return (
        d.node if d.knows("node") else None,
        d.gpu if d.knows("gpu") else None,
        d.network if d.knows("network") else None,
        r.written,
        _distinct([*r.findings, *found]),
    )


def _notices(r: Resolution, resolved: bool) -> None:
    """Say what is odd but no mistake. A resolved file brings along what was said of its model's config."""
    d, m = r.draft, r.draft.model
    if d.pp > 1 and d.layers_per_stage is None and m.num_hidden_layers % (d.pp * d.vpp):
        r.warnings.append(
            f"{m.num_hidden_layers} layers do not divide over pp {d.pp}"
            + (f" x vpp {d.vpp}" if d.vpp > 1 else "")
            + " stages: they are spread as evenly as they go; parallelism.layers_per_stage says otherwise"
        )
    if d.tp > 1 and m.vocab_size % d.tp:
        r.warnings.append(
            f"a vocabulary of {m.vocab_size} does not divide over tp {d.tp}: it is padded, as Megatron pads it"
        )
    if resolved:
        return
    if (asked := activations_elsewhere(d)) and (d.checkpoint != "deepspeed" or d.recompute != "full"):
        why = "recompute is not full" if d.recompute != "full" else f"code {d.code} calls torch's checkpoint"
        remedy = "" if d.recompute != "full" else "; training.checkpoint: deepspeed says otherwise"
        r.warnings.append(f"activation_checkpointing.{asked} changes nothing: {why}{remedy}")
    if m.position == "rope" and m.given_positions and d.sequence_length > m.max_position_embeddings:
        r.warnings.append(
            f"sequence_length {d.sequence_length} is beyond the {m.max_position_embeddings} positions that the "
            "model was made for; size and time are not affected"
        )
    if d.attention == "flash-2" and m.head_dim > 256:
        r.warnings.append(
            f"model.head_dim {m.head_dim}: FlashAttention takes heads up to 256 wide and would refuse these"
        )
    if m.at == "place" and m.head_dim * m.num_attention_heads != m.hidden_size and not m.family:
        r.warnings.append(
            f"model.head_dim {m.head_dim} x {m.num_attention_heads} heads is not hidden_size {m.hidden_size}; "
            "taken as written"
        )
