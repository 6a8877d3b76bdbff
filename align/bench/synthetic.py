"""A store of random features, written by the real writer without an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from align.bench.features import features
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
    """A store whose row r is `features(r)`, of the key "r.jpg"."""
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
        image_root=str(out),
        keys=keys,
        rows=np.arange(images),
        missing=[],
        new_digests=[digest(key.encode()) for key in keys],
    )
    prepare_store(out, info, codec, [plan], plan)
    layer = LayerCodec(codec, num_patches, width)
    buffer = ShardBuffer(ShardSpec(shard_images, {"-2": layer}, None, width))
    for shard in plan.shards:
        buffer.clear(shard)
        for slot in range(len(plan.digests_of(shard))):
            row = shard * shard_images + slot
            codes = torch.from_numpy(features(row, num_patches, width))[None]
            buffer.set(slot, {"-2": StoredFeatures(codes, None, layer)}, None, (640, 480))
        buffer.publish(out)
    compile_index(out, info, Journal.load(out))
    return out
