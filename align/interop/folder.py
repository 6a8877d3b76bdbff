"""How a folder of exported files is published: whole or not at all.

All of it is written under another name beside its place, synced, and renamed. What a kill leaves is
called .partial-*, and no tool takes it for the folder.
"""

from __future__ import annotations

import io
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from align.errors import InteropError
from featcache.files import PARTIAL, publish, publish_json, sync

MANIFEST = "export.json"
"""Where an exported folder says what it is of. Without it no folder is ever replaced."""
MARGIN_BYTES = 16 << 20
"""For configs, code and tokenizer files, beside the weights."""


@dataclass(frozen=True, slots=True)
class Written:
    """An exported folder.

    nbytes: of all its files. notices: what its user should know; one line each.
    """

    path: Path
    form: str
    step: int
    nbytes: int
    notices: tuple[str, ...]


def require_free(out: Path, force: bool) -> Path:
    """The absolute path. Raises InteropError for what is there and may not be replaced."""
    out = out.expanduser().absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / MANIFEST).is_file():
            raise InteropError(f"--out {out}: is there and is no earlier export; choose another")
        if not force:
            raise InteropError(f"--out {out}: holds an export; give --force, or another --out")
    return out


@contextmanager
def published(out: Path, nbytes: int, force: bool) -> Iterator[Path]:
    """Within: an empty folder, which is `out` afterwards.

    nbytes: of the weights that will be written. force: replace an earlier export.

    Raises InteropError where `out` is in use, the disk is too small or does not take it.
    """
    out = require_free(out, force)
    partial = out.with_name(f"{PARTIAL}{out.name}-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(out.parent).free, nbytes + MARGIN_BYTES
        if free < needed:
            raise InteropError(
                f"--out {out}: takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; "
                "free some space, or choose another disk"
            )
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        _replace(partial, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InteropError(
            f"--out {out}: cannot be written: {reason}; free some space, or choose another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tensors(file: Path, content: object) -> None:
    """As `torch.save` does. Raises OSError, which writing to a file directly does not always."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    publish(file, [buffer.getbuffer()])


def finish(partial: Path, form: str, described: dict[str, Any], notices: list[str]) -> int:
    """Writes the manifest as the last file; returns the bytes of all."""
    publish_json(partial / MANIFEST, {"format": form, **described, "notices": notices})
    return sum(file.stat().st_size for file in partial.iterdir())


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
    else:
        before = out.with_name(f"{PARTIAL}removed-{partial.name}")
        out.rename(before)
        partial.rename(out)
        shutil.rmtree(before)
    sync(out.parent)
