"""`--help` answers at once: nothing heavy is imported to print it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cli.align import group

HEAVY = (
    "torch",
    "transformers",
    "zarr",
    "numpy",
    "rich",
    "omegaconf",
    "PIL",
    "jinja2",
    "matplotlib",
)

PROBE = """
import sys
from cli import console
from cli.align import group
code = console.run(group, sys.argv[1:])
print("imported:", *sorted({name.split(".")[0] for name in sys.modules} & set(HEAVY)))
raise SystemExit(code)
""".replace("HEAVY", repr(HEAVY))


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in group.table)])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"Usage: align{' ' + argv[0] if argv[1:] else ''} [OPTIONS]")
    assert done.stdout.splitlines()[-1] == "imported:"


def test_commands_are_those_promised() -> None:
    assert list(group.table) == [
        "train",
        "filter",
        "show",
        "eval",
        "caption",
        "export",
        "import",
        "report",
        "plan",
        "parity",
        "bench",
        "configs",
        "demo",
    ]
