"""What every worker process needs, imported once by the fork server, so that all share one copy in memory.

It starts no thread, because threads do not survive a fork.
"""

import gc
from importlib import import_module

from tunesmith.quality.language import load
from tunesmith.stages.prepare.pool import without_torch

without_torch()  # before anything imports transformers
for name in ("transformers.tokenization_utils_tokenizers", "tunesmith.chat.template", "tunesmith.stages.prepare.work"):
    import_module(name)
load()
gc.freeze()  # a collection in a worker would write to the shared pages
