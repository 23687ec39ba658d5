"""Terminal: how every command speaks, and how it ends.

Place in the flow: under the commands. Exit codes: 0 done; 2 bad config or data, nothing written (for `plan`:
infeasible); 3 stopped with failed units, resumable; 4 `verify` found something; 130 interrupted, resumable.
"""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from polyray.errors import ConfigError, DataError, ModelError, PolyrayError, StoreError

OK, REFUSED, INCOMPLETE, DAMAGED, INTERRUPTED = 0, 2, 3, 4, 130

OutPath = Annotated[str, typer.Argument(metavar="OUT", help="Folder of a dataset.")]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on standard output.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster; by default RAY_ADDRESS or the config's, else Ray is started here.")
]


def console_for(as_json: bool = False) -> Console:
    """Standard output for people; standard error where standard output is for machines."""
    stream = sys.stderr if as_json else sys.stdout
    width = None if stream.isatty() else 160
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def aside() -> AbstractContextManager[object]:
    """What libraries print goes to standard error meanwhile: Ray tells of every worker's death, torch of its loading.

    Standard output is for what the command says, on a console that was made before.
    """
    return redirect_stdout(sys.stderr)


def leave(error: Exception, code: int, as_json: bool) -> NoReturn:
    kind = type(error).__name__
    if as_json:
        print(json.dumps({"error": kind, "message": str(error), "exit": code}))
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]{kind}:[/] {escape(str(error))}")
    raise typer.Exit(code)


def guarded(call: Callable[[], int], as_json: bool) -> NoReturn:
    """Runs a command and turns what it raises into its exit code."""
    try:
        code = call()
    except (ConfigError, DataError, ModelError, StoreError) as e:
        leave(e, REFUSED, as_json)
    except PolyrayError as e:
        leave(e, INCOMPLETE, as_json)
    except KeyboardInterrupt as e:
        told = f"{e}" if str(e).startswith("interrupted") else "interrupted"
        told += "; what is committed stays, and the same command goes on where this one stopped"
        if as_json:
            print(json.dumps({"error": "Interrupted", "message": told, "exit": INTERRUPTED}))
        Console(stderr=True, highlight=False, soft_wrap=True).print(escape(told))
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(code)
