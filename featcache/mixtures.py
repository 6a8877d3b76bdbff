"""LLaVA-NeXT's data YAML: several data files, and how much of each is taken.

    datasets:
      - json_path: llava_pretrain.json
        sampling_strategy: all
      - json_path: shards/{a,b}.json
        sampling_strategy: random:10%      # first:N, end:N, random:N, each also with a percentage

Source: LLaVA-NeXT llava/train/train.py, LazySupervisedDataset. Differences: `random` is the same
choice in every run, and in the order of the file; what cannot be understood is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash
import yaml

from featcache.errors import ConfigError, ManifestError
from featcache.object_path import ObjectPath, StorePath, parse_location
from featcache.patterns import expand

T = TypeVar("T")

SEED = 0
"""Of the choice that `random:N` makes."""
_STRATEGY = re.compile(r"(first|end|random):(\d+)(%?)")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How much of a file is taken. kind: "all", "first", "end" or "random"; percent: of what
    `number` counts, entries or percent of them, rounded up."""

    kind: str = "all"
    number: int = 0
    percent: bool = False

    def choose(self, entries: Sequence[T]) -> list[T]:
        """The chosen entries, in their order. `random:N` ranks them by a hash of their position, so
        a smaller N takes a part of what a larger one takes."""
        if self.kind == "all":
            return list(entries)
        count = len(entries)
        number = math.ceil(self.number * count / 100) if self.percent else self.number
        if self.kind == "first":
            return list(entries[:number])
        if self.kind == "end":
            return list(entries[max(0, count - number) :])
        ranked = sorted(
            range(count), key=lambda i: xxhash.xxh3_64_intdigest(f"{SEED}:{i}".encode())
        )
        return [entries[i] for i in sorted(ranked[:number])]


def read_mixture(path: Path) -> Iterator[tuple[StorePath, Sampling]]:
    """(path or pattern of data files, how much of each) in the order of the file.

    A relative json_path is looked for in the YAML's folder and in the working directory, where the
    original takes it from; s3://bucket/a.json is taken as it is.
    Raises ManifestError naming the file and the value.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ManifestError(f"{path} cannot be read as YAML: {why}") from None
    listed = document.get("datasets") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ManifestError(f'{path} has no list "datasets" of json_path and sampling_strategy')
    for i, each in enumerate(listed):
        where = f"{path}: datasets[{i}]"
        if not isinstance(each, dict) or not isinstance(each.get("json_path"), str):
            raise ManifestError(f"{where} has no json_path")
        unknown = [str(name) for name in each if name not in ("json_path", "sampling_strategy")]
        if unknown:
            raise ManifestError(
                f"{where} has an unknown key {unknown[0]!r}; known are json_path and "
                "sampling_strategy"
            )
        yield _located(each["json_path"], path, where), _sampling(each, where)


def _located(text: str, path: Path, where: str) -> StorePath:
    try:
        named = parse_location(text)
    except ConfigError as error:
        raise ManifestError(f"{where}: json_path {error}") from None
    if isinstance(named, ObjectPath) or named.is_absolute():
        return named
    beside = path.parent / named
    candidates = dict.fromkeys((beside.absolute(), named.absolute()))
    places = [place for place in candidates if _exists(place)]
    if len(places) > 1 and not places[0].parent.samefile(places[1].parent):
        raise ManifestError(
            f"{where}: json_path {str(named)!r} is both {places[0]} and {places[1]}; write it as "
            "an absolute path"
        )
    return places[0] if places else beside


def _exists(place: Path) -> bool:
    try:
        return expand(place)[0].exists()
    except ManifestError:
        return False


def _sampling(each: dict[str, Any], where: str) -> Sampling:
    value = each.get("sampling_strategy", "all")
    if value == "all":
        return Sampling()
    found = _STRATEGY.fullmatch(str(value))
    if not found or not int(found[2]) or (found[3] and int(found[2]) > 100):
        raise ManifestError(
            f"{where}: sampling_strategy {value!r} is not one of all, first:N, end:N, random:N "
            "(N a number above 0, or a percentage up to 100%)"
        )
    return Sampling(found[1], int(found[2]), bool(found[3]))
