"""What is found wrong with a store, and what can be done about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from featcache.journal import Plan, key_of, num_rows
from featcache.layout import StoreInfo

# What `--repair` does about a problem, as its line says it.
COPY = "restores it from its second copy"
REWRITE = "writes it again"
RECOMPILE = "compiles the index again from the journal"
REMEASURE = "measures it again on the images that it was measured on"
RESHARD = "writes the shard again and encodes only the rows that are bad"

NAMED_ROWS = 5
"""Rows that a problem's text names; `Problem.rows` has all."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was written.

    where: file or array, relative to the store. cure: what `--repair` does, empty where it can do
    nothing. shard: whose it is. rows: those whose stored values are bad; keys: their images.
    """

    where: str
    what: str
    cure: str = ""
    shard: int | None = None
    rows: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"

    @classmethod
    def of_rows(
        cls,
        where: str,
        what: str,
        cure: str,
        shard: int,
        rows: Sequence[int],
        plans: Sequence[Plan],
    ) -> Self:
        """One that names its first rows, and their images by `plans`."""
        keys = tuple(key_of(plans, row) for row in rows)
        if rows:
            pairs = list(zip(rows, keys, strict=True))
            named = ", ".join(f"{row} ({key})" for row, key in pairs[:NAMED_ROWS])
            more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
            what = f"{what}; bad rows: {named}{more}"
        return cls(where, what, cure, shard, tuple(rows), keys)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a store was found to be.

    problems: what is wrong, after the repair where there was one; mended: what it mended.
    lost: a line for each image whose features the repair could not make again: it is in the ledger
    now. notes: what is worth knowing and wrong with nothing. generations, shards, rows: planned;
    images: rows with features in the shards that are there. nbytes: of the data files read.
    """

    path: Path
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    generations: int
    shards: int
    rows: int
    images: int
    nbytes: int
    seconds: float
    mended: tuple[Problem, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and nothing was lost in mending it."""
        return not self.problems and not self.lost


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """A snapshot for display. stage: "verify" (done and total in bytes) or "repair" (in shards)."""

    stage: str
    done: int
    total: int


OnProgress = Callable[[VerifyProgress], None]


@dataclass(slots=True)
class Inspection:
    """All that one pass over a store has found, for the report and for the repair.

    info: None where neither copy of the store's description is whole. plans: up to the first that
    is lost; plans_whole: none is. status: uint8[rows], by the commit records. contents: {path: the
    right bytes} of damaged files whose content is known. channels: layers whose
    channel values are lost. shards: those to be written again.
    unfinished: planned by an extraction that has not ended, and not there yet. index_known: whether
    the journal can tell what the index should say.
    """

    root: Path
    info: StoreInfo | None = None
    plans: list[Plan] = field(default_factory=list)
    plans_whole: bool = True
    status: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.uint8))
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    channels: dict[str, None] = field(default_factory=dict)
    shards: dict[int, Plan] = field(default_factory=dict)
    unfinished: int = 0
    index_known: bool = False
    images: int = 0
    nbytes: int = 0

    def add(self, where: str, what: str, cure: str = "", **more: Any) -> None:
        self.problems.append(Problem(where, what, cure, **more))

    @property
    def finished(self) -> list[Plan]:
        """The plans that the index covers."""
        assert self.info is not None
        return self.plans[: self.info.generation] if self.info.index else []

    def report(self, seconds: float) -> VerifyReport:
        return VerifyReport(
            path=self.root,
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            generations=len(self.plans),
            shards=sum(plan.num_shards for plan in self.plans),
            rows=num_rows(self.plans),
            images=self.images,
            nbytes=self.nbytes,
            seconds=seconds,
        )
