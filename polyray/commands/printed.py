"""Printed: what commands come to, as tables on the console that the command line hands over.

Place in the flow: beside `cli.py`, as `bars.py` is for work under way. The reports are imported when
they are needed: matplotlib takes a second.
"""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from polyray.config import Config

_CAPTION = (
    "log ψ: median log_psi under specific (-2.08 at chance). AUROC of log_psi, real against null neurons: paper "
    "against rotation, selective against pool, specific against one_concept. q < α: share of scored neurons called "
    "under specific. null called: share of one_concept null neurons that the same threshold calls."
)


def device_line(spent: Any) -> str:
    """What a run's actors worked, and how much of it an undisturbed run would not have."""
    lost = f", {spent.lost:,.0f} s lost" if spent.lost >= 0.5 else ", none lost"
    if spent.lost >= 0.5:
        lost += f" ({spent.twice:,.0f} s of units done twice, {spent.cut:,.0f} s of calls whose actor was lost)"
    return f"{spent.used:,.0f} device-seconds used{lost}"


def summary_tables(records: list[dict[str, Any]], config: Config) -> list[Any]:
    """The census: a line a layer."""
    from polyray.report import summary

    table = Table(*summary.COLUMNS, title="census", caption=_CAPTION, caption_justify="left", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[2].justify = "left"
    for record in records:
        table.add_row(*(escape(c) for c in summary.cells(record)), end_section=record["layer"] == records[-2]["layer"])
    science = config.science
    return [table, f"α = {science.calibrate.alpha}, K = {science.mine.K}, B = {science.calibrate.B}"]


def planted_table(records: list[dict[str, Any]]) -> Table:
    """What became of planted neurons."""
    from polyray.report import planted

    caption = (
        "Neurons of known truth. purity, balance: means over all neurons of the kind. The rest is of the neurons of "
        "purity at least 0.95: share significant under specific (size for mono, power for order2 and order3), AUROC "
        "against mono, share with the planted number of clusters, share of cluster names that hit a planted class."
    )
    table = Table(*planted.COLUMNS, title="planted", caption=caption, caption_justify="left", title_justify="left")
    for i, record in enumerate(records):
        last = i + 1 == len(records) or records[i + 1]["layer"] != record["layer"]
        table.add_row(*(escape(c) for c in planted.cells(record)), end_section=last)
    return table


def swaps_table(records: list[dict[str, Any]]) -> Table:
    """What patch swaps came to: layers, the sweep, its splits."""
    from polyray.report import swaps

    heads = (Column(head, justify="right", overflow="fold") for head in swaps.COLUMNS)
    table = Table(*heads, title="swaps", caption=swaps.CAPTION, caption_justify="left", title_justify="left", padding=0)
    table.columns[0].justify = "left"
    for column in table.columns[3:-3]:
        column.min_width = 13  # an interval that is not cut in two
    for record, following in zip(records, [*records[1:], None], strict=True):
        last = following is None or swaps.section(record) != swaps.section(following)
        table.add_row(*(escape(c) for c in swaps.cells(record)), end_section=last)
    return table


def categorical_table(records: list[dict[str, Any]]) -> Table:
    """The census of a language model: a line a layer."""
    from polyray.report import categorical

    heads = (Column(head, justify="right", overflow="fold") for head in categorical.COLUMNS)
    table = Table(
        *heads,
        title="categorical",
        caption=categorical.CAPTION,
        caption_justify="left",
        title_justify="left",
        padding=0,
    )
    table.columns[0].justify = table.columns[-1].justify = "left"
    for record, following in zip(records, [*records[1:], None], strict=True):
        last = following is not None and following["layer"] is None
        table.add_row(*(escape(c) for c in categorical.cells(record)), end_section=last)
    return table


def print_text_plan(console: Console, e: Any) -> None:
    """What the census of a language model would be and need."""
    table = Table("what", "how much", title="plan", title_justify="left")
    table.add_row("layers swept", f"{e.n_layers}, of {e.n_neurons_a_layer:,} neurons each")
    table.add_row("neurons swept", f"{e.n_neurons:,}")
    table.add_row("layers mined", f"{e.n_mined}")
    table.add_row("documents", f"{e.n_documents:,}")
    table.add_row("tokens with statistics", f"at most {e.n_tokens:,}")
    table.add_row("shards", f"{e.n_shards}")
    table.add_row("passes over the corpus", f"at most {e.n_passes}")
    for name, size in (e.memory_gb | {f"disk: {k}": v for k, v in e.disk_gb.items()}).items():
        table.add_row(escape(name), f"at most {size:.2f} GiB")
    for stage, n in e.units.items():
        table.add_row(f"units of {stage}", f"{n:,}")
    console.print(table)
    _print_problems(console, e.problems)


def print_plan(console: Console, e: Any) -> None:
    """What a sweep would be and cost."""
    heads = ("layer", "neurons", "grid", "layout", "ends in", "ranked by", "receptive field")
    table = Table(*heads, title=f"{e.n_neurons:,} neurons, {e.n_images:,} {e.items}", title_justify="left")
    for x in e.layers:
        whole = "a window" if e.items == "documents" else "whole image"
        receptive = whole if x["receptive_px"] is None else f"{x['receptive_px']} px"
        neurons = f"{x['neurons']}" if x["neurons"] == x["width"] else f"{x['neurons']} of {x['width']}"
        table.add_row(
            escape(x["layer"]), neurons, x["grid"], x["layout"], x["activation"] or "–", x["ranked_by"], receptive
        )
    console.print(table)
    table = Table(
        "stage", "units", "device-hours", title="work, where every neuron has K examples", title_justify="left"
    )
    for stage, n in e.units.items():
        hours = e.device_hours.get(stage)
        table.add_row(stage, f"{n:,}", "–" if hours is None else f"{hours:.2f}")
    table.add_section()
    table.add_row("all", f"{sum(e.units.values()):,}", f"{sum(e.device_hours.values()):.2f}")
    console.print(table)
    console.print("device-hours: measured on this machine's device with one micro-batch of each model, one actor")
    for title, sizes in (("memory of an actor", e.memory_gb), ("disk before compression, at most", e.disk_gb)):
        console.print(title + ": " + ", ".join(f"{name} {size:.2f} GiB" for name, size in sizes.items()))
    for note in e.notes:
        console.print(f"[bold yellow]note[/] {escape(note)}")
    _print_problems(console, e.problems)


def print_export(console: Console, summary: dict[str, Any]) -> None:
    """What an export wrote, what it could not, and what its form leaves out."""
    counted = ("n_records", "n_activation_records", "n_token_tables", "n_without_text")
    heads = (Column(head, justify="right") for head in ("records", "activations", "token tables", "without text"))
    table = Table("layer", *heads, "neurons without a record", title="export", title_justify="left")
    for layer in summary["layers"]:
        without = "; ".join(f"{n:,}: {reason}" for reason, n in layer["not_exported"].items())
        table.add_row(escape(layer["layer"]), *(f"{layer[c]:,}" for c in counted), escape(without) or "–")
    console.print(table)
    for line in summary["left_out"]:
        console.print(f"[bold yellow]note[/] {escape(line)}")
    if not summary["finished"]:
        console.print("[bold yellow]note[/] the run is not finished: repeat the command when it is")
    console.print(f"{summary['n_records']:,} neurons of run {summary['run_id']} in {escape(summary['folder'])}")


def _print_problems(console: Console, problems: list[str]) -> None:
    for problem in problems:
        console.print(f"[bold red]in the way[/] {escape(problem)}")
