"""The command line: with `commands`, the only place that prints, exits or reads the environment.

Place in the flow: the top.
"""

import json
import os

import typer
from rich.markup import escape
from rich.table import Table

from polyray import logs
from polyray.commands import datasets, sweeps
from polyray.commands.terminal import OK, Json, console_for, guarded

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A census of the neurons of a network: which respond to several unrelated things, to which, how sure one "
    "can be.",
)

for command in (
    sweeps.run, sweeps.plan, datasets.status, datasets.verify, datasets.report, datasets.view, datasets.serve,
    datasets.export, sweeps.sensitivity, sweeps.submit,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point of the `polyray` command."""
    logs.to_people()
    app()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has: versions, devices, Ray, which weights and probe sets are reachable."""
    guarded(lambda: _doctor(as_json), as_json)


def _doctor(as_json: bool) -> int:
    from polyray.doctor import examine

    findings = examine(os.environ)
    if as_json:
        print(json.dumps(findings))
        return OK
    console = console_for()
    for title, facts in findings.items():
        table = Table("what", "found", title=title, title_justify="left")
        for name, value in facts.items():
            table.add_row(escape(str(name)), escape(str(value)))
        console.print(table)
    return OK


if __name__ == "__main__":
    main()
