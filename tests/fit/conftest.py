from collections import namedtuple

import pytest
import torch

from xdonnx.columns import Geometry

Layer = namedtuple("Layer", "geometry weight bias teacher student")


def _random_layer(seed, *, op="conv", groups=1, channels=4, outputs=6, kernel=(3, 3), size=(7, 6), shots=5, **how):
    """A small layer in float64 with two streams of inputs that resemble each other."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rank = len(kernel)
    geometry = Geometry(
        op,
        groups,
        kernel,
        how.get("strides", (1,) * rank),
        how.get("dilations", (1,) * rank),
        how.get("pads", (1,) * (2 * rank)),
        how.get("output_padding", ()),
    )
    if op == "linear":
        shape, inputs = (outputs, channels), (shots, *size, channels)
    elif op == "conv_transpose":
        shape, inputs = (channels, outputs // groups, *kernel), (shots, channels, *size)
    else:
        shape, inputs = (outputs, channels // groups, *kernel), (shots, channels, *size)
    teacher = normal(*inputs).relu()
    student = (teacher + 0.5 * normal(*inputs)).relu()
    return Layer(geometry, normal(*shape), normal(outputs), teacher, student)


@pytest.fixture(autouse=True)
def one_thread():
    # The problems are tiny: threads would only wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def random_layer():
    return _random_layer
