"""`doctor` tells what is missing from what does not fit, and gives the line that mends it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from program import call

from xdonnx import doctor

WELL = {
    "xdonnx": "0.1.0", "numpy": "2.0", "onnx": "1.18", "onnx-ir": "1.1", "onnxscript": "0.5", "protobuf": "6",
    "scipy": "1.11", "jinja2": "3.1", "onnx2torch": "1.5.15", "torch": "2.7.0",
    "torchvision": "0.22.0", "pillow": "11", "pydantic": "2.9", "typer": "0.20", "rich": "14",
    "psutil": "7",
    "onnxruntime-gpu": "1.22",
}  # fmt: skip
TORCH = {"gpus": [], "cuda": None}
SESSIONS = {"offers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "cpu": True, "cuda": False}


def examined(
    monkeypatch: pytest.MonkeyPatch,
    *,
    versions: Mapping[str, str | None] | None = None,
    torch: Mapping[str, Any] | None = None,
    sessions: Mapping[str, Any] | None = None,
    gpu: bool = False,
) -> doctor.Health:
    """Return what doctor says of a machine that is described here."""
    known = WELL | dict(versions or {})
    answers = {"torch_facts()": dict(TORCH | (torch or {})), "session_facts()": dict(SESSIONS | (sessions or {}))}
    monkeypatch.setattr(doctor, "version", known.get)
    monkeypatch.setattr(doctor, "_ask", answers.__getitem__)
    monkeypatch.setattr(doctor, "_gpu_here", lambda: gpu)
    return doctor.examine()


def test_this_machine_can_compress() -> None:
    ended = call("doctor")

    assert ended.code == 0, ended.out
    assert "onnx2torch: " in ended.out and "All that compress needs is here." in ended.out


def test_json_has_all_of_it() -> None:
    ended = call("doctor", "--json")

    found = json.loads(ended.out)
    assert ended.code == 0 and found["well"] is True and not ended.err
    assert found["versions"]["xdonnx"] and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"][0] == "cpu" and "CPUExecutionProvider" in found["providers"]
    assert {"name", "text", "state", "cure"} == set(found["findings"][0])


def test_all_that_the_project_depends_on_is_looked_at() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}

    assert names == {*doctor.NEEDED, *doctor.RUNTIMES}


def test_a_machine_with_nothing_wrong_has_nothing_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    health = examined(monkeypatch)

    assert health.well and not any(finding.cure for finding in health.findings)


@pytest.mark.parametrize(
    ("state", "machine", "cure"),
    [
        ("ill", {"versions": {"onnx2torch": None}}, "python -m pip install onnx2torch"),
        ("ill", {"versions": {"torch": None, "torchvision": None}}, "python -m pip install torch torchvision"),
        ("ill", {"versions": {"onnxruntime-gpu": None}}, "python -m pip install onnxruntime"),
        (
            "ill",
            {"torch": {"broken": "torchvision", "why": "RuntimeError: operator torchvision::nms does not exist"}},
            "python -m pip install --upgrade torch torchvision",
        ),
        (
            "ill",
            {"versions": {"torch": "2.7.0+cu126"}, "torch": {"broken": "torchvision", "why": "RuntimeError"}},
            "python -m pip install --upgrade torch==2.7.0+cu126 torchvision "
            "--index-url https://download.pytorch.org/whl/cu126",
        ),
        ("ill", {"torch": {"broken": "onnx2torch", "why": "ImportError"}}, "--upgrade onnx2torch onnx"),
        ("ill", {"sessions": {"broken": "python", "why": "ImportError"}}, "--no-deps onnxruntime-gpu"),
        ("ill", {"sessions": {"cpu": False}}, "--force-reinstall --no-deps onnxruntime-gpu"),
        ("note", {"versions": {"onnxruntime": "1.22"}}, "uninstall -y onnxruntime onnxruntime-gpu"),
        ("note", {"gpu": True}, "--force-reinstall torch torchvision"),
        ("note", {"gpu": True, "torch": {"cuda": "12.6"}}, "nvidia-smi"),
        ("note", {"gpu": True, "torch": {"gpus": ["H100"], "cuda": "12.6"}}, '"onnxruntime-gpu[cuda,cudnn]"'),
    ],
)
def test_what_is_wrong_is_found_and_mended(
    monkeypatch: pytest.MonkeyPatch, state: str, machine: dict[str, Any], cure: str
) -> None:
    health = examined(monkeypatch, **machine)

    assert any(finding.state == state and cure in finding.cure for finding in health.findings), health.findings
    assert health.well is (state == "note")


def test_a_gpu_that_all_can_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    health = examined(monkeypatch, gpu=True, torch={"gpus": ["H100"], "cuda": "12.6"}, sessions={"cuda": True})

    assert health.well and not any(finding.cure for finding in health.findings)
    assert "2.7.0, CUDA 12.6: H100" in {finding.text for finding in health.findings}
    assert health.devices == ("cpu", "cuda:0")
    assert health.providers == ("CPUExecutionProvider", "CUDAExecutionProvider")


def package(folder: Path, name: str, version: str, source: str) -> None:
    """Write a package that is found before the installed one."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    facts = folder / f"{name}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_cpu_build_of_torch_beside_the_registrys_torchvision_is_told_and_mended(tmp_path: Path) -> None:
    package(
        tmp_path,
        "torch",
        "2.7.0+cpu",
        "class cuda:\n    is_available = staticmethod(lambda: False)\nclass version:\n    cuda = None\n",
    )
    package(tmp_path, "torchvision", "0.22.0", "raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = "import sys; from xdonnx_cli.app import run; sys.exit(run(['doctor']))"
    here = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "80"}

    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, check=False)

    assert done.returncode == 8, done.stderr
    assert "BROKEN torchvision: 0.22.0 does not fit torch 2.7.0+cpu" in done.stdout
    assert "operator torchvision::nms does not exist" in " ".join(done.stdout.split())
    line = "python -m pip install --upgrade torch==2.7.0+cpu torchvision"
    # In one piece, however narrow the window is: it will be copied.
    assert f"{line} --index-url https://download.pytorch.org/whl/cpu\n" in done.stdout


def test_a_package_that_crashes_python_is_an_answer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "torch", "9.9", "import os; os._exit(139)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert doctor._ask("torch_facts()") == {"broken": "python", "why": "ended with code 139"}
