"""The open_clip encoder against open_clip itself, and what happens when its weights are not there."""

import http.server
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from polyray.config import NumericsConfig, OpenClip
from polyray.errors import ConfigError, ModelError
from polyray.models import open_clip_encoder
from polyray.models.encoders import Encoder, load_encoder
from polyray.models.open_clip_encoder import find_weights, hub_answers

SMALL = "ViT-S-32-alt"


def pixels(n: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def clip_config(**changes: Any) -> OpenClip:
    settings = {"model": SMALL, "pretrained": "none", "template": "a photo of {}.", "micro_batch": 4}
    return OpenClip(kind="open_clip", **(settings | changes))


@pytest.fixture(scope="module")
def clip() -> Encoder:
    return load_encoder(clip_config(), NumericsConfig())


@pytest.fixture(scope="module")
def clip_network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(SMALL).eval()


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No hub, and an empty local cache (its folder is returned)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(open_clip_encoder, "hub_answers", lambda: False)
    return tmp_path


class TestOpenClip:
    def test_image_vectors_are_open_clips(self, clip: Encoder, clip_network: Any) -> None:
        patches = pixels(3, 224)
        preprocess = open_clip.image_transform(224, is_train=False)
        with torch.no_grad():
            oracle = clip_network.encode_image(torch.stack([preprocess(Image.fromarray(p.numpy())) for p in patches]))
        geometry, text = clip.encode(patches)
        assert text is None
        torch.testing.assert_close(geometry.float(), oracle, rtol=2e-3, atol=1e-3)

    def test_prompt_vectors_are_open_clips(self, clip: Encoder, clip_network: Any) -> None:
        with torch.no_grad():
            oracle = clip_network.encode_text(open_clip.tokenize(["a photo of zebra.", "a photo of {x}."]))
        vectors = clip.encode_prompts(["zebra", "{x}"])
        torch.testing.assert_close(vectors, oracle / oracle.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)

    def test_untrained_weights_are_the_same_always_and_say_so(self, clip: Encoder) -> None:
        torch.manual_seed(123)
        before = torch.get_rng_state()
        again = load_encoder(clip_config(), NumericsConfig())
        assert torch.equal(torch.get_rng_state(), before)
        assert again.digest == clip.digest
        assert not again.trained
        assert again.notes[0].startswith("UNTRAINED")
        assert "untrained" in again.name
        assert (again.same_space, again.standardise) == (True, False)
        assert again.geometry_dim == again.text_dim == 256

    def test_weights_load_from_a_file_of_either_kind(
        self, clip: Encoder, clip_network: torch.nn.Module, tmp_path: Path
    ) -> None:
        weights = {name: tensor.clone() for name, tensor in clip_network.state_dict().items()}
        weights["visual.proj"] = weights["visual.proj"].flip(1)
        save_file(weights, tmp_path / "mine.safetensors")
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "mine.pt")
        patches = pixels(2, 224)
        digests = set()
        for file in ("mine.safetensors", "mine.pt"):
            encoder = load_encoder(clip_config(pretrained=str(tmp_path / file)), NumericsConfig())
            assert encoder.trained
            assert torch.equal(encoder.encode(patches)[0], clip.encode(patches)[0].flip(1))
            assert file in encoder.name
            assert str(tmp_path) not in encoder.name + "".join(encoder.notes)
            digests.add(encoder.digest)
        assert len(digests) == 1
        assert clip.digest not in digests

    @pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript archive:UserWarning")
    def test_weights_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        save_file({"visual.conv9.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
        torch.save([1, 2], tmp_path / "list.pt")
        torch.save({}, tmp_path / "nothing.pth")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
        (tmp_path / "text.bin").write_text("no weights")
        (tmp_path / "text.safetensors").write_text("no weights")
        for file, reason in (
            ("other.safetensors", 'Missing key.*"logit_scale".*Unexpected key.*"visual.conv9.weight"'),
            ("program.pt", "TorchScript"),
            *((file, "") for file in ("list.pt", "nothing.pth", "text.bin", "text.safetensors")),
        ):
            with pytest.raises(ModelError, match=f"(?s){file}' do not fit {SMALL}: .*{reason}.*weights_only") as error:
                load_encoder(clip_config(pretrained=str(tmp_path / file)), NumericsConfig())
            assert len(str(error.value)) < 1500

    def test_code_in_a_weights_file_is_not_run(self, tmp_path: Path) -> None:
        class Program:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "ran",))

        torch.save({"state_dict": Program()}, tmp_path / "bad.pt")
        with pytest.raises(ModelError, match="do not fit"):
            load_encoder(clip_config(pretrained=str(tmp_path / "bad.pt")), NumericsConfig())
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"model": "ViT-B32"}, ConfigError, "'ViT-B-32'"),
            ({"model": "ViT-B-32", "pretrained": "laion2b_s34b"}, ConfigError, "'laion2b_s34b_b79k'"),
            ({"model": "ViT-B-32", "pretrained": "openai"}, ConfigError, "model=ViT-B-32-quickgelu"),
            ({"pretrained": "weights/none.safetensors"}, ModelError, "no such file"),
            ({"pretrained": __file__}, ModelError, r"must end in \.safetensors"),
            ({"template": "a photo"}, ConfigError, "'a photo'"),
        ],
    )
    def test_what_does_not_exist_is_named(self, changes: dict[str, str], error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            load_encoder(clip_config(**changes), NumericsConfig())

    def test_input_scaling_is_that_of_the_weights(self, tmp_path: Path, no_hub: Path) -> None:
        file = tmp_path / "mine.safetensors"
        file.touch()
        clip_scaling = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        for model, oracle in (("ViT-B-32", clip_scaling), ("ViT-L-14", clip_scaling), ("ViT-B-16-SigLIP", half)):
            assert find_weights(model, str(file))[1:3] == oracle
        cached = cache(no_hub, "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "open_clip_pytorch_model.bin")
        assert find_weights("ViT-L-14", "laion2b_s32b_b82k") == (cached, *half, [])


class TestHub:
    def test_unreachable_weights_say_which_file_and_where(self, no_hub: Path) -> None:
        with pytest.raises(ModelError, match="cannot be reached") as error:
            load_encoder(OpenClip(kind="open_clip"), NumericsConfig())
        for part in (
            "hf download timm/vit_base_patch32_clip_224.openai open_clip_model.safetensors",
            "--set science.encoder.pretrained=/path/to/open_clip_model.safetensors",
        ):
            assert part in str(error.value)

    @pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
    def test_cached_weights_need_no_hub(self, no_hub: Path, file: str) -> None:
        cached = cache(no_hub, "timm/vit_base_patch32_clip_224.openai", file)
        assert find_weights("ViT-B-32-quickgelu", "openai").path == cached

    def test_download_that_fails_is_explained(self, no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(cfg: dict[str, str]) -> str:
            raise FileNotFoundError("disk full")

        monkeypatch.setattr(open_clip_encoder, "hub_answers", lambda: True)
        monkeypatch.setattr(open_clip, "download_pretrained", fail)
        with pytest.raises(ModelError, match="could not be fetched: disk full"):
            find_weights("ViT-B-32-quickgelu", "openai")

    def test_tokenizer_on_the_hub_is_asked_for_at_once(self, no_hub: Path) -> None:
        with pytest.raises(ModelError, match="tokenizer from timm/ViT-B-16-SigLIP on the Hugging Face hub"):
            load_encoder(clip_config(model="ViT-B-16-SigLIP"), NumericsConfig())

    def test_any_answer_counts_and_silence_does_not(self, monkeypatch: pytest.MonkeyPatch, refusing: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", refusing)
        assert hub_answers()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert not hub_answers()

    @pytest.mark.parametrize(
        ("error", "answers"),
        [
            (urllib.error.URLError(OSError("no such name")), False),
            (urllib.error.URLError(ssl.SSLCertVerificationError("unknown")), True),
            (TimeoutError("slow"), False),
            (ConnectionResetError("reset"), False),
        ],
    )
    def test_errors_of_the_network(self, monkeypatch: pytest.MonkeyPatch, error: Exception, answers: bool) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(urllib.request, "urlopen", fail)
        assert hub_answers() is answers


def cache(folder: Path, repo: str, file: str) -> Path:
    """Puts an empty file into a hub cache as the hub's client lays it out."""
    snapshot = folder / f"models--{repo.replace('/', '--')}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123")
    (snapshot / file).touch()
    return snapshot / file


@pytest.fixture
def refusing() -> Iterator[str]:
    """Address of a server that knows nothing: 501 to everything."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
