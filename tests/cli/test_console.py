"""The shared shell: errors as one line, exit codes, `--json`, did-you-mean, plain progress."""

from __future__ import annotations

import json
import sys

import click
import pytest

from cli import console
from featcache.errors import ConfigError, StoreError


@console.command("good")
def good() -> console.Document:
    """A command that ends well."""
    console.say("for people")
    return {"rows": 3}


@console.command("short")
def short() -> console.Result:
    """A command that misses its bar."""
    return console.Result({"accuracy": 0.1}, exit_code=1)


@console.command("broken")
def broken() -> None:
    """A command that meets a user's mistake."""
    raise StoreError("s.zarr is no store:\nrun `featcache extract --out s.zarr`")


@console.command("typo")
def typo() -> None:
    """A command that meets a wrong value."""
    raise ConfigError("optim.lrr: no such key; did you mean 'lr'?")


@console.command("stopped", interrupted="run the same command again to go on")
def stopped() -> None:
    """A command the user stops."""
    raise KeyboardInterrupt


@console.command("bug")
def bug() -> None:
    """A command with a bug."""
    raise IndexError("ours")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> console.LazyGroup:
    table = {name: (f"{__name__}:{name}", f"{name} line.") for name in COMMANDS}
    group = console.LazyGroup("prog", table, help="A program.")
    monkeypatch.setattr(group, "get_command", lambda _, name: COMMANDS.get(name))
    return group


COMMANDS: dict[str, click.Command] = {
    command.name or "": command for command in (good, short, broken, typo, stopped, bug)
}


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["good"], 0, "", "for people\n"),
        (["good", "--json"], 0, '{"rows": 3}\n', "for people\n"),
        (["short", "--json"], 1, '{"accuracy": 0.1}\n', ""),
        (["broken"], 1, "", "error: s.zarr is no store: run `featcache extract --out s.zarr`\n"),
        (["typo"], 2, "", "error: optim.lrr: no such key; did you mean 'lr'?\n"),
        (["stopped"], 130, "", "interrupted; run the same command again to go on\n"),
        (["goodd"], 2, "", "error: no command 'goodd'; did you mean 'good'? (prog --help)\n"),
        (
            ["xyz"],
            2,
            "",
            "error: no command 'xyz'; known: good, short, broken, typo, stopped, bug"
            " (prog --help)\n",
        ),
    ],
)
def test_whole_output(
    group: console.LazyGroup,
    argv: list[str],
    code: int,
    out: str,
    err: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert console.run(group, argv) == code
    assert tuple(capsys.readouterr()) == (out, err)


def test_unknown_option_is_one_line_and_exit_2(
    group: console.LazyGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(group, ["good", "--jsonn"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No such option") and error.count("\n") == 1
    assert "--json" in error and "(prog good --help)" in error


def test_error_with_json_is_a_document_too(
    group: console.LazyGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(group, ["typo", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": "optim.lrr: no such key; did you mean 'lr'?"
    }


@pytest.mark.parametrize("argv", [["--debug", "broken"], ["broken", "--debug"]])
def test_debug_shows_the_traceback(group: console.LazyGroup, argv: list[str]) -> None:
    with pytest.raises(StoreError):
        console.run(group, argv)


def test_a_bug_keeps_its_traceback(group: console.LazyGroup) -> None:
    with pytest.raises(IndexError):
        console.run(group, ["bug"])


def test_help_lists_the_table(group: console.LazyGroup, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(group, ["--help"]) == 0
    assert capsys.readouterr().out == (
        "Usage: prog [OPTIONS] COMMAND [ARGS]...\n\n  A program.\n\n"
        "Options:\n  --debug     Show the traceback of every error.\n"
        "  -h, --help  Show this message and exit.\n\n"
        "Commands:\n  good     good line.\n  short    short line.\n  broken   broken line.\n"
        "  typo     typo line.\n  stopped  stopped line.\n  bug      bug line.\n"
    )


def test_progress_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with console.Progress(
        "extract", unit="images", total=4000, start=1000, clock=lambda: now[0]
    ) as progress:
        for second in range(1, 62):
            now[0] = float(second)
            progress.update(1000 + 40 * second, stage="encode")
    assert capsys.readouterr().err == (
        "extract: 2,200/4,000 images · 40.0 images/s · 45 s left · stage encode\n"
        "extract: 3,400/4,000 images · 40.0 images/s · 15 s left · stage encode\n"
        "extract: 3,440/4,000 images · 40.0 images/s · 14 s left · stage encode\n"
    )


def test_table_and_fields_take_nothing_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(["name", "n"], [["[red]x[/red]", 12]], right=[1])
    console.fields({"a": 1, "long": "[b]"})
    error = capsys.readouterr().err
    assert "[red]x[/red]" in error
    assert error.endswith("a     1\nlong  [b]\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42, "42 s"), (250, "4 min 10 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1_679_616, "1.7 MB"), (937_400_000_000, "937.4 GB")]
)
def test_size(count: int, text: str) -> None:
    assert console.size(count) == text


def test_a_live_bar_leaves_stderr_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich's proxy there would print lines into the bar instead of above it."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    console._console_for.cache_clear()
    before = sys.stderr
    with console.Progress("train", "steps", 10) as progress:
        assert progress._bar is not None
        assert sys.stderr is before
    console._console_for.cache_clear()


def test_a_table_on_a_narrow_terminal_loses_no_letter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(console, "stderr", lambda: Console(stderr=True, width=30))
    console.table(
        ["name", "images", "checkpoint"], [["tiny", "558,128", "google/siglip2-so400m"]], right=[1]
    )
    shown = capsys.readouterr().err
    assert "…" not in shown
    rows = [line.split() for line in shown.splitlines()[4:] if line.strip()]
    assert "".join(row[-1] for row in rows) == "google/siglip2-so400m"
