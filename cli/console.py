"""What both programs share: lazy commands, errors as one line, tables, progress, `--json`.

Only click and the standard library are imported here. rich is imported when something is drawn,
torch, zarr and transformers inside the functions that do the work, so `--help` answers at once.

A command is a function that returns the document `--json` prints, or a `Result` where the exit code
is not 0:

    @console.command("info", interrupted="nothing was changed")
    @click.argument("store", type=Path)
    def info(store: Path) -> Document:
        '''Shape, codec, encoder and failures of STORE.'''
        import featcache
        ...
        console.table(["codec", "rows"], [["fp16", 4000]])
        return {"codec": "fp16", "rows": 4000}

Human text goes to stderr; stdout carries nothing but that one document.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click

from featcache.errors import ConfigError, FeatcacheError
from featcache.object_path import StorePath, parse_location

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

Document: TypeAlias = dict[str, Any]  # JSON-able

PLAIN_EVERY_S = 30.0  # where stderr is no terminal: one line of progress each so many seconds


@dataclass(frozen=True, slots=True)
class Result:
    """What a command hands back when it ended with another exit code than 0."""

    document: Document | None  # None: nothing is printed, not even with --json
    exit_code: int = 0


# --------------------------------------------------------------------------------------- commands


class Command(click.Command):
    """A click command with `--debug` and `--json`, whose user errors are one line on stderr.

    interrupted: what the user is told after Ctrl-C: how to go on from here.
    """

    def __init__(self, *args: Any, interrupted: str = "stopped", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interrupted = interrupted
        self.params += [
            click.Option(
                ["--json", "as_json"],
                is_flag=True,
                expose_value=False,
                callback=functools.partial(_remember, "json"),
                help="Put one JSON document as the last line on stdout.",
            ),
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=functools.partial(_remember, "debug"),
                help="Show the traceback of every error.",
            ),
        ]

    def invoke(self, ctx: click.Context) -> None:
        as_json = bool(ctx.meta.get("json"))
        try:
            result = super().invoke(ctx)
        except FeatcacheError as error:
            if ctx.meta.get("debug"):
                raise
            fail(str(error))
            if as_json:
                click.echo(json.dumps({"error": str(error)}))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            fail(f"interrupted; {self.interrupted}", label="")
            ctx.exit(130)
        if not isinstance(result, Result):
            result = Result(result or {})
        if as_json and result.document is not None:
            click.echo(json.dumps(result.document))
        if result.exit_code:
            ctx.exit(result.exit_code)


def command(name: str, interrupted: str = "stopped") -> Callable[[Callable[..., Any]], Command]:
    """Decorator: a function as a `Command` called `name`."""
    return click.command(
        name,
        cls=Command,
        interrupted=interrupted,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def _remember(key: str, ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[key] = value or bool(ctx.meta.get(key))


class LazyGroup(click.Group):
    """A group that knows its commands' names and help lines, and imports one only to run it.

    table: command name -> (import path "module:attribute", help line).
    """

    def __init__(self, name: str, table: Mapping[str, tuple[str, str]], help: str) -> None:
        super().__init__(
            name,
            help=help,
            no_args_is_help=True,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        )
        self.table = dict(table)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=functools.partial(_remember, "debug"),
                help="Show the traceback of every error.",
            )
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module, attribute = self.table[cmd_name][0].split(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.table.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and args[0] not in self.table:
            raise click.UsageError(
                f"no command {args[0]!r}{did_you_mean(args[0], self.table)}", ctx=ctx
            )
        return super().resolve_command(ctx, args)


class _Location(click.ParamType):
    """A path, or an address in an object store: featcache.object_path.parse_location."""

    name = "path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> StorePath:
        try:
            return parse_location(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


LOCATION = _Location()


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """ "; did you mean 'x'?" where a known word is near, else the known words."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def run(group: click.Group, argv: Sequence[str] | None = None) -> int:
    """Runs a program and returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.

    Whatever is neither a user's error nor click's is a bug and keeps its traceback.
    """
    # What transformers says about configs is not addressed to our users; what matters of it is
    # checked and raised by us. Its bars for downloads and weights are for terminals.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torch's OpenMP threads spin while they wait. Where another process wants the same core that
    # is ruinous: a training step of the demo on 2 cores, beside 2 busy processes, took 1.5 s
    # spinning and 0.47 s sleeping. libgomp reads this when torch is first imported: after here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Huge pages for torch's memory on the CPU: decoding a batch into fresh memory takes a third to
    # a quarter of the time (benchmarks/bench_reader.py). Read at the first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        code = group.main(
            args=None if argv is None else list(argv), prog_name=group.name, standalone_mode=False
        )
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        where = f" ({error.ctx.command_path} --help)" if error.ctx is not None else ""
        fail(error.format_message().replace("\n", " ") + where)
        return 2
    except click.ClickException as error:
        fail(error.format_message())
        return error.exit_code
    except click.Abort:
        fail("interrupted", label="")
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): no one is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def fail(message: str, label: str = "error: ") -> None:
    """One line on stderr, its label red where the terminal has colours."""
    one_line = " ".join(message.splitlines()) if label else message
    click.secho(label + one_line, err=True, fg="red", color=None if _colours() else False)


def _colours() -> bool:
    return not os.environ.get("NO_COLOR")


# ----------------------------------------------------------------------------------- human output


@functools.lru_cache(maxsize=1)
def _console_for(stream: Any) -> Console:
    from rich.console import Console

    # rich honours NO_COLOR and FORCE_COLOR. Off a terminal it would fold at 80 columns and cut
    # paths in two, which no one can copy.
    width = None if stream.isatty() else 200
    return Console(file=stream, highlight=False, width=width)


def stderr() -> Console:
    """The rich console for people (looked up at each call: tests replace sys.stderr)."""
    return _console_for(sys.stderr)


def say(text: str = "", style: str | None = None) -> None:
    """A line of plain text for people; nothing in it is taken for markup."""
    stderr().print(text, style=style, markup=False, soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    title: str | None = None,
    right: Sequence[int] = (),
) -> None:
    """A table for people. right: the columns aligned right (figures)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        # Folded where the terminal is narrow: "0.…" is no figure, and "goo…" no name.
        justify: Literal["right", "left"] = "right" if number in right else "left"
        drawn.add_column(Text(column), justify=justify, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    stderr().print(drawn)


def fields(pairs: Mapping[str, object]) -> None:
    """Names and values, one pair a line, the values aligned."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        say(f"{name:<{width}}  {value}")


def count(number: int, noun: str) -> str:
    """E.g. '1 shard', '2,000 shards'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """3.2 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count_bytes: float) -> str:
    """Bytes in powers of ten: 937.4 GB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count_bytes < 1000 or unit == "TB":
            break
        count_bytes /= 1000
    return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes:.1f} {unit}"


# --------------------------------------------------------------------------------------- progress


class Progress:
    """Live progress: a bar on a terminal, elsewhere one plain line every 30 s and one at the end.

    label: what is going on ("extract", "train"). unit: what is counted ("images", "steps").
    total: None where it is not known yet. start: how many were done before this run began; they
    are shown as done, and left out of the rate.

        with Progress("extract", unit="images", total=4000) as progress:
            progress.update(done, stage="encode")               # rate and time left by itself
        with Progress("train", unit="steps", total=2000) as progress:
            progress.update(step, loss="0.412", lr="9.8e-05", wait="1 %")
            progress.note("eval  loss 0.390")                   # a line that stays
    """

    def __init__(
        self,
        label: str,
        unit: str,
        total: int | None = None,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.unit, self.total, self.start = label, unit, total, start
        self.done = start
        self._clock = clock
        self._began = self._said = clock()
        self._shown: dict[str, str] = {}
        self._bar: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._began = self._said = self._clock()
        if stderr().is_terminal:
            from rich import progress as rich_progress

            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("[bold]{task.description}"),
                rich_progress.BarColumn(bar_width=24),
                rich_progress.TextColumn("{task.fields[line]}", markup=False),
                console=stderr(),
                # rich would put a proxy in sys.stderr's place, and `say` would print through that
                # instead of above the bar.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(self.label, total=self.total, line=self._counts())
            self._bar.start()
        return self

    def update(self, done: int, total: int | None = None, **shown: str) -> None:
        """`done` of `total` are ready; `shown` are further values, already formatted."""
        self.done = done
        self.total = self.total if total is None else total
        self._shown.update(shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, line=self.line())
        elif self._clock() - self._said >= PLAIN_EVERY_S:
            self._say()

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        say(text)

    def line(self) -> str:
        """Counts, rate, time left and the other values, as one plain line (without the label)."""
        parts = [self._counts()]
        elapsed = self._clock() - self._began
        new = self.done - self.start
        if new > 0 and elapsed > 0:
            parts.append(f"{new / elapsed:.1f} {self.unit}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) * elapsed / new)} left")
        parts += [f"{name} {value}" for name, value in self._shown.items()]
        return " · ".join(parts)

    def _counts(self) -> str:
        of = "" if self.total is None else f"/{self.total:,}"
        return f"{self.done:,}{of} {self.unit}"

    def _say(self) -> None:
        self._said = self._clock()
        say(f"{self.label}: {self.line()}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._say()
