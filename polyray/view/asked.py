"""Asked: what an address asks for, checked against what there is.

Which question it answers: *which rows, in which order, are meant by `?layer=…&min_S=0.2&sort=-log_psi`?* Place in the
flow: between an address and a query of `index.py`. Names come from `columns.py` and values are bound, so that nothing
of an address is ever part of a query's text. What cannot be meant is refused, with what can.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from polyray.errors import PolyrayError, nearest
from polyray.view.columns import STATUSES, Kind
from polyray.view.index import Index

PAGE_SIZES = (25, 50, 100, 200)
LONGEST = 200
"""Letters of a text that is searched for."""
_FLAGS = {"yes": True, "no": False}
_LAST_PAGE = 10**9


class RefusedError(PolyrayError):
    """An address asks for what there cannot be; every problem is named with what is allowed."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(" ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Asked:
    """Which neurons are looked at, and how."""

    layers: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    diagnoses: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    """`yes` or `no` by column."""
    bounds: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Smallest and largest value by column, both included."""
    name: str = ""
    preset: str = ""
    sort: str = ""
    """A column, or `neuron`; with a `-` in front the largest first."""
    page: int = 1
    per: int = 50

    @property
    def is_filtered(self) -> bool:
        """Whether some neurons may be left out."""
        return bool(self.layers or self.statuses or self.diagnoses or self.flags or self.bounds or self.name)

    def pairs(self) -> list[tuple[str, str]]:
        """The same as an address has it; what is as usual is left out."""
        found = [("layer", x) for x in self.layers] + [("status", x) for x in self.statuses]
        found += [("diagnosis", x) for x in self.diagnoses] + list(self.flags.items())
        for key, (low, high) in self.bounds.items():
            found += [(f"{end}_{key}", _plain(x)) for end, x in (("min", low), ("max", high)) if x is not None]
        usual = Asked()
        for key in ("name", "preset", "sort", "page", "per"):
            if (value := getattr(self, key)) != getattr(usual, key):
                found.append((key, str(value)))
        return found

    def address(self, path: str, **changes: Any) -> str:
        """The address of a page of this, with some things changed. A change but of the page leads to the first one."""
        new = replace(self, **({"page": 1} | changes))
        return path + "".join(["?" + urlencode(pairs)] if (pairs := new.pairs()) else [])

    def condition(self, index: Index) -> tuple[str, dict[str, object]]:
        """What a row of the index has to fulfil, and the values that are bound."""
        preset = preset_of(self, index.kind)
        parts, values = ["true"], dict[str, object]()

        def bind(value: object) -> str:
            values[f"v{len(values)}"] = value
            return f"$v{len(values) - 1}"

        def one_of(column: str, numbers: Iterable[int]) -> None:
            parts.append(f"list_contains({bind(list(numbers))}::INTEGER[], {column}::INTEGER)")

        if self.layers:
            one_of("layer_id", (index.layers.index(x) for x in self.layers))
        if self.statuses:
            one_of("status", (STATUSES.index(x) for x in self.statuses))
        if self.diagnoses:
            one_of("diagnosis", (i for i, text in enumerate(index.diagnoses) if set(self.diagnoses) & patterns(text)))
        for key, word in self.flags.items():
            parts.append(f"{index.kind.column(key).of(preset)} = {bind(_FLAGS[word])}")
        for key, (low, high) in self.bounds.items():
            column = index.kind.column(key).of(preset)
            parts += [f"{column} {sign} {bind(x)}" for sign, x in ((">=", low), ("<=", high)) if x is not None]
        if self.name:
            parts.append(_named(index, bind(list(index.matching(self.name)))))
        return " AND ".join(parts), values

    def sorted_by(self, index: Index) -> str:
        """The column of the index that rows are sorted by."""
        by = (self.sort or index.kind.best).removeprefix("-")
        return "rowid" if by == "neuron" else index.kind.column(by).of(preset_of(self, index.kind))

    def is_descending(self, index: Index) -> bool:
        """Whether the largest comes first; rows that are equal always stand in order of depth and number."""
        return (self.sort or index.kind.best).startswith("-")

    def order(self, index: Index) -> str:
        """How rows of the index are sorted."""
        return f"{self.sorted_by(index)} {'DESC' if self.is_descending(index) else 'ASC'} NULLS LAST, rowid"


def _named(index: Index, numbers: str) -> str:
    if index.is_categorical:
        return f"list_has_any(tokens, {numbers}::INTEGER[])"
    chosen = f"SELECT unnest({numbers}::INTEGER[]) AS id"
    return f"rowid IN (SELECT row FROM {index.clusters} c SEMI JOIN ({chosen}) m ON c.name = m.id)"


def preset_of(asked: Asked, kind: Kind) -> str:
    """The preset that is looked at: `specific` unless asked otherwise; none where there are none."""
    return asked.preset or (kind.presets[-1] if kind.presets else "")


def patterns(diagnosis: str) -> set[str]:
    """The patterns in a diagnosis, which may name several."""
    return set(diagnosis.split("; "))


def parse(pairs: Iterable[tuple[str, str]], index: Index) -> Asked:
    """What the query of an address asks for.

    Args:
        pairs: its keys and values; empty values count as not given, as a form sends them.
        index: what there is.

    Raises:
        RefusedError: a key is unknown, or a value cannot be; all problems are told.
    """
    return _Parser(index).parse(pairs)


class _Parser:
    def __init__(self, index: Index) -> None:
        self._index, self._kind = index, index.kind
        self._problems: list[str] = []
        ranged = [c.key for c in self._kind.columns if c.shown != "flag"]
        self._flags = [c.key for c in self._kind.columns if c.shown == "flag"]
        self._ranged = {f"{end}_{key}": (end, key) for key in ranged for end in ("min", "max")}
        self._sorts = [s + key for key in ("neuron", *(c.key for c in self._kind.columns)) for s in ("", "-")]
        self.known = ["layer", "status", "diagnosis", "name", "sort", "page", "per", *self._flags, *self._ranged]
        self.known += ["preset"] if self._kind.presets else []

    def parse(self, pairs: Iterable[tuple[str, str]]) -> Asked:
        several: dict[str, list[str]] = {"layer": [], "status": [], "diagnosis": []}
        bounds: dict[str, tuple[float | None, float | None]] = {}
        flags: dict[str, str] = {}
        found: dict[str, Any] = {}
        known_patterns = sorted(set().union(*(patterns(d) for d in self._index.diagnoses)))
        choices = {"layer": self._index.layers, "status": list(STATUSES), "diagnosis": known_patterns}
        for key, value in pairs:
            value = value.strip()
            if key not in self.known:
                self._problems.append(f"{key!r} is no filter of this table.{nearest(key, self.known)}")
            elif not value:
                continue
            elif key in several:
                if self._is_among(key, value, choices[key]) and value not in several[key]:
                    several[key].append(value)
            elif key in self._flags:
                if self._is_among(key, value, list(_FLAGS)):
                    flags[key] = value
            elif key in self._ranged:
                end, column = self._ranged[key]
                low, high = bounds.get(column, (None, None))
                x = self._number(key, value)
                bounds[column] = (x, high) if end == "min" else (low, x)
            else:
                found[key] = self._single(key, value)
        for key, (low, high) in bounds.items():
            if low is not None and high is not None and low > high:
                self._problems.append(f"min_{key} must be at most max_{key}, got {_plain(low)} and {_plain(high)}.")
        if self._problems:
            raise RefusedError(self._problems)
        layers, statuses, diagnoses = (tuple(several[key]) for key in ("layer", "status", "diagnosis"))
        return Asked(layers, statuses, diagnoses, flags, bounds, **found)

    def _single(self, key: str, value: str) -> Any:
        if key == "preset":
            return value if self._is_among(key, value, list(self._kind.presets)) else ""
        if key == "sort":
            return value if self._is_among(key, value, self._sorts) else ""
        if key == "name":
            return self._text(key, value)
        return self._whole(key, value)

    def _text(self, key: str, value: str) -> str:
        if len(value) > LONGEST:
            self._problems.append(f"{key} may have {LONGEST} letters, got {len(value)}.")
        return value

    def _whole(self, key: str, value: str) -> int:
        usual: int = getattr(Asked(), key)
        if not (value.isascii() and value.isdigit() and 1 <= int(value[:12]) <= _LAST_PAGE):
            self._problems.append(f"{key} must be a whole number from 1, got {value[:40]!r}.")
            return usual
        if key == "per" and int(value) not in PAGE_SIZES:
            self._problems.append(f"per must be one of {', '.join(map(str, PAGE_SIZES))}, got {value}.")
            return usual
        return int(value)

    def _number(self, key: str, value: str) -> float | None:
        try:
            x = float(value.replace("−", "-"))
        except ValueError:
            x = math.nan
        if not math.isfinite(x):
            self._problems.append(f"{key} must be a number such as 0.05, got {value[:40]!r}.")
            return None
        return x

    def _is_among(self, key: str, value: str, allowed: list[str]) -> bool:
        if value in allowed:
            return True
        self._problems.append(f"{key} cannot be {value[:80]!r}.{nearest(value[:80], allowed) or ' There is none yet.'}")
        return False


def _plain(x: float) -> str:
    return f"{x:.10g}"
