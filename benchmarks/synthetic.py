"""A store of random features, written by the real writer without an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from featcache.codecs import LayerCodec, StoredFeatures, get_codec
from featcache.extract import prepare_store
from featcache.images import digest
from featcache.index import compile_index
from featcache.journal import Journal, Plan
from featcache.layout import StoreInfo
from featcache.writer import ShardBuffer, ShardSpec


def write_store(
    out: Path, images: int, num_patches: int = 729, width: int = 1152, shard_images: int = 128
) -> Path:
    """`images` rows of incompressible finite fp16 under the keys "0.jpg", "1.jpg", ..."""
    codec = get_codec("fp16")
    info = StoreInfo(
        fingerprint={"encoder": {"name": "random features"}},
        codec=codec.name,
        layers=["-2"],
        num_patches=num_patches,
        width=width,
        shard_images=shard_images,
        pooled=False,
    )
    keys = [f"{i}.jpg" for i in range(images)]
    plan = Plan(
        generation=1,
        first_shard=0,
        shard_images=shard_images,
        batch_size=1,
        image_root=out,
        keys=keys,
        rows=np.arange(images),
        missing=[],
        new_digests=[digest(key.encode()) for key in keys],
    )
    prepare_store(out, info, codec, [plan], plan)
    layer = LayerCodec(codec, num_patches, width)
    buffer = ShardBuffer(ShardSpec(shard_images, {"-2": layer}, None, width))
    rng = np.random.default_rng(0)
    for shard in plan.shards:
        buffer.clear(shard)
        for slot in range(len(plan.digests_of(shard))):
            # The exponent's top bit stays clear, so that every value is finite.
            bits = rng.integers(0, 2**16, (1, num_patches, width), dtype=np.uint16) & 0xBFFF
            codes = torch.from_numpy(bits.view(np.float16))
            buffer.set(slot, {"-2": StoredFeatures(codes, None, layer)}, None, (640, 480))
        buffer.publish(out)
    compile_index(out, info, Journal.load(out))
    return out
