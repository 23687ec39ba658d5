"""The built-in vocabulary and prompt files."""

from pathlib import Path

import pytest
from torchvision.models import EfficientNet_B0_Weights

from polyray.errors import ConfigError
from polyray.models.vocabulary import builtin_prompts, imagenet_class_names, load_prompts, prompts_digest


def test_class_names_are_the_thousand_classes_in_the_standard_order() -> None:
    names = imagenet_class_names()
    assert len(names) == len({name.casefold() for name in names}) == 1000
    oracle = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    same = [i for i in range(1000) if names[i].casefold() == oracle[i].casefold()]
    # Two curators, who agree on most names; in another order they would agree on none.
    assert len(same) > 600
    assert (names[657], names[744]) == ("missile", "projectile")
    assert (names[836], names[837]) == ("sunglass", "sunglasses")


def test_builtin_prompts_are_class_names_then_attributes_without_repeats() -> None:
    prompts = builtin_prompts()
    attributes = prompts[1000:]
    assert prompts[:1000] == imagenet_class_names()
    assert 550 <= len(attributes) <= 650
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)
    assert all(a == a.lower() == " ".join(a.split()) for a in attributes)


def test_attributes_repeat_no_prompt_in_another_number_or_word_order() -> None:
    def words(prompt: str) -> tuple[str, ...]:
        return tuple(sorted(word.rstrip("s") for word in prompt.lower().replace("-", " ").split()))

    seen: dict[tuple[str, ...], str] = {words(name): name for name in imagenet_class_names()}
    repeats = []
    for attribute in builtin_prompts()[1000:]:
        repeats += [(attribute, seen[words(attribute)])] if words(attribute) in seen else []
        seen[words(attribute)] = attribute
    assert repeats == []


def test_builtin_is_what_the_config_calls_it() -> None:
    assert load_prompts("builtin") == builtin_prompts()


def test_file_keeps_order_and_drops_comments_blanks_and_repeats(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# mine\r\nzebra\r\n\r\n  red car \nzebra\nété\x85x\nRed car\n#zebra\n".encode())
    assert load_prompts(str(file)) == ["zebra", "red car", "été\x85x", "Red car"]


def test_missing_file_names_the_nearest_ones(tmp_path: Path) -> None:
    (tmp_path / "animals.txt").write_text("zebra\n")
    (tmp_path / "materials.txt").write_text("wood\n")
    with pytest.raises(ConfigError, match=r"animal\.txt.*cannot be read.*'animals\.txt'"):
        load_prompts(str(tmp_path / "animal.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no prompt"),
        ("comments.txt", b"# nothing\n\n   \n", "holds no prompt"),
        ("latin.txt", "été\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_unusable_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts(str(tmp_path / name))


def test_folder_and_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="It is a folder"):
        load_prompts(str(tmp_path))
    with pytest.raises(ConfigError, match="no folder"):
        load_prompts(str(tmp_path / "nowhere" / "prompts.txt"))


def test_misspelt_builtin_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'builtin'"):
        load_prompts("buildin")


def test_digest_sees_order_and_boundaries() -> None:
    digests = [prompts_digest(p) for p in (["a", "b"], ["b", "a"], ["ab"], ["a,b"], ["a", "b", "b"], [])]
    assert len(set(digests)) == len(digests)
    assert prompts_digest(("a", "b")) == digests[0]
    assert len(digests[0]) == 64
