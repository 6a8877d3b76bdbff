"""Training the connector: one plain loop, resumable at any checkpoint.

The loop is in `train`; read it first. All that decides a step's result is in the model, the
optimizer, the random generators and the step's number, and all of these are in a checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from align.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_optimizer,
    prune,
    remove_partial,
    restore_rng,
    save_checkpoint,
)
from align.config import RunConfig, config_dict, diff_fields, load_config, save_config
from align.data.collate import Batch, Loader
from align.data.sampling import StepSampler, in_order
from align.data.templates import answer
from align.errors import AlignError, CheckpointError, RunError
from align.optim import build_optimizer, lr_at
from align.run import Run, RunFolder, absolute, assemble, restore, versions
from align.tracking import (
    LOGGED,
    Caption,
    CheckpointEvent,
    EvalEvent,
    Event,
    MetricsLog,
    NoticeEvent,
    OnEvent,
    SampleEvent,
    StepEvent,
)

E = TypeVar("E", bound=Event)

FREE_TO_CHANGE = (
    "eval",
    "train.device",
    "train.eval_every",
    "train.eval_samples",
    "train.keep_best",
    "train.keep_checkpoints",
    "train.log_every",
    "train.read_ahead",
    "train.read_threads",
    "train.sample_every",
    "train.samples",
    "train.save_every",
)
"""Settings that may differ when a run is resumed: they decide what is told, not what is learned."""


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
    features: Sequence[Path | str],
    out: Path | str,
    resume: bool = False,
    on_event: OnEvent | None = None,
) -> TrainResult:
    """Trains a connector on a feature store and leaves a run's folder in `out`.

    features: one store.
    resume: go on from the newest checkpoint in `out`; starts anew where there is none.
    on_event: called with every event, in the order in which things happen.

    Raises the errors of `align.run.assemble`; RunError where `out` already holds a run, or one that
    is being resumed had other settings; AlignError where the loss stops being finite.
    """
    started = time.perf_counter()
    session = _start(config, features, Path(out), resume, on_event)
    run, optimizer, sampler = session.run, session.optimizer, session.sampler
    every = config.train
    index_batches = sampler.batches(run.step, session.total_steps)
    meter = _Meter()
    with closing(session.loader.stream(index_batches)) as batches:
        while run.step < session.total_steps:
            # -- one step: a sum over micro-batches, then one update
            loss_sum = torch.zeros((), device=run.model.device)
            tokens = 0
            for _ in range(every.grad_accum):
                batch = meter.wait_for(batches)
                loss, count = run.model(batch.to(run.model.device))
                loss.backward()
                loss_sum += loss.detach()
                tokens += count
                meter.count(batch)
            lr = lr_at(config.optim, run.step, session.total_steps)
            grad_norm = update(optimizer, lr, tokens, config.optim.clip)
            session.watch(loss_sum / tokens, grad_norm)
            run.step += 1

            # -- what is told and kept; none of it changes what is learned
            last = run.step == session.total_steps
            if _due(run.step, every.log_every, last):
                loss_now, norm_now = session.check_finite()
                session.tell(meter.line(session, loss_now, norm_now, lr))
                session.tell_skipped()
            with meter.paused():
                if _due(run.step, every.eval_every, last) and run.splits.val:
                    session.eval_loss = session.tell(evaluate_loss(run, every.eval_samples)).loss
                if _due(run.step, every.sample_every, last) and run.splits.val:
                    session.tell(sample_captions(run, every.samples))
                if _due(run.step, every.save_every) or last:
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
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def evaluate_loss(run: Run, limit: int = 0) -> EvalEvent:
    """The mean loss per supervised token over the validation split, always in the same order.

    limit: the first so many samples; 0 takes all.
    """
    started = time.perf_counter()
    loader = run.loader("val")
    count = min(limit, len(loader.samples)) if limit else len(loader.samples)
    loss_sum, tokens, samples = torch.zeros((), device=run.model.device), 0, 0
    with _eval_mode(run):
        for batch in loader.stream(in_order(count, run.config.train.batch_size)):
            loss, supervised = run.model(batch.to(run.model.device))
            loss_sum += loss
            tokens += supervised
            samples += len(batch.ids)
    loss_mean = float(loss_sum) / tokens
    return EvalEvent(run.step, loss_mean, tokens, samples, time.perf_counter() - started)


def sample_captions(run: Run, count: int) -> SampleEvent:
    """Captions of the first `count` validation samples beside their references."""
    from align.generate import generate

    samples = run.splits.split("val")[:count]
    records = [sample.record for sample in samples]
    with run.store.reader(run.layer, threads=1, depth=1) as reader, _eval_mode(run):
        features = reader.read(np.concatenate([sample.rows for sample in samples]))
        texts = generate(run.model, run.encoder, records, features, run.config.eval)
    return SampleEvent(
        run.step,
        tuple(
            Caption(s.record.id, s.record.images, answer(s.record), text)
            for s, text in zip(samples, texts, strict=True)
        ),
    )


@dataclass(slots=True)
class _Session:
    """What the loop holds besides the model: where it tells, where it saves, what it watches."""

    run: Run
    optimizer: torch.optim.Optimizer
    sampler: StepSampler
    loader: Loader
    total_steps: int
    on_event: OnEvent | None
    log: MetricsLog
    loss: float | None = None
    eval_loss: float | None = None
    unchecked: list[tuple[int, Tensor]] = field(default_factory=list)
    skipped_told: int = 0

    def tell(self, event: E) -> E:
        """Passes an event on, and into metrics.jsonl where it belongs there."""
        if isinstance(event, LOGGED):
            self.log.append(event)
        if self.on_event is not None:
            self.on_event(event)
        return event

    def watch(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Remembers a step's loss and norm on the device: asking for them would wait for it."""
        self.unchecked.append((self.run.step, torch.stack([loss, grad_norm])))

    def check_finite(self) -> tuple[float, float]:
        """Loss and gradient norm of the newest step.

        Raises AlignError where a step since the last check was not finite; no checkpoint was
        written since.
        """
        steps = [step for step, _ in self.unchecked]
        values = torch.stack([value for _, value in self.unchecked]).tolist()
        self.unchecked.clear()
        for step, (loss, norm) in zip(steps, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._stop_not_finite(step, loss, norm)
        self.loss = values[-1][0]
        return values[-1][0], values[-1][1]

    def tell_skipped(self) -> None:
        """Tells of samples that turned out, once tokenised, to have nothing to learn."""
        if self.loader.skipped.total > self.skipped_told:
            self.skipped_told = self.loader.skipped.total
            self.tell(NoticeEvent(f"skipped so far: {self.loader.skipped}"))

    def save(self) -> None:
        """A checkpoint of the steps done so far; never of weights that may not be finite."""
        if self.unchecked:
            self.check_finite()
        state = {
            **self.run.identity(),
            "config": config_dict(self.run.config),
            "total_steps": self.total_steps,
            "samples_seen": self.run.step * self.sampler.step_size,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
        }
        train = self.run.config.train
        folder = self.run.folder.checkpoints
        saved = save_checkpoint(
            folder, self.run.step, self.run.model.connector, self.optimizer, state
        )
        prune(folder, train.keep_checkpoints, train.keep_best)
        self.tell(CheckpointEvent(self.run.step, saved.path))

    def finish(self) -> None:
        """Marks the run as done."""
        folder = self.run.folder
        folder.write_info({**folder.read_info(), "status": "finished", "step": self.run.step})

    def _stop_not_finite(self, step: int, loss: float, norm: float) -> None:
        samples = self.run.splits.train
        ids = [samples[i].record.id for i in self.sampler.step(step).tolist()]
        file = self.run.path / "not_finite.json"
        file.write_text(json.dumps({"step": step + 1, "ids": ids}, indent=1), encoding="utf-8")
        raise AlignError(
            f"step {step + 1}: loss {loss}, gradient norm {norm} are not finite; its samples are "
            f"{', '.join(ids[:4])}{', ...' * (len(ids) > 4)} (all in {file}); lower optim.lr, or "
            "look at their features with `featcache verify`, then go on with --resume"
        )


def _start(
    config: RunConfig,
    features: Sequence[Path | str],
    out: Path,
    resume: bool,
    on_event: OnEvent | None,
) -> _Session:
    """Everything before the first step: folder, parts, position."""
    folder = RunFolder(out)
    found = list_checkpoints(folder.checkpoints)
    if folder.info.exists():
        if not resume:
            raise RunError(f"{out}: already holds a run; give --resume or another --out")
        _check_same_config(load_config(folder.config), config, out)
    run = assemble(config, features, out)
    optimizer = build_optimizer(config.optim, run.model.connector)
    loader = run.loader("train")
    train = config.train
    sampler = StepSampler(len(loader.samples), train.batch_size, train.grad_accum, train.seed)
    total_steps = train.steps or sampler.steps_in(train.epochs)
    session = _Session(
        run, optimizer, sampler, loader, total_steps, on_event, MetricsLog(folder.metrics)
    )
    splits = run.splits
    if found:
        remove_partial(folder.checkpoints)
        checkpoint = find_checkpoint(folder.checkpoints)
        state = restore(run, checkpoint)
        _check_same_data(state, run)
        load_optimizer(checkpoint, run.model.connector, optimizer)
        restore_rng(state)
        session.loss, session.eval_loss = state["loss"], state["eval_loss"]
        session.log.drop_after(run.step)
        session.tell(NoticeEvent(f"resuming at step {run.step:,} of {total_steps:,}"))
        other = diff_fields(state["versions"], versions())
        if other:
            session.tell(NoticeEvent(f"rounding may differ from before: {'; '.join(other)}"))
    else:
        out.mkdir(parents=True, exist_ok=True)
        save_config(config, folder.config)
        folder.metrics.write_text("")
    folder.write_info(_info(session, features))
    session.tell(
        NoticeEvent(
            f"{len(splits.train):,} samples to train on, {len(splits.val):,} held out, "
            f"{total_steps:,} steps of {sampler.step_size}"
        )
    )
    if splits.left_out.total:
        session.tell(
            NoticeEvent(
                f"left out {splits.left_out.total:,} of {splits.found:,} records: {splits.left_out}"
            )
        )
    return session


def _info(session: _Session, features: Sequence[Path | str]) -> dict[str, object]:
    """The content of run.json."""
    run = session.run
    return {
        "status": "running",
        "features": absolute(features),
        "store": run.store.fingerprint,
        "llm": run.model.llm.identity,
        "parameters": {
            "connector": sum(p.numel() for p in run.model.connector.parameters()),
            "llm": sum(p.numel() for p in run.model.llm.model.parameters()),
        },
        "samples": {
            "train": len(run.splits.train),
            "val": len(run.splits.val),
            "found": run.splits.found,
            "left_out": run.splits.left_out.counts,
        },
        "total_steps": session.total_steps,
        "step": run.step,
        "versions": versions(),
    }


def _check_same_config(before: RunConfig, now: RunConfig, out: Path) -> None:
    changed = [
        line
        for line in diff_fields(config_dict(before), config_dict(now))
        if not line.split(":")[0].startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise RunError(
            f"{out}: cannot be resumed with other settings: {'; '.join(changed)}; "
            "give the same ones or choose another --out"
        )


def _check_same_data(state: dict[str, object], run: Run) -> None:
    before, now = state["data"], run.identity()["data"]
    if before != now:
        raise CheckpointError(
            f"{run.path}: cannot be resumed on other training samples: "
            f"{'; '.join(diff_fields(before, now))}; give the data it was started with"
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


@dataclass(slots=True)
class _Meter:
    """Time, waiting and samples between two log lines, without what is `paused`."""

    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    excluded: float = 0.0
    samples: int = 0
    tokens: int = 0

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def count(self, batch: Batch) -> None:
        self.samples += len(batch.ids)
        self.tokens += batch.input_ids.numel()

    def paused(self) -> _Pause:
        return _Pause(self)

    def line(self, session: _Session, loss: float, grad_norm: float, lr: float) -> StepEvent:
        """The log line of the steps since the last; call it after asking the device for the loss,
        so that the device's work is within the time.
        """
        seconds = time.perf_counter() - self.since - self.excluded
        device = session.run.model.device
        cuda = device.type == "cuda"
        event = StepEvent(
            step=session.run.step,
            total_steps=session.total_steps,
            epoch=session.run.step * session.sampler.step_size / session.sampler.num_samples,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            samples_per_s=self.samples / seconds,
            tokens_per_s=self.tokens / seconds,
            data_wait_ratio=self.waited / seconds,
            memory_bytes=torch.cuda.max_memory_allocated(device) if cuda else 0,
        )
        self.since, self.waited, self.excluded = time.perf_counter(), 0.0, 0.0
        self.samples = self.tokens = 0
        return event


class _Pause:
    def __init__(self, meter: _Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._meter.excluded += time.perf_counter() - self._started
