"""What every worker process needs, imported once by the server that they are forked from: in memory it is there once.

No thread is started here, which a fork would leave behind.
"""

import gc

from tunesmith.stages.prepare.pool import without_torch

without_torch()

import transformers.tokenization_utils_tokenizers  # noqa: E402, F401

import tunesmith.chat.template  # noqa: E402
import tunesmith.stages.prepare.work  # noqa: E402, F401
from tunesmith.quality.language import load  # noqa: E402

load()
gc.freeze()  # a collection in a worker would write to pages that all share
