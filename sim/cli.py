"""The command line: the only module that prints or exits.

Results go to standard output, progress, warnings and prose to standard error. Exit codes: 0 answered, 2 bad input,
3 answered and the answer is that it does not fit, 70 a defect of ours, 130 interrupted.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sim.errors import Finding, ScenarioError

if TYPE_CHECKING:
    from rich.status import Status

    from sim.advice import Remedy
    from sim.pipeline import Simulation
    from sim.report.layout import Screen
    from sim.report.report import Report
    from sim.validation.predict import Validation

EXIT_BAD_INPUT = 2
EXIT_DOES_NOT_FIT = 3
EXIT_DEFECT = 70
PROGRESS_AFTER_S = 0.7

app = typer.Typer(
    name="sim",
    help="A simulator of distributed LLM training: does it fit, how long is a step, where does the time go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A scenario file.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Say something over what the file says; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output, and nothing else there.")]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="Go by what `sim calibrate` measured on your machine."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No warnings and no prose.")]


@app.command()
def run(
    file: File,
    set_: Set = None,
    calibration: Calibration = None,
    json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write everything worth keeping: report, plots, trace, snapshot."),
    ] = None,
    quiet: Quiet = False,
    advice: Annotated[
        bool, typer.Option(help="Where it does not fit, try by simulation which changes would make it fit.")
    ] = True,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="VIEW", help="Also show memory at-peak, by-module, by-phase or by-kind."),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", metavar="VIEW", help="Also show what drives the band of the time: certainty."),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if", metavar="KEY.PATH=VALUE", help="Memory and time with that instead of what is said; repeatable."
        ),
    ] = None,
    largest: Annotated[
        str | None,
        typer.Option("--largest", metavar="KEY", help="The largest micro_batch_size or sequence_length that fits."),
    ] = None,
) -> None:
    """Simulate one training step: memory, time, communication."""
    from sim.pipeline import simulate
    from sim.scenario.load import load_scenario

    _choice("--memory", memory, ("at-peak", "by-module", "by-phase", "by-kind"))
    _choice("--time", time, ("certainty",))
    _choice("--largest", largest, ("micro_batch_size", "sequence_length"))
    set_ = _with(set_, calibration)
    scenario = load_scenario(file, set_ or ())
    if what_if:
        from sim.what_if import check_changes

        check_changes(file, set_ or (), what_if)
    if out is not None:
        from sim.report.save import prepare

        prepare(out)
    with _progress(f"simulating {scenario.name}", quiet):
        simulation = simulate(scenario, record=out is not None or memory is not None)
    report = simulation.report
    remedies: tuple[Remedy, ...] = ()
    if not report.fits and advice:
        from sim.advice import remedies_for

        with _progress("trying what would make it fit", quiet) as step:
            remedies = remedies_for(file, set_ or (), simulation, step)
    if out is not None:
        from sim.report.save import save

        with _progress(f"writing {out}", quiet):
            save(simulation, remedies, out)
    views, answers = _questions(file, set_ or (), simulation, memory, (what_if or (), largest), quiet)
    if json:
        from sim.report.report import result

        content = result(report, remedies)
        if views is not None:
            content["memory_views"] = views
        if answers is not None:
            content["what_if"] = answers
        _print_json(content)
    else:
        from sim.report.tables import print_report, print_warnings

        print_report(_screen(), simulation.scenario, report, remedies)
        if time is not None and report.time_confidence is not None:
            from sim.report.tables import print_time

            print_time(_screen(), report.time_confidence, report.time_s)
        _print_questions(report, views, memory, answers)
        if not quiet:
            print_warnings(_screen(sys.stderr), report.warnings)
    if not report.fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _questions(
    file: Path,
    overrides: Sequence[str],
    simulation: Simulation,
    memory: str | None,
    asked: tuple[Sequence[str], str | None],
    quiet: bool,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | None]:
    """Return the views of memory and the answers to what-if questions that were asked for."""
    views = None
    if memory is not None:
        from sim.report.memory import memory_views

        views = memory_views(simulation.report.fullest)
    changes, key = asked
    if not changes and not key:
        return views, None
    from sim.what_if import largest, what_if

    with _progress("asking what if", quiet) as step:
        answers = what_if(file, overrides, changes, simulation, step)
        answers += largest(file, overrides, key, simulation, step) if key else ()
    return views, [answer.to_dict() for answer in answers]


def _print_questions(
    report: Report, views: dict[str, Any] | None, memory: str | None, answers: list[dict[str, Any]] | None
) -> None:
    if views is None and answers is None:
        return
    from sim.report.memory import print_answers, print_views

    if memory is not None and views is not None:
        print_views(_screen(), views, memory)
    if answers is not None:
        print_answers(_screen(), report.to_dict()["memory"], report.time_s, answers)


def _choice(option: str, given: str | None, known: tuple[str, ...]) -> None:
    """Refuse a value that an option does not have."""
    if given is not None and given not in known:
        raise ScenarioError([Finding(option, 0, f"{given!r} is not one of its values", f"write {', '.join(known)}")])


def _with(overrides: list[str] | None, calibration: Path | None) -> list[str] | None:
    """Return what is laid over the file, the calibration with it: its path is relative to where the user stands."""
    if calibration is None:
        return overrides
    from json import dumps

    return [*(overrides or ()), f"calibration={dumps(str(calibration.absolute()), ensure_ascii=False)}"]


@app.command()
def check(file: File, set_: Set = None, json: Json = False, quiet: Quiet = False) -> None:
    """Print every problem of a scenario; simulate nothing."""
    from sim.scenario.load import load_scenario

    scenario = load_scenario(file, set_ or ())
    if json:
        _print_json({"scenario": scenario.name, "ok": True, "warnings": list(scenario.warnings)})
        return
    if not quiet:
        for warning in scenario.warnings:
            typer.echo(f"warning: {warning}", err=True)
        typer.echo(f"{file}: ok")


@app.command()
def explain(
    file: File, set_: Set = None, calibration: Calibration = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Print a resolved scenario, and where each value comes from."""
    from sim.report.explain import explanation, given_document, print_explanation
    from sim.scenario.load import load_scenario

    set_ = _with(set_, calibration)
    scenario = load_scenario(file, set_ or ())
    content = explanation(scenario, given_document(file, set_ or ()))
    if json:
        _print_json(content)
    else:
        print_explanation(_screen(), content, quiet=quiet)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE FILE ...", help="Scenario files.", show_default=False)],
    set_: Set = None,
    calibration: Calibration = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate several scenarios and show them side by side."""
    from sim.pipeline import simulate
    from sim.report.compare import comparison, print_comparison
    from sim.scenario.load import load_scenario

    findings: list[Finding] = []
    set_ = _with(set_, calibration)
    scenarios = []
    for file in files:
        try:
            scenarios.append(load_scenario(file, set_ or ()))
        except ScenarioError as error:
            findings += [finding for finding in error.findings if finding not in findings]
    if findings:
        raise ScenarioError(findings)
    reports = []
    with _progress("simulating", quiet) as step:
        for scenario in scenarios:
            step(scenario.name)
            reports.append(simulate(scenario).report)
    names = [file.stem if [f.stem for f in files].count(file.stem) == 1 else str(file) for file in files]
    if json:
        _print_json(comparison(reports, [str(file) for file in files]))
    else:
        print_comparison(_screen(), reports, names)
    if not any(report.fits for report in reports):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


@app.command()
def validate(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE-or-DIR ...", help="Files of measured runs, or directories.", show_default=False),
    ],
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Summaries only.")] = False,
    results: Annotated[
        Path | None,
        typer.Option("--results", metavar="FILE.md", help="Write errors by source, GPU, strategy, size."),
    ] = None,
    filter_: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="Only runs whose file:id contains this.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most this many runs, evenly spread.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", min=1, help="Processes; all cores if left out.")
    ] = None,
    calibration: Calibration = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="DIR", help="Draw measured and predicted memory of runs with a snapshot."),
    ] = None,
) -> None:
    """Predict measured runs; show the signed errors."""
    from sim.validation.predict import calibrated, select, validate
    from sim.validation.runs import read_runs
    from sim.validation.summary import result
    from sim.validation.tables import print_validation

    chosen = select(read_runs(files), filter_, limit)
    if not any(file.runs for file in chosen):
        raise ScenarioError([Finding("--filter", 0, f"no run's file:id contains {filter_!r}", "leave it out")])
    if results is not None:
        from sim.report.save import prepare_file

        prepare_file(results, "--results")
    if plot is not None:
        from sim.report.save import prepare

        prepare(plot, "--plot")
    if calibration is not None:
        chosen = calibrated(chosen, str(calibration.absolute()))
    with _progress("predicting", quiet) as step:
        answered = validate(chosen, jobs, step)
    if results is not None:
        words = [
            *map(str, files),
            *(["--filter", filter_] if filter_ else []),
            *(["--limit", str(limit)] if limit else []),
            *(["--calibration", str(calibration)] if calibration else []),
        ]
        _write_results(answered, f"sim validate {' '.join(words)} --results {results}", results)
    if plot is not None:
        from sim.validation.parts import write_plots

        written = write_plots(answered, plot)
        if not quiet:
            typer.echo(f"{len(written)} pictures in {plot}" if written else "no run names a snapshot", err=True)
    if json:
        _print_json(result(answered))
    else:
        print_validation(_screen(), answered, quiet)
        if not answered.comparisons and not answered.failed and not quiet:
            typer.echo("nothing was measured that sim predicts: 'exact' is for other programs", err=True)
    if defects := sum(row.failure.defect for row in answered.failed):
        typer.echo(f"{defects} runs failed by a defect of sim; see them above\n{_DEFECT}", err=True)
        raise typer.Exit(EXIT_DEFECT)


def _write_results(answered: Validation, command: str, file: Path) -> None:
    """Write what came out as Markdown, with its picture beside it."""
    from sim.report.plots import results_png
    from sim.report.save import write_whole
    from sim.validation.results import points, results_markdown

    picture = file.with_name(f"{file.stem.lower()}_time.png")
    write_whole(picture, results_png(points(answered)), "--results")
    write_whole(file, results_markdown(answered, command, picture.name).encode(), "--results")


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan file.", show_default=False)],
    set_: Set = None,
    json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write the answer: JSON, CSV, plots, one HTML page, scenarios."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", min=1, help="Processes; all cores if left out.")
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            "--executor", "--backend", metavar="NAME", help="loky (this machine), dask or ray (a cluster), sequential."
        ),
    ] = "loky",
    address: Annotated[
        str | None, typer.Option("--address", metavar="ADDRESS", help="Of the cluster's scheduler: tcp://host:8786.")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", metavar="SHARE", min=0.0, max=0.5, help="Miss what is better by at most so much."),
    ] = 0.0,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", metavar="DIR", help="Where simulations are kept; cache in --out, or the user's, if left out."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Search strategies and clusters: what to buy, and how to run it."""
    from time import perf_counter

    from sim.planner.answer import answer
    from sim.planner.load import load_plan
    from sim.planner.run import EXECUTORS, Runner, default_cache
    from sim.planner.search import search

    if executor not in EXECUTORS:
        raise ScenarioError(
            [Finding("--executor", 0, f"unknown executor {executor!r}", f"write {', '.join(EXECUTORS)}")]
        )
    if address is not None and executor not in ("dask", "ray"):
        raise ScenarioError(
            [Finding("--address", 0, f"--executor {executor} has no address", "add --executor dask or ray")]
        )
    began = perf_counter()
    question = load_plan(file, set_ or ())
    if out is not None:
        from sim.report.save import prepare

        prepare(out)
    folder = cache or (out / "cache" if out is not None else default_cache())
    try:
        with _progress(f"planning {question.name}", quiet) as step, Runner(folder, jobs, executor, address) as runner:
            content = answer(search(question, runner, step, tolerance=tolerance), runner, step)
    except KeyboardInterrupt:
        if not quiet:
            typer.echo(f"interrupted; what was simulated is in {folder}: the same command goes on from there", err=True)
        raise
    if out is not None:
        from sim.planner.save import save

        with _progress(f"writing {out}", quiet):
            save(content, out)
    content["searched"]["seconds"] = round(perf_counter() - began, 3)
    if runner.not_kept and not quiet:
        typer.echo(f"warning: {runner.not_kept}; what was simulated is not found again", err=True)
    if json:
        _print_json(content)
    else:
        from sim.planner.tables import print_answer

        print_answer(_screen(), content, quiet)
    if content["recommended"] is None:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


@app.command()
def catalog(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="gpu, node, network, link or model.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One of them.")] = None,
    json: Json = False,
) -> None:
    """List what is known, or every fact about one of them."""
    from sim.report.catalog import catalogue, print_catalogue

    content = catalogue(kind, name)
    if json:
        _print_json(content)
    else:
        print_catalogue(_screen(), content)


@app.command("import")
def import_(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE-or-DIR ...",
            help="A Megatron-LM script, a torchtitan TOML, an accelerate YAML, a ds_config.json, a Hugging Face "
            "model's directory; several are laid over each other.",
            show_default=False,
        ),
    ] = None,
    command: Annotated[
        str | None, typer.Option("--command", metavar="TEXT", help="Megatron-LM's command line, in quotes.")
    ] = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the scenario here, not to standard output.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make a scenario from what starts a training run elsewhere."""
    from sim.importing import import_scenario

    imported = import_scenario(sources or (), command, set_ or (), out.parent if out else Path())
    _write_scenario(imported.text, out)
    if not quiet:
        for note in imported.notes:
            typer.echo(f"note: {note}", err=True)
        if imported.unread:
            typer.echo(f"note: not read, as sim does not know what they do: {', '.join(imported.unread)}", err=True)


@app.command()
def init(
    out: Annotated[Path, typer.Argument(metavar="[FILE]", help="The scenario to write.", show_default=True)] = Path(
        "scenario.yaml"
    ),
) -> None:
    """Ask a few questions and write a scenario."""
    from sim.asking import ask_scenario
    from sim.report.save import prepare_file

    prepare_file(out, "FILE")
    try:
        if out.exists() and not typer.confirm(f"{out} is there already. Write over it?", err=True):
            raise typer.Exit
        text = ask_scenario(lambda question, default: str(typer.prompt(question, default=default, err=True)),
                            lambda words: typer.echo(words, err=True))  # fmt: skip
    except typer.Abort:
        typer.echo("sim init: the answers ended before the questions; nothing is written", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    _write_scenario(text, out)


def _write_scenario(text: str, out: Path | None) -> None:
    """Write a scenario that was just made, and say at once what is wrong with it or how to go on."""
    from sim.scenario.load import load_scenario_text

    if out is None:
        _screen().write(text)
    else:
        from sim.report.save import prepare_file, write_whole

        prepare_file(out, "--out")
        write_whole(out, text.encode())
    load_scenario_text(text, str(out or "the scenario above"), folder=out.parent if out else ".")
    if out is not None:
        typer.echo(f"{out}: ok; now: sim run {out}", err=True)


@app.command()
def calibrate(
    file: File,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.yaml", help="Where to write it.")] = Path(
        "calibration.yaml"
    ),
    nccl_tests: Annotated[
        list[Path] | None,
        typer.Option("--nccl-tests", metavar="FILE", help="Output of nccl-tests on your machines; repeatable."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cuda, cpu (the host's times alone), none, or auto: the GPU if there is one.",
        ),
    ] = "auto",
    python: Annotated[
        str, typer.Option("--python", metavar="PATH", help="The Python that has torch, if it is not sim's own.")
    ] = "",
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Measure the GPU at hand on a scenario's kernels."""
    from sim.calibrating import DEVICES
    from sim.calibrating import calibrate as measure
    from sim.report.save import prepare_file, write_whole
    from sim.scenario.load import load_scenario

    _choice("--device", device, DEVICES)
    scenario = load_scenario(file, set_ or ())
    prepare_file(out, "--out")
    with _progress(f"calibrating on {scenario.name}", quiet) as step:
        found = measure(scenario, device, nccl_tests or (), python, step)
    write_whole(out, found.text.encode())
    if not quiet:
        for note in found.notes:
            typer.echo(note, err=True)
        typer.echo(f"{out}: written; now: sim run {file} --calibration {out}", err=True)


@app.command()
def topology(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME-or-FILE",
            help="A node of the catalogue, a topology file, the output of `nvidia-smi topo -m`, or NCCL's XML.",
            show_default=False,
        ),
    ],
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="Which GPU it is, where the file does not say.")
    ] = "",
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="So many of these nodes.")] = 1,
    network: Annotated[
        str, typer.Option("--network", metavar="NAME", help="Network between them, by name or in words.")
    ] = "",
    nccl_tests: Annotated[
        list[str] | None,
        typer.Option("--nccl-tests", metavar="FILE", help="Output of nccl-tests to compare with; repeatable."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE.yaml", help="Write what was read as a topology file.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Draw it: topology.png.")] = None,
    json: Json = False,
) -> None:
    """Show a machine and its expected bus bandwidths."""
    from sim.report import topology as topologies

    source = topologies.read(name, gpu)
    content = topologies.topology(source, nodes, network, nccl_tests or ())
    if (write is not None or out is not None) and source.node is None:
        raise ScenarioError([Finding(name, 0, "graphs are no machine to write or draw", "give a topology")])
    if write is not None:
        from sim.report.save import prepare_file, write_whole

        prepare_file(write, "--write")
        write_whole(write, (source.text or topologies.own_text(source, name)).encode(), "--write")
    if out is not None and source.node is not None:
        from sim.report.plots import topology_png
        from sim.report.save import prepare, write_whole

        prepare(out)
        write_whole(out / "topology.png", topology_png(topologies.machine_of(source.node, 1, network)))
    if json:
        _print_json(content)
    else:
        topologies.print_topology(_screen(), content)


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(metavar="[scenario|plan|topology|runs]", help="Which schema.")] = "scenario",
) -> None:
    """Print a JSON Schema, for editors and other programs."""
    from sim.catalog.json_schema import topology_schema
    from sim.planner.fields import plan_schema
    from sim.scenario.load import scenario_json_schema
    from sim.validation.runs import runs_schema

    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "scenario": scenario_json_schema,
        "plan": plan_schema,
        "topology": topology_schema,
        "runs": lambda: runs_schema(scenario_json_schema()),
    }
    if kind not in kinds:
        typer.echo(f"sim schema: there is no schema {kind!r}; write one of: {', '.join(kinds)}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT)
    _print_json(kinds[kind]())


def main() -> None:
    """Run the command line: bad input is a list of findings and exit 2, anything unforeseen our defect and exit 70."""
    import gc
    import io

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
    gc.disable()  # a run makes many small objects and no cycles worth collecting; the process ends soon
    try:
        app()
    except ScenarioError as error:
        for finding in error.findings:
            typer.echo(str(finding), err=True)
        sys.exit(EXIT_BAD_INPUT)
    except Exception:
        import traceback

        traceback.print_exc()
        typer.echo(_DEFECT, err=True)
        sys.exit(EXIT_DEFECT)


_DEFECT = """
This is a defect of sim, not of your input. Please report it with the traceback above, the scenario file,
and the output of: sim --version"""


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import platform
        from importlib.metadata import version as version_of

        typer.echo(f"sim {version_of('sim')} (Python {platform.python_version()}, {platform.system()})")
        raise typer.Exit


@contextmanager
def _progress(words: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Say on standard error, if a person looks at it and it takes long, what is being done.

    Yields a function that says which part.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda part: None
        return
    late = _Late(words)
    try:
        yield late.say
    finally:
        late.stop()


class _Late:
    """A spinner that appears only where the work is not done by then."""

    def __init__(self, words: str) -> None:
        self._words = self._said = words
        self._lock = threading.Lock()
        self._status: Status | None = None
        self._timer = threading.Timer(PROGRESS_AFTER_S, self._show)
        self._timer.daemon = True
        self._timer.start()

    def say(self, part: str) -> None:
        with self._lock:
            self._said = f"{self._words}: {part}"
            if self._status is not None:
                self._status.update(self._said)

    def stop(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._words = ""
            if self._status is not None:
                self._status.stop()

    def _show(self) -> None:
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        with self._lock:
            if self._words:
                self._status = console.status(self._said)
                self._status.start()


def _print_json(value: object) -> None:
    from sim.report.report import json_text

    _screen().write(json_text(value))


def _screen(file: TextIO | None = None) -> Screen:
    from sim.report.layout import Screen

    return Screen(file or sys.stdout)
