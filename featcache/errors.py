"""Everything a user can cause, as one tree. Anything else that is raised is a bug.

FeatcacheError                 one clear line: what, where, and the cure
├── ConfigError                a wrong option or config value (exit code 2)
├── ManifestError              a data file that cannot be read as records
│   └── DamagedFileError       a tar, parquet file or dataset that is not whole
├── EncoderError               an encoder that cannot be loaded or does not fit the request
├── ImageError                 one image without features; carries its ledger reason
├── StoreError                 a store that cannot be used
│   ├── IncompleteStoreError   extraction has not finished
│   ├── CorruptStoreError      bytes that are not what was written
│   ├── FingerprintMismatch    a store made by other means than the run needs
│   └── ObjectStoreError       a bucket that cannot be reached, or does not let us in
└── AlignError                 drawn in align/errors.py
"""

from __future__ import annotations


class FeatcacheError(Exception):
    """Base of all errors that a user can cause and mend. `str(error)` is one line for the user."""

    exit_code = 1


class ConfigError(FeatcacheError):
    """A wrong option or config value; the message names it, its place and the cure."""

    exit_code = 2


class ManifestError(FeatcacheError):
    """A data file that cannot be read; the message names the file and, where known, the line."""


class DamagedFileError(ManifestError):
    """A tar, parquet file or saved dataset that is not whole; the message says what to do."""


class EncoderError(FeatcacheError):
    """An encoder that cannot be loaded, or a layer it does not have."""


class ImageError(FeatcacheError):
    """An image that yields no features.

    reason: one of `featcache.layout.Status` names in lower case, e.g. "undecodable".
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class StoreError(FeatcacheError):
    """A store that cannot be used as asked."""


class IncompleteStoreError(StoreError):
    """Extraction into the store has not finished; rerunning the same command finishes it."""


class CorruptStoreError(StoreError):
    """Bytes in the store are not the bytes that were written."""


class FingerprintMismatch(StoreError):  # noqa: N818 - reads as what happened
    """The store was made by other means than the run needs; the message lists the fields."""


class ObjectStoreError(StoreError):
    """An object store that cannot be reached, a bucket that is not there, refused credentials."""
