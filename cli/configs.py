"""`align configs`: the recipes that are shipped."""

from __future__ import annotations

from pathlib import Path

from cli import console


@console.command("configs")
def configs() -> console.Document:
    """The recipes shipped, one line each: give a name to `align train --config`."""
    from align.config import list_configs

    recipes = {name: (headline(path), path) for name, path in list_configs().items()}
    console.table(["name", "what it is"], [(name, line) for name, (line, _) in recipes.items()])
    return {
        "configs": [
            {"name": name, "headline": line, "path": str(path)}
            for name, (line, path) in recipes.items()
        ]
    }


def headline(path: Path) -> str:
    """The first line of the comment that every recipe opens with."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").rstrip()
