"""Which neurons a config means, for every method."""

from pathlib import Path

import numpy as np
import pytest

from polyray.config import parse_config
from polyray.errors import ConfigError
from polyray.selection import neurons_swept

WIDTHS = {"0": 4, "2": 6}


def chosen(selection: object) -> dict[str, list[int]]:
    found = neurons_swept(selection, WIDTHS, "subject.neurons")  # type: ignore[arg-type]
    assert all(neurons.dtype == np.int64 for neurons in found.values())
    return {layer: neurons.tolist() for layer, neurons in found.items()}


def test_chosen_neurons(tmp_path: Path) -> None:
    everyone = {"0": [0, 1, 2, 3], "2": [0, 1, 2, 3, 4, 5]}
    assert chosen(None) == chosen({}) == everyone
    assert chosen({"2": [5, 0]}) == everyone | {"2": [0, 5]}
    assert chosen({"0": []}) == {"2": everyone["2"]}
    assert chosen({"0": ["1-3"], "2": [5, "0-1", "3-3"]}) == {"0": [1, 2, 3], "2": [0, 1, 3, 5]}
    for name, text in (("a.json", '{"0": [1], "2": [2, "3-4"]}'), ("a.yaml", '"0": [1]\n"2": [2, 3-4]\n')):
        (tmp_path / name).write_text(text)
        assert chosen(str(tmp_path / name)) == {"0": [1], "2": [2, 3, 4]}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"1": [0]}, "'1' is not among the layers swept"),
        ({"0": [0, 4]}, "'0' has neurons 0 to 3, got 4"),
        ({"0": ["2-4"]}, "'0' has neurons 0 to 3, got '2-4'"),
        ({"2": [1, 1, 2]}, "'2' lists [1] more than once"),
        ({"2": [2, "1-3"]}, "'2' lists [2] more than once"),
        ({"2": ["3-1"]}, "runs backwards; say '1-3'"),
        ({"0": [], "2": []}, "leaves no neuron"),
        ("nowhere.json", "cannot read 'nowhere.json'"),
    ],
)
def test_neurons_that_do_not_exist(selection: object, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        chosen(selection)
    assert message in str(e.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", '{"0": 3}', '{"0": [0.5]}', '{"0": [-1]}', '{"0": [true]}'])
def test_files_that_choose_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=r"subject\.neurons"):
        chosen(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"a": [-1]}, "-1 is neither an index nor a range such as 10-19"),
        ({"a": [0.5]}, "0.5 is neither an index nor a range"),
        ({"a": ["10-"]}, "'10-' is neither an index nor a range"),
        ({"a": 3}, "neurons of layer a must be a list"),
        ({3: [1]}, "put it in quotes"),
        ([1], "lists of indices and ranges by layer"),
    ],
)
@pytest.mark.parametrize("method", ["psi", "psi_text"])
def test_what_a_config_may_not_say(method: str, listed: object, message: str) -> None:
    science = {"method": method, "subject": {"neurons": listed}}
    with pytest.raises(ConfigError) as e:
        parse_config({"science": science, "execution": {}})
    (line,) = [line for line in str(e.value).splitlines() if "subject.neurons" in line]
    assert line.startswith("  science.subject.neurons: ")
    assert message in line
