"""A run as one static HTML page: results, curves, captions beside their images, what was left out.

The page is one file that needs no network and no script: styles inline, images as data URIs, curves
as SVG whose colours are CSS variables, so that they follow the reader's light or dark scheme.
It is made from what the run directory holds and from the image files; nothing is computed again.

    write_report(run_dir) -> run_dir/report.html
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import featcache
from align.config import RunConfig, diff_fields, load_config
from align.run import RunFolder
from align.tracking import read_metrics
from featcache.errors import ConfigError, ImageError, StoreError
from featcache.files import publish
from featcache.images import decode
from featcache.sources import ImageRef

SHOWN_CAPTIONS = 12  # of the best, and as many of the worst
SHOWN_STEPS = 12  # sample captions: at most so many steps, the first and the last among them
IMAGE_PIXELS = 320  # longest side of an embedded image

# Attributes a figure has, in the order in which they are read.
METRIC_NAMES = {
    "loss": "Loss per token",
    "token_accuracy": "Token accuracy",
    "exact_match": "Caption exact match",
    "word_f1": "Word F1",
    "attributes": "Attribute accuracy",
    "size": "– size",
    "colour": "– colour",
    "shape": "– shape",
    "relation": "– relation",
}


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a caption. odd: it is not in the other caption, at this place."""

    text: str
    odd: bool


@dataclass(frozen=True, slots=True)
class Card:
    """One evaluated sample. images: as data URIs, "" where the file is gone."""

    id: str
    images: list[str]
    reference: list[Word]
    generated: list[Word]
    shuffled: str | None
    score: float


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One figure: with the right features, with another image's, and by chance."""

    name: str
    value: str
    shuffled: str
    chance: str
    n: int
    bar: float | None  # percent of the full width, for shares


@dataclass(slots=True)
class Split:
    """What was evaluated on one split. note: why the shuffled control is not beside it, or ""."""

    name: str
    summary: str
    note: str = ""
    rows: list[ResultRow] = field(default_factory=list)
    worst: list[Card] = field(default_factory=list)
    best: list[Card] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Story:
    """How the caption of one fixed sample changed over the steps."""

    id: str
    images: list[str]
    reference: str
    steps: list[tuple[int, list[Word]]]


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` and returns its path.

    Raises RunError where `run_dir` is no run's folder, ConfigError where jinja2 or matplotlib is
    missing.
    """
    RunFolder(run_dir).read_info()
    require_packages()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(**_context(run_dir))
    path = run_dir / "report.html"
    publish(path, [page.encode()])
    return path


def require_packages() -> None:
    """Raises ConfigError, which says how to install them, where jinja2 or matplotlib is missing."""
    for name in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as missing:
            raise ConfigError(
                f"the report needs {missing.name}: pip install 'featcache[report]'"
            ) from missing


def _context(run_dir: Path) -> dict[str, Any]:
    folder = RunFolder(run_dir)
    info = folder.read_info()
    config = load_config(folder.config)
    log = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    image_root = _image_root(config, info)
    samples = info["samples"]
    return {
        "title": run_dir.resolve().name,
        "subtitle": (
            f"{config.connector.name} between {_encoders(info)} and "
            f"{info['llm']['name']}, "
            f"{info['status']} at step {info['step']:,} of {info['total_steps']:,}"
        ),
        "splits": _splits(run_dir, image_root),
        "curves": _curves(log),
        "stories": _stories(log, image_root),
        "left_out": sorted(samples["left_out"].items(), key=lambda item: -item[1]),
        "facts": [
            ("Samples", f"{samples['train']:,} trained on, {samples['val']:,} held out"),
            ("Trained", f"{info['parameters']['connector']:,} parameters (the connector)"),
            ("Frozen", f"{info['parameters']['llm']:,} parameters (the language model)"),
            ("Store", ", ".join(info["features"])),
            ("Versions", ", ".join(f"{name} {v}" for name, v in info["versions"].items())),
            ("The same again", _command(run_dir, info)),
        ],
        "config": folder.config.read_text(),
        "documents": [
            ("Store fingerprint", json.dumps(info["stores"], indent=2)),
            ("Language model", json.dumps(info["llm"], indent=2)),
        ],
    }


def _encoders(info: dict[str, Any]) -> str:
    return " + ".join(store["encoder"]["name"] for store in info["stores"])


def _command(run_dir: Path, info: dict[str, Any]) -> str:
    features = " ".join(f"--features {shlex.quote(path)}" for path in info["features"])
    config = shlex.quote(str(run_dir.absolute() / "config.yaml"))
    return f"align train {features} --config {config} --out NEW_RUN"


def _image_root(config: RunConfig, info: dict[str, Any]) -> str:
    """Where the image files are; where neither config nor store tells, they are not found."""
    if config.data.images is not None:
        return config.data.images
    try:
        return str(featcache.open(info["features"][0]).source["images"])
    except StoreError:
        return "."


# ---------------------------------------------------------------------------------------- results


def _splits(run_dir: Path, image_root: str) -> list[Split]:
    splits = []
    for folder in sorted(run_dir.glob("eval/*/")):
        if folder.name.endswith("-shuffled") or not (folder / "metrics.json").is_file():
            continue
        other = folder.with_name(f"{folder.name}-shuffled")
        metrics = json.loads((folder / "metrics.json").read_text())
        shuffled_path = other / "metrics.json"
        shuffled = json.loads(shuffled_path.read_text()) if shuffled_path.is_file() else None
        captions = read_metrics(folder / "captions.jsonl")
        # By position: two records may have one id.
        wrong: list[str | None] = [None] * len(captions)
        split = Split(folder.name, _summary(metrics))
        if shuffled is not None:
            rows = read_metrics(other / "captions.jsonl")
            split.note = _why_not_beside(metrics, shuffled, captions, rows)
            if split.note:
                shuffled = None
            else:
                wrong = [row["generated"] for row in rows]
        for name, figure in sorted(metrics["metrics"].items(), key=_reading_order):
            against = shuffled["metrics"].get(name) if shuffled else None
            split.rows.append(
                ResultRow(
                    name=METRIC_NAMES.get(name, name),
                    value=_number(name, figure["value"]),
                    shuffled=_number(name, against["value"]) if against else "–",
                    chance=_number(name, figure["chance"]) if figure["chance"] is not None else "–",
                    n=figure["n"],
                    bar=None if name == "loss" else 100 * figure["value"],
                )
            )
        ranked = sorted(zip(captions, wrong, strict=True), key=lambda pair: _rank(pair[0]))
        half = len(ranked) // 2
        worst, best = (
            ranked[: min(SHOWN_CAPTIONS, half)],
            ranked[max(half, len(ranked) - SHOWN_CAPTIONS) :],
        )
        split.worst = [_card(row, said, image_root) for row, said in worst]
        split.best = [_card(row, said, image_root) for row, said in reversed(best)]
        splits.append(split)
    return splits


def _why_not_beside(
    own: dict[str, Any],
    shuffled: dict[str, Any],
    captions: Sequence[dict[str, Any]],
    shuffled_captions: Sequence[dict[str, Any]],
) -> str:
    """Why two evaluations cannot be compared row by row, or "" where they can."""
    changed = [
        line
        for name in ("step", "n", "decoding")
        for line in diff_fields({name: own[name]}, {name: shuffled[name]})
        # How many are generated at once changes the time, not the captions.
        if not line.startswith("decoding.batch_size:")
    ]
    if not changed and [row["id"] for row in captions] != [row["id"] for row in shuffled_captions]:
        changed = ["other samples"]
    if not changed:
        return ""
    return (
        "The control with shuffled features is not shown: it was evaluated otherwise "
        f"({'; '.join(changed)}). Run align eval with and without --shuffle-features again."
    )


def _summary(metrics: dict[str, Any]) -> str:
    decoding = metrics["decoding"]
    how = (
        "greedy"
        if decoding["temperature"] == 0
        else f"temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    )
    return (
        f"{metrics['n']:,} of {metrics['split_size']:,} samples, step {metrics['step']:,}, {how}, "
        f"at most {decoding['max_new_tokens']} tokens"
    )


def _reading_order(item: tuple[str, Any]) -> int:
    names = list(METRIC_NAMES)
    return names.index(item[0]) if item[0] in names else len(names)


def _rank(row: dict[str, Any]) -> tuple[float, float, float]:
    """Worst first: by attributes where the sample has them, then by words."""
    scores = row["scores"]
    return scores.get("attributes", scores["word_f1"]), scores["exact_match"], scores["word_f1"]


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.1f} %"


def _card(row: dict[str, Any], shuffled: str | None, image_root: str) -> Card:
    reference, generated = compare_words(row["reference"], row["generated"])
    return Card(
        id=row["id"],
        images=[_data_uri(ImageRef(image_root, key)) for key in row["images"]],
        reference=reference,
        generated=generated,
        shuffled=shuffled,
        score=_rank(row)[0],
    )


def compare_words(reference: str, generated: str) -> tuple[list[Word], list[Word]]:
    """Both captions word by word; odd are the words that a shortest edit from one to the other
    replaces, drops or adds (Levenshtein 1966, over words).
    """
    truth, said = reference.split(), generated.split()
    # cost[i][j]: edits from the first i words of truth to the first j of said.
    cost = [
        [i + j if i * j == 0 else 0 for j in range(len(said) + 1)] for i in range(len(truth) + 1)
    ]
    for i, right in enumerate(truth, 1):
        for j, word in enumerate(said, 1):
            replaced = cost[i - 1][j - 1] + (right != word)
            cost[i][j] = min(replaced, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    odd_truth, odd_said = [True] * len(truth), [True] * len(said)
    i, j = len(truth), len(said)
    while i and j:
        same = truth[i - 1] == said[j - 1]
        if cost[i][j] == cost[i - 1][j - 1] + (not same):
            i, j = i - 1, j - 1
            odd_truth[i] = odd_said[j] = not same
        elif cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return (
        [Word(text, odd) for text, odd in zip(truth, odd_truth, strict=True)],
        [Word(text, odd) for text, odd in zip(said, odd_said, strict=True)],
    )


def _data_uri(ref: ImageRef) -> str:
    """The image as a data URI, at most IMAGE_PIXELS a side; "" where the file is gone."""
    try:
        image, _ = decode(ref.read())
    except ImageError:
        return ""
    image.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    encoded = io.BytesIO()
    small = max(image.size) <= 128
    image.save(encoded, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


# ----------------------------------------------------------------------------- curves and samples


def _curves(log: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(caption, SVG) of the loss and of the learning rate; none before the first step."""
    train = [row for row in log if row["kind"] == "train"]
    held_out = [row for row in log if row["kind"] == "eval"]
    if not train:
        return []
    steps = [row["step"] for row in train]
    loss = [row["loss"] for row in train]
    window = max(1, len(loss) // 40)
    smooth = [statistics.fmean(loss[max(0, i - window + 1) : i + 1]) for i in range(len(loss))]
    lines = [("training", steps, loss, "faint" if window > 1 else "accent")]
    if window > 1:
        lines.append((f"training, mean of {window} log lines", steps, smooth, "accent"))
    if held_out:
        at, values = [row["step"] for row in held_out], [row["loss"] for row in held_out]
        lines.append(("held out", at, values, "second"))
    rate = [("learning rate", steps, [row["lr"] for row in train], "accent")]
    return [
        ("Loss per supervised token, nats", _svg(lines)),
        ("Learning rate", _svg(rate)),
    ]


# Stand-ins that matplotlib draws with, and the CSS variable that takes their place.
_COLOURS = {
    "text": ("#010203", "var(--text)"),
    "grid": ("#010204", "var(--line)"),
    "faint": ("#010205", "var(--faint)"),
    "accent": ("#010206", "var(--accent)"),
    "second": ("#010207", "var(--second)"),
}


def _svg(lines: Iterable[tuple[str, Sequence[float], Sequence[float], str]]) -> str:
    """An SVG without a fixed size; (label, x, y, colour) a line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text, grid = _COLOURS["text"][0], _COLOURS["grid"][0]
    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: small, sharp, in the page's font
        "svg.hashsalt": "align",  # the same run gives the same bytes
        "text.color": text,
        "axes.edgecolor": grid,
        "axes.labelcolor": text,
        "xtick.color": text,
        "ytick.color": text,
        "font.size": 10,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        lines = list(lines)
        for label, x, y, colour in lines:
            marker = "o" if len(x) <= 20 else None
            axes.plot(x, y, label=label, color=_COLOURS[colour][0], lw=1.8, marker=marker, ms=4)
        axes.set_xlabel("step")
        axes.grid(color=grid, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, variable in _COLOURS.values():
        svg = svg.replace(stand_in, variable)
    head, rest = svg.split(">", 1)
    # The page sets the width; the view box keeps the proportions.
    kept = [part for part in head.split() if not part.startswith(("width=", "height="))]
    return " ".join(kept) + ' role="img">' + rest


def _stories(log: Sequence[dict[str, Any]], image_root: str) -> list[Story]:
    rows = [row for row in log if row["kind"] == "samples"]
    if len(rows) > SHOWN_STEPS:
        picks = {round(i * (len(rows) - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)}
        rows = [rows[i] for i in sorted(picks)]
    stories: dict[int, Story] = {}  # by position, which is fixed; two records may have one id
    for row in rows:
        for position, sample in enumerate(row["captions"]):
            story = stories.setdefault(
                position,
                Story(
                    sample["id"],
                    [_data_uri(ImageRef(image_root, key)) for key in sample["keys"]],
                    sample["reference"],
                    [],
                ),
            )
            words = compare_words(sample["reference"], sample["generated"])[1]
            story.steps.append((row["step"], words))
    return list(stories.values())
