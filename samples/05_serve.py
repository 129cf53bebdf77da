"""Serve the student as the teacher was served: onnxruntime, the same names, any batch size.

python samples/05_serve.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

import xdonnx

HERE = Path(__file__).parent
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)

student = folder / "student.onnx"
if not student.exists():  # 01_compress.py leaves one here
    xdonnx.compress(HERE / "digits_vgg.onnx", HERE / "shots", student, preset="unit")

# From here on nothing needs xdonnx or torch.
with np.load(HERE / "held_out.npz") as data:
    pixels, labels = data["images"], data["labels"]
images = pixels[:, None].astype(np.float32) / 255
for path in (HERE / "digits_vgg.onnx", student):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    answers = np.concatenate([session.run(["logits"], {"image": part})[0] for part in np.array_split(images, 7)])
    right = int((answers.argmax(1) == labels).sum())
    print(f"{path.name}: {right} of {len(labels)} right, {path.stat().st_size:,} bytes")
