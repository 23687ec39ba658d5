"""Overview: what was swept and how, what was left out and why, and how to do it again.

Place in the flow: the first and the last sections of every report, whatever the method.
"""

import json
import shlex
from typing import Any

import yaml

from polyray.cluster.progress import progress
from polyray.errors import StoreError
from polyray.report.content import Block, Code, Facts, Missing, Points, Prose, Section, Table
from polyray.report.plain import NOTHING, count, number, visible
from polyray.report.source import SWEEP, Source, layer_name
from polyray.schema import VERSION
from polyray.store import SUCCESS, Store

N_REASONS = 60
"""Most reasons of one table; the rest is counted."""
LONGEST_SETTINGS = 200_000
"""Letters of the settings that are shown; a choice of single neurons may be longer."""
_COUNTED = {"psi": "neurons", "categorical": "proximity"}
"""Table with one row for each neuron swept."""


def state(source: Source) -> str:
    """How far a sweep is; empty where it is finished."""
    if source.dataset.is_finished:
        return ""
    if not source.dataset.tables:
        return "Nothing is committed yet: this page has the run's settings alone."
    return "The sweep is not finished: what follows is of the rows committed so far, and will change."


def swept(source: Source) -> Section:
    """What was swept and how."""
    blocks: list[Block] = [Facts(_subject(source)), _layers(source)]
    notes = [visible(n, 600) for n in _notes(source)]
    if notes:
        blocks.append(Points("What the run itself says about its setting", notes))
    if not source.dataset.is_finished:
        blocks.append(_progress(source))
    return Section("swept", "What was swept, and how", blocks)


def _notes(source: Source) -> list[str]:
    found = list(source.provenance.get("notes") or [])
    probe = source.provenance.get("probe")
    found += list(probe.get("notes") or []) if isinstance(probe, dict) else []
    if (made_with := source.run.get("schema_version")) != VERSION:
        found.append(f"The dataset has version {made_with} of the tables, this report is written for {VERSION}.")
    return [str(n) for n in found]


def _subject(source: Source) -> list[tuple[str, str]]:
    of = source.provenance
    rows: list[tuple[str, str]] = []
    for term, key in (("Network", "subject"), ("Language model", "model"), ("Probe set", "probe"),
                      ("Corpus", "corpus"), ("Encoder", "encoder")):  # fmt: skip
        if isinstance(of.get(key), dict):
            rows.append((term, _described(of[key])))
    asked = source.setting
    items = {"n_images": source.items, "n_documents": "documents", "n_prompts": "prompts to name clusters by"}
    sizes = [f"{count(of[key])} {what}" for key, what in items.items() if isinstance(of.get(key), int)]
    if sizes:
        rows.append(("Shown", ", ".join(sizes)))
    if source.setting("plant") is not None:
        said = "known truth, in place of the network's own: fitted on one half of every class, mined on the other"
        rows.append(("Neurons", said))
    if source.is_categorical:
        core = {"core-tokens": asked("core", "n_core"), "a token's least count": asked("core", "min_count")}
        core |= {"precursors": asked("connect", "n_precursors"), "taken-clusters": asked("overlap", "min_clusters")}
        core |= {"tokens in each": asked("overlap", "min_tokens")}
        rows.append(("Settings", _listed(core)))
    else:
        ways = {
            "K": asked("mine", "K"),
            "clusters": asked("cluster", "k_range"),
            "null draws B": asked("calibrate", "B"),
        }
        ways |= {"α": asked("calibrate", "alpha"), "q by": asked("calibrate", "fdr"), "pool": asked("embed", "n_pool")}
        rows.append(("Settings", _listed(ways)))
    seed = asked("seed")
    rows.append(("Seed", NOTHING if seed is None else visible(seed)))
    return [r for r in rows if r[1]]


def _listed(named: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in named.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(visible(v) for v in value)
    return visible(value)


def _described(of: dict[str, Any]) -> str:
    name = of.get("name") or of.get("kind") or ""
    said = [visible(name)]
    if of.get("family"):
        said.append(visible(of["family"]))
    if of.get("kind") and of["kind"] != name:
        said.append(f"kind {visible(of['kind'])}")
    said += [f"{count(of['n_classes'])} classes"] if isinstance(of.get("n_classes"), int) else []
    if of.get("trained") is False:
        said.append("untrained: its weights are random")
    return ", ".join(said)


def statuses(source: Source) -> dict[str | None, dict[str, int]]:
    """Neurons of each layer (None: all) by status, as the rows say."""
    table = _COUNTED["categorical" if source.is_categorical else "psi"]
    found: dict[str | None, dict[str, int]] = {}
    for row in source.rows(f"SELECT layer, status, count(*) AS n FROM {table} GROUP BY layer, status"):
        for layer in (row["layer"], None):
            of = found.setdefault(layer, {})
            of[str(row["status"])] = of.get(str(row["status"]), 0) + row["n"]
    return found


def _layers(source: Source) -> Table | Missing:
    found = statuses(source)
    known = {r["layer"]: r for r in source.rows("SELECT * FROM layers")}
    planned = source.provenance.get("n_swept") or source.provenance.get("layers")
    planned = planned if isinstance(planned, dict) else {}
    names = [*source.layers, *(x for x in found if x is not None and x not in source.layers)]
    if not names:
        return Missing("No layer is known yet: the sweep has not come to the stage that reads them.")
    rows = []
    for name in names:
        of, at = found.get(name, {}), known.get(name, {})
        n = at.get("n_neurons", planned.get(name, sum(of.values()) or None))
        cells = [layer_name(name), count(n), *(_status(of, s) for s in ("ok", "excluded", "failed"))]
        if known:
            grid = f"{at['grid_h']} × {at['grid_w']}" if at.get("grid_w") else NOTHING
            cells += [grid, count(at.get("side_px")), visible(at.get("ranked_by")), visible(at.get("activation"))]
        rows.append(cells)
    total = sum(n for n in (known.get(x, {}).get("n_neurons", planned.get(x)) for x in names) if isinstance(n, int))
    rows.append([SWEEP, count(total) if total else NOTHING, *(_status(found.get(None, {}), s) for s in
                 ("ok", "excluded", "failed")), *([""] * 4 if known else [])])  # fmt: skip
    heads = ["layer", "neurons", "scored", "excluded", "failed"]
    heads += ["grid", "window", "ranked by", "ends in"] if known else []
    note = "A dash under scored, excluded and failed: no neuron of the layer has come to its last stage yet."
    if known:
        note += " window: side of the box that is embedded, in pixels of the input or tokens of the document."
    return Table("Layers, in order of depth", heads, rows, note)


def _status(of: dict[str, int], name: str) -> str:
    return count(of.get(name, 0)) if of else NOTHING


def _progress(source: Source) -> Block:
    try:
        report = progress(source.out)
    except StoreError as e:
        return Missing(f"How far it is cannot be said: {visible(e, 400)}")
    rows = [[visible(s["stage"]), count(s["n_done"]), "?" if s["n_units"] is None else count(s["n_units"]),
             number(s["seconds"] / 3600)] for s in report["stages"]]  # fmt: skip
    note = "?: an earlier stage decides how many there are."
    return Table("How far the sweep is", ("stage", "units done", "of", "actor-hours"), rows, note)


# What was left out


def left_out(source: Source) -> Section:
    """Excluded and failed neurons with reasons, and whatever else cost itself a row."""
    blocks: list[Block] = [_neurons_left_out(source)]
    if not source.is_categorical and source.has("neurons"):
        blocks += _uncalibrated(source)
    for table, what in (("images", source.items), ("documents", "documents"), ("core_tokens", "core-token lists")):
        if source.has(table):
            blocks += _others(source, table, what)
    if source.has("swaps"):
        blocks += _unswapped(source)
    blocks.append(_failures(source))
    return Section("left-out", "What was left out, and why", blocks)


def _neurons_left_out(source: Source) -> Block:
    table = _COUNTED["categorical" if source.is_categorical else "psi"]
    if not source.has(table):
        return Missing("No neuron has come to its last stage yet, so that none was left out so far.")
    of = statuses(source).get(None, {})
    # Counts in a reason ("dead: 12 of at least 20") differ between neurons; what stands before them does not.
    rows = source.rows(
        "SELECT status, split_part(coalesce(reason, 'no reason given'), ':', 1) AS reason, count(*) AS n, "
        f"count(DISTINCT layer) AS n_layers FROM {table} WHERE status <> 'ok' GROUP BY ALL ORDER BY n DESC, 1, 2"
    )
    said = ", ".join(f"{count(of.get(s, 0))} {s}" for s in ("ok", "excluded", "failed"))
    if not rows:
        return Prose(f"Of {count(sum(of.values()))} neurons with a result none was excluded and none failed.")
    cells = [[visible(r["reason"]), visible(r["status"]), count(r["n"]), count(r["n_layers"])] for r in rows]
    return Table(
        f"Neurons by reason: {said}", ("reason", "status", "neurons", "layers"), _capped(cells, 4), n_text=2,
        note="Numbers in a reason, which differ from neuron to neuron, are left out; each row has its own.",
    )  # fmt: skip


def _uncalibrated(source: Source) -> list[Block]:
    rows = source.rows(
        "SELECT split_part(coalesce(reason, 'no reason given'), ':', 1) AS reason, count(*) AS n FROM neurons "
        "WHERE status = 'ok' AND specific_p IS NULL GROUP BY 1 ORDER BY n DESC, 1"
    )
    cells = [[visible(r["reason"]), count(r["n"])] for r in rows]
    return [Table("Scored, but without a p", ("reason", "neurons"), _capped(cells, 2))] if cells else []


def _others(source: Source, table: str, what: str) -> list[Block]:
    rows = source.rows(
        f"SELECT status, split_part(coalesce(reason, 'no reason given'), ':', 1) AS reason, count(*) AS n FROM {table} "
        "WHERE status <> 'ok' GROUP BY ALL ORDER BY n DESC, 1, 2"
    )
    cells = [[visible(r["reason"]), visible(r["status"]), count(r["n"])] for r in rows]
    heads = ("reason", "status", what)
    return [Table(f"{what.capitalize()} left out", heads, _capped(cells, 3), n_text=2)] if cells else []


def _unswapped(source: Source) -> list[Block]:
    rows = source.rows(
        "SELECT condition, split_part(coalesce(reason, 'no reason given'), ':', 1) AS reason, count(*) AS n FROM swaps "
        "WHERE status <> 'ok' GROUP BY ALL ORDER BY n DESC, 1, 2"
    )
    cells = [[visible(r["reason"]), visible(r["condition"]).replace("_", " "), count(r["n"])] for r in rows]
    heads = ("reason", "condition", "pictures")
    return [Table("Patch swaps that could not be done", heads, _capped(cells, 3), n_text=2)] if cells else []


def _failures(source: Source) -> Block:
    rows = source.rows(
        "SELECT stage, item, split_part(reason, ':', 1) AS what, min(reason) AS example, "
        "count(DISTINCT (CASE WHEN item = 'neuron' THEN layer END, item_id)) AS n FROM failures GROUP BY ALL "
        "ORDER BY n DESC, 1, 2, 3"
    )
    if not rows:
        return Prose("Nothing failed: the table of failures is empty.")
    cells = [[visible(r["stage"]), visible(r["item"]), visible(r["example"]), count(r["n"])] for r in rows]
    note = "A reason stands for all that begin alike: the first of them in alphabetical order is shown."
    return Table("Failures", ("stage", "item", "reason", "items"), _capped(cells, 4), note, n_text=3)


def _capped(cells: list[list[str]], width: int) -> list[list[str]]:
    if len(cells) <= N_REASONS:
        return cells
    return [*cells[:N_REASONS], [f"and {len(cells) - N_REASONS} further reasons", *[""] * (width - 1)]]


# How to do it again


def provenance(source: Source) -> Section:
    """Versions, digests, devices, and the command that makes the dataset again."""
    of = source.provenance
    rows = [("run_id", visible(source.run.get("run_id")))]
    rows += [("version of the tables", visible(source.run.get("schema_version")))]
    versions = {k: v for k, v in of.items() if isinstance(v, str) and k != "device_class"}
    rows.append(("device class", visible(of.get("device_class"))))
    rows.append(("versions", ", ".join(f"{visible(k)} {visible(v)}" for k, v in versions.items())))
    identity = source.run.get("identity")
    identity = identity if isinstance(identity, dict) else {}
    for name, value in identity.items():
        if name.startswith("contents."):
            rows.append((f"digest of {visible(name.removeprefix('contents.'))}", visible(value)))
    seeds = {k: v for k, v in identity.items() if k.rpartition(".")[2] == "seed"}
    rows.append(("seeds", ", ".join(f"{visible(k)} {visible(v)}" for k, v in seeds.items()) or NOTHING))
    blocks: list[Block] = [
        Prose(
            "The run_id is a hash of the settings, of the contents that the digests stand for, and of the version of "
            "the tables: two datasets with the same run_id are the same run."
        ),
        Facts(rows),
        *_digests(source),
    ]
    if source.science:
        command = "polyray run census.yaml --out OUT"
        blocks += [
            Prose(
                "To make the dataset again, save the settings below as census.yaml. Paths in them are those of the "
                "machine that ran it. Versions and device class decide the last bits."
            ),
            Code("Command", "\n".join([command, *_variants(source)])),
            Code("census.yaml", _settings(source), folded=True),
        ]
    else:
        blocks.append(Missing("run.json holds no settings, so that no command can be given."))
    return Section("provenance", "Provenance, and how to do it again", blocks)


def _settings(source: Source) -> str:
    """The resolved science half as YAML, in ASCII: what is not is escaped, so that nothing hides in it."""
    text: str = yaml.safe_dump({"science": source.science}, sort_keys=False, width=100)
    if len(text) <= LONGEST_SETTINGS:
        return text
    return text[:LONGEST_SETTINGS] + "\n# cut here: config.science of OUT/run.json holds it whole\n"


def _variants(source: Source) -> list[str]:
    rows = source.rows("SELECT DISTINCT vary, value FROM sensitivity ORDER BY vary, value")
    asked = [visible(f"{r['vary']}={r['value']}", 2000) for r in rows]
    return [f"polyray sensitivity OUT --vary {shlex.quote(x)}" for x in asked]


def _digests(source: Source) -> list[Block]:
    if not source.dataset.is_finished:
        return []
    try:
        written = json.loads(Store(source.out).place.read(SUCCESS))
        rows = [[visible(t), count(d["n_rows"]), visible(d["digest"])] for t, d in written["tables"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [Missing("The digests of the tables cannot be read: `polyray verify` says what is amiss.")]
    note = "Over the rows in canonical order, without timing and hosts: equal digests, equal results."
    heads = ("table", "rows", "digest")
    return [Table("Digest of every table", heads, rows, note, last_is_text=True, folded=True)]
