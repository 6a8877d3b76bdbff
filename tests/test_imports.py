"""Imports run one way: tests, benchmarks -> cli -> align -> featcache. And --help stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "featcache": {"featcache"},
    "align": {"featcache", "align"},
    "cli": {"featcache", "align", "cli"},
}
LAYERS = {"featcache", "align", "cli", "tests", "benchmarks"}
HEAVY = {"torch", "transformers", "zarr", "numpy", "omegaconf", "PIL"}


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, top-level name) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for line, name in imported(path)
        if name in LAYERS - MAY_IMPORT[package]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("program", ["featcache", "align"])
def test_help_imports_nothing_heavy(program: str) -> None:
    code = (
        "import sys, cli.console as console, importlib\n"
        f"group = importlib.import_module('cli.{program}').group\n"
        "console.run(group, ['--help'])\n"
        "for name in group.table: console.run(group, [name, '--help'])\n"
        "print(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())
