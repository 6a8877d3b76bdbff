"""Result rows of `align bench store` as one picture: a panel a cache state, a bar a provider.

    write_plot(rows, Path("store.png"))

White, whatever the reader's scheme: the picture is shown on light and on dark pages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.bench.tables import Row, sections
from featcache.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    ("warm", "random", ""): "Warm page cache",
    ("cold", "random", ""): "Cold: every image from the disk",
    ("small-ram", "random", ""): "RAM for a third of the data",
}
OURS, PEER, BOUND = "#1b6ac9", "#9aa5b1", "#c2410c"
TEXT = "#1f2933"
WIDTH_INCHES = 9.0
BAR_INCHES = 0.24
DPI = 160  # 1,440 pixels wide; a README shows some 850


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Raises ConfigError where matplotlib is missing or the rows hold no random reads."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "drawing needs matplotlib; install it with: pip install 'featcache[report]'"
        )
    import matplotlib as mpl
    from matplotlib.figure import Figure

    found = sections(rows)
    panels = {title: found[key] for key, title in PANELS.items() if key in found}
    if not panels:
        raise ConfigError("no rows of random reads to draw")
    heights = [len(panel) + 2.2 for panel in panels.values()]
    style: dict[Any, Any] = {"font.size": 9, "text.color": TEXT, "ytick.color": TEXT}
    with mpl.rc_context(style):
        figure = Figure(
            figsize=(WIDTH_INCHES, sum(heights) * BAR_INCHES + 0.3),
            facecolor="white",
        )
        margin = 0.12
        figure.set_layout_engine("constrained", w_pad=margin, h_pad=margin, hspace=0.02)
        axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for panel, (title, by_provider) in zip(axes, panels.items(), strict=True):
            draw(panel, title, {name: metrics["read"] for name, metrics in by_provider.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        # No date and no version in it: the same rows give the same file.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


def draw(axes: Axes, title: str, reads: dict[str, Row]) -> None:
    """Bars of images/s with p20 to p80, fastest on top, and the ceiling as a line."""
    names = sorted(reads, key=lambda name: reads[name]["p50"])
    middle = [reads[name]["p50"] for name in names]
    spread = [
        [reads[name]["p50"] - reads[name]["p20"] for name in names],
        [reads[name]["p80"] - reads[name]["p50"] for name in names],
    ]
    config = reads[names[0]]["config"]
    ceiling = reads[names[0]]["ceiling"]
    top = max(ceiling or 0, *(reads[name]["p80"] for name in names))
    axes.barh(
        names,
        middle,
        xerr=spread,
        height=0.72,
        color=[colour(name) for name in names],
        error_kw={"ecolor": TEXT, "elinewidth": 0.8, "capsize": 1.5},
    )
    for place, name in enumerate(names):
        number = axes.text(reads[name]["p80"] + top * 0.012, place, f"{reads[name]['p50']:,.0f}")
        number.set(va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    if ceiling:
        axes.axvline(ceiling, color=BOUND, lw=1.2, ls=(0, (4, 2)), zorder=0)
        bound = "memcpy, 1 thread" if "memcpy, 1 thread" in reads else "plain read of the disk"
        # On the side with room, below the bars that are as long as the line.
        is_left = ceiling > top / 2
        place = ceiling + (-1 if is_left else 6) * top * 0.012
        side = "right" if is_left else "left"
        axes.text(place, 0, bound, color=BOUND, ha=side, va="center")
    axes.set_title(
        f"{title}, images/s in random batches of {config['batch']}",
        loc="left",
        fontsize=10,
        fontweight="bold",
    )
    axes.set_xlim(0, top * 1.1)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        if colour(name) == OURS:
            label.set_fontweight("bold")


def colour(name: str) -> str:
    if name.startswith("featcache"):
        return OURS
    return BOUND if name.startswith(("memcpy", "plain read")) else PEER
