"""Features from the reader's buffers to the device that trains."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import torch

from featcache.codecs import StoredFeatures


def on_device(
    batches: Generator[StoredFeatures, None, None], device: torch.device | None
) -> Generator[StoredFeatures, None, None]:
    """The batches there, still in their stored, small form.

    To CUDA each batch is copied while the one before it is used: on a stream of its own, from
    page-locked memory (`ReaderOptions.pin_memory`) without holding up the caller. Nothing is copied
    for another device of the CPU kind.
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
    copying = torch.cuda.Stream(device)
    ahead: tuple[StoredFeatures, torch.cuda.Event] | None = None
    with closing(batches):
        for features in batches:
            with torch.cuda.stream(copying):
                now = features.to(device), copying.record_event()
            if ahead is not None:
                yield _arrived(*ahead, device)
            # Into this buffer the next batch may be read. A step lies between: it has left by now.
            now[1].synchronize()
            ahead = now
        if ahead is not None:
            yield _arrived(*ahead, device)


def _arrived(
    features: StoredFeatures, copied: torch.cuda.Event, device: torch.device
) -> StoredFeatures:
    """Features that the current stream may use, and whose memory stays until it has."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for values in (features.codes, features.scales):
        if values is not None:
            values.record_stream(current)
    return features
