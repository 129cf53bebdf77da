"""Judge any two models on the same samples, and ask whether the small one may stand in for the large one.

python samples/02_gate.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import xdonnx
from xdonnx.report import gate_line

HERE = Path(__file__).parent
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# Two nets that were trained apart and take and give the same: whoever made the second one is not asked.
report = xdonnx.verify(
    HERE / "digits_vgg.onnx",
    HERE / "digits_mobile.onnx",
    HERE / "held_out.npz",
    preset="unit",
    max_drop=0.5,
    min_shrink=0.5,
    report_dir=folder / "gate.report",
)
print(f"measured: {report.status}, exit code {report.exit_code}")
for gate in report.gates:
    print(f"  {gate_line(gate)}")

# The same report judged by the far end of the 95 % interval: 450 samples cannot promise half a point.
strict = xdonnx.rejudge(xdonnx.read_report(folder / "gate.report"), xdonnx.Gate(max_drop=0.5, confidence=0.95))
print(f"at 95 %: {strict.status}, exit code {strict.exit_code}")
for gate in strict.gates:
    print(f"  {gate_line(gate)}")
