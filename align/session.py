"""A training under way: how it starts or resumes, where it tells and saves, what it watches."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from align.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_optimizer,
    prune,
    remove_partial,
    save_checkpoint,
)
from align.config import RunConfig, config_dict, diff_fields, load_config, save_config
from align.data.collate import Batch
from align.data.dataset import LeftOutRecord, with_sources
from align.data.loader import Loader
from align.data.sampling import StepSampler
from align.distributed import ALONE, Ranks
from align.errors import AlignError, DataError, RunError
from align.init_from import initialise
from align.optim import build_optimizer
from align.resume import require_same_config, require_same_learning, require_same_start
from align.run import Run, RunFolder, absolute, absolute_paths, assemble, restore, versions
from align.tracking import (
    LOGGED,
    CheckpointEvent,
    EvalEvent,
    Event,
    MetricsLog,
    NoticeEvent,
    OnEvent,
)
from featcache.errors import ConfigError
from featcache.files import publish
from featcache.object_path import StorePath

E = TypeVar("E", bound=Event)

NOT_FINITE_IN_A_ROW = 10
"""Steps without a finite gradient after which `train.not_finite=skip` stops as well."""

LEFT_OUT_FILE = "left_out.jsonl"
"""In the run's folder: the records that are not used, one `LeftOutRecord` a line."""


@dataclass(slots=True)
class Session:
    """What the loop holds besides the model.

    loss, eval_loss: the newest known; eval_step: the step that eval_loss was measured at.
    init_from: what the connector's first weights were; None for random ones.
    unchecked: (step, [loss, gradient norm]) not yet looked at.
    not_finite: steps in a row whose loss or gradient was not finite, up to the last one looked at.
    """

    run: Run
    optimizer: torch.optim.Optimizer
    sampler: StepSampler
    loader: Loader
    total_steps: int
    on_event: OnEvent | None
    log: MetricsLog
    loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    init_from: dict[str, Any] | None = None
    unchecked: list[tuple[int, Tensor]] = field(default_factory=list)
    not_finite: int = 0
    skipped_told: int = 0

    @property
    def ranks(self) -> Ranks:
        """The processes that train together. Each has a session; the main one's tells and saves."""
        return self.run.ranks

    def batches(self) -> Generator[tuple[Batch, bool], None, None]:
        """This rank's batches of the steps that are left, see `Loader.stream_steps`."""
        ranks = self.ranks
        steps = self.sampler.steps(self.run.step, self.total_steps)
        return self.loader.stream_steps(steps, ranks.index, ranks.count)

    def tell(self, event: E) -> E:
        """Passes an event on, and into metrics.jsonl where it belongs there."""
        if not self.ranks.is_main:
            return event
        if isinstance(event, LOGGED):
            self.log.append(event)
        if self.on_event is not None:
            self.on_event(event)
        return event

    def evaluated(self, event: EvalEvent) -> None:
        """Remembers the newest validation loss, and the step that it belongs to."""
        self.eval_loss, self.eval_step = event.loss, event.step

    def watch(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Remembers a step's loss and norm on the device: asking for them would wait for it."""
        self.unchecked.append((self.run.step, torch.stack([loss, grad_norm])))

    def check_finite(self) -> tuple[float, float] | None:
        """Loss and gradient norm of the newest step of which they are finite; None where those of
        all steps since the last check are not.

        Raises AlignError where a step was not finite and `train.not_finite` is "stop", or where
        that was so of `NOT_FINITE_IN_A_ROW` steps. No such step has changed a weight.
        """
        steps = [step for step, _ in self.unchecked]
        values = torch.stack([value for _, value in self.unchecked]).tolist()
        self.unchecked.clear()
        newest: tuple[float, float] | None = None
        for step, (loss, norm) in zip(steps, values, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                newest, self.not_finite = (loss, norm), 0
            else:
                self.not_finite += 1
                self._not_finite(step, loss, norm)
        if newest is not None:
            self.loss = newest[0]
        return newest

    def require_usable(self) -> None:
        """For a step of which no sample can be used: it changes nothing, and the next one goes on.

        Raises DataError where there is no other sample to go on with.
        """
        if next(self.loader.usable(), None) is None:
            raise DataError(
                f"none of {len(self.loader.samples):,} training samples can be used: "
                f"{self.loader.skipped}"
            )

    def tell_skipped(self) -> None:
        """Tells of samples that turned out, once tokenised, to have nothing to learn."""
        if self.loader.skipped.total > self.skipped_told:
            self.skipped_told = self.loader.skipped.total
            self.tell(NoticeEvent(f"skipped so far: {self.loader.skipped}"))

    def save(self) -> None:
        """A checkpoint of the steps done so far, once these are known to be finite."""
        if self.unchecked:
            self.check_finite()
        if not self.ranks.is_main:
            return
        state = {
            **self.run.identity(),
            "config": config_dict(self.run.config),
            "total_steps": self.total_steps,
            "step_size": self.sampler.step_size,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "eval_step": self.eval_step,
            "init_from": self.init_from,
        }
        train = self.run.config.train
        folder = self.run.folder.checkpoints
        saved = save_checkpoint(
            folder, self.run.step, self.run.model.connector, self.optimizer, state
        )
        prune(folder, train.keep_checkpoints, train.keep_best)
        self.tell(CheckpointEvent(self.run.step, saved.path))

    def finish(self, status: str = "finished") -> None:
        """Notes in run.json how the run ended: "finished" or "stopped"."""
        folder = self.run.folder
        if self.ranks.is_main:
            folder.write_info({**folder.read_info(), "status": status, "step": self.run.step})
        # A launcher may end all ranks when one ends, and the main one was still writing.
        self.ranks.wait()

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        """Names a step's samples in not_finite.jsonl; raises AlignError where it ends the run."""
        samples = self.run.splits.train
        ids = [samples[i].record.id for i in self.sampler.step(step).tolist()]
        images = self._not_finite_images(step)
        named = sorted({key for keys in images.values() for key in keys})
        document = {
            "step": step + 1,
            "loss": str(loss),
            "grad_norm": str(norm),
            "ids": ids,
            "images": named,
        }
        file = self.run.folder.not_finite
        if self.ranks.is_main:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(document) + "\n")
        what = f"step {step + 1}: loss {loss}, gradient norm {norm} are not finite"
        in_a_row = self.not_finite >= NOT_FINITE_IN_A_ROW
        if self.run.config.train.not_finite == "skip" and not in_a_row:
            cause = f", as the features of {_first(named)} are not" * bool(named)
            self.tell(NoticeEvent(f"{what}{cause}; skipped, its samples are in {file}"))
            return
        if images:
            store, keys = next(iter(images.items()))
            raise DataError(
                f"{what}, as the features of {_first(keys)} in {store} are not (all in {file}); "
                f"the store is damaged: run `featcache verify {store} --repair`, then --resume"
            )
        raise AlignError(
            f"{what}{f', nor were the {self.not_finite - 1} before' * in_a_row}; its samples are "
            f"{_first(ids)} (all in {file}); start again with a lower optim.lr in another --out"
        )

    def _not_finite_images(self, step: int) -> dict[str, list[str]]:
        """{store: keys of a step's images whose features in it are not all finite}.

        Features are checked when they are written, so these were damaged on disk since.
        """
        samples = [self.run.splits.train[i] for i in self.sampler.step(step).tolist()]
        rows_of_key = {
            key: rows
            for sample in samples
            for key, rows in zip(sample.record.images, sample.rows, strict=True)
        }
        found: dict[str, list[str]] = {}
        # One by one: a step may see more images than fit into memory at once.
        with self.run.stores.reader(self.run.layers, threads=1, depth=1, check="never") as reader:
            for key, rows in rows_of_key.items():
                features = reader.read(rows[None])
                for store, each in zip(self.run.stores.stores, features, strict=True):
                    if not each.isfinite().all():
                        found.setdefault(str(store.path), []).append(key)
        return found


def start_session(
    config: RunConfig,
    features: Sequence[StorePath | str],
    out: Path,
    resume: bool,
    on_event: OnEvent | None,
    ranks: Ranks = ALONE,
) -> Session:
    """Everything before the first step: folder, parts, position. Of several ranks, each calls this.

    Raises as `align.trainer.train` says.
    """
    config = absolute_paths(config)
    folder = RunFolder(out)
    found = list_checkpoints(folder.checkpoints)
    if found and not resume:
        raise RunError(f"{out}: already holds a run; give --resume or another --out")
    if found:
        before = load_config(folder.config)
        require_same_config(before, config, out)
        data = config.data
        # Left out they mean the run's: the store's own may be of what was appended since.
        data = replace(
            data, files=data.files or before.data.files, images=data.images or before.data.images
        )
        config = replace(config, data=data)
    run = assemble(config, features, out, ranks)
    if found:
        # Whatever the number of ranks was then and is now.
        run.step_size = find_checkpoint(folder.checkpoints).state()["step_size"]
    run.config = config = replace(config, data=with_sources(config.data, run.store))
    optimizer = build_optimizer(config.optim, run.model.connector)
    loader = run.loader("train")
    train, sampler = config.train, run.sampler()
    if train.batch_size > 100 * sampler.num_samples:
        raise ConfigError(
            f"train.batch_size={train.batch_size}: a batch would hold each of the "
            f"{sampler.num_samples:,} training samples over 100 times; make it smaller"
        )
    total_steps = train.steps or sampler.steps_in(train.epochs)
    if ranks.count > 1:
        require_same_start(run, total_steps, found[-1].step if found else 0)
    session = Session(
        run, optimizer, sampler, loader, total_steps, on_event, MetricsLog(folder.metrics)
    )
    splits = run.splits
    if found:
        checkpoint = find_checkpoint(folder.checkpoints)
        state = restore(run, checkpoint)
        require_same_learning(state, run)
        load_optimizer(checkpoint, run.model.connector, optimizer)
        session.loss = state["loss"]
        session.eval_loss, session.eval_step = state["eval_loss"], state["eval_step"]
        session.init_from = state["init_from"]
        if ranks.is_main:
            remove_partial(folder.checkpoints)
            session.log.drop_after(run.step)
            MetricsLog(folder.not_finite).drop_after(run.step)
        if ranks.is_main and before.data != config.data:
            # Its evaluations look where the run looks, and may do without what it does without.
            save_config(replace(before, data=config.data), folder.config)
        session.tell(NoticeEvent(f"resuming at step {run.step:,} of {total_steps:,}"))
        other = diff_fields(state["versions"], versions())
        if other:
            session.tell(NoticeEvent(f"rounding may differ from before: {'; '.join(other)}"))
    else:
        if train.init_from is not None:
            model = run.model
            start = initialise(model.connector, model.llm.hidden_size, Path(train.init_from))
            session.init_from = start.describe()
            session.tell(NoticeEvent(f"the connector starts from {start.file}"))
        if ranks.is_main:
            _begin_folder(folder, config)
        ranks.copy_from_main([p.data for p in run.model.connector.parameters()])
    if ranks.is_main:
        folder.write_info(_info(session, features))
        _write_left_out(out / LEFT_OUT_FILE, splits.left_out_records)
    reader = run.reader
    for each in reader.readers:
        session.tell(NoticeEvent(f"features are read {each.mode.why}; {each.threads} threads"))
    session.tell(
        NoticeEvent(
            f"{len(splits.train):,} samples to train on, {len(splits.val):,} held out, "
            f"{total_steps:,} steps of {sampler.step_size}"
        )
    )
    if mixed := str(splits.mixture):
        session.tell(NoticeEvent(f"an epoch is made of {mixed}"))
    towers = run.model.connector.towers
    for notice in getattr(config.connector, "notices", lambda _: ())(towers):
        session.tell(NoticeEvent(notice))
    if splits.shared_images:
        session.tell(
            NoticeEvent(
                f"{splits.shared_images:,} images of the validation files are trained on as well: "
                "the held-out loss is not of images never seen"
            )
        )
    if splits.left_out.total:
        session.tell(
            NoticeEvent(
                f"left out {splits.left_out.total:,} of {splits.found:,} records: "
                f"{splits.left_out}; all in {out / LEFT_OUT_FILE}"
            )
        )
    return session


def _begin_folder(folder: RunFolder, config: RunConfig) -> None:
    """Raises RunError where it cannot be written."""
    out = folder.path
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_partial(folder.checkpoints)
        if folder.config.exists() and not folder.info.exists():
            # Not of a run, so it may be a recipe that somebody wrote by hand.
            folder.config.replace(out / "config.before.yaml")
        save_config(config, folder.config)
        folder.metrics.write_text("")
        folder.not_finite.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror}; give another --out") from error


def _info(session: Session, features: Sequence[StorePath | str]) -> dict[str, object]:
    """The content of run.json."""
    run = session.run
    return {
        "status": "running",
        "features": absolute(features),
        "stores": [store.fingerprint for store in run.stores.stores],
        "llm": run.model.llm.identity,
        "parameters": {
            "connector": sum(p.numel() for p in run.model.connector.parameters()),
            "llm": run.model.llm.num_parameters,
        },
        "samples": {
            "train": len(run.splits.train),
            "val": len(run.splits.val),
            "found": run.splits.found,
            "left_out": run.splits.left_out.counts,
            "mixture": asdict(run.splits.mixture),
        },
        "init_from": session.init_from,
        "total_steps": session.total_steps,
        "step": run.step,
        "versions": versions(),
    }


def _write_left_out(path: Path, records: Sequence[LeftOutRecord]) -> None:
    """One JSON object a line; no file where there are no records, also none of an earlier start.

    Raises RunError where the disk does not take it.
    """
    try:
        if records:
            publish(path, (f"{json.dumps(asdict(record))}\n".encode() for record in records))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror}; free some space, then give the same "
            "command again"
        ) from error


def _first(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}"
