"""What a run tells: events to a callback while it runs, and one JSON line each in metrics.jsonl."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from align.errors import RunError
from featcache.files import publish


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A log line, about step `step` (the steps done so far) unless said otherwise.

    loss: mean over the step's supervised tokens, nats. grad_norm: before clipping. Where a step was
    skipped (`train.not_finite`), both are of the newest one that was not.
    epoch: passes over the training samples so far.
    samples_per_s, tokens_per_s (all tokens, visual and padding ones included), data_wait_ratio
    (share of the time spent waiting for features): over the steps since the last line, without
    evaluations, sample captions and checkpoints.
    memory_bytes: peak on the device, 0 on the CPU.
    flop_per_s: operations a second and process that the model needed (align/flop.py), None for a
    model whose operations are not known. mfu: these over the device's peak in dense bf16, None
    where that is not known.
    """

    kind: ClassVar[str] = "train"
    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    samples_per_s: float
    tokens_per_s: float
    data_wait_ratio: float
    memory_bytes: int
    flop_per_s: float | None = None
    mfu: float | None = None


@dataclass(frozen=True, slots=True)
class EvalEvent:
    """The loss on the validation split: mean over `tokens` supervised tokens, nats."""

    kind: ClassVar[str] = "eval"
    step: int
    loss: float
    tokens: int
    samples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SampleCaption:
    """A generated caption beside its reference. keys: the sample's images."""

    id: str
    keys: tuple[str, ...]
    reference: str
    generated: str


@dataclass(frozen=True, slots=True)
class SampleEvent:
    """Captions of the first validation samples."""

    kind: ClassVar[str] = "samples"
    step: int
    captions: tuple[SampleCaption, ...]


@dataclass(frozen=True, slots=True)
class CheckpointEvent:
    """A checkpoint is complete on disk."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class NoticeEvent:
    """Something that the user should know, in one line."""

    kind: ClassVar[str] = "notice"
    text: str


Event = StepEvent | EvalEvent | SampleEvent | CheckpointEvent | NoticeEvent
OnEvent = Callable[[Event], None]

LOGGED = (StepEvent, EvalEvent, SampleEvent)
"""What metrics.jsonl holds; the rest is of use only while the run goes on."""


class MetricsLog:
    """RUN/metrics.jsonl: one JSON object a line, with "kind" and "step"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: StepEvent | EvalEvent | SampleEvent) -> None:
        """Adds one line.

        Raises RunError where the disk does not take it.
        """
        line = {"kind": event.kind, **dataclasses.asdict(event)}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written: {error.strerror}; free some space, then --resume"
            ) from error

    def drop_after(self, step: int) -> None:
        """Removes the lines of later steps, and a last line that a kill cut short.

        They belong to work that a resumed run does again.
        """
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        publish(self.path, [f"{json.dumps(line, ensure_ascii=False)}\n".encode() for line in kept])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line without a newline was cut short and is left out."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    # Not splitlines: captions may hold U+2028 and its like, which JSON leaves as they are.
    return [json.loads(line) for line in whole.split("\n") if line]
