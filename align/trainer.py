"""Training the connector: one plain loop, resumable at any checkpoint.

The loop is in `_steps`; read it first. All that decides a step's result is in the model, the
optimizer and the step's number, and all of these are in a checkpoint.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from align.config import RunConfig
from align.data.sampling import in_order
from align.data.templates import answer
from align.distributed import Ranks, joined_ranks
from align.errors import AlignError, DataError
from align.meter import Meter, Work
from align.optim import lr_at, set_lr
from align.preemption import StopRequest
from align.profile import recorded
from align.run import Run
from align.session import Session, start_session
from align.tracking import EvalEvent, OnEvent, SampleCaption, SampleEvent
from featcache.device import resolve_device
from featcache.object_path import StorePath


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a training ended. losses: nats per supervised token; None where never evaluated.

    step: optimizer steps done in all. seconds: of this call.
    stopped_by: the signal that ended it before its time, with a checkpoint; None where it is done.
    """

    path: Path
    step: int
    loss: float | None
    eval_loss: float | None
    seconds: float
    stopped_by: signal.Signals | None = None


def train(
    config: RunConfig,
    features: Sequence[StorePath | str],
    out: Path | str,
    resume: bool = False,
    on_event: OnEvent | None = None,
    *,
    profile: bool = False,
) -> TrainResult:
    """Trains a connector on a feature store and leaves a run's folder in `out`.

    Where torchrun or srun started several processes, each calls this, and they train together.

    features: one store, or as many as the connector takes.
    resume: go on from the newest checkpoint in `out`; starts anew where there is none.
    on_event: called with every event, in the order in which things happen; of rank 0 only.
    profile: also write a trace of some steps below `out` (align/profile.py).

    SIGTERM and SIGUSR1 end it after the step under way, with a checkpoint.

    Raises the errors of `align.run.assemble`; RunError where `out` already holds a run, or one that
    is being resumed had other settings; DataError where no sample can be used, more records than
    `data.max_missing` allows have no features, or damaged features make the loss not finite;
    RankError where another rank ends; AlignError where the loss stops being finite otherwise.
    """
    started = time.perf_counter()
    with (
        StopRequest() as stop,
        joined_ranks(resolve_device(config.train.device)) as ranks,
    ):
        session = start_session(config, features, Path(out), resume, on_event, ranks)
        with closing(session.run), recorded(session.run, profile, session.tell) as end_step:
            stopped_by = _steps(session, stop, end_step)
    return TrainResult(
        session.run.path,
        session.run.step,
        session.loss,
        session.eval_loss,
        time.perf_counter() - started,
        stopped_by,
    )


def _steps(
    session: Session, stop: StopRequest, end_step: Callable[[], None]
) -> signal.Signals | None:
    """The loop. end_step: told of each step's end. Returns the signal that ended it early."""
    run, optimizer, ranks = session.run, session.optimizer, session.ranks
    config, every, device = run.config, run.config.train, run.model.device
    parameters = list(run.model.connector.parameters())
    meter = Meter()
    with closing(session.batches()) as batches:
        while run.step < session.total_steps:
            # -- one step: a sum over the batches of all ranks, then one update
            seed_step(every.seed, run.step, ranks.index)
            loss_sum, work, ends = torch.zeros((), device=device), Work(), False
            while not ends:
                batch, ends = meter.wait_for(batches)
                if batch.num_supervised:
                    loss, _ = run.model(batch.to(device))
                    loss.backward()
                    loss_sum += loss.detach()
                    work.add(batch, run.flop(batch))
                elif run.model.llm.is_sharded:
                    run.model.idle()
            work.stops = int(stop.signal is not None)
            of_all = work.sum(ranks)
            lr = lr_at(config.optim, run.step, session.total_steps)
            if of_all.supervised:
                sum_gradients(ranks, parameters, loss_sum)
                grad_norm = update(optimizer, lr, of_all.supervised, config.optim.clip, loss_sum)
                session.watch(loss_sum / of_all.supervised, grad_norm)
            else:
                session.require_usable()
            meter.count(of_all)
            run.step += 1
            end_step()

            # -- what is told and kept; none of it changes what is learned
            last = run.step == session.total_steps
            if _due(run.step, every.log_every, last):
                if session.unchecked and (newest := session.check_finite()):
                    session.tell(meter.line(run, session.total_steps, *newest, lr))
                session.tell_skipped()
            if of_all.stops and not last:
                session.save()
                session.finish("stopped")
                return stop.signal or signal.SIGTERM  # another rank's
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
    return None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes what a step draws, e.g. dropout, a function of these alone: a resumed run draws the
    same, and no rank what another one draws."""
    torch.manual_seed(xxhash.xxh3_64_intdigest(f"{seed}:{step}:{rank}".encode()))


def sum_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter], loss_sum: Tensor) -> None:
    """Gradients and the summed loss, in place, over all ranks. A parameter that had no part in a
    batch has a gradient of zeros: whether it decays must not hang on how a step was cut."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ranks.count > 1:
        ranks.sum_tensors([loss_sum, *(p.grad for p in parameters if p.grad is not None)])


def update(
    optimizer: torch.optim.Optimizer, lr: float, tokens: int, clip: float, loss: Tensor
) -> Tensor:
    """One optimizer step on summed gradients; returns their norm per token, before clipping.

    Changes neither weights nor moments where `loss` or the norm is not finite, without asking the
    device whether it is.

    tokens: supervised tokens that the gradients sum over, in all micro-batches (and ranks):
        dividing here, once, weighs every token alike however the step was cut into batches.
    clip: largest norm; 0 does not clip.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / tokens)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    set_lr(optimizer, lr)
    # What `torch.amp.GradScaler` tells a fused optimizer: 1.0 leaves everything as it was.
    optimizer.found_inf = (~(norm + loss).isfinite()).float()  # type: ignore[attr-defined]
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
    loader, ranks = run.loader("val"), run.ranks
    count = min(limit, len(loader.samples)) if limit else len(loader.samples)
    loss_sum, tokens, samples = torch.zeros((), device=run.model.device), 0, 0
    whole = in_order(count, run.config.train.batch_size * ranks.count)
    with _eval_mode(run), closing(loader.stream_steps(whole, ranks.index, ranks.count)) as batches:
        for batch, _ in batches:
            if batch.num_supervised:
                loss, supervised = run.model(batch.to(run.model.device))
                loss_sum += loss
                tokens += supervised
                samples += len(batch.ids)
            elif run.model.llm.is_sharded:
                run.model.idle()
    tokens, samples = ranks.sum_counts(tokens, samples)
    ranks.sum_tensors([loss_sum])
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
