"""Train the three teachers of this folder and write the shots that go with them.

    python samples/make_samples.py [--out DIR] [--epochs N]

Needs scikit-learn, torch, onnxscript and onnxruntime; about a minute on one CPU core. The images are
scikit-learn's digits, 1,797 gray ones of 8 x 8 pixels in ten classes, a part of "Optical Recognition of
Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0. They are
enlarged to 16 x 16 and split once, by seed and class by class:

    shots/<digit>/NN.png   10 of each class, for compressing; no teacher saw them
    held_out.npz           45 of each class, for judging; neither training nor shots hold them
    the rest               trains the teachers, and is not written

Pixels are 0-255 and the teachers take them divided by 255 (`--preset unit`):

    digits_vgg.onnx        plain stack with BatchNormalization nodes and two fully connected layers; opset 17
    digits_residual.onnx   three residual stages, projections between them; torch's default exporter
    digits_mobile.onnx     depthwise convolutions, two concatenated branches, a squeeze-and-excitation gate
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

SIDE = 16
SHOTS, HELD_OUT = 10, 45
SEED = 0


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution, BatchNormalization and ReLU; 'same' padding for odd kernels."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a depthwise convolution followed by a pointwise one."""
    return nn.Sequential(conv(inputs, inputs, 3, stride, groups=inputs), conv(inputs, outputs, 1))


class Vgg(nn.Module):
    """Three pairs of convolutions, pooled; Flatten and two fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 24), (24, 48), (48, 96)):
            layers += [conv(inputs, outputs), conv(outputs, outputs), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(96 * (SIDE // 8) ** 2, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        return self.classifier(torch.flatten(self.features(image), 1))


class Block(nn.Module):
    """Two convolutions and a shortcut: the identity, or a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv(inputs, outputs, 3, stride)
        self.second = conv(outputs, outputs)[:2]
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)[:2]

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


class Residual(nn.Module):
    """Three stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [conv(1, 16)]
        for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            blocks += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        return self.classifier(self.blocks(image).mean((2, 3)))


class Mobile(nn.Module):
    """Separable convolutions, a fork that ends in Concat, and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 32), separable(32, 48, 2))
        self.near = conv(48, 48, 1)
        self.wide = separable(48, 48)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(96, 24, 1), nn.ReLU(), nn.Conv2d(24, 96, 1), nn.Sigmoid()
        )
        self.tail = nn.Sequential(separable(96, 128, 2), separable(128, 128), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stem(image)
        x = torch.cat([self.near(x), self.wide(x)], 1)
        return self.classifier(torch.flatten(self.tail(x * self.gate(x)), 1))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the images (1797, 16, 16) uint8 and labels (1797,), one of each set of equal images."""
    data = load_digits()
    small = np.rint(data.images * 255 / 16).astype(np.uint8)
    large = [np.asarray(Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for x in small]
    images, first = np.unique(np.stack(large), axis=0, return_index=True)
    return images, data.target[first].astype(np.int64)


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of shots, held-out and training images."""
    generator = np.random.default_rng(SEED)
    parts: list[list[np.ndarray]] = [[], [], []]
    for digit in range(10):
        rows = generator.permutation(np.flatnonzero(labels == digit))
        for part, mine in zip(parts, np.split(rows, [SHOTS, SHOTS + HELD_OUT]), strict=True):
            part.append(mine)
    shots, held_out, training = (np.concatenate(part) for part in parts)
    return shots, held_out, training


def train(net: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    """Train on images shifted by up to two pixels; the learning rate rises and falls once."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.from_numpy(images)[:, None].float() / 255
    y = torch.from_numpy(labels)
    steps = epochs * -(-len(x) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            down, right = torch.randint(5, (2,), generator=generator).tolist()
            batch = functional.pad(x[rows], (2, 2, 2, 2))[:, :, down : down + SIDE, right : right + SIDE]
            loss = functional.cross_entropy(net(batch), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def export(net: nn.Module, path: Path, *, dynamo: bool) -> None:
    """Write the net with a free batch, by torch's default exporter or by the one before it."""
    example = torch.zeros(2, 1, SIDE, SIDE)
    names = {"input_names": ["image"], "output_names": ["logits"]}
    if dynamo:
        free = {"image": {0: torch.export.Dim("batch")}}
        torch.onnx.export(net, (example,), path, dynamic_shapes=free, external_data=False, verbose=False, **names)
        forget_traces(path)
        return
    with warnings.catch_warnings():
        # The exporter only says that it is the older one; it is the one that keeps BatchNormalization.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            net,
            (example,),
            path,
            dynamo=False,
            opset_version=17,
            # PRESERVE: the net is in evaluation mode already, and EVAL would fold BatchNormalization away.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            **names,
        )


def forget_traces(path: Path) -> None:
    """Remove what the default exporter notes of the file system: the call stack behind each node."""
    model = onnx.load(path)
    for node in model.graph.node:
        for place, entry in reversed(list(enumerate(node.metadata_props))):
            if entry.key.endswith("stack_trace"):
                del node.metadata_props[place]
    onnx.save(model, path)


def accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of images that onnxruntime classifies as labelled."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images[:, None].astype(np.float32) / 255})
    return float((logits.argmax(1) == labels).mean())


def main() -> None:
    """Write everything and print what each teacher scores on the held-out images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    # One thread, so that the same numbers come out whatever else the machine does, and no slower than busy ones.
    torch.set_num_threads(1)
    images, labels = digits()
    shots, held_out, training = split(labels)
    for place, row in enumerate(shots):
        folder = options.out / "shots" / str(labels[row])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row]).save(folder / f"{place % SHOTS:02d}.png")
    judge = {"images": images[held_out], "labels": labels[held_out]}
    np.savez_compressed(options.out / "held_out.npz", **judge)
    print(f"{len(training)} images train, {len(shots)} are shots, {len(held_out)} are held out")
    for name, kind, dynamo in (("vgg", Vgg, False), ("residual", Residual, True), ("mobile", Mobile, False)):
        started = time.perf_counter()
        torch.manual_seed(SEED)
        net = kind()
        train(net, images[training], labels[training], options.epochs)
        path = options.out / f"digits_{name}.onnx"
        export(net, path, dynamo=dynamo)
        seconds, size = time.perf_counter() - started, path.stat().st_size
        print(f"{path.name}: {accuracy(path, **judge):.2%} held out, {size:,} bytes, {seconds:.0f} s")


if __name__ == "__main__":
    main()
