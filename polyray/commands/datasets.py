"""Datasets: the commands that need an OUT alone; `serve` has a cluster besides, to try swaps on."""

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from polyray.cluster.interrupt import Stop
from polyray.commands import printed
from polyray.commands.bars import Bars
from polyray.commands.terminal import DAMAGED, OK, Address, Json, OutPath, aside, console_for, guarded
from polyray.errors import ConfigError


def status(
    out: OutPath,
    watch: Annotated[bool, typer.Option("--watch", help="Show again every two seconds until the sweep ends.")] = False,
    as_json: Json = False,
) -> None:
    """Say how far a sweep is, from its commit records alone."""
    guarded(lambda: _status(out, watch, as_json), as_json)


def _status(out: str, watch: bool, as_json: bool) -> int:
    from polyray.cluster.progress import progress

    console = console_for(as_json)
    while True:
        report = progress(out)
        if as_json:
            print(json.dumps(report))
        else:
            table = Table("stage", "units", "of", "actor-hours", title=f"run {report['run_id']}", title_justify="left")
            for s in report["stages"]:
                total = "?" if s["n_units"] is None else str(s["n_units"])
                table.add_row(s["stage"], str(s["n_done"]), total, f"{s['seconds'] / 3600:.3f}")
            console.print(table)
            console.print("finished" if report["finished"] else f"{report['n_done']} units committed, not finished")
        if not watch or report["finished"]:
            return OK
        time.sleep(2.0)


def verify(out: OutPath, as_json: Json = False) -> None:
    """Read every byte of a dataset again. Exit 4 with the list when something is amiss."""
    guarded(lambda: _verify(out, as_json), as_json)


def _verify(out: str, as_json: bool) -> int:
    from polyray.cluster.progress import expected_units
    from polyray.verify import verify as audit

    report = audit(out, expected_units(out))
    findings = {
        name: getattr(report, name)
        for name in ("missing_units", "missing_parts", "duplicates", "orphans", "mismatches", "unreadable")
    }
    if as_json:
        print(json.dumps({"ok": report.ok, "n_parts": report.n_parts, "n_rows": report.n_rows, **findings}))
        return OK if report.ok else DAMAGED
    console = console_for()
    for name, lines in findings.items():
        for line in lines[:50]:
            console.print(f"[bold red]{name.replace('_', ' ')}[/] {escape(line)}")
        if len(lines) > 50:
            console.print(f"  … and {len(lines) - 50} more")
    n_rows = ", ".join(f"{name} {n:,}" for name, n in report.n_rows.items())
    console.print(f"{report.n_parts:,} parts read again; rows: {n_rows}")
    console.print("[bold green]whole[/]" if report.ok else "[bold red]not whole[/]")
    return OK if report.ok else DAMAGED


def report(
    out: OutPath,
    target: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where it is written; by default OUT/report.html.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Markdown for a supplement, with its figures in a folder beside it.")
    ] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FOLDER", help="Write every figure there as an SVG file as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one page that tells what a sweep found, finished or not: it opens offline and in print."""
    guarded(lambda: _report(out, target, as_markdown, svg, as_json), as_json)


def _report(out: str, target: Path | None, as_markdown: bool, svg: Path | None, as_json: bool) -> int:
    from polyray.report.command import said, write_report

    written = write_report(out, target, as_markdown, svg)
    if as_json:
        print(json.dumps(written))
    else:
        console_for().print(escape(said(written)))
    return OK


def export(
    out: OutPath,
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="Empty, new, or an export of the same run.")],
    form: Annotated[str, typer.Option("--format", help="neuron-records: OpenAI's form, of language models.")],
    layers: Annotated[
        list[str] | None, typer.Option("--layer", metavar="LAYER", help="Only this layer: h.3 or 3. Several times.")
    ] = None,
    neurons: Annotated[str | None, typer.Option(metavar="I-J,K", help="Only these neurons of each layer.")] = None,
    as_json: Json = False,
) -> None:
    """Write a dataset's neurons in the form of other tools, from the dataset alone."""
    guarded(lambda: _export(out, to, form, layers or [], neurons, as_json), as_json)


def _export(out: str, to: str, form: str, layers: list[str], neurons: str | None, as_json: bool) -> int:
    from polyray.export import neuron_records

    if form != neuron_records.FORM:
        raise ConfigError(f"--format {form!r} is not known; valid: {neuron_records.FORM!r}.")
    console = console_for(as_json)
    with Bars(console) as bars:
        summary = neuron_records.export(out, to, layers, neurons, lambda step: bars.show("export", step))
    if as_json:
        print(json.dumps(summary))
    else:
        printed.print_export(console, summary)
    return OK


def view(
    out: OutPath,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 for any free one.")] = 7870,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Show whole probe images, from where the run's config says.")
    ] = False,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = True,
) -> None:
    """Look at a dataset in a browser, until Ctrl-C; a running sweep is followed."""
    guarded(lambda: _view(out, port, probe, browser), as_json=False)


def _view(out: str, port: int, probe: bool, browser: bool) -> int:
    from polyray.view import serve

    try:
        serve.view(
            out, port, probe, browser, lambda at: console_for().print(f"viewing {escape(out)} at {at} (Ctrl-C ends)")
        )
    except KeyboardInterrupt:
        console_for().print("ended")
    return OK


def serve(
    out: OutPath,
    host: Annotated[str, typer.Option(help="Address that is listened on; beyond loopback a token is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 7871,
    address: Address = None,
    probe: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the probe set lies, if not where the run's config says.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=1000, help="Processes that hold the network.")] = 1,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token, readable by its owner alone; else POLYRAY_VIEW_TOKEN.")
    ] = None,
) -> None:
    """Serve a dataset to a group by Ray Serve, with its network at hand to try swaps, until Ctrl-C."""
    stop = Stop()
    with stop.listening():
        guarded(lambda: _serve(out, host, port, address, probe, replicas, token_file), as_json=False)


def _serve(
    out: str, host: str, port: int, address: str | None, probe: str | None, replicas: int, token_file: Path | None
) -> int:
    from polyray.serving import gate, start

    console = console_for()
    token = gate.token_of(os.environ, token_file, is_needed=not gate.is_loopback(host))
    if token is not None and token.is_new:
        console.print(f"token, shown this once: {token.text}", markup=False)
    address = address or os.environ.get("RAY_ADDRESS") or None
    try:
        with aside():
            start.serve_dataset(
                out,
                host,
                port,
                address,
                probe,
                replicas,
                token,
                lambda at: console.print(f"serving {escape(out)} at {at} (Ctrl-C ends)"),
            )
    except KeyboardInterrupt:
        console.print("ended")
    return OK
