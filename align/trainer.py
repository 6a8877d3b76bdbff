"""Training the connector: one plain loop, resumable at any checkpoint.

The loop is in `train`; read it first. All that decides a step's result is in the model, the
optimizer, the random generators and the step's number, and all of these are in a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from align.config import RunConfig
from align.data.sampling import in_order
from align.data.templates import answer
from align.errors import AlignError, DataError
from align.optim import lr_at, set_lr
from align.run import Run
from align.session import Meter, start_session
from align.tracking import EvalEvent, OnEvent, SampleCaption, SampleEvent
from featcache.object_path import StorePath


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished training. losses: nats per supervised token; None where never evaluated.

    step: optimizer steps done in all. seconds: of this call.
    """

    path: Path
    step: int
    loss: float | None
    eval_loss: float | None
    seconds: float


def train(
    config: RunConfig,
    features: Sequence[StorePath | str],
    out: Path | str,
    resume: bool = False,
    on_event: OnEvent | None = None,
) -> TrainResult:
    """Trains a connector on a feature store and leaves a run's folder in `out`.

    features: one store, or as many as the connector takes.
    resume: go on from the newest checkpoint in `out`; starts anew where there is none.
    on_event: called with every event, in the order in which things happen.

    Raises the errors of `align.run.assemble`; RunError where `out` already holds a run, or one that
    is being resumed had other settings; DataError where no sample can be used, more records than
    `data.max_missing` allows have no features, or damaged features make the loss not finite;
    AlignError where it stops being finite otherwise.
    """
    started = time.perf_counter()
    session = start_session(config, features, Path(out), resume, on_event)
    run, optimizer, sampler = session.run, session.optimizer, session.sampler
    every = config.train
    index_batches = sampler.batches(run.step, session.total_steps)
    meter = Meter()
    with closing(run), closing(session.loader.stream(index_batches)) as batches:
        while run.step < session.total_steps:
            # -- one step: a sum over micro-batches, then one update
            loss_sum = torch.zeros((), device=run.model.device)
            tokens = 0
            for _ in range(every.grad_accum):
                batch = meter.wait_for(batches)
                if not batch.num_supervised:
                    continue
                loss, count = run.model(batch.to(run.model.device))
                loss.backward()
                loss_sum += loss.detach()
                tokens += count
                meter.count(batch)
            lr = lr_at(config.optim, run.step, session.total_steps)
            if tokens:
                grad_norm = update(optimizer, lr, tokens, config.optim.clip)
                session.watch(loss_sum / tokens, grad_norm)
            else:
                session.require_usable()
            run.step += 1

            # -- what is told and kept; none of it changes what is learned
            last = run.step == session.total_steps
            if _due(run.step, every.log_every, last):
                if session.unchecked:
                    loss_now, norm_now = session.check_finite()
                    session.tell(meter.line(session, loss_now, norm_now, lr))
                session.tell_skipped()
            with meter.paused():
                saves = _due(run.step, every.save_every) or last
                # Which checkpoint is best can be told only of those that were evaluated themselves.
                evaluates = _due(run.step, every.eval_every, last) or (saves and every.keep_best)
                if evaluates and run.splits.val:
                    session.evaluated(session.tell(evaluate_loss(run, every.eval_samples)))
                if _due(run.step, every.sample_every, last) and run.splits.val and every.samples:
                    session.tell(sample_captions(run, every.samples))
                if saves:
                    session.save()
    session.finish()
    return TrainResult(
        run.path, run.step, session.loss, session.eval_loss, time.perf_counter() - started
    )


def update(optimizer: torch.optim.Optimizer, lr: float, tokens: int, clip: float) -> Tensor:
    """One optimizer step on summed gradients; returns their norm per token, before clipping.

    tokens: supervised tokens that the gradients sum over, in all micro-batches (and ranks):
        dividing here, once, weighs every token alike however the step was cut into batches.
    clip: largest norm; 0 does not clip.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / tokens)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def evaluate_loss(run: Run, limit: int = 0) -> EvalEvent:
    """The mean loss per supervised token over the validation split, always in the same order.

    limit: the first so many samples; 0 takes all.

    Raises DataError where none of them has a supervised token, AlignError where the loss is not
    finite.
    """
    started = time.perf_counter()
    loader = run.loader("val")
    count = min(limit, len(loader.samples)) if limit else len(loader.samples)
    loss_sum, tokens, samples = torch.zeros((), device=run.model.device), 0, 0
    with _eval_mode(run):
        for batch in loader.stream(in_order(count, run.config.train.batch_size)):
            if not batch.num_supervised:
                continue
            loss, supervised = run.model(batch.to(run.model.device))
            loss_sum += loss
            tokens += supervised
            samples += len(batch.ids)
    if not tokens:
        raise DataError(f"none of {count:,} validation samples can be used: {loader.skipped}")
    loss_mean = float(loss_sum) / tokens
    if not math.isfinite(loss_mean):
        raise AlignError(
            f"step {run.step}: the loss over {samples:,} validation samples is {loss_mean}; lower "
            "optim.lr, or look for damaged features with `featcache verify`"
        )
    return EvalEvent(run.step, loss_mean, tokens, samples, time.perf_counter() - started)


def sample_captions(run: Run, count: int) -> SampleEvent:
    """Captions of the first `count` validation samples beside their references."""
    from align.generate import generate

    samples = run.splits.split("val")[:count]
    records = [sample.record for sample in samples]
    rows = np.concatenate([sample.rows for sample in samples])
    with _eval_mode(run):
        features = run.reader.read_stored(rows)
        sizes = run.stores.sizes_of(rows)
        texts = generate(run.model, run.encoder, records, features, sizes, run.config.eval)
    return SampleEvent(
        run.step,
        tuple(
            SampleCaption(s.record.id, s.record.images, answer(s.record), text)
            for s, text in zip(samples, texts, strict=True)
        ),
    )


def _due(step: int, every: int, last: bool = False) -> bool:
    """Whether it is time for what happens `every` so many steps, and at the `last`; 0 is never."""
    return every > 0 and (last or step % every == 0)


class _eval_mode:  # noqa: N801 - reads as `with _eval_mode(run):`
    """Dropout off inside, and the mode of before restored after."""

    def __init__(self, run: Run) -> None:
        self._model = run.model
        self._was_training = run.model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.train(self._was_training)
