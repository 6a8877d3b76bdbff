"""Features from the reader's buffers to the device that trains."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import closing

import torch

from featcache.codecs import StoredFeatures


def on_device(
    batches: Generator[StoredFeatures, None, None], device: torch.device | None
) -> Generator[StoredFeatures, None, None]:
    """The batches there, still in their stored, small form.

    To CUDA each batch is copied while the one before it is used: on a stream of its own, from
    page-locked memory (`ReaderOptions.pin_memory`) without holding up the caller. For the CPU
    nothing is copied.
    """
    if device is None or device.type == "cpu":
        return batches
    return _to_cuda(batches, device) if device.type == "cuda" else _to_other(batches, device)


def _to_other(
    batches: Generator[StoredFeatures, None, None], device: torch.device
) -> Generator[StoredFeatures, None, None]:
    with closing(batches):
        for features in batches:
            yield features.to(device, non_blocking=False)  # the buffer is read into again


def _to_cuda(
    batches: Generator[StoredFeatures, None, None], device: torch.device
) -> Generator[StoredFeatures, None, None]:
    copying = _copying_stream(device)
    ahead: StoredFeatures | None = None
    with closing(batches):
        for features in batches:
            with torch.cuda.stream(copying):
                now = features.to(device)
                copied = copying.record_event()
            if ahead is not None:
                yield _used_here(ahead, device)
            # Into this buffer the next batch may be read. A step lies between: it has left by now.
            copied.synchronize()
            ahead = now
        if ahead is not None:
            yield _used_here(ahead, device)


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all readers: the allocator keeps freed memory for each stream apart."""
    return torch.cuda.Stream(device)


def _used_here(features: StoredFeatures, device: torch.device) -> StoredFeatures:
    """Features that have arrived, and whose memory stays until the current stream has used it."""
    for values in (features.codes, features.scales):
        if values is not None:
            values.record_stream(torch.cuda.current_stream(device))
    return features
