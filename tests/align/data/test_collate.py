"""Batches: padding, flat positions, and features that belong to their samples."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from align.data.collate import collate
from align.data.dataset import DataConfig, Sample, build_splits
from align.data.loader import Loader
from align.data.sampling import in_order
from align.data.templates import TemplateConfig
from align.data.tokens import IGNORE, SampleEncoder
from align.llm import FrozenLLM
from featcache.join import StoreJoin
from featcache.manifests import Record
from featcache.store import Store
from tests.support_steps import random_parts

Q = 2


@pytest.fixture
def samples(store: Store) -> list[Sample]:
    return build_splits(DataConfig(eval_ratio=0), TemplateConfig(), StoreJoin([store])).train


def make_loader(
    store: Store, samples: list[Sample], llm: FrozenLLM, max_length: int = 100
) -> Loader:
    encoder = SampleEncoder(llm.tokenizer, TemplateConfig(), llm.image_token_id, max_length)
    stores = StoreJoin([store])
    return Loader(stores.reader(depth=2), samples, encoder, lambda _: Q, stores.sizes_of)


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_batches_hold_their_own_samples(
    store: Store, samples: list[Sample], llm: FrozenLLM, batch_size: int
) -> None:
    loader = make_loader(store, samples, llm)
    seen = 0
    with store.reader() as reader:
        for batch in loader.stream(in_order(len(samples), batch_size)):
            own = samples[seen : seen + len(batch.ids)]
            seen += len(own)
            assert batch.ids == [s.record.id for s in own]
            assert batch.keys == [key for s in own for key in s.record.images]
            expected = reader.read(np.concatenate([s.rows[:, 0] for s in own]))
            assert torch.equal(batch.features[0].decode(), expected)
            for b, sample in enumerate(own):
                alone = loader.encoder.encode(sample.record, [Q])
                length = len(alone.input_ids)
                assert batch.input_ids[b, :length].tolist() == alone.input_ids.tolist()
                assert batch.labels[b, :length].tolist() == alone.labels.tolist()
                assert (batch.labels[b, length:] == IGNORE).all()
                assert not batch.is_slot[b, length:].any()
    assert seen == len(samples)


def test_flat_positions_say_what_the_masks_say(
    store: Store, samples: list[Sample], llm: FrozenLLM
) -> None:
    batch = make_loader(store, samples, llm).load(np.array([3, 1, 38]))
    T = batch.input_ids.shape[1]
    assert batch.slots.tolist() == batch.is_slot.flatten().nonzero().flatten().tolist()
    shifted = [
        (b * T + t - 1, int(batch.labels[b, t]))
        for b in range(3)
        for t in range(1, T)
        if batch.labels[b, t] != IGNORE
    ]
    assert list(zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True)) == shifted
    assert batch.num_supervised == len(shifted)


def test_a_single_token_sequence_has_nothing_to_predict(
    store: Store, samples: list[Sample], llm: FrozenLLM
) -> None:
    from align.data.tokens import TokenizedSample

    one = TokenizedSample(np.array([7]), np.array([7]), np.array([False]))
    batch = collate([one], samples[:1], [torch.zeros(1, 16, 48)], [(1, 1)])
    assert batch.num_supervised == 0


def test_samples_without_room_are_skipped_and_counted_once(
    store: Store, samples: list[Sample], llm: FrozenLLM
) -> None:
    encoder = make_loader(store, samples, llm).encoder
    prompt = len(encoder.encode_prompt(samples[0].record, [Q]).input_ids)
    loader = make_loader(store, samples, llm, max_length=prompt)
    for _ in range(2):
        batch = loader.load(np.array([0, 1]))
        assert (batch.ids, batch.num_supervised) == ([], 0)
        assert batch.features[0].decode().shape == (0, 16, 48)
    assert str(loader.skipped) == (
        f"2 its images and prompt alone fill data.max_length={prompt} (s0, s1)"
    )
    assert list(loader.usable()) == []


def test_a_batch_without_usable_samples_keeps_its_place(
    store: Store, samples: list[Sample], llm: FrozenLLM
) -> None:
    long = Record("long", ("000.png", "001.png"), samples[0].record.turns, None, "")
    pair = Sample(long, store.rows(["000.png", "001.png"])[:, None])
    mixed = [pair, samples[3], pair, pair, samples[4], pair]
    encoder = make_loader(store, samples, llm).encoder
    room = len(encoder.encode_prompt(samples[0].record, [Q]).input_ids) + 1
    loader = make_loader(store, mixed, llm, max_length=room)
    batches = loader.stream(in_order(len(mixed), 1))
    found = [(batch.ids, batch.features[0].decode().clone()) for batch in batches]
    assert [ids for ids, _ in found] == [[], ["s3"], [], [], ["s4"], []]
    whole = make_loader(store, samples, llm)
    for (_, features), index in ((found[1], 3), (found[4], 4)):
        assert torch.equal(features, whole.load(np.array([index])).features[0].decode())
    assert list(loader.usable()) == [1, 4]


def test_a_failing_read_names_the_store(
    store: Store, samples: list[Sample], llm: FrozenLLM, tmp_path: Path
) -> None:
    import shutil

    import featcache
    from featcache.errors import StoreError
    from featcache.layout import shard_path

    broken = tmp_path / "broken.zarr"
    shutil.copytree(store.path, broken)
    shard = broken / shard_path("-2", 0)
    shard.write_bytes(shard.read_bytes()[:100])
    loader = make_loader(featcache.open(broken), samples, llm)
    with pytest.raises(StoreError):
        list(loader.stream(in_order(len(samples), 4)))


def test_packed_samples_lie_one_after_another() -> None:
    parts = random_parts()
    lengths = [len(sample.input_ids) for sample in parts.tokenized]
    padded, packed = parts.collate(), parts.collate(packed=True)
    assert padded.documents is None and packed.documents is not None
    ends = packed.documents.cumulative.tolist()
    assert ends == np.cumsum([0, *lengths]).tolist()
    assert packed.documents.cumulative.dtype == torch.int32
    assert packed.documents.longest == max(lengths)
    assert packed.input_ids.shape == (1, sum(lengths))
    positions = [t for length in lengths for t in range(length)]
    assert packed.documents.positions.tolist() == [positions]
    for i, sample in enumerate(parts.tokenized):
        own = slice(ends[i], ends[i + 1])
        assert packed.input_ids[0, own].tolist() == sample.input_ids.tolist()
        assert packed.labels[0, own].tolist() == sample.labels.tolist()
        assert packed.is_slot[0, own].tolist() == sample.is_slot.tolist()
    assert torch.equal(packed.slots, packed.is_slot.flatten().nonzero().flatten())
    # The same tokens predict the same ones: none the first token of the next document.
    T = padded.input_ids.shape[1]
    expected = [ends[p // T] + p % T for p in padded.predictors.tolist()]
    assert packed.predictors.tolist() == expected
    assert torch.equal(packed.targets, padded.targets)
    assert (packed.ids, packed.keys, packed.sizes) == (padded.ids, padded.keys, padded.sizes)


@pytest.mark.parametrize(
    ("kinds", "multiple", "shape", "ends", "longest"),
    [
        # (tokens, images) of the samples; B x T; where documents end; the longest
        (((9, 0), (3, 0)), 8, (1, 16), [9, 12, 16], 16),
        (((9, 0), (7, 0)), 8, (1, 16), [9, 16], 16),
        (((9, 0), (7, 0)), 1, (1, 16), [9, 16], 9),
        ((), 8, (1, 0), [], 0),
    ],
)
def test_packed_rows_of_static_shape(
    kinds: tuple[tuple[int, int], ...],
    multiple: int,
    shape: tuple[int, int],
    ends: list[int],
    longest: int,
) -> None:
    batch = random_parts(kinds).collate(packed=True, length_multiple=multiple)
    assert batch.documents is not None
    assert tuple(batch.input_ids.shape) == shape
    assert batch.documents.cumulative.tolist() == [0, *ends]
    assert batch.documents.longest == longest
    starts = [0, *ends]
    positions = [t for a, b in itertools.pairwise(starts) for t in range(b - a)]
    assert batch.documents.positions.tolist() == [positions]


@pytest.mark.parametrize(
    ("kinds", "multiple", "shape"),
    [(((9, 0), (3, 0)), 8, (2, 16)), (((8, 0), (3, 0)), 8, (2, 8)), ((), 8, (0, 0))],
)
def test_padded_rows_of_static_shape(
    kinds: tuple[tuple[int, int], ...], multiple: int, shape: tuple[int, int]
) -> None:
    parts = random_parts(kinds)
    batch = parts.collate(length_multiple=multiple)
    assert tuple(batch.input_ids.shape) == shape
    for b, sample in enumerate(parts.tokenized):
        assert batch.labels[b, : len(sample.labels)].tolist() == sample.labels.tolist()
        assert (batch.labels[b, len(sample.labels) :] == IGNORE).all()
    assert (batch.labels[len(kinds) :] == IGNORE).all()
    assert batch.num_supervised == sum(sample.num_supervised for sample in parts.tokenized)
    assert len(batch.ids) == len(kinds)


def test_a_packed_batch_moves_whole() -> None:
    batch = random_parts().collate(packed=True)
    moved = batch.to(torch.device("meta"))
    assert moved.documents is not None and batch.documents is not None
    tensors = [moved.input_ids, moved.slots, moved.predictors, moved.targets, *moved.features]
    tensors += [moved.documents.cumulative, moved.documents.positions]
    assert all(isinstance(each, torch.Tensor) and each.is_meta for each in tensors)
    assert moved.documents.longest == batch.documents.longest
