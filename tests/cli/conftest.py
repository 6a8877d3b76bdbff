"""One quick demo for all tests of the `align` program: data, store, run, evaluations, report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cli import console
from cli.align import group


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on the last line of stdout."""
        return dict(json.loads(self.out.splitlines()[-1]))


Align = Callable[..., Outcome]


@pytest.fixture
def align(capsys: pytest.CaptureFixture[str]) -> Align:
    """Runs `align ARGS` in this process."""

    def run(*argv: str | Path) -> Outcome:
        capsys.readouterr()
        code = console.run(group, [str(part) for part in argv])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `align demo --quick`; only commands that leave its parts as they
    are may run on it.
    """
    import torch

    torch.set_num_threads(1)  # sums in one order on every machine; not at the top, --help is tested
    out = tmp_path_factory.mktemp("demo") / "out"
    assert console.run(group, ["demo", "--quick", "--out", str(out)]) == 0
    return out
