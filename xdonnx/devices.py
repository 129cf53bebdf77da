"""Where torch runs a job."""

from __future__ import annotations

import torch

from xdonnx.errors import JobError, MachineError


def usable_device(name: str) -> str:
    """Return the device that a name stands for: 'auto' is the first GPU, else the CPU.

    Raises
    ------
    JobError
        No device is called so, or none that is supported.
    MachineError
        There is no such GPU here.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise JobError(f"unknown device '{name}'.\n  Devices: auto, cpu, cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"device '{name}' is not here: torch sees {torch.cuda.device_count()} GPUs.\n  See xdonnx doctor."
        )
    if device.type not in ("cpu", "cuda"):
        raise JobError(f"device '{name}' is not supported.\n  Devices: auto, cpu, cuda:0.")
    return name
