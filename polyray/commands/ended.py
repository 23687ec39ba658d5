"""Ended: what a finished sweep has to say, for people and for machines, with its pictures drawn.

Place in the flow: `run` calls it last. The reports are imported when they are needed: matplotlib takes a second.
"""

from pathlib import Path
from typing import Any, NamedTuple

from polyray import files
from polyray.commands import printed
from polyray.config import Config


class Told(NamedTuple):
    """What is said of a finished sweep."""

    figures: dict[str, Any]
    """For machines."""
    tables: list[Any]
    """For people."""
    pictures: list[Path]


def of_psi(dataset: Any, config: Config) -> Told:
    """Of a census, and what its config asked for besides."""
    from polyray.report import figure, planted, summary, swaps

    records = summary.layer_table(dataset)
    tables = printed.summary_tables(records, config)
    folder = files.folder_for_people(dataset.path)
    pictures = [figure.draw(dataset, folder / "summary.png")]
    truth = planted.records(dataset) if config.science.plant else []
    if truth:
        pictures.append(planted.draw(dataset, folder / "planted.png"))
        tables.append(printed.planted_table(truth))
    swapped = swaps.records(dataset) if config.science.swap else []
    if swapped:
        pictures.append(swaps.draw(dataset, folder / "swaps.png"))
        tables.append(printed.swaps_table(swapped))
    return Told({"layers": records, "planted": truth, "swaps": swapped}, tables, pictures)


def of_text(dataset: Any) -> Told:
    """Of a categorical sweep."""
    from polyray.report import categorical

    records = categorical.records(dataset)
    pictures = [categorical.draw(dataset, files.folder_for_people(dataset.path) / "categorical.png")]
    return Told({"layers": records}, [printed.categorical_table(records)], pictures)
