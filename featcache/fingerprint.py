"""How a store's features were made, as a nested dict in its attributes, and its comparison."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.resources
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import xxhash

from featcache.errors import FingerprintMismatch, ImageError
from featcache.images import PIXEL_RULE, decode

if TYPE_CHECKING:
    import torch
    from torch import nn

    from featcache.encoders import Encoder, Preprocessing

HARMLESS = ("versions", "encoder.name", "encoder.revision")
"""Fields whose difference alone does not make features differ by more than rounding: library
versions (what another version may do to pixels shows in `preprocessing.probe`, what it may read
from the checkpoint in `encoder.config`), and by which name the encoder was reached: the digest of
its weights decides."""

PROBE_FILES = (
    "420.jpg",
    "444.jpg",
    "cmyk.jpg",
    "frames.gif",
    "grey16.png",
    "palette.png",
    "rgba.png",
)
"""Below assets/probe, where make.py says what each is for."""


def fingerprint(encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the value of a stored feature before the storage codec.

    Plain JSON values, equal after a round trip. docs/format.md explains each field.
    """
    return {
        "encoder": {
            "name": encoder.name,
            "revision": encoder.revision,
            "weights": encoder.weights,
            "random_weights": encoder.random_weights,
            "architecture": type(encoder.model).__name__,
            "config": encoder.architecture,
            "num_patches": encoder.num_patches,
            "width": encoder.width,
        },
        "features": {
            "layers": list(encoder.layers),
            "post_layernorm": [
                layer == "last" and encoder.tower.final_norm for layer in encoder.layers
            ],
            "dropped_tokens": encoder.tower.dropped_tokens,
            **encoder.tower.describe(),
        },
        "preprocessing": {
            **encoder.preprocessing.describe(),
            **PIXEL_RULE,
            "probe": pixel_probe(encoder.preprocessing),
        },
        "compute": {
            "dtype": str(encoder.compute_dtype).removeprefix("torch."),
            "fp32_matmul": _fp32_matmul(encoder),
            "device": encoder.device.type,
            "attention": encoder.config._attn_implementation,
            **({"compile": True} if encoder.compiled else {}),
        },
        "versions": versions(),
    }


@functools.cache
def pixel_probe(preprocessing: Preprocessing) -> str:
    """Digest of the pixels that an encoder is given for PROBE_FILES.

    Versions of Pillow and of the codecs in it (libjpeg-turbo, zlib, ...) are HARMLESS in a
    fingerprint, since most do not change a pixel, and a store must outlive an upgrade. The few that
    do, by another chroma upsampling, inverse DCT, resizing filter or alpha rule, change this.
    """
    folder = importlib.resources.files("featcache") / "assets" / "probe"
    found = hashlib.blake2b(digest_size=16)
    for name in PROBE_FILES:
        try:
            pixels = preprocessing.resize(decode((folder / name).read_bytes())[0])
        except ImageError as error:  # a Pillow built without this format
            found.update(f"{name} {error.reason}\n".encode())
            continue
        found.update(f"{name} {pixels.shape} {pixels.dtype}\n".encode())
        found.update(pixels.tobytes())
    return found.hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Of the libraries that a feature depends on."""
    packages = ("torch", "transformers", "pillow", "numpy")
    return {package: importlib.metadata.version(package) for package in packages}


def weights_digest(model: nn.Module) -> str:
    """xxh3_128 over the names, shapes, dtypes and values of all weights, in the names' order.

    Independent of the files they came from, and of their layout in memory. One thread reads
    1.7 GB in 60 ms, as fast as memory gives them; a second adds a tenth. Tells weights
    apart that differ by accident; whoever wants to forge a digest can.
    """
    found = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        digest = xxhash.xxh3_128_hexdigest(_bytes(value))
        found.update(f"{name} {tuple(value.shape)} {value.dtype} {digest}\n".encode())
    return f"xxh3_128:{found.hexdigest()}"


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


def _fp32_matmul(encoder: Encoder) -> str | None:
    """How fp32 is multiplied: "ieee", or "tf32" or "bf16", which no dtype shows; None in bf16."""
    import torch

    if encoder.compute_dtype != torch.float32:
        return None
    backend = torch.backends.cuda if encoder.device.type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision


def _bytes(value: torch.Tensor) -> memoryview:
    import torch

    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
