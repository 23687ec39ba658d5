"""A config is refused with the nearest valid choice, and every value of its science half is part of the run."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polyray.config import Config, Generated, identity, load_config, parse_config, run_id
from polyray.errors import ConfigError, nearest

SUBJECTS = {
    "named": {"name": "torchvision:resnet50", "neurons": {"layer4": [1, 2]}},
    "factory": {"factory": "networks:edge_net", "factory_args": {"width": 3}, "mean": [0.1, 0.2, 0.3]},
}
PROBES: dict[str, dict[str, Any]] = {
    "tiny_imagenet": {"kind": "tiny_imagenet"},
    "folder": {"kind": "folder", "path": "pictures"},
    "table": {"kind": "table", "path": "pictures.parquet"},
    "generated": {"kind": "generated", "n_classes": 10},
}
ENCODERS = {"open_clip": {"kind": "open_clip"}, "standin": {"kind": "standin"}}
LOCATORS = {
    "subject.weights",
    "subject.neurons",
    "probe.path",
    "probe.download",
    "encoder.pretrained",
    "vocabulary",
}
"""Where something lies; its contents are digested instead."""


def raw_config(subject: str = "named", probe: str = "generated", encoder: str = "standin") -> dict[str, Any]:
    return {"science": {"subject": SUBJECTS[subject], "probe": PROBES[probe], "encoder": ENCODERS[encoder]}}


COMBINATIONS = [("named", "tiny_imagenet", "open_clip"), ("factory", "folder", "standin"),
                ("named", "table", "open_clip"), ("factory", "generated", "standin")]  # fmt: skip


def refused(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return str(caught.value)


def with_value(raw: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """A copy with one dotted key set."""
    raw = copy.deepcopy(raw)
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return raw


BANDED = with_value(raw_config(), "science.mine.band", [0.4, 0.5])


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Dotted key, field and value of everything in a config that is not a section."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, value


# What is refused


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sciense", "science"),
        ("execution.adress", "address"),
        ("execution.subject.num_cpu", "num_cpus"),
        ("science.sed", "seed"),
        ("science.subject.input_pix", "input_px"),
        ("science.probe.n_clases", "n_classes"),
        ("science.encoder.topclasses", "top_classes"),
        ("science.mine.k_mim", "k_min"),
        ("science.extract.enrgy", "energy"),
        ("science.embed.npool", "n_pool"),
        ("science.cluster.n_inits", "n_init"),
        ("science.calibrate.alfa", "alpha"),
        ("science.numerics.thread", "threads"),
    ],
)
def test_unknown_key_names_itself_and_the_nearest(key: str, meant: str) -> None:
    message = refused(with_value(raw_config(), key, 1))
    assert "unknown key" in message
    assert key.rpartition(".")[2] in message
    assert f"Did you mean '{meant}'" in message


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_unknown_key_of_every_section_is_refused_with_a_known_one(combination: tuple[str, str, str]) -> None:
    """One letter too many at the end of every key that there is."""
    raw = raw_config(*combination)
    for half in ("science", "execution"):
        for key, _, _ in leaves(getattr(parse_config(raw), half)):
            message = refused(with_value(raw, f"{half}.{key}x", 1))
            assert f"'{key.rpartition('.')[2]}'" in message, message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("science.probe.kind", "genrated", "Did you mean 'generated'"),
        ("science.encoder.kind", "openclip", "Did you mean 'open_clip'"),
        ("science.subject.dtype", "float23", "'float32'"),
        ("science.subject.resize", "crp", "'crop'"),
        ("science.subject.layers", "censsus", "'census'"),
        ("science.extract.window", "efective", "'effective'"),
        ("science.numerics.device", "gpu", "'cuda'"),
        ("science.calibrate.fdr", "bonferroni", "'by'"),
    ],
)
def test_unknown_choice_names_the_valid_ones(key: str, value: str, said: str) -> None:
    message = refused(with_value(raw_config(), key, value))
    assert key in message
    assert value in message
    assert said in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("science.seed", -1),
        ("science.seed", 2**32),
        ("science.seed", 1.5),
        ("science.seed", None),
        ("science.subject.input_px", 7),
        ("science.subject.input_px", 2049),
        ("science.subject.micro_batch", 0),
        ("science.subject.mean", [0.5, 0.5]),
        ("science.subject.neurons", {"layer4": [-1]}),
        ("science.probe.n_classes", 1),
        ("science.probe.n_classes", 49),
        ("science.probe.image_px", 63),
        ("science.encoder.input_px", 31),
        ("science.mine.K", 3),
        ("science.mine.band", [-0.1, 0.5]),
        ("science.mine.band", [0.5, 1.1]),
        ("science.mine.band", [0.5, float("nan")]),
        ("science.mine.band", [0.5]),
        ("science.mine.band", 0.5),
        ("science.extract.energy", 0),
        ("science.extract.energy", 1),
        ("science.extract.energy", float("nan")),
        ("science.extract.thumbnails", "maybe"),
        ("science.embed.n_pool", 3),
        ("science.cluster.n_init", 0),
        ("science.calibrate.B", 0),
        ("science.calibrate.alpha", 1),
        ("science.numerics.threads", 0),
        ("execution.subject.num_cpus", 0),
        ("execution.subject.num_gpus", -1),
        ("execution.encoder.min", 0),
        ("execution.scoring.in_flight", 65),
        ("execution.bundle_s", 0),
        ("execution.scoring_vectors_gb", 0),
        ("execution.scoring_vectors_gb", float("inf")),
        ("execution.object_store_gb", float("nan")),
        ("execution.object_store_gb", float("inf")),
        ("execution.object_store_gb", 0.05),
        ("execution.subject.num_cpus", float("inf")),
        ("execution.encoder.num_gpus", float("inf")),
        ("execution.scoring.memory_gb", float("inf")),
        ("science.subject.std", [0.2, 0.2, 0]),
        ("science.subject.mean", [0.5, 0.5, float("nan")]),
    ],
)
def test_value_out_of_bounds_is_refused_with_key_and_value(key: str, value: object) -> None:
    message = refused(with_value(raw_config(), key, value))
    assert key.rpartition(".")[2] in message
    if not isinstance(value, (dict, list)):
        assert repr(value) in message


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (with_value(raw_config(), "science.mine", {"K": 10, "k_min": 20}), "k_min <= K <= K_keep"),
        (with_value(raw_config(), "science.mine", {"K": 100, "K_keep": 50}), "k_min <= K <= K_keep"),
        (with_value(raw_config(), "science.mine.band", [0.6, 0.5]), "band[0] < band[1]"),
        (with_value(raw_config(), "science.mine.band", [0.5, 0.5]), "band[0] < band[1]"),
        (
            with_value(with_value(raw_config(), "science.plant", {}), "science.mine.band", [0.4, 0.5]),
            "exclude each other",
        ),
        (with_value(raw_config(), "science.embed.n_pool", 99), "n_pool >= mine.K"),
        (with_value(raw_config(), "science.cluster.k_range", [4, 3]), "k_range[0] <= k_range[1]"),
        (with_value(raw_config(), "science.cluster.k_range", [1, 3]), "2 <= k_range[0]"),
        (with_value(raw_config(), "science.cluster.k_range", [2, 20]), "k_min must be above cluster.k_range[1]"),
        (with_value(raw_config(), "science.subject", {}), "either subject.name or subject.factory"),
        (with_value(raw_config(), "science.subject.factory", "a:b"), "either subject.name or subject.factory"),
        (with_value(raw_config(), "execution.subject", {"min": 3, "max": 2}), "min <= max"),
        (with_value(raw_config(), "execution.subject.num_gpus", 1.5), "num_gpus must be whole above 1"),
        (with_value(raw_config(), "execution.subject.num_cpus", 0.33333), "num_cpus may have at most 4 decimals"),
        (with_value(raw_config(), "science.numerics.device", "cuda"), "execution.subject.num_gpus is 0"),
        ({}, "science: Field required"),
        (with_value(raw_config(), "science.probe", {}), "kind"),
        (with_value(raw_config(), "science.probe", {"kind": "folder"}), "path: Field required"),
        (with_value(raw_config(), "science.mine", 3), "science.mine"),
        (with_value(raw_config(), "science.mine", None), "science.mine"),
    ],
)
def test_what_does_not_go_together_is_refused(raw: dict[str, Any], said: str) -> None:
    assert said in refused(raw)


def test_every_mistake_is_told_at_once() -> None:
    raw = with_value(with_value(raw_config(), "science.sed", 1), "execution.bundle_s", -1)
    message = refused(raw)
    assert "sed" in message
    assert "bundle_s" in message


# Files and overrides


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"science: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"", "must hold the sections 'science' and 'execution', got NoneType"),
        (b"- 1", "got list"),
        (b"just text", "got str"),
        (b"!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_file_that_is_no_config_says_so(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert said in str(caught.value)
    assert "c.yaml" in str(caught.value)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw_config()))
    return path


def test_overrides_set_values_of_every_kind(config_file: Path) -> None:
    config = load_config(
        config_file,
        [
            "science.seed=7",
            "science.subject.weights=none",
            "science.subject.layers=[a, b.*]",
            "science.subject.neurons=null",
            "science.extract.thumbnails=false",
            "science.probe={kind: generated, n_classes: 5}",
            "science.probe.n_per_class=3",
            "execution.encoder.memory_gb=1.5",
            "science.seed=8",
        ],
    )
    assert config.science.seed == 8
    assert config.science.subject.weights == "none"
    assert config.science.subject.layers == ["a", "b.*"]
    assert config.science.subject.neurons is None
    assert config.science.extract.thumbnails is False
    assert config.science.probe == Generated(kind="generated", n_classes=5, n_per_class=3)
    assert config.execution.encoder.memory_gb == 1.5


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("science.seed", "key=value"),
        ("=1", "key=value"),
        ("science.subject.name.x=1", "'name' is a value, not a section"),
        ("science.seed=[", "not YAML"),
        ("science.sed=1", "Did you mean 'seed'"),
        ("seed=1", "seed: unknown key"),
    ],
)
def test_override_that_does_not_fit_is_refused(config_file: Path, item: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, [item])
    assert said in str(caught.value)


# Which run it is

CONTENTS = {"subject": "11", "encoder": "22", "probe": "33", "vocabulary": "44", "neurons": "55"}


def id_of(config: Config, contents: dict[str, str] | None = None, schema_version: int = 1) -> str:
    return run_id(identity(config, contents or CONTENTS, schema_version))


UNSET: dict[str, Any] = {
    "neurons": {"layer4": [3]},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "limit": 5,
    "plant": {},
    "swap": {},
    "n_neurons": 5,
    "context": 64,
    "label_column": "genre",
    "clamp": {},
    "band": [0.5, 0.6],
    "address": "auto",
    "memory_gb": 2.5,
    "max": 3,
}
"""A value of each field that has none by default."""


def another(key: str, field: FieldInfo, value: Any) -> Any:
    """Another value of a field that is within its bounds."""
    if value is None:
        return UNSET[key.rpartition(".")[2]]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if isinstance(value, int) else value * 0.9
    if isinstance(value, (list, tuple)):
        return [*value[:-1], another(key, field, value[-1])]
    if isinstance(value, dict):
        return value | {"another": [1]}
    choices = [
        c for a in (field.annotation, *get_args(field.annotation)) if get_origin(a) is Literal for c in get_args(a)
    ]
    return next((c for c in choices if c != value), f"{value}-2")


SEALED = {"method", "probe.kind", "encoder.kind", "subject.name", "subject.factory"}
"""What cannot be changed alone: other keys go with it."""


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_science_value_changes_the_run_and_no_location_does(combination: tuple[str, str, str]) -> None:
    raw = raw_config(*combination)
    # The device may be changed alone where the actors have one already.
    raw["execution"] = {kind: {"num_gpus": 1} for kind in ("subject", "encoder", "scoring")}
    config = parse_config(raw)
    base = id_of(config)
    n_changed = 0
    for key, field, value in leaves(config.science):
        if key in SEALED:
            continue
        changed = parse_config(with_value(raw, f"science.{key}", another(key, field, value)))
        assert changed.science != config.science, key
        assert (id_of(changed) == base) == (key in LOCATORS), key
        n_changed += 1
    assert n_changed > 30


def test_kinds_and_sources_change_the_run() -> None:
    ids = [
        id_of(parse_config(raw_config(subject, probe, encoder)))
        for subject in SUBJECTS
        for probe in PROBES
        for encoder in ENCODERS
    ]
    assert len(set(ids)) == len(ids) == 16
    renamed = [
        id_of(parse_config(with_value(raw_config(), "science.subject.name", name))) for name in ("timm:a", "timm:b")
    ]
    assert len(set(renamed)) == 2


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_no_execution_value_changes_the_run(combination: tuple[str, str, str]) -> None:
    raw = raw_config(*combination)
    config = parse_config(raw)
    n_changed = 0
    for key, field, value in leaves(config.execution):
        changed = parse_config(with_value(raw, f"execution.{key}", another(key, field, value)))
        assert changed.execution != config.execution, key
        assert id_of(changed) == id_of(config), key
        n_changed += 1
    assert n_changed == 3 * 6 + 5


def test_contents_and_schema_version_change_the_run() -> None:
    config = parse_config(raw_config())
    ids = [id_of(config), id_of(config, schema_version=2)]
    ids += [id_of(config, CONTENTS | {name: "99"}) for name in CONTENTS]
    assert len(set(ids)) == len(ids)


def test_identity_is_flat_and_names_what_differs() -> None:
    one, two = (identity(parse_config(with_value(raw_config(), "science.mine.K", K)), CONTENTS, 1) for K in (50, 60))
    assert {key for key in one if one[key] != two[key]} == {"mine.K"}
    assert one["contents.probe"] == "33"
    assert one["schema_version"] == 1
    assert not any(key.startswith("execution") for key in one)
    assert not any(isinstance(value, dict) and value for value in one.values())


def test_run_id_is_16_hexadecimal_digits_whatever_the_order() -> None:
    fields = identity(parse_config(raw_config()), CONTENTS, 1)
    found = run_id(fields)
    assert len(found) == 16
    assert int(found, 16) >= 0
    assert run_id(dict(reversed(fields.items()))) == found


def test_a_written_config_is_the_same_run() -> None:
    """run.json holds the config as JSON: what is read from it must be the same run."""
    for combination in COMBINATIONS:
        config = parse_config(raw_config(*combination))
        again = Config.model_validate(config.model_dump(mode="json"))
        assert again == config
        assert id_of(again) == id_of(config)


def test_frozen() -> None:
    config = parse_config(raw_config())
    with pytest.raises(ValueError, match="frozen"):
        config.science.seed = 3


# The shipped ones

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_four_configs_are_shipped() -> None:
    assert {p.stem for p in SHIPPED} >= {
        "quickstart",
        "efficientnet-tiny-imagenet",
        "resnet50-tiny-imagenet",
        "resnet50-census",
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_config_is_valid_and_documents_every_key_in_place(path: Path) -> None:
    config = load_config(path)
    raw = yaml.safe_load(path.read_text())
    for half in ("science", "execution"):
        for key, field, _ in leaves(getattr(config, half)):
            if half == "science" and key in ("subject.factory", "subject.factory_args", "subject.mean", "subject.std"):
                continue  # stand for a network of one's own
            node: Any = raw[half]
            for part in key.split("."):
                assert part in node, f"{path.name} leaves out {half}.{key}"
                node = node[part]
            assert field.description or part == "kind", key


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=12), max_size=20))
def test_nearest_offers_only_what_is_valid(name: str, known: list[str]) -> None:
    clause = nearest(name, known)
    assert (clause == "") == (not known)
    if known:
        assert any(repr(k) in clause for k in known)
