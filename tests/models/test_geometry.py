"""Axes and receptive fields from the graph, against networks that are asked by changing their pixels."""

import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from polyray.errors import ModelError
from polyray.models import axes as ax
from polyray.models.axes import Atom, Axes
from polyray.models.layers import LayerInfo
from polyray.models.readouts import Readouts

PX = 32


def by_name(readouts: Readouts) -> dict[str, LayerInfo]:
    return {name: info for name in readouts.names for info in readouts.layers([name])}


# --- axes -----------------------------------------------------------------------------------------------------------


def coordinate(axes: Axes, label: str) -> np.ndarray:
    """Index along `label` at every place of a tensor with these axes."""
    total = np.zeros((1,) * len(axes), dtype=np.int64)
    for i, axis in enumerate(axes):
        inner = 1
        for atom in reversed(axis):
            steps = np.arange(ax.size(axis)) // inner % atom.size * atom.step * (atom.label == label)
            total = total + steps.reshape([-1 if j == i else 1 for j in range(len(axes))])
            inner *= atom.size
    return np.broadcast_to(total, [ax.size(axis) for axis in axes])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_reshapes_and_permutations_carry_every_index(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.sampled_from([1, 2, 4, 6])) for _ in range(4))
    axes = ax.image_axes(shape)
    grids = dict(zip("NCHW", np.indices(shape), strict=True))
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(axes))))
            axes = tuple(axes[i] for i in order)
            grids = {label: grid.transpose(order) for label, grid in grids.items()}
        else:
            sizes, rest = [], math.prod(map(ax.size, axes))
            while rest > 1 and len(sizes) < 5:
                sizes.append(data.draw(st.sampled_from([d for d in (1, 2, 3, 4, 6, 24) if rest % d == 0])))
                rest //= sizes[-1]
            sizes.append(rest)
            moved = ax.reshape(axes, sizes)
            if moved is None:
                return
            axes = moved
            grids = {label: grid.reshape(sizes) for label, grid in grids.items()}
    for label, grid in grids.items():
        np.testing.assert_array_equal(coordinate(axes, label), grid)


def test_axes_of_size_one_keep_their_name_where_they_can() -> None:
    one = ax.image_axes((2, 6, 1, 1))
    split = ax.reshape(one, (2, 2, 3, 1, 1))
    assert split is not None
    shuffled = ax.reshape((split[0], split[2], split[1], *split[3:]), (2, 6, 1, 1))
    assert shuffled is not None
    assert ax.layout_of(shuffled) == ax.layout_of(one)
    tokens = ax.reshape(one, (2, 6, 1))
    assert tokens is not None
    layout = ax.layout_of(tokens)
    assert isinstance(layout, ax.Layout)
    assert (layout.kind, layout.grid) == ("tokens", (1, 1))
    vector = ax.reshape(one, (2, 6))
    assert vector is not None
    assert ax.spell(vector) == "[N, C]"


def test_shuffled_channels_stay_channels_and_parts_of_rows_are_no_rows() -> None:
    cut = ax.reshape(ax.image_axes((2, 6, 4, 4)), (2, 2, 3, 2, 2, 4))
    assert cut is not None
    shuffled = ax.reshape((cut[0], cut[2], cut[1], *cut[3:]), (2, 6, 4, 4))
    assert shuffled is not None
    assert isinstance(ax.layout_of(shuffled), ax.Layout)
    apart = ax.reshape(shuffled, (2, 3, 2, 4, 4))
    assert apart is not None
    # The outer axis now walks in steps of one, the inner one in steps of three.
    np.testing.assert_array_equal(coordinate(apart, "C")[0, :, :, 0, 0], [[0, 3], [1, 4], [2, 5]])
    outer_rows = (cut[0], (Atom("C", 6),), cut[3], cut[5])
    assert ax.layout_of(outer_rows) == "axes [N, C, H, W] are none of images, neurons and positions alone"


def test_windows_cut_and_put_back_are_the_map_again() -> None:
    image = ax.image_axes((2, 5, 12, 6))
    nhwc = tuple(image[i] for i in (0, 2, 3, 1))
    cut = ax.reshape(nhwc, (2, 4, 3, 2, 3, 5))
    assert cut is not None
    windows = tuple(cut[i] for i in (0, 1, 3, 2, 4, 5))
    merged = ax.reshape(windows, (16, 9, 5))
    assert merged is not None
    assert isinstance(ax.layout_of(merged), str)
    back = ax.reshape(merged, (2, 4, 2, 3, 3, 5))
    assert back is not None
    assert ax.reshape(tuple(back[i] for i in (0, 1, 3, 2, 4, 5)), (2, 12, 6, 5)) == nhwc


class Square(nn.Module):
    """Eight neurons on eight by eight positions, as [N, C, H, W], [N, H, W, C] and [N, C, W, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.linear = nn.Linear(8, 8)
        self.identity = nn.Identity()
        self.turned = nn.Identity()
        self.mixed = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.conv(x).permute(0, 2, 3, 1)).relu()
        y = self.identity(x.permute(0, 3, 1, 2) * 2)
        return self.mixed(y + self.turned(y.transpose(2, 3) + 0.5))


def test_equal_sizes_do_not_confuse_the_axes() -> None:
    network = Square().eval()
    readouts = Readouts(network, (3, PX, PX))
    layers = by_name(readouts)
    assert {name: layers[name].layout for name in ("conv", "linear", "identity", "turned")} == {
        "conv": "nchw", "linear": "nhwc", "identity": "nchw", "turned": "nchw",
    }  # fmt: skip
    x = torch.randn((2, 3, PX, PX), generator=torch.Generator().manual_seed(0))
    found = readouts.run(x, list(layers))
    with torch.no_grad():
        conv = network.conv(x)
        rows = network.linear(conv.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)
    expected = {"conv": conv, "linear": rows, "identity": rows * 2, "turned": rows * 2 + 0.5}
    for name, tensor in expected.items():
        response, position = tensor.flatten(2).max(2)
        torch.testing.assert_close(found[name][0], response)
        # The turned map is read by its labels, so that a position is the same place in every layer.
        assert torch.equal(found[name][1], position), name
    with pytest.raises(ModelError, match=r"add in the root module joins \[N, C, H, W\] and \[N, C, W, H\]"):
        readouts.layers(["mixed"])


# --- receptive fields -----------------------------------------------------------------------------------------------


class Branchy(nn.Module):
    """Strides, dilation, uneven padding, both poolings, a strided shortcut and joined branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 5, stride=2, padding=2)
        self.same = nn.Conv2d(4, 4, 4, padding="same")
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2, padding=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.uneven = nn.Conv2d(4, 4, 3, stride=2)
        self.shortcut = nn.Conv2d(4, 4, 1, stride=2)
        self.sum = nn.Identity()
        self.average = nn.AvgPool2d(2, 1)
        self.wide = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.joined = nn.Identity()
        self.every_second = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dilated(self.same(self.stem(x)))
        x = self.pool(x)
        x = self.sum(self.uneven(F.pad(x, (0, 1, 1, 0))) + self.shortcut(x))
        x = self.joined(torch.cat([self.average(F.pad(x, (1, 0, 0, 1))), self.wide(x)], dim=1))
        return self.every_second(x[:, :, 1::2, ::2] * 1.0)


def seen_pixels(outputs: Tensor, row: int, column: int) -> tuple[int, int]:
    """First and last image in which a position differs from the last image, which is clean."""
    changed = (outputs[:-1, :, row, column] != outputs[-1:, :, row, column]).any(1).nonzero().flatten()
    return int(changed.min()), int(changed.max())


def test_receptive_fields_are_what_changed_pixels_show() -> None:
    px = 80
    network = Branchy().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.5, 1.0, generator=generator)
    seen: dict[str, Tensor] = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    layers = by_name(Readouts(network, (3, px, px)))
    assert list(layers) == [name for name, _ in network.named_children()]
    # Image k has column k (then row k) bright; the last image is black.
    stripes = 1000 * torch.eye(px + 1)[:, :px]
    with torch.no_grad():
        network(stripes[:, None, None, :].repeat(1, 3, px, 1))
        columns = dict(seen)
        network(stripes[:, None, :, None].repeat(1, 3, 1, px))
        rows = dict(seen)
    for name, info in layers.items():
        assert (info.width, info.grid_h, info.grid_w) == tuple(rows[name].shape[1:])
        down = [seen_pixels(rows[name], i, info.grid_w // 2) for i in range(info.grid_h)]
        across = [seen_pixels(columns[name], info.grid_h // 2, i) for i in range(info.grid_w)]
        sides = []
        for found, center in ((down, info.center_y_px), (across, info.center_x_px)):
            inside = [(i, low, high) for i, (low, high) in enumerate(found) if low > 0 and high < px - 1]
            assert inside, name
            for i, low, high in inside:
                assert (low + high + 1) / 2 == center + i * info.stride_px, (name, i)
            sides.append(inside[0][2] - inside[0][1] + 1)
        assert info.receptive_px == max(sides), name
    assert layers["stem"].receptive_px == 5
    assert layers["every_second"].stride_px == 16.0


class Gated(nn.Module):
    """A gate from a global pooling, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.squeeze = nn.Conv2d(6, 2, 1)
        self.excite = nn.Conv2d(2, 6, 1)
        self.gated = nn.Identity()
        self.after = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = F.relu(self.after(self.gated(x * gate)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_global_operations_see_the_whole_image_but_keep_their_place() -> None:
    readouts = Readouts(Gated().eval(), (3, PX, PX))
    layers = by_name(readouts)
    assert (layers["conv"].receptive_px, layers["conv"].center_x_px, layers["conv"].stride_px) == (3, 0.5, 2.0)
    for name in ("gated", "after"):
        assert (layers[name].receptive_px, layers[name].center_x_px, layers[name].stride_px) == (None, 0.5, 2.0)
    assert (layers["squeeze"].layout, layers["squeeze"].grid_h) == ("nchw", 1)
    assert (layers["squeeze"].center_y_px, layers["squeeze"].stride_px) == (PX / 2, PX)
    assert (layers["head"].layout, layers["head"].width, layers["head"].receptive_px) == ("vector", 7, None)
    # The convolutions of the gate have no positions: they are no part of the census.
    assert [info.name for info in readouts.layers("census")] == ["conv", "after"]


class Pyramid(nn.Module):
    """A pooled branch, spread over the map again and joined to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 4)
        self.joined = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.joined(torch.cat([F.interpolate(F.adaptive_avg_pool2d(x, 1), x.shape[2:]), x], 1))


def test_a_pooled_branch_does_not_move_the_place() -> None:
    (info,) = Readouts(Pyramid().eval(), (3, PX, PX)).layers(["joined"])
    assert (info.width, info.center_x_px, info.stride_px, info.receptive_px) == (8, 1.5, 4.0, None)


def test_a_map_of_one_position_is_still_a_map_where_nothing_was_pooled() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU())
    (info,) = Readouts(network.eval(), (3, 8, 8)).layers("census")
    assert (info.layout, info.grid_h, info.grid_w, info.receptive_px) == ("nchw", 1, 1, None)
    assert (info.center_x_px, info.center_y_px) == (4.0, 4.0)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (nn.GroupNorm(2, 4), (None, 1.0, 2.0)),
        (nn.InstanceNorm2d(4), (None, 1.0, 2.0)),
        (nn.LayerNorm((4, 16, 16)), (None, 1.0, 2.0)),
        (nn.BatchNorm2d(4), (2, 1.0, 2.0)),
        (nn.LocalResponseNorm(3), (2, 1.0, 2.0)),
        (nn.Softmax2d(), (2, 1.0, 2.0)),
        (nn.Softmax(dim=3), (None, 1.0, 2.0)),
        (nn.AdaptiveAvgPool2d(16), (2, 1.0, 2.0)),
        (nn.AdaptiveAvgPool2d(4), (8, 4.0, 8.0)),
        (nn.AdaptiveMaxPool2d(5), (None, 3.2, 6.4)),
    ],
)
def test_what_mixes_the_whole_map_and_what_does_not(second: nn.Module, expected: tuple[object, ...]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 2, 2), second).eval()
    info = by_name(Readouts(network, (3, PX, PX)))["1"]
    assert (info.receptive_px, info.center_x_px, info.stride_px) == expected


@pytest.mark.parametrize(
    ("network", "center", "stride"),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 2, 2), nn.Upsample(scale_factor=4), nn.Identity()), 0.25, 0.5),
        (nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.ConvTranspose2d(2, 2, 2, 2), nn.Identity()), 1.0, 2.0),
        (nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.PixelShuffle(2), nn.Identity()), 0.5, 1.0),
    ],
)
def test_unknown_geometry_spreads_the_grid_over_the_image(network: nn.Module, center: float, stride: float) -> None:
    info = by_name(Readouts(network.eval(), (3, PX, PX)))["1"]
    assert (info.center_x_px, info.center_y_px, info.stride_px, info.receptive_px) == (center, center, stride, None)


def test_uneven_strides_are_refused_with_the_strides() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 2, stride=(1, 2)), nn.ReLU()).eval()
    with pytest.raises(ModelError, match=r"different strides, \[1\.0, 2\.0\] px"):
        Readouts(network, (3, PX, PX)).layers(["0"])


# --- transformers ---------------------------------------------------------------------------------------------------


def local_positions(readouts: Readouts, name: str, px: int, step: int) -> None:
    """Brightens one place after another and asks where the layer's strongest neuron peaks."""
    (info,) = readouts.layers([name])
    base = torch.rand((1, 3, px, px), generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1)
    response, _ = readouts.run(base, [name])[name]
    for position in range(0, info.grid_h * info.grid_w, step):
        x, y = (round(c) for c in info.center(position))
        bright = base.clone()
        half = int(info.stride_px // 2)
        bright[:, :, y - half : y + half, x - half : x + half] *= -20
        changed, where = readouts.run(bright, [name])[name]
        moved = (changed[0] > response[0] + 1e-3).nonzero().flatten()
        assert len(moved) > info.width // 20
        assert set(where[0][moved].tolist()) == {position}


def test_tokens_of_a_vision_transformer_are_the_patches_behind_the_prefix() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, reg_tokens=3, pretrained=False).eval()
    for block in network.blocks:
        nn.init.zeros_(block.attn.proj.weight)  # without attention a token sees its own patch alone
    readouts = Readouts(network, (3, 64, 64))
    layers = by_name(readouts)
    assert [info.name for info in readouts.layers("block_outputs")] == ["blocks.0", "blocks.1"]
    assert readouts.layers("census")[0].name == "blocks.0.mlp.fc1"
    info = layers["blocks.1"]
    assert (info.layout, info.grid_h, info.grid_w, info.width, info.activation) == ("tokens", 4, 4, 192, None)
    assert (info.center_x_px, info.stride_px, info.receptive_px) == (8.0, 16.0, None)
    assert layers["blocks.0.mlp.fc1"].activation == "gelu"
    assert layers["head"].layout == "vector"
    for name in ("blocks.1", "blocks.0.mlp.fc1", "blocks.1.attn.qkv"):
        local_positions(readouts, name, 64, 5)


def test_torchvision_transformer_is_read_past_its_class_token() -> None:
    network = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=3).eval()
    for layer in network.encoder.layers:
        nn.init.zeros_(layer.self_attention.out_proj.weight)
    nn.init.ones_(network.heads.head.weight)
    readouts = Readouts(network, (3, PX, PX))
    name = "encoder.layers.encoder_layer_1"
    assert [info.name for info in readouts.layers("block_outputs")] == ["encoder.layers.encoder_layer_0", name]
    # The final layer norm uses the last block alone, but is no part of it.
    assert readouts.layers([name])[0].activation is None
    seen: list[Tensor] = []
    network.encoder.layers[1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    x = torch.randn((3, 3, PX, PX), generator=torch.Generator().manual_seed(0))
    response, position = readouts.run(x, [name])[name]
    with torch.no_grad():
        network(x)
    expected, where = seen[0][:, 1:].max(1)
    torch.testing.assert_close(response, expected)
    assert torch.equal(position, where)


class Merging(nn.Module):
    """Swin's stem, one local block, and patch merging: by strided slices, or by reshaping."""

    def __init__(self, by_slices: bool) -> None:
        super().__init__()
        self.by_slices = by_slices
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.LayerNorm(24)
        self.reduce = nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        if self.by_slices:
            x = torch.cat([x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)], -1)
        else:
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return F.gelu(self.reduce(self.norm(x)))


@pytest.mark.parametrize("by_slices", [True, False])
def test_patch_merging_doubles_the_stride(by_slices: bool) -> None:
    readouts = Readouts(Merging(by_slices).eval(), (3, PX, PX))
    (info,) = readouts.layers(["reduce"])
    assert (info.layout, info.grid_h, info.grid_w, info.width, info.activation) == ("nhwc", 4, 4, 40, "gelu")
    assert (info.center_x_px, info.center_y_px, info.stride_px, info.receptive_px) == (4.0, 4.0, 8.0, 8)
    local_positions(readouts, "reduce", PX, 3)


def test_shifted_windows_lose_the_axes_and_the_residual_finds_them() -> None:
    network = torchvision.models.SwinTransformer([4, 4], 12, [2, 1], [2, 2], [4, 4], num_classes=2).eval()
    readouts = Readouts(network, (3, 64, 64))
    with pytest.raises(ModelError, match=r"'features\.1\.1\.attn' cannot be read: roll in features\.1\.1\.attn"):
        readouts.layers(["features.1.1.attn"])
    layers = {info.name: info for info in readouts.layers("census")}
    assert layers["features.1.1"].layout == "nhwc"
    assert (layers["features.1.1.mlp.0"].grid_h, layers["features.1.1.mlp.0"].activation) == (16, "gelu")
    assert layers["features.3.0"].stride_px == 8.0
    assert readouts.left_out("census") == {}


def test_convnext_blocks_are_read_in_both_layouts() -> None:
    block = torchvision.models.convnext.CNBlock(8, 1.0, 0.0)
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Sequential(block)).eval()
    readouts = Readouts(network, (3, 64, 64))
    hidden, output = readouts.layers("census")
    assert (hidden.name, hidden.layout, hidden.width, hidden.receptive_px) == ("1.0.block.3", "nhwc", 32, 28)
    assert (output.name, output.layout, output.width, output.receptive_px) == ("1.0", "nchw", 8, 28)
    x = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    found = readouts.run(x, [hidden.name, output.name])
    with torch.no_grad():
        stem = network[0](x)
        mlp = F.gelu(block.block[3](block.block[2](block.block[0](stem).permute(0, 2, 3, 1))))
        expected = {hidden.name: mlp.permute(0, 3, 1, 2), output.name: network(x)}
    for name, tensor in expected.items():
        response, position = tensor.flatten(2).max(2)
        torch.testing.assert_close(found[name][0], response)
        assert torch.equal(found[name][1], position)
