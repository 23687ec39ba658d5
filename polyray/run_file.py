"""run.json: which run OUT holds, and why another one is refused.

Which question it answers: *is this the dataset of this run?* Place in the flow: `store.py` writes it before anything
else, and never again; every reader begins with it.
"""

import json
from typing import Any

from polyray import config as settings
from polyray import files
from polyray.errors import StoreError
from polyray.schema import VERSION

RUN = "run.json"
GPU = "gpu.json"
"""Model of the GPU that a run was begun on; there is none of a run on CPUs."""


def described(identity: dict[str, Any], provenance: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of a run; see `Store.create_or_resume`."""
    return {
        "run_id": settings.run_id(identity),
        "identity": identity,
        "config": config,
        "provenance": provenance,
        "schema_version": VERSION,
    }


def put(place: files.Place, run: dict[str, Any]) -> None:
    """Writes run.json unless it is there; refuses a folder of other files, and makes whole what a crash cut short."""
    data = json.dumps(run, indent=1).encode()
    with files.explained("create", place.at("")):
        place.make_folder()
        held = place.names()
        if RUN not in held:
            strangers = [name for name in held if not files.is_temporary(name)]
            if strangers:
                raise StoreError(
                    f"{place.at('')!r} holds files but no {RUN}, for instance {strangers[0]!r}: it is no dataset "
                    "of polyray. Choose an empty or a new folder."
                )
            place.put_if_absent(RUN, data)
        elif _is_cut_short(place.read(RUN), data):
            # A crash did it, on a file system where the file could not be linked into place as a whole.
            place.replace(RUN, data)


def load(place: files.Place) -> dict[str, Any]:
    """What run.json holds; `StoreError` where there is none, it is damaged, or its tables are newer than `VERSION`."""
    run = _read(place)
    made_with = run.get("schema_version")
    if not isinstance(made_with, int) or made_with > VERSION:
        raise StoreError(
            f"{place.at('')!r} was made with version {made_with} of the tables, and this polyray knows none after "
            f"{VERSION}. Use the polyray that made it, or a later one."
        )
    return run


def require_this_version(out: object, run: dict[str, Any]) -> None:
    """Refuses a run with older tables, where it is not enough to show what they hold."""
    if (made_with := run["schema_version"]) != VERSION:
        raise StoreError(
            f"{str(out)!r} was made with version {made_with} of the tables, this polyray works with version {VERSION}: "
            "use the polyray that made it, or run the sweep again, into another OUT."
        )


def _read(place: files.Place) -> dict[str, Any]:
    at = place.at(RUN)
    try:
        run = json.loads(place.read(RUN))
        whole = settings.run_id(run["identity"]) == run["run_id"] and isinstance(run["provenance"], dict)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise StoreError(f"{place.at('')!r} holds no run: it has no {RUN}. Give the OUT of a run.") from e
    except OSError as e:
        raise StoreError(f"cannot read {at!r}: {e.strerror}. Check OUT's permissions and disk.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise StoreError(f"{at!r} is damaged ({e}). Restore it, or choose a new OUT.") from e
    if not whole:
        raise StoreError(f"{at!r} was edited: its run_id is not that of its identity. Restore it.")
    return dict(run)


def settle_gpu(place: files.Place, model: str) -> str:
    """Makes this model of GPU the run's unless it has one; returns the run's."""
    with files.explained("write", place.at(GPU)):
        place.put_if_absent(GPU, json.dumps({"gpu": model}).encode())
        return str(json.loads(place.read(GPU))["gpu"])


def refuse_another(place: files.Place, wanted: dict[str, Any]) -> None:
    """Refuses to go on with another run than the one that OUT holds, naming every difference."""
    out, held, wanted = place.at(""), _read(place), json.loads(json.dumps(wanted))
    if held["run_id"] != wanted["run_id"]:
        raise StoreError(
            f"{out!r} holds another run; choose another OUT, or the config it was made with:\n"
            + _differences(held["identity"], wanted["identity"])
        )
    begun, now = ({k: run["provenance"].get(k) for k in ("torch", "device_class")} for run in (held, wanted))
    if begun != now:
        raise StoreError(
            "Mixed device classes or torch versions in one OUT are refused, since their results differ in the last "
            f"bits; choose another OUT than {out!r}, or go on as it was begun:\n" + _differences(begun, now)
        )


def _is_cut_short(found: bytes, whole: bytes) -> bool:
    return found != whole and whole.startswith(found)


def _differences(held: dict[str, Any], wanted: dict[str, Any]) -> str:
    """One line for every field that differs."""
    return "\n".join(
        f"  {key}: OUT has {_shown(held, key)}, this run has {_shown(wanted, key)}"
        for key in sorted(held.keys() | wanted.keys())
        if _shown(held, key) != _shown(wanted, key)
    )


def _shown(fields: dict[str, Any], key: str) -> str:
    return json.dumps(fields[key]) if key in fields else "nothing"
