"""From what the file says to a complete question: names looked up, defaults filled in, each with its source."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, cast

from sim.catalog import load as catalog
from sim.catalog.schema import Fact, GpuFacts, NetworkFacts, NodeFacts
from sim.errors import Finding, ScenarioError
from sim.interop.deepspeed_config import DeepSpeedReading, DeepSpeedSettings, read_deepspeed_config, settings_of
from sim.interop.hf_config import MODEL_KEYS, HfModel, complete, read_hf_config
from sim.interop.values import Problem, WrongValueError, dotted, either, near, read_mapping, show, suggest
from sim.scenario import fields
from sim.scenario.checks import mesh_fits_cluster, multiples, run_rules, write
from sim.scenario.document import Document, UnreadableError, parse_json, read_text
from sim.scenario.draft import Draft, ModelDraft, UnknownError
from sim.scenario.schema import (
    NCCL_VERSION,
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
from sim.scenario.supported import unsupported

if TYPE_CHECKING:
    from sim.scenario.calibration import Calibration

_MODEL_DEFAULTS = {
    name: spec.default for name, spec in ModelConfig.model_fields.items() if not spec.is_required() and name != "name"
}

_OWN_DEFAULT = "sim's default"
MEGATRON_DROPOUT = 0.1
"""``--hidden-dropout`` and ``--attention-dropout`` where they are left out (megatron/training/arguments.py)."""
_LAYERS = {"async_tensor_model_parallel_allreduce"}
"""Megatron's settings of its layers, which Megatron-DeepSpeed runs too: they may stand under deepspeed."""
_LAYERS_IN_WORDS = "async_tensor_model_parallel_allreduce, which Megatron-DeepSpeed has too"

_CP_COMM = {"fsdp2": "all_gather", "deepspeed": "a2a"}
"""Megatron's is p2p, torch's ``context_parallel`` gathers unless told otherwise, DeepSpeed's Ulysses swaps heads."""


class _Resolver:
    """One resolution: the document, what is wrong so far, and where each default comes from."""

    def __init__(self, doc: Document, folder: FilePath, findings: list[Finding]) -> None:
        self.doc = doc
        self.folder = folder
        self.findings = findings
        self.problems: list[Problem] = []
        self.sources: dict[str, str] = {}
        self.warnings: list[str] = []
        self.written: dict[str, Any] = {}
        self.draft = Draft()
        self.ds_name = "deepspeed"

    # --- files and names ---------------------------------------------------------------------

    def _path_of(self, text: str) -> FilePath:
        path = FilePath(text).expanduser() if text.startswith("~/") else FilePath(text)
        return path if path.is_absolute() else self.folder / path

    def _json(self, path: FilePath, what: str, at: tuple[str, ...]) -> Document | None:
        """Return the document of a JSON file named in the scenario, or None (reported)."""
        try:
            return parse_json(read_text(path, _shown(path), what), _shown(path), what)
        except UnreadableError as error:
            self._report(error.finding, at)
            return None

    def _report(self, finding: Finding, at: tuple[str, ...]) -> None:
        """Add what is wrong in another file; where that is the file itself, say who names it."""
        if finding.line:
            self.findings.append(finding)
        else:
            self.problems.append(Problem(at, f"{finding.file}: {finding.problem}", finding.remedy))

    # --- sections ----------------------------------------------------------------------------

    def model(self, given: object) -> None:
        """Fill ``draft.model`` from a name, a path, or a mapping (which may override what ``config`` names)."""
        found = ModelDraft()
        overrides: Mapping[str, Any] = {}
        if isinstance(given, Mapping) and "config" in given:
            overrides = {key: value for key, value in given.items() if key != "config"}
            given = given["config"]
            if not isinstance(given, str):
                self.problems.append(
                    Problem(
                        ("model", "config"),
                        f"model.config: {show(given)} is not a name or a path",
                        "write a name such as llama-2-70b, or the path of a config.json",
                    )
                )
                return
        if isinstance(given, Mapping):
            at: Literal["place", "catalogue", "file"] = "place"
            if given.get("model_type"):  # the family's own key may differ from the one that --set names
                overrides = {k: v for k, v in given.items() if k in MODEL_KEYS and ("model", k) in self.doc.origin}
            read = read_hf_config(given, ("model",), self.problems, in_place=True)
            name = given.get("name") or given.get("_name_or_path") or ""
        elif isinstance(given, str):
            loaded = self._named_model(given.strip())
            if loaded is None:
                return
            read, at, name = loaded
        else:
            self.problems.append(
                Problem(
                    ("model",),
                    f"model: {show(given)} is neither a name, a path nor a mapping",
                    "write a name such as llama-2-70b, the path of a config.json, or the config itself",
                )
            )
            return
        if overrides:
            self._override_model(read, overrides)
        self._model_defaults(found, read, at, name if isinstance(name, str) else "")
        self.draft.model = found

    def _named_model(self, text: str) -> tuple[HfModel, Literal["place", "catalogue", "file"], str] | None:
        names = catalog.names("model")
        if text.lower() in names:
            read = read_hf_config(catalog.model_config(text.lower()), ("model",), self.problems)
            return read, "catalogue", text.lower()
        path = self._path_of(text)
        if not _exists(path):
            hub = re.fullmatch(r"[\w-][\w.-]*/([\w.-]+)", text) if not text.endswith(".json") else None
            if hub:
                bare = re.sub(r"(?i)^meta-|-(hf|base|instruct|v[0-9.]+)(?=-|$)", "", hub[1])
                close = near(bare, names)
                self.problems.append(
                    Problem(
                        ("model",),
                        f"unknown model {show(text)}: there is no such directory, and nothing is downloaded",
                        (f"did you mean {either(close)}? Or " if close else "") + "give the path of its config.json",
                    )
                )
                return None
            if "/" not in text and "\\" not in text and not text.endswith(".json"):
                self.problems.append(Problem(("model",), f"unknown model {show(text)}", suggest(text, names)))
                return None
        if _exists(path / "config.json"):
            path = path / "config.json"
        doc = self._json(path, "the model's config", ("model",))
        if doc is None:
            return None
        problems: list[Problem] = []
        read = read_hf_config(doc.data, (), problems)
        self.findings.extend(doc.finding(problem) for problem in problems)
        given = doc.data.get("_name_or_path")
        stem = path.parent.name if path.stem == "config" else path.stem
        return read, "file", given if isinstance(given, str) and given else stem

    def _override_model(self, read: HfModel, overrides: Mapping[str, Any]) -> None:
        values, wrong = read_mapping(overrides, MODEL_KEYS, ("model",), self.problems)
        if "bias" in values:
            bias = values.pop("bias")
            values = {"attention_bias": bias, "attention_output_bias": bias, "mlp_bias": bias, **values}
        derived = {key for key in ("head_dim", "num_key_value_heads") if key in read.sources and key not in values}
        if derived and values.keys() & {"hidden_size", "num_attention_heads"}:
            for key in sorted(derived):
                read.keys.pop(key, None)
        read.keys.update(values)
        read.wrong.update(wrong)
        complete(read.keys, read.sources, read.wrong)

    def _model_defaults(
        self, found: ModelDraft, read: HfModel, at: Literal["place", "catalogue", "file"], name: str
    ) -> None:
        for key, value in {**_MODEL_DEFAULTS, **read.keys}.items():
            if key not in read.wrong and key != "name":
                setattr(found, key, value)
        origin = {"catalogue": f"the catalogue's {name}", "file": f"{name}'s config.json", "place": ""}[at]
        for key in ModelConfig.model_fields:
            if key in read.sources:
                self.sources[f"model.{key}"] = read.sources[key]
            elif key in read.keys:
                if origin:
                    self.sources[f"model.{key}"] = origin
            elif key in _MODEL_DEFAULTS:
                self.sources[f"model.{key}"] = _OWN_DEFAULT
        found.name, found.at, found.family = name, at, read.family
        found.given_positions = "max_position_embeddings" in read.keys and (
            "max_position_embeddings" not in read.sources
        )

    def cluster(self, given: object) -> None:
        values, wrong = read_mapping(given, fields.CLUSTER, ("cluster",), self.problems)
        d = self.draft
        self._backend(values, wrong, given)
        node = self._node(values["node"]) if "node" in values else None
        if node is not None:
            d.node = node
            self._gpu(node, values.get("gpu"))
            if not wrong & {"num_nodes", "num_gpus"}:
                self._size(node, values.get("num_nodes"), values.get("num_gpus"))
            if "network" not in wrong:
                self._network(node, values.get("network"))
                if d.knows("network") and d.network is not None and d.knows("sharp") and d.sharp is not None:
                    d.network = dataclasses.replace(d.network, sharp=d.sharp)
        elif isinstance(values.get("gpu"), Mapping):
            read_mapping(values["gpu"], fields.GPU, ("cluster", "gpu"), self.problems)

    def _backend(self, values: Mapping[str, Any], wrong: set[str], given: object) -> None:
        """Whose collectives run; what is left out is NCCL's."""
        d = self.draft
        if not wrong & {"backend"}:
            d.backend = values.get("backend", "nccl")
            if "backend" not in values:
                self.sources["cluster.backend"] = _OWN_DEFAULT
        if "sharp" not in wrong:
            d.sharp = values.get("sharp")
        if not wrong & {"alpha", "beta"}:
            d.alpha, d.beta = values.get("alpha"), values.get("beta")
        if "nccl" not in wrong:
            d.nccl = values.get("nccl", NCCL_VERSION)
            if "nccl" in values and d.knows("backend") and d.backend != "nccl":
                problem = f"cluster.nccl is given, but backend is {d.backend}"
                self.problems.append(Problem(("cluster", "nccl"), problem, "write backend: nccl, or leave nccl out"))
        for key in ("backend", "nccl", "sharp", "alpha", "beta"):
            if key in values and isinstance(given, Mapping):
                self.written[key] = values[key] if key == "backend" else given[key]

    def _node(self, text: str) -> NodeFacts | None:
        path = self._path_of(text)
        if _is_path(text):
            self.written["node"] = str(path.resolve())
            return cast("NodeFacts | None", self._users_file(lambda: catalog.node(str(path)), ("cluster", "node")))
        self.written["node"] = text.lower()
        try:
            return catalog.node(text.lower())
        except (KeyError, OSError, ValueError):
            self.problems.append(
                Problem(("cluster", "node"), f"unknown node {show(text)}", suggest(text, catalog.names("node")))
            )
            return None

    def _users_file(self, read: Any, path: tuple[str, ...]) -> Any:
        """Call a reader of the catalogue on a user's own file; what it finds wrong there is reported."""
        try:
            return read()
        except ScenarioError as error:
            for finding in error.findings:
                self._report(dataclasses.replace(finding, file=_shown(FilePath(finding.file))), path)
        except (KeyError, OSError, ValueError) as error:
            self.problems.append(Problem(path, f"{dotted(path)}: {str(error)[:200]}", "check the file"))
        return None

    def _gpu(self, node: NodeFacts, given: object) -> None:
        path = ("cluster", "gpu")
        try:
            name = node.gpu
            usual = catalog.gpu(name)
        except (KeyError, OSError, ValueError):
            self.problems.append(
                Problem(
                    ("cluster", "node"),
                    f"node {node.name} has unknown GPUs {show(node.gpu)}",
                    suggest(node.gpu, catalog.names("gpu")),
                )
            )
            return
        if given is None:
            self.sources["cluster.gpu"] = f"the GPU of node {node.name}"
            self.draft.gpu = usual
            return
        mapping = {"name": given} if isinstance(given, str) else given
        before = len(self.problems)
        values, _ = read_mapping(mapping, fields.GPU, path, self.problems)
        if len(self.problems) > before:
            return
        if "name" in values:
            name = values["name"].lower()
            try:
                usual = catalog.gpu(name)
            except (KeyError, OSError, ValueError):
                self.problems.append(
                    Problem(
                        (*path, "name"),
                        f"unknown GPU {show(values['name'])}",
                        suggest(values["name"], catalog.names("gpu")),
                    )
                )
                return
        self.written["gpu"] = dict(mapping) if isinstance(mapping, Mapping) else {}
        self.draft.gpu = overridden(usual, values, self.written["gpu"])

    def _size(self, node: NodeFacts, num_nodes: int | None, num_gpus: int | None) -> None:
        """Work out nodes and GPUs: whole nodes, a part of one, or an equal part of each where both are given."""
        d, per_node = self.draft, node.num_gpus
        d.gives_nodes = num_nodes is not None
        if num_gpus is None:
            if num_nodes is None:
                num_nodes = 1
                self.sources["cluster.num_nodes"] = "one node, as neither num_nodes nor num_gpus is given"
            num_gpus = num_nodes * per_node
            self.sources["cluster.num_gpus"] = f"{num_nodes} x {per_node} GPUs of {node.name}"
        elif num_nodes is None:
            num_nodes = self._nodes_for(node, num_gpus)
            if num_nodes is None:
                return
            self.sources["cluster.num_nodes"] = f"{num_gpus} GPUs on nodes of {per_node}"
        elif num_gpus % num_nodes or num_gpus > num_nodes * per_node:
            fits = num_nodes * per_node
            self.problems.append(
                Problem(
                    ("cluster", "num_gpus"),
                    f"cluster.num_gpus = {num_gpus} on num_nodes = {num_nodes} nodes of {per_node} GPUs",
                    f"write num_gpus: {fits}, or leave one of the two out",
                )
            )
            return
        d.num_nodes, d.num_gpus = num_nodes, num_gpus

    def _nodes_for(self, node: NodeFacts, num_gpus: int) -> int | None:
        per_node = node.num_gpus
        if num_gpus <= per_node:
            return 1
        if num_gpus % per_node == 0:
            return num_gpus // per_node
        fewest = -(-num_gpus // per_node)
        down, up = num_gpus // per_node * per_node, fewest * per_node
        evenly = f"; for {num_gpus // fewest} of each write num_nodes: {fewest} too" if num_gpus % fewest == 0 else ""
        self.problems.append(
            Problem(
                ("cluster", "num_gpus"),
                f"cluster.num_gpus = {num_gpus} is neither a part of one node nor whole nodes of {per_node}",
                f"write num_gpus: {down} or {up}{evenly}",
            )
        )
        return None

    def _network(self, node: NodeFacts, text: str | None) -> None:
        d = self.draft
        if text is None:
            if not d.knows("num_nodes"):
                return
            if d.num_nodes == 1 or not node.default_network:
                d.network = None
                if d.num_nodes == 1:
                    self.sources["cluster.network"] = "none: there is one node"
                return
            try:
                d.network = catalog.network(node.default_network)
                self.written["network"] = node.default_network
                self.sources["cluster.network"] = f"node {node.name}'s default network"
            except (KeyError, OSError, ValueError):
                self.problems.append(
                    Problem(
                        ("cluster", "node"),
                        f"node {node.name} names unknown network {show(node.default_network)}",
                        suggest(node.default_network, catalog.names("network")),
                    )
                )
            return
        path = ("cluster", "network")
        self.written["network"] = text
        if ("/s " in text or " per " in text) and not text.endswith((".yaml", ".yml")):
            try:
                d.network = catalog.network_in_words(text, node)
            except (ValueError, OverflowError) as error:
                problem, _, remedy = str(error).partition("; ")
                self.problems.append(Problem(path, f"cluster.network: {problem}", remedy))
        elif _is_path(text):
            self.written["network"] = str(self._path_of(text).resolve())
            read = self._users_file(lambda: catalog.network(str(self._path_of(text))), path)
            if read is not None:
                d.network = read
        else:
            try:
                d.network = catalog.network(text.lower())
            except (KeyError, OSError, ValueError):
                remedy = suggest(text, catalog.names("network"), most=8)
                words = "" if remedy.startswith("did") else "; or write words: '400 Gbit/s RoCE per GPU'"
                self.problems.append(Problem(path, f"unknown network {show(text)}", remedy + words))

    def deepspeed(self, given: object, framework: str | None) -> None:
        """Read DeepSpeed's own settings, from a file or in place."""
        d = self.draft
        d.deepspeed = None
        if given is None:
            return
        if framework is not None and framework != "deepspeed":
            self.problems.append(
                Problem(
                    ("deepspeed",),
                    f"deepspeed settings are given, but framework is {framework}",
                    "write framework: deepspeed, or remove them",
                )
            )
            return
        hidden = d.model.hidden_size if d.knows("model") and d.model.knows("hidden_size") else None
        overrides: Mapping[str, Any] = {}
        if isinstance(given, Mapping) and "config" in given:
            overrides = {key: value for key, value in given.items() if key != "config"}
            given = given["config"]
        if isinstance(given, str):
            self.ds_name = FilePath(given).name
            doc = self._json(self._path_of(given), "DeepSpeed's settings", ("deepspeed",))
            if doc is None:
                d.forget("deepspeed")
                return
            problems: list[Problem] = []
            config = _merged(doc.data, overrides) if overrides else doc.data
            reading = read_deepspeed_config(config, (), problems, hidden)
            for problem in problems:
                ours = ("deepspeed", *problem.path)
                mine = ours in self.doc.lines or ours in self.doc.origin
                self.findings.append(self.doc.finding(problem._replace(path=ours)) if mine else doc.finding(problem))
        elif isinstance(given, Mapping):
            reading = read_deepspeed_config(given, ("deepspeed",), self.problems, hidden)
        else:
            self.problems.append(
                Problem(
                    ("deepspeed",),
                    f"deepspeed: {show(given)} is neither a path nor a mapping",
                    "write the path of a ds_config.json, or its content in place",
                )
            )
            d.forget("deepspeed")
            return
        for key, words in reading.sources.items():
            self.sources[f"deepspeed.{key}"] = words
        prefix = "" if self.ds_name == "deepspeed" else f"{self.ds_name}: "
        self.warnings.extend(prefix + warning for warning in reading.warnings)
        d.deepspeed = reading

    def _ds(self) -> DeepSpeedReading | None:
        return self.draft.deepspeed if self.draft.knows("deepspeed") else None

    def parallelism(self, given: object, framework: str | None) -> None:
        values, wrong = read_mapping(given, fields.PARALLELISM, ("parallelism",), self.problems)
        d = self.draft
        for axis in ("tp", "pp", "cp", "ep", "vpp"):
            if axis not in wrong:
                setattr(d, axis, values.get(axis, 1))
                if axis not in values:
                    self.sources[f"parallelism.{axis}"] = "1, as it is left out"
        if "layers_per_stage" not in wrong:
            d.layers_per_stage = values.get("layers_per_stage")
        if "order" not in wrong:
            d.order = values.get("order")
        if "cp_comm" not in wrong:
            self._exchange(values, framework)
        if "schedule" not in wrong:
            d.schedule = values.get("schedule", "interleaved" if values.get("vpp", 1) > 1 else "1f1b")
            if "schedule" not in values:
                self.sources["parallelism.schedule"] = "Megatron's and DeepSpeed's default"
        if "sp" not in wrong:
            d.sp = values.get("sp", False)
            if d.sp and values.get("tp", 1) == 1 and "tp" not in wrong:
                d.sp = False  # megatron/training/arguments.py turns it off
                self.warnings.append("parallelism.sp needs tp > 1; with tp 1 it is off, as Megatron turns it off")
        if "zero" not in wrong:
            self._zero(values.get("zero"), framework)
        if "dp" not in wrong:
            self._dp(values.get("dp"))

    def _exchange(self, values: Mapping[str, Any], framework: str | None) -> None:
        self.draft.cp_comm = values.get("cp_comm") or _CP_COMM.get(framework or "", "p2p")
        if "cp_comm" not in values and values.get("cp", 1) > 1:
            self.sources["parallelism.cp_comm"] = f"{framework or 'Megatron'}'s default"
        usual = (("schedule", "pp", "1f1b"), ("cp_comm", "cp", _CP_COMM.get(framework or "", "p2p")))
        for key, axis, default in usual:
            if values.get(key, default) != default and values.get(axis, 1) == 1:
                self.warnings.append(f"parallelism.{key} {values[key]} changes nothing: {axis} is 1")

    def _zero(self, given: int | None, framework: str | None) -> None:
        d, reading = self.draft, self._ds()
        stage = reading.fields.get("stage") if reading else None
        if given is not None:
            if stage is not None and stage != given:
                self.problems.append(
                    Problem(
                        ("parallelism", "zero"),
                        f"parallelism.zero = {given}, but {self.ds_name} says zero_optimization.stage = {stage}",
                        f"write zero: {stage}, or leave zero out",
                    )
                )
            else:
                d.zero = given
        elif stage is not None:
            d.zero = stage
            self.sources["parallelism.zero"] = f"{self.ds_name}: zero_optimization.stage"
        elif framework == "deepspeed" and not d.knows("deepspeed"):
            return
        elif framework in ("fsdp1", "fsdp2"):
            d.zero = 3
            self.sources["parallelism.zero"] = "FSDP's default, full sharding"
        elif framework is not None:
            d.zero = 0
            words = "DeepSpeed's default (deepspeed/runtime/zero/config.py)"
            self.sources["parallelism.zero"] = words if framework == "deepspeed" else "0, as it is left out"

    def _dp(self, given: int | None) -> None:
        d = self.draft
        if given is not None:
            d.dp = given
        if not d.knows("tp", "pp", "cp", "num_gpus"):
            return
        if given is None:
            dp, rest = divmod(d.num_gpus, d.tp * d.pp * d.cp)
            if not rest:
                d.dp = dp
                self.sources["parallelism.dp"] = f"what remains of {d.num_gpus} GPUs"
                return
        try:
            wrong = list(mesh_fits_cluster(d))
        except UnknownError:
            return
        if wrong:
            self.problems.extend(wrong)
            d.forget("dp")

    def training(self, given: object, framework: str | None) -> None:
        values, wrong = read_mapping(given, fields.TRAINING, ("training",), self.problems)
        d = self.draft
        if "sequence_length" in values:
            d.sequence_length = values["sequence_length"]
        for key, default, source in (
            ("recompute", "none", "sim's default"),
            ("attention", "sdpa", "torch's scaled_dot_product_attention, which Hugging Face's models call"),
            ("compile", False, "sim's default"),
        ):
            if key not in wrong:
                setattr(d, key, values.get(key, default))
                if key not in values:
                    self.sources[f"training.{key}"] = source
        self._batch(values, wrong)
        for key in ("precision", "optimizer", "gradient_clipping"):
            if key not in wrong:
                self._agreed(key, values.get(key), framework)
        if "code" not in wrong:
            self._code(values.get("code"))
            self._selective(framework)
            if "attention" not in values and framework == "deepspeed" and d.knows("code") and d.code == "megatron":
                d.attention = "math"
                self.sources["training.attention"] = "Megatron-DeepSpeed's fused softmax, without --use-flash-attn"
        d.norms = values.get("norms")
        d.softmax = values.get("softmax")
        d.metrics = values.get("metrics", 0)
        d.launch_blocking = values.get("launch_blocking", False)
        d.sample_length = values.get("sample_length", 0)
        d.recompute_interval = values.get("recompute_interval", 1)
        if d.recompute_interval > 1 and d.knows("recompute") and d.recompute == "none":
            self.warnings.append(f"recompute_interval {d.recompute_interval} changes nothing: recompute is none")
        if "checkpoint" not in wrong and d.knows("code"):
            ours = framework == "deepspeed" and d.code == "megatron"
            d.checkpoint = values.get("checkpoint", "deepspeed" if ours else "torch")
            if "checkpoint" not in values:
                self.sources["training.checkpoint"] = "what the model's code calls"
        if "loss" not in wrong and d.knows("code"):
            # compiling a model, or its blocks, leaves the loss function outside of it
            d.loss = values.get("loss", "vocab-parallel" if d.code == "megatron" else "eager")
            if "loss" not in values:
                self.sources["training.loss"] = "that of the model's code"

    def _conflict(self, key: str, ours: object, theirs: str, value: object) -> None:
        self.problems.append(
            Problem(
                ("training", key),
                f"training.{key} = {_plain(ours)}, but {self.ds_name} says {theirs} {_plain(value)}",
                f"write the same in both, or leave training.{key} out",
            )
        )

    def _batch(self, values: Mapping[str, Any], wrong: set[str]) -> None:  # noqa: PLR0911, PLR0912 - three numbers, two places
        """Micro and global batch: from the scenario, else from DeepSpeed's three numbers."""
        d, reading = self.draft, self._ds() or DeepSpeedReading()
        micro, batch = values.get("micro_batch_size"), values.get("global_batch_size")
        total, small, steps = reading.train_batch_size, reading.micro_batch_size, reading.accumulation_steps
        for key, ours, theirs, name in (
            ("micro_batch_size", micro, small, "train_micro_batch_size_per_gpu"),
            ("global_batch_size", batch, total, "train_batch_size"),
        ):
            if ours is not None and theirs is not None and ours != theirs:
                self._conflict(key, ours, name, theirs)
                return
        if wrong & {"micro_batch_size", "global_batch_size"}:
            if micro is not None:
                d.micro_batch_size = micro
            return
        dp = d.dp if d.knows("dp") else None
        if micro is None and small is not None:
            micro = small
            self.sources["training.micro_batch_size"] = f"{self.ds_name}: train_micro_batch_size_per_gpu"
        if batch is None and total is not None:
            batch = total
            self.sources["training.global_batch_size"] = f"{self.ds_name}: train_batch_size"
        if micro is None:
            if batch is not None and dp and (total is not None or steps is not None):
                # deepspeed/runtime/config.py, _set_batch_related_parameters: one accumulation step unless said
                micro, rest = divmod(batch, dp * (steps or 1))
                if rest or not micro:
                    self.problems.append(
                        Problem(
                            ("deepspeed",),
                            f"a batch of {batch} does not divide over dp {dp}"
                            + (f" * gradient_accumulation_steps {steps}" if steps else ""),
                            write("train_batch_size", multiples(dp * (steps or 1), batch)),
                        )
                    )
                    return
                self.sources["training.micro_batch_size"] = (
                    f"global_batch_size / (dp x {steps or 1} accumulation steps)"
                )
            elif self.draft.knows("deepspeed") and (dp or batch is None or steps is None):
                parent = ("training",) if ("training",) in self.doc.lines else ()
                self.problems.append(
                    Problem(
                        parent,
                        "training.micro_batch_size is missing",
                        "write the sequences of one rank's microbatch, such as 1",
                    )
                )
                return
            else:
                return
        d.micro_batch_size = micro
        if batch is None and dp:
            batch = micro * dp * (steps or 1)
            words = f"dp x micro_batch_size x {steps} accumulation steps" if steps else "dp x micro_batch_size"
            self.sources["training.global_batch_size"] = words
        if batch is None:
            return
        if steps is not None and dp and batch != micro * dp * steps:
            # deepspeed/runtime/config.py, _batch_assertion
            self.problems.append(
                Problem(
                    ("training", "global_batch_size") if "global_batch_size" in values else ("deepspeed",),
                    f"a batch of {batch} is not micro_batch_size {micro} * dp {dp} * gradient_accumulation_steps "
                    f"{steps} = {micro * dp * steps}",
                    f"write {micro * dp * steps} as the batch, or leave gradient_accumulation_steps out",
                )
            )
            return
        d.global_batch_size = batch

    def _agreed(self, key: str, ours: Any, framework: str | None) -> None:
        """A setting that the scenario and the ds_config may both give: they have to agree."""
        d, reading = self.draft, self._ds()
        if framework == "deepspeed" and not d.knows("deepspeed") and ours is None:
            return
        theirs, name = None, ""
        if reading is not None:
            theirs = getattr(reading, key)
            name = {"precision": f"{theirs}.enabled", "optimizer": "optimizer.type"}.get(key, key)
        unsaid = key == "precision" and reading is not None and not reading.precision_given
        if unsaid and ours not in (None, "fp32", "tf32"):
            self.warnings.append(
                f"{self.ds_name} enables neither bf16 nor fp16, so DeepSpeed itself would train in fp32; "
                f"training.precision: {ours} is what is simulated"
            )
            theirs = None
        if ours is not None and theirs is not None and not _same(key, ours, theirs):
            if key == "precision":
                self._conflict(key, ours, *(("bf16 and fp16", "off") if theirs == "fp32" else (name, "true")))
            else:
                self._conflict(key, ours, name, theirs)
            return
        path = f"training.{key}"
        if ours is not None:
            value = ours
        elif theirs is not None:
            value = theirs
            words = name if key != "precision" else ("neither bf16 nor fp16 is enabled" if theirs == "fp32" else name)
            self.sources[path] = f"{self.ds_name}: {words}"
        elif key == "precision":
            if not d.knows("gpu"):
                return
            value = next((p for p in ("bf16", "fp16", "fp32") if p in d.gpu.peak_flops), "fp32")
            self.sources[path] = f"the best that {d.gpu.name} trains in"
        elif key == "optimizer":
            value = "adamw"
            self.sources[path] = "sim's default"
        else:
            defaults = {
                "deepspeed": (
                    DeepSpeedSettings().gradient_clipping,
                    "DeepSpeed's default (deepspeed/runtime/constants.py)",
                ),
                "megatron": (1.0, "Megatron's default (megatron/training/arguments.py)"),
            }
            value, self.sources[path] = defaults.get(framework or "", (0.0, "no clipping, as it is left out"))
        setattr(d, key, value)

    def _code(self, given: str | None) -> None:
        d = self.draft
        if given is not None:
            d.code = given
        else:
            try:
                d.code, words = default_code(d)
            except UnknownError:
                return
            self.sources["training.code"] = words
        self._dropout()

    def _selective(self, framework: str | None) -> None:
        """Plain torch modules under FSDP have no core of attention to recompute: torchtitan's "selective" is by op."""
        d = self.draft
        if not (d.knows("recompute") and d.knows("code")) or d.recompute != "selective":
            return
        if d.code == "torch" and framework in ("fsdp1", "fsdp2"):
            d.recompute = "selective-op"
            self.sources["training.recompute"] = "selective, which for plain torch modules is torchtitan's policy by op"
            self.warnings.append(
                "recompute: selective is taken as selective-op, torchtitan's policy by op: plain torch modules have no "
                "recompute of the attention core, which is Megatron's (code: megatron)"
            )

    def _dropout(self) -> None:
        """Megatron drops a tenth unless its command says otherwise; people who train Llamas with it say otherwise."""
        d = self.draft
        try:
            if d.code != "megatron" or not is_gpt(d.model):
                return
        except UnknownError:  # what is wrong with the model is said already
            return
        silent = [key for key in ("dropout", "attention_dropout") if self.sources.get(f"model.{key}") == _OWN_DEFAULT]
        for key in silent:
            setattr(d.model, key, MEGATRON_DROPOUT)
            self.sources[f"model.{key}"] = "Megatron's default (megatron/training/arguments.py)"
        if silent:
            self.warnings.append(
                f"{' and '.join(silent)} of the model {'is' if len(silent) == 1 else 'are'} taken as "
                f"{MEGATRON_DROPOUT}, Megatron's default for what its command does not say; write model.dropout: 0 "
                "and model.attention_dropout: 0 for a run without"
            )

    def settings(self, key: str, table: Any, given: object, framework: str | None, frameworks: str) -> dict[str, Any]:
        """Read a section of plain settings, which belongs to one framework or to any (``frameworks`` empty)."""
        layers = key == "megatron" and framework == "deepspeed" and isinstance(given, Mapping) and set(given) <= _LAYERS
        if given is not None and frameworks and framework is not None and framework != frameworks and not layers:
            self.problems.append(
                Problem(
                    (key,),
                    f"{key} settings are given, but framework is {framework}",
                    f"write framework: {frameworks}, or "
                    + (f"only {_LAYERS_IN_WORDS}" if key == "megatron" and framework == "deepspeed" else "remove them"),
                )
            )
            return {}
        values, _ = read_mapping(given, table, (key,), self.problems)
        if frameworks == framework or not frameworks:
            for name in table:
                if name not in values:
                    self.sources[f"{key}.{name}"] = _DEFAULTS_OF_SIM.get(
                        (key, name), "Megatron's default" if key == "megatron" else "PyTorch's default"
                    )
        return values

    def _attention_backend(self, values: Mapping[str, Any]) -> None:
        """Transformer Engine prefers cuDNN's kernel to FlashAttention-2 from Hopper on, where it may run both.

        ``get_attention_backend``, and transformer_engine/pytorch/attention.py of 1.3 on before that: "to give
        FusedAttention preference on Hopper+ for performance reasons". Launchers that turn it off (NVTE_FUSED_ATTN=0)
        and older versions are ``attention_backend: flash``.
        """
        d = self.draft
        if not all(d.knows(key) for key in ("attention", "gpu", "code", "precision")):
            return
        engine = d.code == "megatron" and values.get("transformer_impl") != "local"
        if not engine:
            return
        prefers = d.gpu.vendor == "nvidia" and (9, 0) <= d.gpu.compute_capability < (12, 0)
        if "training.attention" in self.sources:
            fused = d.gpu.compute_capability >= (8, 0) and d.precision not in ("fp32", "tf32")
            newest = d.gpu.vendor == "nvidia" and d.gpu.compute_capability >= (9, 0)
            d.attention = ("cudnn" if newest else "flash-2") if fused else "math"
            self.sources["training.attention"] = "Transformer Engine's choice for this GPU"
            return
        if prefers and d.attention == "flash-2" and values.get("attention_backend", "auto") == "auto":
            d.attention = "cudnn"
            self.sources["training.attention"] = "Transformer Engine's choice from Hopper on"
            self.warnings.append(
                "attention: flash-2 under Megatron runs as cudnn: Transformer Engine prefers cuDNN's kernel from "
                "Hopper on; write megatron.attention_backend: flash for FlashAttention-2 (NVTE_FUSED_ATTN=0)"
            )

    def _megatron_fsdp(self, values: dict[str, Any]) -> None:
        """ZeRO-2 and ZeRO-3 are Megatron-FSDP, which overlaps what its strategy shards (megatron_fsdp.py)."""
        d = self.draft
        if not d.knows("zero"):
            return
        given = values.get("use_megatron_fsdp")
        if given and "parallelism.zero" in self.sources:
            d.zero = 3
            self.sources["parallelism.zero"] = "megatron.use_megatron_fsdp"
        elif given is not None and given != (d.zero >= 2):
            self.problems.append(
                Problem(
                    ("parallelism", "zero"),
                    f"parallelism.zero = {d.zero}, but megatron.use_megatron_fsdp is {_plain(given)}",
                    "write zero: 3 (or 2: gradients alone)" if given else "write zero: 1, or leave the other out",
                )
            )
        if d.zero < 2:
            self.problems.extend(
                Problem(
                    ("megatron", name),
                    f"megatron.{name} is Megatron-FSDP's, and parallelism.zero is {d.zero}",
                    "write parallelism.zero: 3, or leave it out",
                )
                for name in ("suggested_communication_unit_size",)
                if values.get(name)
            )
            return
        for name, holds in (
            ("use_megatron_fsdp", True),
            ("overlap_grad_reduce", True),
            ("overlap_param_gather", d.zero == 3),
        ):
            if holds and values.get(name) is None:
                values[name] = True
                self.sources[f"megatron.{name}"] = "parallelism.zero"

    def megatron(self, values: dict[str, Any], framework: str | None) -> None:
        """Megatron's distributed optimizer is ZeRO-1: the two ways to ask for it have to agree."""
        d = self.draft
        if framework != "megatron":
            return
        self._megatron_fsdp(values)
        self._attention_backend(values)
        sharded = values.get("use_distributed_optimizer")
        if d.knows("zero"):
            if sharded is None:
                values["use_distributed_optimizer"] = d.zero >= 1
                self.sources["megatron.use_distributed_optimizer"] = "parallelism.zero"
            elif "parallelism.zero" in self.sources:
                d.zero = int(sharded)
                self.sources["parallelism.zero"] = "megatron.use_distributed_optimizer"
            elif sharded != (d.zero >= 1):
                self.problems.append(
                    Problem(
                        ("parallelism", "zero"),
                        f"parallelism.zero = {d.zero}, but megatron.use_distributed_optimizer is {_plain(sharded)}",
                        f"write zero: {int(sharded)}, or leave zero out",
                    )
                )
        self.problems.extend(
            Problem(
                ("megatron", name),
                f"megatron.{name} needs the distributed optimizer, but parallelism.zero is 0",
                "write parallelism.zero: 1",
            )
            for name in ("fp8_param_gather", "use_precision_aware_optimizer")
            if values.get(name) and d.knows("zero") and not d.zero
        )
        self._kept_elsewhere(values)
        self._megatron_states(values)
        self._megatron_low(values)
        self._megatron_graphs(values)
        if not values.get("overlap_param_gather"):
            return
        if d.knows("zero") and not d.zero:
            self.problems.append(
                Problem(
                    ("megatron", "overlap_param_gather"),
                    "megatron.overlap_param_gather needs the distributed optimizer, but parallelism.zero is 0",
                    "write parallelism.zero: 1",
                )
            )
        if not values.get("overlap_grad_reduce"):
            self.problems.append(
                Problem(
                    ("megatron", "overlap_param_gather"),
                    "megatron.overlap_param_gather needs overlap_grad_reduce",
                    "write megatron.overlap_grad_reduce: true",
                )
            )

    def _kept_elsewhere(self, values: dict[str, Any]) -> None:
        """What Megatron refuses of saved tensors on the host and over tp (transformer_config.py, arguments.py)."""
        d = self.draft
        name, given = "cpu_offloading_num_layers", values.get("cpu_offloading_num_layers", 0)
        path = ("megatron", name)
        if given and d.knows("pp") and d.pp > 1:
            what = f"megatron.{name} does not go with pp {d.pp}: Megatron has no offloading in a pipeline"
            self.problems.append(Problem(path, what, f"leave {name} out, or write parallelism.pp: 1"))
        if given and d.knows("recompute") and d.recompute != "none":
            what = f"megatron.{name} does not go with recompute {d.recompute}: Megatron does one or the other"
            self.problems.append(Problem(path, what, f"leave {name} out, or write training.recompute: none"))
        if given and d.knows("model") and d.model.knows("num_hidden_layers") and given >= d.model.num_hidden_layers:
            what = f"megatron.{name} = {given}, but the model has {d.model.num_hidden_layers}, of which the last stays"
            self.problems.append(Problem(path, what, f"write at most {d.model.num_hidden_layers - 1}"))
        if not values.get("distribute_saved_activations") or not d.knows("tp", "recompute", "sp"):
            return
        for wrong, what, remedy in (
            (d.tp == 1, "tp is 1", "write parallelism.tp, or leave it out"),
            (d.recompute != "full", f"recompute is {d.recompute}", "write training.recompute: full"),
            (d.sp, "sp divides them already", "leave one of the two out"),
        ):
            if wrong:
                path = ("megatron", "distribute_saved_activations")
                self.problems.append(Problem(path, f"megatron.distribute_saved_activations, but {what}", remedy))
                return

    def _megatron_states(self, values: Mapping[str, Any]) -> None:
        """``__post_init__`` of megatron/core/optimizer/optimizer_config.py: whose states may be of few bits."""
        d = self.draft
        if not values.get("use_precision_aware_optimizer"):
            self.problems.extend(
                Problem(
                    ("megatron", name),
                    f"megatron.{name} is {values[name]}, but Megatron's usual optimizer keeps its states in fp32",
                    "write megatron.use_precision_aware_optimizer: true, or leave it out",
                )
                for name in ("exp_avg_dtype", "exp_avg_sq_dtype")
                if values.get(name, "fp32") != "fp32"
            )
        elif d.knows("optimizer") and d.optimizer not in ("adam", "adamw"):
            self.problems.append(
                Problem(
                    ("megatron", "use_precision_aware_optimizer"),
                    f"megatron.use_precision_aware_optimizer is of Adam, but the optimizer is {d.optimizer}",
                    "write optimizer: adam, or leave it out",
                )
            )

    def _megatron_graphs(self, values: Mapping[str, Any]) -> None:
        """A graph of all passes waits for nothing (megatron/training/arguments.py), and blocks' graphs are launched."""
        scope = values.get("cuda_graph_scope", "full")
        if scope == "full_iteration" and values.get("cuda_graph_impl", "none") != "local":
            what = "megatron.cuda_graph_scope full_iteration is of cuda_graph_impl local"
            self.problems.append(
                Problem(("megatron", "cuda_graph_scope"), what, "write megatron.cuda_graph_impl: local, or scope full")
            )
        elif scope == "full_iteration" and values.get("check_for_nan_in_grad", True):
            what = "megatron.check_for_nan_in_grad waits for the GPU, which a graph of the full iteration cannot"
            self.problems.append(
                Problem(("megatron", "cuda_graph_scope"), what, "write megatron.check_for_nan_in_grad: false")
            )
        elif values.get("cuda_graph_impl", "none") != "none" and self.draft.launch_blocking:
            what = "CUDA_LAUNCH_BLOCKING does not wait for what a CUDA graph launches"
            self.problems.append(
                Problem(("megatron", "cuda_graph_impl"), what, "write training.launch_blocking: false, or no graphs")
            )

    def _megatron_low(self, values: Mapping[str, Any]) -> None:
        """``__post_init__`` of megatron/core/transformer/transformer_config.py: which layers may stay in 16 bit."""
        d, names = self.draft, ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        if not d.knows("precision"):
            return
        # 1 is what a resolved scenario has there
        idle = [n for n in names if values.get(n, 1) != 1 and not values.get("first_last_layers_bf16")]
        why = "first_last_layers_bf16 is false"
        if d.precision not in _EIGHT_BIT:
            idle = [n for n in ("fp8_param_gather", "first_last_layers_bf16") if values.get(n)]
            idle, why = [*idle, *(n for n in names if values.get(n, 1) != 1)], f"precision is {d.precision}"
        self.warnings.extend(f"megatron.{name} {_plain(values[name])} changes nothing: {why}" for name in idle)
        if d.precision not in _EIGHT_BIT or not values.get("first_last_layers_bf16"):
            return
        if d.precision == "fp8" and values.get("fp8_recipe", "delayed") == "delayed":
            self.problems.append(
                Problem(
                    ("megatron", "first_last_layers_bf16"),
                    "megatron.first_last_layers_bf16 does not go with fp8_recipe delayed: all layers share its scales",
                    "write megatron.fp8_recipe: tensorwise or blockwise, or leave it out",
                )
            )
        if not (d.knows("model", "pp") and d.model.knows("num_hidden_layers")):
            return
        most = d.model.num_hidden_layers // d.pp
        self.problems.extend(
            Problem(
                ("megatron", name),
                f"megatron.{name} = {values[name]} is more than the {most} layers of a stage",
                f"write at most {most}",
            )
            for name in names
            if values.get(name, 0) > most
        )

    def tensor_parallel_overlap(self, megatron: Mapping[str, Any], fsdp2: Mapping[str, Any]) -> None:
        """Exchanges in pieces: all-gathers and reduce-scatters, between GPUs that reach each other's memory.

        Sources: megatron/training/arguments.py (``tp_comm_overlap``); torchtitan, "Async TP requires torch.compile".
        """
        d = self.draft
        keys = (("megatron", "tp_comm_overlap", megatron), ("fsdp2", "async_tensor_parallel", fsdp2))
        for section, name, values in keys:
            if not values.get(name):
                continue
            path, key = (section, name), f"{section}.{name}"
            if d.knows("sp") and not d.sp:
                what = f"{key} needs sequence parallelism, but parallelism.sp is false"
                self.problems.append(
                    Problem(path, what, f"write parallelism.sp: true and a tp above 1, or {name}: false")
                )
            if section == "fsdp2" and d.knows("compile") and not d.compile:
                what = f"{key} is Inductor's, but training.compile is false"
                self.problems.append(Problem(path, what, f"write training.compile: true, or {name}: false"))
            if section == "megatron" and values.get("transformer_impl") == "local":
                what = f"{key} is Transformer Engine's, but megatron.transformer_impl is local"
                self.problems.append(
                    Problem(path, what, f"write transformer_impl: transformer_engine, or {name}: false")
                )
            if d.knows("tp") and d.knows("node"):
                reach = d.node.nvlink_domain_nodes * sum(kind == "gpu" for _, kind in d.node.devices)
                if d.tp > reach:
                    what = f"{key} copies between GPUs of one node, but tp {d.tp} spans several of {reach}"
                    self.problems.append(Problem(path, what, f"write tp: {reach} or less, or {name}: false"))

    def fsdp(self, values: dict[str, Any], framework: str | None) -> None:
        """Shard groups divide the data-parallel ranks; what reshards keeps slices over a part of a group."""
        d = self.draft
        if framework not in ("fsdp1", "fsdp2") or not d.knows("dp"):
            return
        self._float8(values)
        shard = values.get("shard_size")
        if shard is not None and d.dp % shard:
            self.problems.append(
                Problem(
                    (framework, "shard_size"),
                    f"{framework}.shard_size = {shard} does not divide dp {d.dp}",
                    f"write a divisor of {d.dp}",
                )
            )
            return
        strategy = values.get("sharding_strategy", "FULL_SHARD")
        if framework == "fsdp1" and shard is not None and "HYBRID" not in strategy:
            self.problems.append(
                Problem(
                    ("fsdp1", "shard_size"),
                    f"fsdp1.shard_size is given, but {strategy} shards over all data-parallel ranks",
                    "write sharding_strategy: HYBRID_SHARD, or leave shard_size out",
                )
            )
        ranks = shard or d.dp
        kept = values.get("reshard_after_forward", True)
        # _get_post_forward_mesh_info in torch/distributed/fsdp/_fully_shard/_fsdp_init.py
        if not isinstance(kept, bool) and (ranks % kept or kept >= ranks):
            self.problems.append(
                Problem(
                    ("fsdp2", "reshard_after_forward"),
                    f"fsdp2.reshard_after_forward = {kept} is no part of a shard group of {ranks} ranks",
                    f"write true, false, or a divisor of {ranks} between 1 and it",
                )
            )

    def _float8(self, values: Mapping[str, Any]) -> None:
        """torchao's Float8LinearConfig gathers in 8 bits with a scale a tensor alone (torchao/float8/config.py)."""
        d = self.draft
        if not values.get("float8_all_gather"):
            return
        if values.get("float8_recipe") == "rowwise":
            self.problems.append(
                Problem(
                    ("fsdp2", "float8_all_gather"),
                    "fsdp2.float8_all_gather goes with a scale a tensor alone, not with float8_recipe rowwise",
                    "write float8_recipe: tensorwise, or leave float8_all_gather out",
                )
            )
        if not d.knows("precision", "code"):
            return
        if d.precision != "fp8":
            self.warnings.append(f"fsdp2.float8_all_gather true changes nothing: precision is {d.precision}")
        elif d.code != "torch":
            self.warnings.append(f"fsdp2.float8_all_gather true changes nothing: it is torchao's, and code is {d.code}")

    # --- afterwards --------------------------------------------------------------------------

    def notices(self, resolved: bool) -> None:
        """Say what is odd but no mistake. A resolved file brings along what was said of its model's config."""
        d, m = self.draft, self.draft.model
        if d.pp > 1 and d.layers_per_stage is None and m.num_hidden_layers % (d.pp * d.vpp):
            self.warnings.append(
                f"{m.num_hidden_layers} layers do not divide over pp {d.pp}"
                + (f" x vpp {d.vpp}" if d.vpp > 1 else "")
                + " stages: they are spread as evenly as they go; parallelism.layers_per_stage says otherwise"
            )
        if d.tp > 1 and m.vocab_size % d.tp:
            self.warnings.append(
                f"a vocabulary of {m.vocab_size} does not divide over tp {d.tp}: it is padded, as Megatron pads it"
            )
        if resolved:
            return
        if (asked := _kept_elsewhere(d)) and (d.checkpoint != "deepspeed" or d.recompute != "full"):
            why = "recompute is not full" if d.recompute != "full" else f"code {d.code} calls torch's checkpoint"
            remedy = "" if d.recompute != "full" else "; training.checkpoint: deepspeed says otherwise"
            self.warnings.append(f"activation_checkpointing.{asked} changes nothing: {why}{remedy}")
        if m.position == "rope" and m.given_positions and d.sequence_length > m.max_position_embeddings:
            self.warnings.append(
                f"sequence_length {d.sequence_length} is beyond the {m.max_position_embeddings} positions that the "
                "model was made for; size and time are not affected"
            )
        if d.attention == "flash-2" and m.head_dim > 256:
            self.warnings.append(
                f"model.head_dim {m.head_dim}: FlashAttention takes heads up to 256 wide and would refuse these"
            )
        if m.at == "place" and m.head_dim * m.num_attention_heads != m.hidden_size and not m.family:
            self.warnings.append(
                f"model.head_dim {m.head_dim} x {m.num_attention_heads} heads is not hidden_size {m.hidden_size}; "
                "taken as written"
            )


def _kept_elsewhere(d: Draft) -> str:
    """Return the setting of ``activation_checkpointing`` by which inputs do not stay on the GPU whole; "" if none."""
    given = d.deepspeed.fields if d.framework == "deepspeed" and d.deepspeed else {}
    return next((name for name in ("partition_activations", "cpu_checkpointing") if given.get(name)), "")


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.endswith((".yaml", ".yml"))


def _exists(path: FilePath) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _shown(path: FilePath) -> str:
    """Return a path as messages show it: relative to the current directory where that is shorter."""
    try:
        return str(path.relative_to(FilePath.cwd()))
    except ValueError:
        return str(path)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _same(key: str, ours: object, theirs: object) -> bool:
    if key == "precision":
        return ours == theirs or (theirs == "fp32" and ours == "tf32") or (theirs == "bf16" and ours in _EIGHT_BIT)
    if key == "optimizer":
        return {ours, theirs} <= {"adam", "adamw"} or ours == theirs
    return ours == theirs


_EIGHT_BIT = ("fp8", "mxfp8", "nvfp4")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with another laid over it, section by section."""
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged


def overridden(gpu: GpuFacts, values: Mapping[str, Any], texts: Mapping[str, Any]) -> GpuFacts:
    """Return a GPU with facts replaced. ``memory`` is what cudaMemGetInfo calls total, so it replaces both sizes."""
    names = {
        "memory": ("memory_bytes", "total_memory_bytes"),
        "memory_bandwidth": ("memory_bytes_per_s",),
        "power_limit": ("power_w",),
        "boost_clock": ("boost_clock_hz",),
        "l2": ("l2_bytes",),
        "num_sms": ("num_sms",),
        "cuda_context": ("cuda_context_bytes",),
        "spread": ("spread",),
    }
    changed: dict[str, Any] = {}
    facts = dict(gpu.facts)
    for key, ours in names.items():
        if key in values:
            for name in ours:
                changed[name] = values[key]
                facts[name] = Fact(str(texts.get(key)), "user", f"cluster.gpu.{key} of the scenario")
    if peaks := values.get("peak_flops"):
        changed["peak_flops"] = {**gpu.peak_flops, **peaks}
        given = texts.get("peak_flops")
        for name in peaks:
            text = str(given.get(name)) if isinstance(given, Mapping) else ""
            facts[f"peak_flops.{name}"] = Fact(text, "user", "cluster.gpu.peak_flops of the scenario")
    return dataclasses.replace(gpu, facts=facts, **changed) if changed else gpu


def is_gpt(model: ModelDraft) -> bool:
    """Return whether a block is GPT-2's: what Megatron builds where its command says nothing else."""
    return model.norm == "layernorm" and model.hidden_act == "gelu" and model.position == "learned"


def default_code(d: Draft) -> tuple[str, str]:
    """Return whose modules run, and why: the code that people run under this framework.

    Megatron's for Megatron; also for DeepSpeed where it stands on Megatron's model (Megatron-DeepSpeed): with tensor
    or pipeline parallelism, or for a GPT block with learned positions. Hugging Face's for its Llama-like models,
    named or given by their config, except under fsdp2 (torchtitan). Plain torch for the rest.
    """
    m = d.model
    if d.framework == "megatron":
        return "megatron", "the framework's own model"
    if d.framework == "deepspeed":
        if d.tp > 1 or d.pp > 1:
            return "megatron", "Megatron-DeepSpeed, as DeepSpeed has tp and pp from Megatron"
        if is_gpt(m):
            return "megatron", "Megatron-DeepSpeed, as the model is a GPT with learned positions"
    published = m.at != "place" or m.family
    if d.framework != "fsdp2" and published and m.norm == "rmsnorm":
        return "huggingface", "transformers' modules, as the model is one of its Llama-like ones"
    return "torch", "plain torch modules"


def resolve(doc: Document, folder: FilePath, findings: list[Finding], simulate: bool) -> Scenario:
    """Return the complete question. Raises ScenarioError with every finding, those of reading included."""
    r = _Resolver(doc, folder, findings)
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
        r.model(top["model"])
    if "cluster" in top:
        r.cluster(top["cluster"])
    r.deepspeed(top.get("deepspeed"), framework)
    reading = r._ds()
    d.offload_optimizer = reading.fields.get("offload_optimizer", "none") if reading else "none"
    d.offload_param = reading.fields.get("offload_param", "none") if reading else "none"
    r.parallelism(top.get("parallelism"), framework)
    if "training" in top:
        r.training(top["training"], framework)
    ddp = r.settings("ddp", fields.DDP, top.get("ddp"), framework, "ddp")
    fsdp2 = r.settings("fsdp2", fields.FSDP2, top.get("fsdp2"), framework, "fsdp2")
    fsdp1 = r.settings("fsdp1", fields.FSDP1, top.get("fsdp1"), framework, "fsdp1")
    megatron = r.settings("megatron", fields.MEGATRON, top.get("megatron"), framework, "megatron")
    r.megatron(megatron, framework)
    r.fsdp(fsdp2 if framework == "fsdp2" else fsdp1, framework)
    r.tensor_parallel_overlap(megatron, fsdp2)
    allocator = _allocator(r, top.get("allocator"))
    d.faults = top.get("faults", {})
    calibration = _calibration(r, top.get("calibration"))
    r.problems = [_sent_home(problem) for problem in r.problems]
    r.problems.extend(run_rules(d))
    if simulate:
        taken = {problem.path for problem in r.problems}
        r.problems.extend(problem for problem in unsupported(d) if problem.path not in taken)
    if r.problems or r.findings:
        raise ScenarioError(_distinct([*r.findings, *(doc.finding(problem) for problem in r.problems)]))
    r.notices(resolved="sources" in top)
    name = top.get("name") or FilePath(doc.file).stem
    if "name" not in top:
        r.sources["name"] = "the file's name"
    scenario = _scenario(r, name, ddp, fsdp2, fsdp1, megatron, allocator, top)
    return scenario if calibration is None else scenario.model_copy(update={"calibration": calibration})


_DEFAULTS_OF_SIM = {
    ("ddp", "mixed_precision"): "sim's default: torch.autocast, as most train",
    ("fsdp2", "param_dtype"): "training.precision",
    ("fsdp2", "reduce_dtype"): "sim's default: fp32, as torchtitan reduces",
    ("fsdp2", "orig_dtype"): "sim's default: fp32, as torchtitan optimizes",
    ("fsdp2", "wrap"): "sim's default: each block, then the model",
    ("fsdp1", "mixed_precision"): "MosaicML Composer's default",
    ("fsdp1", "orig_dtype"): "sim's default: fp32, which Composer trains",
    ("fsdp1", "shard_size"): "the GPUs of a node, as FSDP's default process groups",
}

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


def _allocator(r: _Resolver, given: object) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = fields.allocator_mapping(given)
        except WrongValueError as error:
            r.problems.append(Problem(("allocator",), f"allocator: {error.problem}", error.remedy))
            return {}
    values = r.settings("allocator", fields.ALLOCATOR, given, None, "")
    if "max_split_size" in values:
        values["max_split_size_bytes"] = values.pop("max_split_size")
    if values.get("garbage_collection_threshold") and "memory_fraction" not in values:
        r.warnings.append(
            "allocator.garbage_collection_threshold does nothing without allocator.memory_fraction: PyTorch collects "
            "only where set_per_process_memory_fraction was called (c10/cuda/CUDACachingAllocator.cpp)"
        )
    if "cublas_workspace" in values:
        values["cublas_workspace_bytes"] = values.pop("cublas_workspace")
    return values


def _calibration(r: _Resolver, given: str | None) -> Calibration | None:
    """Return the calibration that the scenario names, if it was measured on the GPU that it asks for."""
    if given is None:
        return None
    from sim.scenario.calibration import read_calibration

    path = r._path_of(given)
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
    r: _Resolver,
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
    settings = settings_of(r._ds(), d.zero, d.gradient_clipping)
    if d.framework == "deepspeed":
        reading = r._ds()
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
    r = _Resolver(doc, folder, [])
    r.model(given)
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
    r = _Resolver(doc, folder, [])
    r.cluster({"node": node, "num_nodes": 2, **({"network": network} if network else {})})
    d = r.draft
    found = [doc.finding(problem._replace(path=at)) for problem in r.problems]
    return (
        d.node if d.knows("node") else None,
        d.gpu if d.knows("gpu") else None,
        d.network if d.knows("network") else None,
        r.written,
        _distinct([*r.findings, *found]),
    )
