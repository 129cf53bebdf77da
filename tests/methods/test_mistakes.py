"""Whoever writes a job in Python and slips is told which field, what was given, and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from xdonnx.errors import JobError, ShotsError, XdonnxError
from xdonnx.gate import Gate
from xdonnx.images import Preprocess
from xdonnx.job import Job, prepared

SAMPLES = Path(__file__).parents[2] / "samples"
GOOD = {"model": SAMPLES / "digits_mobile.onnx", "out": "student.onnx", "shots": SAMPLES / "shots"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stucture": "channel"}, "a job has no field 'stucture'. Did you mean 'structure'?\n  Fields are the flags"),
        ({"structure": 3}, "structure is 3.\n  It takes text."),
        ({"macs": "half"}, "macs is 'half'.\n  It takes a number, such as 0.5."),
        ({"ridge": "1%"}, "ridge is '1%'.\n  It takes a number, such as 0.5."),
        ({"per_class": "few"}, "per_class is 'few'.\n  It takes a whole number."),
        ({"per_class": 1.5}, "per_class is 1.5.\n  It takes a whole number."),
        ({"residual": "perhaps"}, "residual is 'perhaps'.\n  It takes True or False."),
        ({"plan": 3}, "plan is 3.\n  It takes a path."),
        ({"method": ()}, "method is ().\n  It takes at least one."),
        ({"shots": np.zeros((2, 2))}, "shots.0 is array([0., 0.]).\n  It takes text.\n  Another field is wrong too."),
        ({"seed": "a", "force": "b", "macs": "c"}, "\n  2 more of its fields are wrong."),
        ({"model": None}, "model is None.\n  It takes a path."),
        ({"input_shape": {"image": "1x3"}}, "input_shape.image is '1x3'.\n  It takes a tuple."),
        ({"gate": 5}, "gate is 5.\n  It takes "),
    ],
)
def test_a_field_of_the_wrong_kind_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as told:
        Job(**GOOD | fields)

    assert message in str(told.value) and "pydantic" not in str(told.value)
    assert told.value.exit_code == 2


def test_a_share_may_be_said_in_per_cent() -> None:
    assert [Job(**GOOD | {name: "99.9 %"}).model_dump()[name] for name in ("keep", "macs", "params")] == [0.999] * 3
    assert Job(**GOOD | {"macs": "50%"}) == Job(**GOOD | {"macs": 0.5})


def test_a_field_that_is_missing_is_told() -> None:
    with pytest.raises(JobError, match=r"^a job needs 'model'\."):
        Job(out=Path("student.onnx"))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structure": "chanel"}, "'chanel'. Did you mean 'channel'?"),
        ({"method": "cros"}, "unknown method 'cros'. Did you mean 'cross'?"),
        ({"connection": "sft"}, "'sft'. Did you mean 'soft'?"),
        ({"solver": "admn"}, "'admn'"),
        ({"preset_effort": "bst"}, "'bst'. Did you mean 'best'?"),
        ({"allocation": "uniformly"}, "'uniformly'. Did you mean 'uniform'?"),
        ({"device": "gpu"}, "'gpu'"),
        ({"shots": "nowhere"}, "'nowhere'"),
    ],
)
def test_a_word_that_no_option_knows_is_told_before_any_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(XdonnxError) as told:
        prepared(Job(**GOOD | fields), writes=False)

    assert message in str(told.value) and "\n  " in str(told.value), "what to do stands on a line of its own"


def test_one_may_stand_for_many_and_a_number_for_its_text() -> None:
    job = Job(**GOOD | {"method": "cross", "shots": "photos", "exclude": "stem*", "holdout": 0.25})

    assert (job.method, job.shots, job.exclude, job.holdout) == (("cross",), ("photos",), ("stem*",), "0.25")


def regressor(folder: Path) -> Path:
    """Return a model that makes images of images."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,1,16,16] image) => (float[N,4,16,16] y) {'
    proto = onnx.parser.parse_model(text + " a = Conv <pads = [1,1,1,1]> (image, w)  b = Relu (a)  y = Conv (b, v) }")
    generator = np.random.default_rng(0)
    for name, shape in {"w": (8, 1, 3, 3), "v": (4, 8, 1, 1)}.items():
        values = generator.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, folder / "regressor.onnx")
    return folder / "regressor.onnx"


def test_a_limit_that_no_answer_of_the_model_shows_is_told_before_any_work(tmp_path: Path) -> None:
    fields = GOOD | {"model": regressor(tmp_path), "out": tmp_path / "student.onnx"}
    prepared(Job(**fields, gate=Gate(max_error=0.1)))
    with pytest.raises(JobError, match=r"gate max_drop: no output classifies.*\n.*max_error"):
        prepared(Job(**fields, gate=Gate(max_drop=1)))


@pytest.mark.parametrize("row", [0, 99])
def test_a_label_beyond_the_classes_is_told_before_any_work_wherever_it_is(tmp_path: Path, row: int) -> None:
    """Of the samples that fitted it was never noticed, of those that judged only after all was done."""
    with np.load(SAMPLES / "held_out.npz") as held:
        arrays = {"images": held["images"][:100], "labels": held["labels"][:100].copy()}
    arrays["labels"][row] = 10
    np.savez(tmp_path / "shots.npz", **arrays)
    out = tmp_path / "student.onnx"
    for more in ({"shots": tmp_path / "shots.npz"}, {"holdout": tmp_path / "shots.npz"}):
        with pytest.raises(ShotsError, match="labels run from 0 to 10, the model's classes to 9"):
            prepared(Job(**GOOD | {"out": out, "preprocess": Preprocess("unit")} | more))
    # Of a model without classes labels are no business.
    fields = GOOD | {"model": regressor(tmp_path), "out": out, "shots": tmp_path / "shots.npz"}
    prepared(Job(**fields, preprocess=Preprocess("unit")))
