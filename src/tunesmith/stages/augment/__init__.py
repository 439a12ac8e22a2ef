"""Stage `augment`: paraphrases of the train rows' questions, each checked and linked to its parent."""

from tunesmith.stages.augment.stage import augment

__all__ = ["augment"]
