"""Result rows of `align bench step` as one picture: a panel a language model, a bar a loop, its
ceiling a mark.

    write_plot(rows, Path("step.png"))
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.bench.break_even import Row
from align.bench.plot import BAR_INCHES, BOUND, DPI, OURS, PEER, TEXT, WIDTH_INCHES
from align.bench.step_tables import cases, figure
from featcache.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "cached": "cached features",
    "live": "encoder in our step",
    "plain": "plain Hugging Face loop",
    "llava": "Hugging Face LLaVA",
}


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Raises ConfigError where matplotlib is missing or there are no rows of a training step."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "drawing needs matplotlib; install it with: pip install 'featcache[report]'"
        )
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = {key: of for key, of in cases(rows).items() if "cached" in of}
    if not panels:
        raise ConfigError("no rows of `align bench step` to draw")
    heights = [len([name for name in of if "MFU" in of[name]]) + 1.6 for of in panels.values()]
    style: dict[Any, Any] = {"font.size": 9, "text.color": TEXT, "ytick.color": TEXT}
    with mpl.rc_context(style):
        drawing = Figure(
            figsize=(WIDTH_INCHES, sum(heights) * 1.25 * BAR_INCHES + 0.3), facecolor="white"
        )
        drawing.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, hspace=0.02)
        axes = drawing.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for panel, (key, by_loop) in zip(axes, panels.items(), strict=True):
            draw(panel, *key, by_loop)
        path.parent.mkdir(parents=True, exist_ok=True)
        # No date and no version in it: the same rows give the same file.
        drawing.savefig(path, dpi=DPI, metadata={"Software": None})


def draw(axes: Axes, llm: str, tokens: int, by_loop: Mapping[str, Mapping[str, Row]]) -> None:
    """Bars of samples/s with p20 to p80, the cached one on top; a mark where operations end it."""
    names = [name for name in reversed(NAMES) if name in by_loop]
    rates = [by_loop[name]["rate"] for name in names]
    top = max(max(rate["ceiling"], rate["p80"]) for rate in rates)
    axes.barh(
        [NAMES[name] for name in names],
        [rate["p50"] for rate in rates],
        xerr=[[r["p50"] - r["p20"] for r in rates], [r["p80"] - r["p50"] for r in rates]],
        height=0.72,
        color=[OURS if name == "cached" else PEER for name in names],
        error_kw={"ecolor": TEXT, "elinewidth": 0.8, "capsize": 1.5},
    )
    for place, (name, rate) in enumerate(zip(names, rates, strict=True)):
        axes.plot([rate["ceiling"]] * 2, [place - 0.36, place + 0.36], color=BOUND, lw=1.6)
        over = by_loop["cached"].get(f"over {name}")
        beside = f"; cached {over['p50']:.1f}x" if over else ""
        of = rate["p50"] / rate["ceiling"]
        text = f"{figure(rate['p50'])}  ({of:.0%} of {figure(rate['ceiling'])}{beside})"
        axes.text(max(rate["ceiling"], rate["p80"]) + top * 0.012, place, text, va="center")
    config = rates[0]["config"]
    axes.set_title(
        f"{llm}, {tokens} visual + {config['text_tokens']:.0f} text tokens, {config['precision']} "
        f"on {config['device']}: samples/s",
        loc="left",
        fontsize=10,
        fontweight="bold",
    )
    axes.set_xlim(0, top * 1.32)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        if name == "cached":
            label.set_fontweight("bold")
