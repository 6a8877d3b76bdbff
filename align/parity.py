"""Cached against live: does a connector see from the store what it would see from the images?

The images of some samples go through the encoder again. Then the store's features and these are
compared, and the loss and the connector's gradients that each gives with the same language model.

    I images of a sample, P patches, D encoder width
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from align.data.collate import Batch, collate
from align.data.dataset import Sample
from align.data.tokens import TokenizedSample
from align.errors import TemplateError
from align.run import Run
from align.vlm import AlignModel
from featcache.codecs import LayerCodec
from featcache.errors import ConfigError, ImageError
from featcache.live import LiveEncoder, tolerance
from featcache.object_path import StorePath

DRAWS = 4
"""Times that a sample is computed with live features that carry an error like the store's."""
MARGIN = 6.0
"""Allowed to loss and gradients over what is to be expected. Largest measured over 80 samples of
the demo with each codec, in fp32 and in bf16: 3.8 times that for a loss, 4.6 for gradients."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity, cached against live, over all samples.

    what: "features", "loss" or "gradients". of: for features the store and its layer.
    worst, allowed: the relative error that came nearest to what is allowed, or went furthest beyond
        it, and what is allowed there. where: an image, or a sample and a parameter.
    median: of all relative errors.
    """

    what: str
    of: str
    worst: float
    median: float
    allowed: float
    where: str

    @property
    def agrees(self) -> bool:
        """Whether nothing differs by more than is explained. False for NaN."""
        return self.worst <= self.allowed


@dataclass(frozen=True, slots=True)
class Rounding:
    """What storing costs a store's features, which is no fault.

    codec: its name. error: median relative L2 error of an image's stored features against the live
    ones. largest: difference of any one value.
    """

    store: str
    codec: str
    error: float
    largest: float


@dataclass(frozen=True, slots=True)
class ParityReport:
    """asked: samples drawn; compared: of them computed both ways, with so many images.
    not_compared: a line for each other. comparisons: features of each store, loss, gradients; empty
    where nothing was compared. precision: of the language model, "fp32" or "bf16".
    """

    asked: int
    compared: int
    images: int
    not_compared: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    roundings: tuple[Rounding, ...]
    precision: str

    @property
    def agrees(self) -> bool:
        """Whether something was compared, and all of it agrees."""
        return bool(self.comparisons) and all(each.agrees for each in self.comparisons)


EPSILON = torch.finfo(torch.float32).eps
"""Of the last sums, whatever the features."""


@dataclass(frozen=True, slots=True)
class _Move:
    """How far a sample's loss or gradients moved. error: relative, cached against live.
    expected: what its own features' errors lead to expect. drawn: relative errors of the draws."""

    error: float
    expected: float
    drawn: tuple[float, ...]
    where: str


@dataclass(frozen=True, slots=True)
class _Difference:
    """error: relative. allowed: see `compare`. where: what it was found at."""

    error: float
    allowed: float
    where: str


def compare(
    run: Run,
    count: int = 8,
    *,
    encoders: Sequence[str] = (),
    images: StorePath | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ParityReport:
    """Compute `count` training samples, spread evenly over the store's rows, from both.

    run: of `align.run.assemble`, or of `load_run`; its connector is put into eval mode.
    encoders: of each store by another name or folder; empty takes the names in the stores'
    fingerprints. images: where the images lie now, if elsewhere. on_progress: (samples done, of).

    What is explained:

    1. *features* of an image are compared with the live ones rounded as the store rounds them; what
       is then left may be the compute's noise, `featcache.live.tolerance`.
    2. *loss* and *gradients* of a sample are compared with those of the live features as they are,
       not rounded. The store's features are the live ones with an error e: that of the codec, and
       the noise. To first order the loss moves by g . e, where g is its gradient in the features;
       with errors of random signs that has a standard deviation of |g * e|. What rounding inside
       the language model adds (bf16), and what the gradients do, is found by trying: `DRAWS` times
       the signs of e are drawn anew and the noise added. Allowed is `MARGIN` times the largest of:
       for a loss the standard deviation, for gradients the sample's own draws, and for both the
       root mean square of all samples' draws.

    Gradients are those of all parameters, as one vector; losses are means over a sample's tokens.

    Raises DataError without a sample to train on, EncoderError for an encoder that cannot be
    loaded, FingerprintMismatch for another one than the store's, CorruptStoreError.
    """
    run.model.eval()
    towers = _towers(run, encoders, images)
    with_images = [sample for sample in run.splits.split("train") if len(sample.rows)]
    # Spread over the store rather than over the data, which may name its images in any order.
    by_row = sorted(with_images, key=lambda sample: int(sample.rows[0, 0]))
    chosen = np.linspace(0, len(by_row) - 1, min(count, len(by_row))).round().astype(int).tolist()
    not_compared: list[str] = []
    found: list[_Compared] = []
    for done, index in enumerate(chosen):
        on_progress(done, len(chosen))
        sample = by_row[index]
        try:
            found.append(_Compared.of(run, towers, sample, seed=index))
        except (ImageError, TemplateError) as error:
            not_compared.append(f"sample {sample.record.id}: {error}")
    on_progress(len(chosen), len(chosen))
    return ParityReport(
        asked=len(chosen),
        compared=len(found),
        images=sum(len(each.features[0]) for each in found),
        not_compared=tuple(not_compared),
        comparisons=tuple(_comparisons(towers, found)) if found else (),
        roundings=tuple(_roundings(towers, found)) if found else (),
        precision="fp32" if run.model.autocast is None else "bf16",
    )


@dataclass(frozen=True, slots=True)
class _Tower:
    """One of the run's stores and its encoder. codec: that of the layer, on the model's device."""

    store: str
    layer: str
    codec: LayerCodec
    encoder: LiveEncoder

    def images(self, rows: Sequence[int], device: torch.device) -> list[_Image]:
        """Encoded now. Raises ImageError with the row where an image cannot be."""
        found = []
        for row in rows:
            name = self.encoder.name(row)
            try:
                encoded = self.encoder.encode(row)
            except ImageError as error:
                raise ImageError(error.reason, f"{name}: {error.detail}") from error
            # A copy, since what comes out of inference mode cannot be part of a graph.
            live = encoded.features[self.layer].to(device, torch.float32, copy=True)
            again = self.codec.encode(live)[0].decode(torch.float32)
            noise = self.encoder.noise_of(live)
            found.append(_Image(name, live, again, noise))
        return found


@dataclass(frozen=True, slots=True)
class _Image:
    """name: for messages. live: float32[1, P, D], from the encoder. again: the same as the store's
    codec gives it back. noise: relative L2 error of `live` that is no fault."""

    name: str
    live: Tensor
    again: Tensor
    noise: float

    def difference(self, stored: Tensor) -> _Difference:
        """stored: float32[1, P, D]."""
        norm = float(self.again.norm())
        distance = float((stored - self.again).norm())
        error = distance / norm if norm else distance
        return _Difference(error, tolerance(self.live, self.again, self.noise), self.name)

    def rounding(self, stored: Tensor) -> tuple[float, float]:
        """(relative L2 error, largest error of a value) of what is stored against `live`."""
        difference = stored - self.live
        norm = float(self.live.norm())
        return float(difference.norm()) / norm if norm else 0.0, float(difference.abs().max())

    @property
    def deviation(self) -> Tensor:
        """float32[1, P, D]: the standard deviation to expect of each value in the store."""
        spread = self.noise * self.live.norm() / math.sqrt(self.live.numel())
        return ((self.again - self.live).square() + spread.square()).sqrt()

    def like_stored(self, chance: torch.Generator) -> Tensor:
        """float32[1, P, D]: the live features with an error such as storing them makes."""
        error = self.deviation.cpu()
        signs = torch.randint(0, 2, error.shape, generator=chance).mul_(2).sub_(1)
        return self.live + (error * signs).to(self.live.device)


@dataclass(frozen=True, slots=True)
class _Compared:
    """One sample. features, rounding: of each store's images."""

    features: tuple[tuple[_Difference, ...], ...]
    rounding: tuple[tuple[tuple[float, float], ...], ...]
    loss: _Move
    gradients: _Move

    @classmethod
    def of(cls, run: Run, towers: Sequence[_Tower], sample: Sample, seed: int) -> _Compared:
        """Raises ImageError where an image cannot be encoded, TemplateError for a sample that
        cannot be trained on."""
        model = run.model
        sizes = run.stores.sizes_of(sample.rows)
        slots = [model.connector.num_slots(size) for size in sizes]
        tokens: TokenizedSample = run.encoder.encode(sample.record, slots)
        live = [
            tower.images(sample.rows[:, t].tolist(), model.device) for t, tower in enumerate(towers)
        ]
        cached = run.reader.read_stored(sample.rows)
        batch = collate([tokens], [sample], cached, sizes).to(model.device)
        stored = [each.to(model.device).decode(torch.float32) for each in cached]

        joined = [torch.cat([image.live for image in images]) for images in live]
        inputs = [each.requires_grad_() for each in joined]
        loss, gradients, slopes = _pass(model, replace(batch, features=tuple(inputs)), inputs)
        deviation = math.sqrt(
            sum(
                float((slope * torch.cat([image.deviation for image in images])).square().sum())
                for slope, images in zip(slopes, live, strict=True)
            )
        )
        drawn, moved = [], []
        chance = torch.Generator().manual_seed(seed)
        for _ in range(DRAWS):
            noisy = tuple(
                torch.cat([image.like_stored(chance) for image in images]) for images in live
            )
            other, others, _ = _pass(model, replace(batch, features=noisy))
            drawn.append(abs(other - loss) / abs(loss))
            moved.append(_distance(others, gradients)[0])
        cached_loss, cached_gradients, _ = _pass(model, batch)
        error, parameter = _distance(cached_gradients, gradients)
        name = f"sample {sample.record.id}"
        return cls(
            features=tuple(
                tuple(image.difference(stored[t][i : i + 1]) for i, image in enumerate(images))
                for t, images in enumerate(live)
            ),
            rounding=tuple(
                tuple(image.rounding(stored[t][i : i + 1]) for i, image in enumerate(images))
                for t, images in enumerate(live)
            ),
            loss=_Move(
                abs(cached_loss - loss) / abs(loss), deviation / abs(loss), tuple(drawn), name
            ),
            gradients=_Move(error, max(moved), tuple(moved), f"{name}, most in {parameter}"),
        )


def _towers(run: Run, encoders: Sequence[str], images: StorePath | None) -> list[_Tower]:
    stores = run.stores.stores
    if encoders and len(encoders) != len(stores):
        raise ConfigError(
            f"--encoder: {len(encoders)} are given for {len(stores)} stores; give each of them, in "
            "the order of the stores"
        )
    device = run.model.device
    return [
        _Tower(
            str(store.path),
            layer,
            store.layer_codec(layer).to(device),
            LiveEncoder(
                store,
                model=encoders[t] if encoders else None,
                images=images,
                device=str(device),
                cure="give the encoder that the store was made with: --encoder NAME|HUB_ID|FOLDER",
            ),
        )
        for t, (store, layer) in enumerate(zip(stores, run.layers, strict=True))
    ]


def _pass(
    model: AlignModel, batch: Batch, inputs: Sequence[Tensor] = ()
) -> tuple[float, dict[str, Tensor], tuple[Tensor, ...]]:
    """(mean loss, its gradient in each parameter of the connector, its gradient in each input)."""
    names, parameters = zip(*model.connector.named_parameters(), strict=True)
    loss, num_supervised = model(batch)
    mean = loss / num_supervised
    found = torch.autograd.grad(mean, [*parameters, *inputs], materialize_grads=True)
    gradients = dict(zip(names, found[: len(names)], strict=True))
    return float(mean.detach()), gradients, found[len(names) :]


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Relative L2 distance of all gradients as one vector, and the parameter that adds most."""
    squares = {name: float((ours[name] - theirs[name]).norm()) ** 2 for name in ours}
    norm = math.sqrt(sum(float(theirs[name].norm()) ** 2 for name in theirs))
    distance = math.sqrt(sum(squares.values()))
    return distance / norm if norm else distance, max(squares, key=squares.__getitem__)


def _comparisons(towers: Sequence[_Tower], found: Sequence[_Compared]) -> Iterator[Comparison]:
    for t, tower in enumerate(towers):
        differences = [image for each in found for image in each.features[t]]
        yield _comparison("features", f"{tower.store}, layer {tower.layer}", differences)
    yield _comparison("loss", "", _allowing([each.loss for each in found]))
    yield _comparison("gradients", "", _allowing([each.gradients for each in found]))


def _allowing(moves: Sequence[_Move]) -> list[_Difference]:
    # One sample's few draws may all happen to be small.
    draws = [draw for move in moves for draw in move.drawn]
    typical = math.sqrt(sum(draw**2 for draw in draws) / len(draws))
    return [
        _Difference(move.error, MARGIN * max(move.expected, typical, EPSILON), move.where)
        for move in moves
    ]


def _comparison(what: str, of: str, differences: Sequence[_Difference]) -> Comparison:
    def excess(each: _Difference) -> float:
        ratio = each.error / each.allowed
        return math.inf if math.isnan(ratio) else ratio

    worst = max(differences, key=excess)
    median = statistics.median(each.error for each in differences)
    return Comparison(what, of, worst.error, median, worst.allowed, worst.where)


def _roundings(towers: Sequence[_Tower], found: Sequence[_Compared]) -> Iterator[Rounding]:
    for t, tower in enumerate(towers):
        of_images = [image for each in found for image in each.rounding[t]]
        yield Rounding(
            tower.store,
            tower.codec.codec.name,
            statistics.median(error for error, _ in of_images),
            max(largest for _, largest in of_images),
        )
