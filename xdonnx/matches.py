"""What a report says of a student that another tool made: which of its layers were taken for which."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from xdonnx.strict import STRICT


class MatchResult(BaseModel):
    """A layer of the teacher and what a given student has in its place, by the values that they make."""

    model_config = STRICT
    teacher: str
    student: tuple[str, ...] = Field(description="layers in a row; the last puts out what the teacher's does")
    kept: int = Field(description="channels of the teacher's that the student has")
    units: int
    confidence: float = Field(description="0 for unrelated layers, 1 for identity")
    by: Literal["weights", "activations", "file"]
