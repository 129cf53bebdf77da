"""The promises again, on files that no one here wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import same_answers, same_interface

from xdonnx.errors import NothingToDo
from xdonnx.graph import read_net
from xdonnx.job import Job, run
from xdonnx.model import interface, read_proto
from xdonnx.patch import Patch, cut, masked

pytestmark = pytest.mark.corpus

TEACHERS = [
    "resnet20_cifar10_op13_folded", "resnet20_cifar10_op17_bn", "resnet20_cifar10_op20_default",
    "resnet56_cifar10_op17_bn", "resnet8_mlperftiny_op13", "squeezenet1_0_op13", "vgg16_half_cifar10_op17_bn",
]  # fmt: skip
MODELS = [
    "basic_pitch_nmp", "gtcrn", "gtcrn_simple", "hand_landmark", "har_cnn", "light_squeezenet", "nanodet_m",
    "nanotrack3_backbone", "ocr_angle_net", "pfld68", "ppocrv2_det", "squeezenet_cifar10", "st_mobilenetv2_035",
    "st_yamnet256", "subpixel_cnn_sr", "trt_residual_block", "ultraface_rfb320", "ultraface_rfb320_nopost",
    "ultraface_slim320_simp", "vnn_cifar10_resnet2b", "vnn_marabou_cifar10_large", "yolox_nano",
]  # fmt: skip


def feeds(model: onnx.ModelProto, rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = {
        port.name: [size if isinstance(size, int) else (64 if at else rows) for at, size in enumerate(port.shape or ())]
        for port in interface(model).inputs
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", [f"teachers/{n}" for n in TEACHERS] + [f"models/{n}" for n in MODELS])
def test_masked_and_cut_students_of_real_files_answer_alike(name: str, data: Path) -> None:
    teacher = read_proto(data / f"{name}.onnx")
    net = read_net(teacher)
    assert net.groups
    random = np.random.default_rng(0)
    drop: set[int] = set()
    for group in net.groups:
        count = max(1, int(random.integers(0, len(group.ids) // 4 + 1)))
        drop |= {int(label) for label in random.choice(group.ids, count, replace=False)}
    patch = Patch({}, frozenset(drop))

    silenced, student = masked(net, patch), cut(net, patch)

    onnx.checker.check_model(student)
    same_interface(teacher, student)
    # 1e-4: logits of the teachers; detectors multiply boxes by strides and sigmoids near zero are inexact.
    same_answers(silenced, student, feeds(teacher, 2), tolerance=1e-4 if "teachers" in name else 1e-3)


@pytest.mark.paper
@pytest.mark.parametrize("method", ["l1-norm", "cross"])
@pytest.mark.parametrize("name", [*MODELS, "light_bvlc_alexnet", "light_densenet121", "light_resnet50", "light_vgg19"])
def test_every_real_file_is_compressed_or_says_why_not(name: str, method: str, data: Path, tmp_path: Path) -> None:
    sizes = {"x": (1, 3, 64, 64)} if name == "ppocrv2_det" else {}
    job = Job(
        model=data / "models" / f"{name}.onnx",
        out=tmp_path / "student.onnx",
        synthetic_shots=4,
        holdout="0.25",
        keep=0.75,
        method=method,
        input_shape=sizes,
    )
    try:
        report = run(job)
    except NothingToDo as error:
        assert name.startswith("gtcrn") and "--residual would free" in str(error)
        return
    assert report.exit_code == 0
    assert report.student and report.teacher and report.student.macs < report.teacher.macs
