"""Loading models: without what transformers says meanwhile, and one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_LOADING = threading.RLock()
"""While it loads a model, transformers replaces `PreTrainedModel.tie_weights`. Of two threads that
do so at once, the later one to end may leave the replacement in place for all models thereafter."""


@contextmanager
def quiet() -> Iterator[None]:
    """Within: transformers prints no bars, no doubts about a config, and no load report, which
    lists weights of parts that are not wanted as unexpected; what matters of it is checked. Other
    threads wait."""
    with _LOADING:
        verbosity = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
