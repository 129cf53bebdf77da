"""The public names: sorted, documented, and free of torch until they are used."""

from __future__ import annotations

import inspect
import os
import pkgutil
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xdonnx


def test_all_is_sorted_and_every_name_is_documented() -> None:
    assert xdonnx.__all__ == sorted(xdonnx.__all__)
    for name in xdonnx.__all__:
        assert inspect.getdoc(getattr(xdonnx, name)), name


@pytest.mark.parametrize("function", [xdonnx.compress, xdonnx.verify, xdonnx.decompose])
def test_what_the_commands_do_is_documented_in_full_with_an_example(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function) or ""

    for section in ("Parameters", "Returns", "Raises", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    listed = text.partition("Parameters")[2].partition("Returns")[0]
    names = {part.strip(" *") for line in listed.splitlines() for part in line.partition(" : ")[0].split(",")}
    assert set(inspect.signature(function).parameters) <= names
    assert f" = xdonnx.{function.__name__}(" in text.partition(">>> ")[2]


def test_the_types_are_for_others_too() -> None:
    assert all(path.joinpath("py.typed").is_file() for path in map(Path, xdonnx.__path__))
    # Those of the keywords can be asked for, none of them being a name that is not there.
    assert typing.get_type_hints(xdonnx.CompressOptions)["round_to"] == int | typing.Literal["auto"]


def test_names_that_do_not_exist_say_so() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xdonnx.nothing


def test_no_public_name_is_hidden_by_a_module_of_the_same_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(xdonnx.__path__)}
    assert not modules & set(xdonnx.__all__)


def test_waiting_threads_do_not_spin_unless_the_user_says_so() -> None:
    code = "import os, xdonnx; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        plain = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        made = subprocess.run(
            [sys.executable, "-c", code], env=plain | given, check=True, capture_output=True, text=True
        )
        assert made.stdout.strip() == expected


def test_importing_the_package_and_the_onnx_half_costs_no_torch() -> None:
    code = (
        "import sys, xdonnx; assert 'onnx' not in sys.modules\n"
        "from xdonnx import verify, compress, decompose, read_net, make_plan, cut, read_shots, read_report\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
