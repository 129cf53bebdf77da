"""What this machine has for a job, what does not fit, and the line that mends it.

Nothing but the standard library, and our errors, is imported with this module: it has to work where a package is
missing or broken.
Packages are asked in processes of their own: their imports write to stderr, raise almost anything, may even crash.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from xdonnx.errors import JobError, MachineError

NEEDED = (
    "numpy", "onnx", "onnx-ir", "onnxscript", "protobuf", "onnx2torch", "torch", "torchvision", "pillow", "pydantic",
    "scipy", "jinja2", "typer", "rich", "psutil",
)  # fmt: skip
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")

# A cold import of torch takes long on a slow disk; longer than this it hangs.
_PATIENCE = 180


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    name, text : str
    state : {'well', 'note', 'ill'}
        'note': something is slower or less than it could be. 'ill': `compress` cannot run.
    cure : str
        What to type; empty where there is nothing to mend.
    """

    name: str
    text: str
    state: str = "well"
    cure: str = ""


@dataclass(frozen=True)
class Health:
    """All findings, the version of every package, None where it is not installed, and what there is to run on.

    Parameters
    ----------
    versions : mapping
    findings : tuple of Finding
    devices : tuple of str
        As --device takes them: those that torch can fit on.
    providers : tuple of str
        What onnxruntime really runs a model with.
    """

    versions: Mapping[str, str | None]
    findings: tuple[Finding, ...]
    devices: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()

    @property
    def well(self) -> bool:
        """Whether `compress` can run."""
        return all(finding.state != "ill" for finding in self.findings)


def examine() -> Health:
    """Look at the packages, the devices and what onnxruntime can use of them."""
    versions = {name: version(name) for name in ("xdonnx", *NEEDED, *RUNTIMES)}
    torch = _ask("torch_facts()") if versions["torch"] else {}
    sessions = _ask("session_facts()")
    findings = (
        *_packages(versions),
        *_torch(versions, torch),
        *_onnxruntime(versions, sessions, gpus=bool(torch.get("gpus")) or _gpu_here()),
    )
    devices = ("cpu", *(f"cuda:{at}" for at in range(len(torch["gpus"])))) if "gpus" in torch else ()
    tried = (("cpu", "CPUExecutionProvider"), ("cuda", "CUDAExecutionProvider"))
    return Health(versions, findings, devices, tuple(name for key, name in tried if sessions.get(key)))


def version(package: str) -> str | None:
    """Return the installed version of a package, None where there is none; imports nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def runs_on(device: str) -> bool:
    """Return whether onnxruntime really runs a model on 'cpu' or 'cuda[:n]', rather than only offering to."""
    import numpy as np
    import onnx

    from xdonnx.errors import XdonnxError
    from xdonnx.runtime import answer, open_session

    text = '<ir_version: 8, opset_import: ["": 13]> probe (float[1] x) => (float[1] y) { y = Neg (x) }'
    wanted = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    try:
        session = open_session(onnx.parser.parse_model(text), device=device)
        answer(session, {"x": np.ones(1, np.float32)})
    except XdonnxError:
        return False
    return bool(session.get_providers()[0] == wanted)


def usable(device: str) -> bool:
    """Return the same without a word: in a process of its own, as onnxruntime complains straight to stderr."""
    return bool(_ask(f"{{'works': runs_on({device!r})}}").get("works"))


def check_device(device: str) -> None:
    """Raise JobError for a device that has no such name, MachineError where onnxruntime cannot run on it."""
    if device == "cpu":
        return
    name, _, number = device.partition(":")
    if name != "cuda" or not (number.isdecimal() or not number):
        raise JobError(f"unknown device '{device}'.\n  Devices: cpu, cuda:0.")
    if not usable(device):
        raise MachineError(f"onnxruntime cannot run on '{device}'.\n  See what is missing: xdonnx doctor")


def torch_facts() -> dict[str, Any]:
    """Import torch and what stands on it, and say which of them does not import."""
    facts: dict[str, Any] = {}
    for name in ("torch", "torchvision", "onnx2torch"):
        try:
            module = import_module(name)
        except Exception as error:  # torchvision for another torch raises almost anything
            reason = str(error).splitlines()[0] if str(error) else ""
            return facts | {"broken": name, "why": f"{type(error).__name__}: {reason}".rstrip(": ")}
        if name == "torch":
            count = module.cuda.device_count() if module.cuda.is_available() else 0
            facts["gpus"] = [module.cuda.get_device_name(at) for at in range(count)]
            facts["cuda"] = module.version.cuda
    return facts


def session_facts() -> dict[str, Any]:
    """Ask onnxruntime what it offers, and try it."""
    import onnxruntime

    return {
        "offers": onnxruntime.get_available_providers(),
        "cpu": runs_on("cpu"),
        "cuda": runs_on("cuda:0"),
    }


def _ask(question: str) -> dict[str, Any]:
    """Evaluate a call of this module's functions in a new process; what goes wrong there is the answer."""
    code = f"import json; from xdonnx.doctor import *; print(); print(json.dumps({question}))"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return {"broken": "python", "why": f"no answer within {_PATIENCE} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"broken": "python", "why": last[0].strip() if last else f"ended with code {done.returncode}"}
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


def _packages(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    missing = [name for name in NEEDED if versions[name] is None]
    if missing:
        line = f"python -m pip install {' '.join(missing)}"
        yield Finding("packages", f"not installed: {', '.join(missing)}", "ill", line)
    both = [name for name in RUNTIMES if versions[name] is not None]
    if not both:
        yield Finding("onnxruntime", "not installed", "ill", "python -m pip install onnxruntime")
    if len(both) > 1:
        yield Finding(
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files",
            "note",
            "python -m pip uninstall -y onnxruntime onnxruntime-gpu && python -m pip install onnxruntime-gpu",
        )


def _torch(versions: Mapping[str, str | None], facts: Mapping[str, Any]) -> Iterator[Finding]:
    torch, torchvision, onnx2torch = (versions[name] for name in ("torch", "torchvision", "onnx2torch"))
    if "gpus" in facts:
        yield _devices(f"{torch}", facts)
    if torch is None or torchvision is None or onnx2torch is None:
        return  # already said
    broken, why = facts.get("broken"), facts.get("why", "")
    if broken is None:
        yield Finding("onnx2torch", f"{onnx2torch} imports; torchvision {torchvision} fits torch")
    elif broken == "torchvision" or (broken == "onnx2torch" and "torchvision" in why):
        text = f"{torchvision} does not fit torch {torch}, so onnx2torch does not import ({why})"
        yield Finding("torchvision", text, "ill", _from_one_place(torch))
    elif broken == "onnx2torch":
        line = "python -m pip install --upgrade onnx2torch onnx"
        yield Finding("onnx2torch", f"{onnx2torch} does not import ({why})", "ill", line)
    else:
        yield Finding("torch", f"{torch} does not import ({why})", "ill", _from_one_place(torch, "--force-reinstall"))


def _devices(torch: str, facts: Mapping[str, Any]) -> Finding:
    if facts["gpus"]:
        return Finding("torch", f"{torch}, CUDA {facts['cuda']}: {', '.join(facts['gpus'])}")
    if not _gpu_here():
        return Finding("torch", f"{torch} runs on the CPU; there is no GPU")
    if facts["cuda"] is None:
        text = f"{torch} is a CPU build, and there is a GPU"
        return Finding("torch", text, "note", "python -m pip install --force-reinstall torch torchvision")
    return Finding(
        "torch", f"{torch} sees no GPU, though there is one: its driver may be too old", "note", "nvidia-smi"
    )


def _from_one_place(torch: str, how: str = "--upgrade") -> str:
    """Return the line that makes torch and torchvision fit each other.

    Builds such as 2.7.0+cpu come from torch's own index. The registry's torchvision of that number was built for
    another torch, and pip cannot tell; so both have to come from one place.
    """
    build = torch.partition("+")[2]
    if not build:
        return f"python -m pip install {how} torch torchvision"
    index = f"https://download.pytorch.org/whl/{build}"
    return f"python -m pip install {how} torch=={torch} torchvision --index-url {index}"


def _onnxruntime(versions: Mapping[str, str | None], facts: Mapping[str, Any], *, gpus: bool) -> Iterator[Finding]:
    installed = [name for name in RUNTIMES if versions[name] is not None]
    if not installed:
        return  # already said
    again = f"python -m pip install --force-reinstall --no-deps {installed[-1]}"
    if "broken" in facts:
        yield Finding("onnxruntime", f"it does not run ({facts['why']})", "ill", again)
        return
    offered = "CUDAExecutionProvider" in facts["offers"]
    if not facts["cpu"]:
        yield Finding("onnxruntime", "it cannot run a model of one node on the CPU", "ill", again)
    elif facts["cuda"]:
        yield Finding("onnxruntime", "runs on the CPU and on CUDA")
    elif not gpus:
        idle = " (it offers CUDA, but there is no GPU)" if offered else ""
        yield Finding("onnxruntime", f"runs on the CPU{idle}")
    else:
        why = "its CUDA provider does not load" if offered else "this build has no CUDA provider"
        text = f"runs on the CPU only, {why}: latency is measured there, the fit is as fast as ever"
        yield Finding("onnxruntime", text, "note", 'python -m pip install "onnxruntime-gpu[cuda,cudnn]"')


def _gpu_here() -> bool:
    """Return whether the machine has an NVIDIA GPU, whatever torch thinks of it."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
