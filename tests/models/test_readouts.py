"""Where layers are read and what comes out, against networks written down by hand."""

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from polyray.errors import ConfigError, ModelError
from polyray.models.readouts import Readouts

PX = 24


def noise(n: int = 3, px: int = PX, seed: int = 0) -> Tensor:
    return torch.randn((n, 3, px, px), generator=torch.Generator().manual_seed(seed))


def assert_reads(readouts: Readouts, x: Tensor, name: str, expected: Tensor) -> None:
    """The layer's responses are the maxima of `expected` [N, C, H, W], each at its first place."""
    response, position = readouts.run(x, [name])[name]
    flat = expected.flatten(2).numpy()
    torch.testing.assert_close(response, torch.from_numpy(flat.max(2)))
    values = np.take_along_axis(flat, position.numpy()[:, :, None], 2)[:, :, 0]
    np.testing.assert_allclose(values, flat.max(2), rtol=1e-5, atol=1e-6)
    distinct = np.sort(flat, 2)
    clear = flat.shape[2] == 1 or (distinct[:, :, -1] - distinct[:, :, -2] > 1e-4)
    np.testing.assert_array_equal(position.numpy()[clear], flat.argmax(2)[clear])


class Block(nn.Module):
    """One relu module in two places, in place, and a residual sum in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Network(nn.Module):
    """Functional relu, shared relu modules, ReLU6 in place, dropout, a classifier that may be forbidden to run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(5), Block(5))
        self.pool = nn.MaxPool2d(2)
        self.expand = nn.Conv2d(5, 7, 1)
        self.norm = nn.BatchNorm2d(7)
        self.act = nn.ReLU6(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.squash = nn.Conv2d(7, 2, 1)
        self.head = nn.Linear(2, 4)
        self.head_may_run = True
        generator = torch.Generator().manual_seed(1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, generator=generator)  # half of the gains are negative
                nn.init.normal_(module.bias, generator=generator)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=0.5, generator=generator)
        nn.init.constant_(self.norm.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(F.relu(self.stem(x))))
        x = self.drop(self.act(self.norm(self.expand(x))))
        x = torch.sigmoid(self.squash(x))
        if not self.head_may_run:
            raise AssertionError("the forward went on after the last layer")
        return self.head(x.mean((2, 3)))

    def by_hand(self, x: Tensor) -> dict[str, Tensor]:
        """Every layer, written without any operation in place."""
        out = {}
        with torch.no_grad():
            x = out["stem"] = self.stem(x).clamp(min=0)
            for i, block in enumerate(self.blocks):
                inner = out[f"blocks.{i}.conv1"] = block.bn1(block.conv1(x)).clamp(min=0)
                outer = out[f"blocks.{i}.conv2"] = block.bn2(block.conv2(inner))
                x = out[f"blocks.{i}"] = (outer + x).clamp(min=0)
            x = out["pool"] = F.max_pool2d(x, 2)
            out["expand"] = self.norm(self.expand(x))
            out["squash"] = self.squash(out["expand"].clamp(0, 6))
        return out


class Turned(nn.Module):
    """Channels before tokens becomes tokens before channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.fixture(scope="module")
def network() -> Network:
    return Network().eval()


@pytest.fixture(scope="module")
def readouts(network: Network) -> Readouts:
    return Readouts(network, (3, PX, PX))


@pytest.mark.parametrize(
    "name",
    ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.0", "blocks.1.conv1", "blocks.1", "pool", "expand", "squash"],
)
def test_layers_are_read_where_they_end(network: Network, readouts: Readouts, name: str) -> None:
    x = noise()
    assert_reads(readouts, x, name, network.by_hand(x)[name])


def test_all_layers_in_one_pass_equal_each_alone(readouts: Readouts) -> None:
    x, names = noise(), [info.name for info in readouts.layers("census")]
    together = readouts.run(x, names)
    for name in names:
        alone = readouts.run(x, [name])[name]
        assert torch.equal(together[name][0], alone[0])
        assert torch.equal(together[name][1], alone[1])


def test_a_bare_hook_would_turn_the_ranking_round(network: Network, readouts: Readouts) -> None:
    x = noise(8)
    gain = network.blocks[0].bn1.weight
    neuron = int((gain < 0).nonzero()[0])
    with torch.no_grad():
        bare = network.blocks[0].conv1(F.relu(network.stem(x)))[:, neuron].flatten(1).amax(1)
    read = readouts.run(x, ["blocks.0.conv1"])["blocks.0.conv1"][0][:, neuron]
    assert bare.argmax() != read.argmax()


def test_what_the_layers_say_of_themselves(readouts: Readouts) -> None:
    said = {
        name: (info.activation, info.ranked_by, info.positive_only)
        for name in ("stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.0", "pool", "expand", "squash", "head")
        for info in readouts.layers([name])
    }
    assert said == {
        "stem": ("relu", "response", True),
        "blocks.0.conv1": ("relu", "response", True),
        "blocks.0.conv2": (None, "response", False),
        "blocks.0": ("relu", "response", True),
        "pool": ("relu", "response", True),
        "expand": ("relu6", "pre_activation", True),
        "squash": ("sigmoid", "pre_activation", False),
        "head": (None, "response", False),
    }


def test_named_sets(readouts: Readouts) -> None:
    census = readouts.layers("census")
    assert [info.name for info in census] == [
        "stem", "blocks.0.conv1", "blocks.0", "blocks.1.conv1", "blocks.1", "expand", "squash",
    ]  # fmt: skip
    assert [info.width for info in census] == [5, 5, 5, 5, 5, 7, 2]
    assert [info.name for info in readouts.layers("block_outputs")] == ["blocks.0", "blocks.1"]
    assert [info.depth for info in census] == sorted({info.depth for info in census})


def test_a_layer_is_the_same_in_every_selection(readouts: Readouts) -> None:
    for info in readouts.layers("census"):
        assert readouts.layers([info.name]) == [info]


def test_the_forward_ends_with_the_last_layer(network: Network, readouts: Readouts) -> None:
    network.head_may_run = False
    try:
        readouts.run(noise(), ["squash"])
        readouts.input_energy(noise(), "stem", 0)
        with pytest.raises(AssertionError, match="went on"):
            readouts.run(noise(), ["head"])
    finally:
        network.head_may_run = True


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stem", "blocks.0.conv1", "blocks.1", "expand", "squash"])
def test_one_neuron_for_each_image_is_its_column_of_all(readouts: Readouts, name: str) -> None:
    x = noise(6, seed=3)
    response, position = readouts.run(x, [name])[name]
    info = next(info for info in readouts.layers([name]))
    neuron = torch.tensor([1, 0, 1, info.width - 1, 0, 1])
    rows = torch.arange(6)
    found, at_peak = readouts.run_at(x, name, neuron, position[rows, neuron])
    assert found.dtype == at_peak.dtype == torch.float32
    assert torch.equal(found, response[rows, neuron])
    assert torch.equal(at_peak, found)


def test_one_position_for_each_image_is_read_from_the_map(network: Network, readouts: Readouts) -> None:
    x = noise(4, seed=4)
    expected = F.relu(network.stem(x)).flatten(2).detach()
    neuron, position = torch.tensor([4, 0, 2, 2]), torch.tensor([143, 0, 17, 18])
    found, at = readouts.run_at(x, "stem", neuron, position)
    rows = torch.arange(4)
    torch.testing.assert_close(at, expected[rows, neuron, position])
    torch.testing.assert_close(found, expected[rows, neuron].amax(1))
    assert (at != found).any()


def test_one_neuron_of_tokens_and_of_a_vector() -> None:
    tokens = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.Flatten(2), Turned(), nn.Linear(5, 7), nn.GELU()).eval()
    readouts = Readouts(tokens, (3, PX, PX))
    x = noise(3)
    expected = tokens(x).detach()
    neuron, position = torch.tensor([6, 0, 3]), torch.tensor([8, 2, 0])
    found, at = readouts.run_at(x, "3", neuron, position)
    torch.testing.assert_close(at, expected[torch.arange(3), position, neuron])
    torch.testing.assert_close(found, expected[torch.arange(3), :, neuron].amax(1))


def test_one_neuron_that_is_not_a_number_says_so_alone() -> None:
    network = Ends(nn.ReLU()).eval()
    with torch.no_grad():
        network.conv.weight[2] = torch.nan
    readouts = Readouts(network, (3, PX, PX))
    found, at = readouts.run_at(noise(3), "conv", torch.tensor([0, 2, 1]), torch.tensor([0, 0, 0]))
    assert found.isnan().tolist() == at.isnan().tolist() == [False, True, False]


def test_unknown_names_are_refused_when_one_neuron_is_asked(readouts: Readouts) -> None:
    with pytest.raises(ConfigError, match="stam"):
        readouts.run_at(noise(1), "stam", torch.tensor([0]), torch.tensor([0]))


def test_one_neuron_s_forward_ends_with_its_layer(network: Network, readouts: Readouts) -> None:
    network.head_may_run = False
    try:
        readouts.run_at(noise(1), "squash", torch.tensor([0]), torch.tensor([0]))
    finally:
        network.head_may_run = True


def test_wildcards_stay_within_dots(readouts: Readouts) -> None:
    def names(*patterns: str) -> list[str]:
        return [info.name for info in readouts.layers(patterns)]

    assert names("blocks.?") == names("blocks.*") == ["blocks.0", "blocks.1"]
    assert names("blocks.*.conv?") == ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"]
    assert names("stem", "**.conv1") == ["stem", "blocks.0.conv1", "blocks.1.conv1"]
    # norm and act read what expand reads, and the Sequential what its last block returns.
    assert names("act", "norm", "expand") == ["act"]
    assert names("*") == ["stem", "blocks", "pool", "expand", "squash", "head"]
    assert names("blocks", "blocks.?") == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (["block.0"], "'block.0' names no layer. Did you mean 'blocks.0'"),
        (["stem", "features.*"], "'features.*' names no layer"),
        ([], "subject.layers is empty"),
        ("cencus", "no set 'cencus'. Did you mean 'census'"),
    ],
)
def test_unknown_names_are_refused(readouts: Readouts, selection: object, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        readouts.layers(selection)  # type: ignore[arg-type]
    assert message in str(e.value)


def test_unknown_names_are_refused_when_running(readouts: Readouts) -> None:
    with pytest.raises(ConfigError, match=r"'stam' is no layer of this network\. Did you mean 'stem'"):
        readouts.run(noise(), ["stam"])


def test_shared_modules_are_refused_by_name_and_skipped_by_wildcards(readouts: Readouts) -> None:
    with pytest.raises(ModelError, match=r"'blocks\.0\.relu' cannot be read: it is called 2 times"):
        readouts.layers(["blocks.0.relu"])
    assert "blocks.0.relu" not in {info.name for info in readouts.layers(["**"])}


def test_a_set_without_members_says_so() -> None:
    plain = Readouts(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval(), (3, PX, PX))
    with pytest.raises(
        ConfigError, match=r"'block_outputs' is empty for this network; give layer names. Valid: '0', '1'"
    ):
        plain.layers("block_outputs")


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(5, 5, 1)
        self.blocks = nn.ModuleList([Block(5), Block(5)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return x


class Staged(nn.Module):
    """A fused branch that no one can read in the census, and stages that only wrap their blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 2, 2)
        self.stages = nn.Sequential(Stage(), Stage())
        self.mixer = nn.Conv2d(5, 5, 1)
        self.twice = nn.Conv2d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        x = F.relu(self.mixer(torch.roll(x, 1, 2)))
        return F.relu(self.twice(F.relu(self.twice(x))))


def test_stages_are_looked_into_and_what_is_left_out_has_a_reason() -> None:
    readouts = Readouts(Staged().eval(), (3, PX, PX))
    assert [info.name for info in readouts.layers("block_outputs")] == [
        f"stages.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)
    ]
    assert readouts.left_out("census") == {
        "mixer": "roll in the root module is no function that axes are followed through",
        "twice": "it is called 2 times in one forward; name a module that is called once",
    }
    assert readouts.left_out("block_outputs") == {}


# --- activations ----------------------------------------------------------------------------------------------------


class Ends(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("activation", "name", "saturates", "positive_only"),
    [
        (nn.ReLU(), "relu", False, True),
        (nn.ReLU6(), "relu6", True, True),
        (nn.Hardtanh(), "hardtanh", True, False),
        (nn.Hardtanh(0, 3), "hardtanh", True, True),
        (nn.Sigmoid(), "sigmoid", True, False),
        (nn.Tanh(), "tanh", True, False),
        (nn.Hardsigmoid(), "hardsigmoid", True, False),
        (nn.SiLU(inplace=True), "silu", False, False),
        (nn.GELU(), "gelu", False, False),
        (nn.LeakyReLU(0.1, inplace=True), "leaky_relu", False, False),
        (nn.ELU(), "elu", False, False),
        (nn.SELU(), "selu", False, False),
        (nn.Mish(), "mish", False, False),
        (nn.Hardswish(), "hardswish", False, False),
        (nn.Softplus(), "softplus", False, False),
        (nn.PReLU(4), "prelu", False, False),
        (nn.Threshold(0, 0), "relu", False, True),
        (Call(torch.relu_), "relu", False, True),
        (Call(torch.tanh), "tanh", True, False),
        (Call(lambda x: x.clamp(min=0)), "relu", False, True),
        (Call(lambda x: x.clamp_(0, 6)), "relu6", True, True),
        (Call(lambda x: torch.clamp(x, max=1.0)), "clamp", True, False),
        (Call(lambda x: x.clamp_min(0)), "relu", False, True),
        (Call(lambda x: F.dropout(x, training=False).sigmoid()), "sigmoid", True, False),
        (Call(lambda x: x.clone().relu().clone()), "relu", False, True),
        (Call(lambda x: x * 2), None, False, False),
    ],
)
def test_activations(activation: nn.Module, name: str | None, saturates: bool, positive_only: bool) -> None:
    network = Ends(activation).eval()
    nn.init.constant_(network.conv.bias, 0.7)
    readouts = Readouts(network, (3, 6, 6))
    x = noise(4, 6)
    with torch.no_grad():
        linear = network.conv(x)
        expected = linear if saturates or name is None else activation(linear.clone())
    for layer in ("conv", "act"):
        (info,) = readouts.layers([layer])
        if layer == "act" and name is None:
            expected = linear * 2
        assert (info.activation, info.ranked_by == "pre_activation", info.positive_only) == (
            name,
            saturates,
            positive_only,
        )
        assert_reads(readouts, x, layer, expected)
    assert bool(readouts._candidates["conv"].census) == (name is not None)


def test_behind_a_pooling_the_pre_activation_is_gone() -> None:
    network = Ends(Call(lambda x: F.max_pool2d(F.relu6(x * 9), 2))).eval()
    readouts = Readouts(network, (3, 8, 8))
    (info,) = readouts.layers(["act"])
    assert (info.grid_h, info.activation, info.ranked_by, info.positive_only) == (4, "relu6", "response", True)
    x = noise(4, 8)
    with torch.no_grad():
        assert_reads(readouts, x, "act", network(x))


class TwoUsers(nn.Module):
    """A convolution whose output two operations use, and concatenated rectified branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.gate = nn.Conv2d(3, 4, 1)
        self.joined = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y * torch.sigmoid(y)
        return self.joined(torch.cat([F.relu(y), F.relu(self.gate(x))], 1))


def test_reading_stops_where_two_operations_use_the_tensor() -> None:
    network = TwoUsers().eval()
    readouts = Readouts(network, (3, PX, PX))
    x = noise()
    with torch.no_grad():
        assert_reads(readouts, x, "conv", network.conv(x))
        assert_reads(readouts, x, "joined", network(x))
    assert readouts.layers(["conv"])[0].activation is None
    assert (readouts.layers(["joined"])[0].activation, readouts.layers(["joined"])[0].positive_only) == ("relu", True)


class ThroughView(nn.Module):
    """The convolution's output is changed through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.kept = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :2].mul_(-1)
        return self.kept(y)


def test_a_tensor_changed_through_a_view_is_not_taken_for_the_old_one() -> None:
    readouts = Readouts(ThroughView().eval(), (3, PX, PX))
    with pytest.raises(ModelError, match="changed through a view"):
        readouts.layers(["kept"])


class Constants(nn.Module):
    """Makes tensors that do not derive from the input where freed ones lay, and a table on its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.constant = nn.ModuleList(nn.Identity() for _ in range(20))
        self.out = nn.Conv2d(4, 4, 1)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.table is None:
            self.table = torch.arange(4.0).reshape(4, 1, 1).exp()
        freed = [x + i for i in range(20)]
        x = sum(freed[1:], freed[0])
        freed.clear()
        for identity in self.constant:
            identity(torch.ones(x.shape))
        return F.relu(self.out(x + self.table))


def test_freed_tensors_and_first_forwards_leave_no_trace() -> None:
    readouts = Readouts(Constants().eval(), (3, PX, PX))
    assert readouts.names == ["conv", "out"]
    assert readouts.run(noise(), ["out"])["out"][0].shape == (3, 4)


# --- refusals -------------------------------------------------------------------------------------------------------


class ByData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.sum() > 1e4:
            x = x.abs().sqrt()
        if x.sum() < -1e4:
            return x
        return F.relu(self.other(x))


def test_a_course_that_depends_on_the_images_is_noticed() -> None:
    readouts = Readouts(ByData().eval(), (3, PX, PX))
    assert readouts.run(noise(), ["other"])["other"][0].shape == (3, 5)
    network = readouts._module
    assert isinstance(network, ByData)
    for sign in (1.0, -1.0):
        nn.init.constant_(network.conv.bias, sign * 1e4)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="its course depends on the images"):
            readouts.run(noise(), ["other"])


def test_chance_and_batch_statistics_are_refused() -> None:
    always = Ends(Call(lambda x: F.dropout(x, 0.1)))
    with pytest.raises(ModelError, match=r"dropout in act is active in eval mode"):
        Readouts(always.eval(), (3, PX, PX))
    batch = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ModelError, match=r"batch_norm in 1 uses the statistics of the batch"):
        Readouts(batch.eval(), (3, PX, PX))


def test_what_python_cannot_see_is_refused() -> None:
    scripted = torch.jit.trace(nn.Conv2d(3, 4, 1).eval(), noise(2))
    readouts = Readouts(nn.Sequential(scripted, nn.ReLU()).eval(), (3, PX, PX))
    with pytest.raises(ModelError, match="'1' cannot be read: its output is not made by torch calls"):
        readouts.layers(["1"])


def test_a_wrong_input_size_is_refused() -> None:
    with pytest.raises(ModelError, match=r"fails on a batch of shape \(2, 3, 24, 24\)"):
        Readouts(nn.Sequential(nn.Flatten(), nn.Linear(100, 3)).eval(), (3, PX, PX))


# --- odd neurons ----------------------------------------------------------------------------------------------------


def test_odd_neurons_keep_to_themselves() -> None:
    network = Ends(nn.ReLU()).eval()
    with torch.no_grad():
        network.conv.weight[0] = 0  # dead: always below zero
        network.conv.bias[0] = -1
        network.conv.weight[1] = 0  # constant
        network.conv.bias[1] = 2.5
        network.conv.weight[2] = torch.nan
    readouts = Readouts(network, (3, PX, PX))
    x = noise(4)
    response, position = readouts.run(x, ["conv"])["conv"]
    assert response[:, 0].tolist() == [0.0] * 4
    assert response[:, 1].tolist() == [2.5] * 4
    assert response[:, 2].isnan().all()
    assert position[:, :3].eq(0).all()
    with torch.no_grad():
        expected = network.conv(x)[:, 3].relu().flatten(1)
    torch.testing.assert_close(response[:, 3], expected.amax(1))
    assert torch.equal(position[:, 3], expected.argmax(1))
    x[2, :, 5, 7] = torch.nan
    spoiled = readouts.run(x, ["conv"])["conv"][0]
    assert spoiled.isnan().nonzero()[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert not spoiled[[0, 1, 3]][:, [0, 1, 3]].isnan().any()
    linear = Ends(nn.Identity()).eval()
    nn.init.constant_(linear.conv.bias, -50.0)
    assert (Readouts(linear, (3, PX, PX)).run(noise(), ["conv"])["conv"][0] < 0).all()


# --- ResNet-50 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet50() -> torchvision.models.ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.resnet50(weights=None).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias, std=0.2)
    return network


def resnet_by_hand(network: torchvision.models.ResNet, x: Tensor) -> dict[str, Tensor]:
    out = {}
    with torch.no_grad():
        x = out["conv1"] = network.bn1(network.conv1(x)).clamp(min=0)
        x = network.maxpool(x)
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for i, block in enumerate(getattr(network, stage)):
                name = f"{stage}.{i}"
                y = out[f"{name}.conv1"] = block.bn1(block.conv1(x)).clamp(min=0)
                y = out[f"{name}.conv2"] = block.bn2(block.conv2(y)).clamp(min=0)
                if block.downsample is not None:
                    x = out[f"{name}.downsample.0"] = block.downsample(x)
                x = out[name] = (block.bn3(block.conv3(y)) + x).clamp(min=0)
    return out


def test_resnet50_has_the_neurons_that_the_census_counts(resnet50: torchvision.models.ResNet) -> None:
    readouts = Readouts(resnet50, (3, 224, 224))
    census, blocks = readouts.layers("census"), readouts.layers("block_outputs")
    assert (len(census), sum(info.width for info in census)) == (49, 22_720)
    assert (len(blocks), sum(info.width for info in blocks)) == (16, 15_104)
    downsampling = readouts.layers(["**.downsample.0"])
    assert sum(info.width for info in [*census, *downsampling]) == 26_560
    assert {(info.layout, info.activation, info.ranked_by, info.positive_only) for info in census} == {
        ("nchw", "relu", "response", True)
    }
    assert [info.name for info in census[:4]] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0"]
    # Araujo et al. 2019 give 427 px for the last layer with the stride in the 3×3 convolutions.
    last = census[-1]
    assert (last.name, last.grid_h, last.receptive_px, last.stride_px, last.center_x_px) == (
        "layer4.2",
        7,
        427,
        32,
        0.5,
    )
    assert census[0].receptive_px == 7


def test_resnet50_is_read_after_norm_and_relu_everywhere(resnet50: torchvision.models.ResNet) -> None:
    readouts = Readouts(resnet50.to(memory_format=torch.channels_last), (3, 64, 64))
    x = noise(2, 64).contiguous(memory_format=torch.channels_last)
    expected = resnet_by_hand(resnet50, x)
    census = [info.name for info in readouts.layers("census")]
    assert set(census) == {name for name in expected if "downsample" not in name}
    found = readouts.run(x, list(expected))
    for name, tensor in expected.items():
        scale = tensor.abs().max()
        torch.testing.assert_close(found[name][0] / scale, tensor.amax((2, 3)) / scale, msg=name)
        flat = tensor.flatten(2)
        at = flat.gather(2, found[name][1][:, :, None])[:, :, 0]
        torch.testing.assert_close(at / scale, flat.amax(2) / scale, msg=name)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_energy_of_one_linear_neuron_is_its_squared_weights() -> None:
    network = nn.Sequential(nn.Conv2d(3, 1, 5, stride=4, padding=1)).eval()
    readouts = Readouts(network, (3, PX, PX))
    (info,) = readouts.layers(["0"])
    energy = readouts.input_energy(noise(3), "0", 7)
    x, y = info.center(info.central_position)
    expected = torch.zeros(PX, PX, dtype=torch.float64)
    top, left = int(y - 2.5), int(x - 2.5)
    expected[top : top + 5, left : left + 5] = 3 * network[0].weight[0].double().square().sum(0).detach()
    assert energy.dtype == torch.float64
    torch.testing.assert_close(energy, expected, rtol=1e-5, atol=1e-12)


class InPlace(nn.Module):
    """Works in place wherever it can, on its input as well."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
            self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(0.5) if self.inplace else x * 0.5
        x = F.silu(self.conv1(x), inplace=self.inplace)
        y = F.relu6(self.norm(self.conv2(x)), inplace=self.inplace)
        y = y.add_(x) if self.inplace else y + x
        return F.relu(y, inplace=self.inplace)


def test_energy_with_operations_in_place_equals_that_without() -> None:
    x = noise(2, seed=4)
    before = x.clone()
    inplace, plain = (Readouts(InPlace(flag).eval().requires_grad_(False), (3, PX, PX)) for flag in (True, False))
    for name in ("conv1", "conv2"):
        energy = inplace.input_energy(x, name, 1)
        torch.testing.assert_close(energy, plain.input_energy(x, name, 1))
        assert energy.sum() > 0
        torch.testing.assert_close(inplace.run(x.clone(), [name])[name][0], plain.run(x, [name])[name][0])
    assert torch.equal(x, before)


def test_energy_depends_on_its_seed_alone_and_has_the_expectation_of_single_neurons() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()
    readouts = Readouts(network, (3, PX, PX))
    x = noise(16)
    first = readouts.input_energy(x, "0", 5)
    torch.manual_seed(99)
    assert torch.equal(first, readouts.input_energy(x, "0", 5))
    assert not torch.equal(first, readouts.input_energy(x, "0", 6))
    single = 16 * network[0].weight.double().square().sum((0, 1)).detach()
    draws = torch.stack([readouts.input_energy(x, "0", seed)[11:14, 11:14] for seed in range(60)])
    standard_error = draws.std(0) / 60**0.5
    assert ((draws.mean(0) - single).abs() < 4.5 * standard_error).all()


def test_energy_needs_a_gradient() -> None:
    readouts = Readouts(Ends(Call(lambda x: x.detach().relu())).eval(), (3, PX, PX))
    with pytest.raises(ModelError, match="no gradient reaches the input from layer 'act'"):
        readouts.input_energy(noise(), "act", 0)
