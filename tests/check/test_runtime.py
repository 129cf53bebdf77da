"""onnxruntime's failures become ours, and its threads keep out of each other's way."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import tiny
from onnx import parser

from xdonnx.errors import MachineError, ModelError
from xdonnx.runtime import answer, answer_all, open_session, providers

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def test_answers_have_the_outputs_names_and_values(tmp_path) -> None:
    proto = tiny.with_weights(
        f"{HEAD} g (float[N,2] x) => (float[N,2] y, float[N,2] z) {{ y = Relu (x)  z = Add (x, w) }}",
        {"w": np.array([1, 2], np.float32)},
    )
    x = np.array([[-1, 3]], np.float32)
    session = open_session(tiny.saved(proto, tmp_path / "a.onnx"))
    found = answer(session, {"x": x})
    assert list(found) == ["y", "z"]
    np.testing.assert_array_equal(found["y"], [[0, 3]])
    np.testing.assert_array_equal(found["z"], [[0, 5]])
    assert list(answer(session, {"x": x}, ["z"])) == ["z"]


def test_answers_of_many_rows_do_not_depend_on_how_they_are_batched() -> None:
    session, shots = open_session(tiny.classifier()), tiny.images(7)
    whole = answer(session, shots.inputs)["logits"]
    np.testing.assert_allclose(answer_all(session, shots.inputs, batch=3)["logits"], whole, rtol=1e-5)


def test_a_model_that_onnxruntime_cannot_run_is_the_models_fault() -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "custom" : 1]> '
        "g (float[N,2] x) => (float[N,2] y) { y = custom.Unheard (x) }"
    )
    with pytest.raises(ModelError, match=r"cannot run the model\.\n.*Unheard"):
        open_session(proto)


@pytest.mark.parametrize(
    "feed",
    [
        {"image": np.zeros((1, 4, 6, 6), np.float32)},
        {"image": np.zeros((1, 3, 6, 6), np.float64)},
        {"picture": np.zeros((1, 3, 6, 6), np.float32)},
    ],
    ids=["shape", "type", "name"],
)
def test_a_feed_that_does_not_fit_is_refused(feed: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelError, match="failed while running"):
        answer(open_session(tiny.classifier()), feed)


def test_a_full_memory_is_the_machines_fault() -> None:
    proto = parser.parse_model(f"{HEAD} g (int64[1] x) => (float[N] y) {{ y = ConstantOfShape (x) }}")
    session = open_session(proto)
    with pytest.raises(MachineError, match="Out of memory"):
        answer(session, {"x": np.array([10**14])})


def test_the_cpu_alone_is_asked_for_unless_a_gpu_is() -> None:
    assert providers() == ["CPUExecutionProvider"]
    assert open_session(tiny.classifier()).get_providers() == ["CPUExecutionProvider"]


def test_the_gpu_that_was_asked_for_is_named_by_its_number(monkeypatch, capsys) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("cannot load libcuda"), raising=False)

    assert providers("cuda:1")[0] == ("CUDAExecutionProvider", {"device_id": "1"})
    assert providers("cuda")[0] == ("CUDAExecutionProvider", {"device_id": "0"})

    # stdout belongs to results
    assert capsys.readouterr().out == ""


def test_options_reach_the_session() -> None:
    session = open_session(tiny.classifier(), threads=1, optimize=False, spin=False)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
