"""Torch-Pruning as an oracle: every group of channels that it finds on the PyTorch net, the labels find on the file."""

from __future__ import annotations

import io
import warnings

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from xdonnx.graph import read_net

pruning = pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """Two blocks with identity shortcuts behind a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Run both blocks."""
        x = functional.relu(self.stem(x))
        x = functional.relu(x + self.a2(functional.relu(self.a1(x))))
        x = functional.relu(x + self.b2(functional.relu(self.b1(x))))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Three layers that each read all before them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.three = nn.Conv2d(10, 5, 3, padding=1)
        self.last = nn.Conv2d(15, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate as they come."""
        x1 = functional.relu(self.one(x))
        x2 = functional.relu(self.two(x1))
        x3 = functional.relu(self.three(torch.cat([x1, x2], 1)))
        y = functional.relu(self.last(torch.cat([x1, x2, x3], 1)))
        return self.head(functional.adaptive_avg_pool2d(y, 1).flatten(1))


class Mobile(nn.Module):
    """An inverted residual: expand, depthwise, project."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.depth = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Add the projection to the stem."""
        x = functional.relu6(self.stem(x))
        y = functional.relu6(self.depth(functional.relu6(self.expand(x))))
        return self.head(functional.adaptive_avg_pool2d(x + self.project(y), 1).flatten(1))


class Excited(nn.Module):
    """Squeeze and excitation between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.squeeze, self.excite, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the first by its own means."""
        x = functional.relu(self.one(x))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1)))))
        return self.head(functional.adaptive_avg_pool2d(functional.relu(self.two(x * gate)), 1).flatten(1))


def theirs(net: nn.Module, image: Tensor) -> set[tuple[int, frozenset[str]]]:
    """Return (channels, layers whose outputs go together) as Torch-Pruning groups them, the classifier's left out."""
    names = {module: name for name, module in net.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about how it is traced
        graph = pruning.DependencyGraph().build_dependency(net, example_inputs=image)
        found = set()
        for group in graph.get_all_groups(ignored_layers=[net.head]):
            made = set()
            for dependency, _ in group:
                module = dependency.target.module
                outputs = (pruning.prune_conv_out_channels, pruning.prune_depthwise_conv_out_channels)
                if isinstance(module, nn.Conv2d) and dependency.handler in outputs:
                    made.add(names[module])
            found.add((len(group[0].idxs), frozenset(made)))
    return found


def ours(net: nn.Module, image: Tensor) -> set[tuple[int, frozenset[str]]]:
    """Return the same of the exported file."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter announces its end
        torch.onnx.export(net, (image,), stream, dynamo=False, opset_version=17, input_names=["image"])
    parsed = read_net(onnx.load_from_string(stream.getvalue()))
    found = set()
    for group in parsed.groups:
        makers = {
            layer.node.split("/")[1]
            for layer in parsed.layers.values()
            if set(map(int, layer.out_ids)) & set(map(int, group.ids))
        }
        found.add((len(group.ids), frozenset(makers)))
    return found


@pytest.mark.parametrize("kind", [Residual, Dense, Mobile, Excited])
def test_every_group_that_torch_pruning_finds_the_labels_find(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, image = kind().eval(), torch.randn(1, 3, 8, 8)
    expected = theirs(net, image)
    assert len(expected) >= 2
    assert ours(net, image) == expected
