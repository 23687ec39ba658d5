"""Small networks made in the tests, with neurons of known behaviour."""

import torch
from torch import Tensor, nn

EDGE_NEURONS = {"dead": 0, "constant": 1, "nan": 2, "twin_a": 3, "twin_b": 4, "rare": 5}
"""Neurons of `EdgeNet.edges` whose behaviour is known."""


class EdgeNet(nn.Module):
    """Two convolutions, then a layer with one neuron of every awkward kind among ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.mid = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.saturating = nn.ReLU6(inplace=True)
        self.edges = Edges()
        self.capped = Capped()
        self.signed = nn.Conv2d(5, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.saturating(self.mid(x))
        return self.signed(self.capped(torch.nan_to_num(self.edges(x)))).mean((2, 3))


class Edges(nn.Module):
    """Ten neurons after a ReLU, of which `EDGE_NEURONS` are set by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 10, 3, stride=2, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Capped(nn.Module):
    """Five neurons with a ceiling that no activation function tells of: nearly every image ties at it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.minimum(x, torch.full_like(x, 0.01))


def edge_net() -> nn.Module:
    """The network, the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = EdgeNet()
        with torch.no_grad():
            net.mid.weight.mul_(8.0)
            conv = net.edges.conv
            conv.weight[EDGE_NEURONS["dead"]] = 0.0
            conv.bias[EDGE_NEURONS["dead"]] = -1.0
            conv.weight[EDGE_NEURONS["constant"]] = 0.0
            conv.bias[EDGE_NEURONS["constant"]] = 0.5
            conv.bias[EDGE_NEURONS["nan"]] = torch.nan
            conv.weight[EDGE_NEURONS["twin_b"]] = conv.weight[EDGE_NEURONS["twin_a"]]
            conv.bias[EDGE_NEURONS["twin_b"]] = conv.bias[EDGE_NEURONS["twin_a"]]
            net.signed.weight.fill_(-0.1)
            net.signed.bias.fill_(-1.0)
            net.capped.conv.bias.fill_(0.005)
    return net.eval()


def two_by_two() -> nn.Module:
    """One convolution whose neurons are the mean of each colour over 2 × 2 pixels."""
    conv = nn.Conv2d(3, 3, 2, stride=2, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        for c in range(3):
            conv.weight[c, c] = 0.25
    return nn.Sequential(conv, nn.ReLU()).eval()


def not_a_module() -> str:
    """What a factory must not return."""
    return "a string"
