"""TOML files that commands write for people to edit: their text, and reading them back."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from xdonnx.errors import JobError


def quoted(text: str) -> str:
    """Return a TOML string; in JSON all but one control character is escaped as TOML wants it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(path: Path, what: str, command: str, how: str) -> dict[str, Any]:
    """Return what a file holds.

    Parameters
    ----------
    path : Path
    what, command : str
        What it is called, such as 'plan', and the command that writes it.
    how : str
        How one is made, where there is none.

    Raises
    ------
    JobError
        There is no such file, it cannot be read, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise JobError(f"no {what} at '{path}'.\n  Make one: {how}") from error
    except OSError as error:
        raise JobError(f"cannot read the {what} '{path}': {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"'{path}' is not TOML: {error}.\n  A {what} is what {command} writes.") from error
