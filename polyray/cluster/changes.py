"""Changes: what can be varied in a finished sweep, and how it is written.

Which question it answers: *which science half does `--vary K=50` ask for?* Place in the flow: first step of
`polyray sensitivity`; knows configs alone, no dataset and no model.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from polyray.config import CalibrateConfig, ClusterConfig, Config, OpenClip, Science, StandIn, parse_config
from polyray.errors import ConfigError, nearest

_ALIASES = {"mine.K": "K", "cluster.k_range": "k_range", "vocabulary": "prompts"}
_SECTIONS: dict[str, type[ClusterConfig | CalibrateConfig]] = {"cluster": ClusterConfig, "calibrate": CalibrateConfig}
KEYS = (
    "K", "seed", "k_range", "prompts", "encoder",
    *(f"{name}.{key}" for name, section in _SECTIONS.items() for key in section.model_fields if key != "k_range"),
)  # fmt: skip
"""What can be varied."""


def parsed(vary: Sequence[str]) -> list[tuple[str, Any]]:
    """Key and one value each; every scalar is still text."""
    found = []
    for item in vary:
        key, eq, text = item.partition("=")
        key = key.strip().removeprefix("science.")
        key = _ALIASES.get(key, key)
        if not eq or not key:
            raise ConfigError(f"--vary takes key=value,value, for instance K=50,100, got {item!r}.")
        _known(key)
        try:
            values = yaml.load(f"[{text}]", Loader=yaml.BaseLoader)
        except yaml.YAMLError as e:
            raise ConfigError(f"--vary {item!r}: the values are no list: {e}") from e
        # `k_range=[2, 4]` is one value, `k_range=2-4,2-6` are two.
        if not values or any(v in ("", None) for v in values):
            raise ConfigError(f"--vary {item!r}: a value is missing.")
        found += [(key, value) for value in values]
    return found


def _known(key: str) -> None:
    section = key.split(".")[0]
    if key in KEYS:
        return
    if section == "execution":
        raise ConfigError(f"--vary {key}: execution never changes a result, so there is nothing to vary.")
    if section in Science.model_fields and section not in ("seed", "encoder", *_SECTIONS):
        raise ConfigError(
            f"--vary {key}: this would need mining and embedding again. Run a sweep of its own with `--set "
            f"science.{key}=…` into another OUT. From what is mined and embedded can be varied: {', '.join(KEYS)}."
        )
    raise ConfigError(f"--vary: there is no {key!r}.{nearest(key, KEYS)}")


def changed(key: str, given: Any, config: Config) -> tuple[Science, str]:
    """The science half with one thing changed, and the value as it is shown."""
    science = config.science
    change: dict[str, Any]
    if key == "K":
        change, shown = _K(given, science)
    elif key == "k_range":
        change, shown = _k_range(given, science)
    elif key == "encoder":
        change, shown = {"encoder": _encoder(given)}, ""
    elif not isinstance(given, str):
        raise ConfigError(f"--vary {key}: a plain value is expected, got {given!r}.")
    elif key in ("seed", "prompts"):
        change, shown = {"vocabulary" if key == "prompts" else key: given}, given
    else:
        section, name = key.split(".")
        change, shown = {section: {name: given}}, given
    raw = config.model_dump(mode="json")
    for name, value in change.items():
        replaced = isinstance(value, dict) and name != "encoder"
        raw["science"][name] = {**raw["science"][name], **value} if replaced else value
    # Pictures of clusters are the sweep's business.
    raw["science"]["extract"]["thumbnails"] = False
    try:
        found = parse_config(raw).science
    except ConfigError as e:
        raise ConfigError(f"--vary {key}={given}: {e}") from e
    if key == "encoder":
        rest = found.encoder.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
        inside = ", ".join(f"{k}={v}" for k, v in sorted(rest.items()))
        shown = f"{found.encoder.kind}({inside})" if rest else found.encoder.kind
    elif "." in key:
        section, name = key.split(".")
        shown = str(getattr(getattr(found, section), name))
    return found, shown


def _K(given: Any, science: Science) -> tuple[dict[str, Any], str]:  # noqa: N802
    floor, most = max(4, science.cluster.k_range[1] + 1), science.mine.K_keep
    K = _whole(given)
    if K is None or not floor <= K <= most:
        raise ConfigError(
            f"--vary K={given}: from {floor} (above k_range) to {most} (mine.K_keep: only so many examples were kept "
            "and embedded) are allowed."
        )
    return {"mine": {"K": K, "k_min": min(science.mine.k_min, K)}}, str(K)


def _k_range(given: Any, science: Science) -> tuple[dict[str, Any], str]:
    ends = given.split("-") if isinstance(given, str) else given
    low, high = [_whole(e) for e in ends] if isinstance(ends, list) and len(ends) == 2 else (None, None)
    if low is None or high is None or not 2 <= low <= high < science.mine.k_min:
        raise ConfigError(
            f"--vary k_range={given}: write it LOW-HIGH, for instance 2-4, with 2 <= LOW <= HIGH < mine.k_min = "
            f"{science.mine.k_min}."
        )
    return {"cluster": {"k_range": [low, high]}}, f"{low}-{high}"


def _whole(given: Any) -> int | None:
    return int(given) if isinstance(given, str) and re.fullmatch(r"\s*\d{1,9}\s*", given) else None


def _encoder(given: Any) -> Mapping[str, Any]:
    """An encoder section: a kind with its defaults, a mapping, or a YAML file that holds one."""
    kinds = {"standin": StandIn, "open_clip": OpenClip}
    if isinstance(given, str) and given in kinds:
        return {"kind": given}
    found = given
    if isinstance(given, str):
        path = Path(given).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"--vary encoder={given}: it is neither an encoder nor a file. Give standin, open_clip, a YAML file "
                f"with an encoder section, or {{kind: …, …}}.{nearest(given, kinds)}"
            )
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise ConfigError(f"--vary encoder={given}: the file cannot be read as YAML: {e}") from e
        for section in ("science", "encoder"):
            found = found.get(section, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or "kind" not in found:
        raise ConfigError(f"--vary encoder={given}: an encoder section with its kind is expected, got {found!r}.")
    return found
