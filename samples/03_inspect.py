"""See what a model has to give before compressing it: layers, groups of channels, and why others stay.

python samples/03_inspect.py [FOLDER]
"""

import json
import sys
import tempfile
from pathlib import Path

import xdonnx
from xdonnx.survey import survey

HERE = Path(__file__).parent
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)

net = xdonnx.read_net(xdonnx.read_proto(HERE / "digits_residual.onnx"))

found = survey(net)

print(f"{len(found.layers)} layers, {found.macs:,} MACs; channels that may go:")
for row in found.layers:
    print(f"  {row.layer:12} {row.op:5} {row.free:3} of {row.outputs:<4} {row.share:6.1%} of the MACs  {row.whole}")

print("one decision each:")
for group in net.groups:
    print(f"  {len(group.ids):3} channels made by {', '.join(group.producers)}, read by {', '.join(group.readers)}")

print(f"in reach: {found.plain.floor:.1%} of the MACs, {found.residual.floor:.1%} with residual=True")
(folder / "survey.json").write_text(json.dumps(found.to_dict(), indent=2))
