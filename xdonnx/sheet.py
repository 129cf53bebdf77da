"""What a report says of the pool: how much of it was used, how related it looked, and its ends as small pictures."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, Field

from xdonnx.strict import STRICT

# What a score sums, in words; each is lower for what looks more like the images that the teacher learned from.
INDICATORS: Mapping[str, str] = {
    "mp": "how unsure the teacher is: 1 minus the probability of the class it predicts",
    "h": "how spread its answer is: the entropy of the probabilities",
    "t1000": "as mp, with logits divided by 1,000",
    "dms": "squared distance of the means of channels from those in training, by BatchNormalization",
    "dss": "squared distance of their deviations from those in training",
    "dss_ext": "share of channels whose variance chance does not explain",
    "aos": "mean square of what BatchNormalization puts out, before its scale and shift",
    "norm": "minus the length of the features that the last linear layer reads",
    "act": "minus the score of the class it predicts, before the bias",
    "proj": "as act, divided by the length of that class's weights",
    "ang": "1 minus the cosine between the features and that class's weights",
}


class PoolImage(BaseModel):
    """An image of the pool."""

    model_config = STRICT
    sample: str = Field(description="where it came from")
    score: float
    chance: float = Field(description="that it is the next one drawn")
    thumbnail: str | None = Field(None, repr=False, description="data URI of a PNG, at most 64 pixels a side, as fed")


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
