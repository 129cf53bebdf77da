"""How the parts of a report are modelled: nothing beyond their schema goes in, and nothing that JSON cannot hold."""

from __future__ import annotations

from pydantic import ConfigDict

# A report is written whole or not at all: a key that is not in the schema, or a number that JSON cannot hold,
# is our mistake. Readers of the schema must live with keys to come, so it does not forbid them.
STRICT = ConfigDict(
    frozen=True,
    extra="forbid",
    allow_inf_nan=False,
    json_schema_extra=lambda schema: schema.pop("additionalProperties", None),
)
