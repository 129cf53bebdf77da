"""What a report says of the pool: how much of it was used, how related it looked, and its ends as small pictures."""

from __future__ import annotations

from pydantic import BaseModel, Field

from xdonnx.strict import STRICT


class PoolImage(BaseModel):
    """An image of the pool."""

    model_config = STRICT
    sample: str = Field(description="where it came from")
    score: float
    chance: float = Field(description="that it is the next one drawn")
    thumbnail: str | None = Field(None, description="data URI of a PNG of at most 64 pixels a side, as it was fed")


class PoolSheet(BaseModel):
    """Unlabelled images besides the samples. Scores have mean 0 and deviation 1; lower is more related."""

    model_config = STRICT
    images: int = Field(description="found, without those that cannot be read")
    used: int
    twins: int = Field(description="left out since they are samples that fit or judge")
    unreadable: tuple[str, ...] = Field((), description="left out on request")
    draw: str
    indicators: tuple[str, ...] = Field(description="that the score is the sum of; none where nothing was measured")
    quantiles: tuple[float, ...] = Field((), description="of the scores: least, quarter, median, three quarters, most")
    effective: float = Field(description="so many images drawn evenly would vary as much")
    most_related: tuple[PoolImage, ...] = ()
    least_related: tuple[PoolImage, ...] = Field((), description="the least related first")
