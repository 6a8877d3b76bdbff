"""Evaluation of a real run: figures against the model run by hand, files, the shuffled control."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from align.data.dataset import Sample
from align.data.tokens import SampleEncoder, TokenizedSample
from align.errors import DataError
from align.evaluate import evaluate, score_tokens, shuffled
from align.run import Run
from align.trainer import evaluate_loss
from featcache.manifests import Record


def sample(name: str, *rows: int) -> Sample:
    return Sample(
        Record(name, tuple(map(str, rows)), (), None, ""), np.array(rows, np.int64).reshape(-1, 1)
    )


def test_loss_and_accuracy_are_those_of_the_model(run: Run) -> None:
    result = evaluate(run)
    assert result.figures["loss"].value == pytest.approx(evaluate_loss(run).loss, rel=1e-6)
    assert result.figures["loss"].n == sum(caption.tokens for caption in result.captions)
    # One sample by hand, unpadded and from the full logits.
    loader = run.loader("val")
    batch = loader.load(np.array([2]))
    embeds = run.model.inputs_embeds(batch.input_ids, batch.is_slot, batch.features, batch.sizes)
    with torch.inference_mode():
        logits = run.model.llm.model(inputs_embeds=embeds).logits[0, :-1]
    learned = batch.labels[0, 1:] != -100
    truth, scores = batch.labels[0, 1:][learned], logits[learned]
    by_hand = result.captions[2].scores
    loss = torch.nn.functional.cross_entropy(scores, truth)
    assert by_hand["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert by_hand["token_accuracy"] == pytest.approx(
        float((scores.argmax(1) == truth).float().mean())
    )


def test_token_scores_belong_to_their_sample(run: Run) -> None:
    loader = run.loader("val")
    losses, hits = score_tokens(run.model, loader.load(np.arange(5)))
    for index in range(5):
        loss, hit = score_tokens(run.model, loader.load(np.array([index])))
        np.testing.assert_allclose(losses[index], loss[0], rtol=1e-4)
        np.testing.assert_array_equal(hits[index], hit[0])


def test_files(run: Run) -> None:
    result = evaluate(run, limit=5)
    folder = run.path / "eval" / "val"
    assert result.folder == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "captions.jsonl",
        "metrics.json",
        "report.md",
    ]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == result.document
    assert (metrics["n"], metrics["split_size"], metrics["step"]) == (5, 16, 6)
    assert list(metrics["metrics"]) == ["loss", "token_accuracy", "exact_match", "word_f1"]
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    first = run.splits.val[0].record
    assert len(rows) == 5
    assert rows[0]["id"] == first.id and rows[0]["reference"] == first.turns[1].text
    assert rows[0]["images"] == rows[0]["shown"] == list(first.images)
    text = (folder / "report.md").read_text()
    assert text.startswith("# val\n\n5 of 16 samples, step 6.\n")
    assert f"| {first.id} | {rows[0]['reference']} |" in text


def test_batch_size_does_not_matter(run: Run) -> None:
    one = evaluate(run, decoding=replace(run.config.eval, batch_size=1))
    many = evaluate(run, decoding=replace(run.config.eval, batch_size=7))
    assert [c.generated for c in one.captions] == [c.generated for c in many.captions]
    assert one.figures["loss"].value == pytest.approx(many.figures["loss"].value, rel=1e-5)


def test_shuffled_control(run: Run) -> None:
    own = evaluate(run)
    control = evaluate(run, shuffle_features=True)
    assert control.folder == run.path / "eval" / "val-shuffled"
    assert control.document["shuffled"] is True
    for right, wrong in zip(own.captions, control.captions, strict=True):
        assert (right.id, right.reference, right.images) == (
            wrong.id,
            wrong.reference,
            wrong.images,
        )
        assert not set(wrong.shown) & set(wrong.images)
    assert sorted(c.shown for c in control.captions) == sorted(c.images for c in own.captions)
    # What was shown is what decides: the loss under another's image is that of its features.
    loader = run.loader("val")
    keys = {sample.record.images: index for index, sample in enumerate(run.splits.val)}
    other = keys[control.captions[0].shown]
    batch = loader.load(np.array([0]))
    batch.features = loader.load(np.array([other])).features
    loss = score_tokens(run.model, batch)[0][0].mean()
    assert control.captions[0].scores["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert control.figures["loss"].value != pytest.approx(own.figures["loss"].value, rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 100])
def test_shuffle_is_a_derangement_and_fixed(count: int) -> None:
    samples = [sample(f"s{i}", 10 * i) for i in range(count)]
    exchanged = shuffled(samples)
    assert [s.record for s in exchanged] == [s.record for s in samples]
    assert sorted(int(s.rows[0, 0]) for s in exchanged) == [10 * i for i in range(count)]
    assert all(a.rows[0, 0] != b.rows[0, 0] for a, b in zip(samples, exchanged, strict=True))
    again = shuffled(samples)
    assert all((a.rows == b.rows).all() for a, b in zip(exchanged, again, strict=True))


def test_shuffle_with_shared_and_several_images() -> None:
    # Two captions of image 1, and samples of two images that must get back neither.
    samples = [sample("a", 1), sample("b", 1), sample("c", 2, 3), sample("d", 4, 5), sample("e", 6)]
    for before, after in zip(samples, shuffled(samples), strict=True):
        assert len(after.rows) == len(before.rows)
        assert not set(after.rows.flatten().tolist()) & set(before.rows.flatten().tolist())


def test_too_few_images_to_shuffle(run: Run) -> None:
    with pytest.raises(DataError, match=r"^1 different image among 1 samples are too few"):
        evaluate(run, limit=1, shuffle_features=True)


def test_unknown_split(run: Run) -> None:
    with pytest.raises(DataError, match="split test: there are train and val"):
        evaluate(run, "test")


def test_samples_without_room_are_left_out(run: Run) -> None:
    """At batch size 1 the one that does not fit is a whole batch."""
    decoding = replace(run.config.eval, batch_size=1)
    whole = evaluate(run, decoding=decoding)
    lengths = {
        s.record.id: len(run.encoder.encode_prompt(s.record, [4]).input_ids) for s in run.splits.val
    }
    long = run.splits.val[3]
    keys = (long.record.images[0], run.splits.val[0].record.images[0])
    run.splits.val[3] = Sample(replace(long.record, images=keys), run.stores.rows(list(keys)))
    run.encoder.max_length = max(lengths.values()) + 1
    for shuffle in (False, True):
        result = evaluate(run, decoding=decoding, shuffle_features=shuffle)
        assert [c.id for c in result.captions] == [
            c.id for c in whole.captions if c.id != long.record.id
        ]
        assert result.left_out.total == 1
    # The loss of the same split, at a batch size that leaves a batch without rows.
    run.config.train.batch_size = 1
    run._loaders.clear()
    assert evaluate_loss(run).samples == len(run.splits.val) - 1
    run.encoder.max_length = 3
    run._loaders.clear()
    with pytest.raises(DataError, match="none of 16 validation samples can be used"):
        evaluate_loss(run)
    with pytest.raises(DataError, match="none of 16 samples can be evaluated"):
        evaluate(run)


def test_a_sample_is_tokenised_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = SampleEncoder.encode

    def counted(self: SampleEncoder, record: Record, slots: Sequence[int]) -> TokenizedSample:
        seen.append(record.id)
        return encode(self, record, slots)

    monkeypatch.setattr(SampleEncoder, "encode", counted)
    evaluate(run, shuffle_features=True)
    assert len(seen) == len(set(seen)) == 16
