"""Held-out loss and captions of a run, with and without the right images.

    evaluate(run, "val")                          -> RUN/eval/val/
    evaluate(run, "val", shuffle_features=True)   -> RUN/eval/val-shuffled/

The shuffled control gives every sample another image's features and leaves all else as it is. A
model that looks at the image falls to chance there; one that has learned the captions' style by
heart does not fall at all.

Each folder holds `captions.jsonl` (one sample a line), `metrics.json` and `report.md`.

    B samples in a batch, T longest sequence, N supervised positions in a batch, H LLM width
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from align.config import EvalConfig
from align.data.collate import Batch
from align.data.dataset import LeftOut, Sample
from align.data.sampling import in_order
from align.data.templates import answer
from align.errors import DataError
from align.generate import generate
from align.loss import CHUNK_BYTES
from align.metrics import Figure, score_caption, summarise
from align.run import Run
from align.vlm import AlignModel
from featcache.files import publish, publish_json

SHUFFLE_SEED = 0
"""One fixed control: two runs compared under it saw the same exchanged images."""


@dataclass(frozen=True, slots=True)
class Caption:
    """One evaluated sample.

    images: its own keys. shown: the keys whose features the model was given.
    scores: "loss" (mean per supervised token, the right caption given), "token_accuracy", and what
    `align.metrics.score_caption` says of the generated caption.
    """

    id: str
    images: tuple[str, ...]
    shown: tuple[str, ...]
    source: str | None
    reference: str
    generated: str
    tokens: int
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What one evaluation found.

    folder: where it lies on disk. split_size: samples of the whole split, `len(captions)` of which
    were evaluated. left_out: samples that no sequence could be made of.
    figures: by name; "loss" and "token_accuracy" are means over supervised tokens and their n
    counts tokens, all others are means over captions.
    """

    folder: Path
    split: str
    shuffled: bool
    step: int
    split_size: int
    left_out: LeftOut
    decoding: EvalConfig
    figures: dict[str, Figure]
    captions: list[Caption]

    @property
    def document(self) -> dict[str, Any]:
        """Everything but the captions, as `metrics.json` holds it."""
        return {
            "split": self.split,
            "shuffled": self.shuffled,
            "step": self.step,
            "n": len(self.captions),
            "split_size": self.split_size,
            "left_out": self.left_out.counts,
            "decoding": dataclasses.asdict(self.decoding),
            "metrics": {name: dataclasses.asdict(figure) for name, figure in self.figures.items()},
        }


def evaluate(
    run: Run,
    split: str = "val",
    *,
    limit: int | None = None,
    shuffle_features: bool = False,
    decoding: EvalConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalResult:
    """Evaluates a run's connector on one of its splits and writes the result into the run.

    limit: only the first so many samples of the split. decoding: None takes the run's own settings.
    on_progress: called with (samples done, samples in all) at the start and after each batch.

    Raises DataError for a split that is unknown or empty, or has too few images to shuffle.
    """
    decoding = decoding or run.config.eval
    of_split = run.splits.split(split)
    own = list(of_split[:limit])
    shown = own
    loader = run.loader_of(own)
    usable = np.fromiter(loader.usable(), np.int64)
    if shuffle_features:
        shown = shuffled(own)
        if run.model.connector.varies:
            # Other images take other numbers of slots, for which there may be no room.
            loader = run.loader_of(shown)
            usable = np.intersect1d(usable, np.fromiter(loader.usable(), np.int64))
        else:
            loader.samples = shown  # what was tokenised still holds
        # Without an image there is nothing to exchange.
        usable = np.array([i for i in usable.tolist() if len(own[i].rows)], np.int64)
    if not len(usable):
        raise DataError(f"none of {len(own)} samples can be evaluated: {loader.skipped}")
    key_of_row = {
        int(row): key
        for sample in own
        for row, key in zip(sample.rows[:, 0], sample.record.images, strict=True)
    }

    captions: list[Caption] = []
    batches = list(in_order(len(usable), decoding.batch_size))
    on_progress(0, len(usable))
    stream = loader.stream(usable[indices] for indices in batches)
    for indices, batch in zip(batches, stream, strict=True):
        samples = [shown[index] for index in usable[indices].tolist()]
        batch = batch.to(run.model.device)
        losses, hits = score_tokens(run.model, batch)
        records = [sample.record for sample in samples]
        said = generate(run.model, run.encoder, records, batch.features, batch.sizes, decoding)
        for sample, loss, hit, generated in zip(samples, losses, hits, said, strict=True):
            captions.append(_caption(sample, key_of_row, loss, hit, generated))
        on_progress(len(captions), len(usable))

    name = f"{split}-shuffled" if shuffle_features else split
    result = EvalResult(
        folder=run.path / "eval" / name,
        split=split,
        shuffled=shuffle_features,
        step=run.step,
        split_size=len(of_split),
        left_out=loader.skipped,
        decoding=decoding,
        figures=_figures(captions),
        captions=captions,
    )
    _write(result)
    return result


def shuffled(samples: Sequence[Sample], seed: int = SHUFFLE_SEED) -> list[Sample]:
    """The samples with their images' rows exchanged, so that no sample keeps one of its own.

    The distinct rows are put into one random cycle (Sattolo 1986) and each gives way to the next.
    Where a sample has several images the cycle could hand it one of them back; then another cycle
    is drawn.

    Raises DataError where there are too few images for that.
    """
    images = {int(rows[0]): rows for sample in samples for rows in sample.rows}
    first = sorted(images)
    rng = np.random.default_rng(seed)
    for _ in range(100):
        cycle = rng.permutation(first)
        following = dict(zip(cycle.tolist(), np.roll(cycle, -1).tolist(), strict=True))
        exchanged = [
            Sample(
                sample.record,
                np.array(
                    [images[following[int(rows[0])]] for rows in sample.rows], np.int64
                ).reshape(sample.rows.shape),
            )
            for sample in samples
        ]
        if all(
            not np.isin(new.rows[:, 0], old.rows[:, 0]).any()
            for new, old in zip(exchanged, samples, strict=True)
        ):
            return exchanged
    raise DataError(
        f"{len(first)} different image{'s' * (len(first) != 1)} among {len(samples)} samples are "
        "too few to give each sample another's; evaluate more samples"
    )


@torch.inference_mode()
def score_tokens(
    model: AlignModel, batch: Batch
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.bool_]]]:
    """For each sample, over its supervised positions with the right tokens before them: the loss
    of each in nats, and whether the most likely token is the right one.
    """
    with model.precision():
        supervised = model.supervised_hidden(batch)
        losses, hits = [], []
        rows = max(1, CHUNK_BYTES // (4 * len(model.llm.head)))
        for chunk, targets in zip(supervised.split(rows), batch.targets.split(rows), strict=True):
            logits = (chunk @ model.llm.head.T).float()
            losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            hits.append(logits.argmax(dim=1) == targets)
    sample_of = batch.predictors // batch.input_ids.shape[1]
    counts = torch.bincount(sample_of, minlength=len(batch.ids)).tolist()
    return (
        [part.numpy() for part in torch.cat(losses).cpu().split(counts)],
        [part.numpy() for part in torch.cat(hits).cpu().split(counts)],
    )


def _caption(
    shown: Sample,
    key_of_row: dict[int, str],
    losses: NDArray[np.float32],
    hits: NDArray[np.bool_],
    generated: str,
) -> Caption:
    record = shown.record
    reference = answer(record)
    return Caption(
        id=record.id,
        images=record.images,
        shown=tuple(key_of_row[int(row)] for row in shown.rows[:, 0]),
        source=record.source,
        reference=reference,
        generated=generated,
        tokens=len(losses),
        scores={
            "loss": float(losses.mean()),
            "token_accuracy": float(hits.mean()),
            **score_caption(record.source, reference, generated),
        },
    )


def _figures(captions: Sequence[Caption]) -> dict[str, Figure]:
    tokens = sum(caption.tokens for caption in captions)
    figures = summarise(
        [caption.scores for caption in captions],
        [caption.source for caption in captions],
        [caption.reference for caption in captions],
    )
    # A mean over samples would count the tokens of short captions more than those of long ones.
    for name in ("loss", "token_accuracy"):
        total = sum(caption.scores[name] * caption.tokens for caption in captions)
        figures[name] = Figure(total / tokens, tokens)
    return figures


def _write(result: EvalResult) -> None:
    folder = result.folder
    lines = [json.dumps(dataclasses.asdict(caption)) + "\n" for caption in result.captions]
    publish(folder / "captions.jsonl", ["".join(lines).encode()])
    publish(folder / "report.md", [_markdown(result).encode()])
    # Last: where it is, the other two are of the same evaluation.
    publish_json(folder / "metrics.json", result.document)


def _markdown(result: EvalResult) -> str:
    title = f"{result.split}, shuffled features" if result.shuffled else result.split
    lines = [
        f"# {title}",
        "",
        f"{len(result.captions):,} of {result.split_size:,} samples, step {result.step:,}.",
        "",
        "| metric | value | chance | N |",
        "|---|---:|---:|---:|",
    ]
    for name, figure in result.figures.items():
        chance = "" if figure.chance is None else f"{figure.chance:.4f}"
        lines.append(f"| {name} | {figure.value:.4f} | {chance} | {figure.n:,} |")
    lines += ["", "| id | reference | generated |", "|---|---|---|"]
    for caption in result.captions[:10]:
        cells = (caption.id, caption.reference, caption.generated)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that neither ends a table's row nor its cell, nor is taken for HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
