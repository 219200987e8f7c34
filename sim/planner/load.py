"""The plan's door: a file and ``--set`` in, a complete ``Plan`` or every problem at once out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal

from sim import units
from sim.catalog import economy
from sim.catalog import load as catalog
from sim.catalog.economy import Quote
from sim.catalog.schema import NodeFacts
from sim.errors import Finding, ScenarioError
from sim.interop.values import Key, Problem, WrongValueError, dotted, integer, read_mapping, show, suggest
from sim.planner import fields
from sim.planner.schema import (
    Axes,
    Constraints,
    Failures,
    Goal,
    Offer,
    Plan,
    Prices,
    Site,
    Storage,
    Workload,
)
from sim.scenario.document import Document, UnreadableError, parse_yaml, read_text
from sim.scenario.draft import ModelDraft
from sim.scenario.load import apply_overrides
from sim.scenario.resolve import resolve_model, resolve_node

FRAMEWORKS = ("megatron", "fsdp2", "deepspeed")
DEFAULT_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
DEFAULT_BATCH_TOKENS = 4_000_000
"""Llama 2 trained with 4 M tokens a step (Touvron et al., Llama 2, section 2.2), Llama 3 began with them."""
MAX_SITES = 256


def load_plan(path: str | FilePath, overrides: Sequence[str] = ()) -> Plan:
    """Return the plan of a file, with ``key.path=value`` laid over it. Raises ScenarioError with every finding."""
    file = FilePath(path)
    try:
        text = read_text(file, str(path), "a plan")
    except UnreadableError as error:
        raise ScenarioError([error.finding]) from None
    return load_plan_text(text, str(path), overrides, file.parent)


def load_plan_text(text: str, file_name: str, overrides: Sequence[str] = (), folder: str | FilePath = ".") -> Plan:
    """As ``load_plan``, of a text; paths in it are relative to ``folder``."""
    findings: list[Finding] = []
    try:
        document = parse_yaml(text, file_name, findings, "a plan")
    except UnreadableError as error:
        raise ScenarioError([*findings, error.finding]) from None
    apply_overrides(document, overrides, findings)
    return _Reader(document, FilePath(folder), findings).plan()


class _Reader:
    """One reading: the document, what is wrong so far, and what was assumed."""

    def __init__(self, doc: Document, folder: FilePath, findings: list[Finding]) -> None:
        self.doc = doc
        self.folder = folder
        self.findings = findings
        self.problems: list[Problem] = []
        self.assumptions: list[str] = []
        self.above: dict[str, None] = {}
        """Fewest GPUs of nodes of which constraints.max_gpus leaves none, in words."""

    def plan(self) -> Plan:
        top, _ = read_mapping(self.doc.data, fields.TOP, (), self.problems)
        self.problems = [_sent_home(problem) for problem in self.problems]
        draft = self._model(top.get("model"))
        workload = self._workload(top.get("workload"))
        candidates, wrong = self._section("candidates", top["candidates"]) if "candidates" in top else ({}, {"nodes"})
        prices, _ = self._section("prices", top.get("prices"))
        goal = self._goal(top.get("goal"), len(_as_list(candidates.get("nodes"))) == 1)
        constraints, _ = self._section("constraints", top.get("constraints"))
        sites = self._sites(candidates, prices, goal, constraints) if "nodes" not in wrong else []
        axes, _ = self._section("axes", top.get("axes"))
        failures = self._with_facts("failures", top.get("failures"), _FAILURES)
        storage = self._with_facts("storage", top.get("storage"), _STORAGE)
        running = self._prices(prices)
        if self.problems or self.findings:
            found = [*self.findings, *(self.doc.finding(problem) for problem in self.problems)]
            raise ScenarioError(list(dict.fromkeys(found)))
        assert draft is not None
        assert workload is not None
        return Plan(
            name=top.get("name") or FilePath(self.doc.file).stem,
            folder=str(self.folder),
            model=self._written(top["model"]),
            draft=draft,
            num_parameters=_num_parameters(draft),
            workload=workload,
            goal=goal,
            sites=tuple(sites),
            frameworks=top.get("frameworks", FRAMEWORKS),
            axes=Axes(**axes),
            prices=running,
            failures=Failures(**failures),
            storage=Storage(**storage),
            constraints=Constraints(
                max_power_w=constraints.get("max_power"),
                max_gpus=constraints.get("max_gpus"),
                memory_margin=constraints.get("memory_margin", 0.0),
            ),
            assumptions=tuple(dict.fromkeys(self.assumptions)),
        )

    # --- sections ----------------------------------------------------------------------------

    def _section(self, name: str, given: object) -> tuple[dict[str, Any], set[str]]:
        before = len(self.problems)
        values, wrong = read_mapping(given, fields.SECTIONS[name], (name,), self.problems)
        self.problems[before:] = [_sent_home(problem) for problem in self.problems[before:]]
        return values, wrong

    def _model(self, given: object) -> ModelDraft | None:
        if given is None:
            return None
        draft, findings = resolve_model(self.doc, self.folder, given)
        self.findings.extend(findings)
        return draft

    def _written(self, given: Any) -> Any:
        """Return the model as a scenario anywhere else may write it: a file by its absolute path."""
        name = given.get("config") if isinstance(given, Mapping) else given
        if not isinstance(name, str) or name.lower() in catalog.names("model"):
            return given
        path = str((self.folder / name).resolve())
        return {**given, "config": path} if isinstance(given, Mapping) else path

    def _workload(self, given: object) -> Workload | None:
        if given is None:
            return None
        values, wrong = self._section("workload", given)
        tokens, steps = values.get("tokens"), values.get("steps")
        if tokens is None and steps is None and not wrong & {"tokens", "steps"} and isinstance(given, Mapping):
            self.problems.append(
                Problem(("workload",), "workload says neither tokens nor steps", "write tokens: 1e12, or steps: 500000")
            )
        if tokens is not None and steps is not None:
            self.problems.append(
                Problem(("workload", "steps"), "workload says both tokens and steps", "leave one of the two out")
            )
        if (tokens is None) == (steps is None) or wrong:
            return None
        length = values["sequence_length"]
        if "global_batch_size" in values:
            unit, ends = values["global_batch_size"]
            batches = (_power_of_two(ends[0] / length),) if unit == "tokens" else _range(*ends)
        else:
            batches = (_power_of_two(DEFAULT_BATCH_TOKENS / length),)
            self.assumptions.append(
                f"a global batch of {batches[0]} sequences, about 4 M tokens a step; workload.global_batch_size says "
                "otherwise"
            )
        return Workload(
            tokens=tokens,
            steps=steps,
            sequence_length=length,
            global_batch_sizes=batches,
            precision=values.get("precision"),
            attention=values.get("attention"),
            optimizer=values.get("optimizer", "adamw"),
        )

    def _goal(self, given: object, one_cluster: bool) -> Goal:
        values, _ = self._section("goal", given)
        chosen = [name for name in ("cheapest", "fastest", "least_energy", "fewest_gpus") if values.get(name)]
        if "value_of_time" in values:
            chosen.append("trade_off")
        if len(chosen) > 1:
            said = " and ".join("value_of_time" if name == "trade_off" else name for name in chosen)
            self.problems.append(
                Problem(("goal",), f"goal says {said}", "leave one; deadline and budget may stand beside it")
            )
        if chosen:
            objective = chosen[0]
        elif "budget" in values and "deadline" not in values:
            objective = "fastest"
        else:
            objective = "cheapest"
            if not values:
                self.assumptions.append("the cheapest is wanted, as the plan has no goal")
        return Goal(
            objective=objective,  # type: ignore[arg-type]
            deadline_s=values.get("deadline"),
            budget_usd=values.get("budget"),
            usd_per_s=values.get("value_of_time", 0.0) / 86400,
        )

    def _with_facts(self, section: str, given: object, names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
        """Return a section's settings, those left out from the catalogue's facts."""
        values, wrong = self._section(section, given)
        facts = economy.running(section)
        found: dict[str, Any] = {}
        for key, (field, parse) in names.items():
            if key in values:
                found[field] = values[key]
            elif key in facts:
                found[field] = parse(facts[key].text)
                if key not in wrong:
                    self.assumptions.append(
                        f"{section}.{key}: {facts[key].text} ({facts[key].kind}: {facts[key].source})"
                    )
        return found

    def _prices(self, values: Mapping[str, Any]) -> Prices:
        power, storage, people = (economy.running(name) for name in ("power", "storage", "people"))
        lifetime = values.get("lifetime", units.parse_duration(people["lifetime"].text))
        per_tb_month = values.get("storage", units.parse_money_per(storage["price"].text, "TB/month"))
        for key, fact in (("power", power["usd_per_kwh"]), ("pue", power["pue"]), ("people", people["people"])):
            if key not in values:
                self.assumptions.append(f"prices.{key}: {fact.text} ({fact.kind}: {fact.source})")
        return Prices(
            usd_per_kwh=values.get("power", units.parse_money_per(power["usd_per_kwh"].text, "kWh")),
            pue=values.get("pue", float(power["pue"].text)),
            people_usd_per_s=values.get("people", 0.0) / (365 * 86400),
            lifetime_s=lifetime,
            horizon_s=values.get("horizon", lifetime),
            storage_usd_per_byte_s=per_tb_month / 1e12 / (30 * 86400),
        )

    # --- machines and what they cost -----------------------------------------------------------

    def _sites(
        self, candidates: Mapping[str, Any], prices: Mapping[str, Any], goal: Goal, limits: Mapping[str, Any]
    ) -> list[Site]:
        if candidates["nodes"] == []:
            self.problems.append(
                Problem(("candidates", "nodes"), "candidates.nodes: the list is empty", "write nodes: [dgx-h100]")
            )
        quotes = self._quotes(prices)
        owned = self._owned(candidates.get("owned"))
        sites: list[Site] = []
        named: dict[str, None] = {}
        for place, entry in enumerate(_as_list(candidates["nodes"])):
            at = ("candidates", "nodes", *((str(place),) if isinstance(candidates["nodes"], list) else ()))
            values = self._node_entry(entry, at)
            if values is None:
                continue
            networks = (values["network"],) if "network" in values else candidates.get("networks", (None,))
            for network in networks:
                node, gpu, net, written, findings = resolve_node(self.doc, self.folder, values["node"], network, at)
                self.findings.extend(findings)
                if node is None or gpu is None or findings:
                    continue
                named[node.name] = None
                counts = self._counts(
                    node, values.get("num_gpus", candidates.get("num_gpus")), limits.get("max_gpus"), at, net is None
                )
                offer = self._offer(node, quotes, prices, goal, owned.get(node.name, 0) >= max(counts, default=0), at)
                if not counts or offer is None:
                    continue
                name = node.name + (f", {network}" if network and len(networks) > 1 else "")
                sites.append(
                    Site(
                        name=name, node=node, gpu=gpu, network=net, written=written, num_gpus=counts, offer=offer,
                        owned_gpus=owned.get(node.name, 0),
                    )
                )  # fmt: skip
        if not self.findings and not self.problems:
            self._check_owned(owned, named)
        if self.above and sites:
            self.assumptions.append(f"constraints.max_gpus is below the least of some nodes: {', '.join(self.above)}")
        elif self.above and not self.problems and not self.findings:
            what = f"constraints.max_gpus is {limits['max_gpus']}, but the fewest GPUs of the plan are "
            what += ", ".join(self.above)
            self.problems.append(Problem(("constraints", "max_gpus"), what, "write more, or fewer num_gpus"))
        if len(sites) > MAX_SITES:
            self.problems.append(
                Problem(("candidates",), f"{len(sites)} kinds of machine", f"write {MAX_SITES} or fewer")
            )
        return sites

    def _node_entry(self, entry: object, at: tuple[str, ...]) -> dict[str, Any] | None:
        if isinstance(entry, Mapping):
            values, wrong = read_mapping(entry, fields.NODE, at, self.problems)
            return None if wrong else values
        try:
            return {"node": fields.NODE["node"].read(entry)}
        except WrongValueError as error:
            self.problems.append(Problem(at, f"{dotted(at)}: {error.problem}", error.remedy))
            return None

    def _counts(
        self, node: NodeFacts, given: Sequence[int] | None, most: int | None, at: tuple[str, ...], alone: bool
    ) -> tuple[int, ...]:
        """Return the numbers of GPUs that this node can make: a part of one, or whole nodes."""
        per_node = node.num_gpus
        wanted = given or DEFAULT_GPUS
        if given is None:
            self.assumptions.append(f"numbers of GPUs: powers of two up to {DEFAULT_GPUS[-1]}, as none are given")
        usable = [n for n in wanted if (n <= per_node or n % per_node == 0) and (not alone or n <= per_node)]
        if not usable:
            near = sorted({max(1, round(n / per_node)) * per_node for n in wanted})
            self.problems.append(
                Problem(
                    at,
                    f"none of {', '.join(map(str, wanted))} GPUs are whole nodes of {node.name}, which have {per_node}"
                    if not alone
                    else f"node {node.name} has no network, so it stands alone with {per_node} GPUs",
                    f"write num_gpus: [{', '.join(map(str, near))}]" if not alone else "write candidates.networks too",
                )
            )
        kept = tuple(sorted(n for n in usable if most is None or n <= most))
        if usable and not kept:
            self.above[f"{min(usable)} of {node.name}"] = None
        return kept

    def _check_owned(self, owned: Mapping[str, int], named: Mapping[str, None]) -> None:
        """What is owned has to be among the nodes that the plan names."""
        name = next((name for name in sorted(owned) if name not in named), None)
        if name is not None:
            self.problems.append(
                Problem(
                    ("candidates", "owned", name),
                    f"candidates.owned names {name}, which is not among candidates.nodes",
                    f"write it there too: nodes: [{', '.join([*named, name])}]",
                )
            )

    def _owned(self, given: object) -> dict[str, int]:
        if given is None:
            return {}
        table = {name: integer(1, 2**17, 64) for name in given} if isinstance(given, Mapping) else {}
        values, _ = read_mapping(given, table, ("candidates", "owned"), self.problems)
        for name in values:
            if name not in catalog.names("node") and "/" not in name:
                self.problems.append(
                    Problem(("candidates", "owned", name), f"unknown node {show(name)}",
                            suggest(name, catalog.names("node")))
                )  # fmt: skip
        return values

    def _offer(
        self,
        node: NodeFacts,
        quotes: tuple[list[Quote], list[Quote]],
        prices: Mapping[str, Any],
        goal: Goal,
        owned: bool,
        at: tuple[str, ...],
    ) -> Offer | None:
        """Return the cheapest offer for a node's GPUs. Of two that cost the same, the one that stands first.

        Where all of them are ``owned`` no price is needed.
        """
        acquire = prices.get("acquire", "rent")
        lifetime = prices.get("lifetime", units.parse_duration(economy.running("people")["lifetime"].text))
        found: list[Offer] = []
        if acquire in ("rent", "either"):
            found += [
                Offer(provider=q.provider, term=q.term, usd_per_gpu_hour=q.usd, date=q.date, source=q.source)
                for q in _for_node(quotes[0], node)
            ]
        if acquire in ("buy", "either"):
            found += [
                Offer(
                    provider=q.provider, term="bought", usd_per_gpu_hour=q.usd / lifetime * 3600, date=q.date,
                    source=q.source, pays_power=True, usd_per_gpu=q.usd,
                )
                for q in _for_node(quotes[1], node)
            ]  # fmt: skip
        if found:
            return min(found, key=lambda offer: offer.usd_per_gpu_hour)
        if owned or (goal.objective not in ("cheapest", "trade_off") and goal.budget_usd is None):
            if not owned:
                self.assumptions.append(f"no price of {node.name}'s {node.gpu} is known: its money is left out (0 USD)")
            return Offer(provider="none", term="unknown", usd_per_gpu_hour=0.0, date="", source="")
        key = "rent" if acquire != "buy" else "buy"
        what = "2.10 USD/h" if key == "rent" else "30000 USD/GPU"
        self.problems.append(
            Problem(
                at,
                f"no price is known of {node.name}'s {node.gpu}",
                f"write prices.{key}: {{{node.gpu}: {what}}}, or goal: {{fastest: true}}",
            )
        )
        return None

    def _quotes(self, prices: Mapping[str, Any]) -> tuple[list[Quote], list[Quote]]:
        """Return the offers to rent and to sell: a plan's own before those of its file before the catalogue's."""
        terms = prices.get("terms", ("on-demand", "reserved"))
        providers = prices.get("providers")
        if providers:
            known = sorted({quote.provider for quote in economy.rents()})
            for name in providers:
                if name.lower() not in known and "file" not in prices:
                    self.problems.append(
                        Problem(("prices", "providers"), f"prices.providers: nothing of {show(name)} is known",
                                suggest(name, known, "known", 20))
                    )  # fmt: skip
                    providers = None
        from_file = self._file(prices.get("file"))
        found = []
        for key, per, known_quotes in (("rent", "h", economy.rents()), ("buy", "GPU", economy.purchases())):
            own = list(self._own(prices.get(key), key, per))
            theirs = [quote for quote in from_file[key] if key == "buy" or quote.term in terms]
            ours = [quote for quote in known_quotes if key == "buy" or quote.term in terms]
            if providers:
                lower = [name.lower() for name in providers]
                theirs, ours = (
                    [q for q in some if key == "buy" or q.provider.lower() in lower] for some in (theirs, ours)
                )
            priced = {quote.node or quote.gpu for quote in (*own, *theirs)}
            found.append([*own, *theirs, *(q for q in ours if q.gpu not in priced and q.node not in priced)])
        return found[0], found[1]

    def _own(self, given: object, key: str, per: str) -> Iterator[Quote]:
        """Yield the offers that the plan itself names: a mapping from node or GPU to its price."""
        at = ("prices", key)
        if given is None:
            return
        if not isinstance(given, Mapping):
            self.problems.append(
                Problem(at, f"{dotted(at)}: {show(given)} is not a mapping",
                        "write a node or GPU and its price: {h100-sxm-80gb: "
                        + ("2.10 USD/h}" if key == "rent" else "30000 USD/GPU}"))
            )  # fmt: skip
            return
        price = fields.money_per(per, "2.10 USD/h")
        nodes, gpus = catalog.names("node"), catalog.names("gpu")
        for name, value in given.items():
            path = (*at, name)
            if name not in nodes and name not in gpus and "/" not in name:
                self.problems.append(
                    Problem(path, f"{dotted(path)}: unknown node or GPU {show(name)}", suggest(name, (*nodes, *gpus)))
                )
                continue
            try:
                usd = price.read(value)
            except WrongValueError as error:
                self.problems.append(Problem(path, f"{dotted(path)}: {error.problem}", error.remedy))
                continue
            is_gpu = name in gpus
            yield Quote(name if is_gpu else "", "" if is_gpu else name, "the plan", "given", usd, "", "the plan file")

    def _file(self, given: str | None) -> dict[str, list[Quote]]:
        """Return the offers of the user's own file, which is written as the catalogue's prices.yaml."""
        found: dict[str, list[Quote]] = {"rent": [], "buy": []}
        if given is None:
            return found
        path = self.folder / given
        shown = str(path)
        try:
            doc = parse_yaml(read_text(path, shown, "a list of prices"), shown, self.findings, "a list of prices")
        except UnreadableError as error:
            self._report(error.finding, ("prices", "file"))
            return found
        problems: list[Problem] = []
        table: dict[str, Key] = {
            "rent": Key(lambda v: v, {}), "buy": Key(lambda v: v, {}), "sources": Key(lambda v: v, {}),
        }  # fmt: skip
        top, _ = read_mapping(doc.data, table, (), problems)
        for key, per in (("rent", "h"), ("buy", "GPU")):
            entries = top.get(key, [])
            if not isinstance(entries, list):
                problems.append(Problem((key,), f"{key}: {show(entries)} is not a list of offers",
                                        "write '- {gpu: h100-sxm-80gb, price: 2.10 USD/h}'"))  # fmt: skip
                continue
            for place, entry in enumerate(entries):
                quote = _offer_of(entry, key, per, (key, str(place)), problems)
                if quote is not None:
                    found[key].append(quote)
        self.findings.extend(doc.finding(problem) for problem in problems)
        return found

    def _report(self, finding: Finding, at: tuple[str, ...]) -> None:
        if finding.line:
            self.findings.append(finding)
        else:
            self.problems.append(Problem(at, f"{finding.file}: {finding.problem}", finding.remedy))


_PRICED: tuple[Literal["gpu", "node"], ...] = ("gpu", "node")


def _offer_of(entry: object, key: str, per: str, at: tuple[str, ...], problems: list[Problem]) -> Quote | None:
    before = len(problems)
    table = dict(fields.OFFER)
    table["price"] = fields.money_per(per, "2.10 USD/h" if per == "h" else "30000 USD/GPU")._replace(
        required=True, doc="write '2.10 USD/h'" if per == "h" else "write '30000 USD/GPU'"
    )
    values, _ = read_mapping(entry, table, at, problems)
    problems += [
        Problem((*at, kind), f"unknown {kind} {show(values[kind])}", suggest(values[kind], catalog.names(kind)))
        for kind in _PRICED
        if kind in values and values[kind] not in catalog.names(kind) and "/" not in values[kind]
    ]
    if isinstance(entry, Mapping) and "gpu" not in entry and "node" not in entry:
        problems.append(Problem(at, f"{dotted(at)} says neither gpu nor node", "write gpu: h100-sxm-80gb"))
    if len(problems) > before:
        return None
    return Quote(
        values.get("gpu", ""), values.get("node", ""), values.get("provider", "given"),
        values.get("term", "on-demand") if key == "rent" else "bought", values["price"], values.get("date", ""),
        values.get("source", "the prices file"),
    )  # fmt: skip


def _for_node(quotes: Sequence[Quote], node: NodeFacts) -> list[Quote]:
    """Return what is offered for a node: what names it, else what names its GPU and no other node."""
    of_node = [quote for quote in quotes if quote.node == node.name]
    return of_node or [quote for quote in quotes if quote.gpu == node.gpu and not quote.node]


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _power_of_two(sequences: float) -> int:
    """Return the power of two nearest to a number of sequences, 1 at least."""
    from math import log2

    return 1 << max(0, round(log2(max(1.0, sequences))))


def _range(low: int, high: int) -> tuple[int, ...]:
    """Return the batches of a range that are tried: its ends, and the low end doubled as often as it goes."""
    found = [low]
    while found[-1] * 2 <= high:
        found.append(found[-1] * 2)
    return (*found, high) if found[-1] != high else tuple(found)


def _num_parameters(draft: ModelDraft) -> int:
    from sim.model.transformer import num_parameters
    from sim.scenario.schema import ModelConfig

    return num_parameters(
        ModelConfig(**{key: getattr(draft, key) for key in ModelConfig.model_fields if draft.knows(key)})
    )


_FAILURES: dict[str, tuple[str, Any]] = {
    "gpu_mtbf": ("gpu_mtbf_s", units.parse_duration),
    "node_mtbf": ("node_mtbf_s", units.parse_duration),
    "detect": ("detect_s", units.parse_duration),
    "restart": ("restart_s", units.parse_duration),
    "repair": ("repair_s", units.parse_duration),
    "gpu_spread": ("gpu_spread", float),
    "spare_nodes": ("spare_nodes", int),
    "checkpoint_interval": ("checkpoint_interval_s", units.parse_duration),
    "replicas": ("replicas", int),
    "seed": ("seed", int),
}

_STORAGE: dict[str, tuple[str, Any]] = {
    "write_per_node": ("write_bytes_per_s_per_node", units.parse_rate),
    "write": ("write_bytes_per_s", units.parse_rate),
    "bytes_per_parameter": ("bytes_per_parameter", float),
    "kept": ("kept", int),
}


def _sent_home(problem: Problem) -> Problem:
    """Where an unknown key is known in another section, say so."""
    if not problem.problem.startswith("unknown key ") or not problem.path:
        return problem
    here, key = dotted(problem.path[:-1]), problem.path[-1]
    homes = [section for section, table in fields.SECTIONS.items() if key in table and section != here]
    if key in fields.TOP and here:
        return problem._replace(remedy=f"{key} stands at the top, not under {here}")
    return problem._replace(remedy=f"write it as {homes[0]}.{key}") if homes else problem
