"""What must be the same where a run goes on: settings, what it learns from, where ranks begin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config import RunConfig, config_dict, diff_fields
from align.errors import CheckpointError, RunError
from align.run import Run

FREE_TO_CHANGE = (
    "data.files",
    "data.images",
    "data.max_missing",
    "eval",
    "train.batch_tokens",
    "train.device",
    "train.cache_dir",
    "train.cache_gb",
    "train.checkpoint_activations",
    "train.compile",
    "train.eval_every",
    "train.eval_samples",
    "train.keep_best",
    "train.keep_checkpoints",
    "train.length_multiple",
    "train.log_every",
    "train.not_finite",
    "train.packing",
    "train.precision",
    "train.read_ahead",
    "train.read_budget_mb",
    "train.read_mode",
    "train.read_threads",
    "train.sample_every",
    "train.samples",
    "train.save_every",
    "train.shard_llm",
    "train.verify_features",
)
"""Settings, or whole sections, that may differ when a run is resumed: they decide what is told or
refused, or how a step is computed, not what is learned. `train.precision`
may be named where it was "auto", and the data may have moved: what they come to, precision and
records, is compared."""


def is_free_to_change(setting: str, free: Sequence[str]) -> bool:
    """setting: a dotted path. free: settings, or whole sections."""
    return any(setting == each or setting.startswith(f"{each}.") for each in free)


def require_same_config(before: RunConfig, now: RunConfig, out: Path) -> None:
    free: tuple[str, ...] = FREE_TO_CHANGE
    if before.train.batch_size * before.train.grad_accum == (
        now.train.batch_size * now.train.grad_accum
    ):
        free = (*free, "train.batch_size", "train.grad_accum")
    changed = [
        line
        for line in diff_fields(config_dict(before), config_dict(now))
        if not is_free_to_change(line.split(":")[0], free)
    ]
    if changed:
        raise RunError(
            f"{out}: cannot be resumed with other settings: {'; '.join(changed)}; "
            "give the same ones or choose another --out"
        )


def require_same_learning(state: dict[str, Any], run: Run) -> None:
    """Refuses what would make the rest of the run another one: a precision, training samples, their
    images, the shards that order them, channel values of the codec."""
    identity = run.identity()
    if state.get("precision") != identity["precision"]:
        raise CheckpointError(
            f"{run.path}: was trained in {state.get('precision')} and cannot be resumed in "
            f"{identity['precision']}; give train.precision={state.get('precision')}"
        )
    before, now = state["data"], identity["data"]
    changed = diff_fields(before, now)
    if [line.split(":")[0] for line in changed] == ["images"]:
        raise CheckpointError(
            f"{run.path}: cannot be resumed: image files of its training samples have changed, and "
            f"{run.store.path} has the features of the new ones: {'; '.join(changed)}; bring the "
            "old files back and run `featcache extract` again, or start another --out"
        )
    if [line.split(":")[0] for line in changed] == ["shards"]:
        raise CheckpointError(
            f"{run.path}: cannot be resumed: its training samples lie in other shards of "
            f"{run.store.path} than of the store it was started on, and train.shuffle_window goes "
            f"by these: {'; '.join(changed)}; use that store, or start another --out"
        )
    if changed:
        raise CheckpointError(
            f"{run.path}: cannot be resumed on other training samples: "
            f"{'; '.join(changed)}; give the data it was started with"
        )
    pairs = zip(state["features"], identity["features"], run.stores.stores, strict=True)
    for before, now, store in pairs:
        if before["codec"] != now["codec"]:
            raise CheckpointError(
                f"{run.path}: cannot be resumed: {store.path} has other channel values of its "
                f"codec {now['codec']['name']} than the store it was started on, so its features "
                "are rounded otherwise; use that store, or start another --out"
            )


def require_same_start(run: Run, total_steps: int, step: int) -> None:
    """Raises RunError where a rank would begin another run than the main one, in every rank."""
    begin = {
        "step": step,
        "step_size": run.step_size,
        "total_steps": total_steps,
        "config": config_dict(run.config),
        "data": run.identity()["data"],
    }
    first, *others = run.ranks.gather(begin)
    for rank, other in enumerate(others, start=1):
        if changed := diff_fields(first, other):
            raise RunError(
                f"{run.path}: rank {rank} would not begin where rank 0 does: {'; '.join(changed)}; "
                "give all ranks the same command, and an --out, store and data that all can reach"
            )
