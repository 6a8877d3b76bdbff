"""How a store's features were made, as a nested dict in its attributes, and its comparison."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from featcache.errors import FingerprintMismatch
from featcache.images import PIXEL_RULE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from featcache.encoders import Encoder

HARMLESS = ("versions", "encoder.name", "encoder.revision")
"""Fields whose difference alone does not make features differ by more than rounding: library
versions (parity with Hugging Face is tested across the supported ones), and by which name the
encoder was reached: the digest of its weights decides."""


def fingerprint(encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the value of a stored feature before the storage codec."""
    return {
        "encoder": {
            "name": encoder.name,
            "revision": encoder.revision,
            "weights": encoder.weights,
            "architecture": type(encoder.model).__name__,
            "num_patches": encoder.num_patches,
            "width": encoder.width,
        },
        "features": {"layers": list(encoder.layers), "dropped_tokens": "none"},
        "preprocessing": {**encoder.preprocessing.describe(), **PIXEL_RULE},
        "compute": {
            "dtype": str(encoder.compute_dtype).removeprefix("torch."),
            "device": encoder.device.type,
            "attention": encoder.config._attn_implementation,
        },
        "versions": versions(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Of the libraries that a feature depends on."""
    packages = ("torch", "transformers", "pillow", "numpy")
    return {package: importlib.metadata.version(package) for package in packages}


def weights_digest(model: nn.Module) -> str:
    """BLAKE2b over the names, shapes and values of all weights, independent of their files."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_bytes(value))
    return f"blake2b:{digest.hexdigest()}"


def diff(left: Any, right: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON-like values differ, as (dotted path, left value, right value).

    In the order of `left`'s keys, then `right`'s. A list is compared as one value; a key that only
    one side has is ABSENT on the other.
    """
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return [
            field
            for key in [*left, *(key for key in right if key not in left)]
            for field in diff(
                left.get(key, ABSENT), right.get(key, ABSENT), f"{path}.{key}" if path else str(key)
            )
        ]
    return [] if left == right else [(path, left, right)]


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()
"""The value of a field that is not there."""


def require_same(
    left: Mapping[str, Any], right: Mapping[str, Any], *, left_name: str, right_name: str, cure: str
) -> None:
    """Raise FingerprintMismatch with every field that differs and matters (not HARMLESS)."""
    fields = [
        (key, x, y)
        for key, x, y in diff(left, right)
        if not any(key == field or key.startswith(f"{field}.") for field in HARMLESS)
    ]
    if fields:
        listed = "; ".join(
            f"{key}: {x!r} in {left_name}, {y!r} in {right_name}" for key, x, y in fields
        )
        raise FingerprintMismatch(f"{left_name} and {right_name} do not match: {listed}; {cure}")


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested mapping's leaves as (dotted path, value)."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _bytes(value: torch.Tensor) -> memoryview:
    import torch

    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
