"""Stage `review`: a person reviews a sample of the prepared rows and signs them off."""

from tunesmith.stages.review.stage import Review
from tunesmith.stages.review.terminal import review

__all__ = ["Review", "review"]
