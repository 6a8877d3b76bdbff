"""What a user of `align` can cause, as one tree under `featcache.errors.FeatcacheError`.

AlignError
├── DataError          records, images and features that do not fit together
├── TemplateError      a template the tokenizer or the record cannot do
├── ModelError         a language model that cannot be loaded or does not fit the connector
├── CheckpointError    a checkpoint that is missing, torn, or of another model
├── InteropError       weights that another tool wrote, or is to read, and that cannot be taken over
├── RankError          another process of the same training has ended
└── RunError           a run directory that cannot be used as asked
"""

from __future__ import annotations

from collections.abc import Iterable

from featcache.errors import FeatcacheError


class AlignError(FeatcacheError):
    """Base of all errors of training and evaluation that a user can cause and mend."""


class DataError(AlignError):
    """Records, images and features that do not fit together."""


class TemplateError(AlignError):
    """A template that the tokenizer or the record cannot do."""


class ModelError(AlignError):
    """A language model that cannot be loaded, or does not fit the connector."""


class CheckpointError(AlignError):
    """A checkpoint that is missing, torn, or belongs to another model."""


class RankError(AlignError):
    """Another process of the same training has ended."""


class RunError(AlignError):
    """A run directory that cannot be used as asked."""


class InteropError(AlignError):
    """Weights that another tool wrote, or is to read, and that cannot be taken over whole."""


def listed(values: Iterable[object]) -> str:
    """[729, 576] -> "729 and 576", for messages."""
    return " and ".join(map(str, values))
