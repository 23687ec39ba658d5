"""Sweeps: the commands that work on a cluster, or ask what such work would be.

What needs Ray or torch is imported by the command that needs it.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyray import files, logs
from polyray.cluster.interrupt import Stop
from polyray.commands import ended, printed
from polyray.commands.bars import Bars, duration
from polyray.commands.terminal import (
    INCOMPLETE,
    INTERRUPTED,
    OK,
    REFUSED,
    Address,
    Json,
    OutPath,
    aside,
    console_for,
    guarded,
    leave,
)
from polyray.config import AnyConfig, load_config
from polyray.errors import StoreError
from polyray.psi_text_config import PsiTextConfig
from polyray.text_config import TextConfig

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file with the sections science and execution.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override one key of the config, for instance science.seed=1."),
]
LogJson = Annotated[
    str | None,
    typer.Option(
        "--log-json", metavar="FILE", help="Add one JSON object a line for every event to FILE; - for standard error."
    ),
]


def _config(path: Path, overrides: list[str] | None, address: str | None) -> AnyConfig:
    config = load_config(path, overrides)
    address = address or config.execution.address or os.environ.get("RAY_ADDRESS") or None
    # mypy cannot tell that a copy of either kind is of that kind.
    moved: AnyConfig = config.model_copy(update={"execution": config.execution.model_copy(update={"address": address})})
    return moved


def run(
    config: ConfigPath,
    out: Annotated[str, typer.Option("--out", metavar="OUT", help="Folder of the dataset; resumed where it exists.")],
    overrides: Set = None,
    address: Address = None,
    log_json: LogJson = None,
    as_json: Json = False,
) -> None:
    """Run the sweep, or go on with what OUT already holds."""
    stop = Stop()
    with stop.listening():
        guarded(lambda: _run(_config(config, overrides, address), out, log_json, stop, as_json), as_json)


def _run(config: AnyConfig, out: str, log_json: str | None, stop: Stop, as_json: bool) -> int:
    # Imported here: the commands that only read a dataset start without Ray and torch.
    from polyray.cluster import apart, service
    from polyray.dataset import open as open_dataset

    console = console_for(as_json)
    started_s = time.monotonic()
    folder = str(files.located(out))
    resolved = apart.resolved(config, folder)
    sweep = resolved.sweep
    console.print(
        f"[bold]polyray[/] {sweep.n_neurons:,} neurons in {sweep.n_layers} layers, {sweep.n_items}, into {escape(out)}"
    )
    for note in resolved.notes:
        console.print(f"[bold yellow]note[/] {escape(note)}")
    bars = Bars(console)
    try:
        with aside(), logs.to_machines(log_json), service.cluster(config.execution), bars:
            outcome = service.run(resolved, bars.show, bars.say, stop)
    except StoreError as e:
        # Before the first unit a store that refuses has written nothing; after it, the run can be resumed.
        leave(e, INCOMPLETE if bars.shown else REFUSED, as_json)
    dataset = open_dataset(out)
    told = ended.of_text(dataset) if isinstance(config, TextConfig) else ended.of_psi(dataset, config)
    seconds = time.monotonic() - started_s
    if as_json:
        figures = {"run_id": outcome.run_id, "out": out, "seconds": seconds, "stage_seconds": outcome.seconds}
        figures["device_seconds"] = asdict(outcome.device_s)
        figures |= {"pictures": [str(p) for p in told.pictures], "notes": resolved.notes}
        print(json.dumps(figures | told.figures))
    else:
        for table in told.tables:
            console.print(table)
        failed = dataset["failures"].to_table(["item", "item_id"])
        if n_failures := failed.group_by(["item", "item_id"]).aggregate([]).num_rows:  # units may name the same item
            console.print(
                f"[bold yellow]note[/] {n_failures} images, patches, neurons or documents failed; see table failures"
            )
        console.print(f"done in {duration(seconds)}; run_id {outcome.run_id}; {printed.device_line(outcome.device_s)}")
        shown = ", ".join(escape(str(p)) for p in told.pictures)
        console.print(f"at a glance: {shown}; the tables: polyray.open({escape(repr(out))})")
    return OK


def plan(config: ConfigPath, overrides: Set = None, address: Address = None, as_json: Json = False) -> None:
    """Say what a sweep would be and cost; run nothing. Exit 2 when it could not run."""
    guarded(lambda: _plan(_config(config, overrides, address), as_json), as_json)


def _plan(config: AnyConfig, as_json: bool) -> int:
    from polyray.cluster import estimate, psi_text_estimate, service, text_estimate
    from polyray.cluster.resolve import floor_note

    if config.execution.address is None:
        nodes, groups = [service.this_machine()], []
    else:
        with aside(), service.cluster(config.execution):
            nodes, groups = service.nodes(), service.groups()
    found: Any
    with aside():
        if isinstance(config, TextConfig):
            found = text_estimate.estimate(config, service.room_of(config.execution, nodes, groups))
        else:
            of = psi_text_estimate if isinstance(config, PsiTextConfig) else estimate
            found = of.estimate(config)
            found.notes += floor_note(config, found.n_neurons, found.n_images or config.science.embed.n_pool)
    found.problems += service.lacks(config.execution, nodes, groups)
    if as_json:
        print(json.dumps({**asdict(found), "feasible": not found.problems}))
    elif isinstance(config, TextConfig):
        printed.print_text_plan(console_for(), found)
    else:
        printed.print_plan(console_for(), found)
    return REFUSED if found.problems else OK


def sensitivity(
    out: OutPath,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=V,V",
            help="K=50,100; seed=1; k_range=2-4; prompts=builtin or a file; encoder=standin, open_clip, a YAML file or "
            "{kind: …}; or a key of cluster or calibrate. Several times for several keys.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key of execution.")
    ] = None,
    address: Address = None,
    log_json: LogJson = None,
    as_json: Json = False,
) -> None:
    """Score a finished sweep again with one thing changed, and say how well the scores agree."""
    stop = Stop()
    with stop.listening():
        guarded(lambda: _sensitivity(out, vary or [], overrides or [], address, log_json, stop, as_json), as_json)


def _sensitivity(
    out: str,
    vary: list[str],
    overrides: list[str],
    address: str | None,
    log_json: str | None,
    stop: Stop,
    as_json: bool,
) -> int:
    from polyray.cluster import service
    from polyray.cluster.vary import resolve
    from polyray.dataset import open as open_dataset
    from polyray.report import sensitivity as report

    console = console_for(as_json)
    with aside():
        asked = resolve(out, vary, overrides, address, os.environ.get("RAY_ADDRESS") or None)
    for note in asked.notes:
        console.print(f"[bold yellow]note[/] {escape(note)}")
    if asked.remaining:
        bars = Bars(console)
        try:
            with aside(), logs.to_machines(log_json), service.cluster(asked.execution), bars:
                service.vary(asked, bars.show, bars.say, stop)
        except StoreError as e:
            leave(e, INCOMPLETE if bars.shown else REFUSED, as_json)
    if not asked.base.is_finished:  # a comparison was cut short after it was committed
        with asked.base.acquire():
            asked.base.finish()
    dataset = open_dataset(out)
    records = report.variant_table(dataset)
    picture = report.draw(dataset, files.folder_for_people(dataset.path) / "sensitivity.png") if records else None
    if as_json:
        print(json.dumps({"out": out, "picture": picture and str(picture), "notes": asked.notes, "variants": records}))
        return OK
    table = Table(*report.COLUMNS, title="sensitivity", caption=report.CAPTION, caption_justify="left")
    table.columns[1].overflow = "fold"
    for record in records:
        table.add_row(*(escape(c) for c in report.cells(record)))
    console.print(table if records else "nothing is varied yet: give --vary, for instance --vary K=50,100")
    if picture:
        console.print(
            f"at a glance: {escape(str(picture))}; all figures: polyray.open({escape(repr(out))})['sensitivity']"
        )
    return OK


def submit(
    config: ConfigPath,
    out: Annotated[
        str, typer.Option("--out", metavar="OUT", help="Folder of the dataset, an absolute path of the cluster.")
    ],
    overrides: Set = None,
    address: Annotated[
        str | None, typer.Option(help="Dashboard of the cluster, http://HEAD:8265; by default RAY_ADDRESS.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave once the job is submitted.")] = False,
    as_json: Json = False,
) -> None:
    """Run the sweep as a Ray job on a cluster, show its log, and exit as it does."""
    guarded(lambda: _submit(config, out, overrides or [], address, no_wait, as_json), as_json)


def _submit(path: Path, out: str, overrides: list[str], address: str | None, no_wait: bool, as_json: bool) -> int:
    from polyray.cluster import submit as jobs

    console = console_for(as_json)
    config = load_config(path, overrides)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    package = jobs.gather(path, config)
    command = jobs.entrypoint(package, config, out, overrides, as_json)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "package.zip"
        n_bytes = jobs.pack(package, archive)
        client = jobs.connect(address)
        job_id = jobs.submit(client, archive, command)
    for note in package.notes:
        console.print(f"[bold yellow]note[/] {escape(note)}")
    console.print(
        f"job {job_id}, with {len(package.members)} file(s) of {n_bytes / 1024**2:.2f} MiB: {escape(command)}"
    )
    figures: dict[str, Any] = {"job_id": job_id, "address": address, "out": out, "command": command}
    figures |= {"files": sorted(package.members), "package_bytes": n_bytes, "notes": package.notes}
    figures |= {"status": None, "exit": None, "run": None}
    code = OK
    if not no_wait:
        log_stream = sys.stderr if as_json else sys.stdout

        def show(text: str) -> None:
            log_stream.write(text)
            log_stream.flush()

        try:
            ended = jobs.follow(client, job_id, show)
        except KeyboardInterrupt:
            code = figures["exit"] = INTERRUPTED
            advice = f"no longer watched; the job goes on. ray job logs {job_id} --follow, ray job stop {job_id}"
            Console(stderr=True, highlight=False, soft_wrap=True).print(advice)
        else:
            code = ended.exit_code
            figures |= {"status": ended.status, "exit": code}
            figures["run"] = jobs.printed_object(ended.log) if as_json else None
            console.print(f"job {job_id} {ended.status.lower()}, exit code {code}")
    if as_json:
        print(json.dumps(figures))
    return code
