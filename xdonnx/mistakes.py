"""What pydantic finds wrong with the fields of a job, in the words of our own errors."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import ValidationError

from xdonnx.errors import JobError, did_you_mean

_TAKES = {
    "string_type": "text",
    "path_type": "a path",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number, such as 0.5",
    "bool_type": "True or False",
    "bool_parsing": "True or False",
    "tuple_type": "a tuple",
    "mapping_type": "a mapping",
    "too_short": "at least one",
}


def mistake(error: ValidationError, fields: Collection[str]) -> JobError:
    """Return the first mistake as a JobError: which field, what was given, what it takes.

    Parameters
    ----------
    error : ValidationError
    fields : collection of str
        The names there are.
    """
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = error.error_count() - 1
    others = f"\n  {more} more of its fields are wrong." if more > 1 else "\n  Another field is wrong too." * more
    if first["type"] == "extra_forbidden":
        return JobError(
            f"a job has no field '{where}'.{did_you_mean(where, fields)}\n"
            f"  Fields are the flags of xdonnx compress: {', '.join(sorted(fields))}.{others}"
        )
    if first["type"] == "missing":
        return JobError(f"a job needs '{where}'.\n  Pass {where}=…{others}")
    given = repr(first["input"])
    given = given if len(given) <= 80 else f"{given[:79]}…"
    return JobError(f"{where} is {given}.\n  It takes {_TAKES.get(first['type'], first['msg'])}.{others}")
