"""Halve a model's MACs with a hundred shots, and print what that cost.

python samples/01_compress.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import xdonnx

HERE = Path(__file__).parent
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)

report = xdonnx.compress(
    HERE / "digits_vgg.onnx",
    HERE / "shots",  # or arrays, (images, labels), a DataLoader
    folder / "student.onnx",
    holdout=HERE / "held_out.npz",  # 450 images that no one fits to, for judging
    preset="unit",  # the teacher was trained on pixels / 255
    macs=0.5,
    max_drop=1,  # points of accuracy
    force=True,
)

assert report.teacher and report.student and report.fidelity and report.files.student
for name in ("bytes", "params", "macs"):
    before, after = getattr(report.teacher, name), getattr(report.student, name)
    print(f"{name:9}{before:>10,} -> {after:>9,}  ({after / before:.0%})")
print(f"{'accuracy':9}{report.fidelity.accuracy_teacher:>9.2f}% -> {report.fidelity.accuracy_student:>8.2f}%")
print(f"{report.status}: {report.files.student.path}, its report in {folder / 'student.report'}")
