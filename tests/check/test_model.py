"""Reading refuses what is broken and says why; writing leaves all of the file or none of it."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper, parser

import xdonnx.model
from xdonnx.errors import JobError, MachineError, ModelError
from xdonnx.model import (
    Port,
    differences,
    file_bytes,
    fingerprint,
    interface,
    read_model,
    read_proto,
    write_proto,
)
from xdonnx.runtime import answer, open_session


def large_classifier() -> onnx.ModelProto:
    """Return a model with a weight beyond the kilobyte below which onnx keeps tensors in the file."""
    proto = tiny.with_weights(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,20] x) => (float[N,30] y) { y = MatMul (x, w) }',
        tiny.random_weights(0, {"w": (20, 30)}),
    )
    return proto


def same_model(first: onnx.ModelProto, second: onnx.ModelProto) -> bool:
    """Compare all but the mark that a weight lies inside the file, which may be written or left out."""
    for proto in (first, second):
        for tensor in proto.graph.initializer:
            tensor.ClearField("data_location")
    return first == second


def test_a_missing_file_and_a_folder_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at"):
        read_proto(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        read_proto(tmp_path)


def test_a_file_that_may_not_be_read_is_a_mistake_in_the_model(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"1")

    def locked(*_args, **_how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(onnx, "load", locked)
    with pytest.raises(ModelError, match=r"'.*a.onnx' cannot be read: Permission denied"):
        read_proto(path)


def test_what_git_lfs_has_not_fetched_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1234\n")
    with pytest.raises(ModelError, match=r"Git LFS pointer(.|\n)*git lfs pull"):
        read_proto(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_model_of_pytorch_is_told_how_to_become_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"torch\.onnx\.export"):
        read_proto(path)


@pytest.mark.parametrize("content", [b"", b"hello, I am no model", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"not an ONNX file|holds no ONNX graph"):
        read_proto(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    content = tiny.classifier().SerializeToString()
    path = tmp_path / "a.onnx"
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ModelError, match="cut short"):
        read_proto(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda proto: proto.ClearField("opset_import"),
        lambda proto: proto.graph.node[0].input.__setitem__(0, "nowhere"),
        lambda proto: setattr(proto.graph.node[0], "op_type", "Konv"),
        lambda proto: setattr(proto.graph.initializer[0], "raw_data", b"1234"),
    ],
    ids=["no opset", "unknown input", "unknown operator", "short weight"],
)
def test_an_invalid_graph_is_refused_by_name(tmp_path: Path, damage) -> None:
    proto = tiny.classifier()
    damage(proto)
    with pytest.raises(ModelError, match=r"a\.onnx' is not a valid ONNX model"):
        read_proto(tiny.saved(proto, tmp_path / "a.onnx"))


def test_external_data_is_written_beside_the_model_and_read_back(tmp_path: Path) -> None:
    proto, path = large_classifier(), tmp_path / "a.onnx"

    write_proto(proto, path, external="always")

    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    assert path.stat().st_size < 1000 and file_bytes(path) > 2400
    assert file_bytes(path) == path.stat().st_size + (tmp_path / "a.onnx.data").stat().st_size
    assert same_model(read_proto(path), proto)
    feed = {"x": np.ones((2, 20), np.float32)}
    here, there = answer(open_session(proto), feed), answer(open_session(path), feed)
    np.testing.assert_array_equal(here["y"], there["y"])


def test_both_files_are_readable_by_the_same_people(tmp_path: Path) -> None:
    write_proto(large_classifier(), tmp_path / "a.onnx", external="always")
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    write_proto(large_classifier(), tmp_path / "a.onnx", external="always")
    (tmp_path / "a.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"keeps weights in 'a\.onnx\.data'"):
        read_proto(tmp_path / "a.onnx")


def test_truncated_external_data_is_refused(tmp_path: Path) -> None:
    write_proto(large_classifier(), tmp_path / "a.onnx", external="always")
    data = tmp_path / "a.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ModelError, match="external data of"):
        read_proto(tmp_path / "a.onnx")


def test_weights_go_outside_by_themselves_once_the_file_would_pass_the_limit(tmp_path: Path, monkeypatch) -> None:
    proto = large_classifier()
    write_proto(proto, tmp_path / "within.onnx")
    monkeypatch.setattr(xdonnx.model, "PROTOBUF_LIMIT", 2000)

    write_proto(proto, tmp_path / "beyond.onnx")

    assert sorted(f.name for f in tmp_path.iterdir()) == ["beyond.onnx", "beyond.onnx.data", "within.onnx"]
    with pytest.raises(JobError, match="external-data"):
        write_proto(proto, tmp_path / "never.onnx", external="never")


@pytest.mark.parametrize("external", ["never", "always"])
def test_a_failing_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch, external: str) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"the old model")
    write = onnx.save

    def full_disk(proto, target, **how) -> None:
        write(proto, target, **how)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx, "save", full_disk)
    with pytest.raises(MachineError, match="No space left"):
        write_proto(large_classifier(), path, external=external)

    assert path.read_bytes() == b"the old model"
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_a_folder_that_is_not_there_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot write"):
        write_proto(tiny.classifier(), tmp_path / "nowhere" / "a.onnx")


def test_writing_replaces_the_old_file_and_does_not_change_the_model(tmp_path: Path) -> None:
    proto, path = large_classifier(), tmp_path / "a.onnx"
    before = proto.SerializeToString()
    path.write_bytes(b"the old model")
    write_proto(proto, path, external="always")
    assert same_model(read_proto(path), proto)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_initializers_are_made_dense(tmp_path: Path, flat: bool) -> None:
    dense = np.zeros((4, 3), np.float32)
    dense[0, 2], dense[3, 1] = 5, 7
    places = np.flatnonzero(dense) if flat else np.argwhere(dense)
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,3] y) { y = MatMul (x, w) }'
    )
    values = numpy_helper.from_array(dense[dense != 0], "w")
    indices = numpy_helper.from_array(places.astype(np.int64), "w_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    path = tiny.saved(proto, tmp_path / "a.onnx")

    read = read_proto(path)

    assert not read.graph.sparse_initializer
    np.testing.assert_array_equal(numpy_helper.to_array(read.graph.initializer[0]), dense)
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    sparse, full = answer(open_session(path), {"x": x}), answer(open_session(read), {"x": x})
    np.testing.assert_allclose(sparse["y"], full["y"], rtol=1e-6)
    weight = read_model(path).graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), dense)


def test_fingerprint_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    path = tiny.saved(tiny.classifier(), tmp_path / "a.onnx")
    assert fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_interface_lists_what_callers_feed_and_get() -> None:
    found = interface(tiny.classifier())
    assert found.inputs == (Port("image", "float32", ("N", 3, 6, 6)),)
    assert found.outputs == (Port("logits", "float32", ("N", 5)),)
    assert (found.opset, found.metadata) == ({"": 17}, {"author": "someone"})
    assert str(found.inputs[0]) == "image float32 [N, 3, 6, 6]"


def test_interface_is_the_same_of_an_editable_model(tmp_path: Path) -> None:
    path = tiny.saved(tiny.classifier(), tmp_path / "a.onnx")
    model = read_model(path)
    assert isinstance(model, ir.Model)
    assert interface(model) == interface(read_proto(path))


def test_initializers_listed_as_inputs_are_not_for_callers() -> None:
    proto = tiny.classifier()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims))
    assert interface(proto) == interface(tiny.classifier())


def rename_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "picture"


def halve_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def fix_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def more_outputs(proto: onnx.ModelProto) -> None:
    proto.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, None))


def newer_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 18


def other_metadata(proto: onnx.ModelProto) -> None:
    proto.metadata_props[0].value = "someone else"


def more_metadata(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="classes", value="cat,dog")


def other_doc(proto: onnx.ModelProto) -> None:
    proto.doc_string = "a model"


CHANGES = {
    rename_input: "input 'picture float32 [N, 3, 6, 6]', the teacher has 'image float32 [N, 3, 6, 6]'",
    halve_input: "input 'image float16 [N, 3, 6, 6]', the teacher has 'image float32 [N, 3, 6, 6]'",
    fix_batch: "input 'image float32 [1, 3, 6, 6]', the teacher has 'image float32 [N, 3, 6, 6]'",
    more_outputs: "2 outputs, the teacher has 1",
    newer_opset: "opset {'': 18}, the teacher has {'': 17}",
    other_metadata: "metadata 'author' is 'someone else', the teacher has 'someone'",
    more_metadata: "metadata 'classes' is not the teacher's",
    other_doc: "the doc string differs",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_difference_of_the_interface_is_named(change) -> None:
    teacher, student = tiny.classifier(), tiny.classifier()
    change(student)
    assert differences(interface(teacher), interface(student)) == [CHANGES[change]]


def test_our_own_metadata_is_no_difference() -> None:
    student = tiny.classifier()
    student.metadata_props.add(key="xdonnx.version", value="1")
    assert differences(interface(tiny.classifier()), interface(student)) == []
