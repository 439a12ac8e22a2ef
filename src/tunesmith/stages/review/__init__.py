"""Stage `review`: a person looks at a sample of the prepared rows and signs them off."""

from tunesmith.stages.review.stage import Review

__all__ = ["Review"]
