"""A provider in a process of its own, which waits for what to do.

Between commands it sleeps in a read of its pipe, so that open providers do not disturb the one
that is measured.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from align.bench import usage
from align.bench.providers import FORMATS, Provider
from align.bench.providers.base import Data, Reader, Rows, UnavailableError
from align.errors import AlignError

ALONE_S = 0.3  # how long the busy main thread's speed alone is taken


class ProviderError(AlignError):
    """A provider that failed; the text says how, in one line."""


class WrongBytesError(ProviderError):
    """A provider that delivered other bytes than were written."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over batches took.

    seconds: of all. batch_s: from one batch to the next, of the batches of full size.
    main_ratio: the busy main thread's speed during the pass, of its speed alone; None without one.
    used: by the provider's processes.
    """

    seconds: float
    batch_s: list[float]
    main_ratio: float | None
    used: usage.Usage


class ChildProcess:
    """The parent's end of a process that answers commands. They raise ProviderError for what went
    wrong in the child, and whatever error of ours the child sends."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        """target: called in the process with its end of the pipe and `arguments`, to serve."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *arguments), name=name)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ask(self, command: str, *arguments: Any) -> Any:
        self.send(command, *arguments)
        return self.answer()

    def send(self, command: str, *arguments: Any) -> None:
        with contextlib.suppress(OSError):  # closed or broken: `answer` tells that it has ended
            self.pipe.send((command, arguments))

    def answer(self) -> Any:
        try:
            is_good, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise ProviderError(f"its process ended ({self.process.exitcode})") from None
        if not is_good:
            raise value
        return value

    def end(self) -> None:
        """Have it end without waiting for it. `close` is still to be called."""
        self.send("close")

    def close(self) -> None:
        """End it and its children, and wait. May be called again."""
        if self.pipe.closed:
            return
        children = usage.process_tree(self.pid)[1:] if self.process.is_alive() else []
        self.send("close")
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.pipe.close()


class ProviderProcess(ChildProcess):
    """That of a provider of stored features."""

    def __init__(self, provider: Provider, folder: Path, data: Data) -> None:
        """folder: of the format's files. Starts the process, which waits before it imports."""
        self.provider = provider
        self.files = usage.files_below(folder) if provider.format else []
        super().__init__(provider.name, serve, provider, folder, data)

    def measure(self, batches: Sequence[Rows], *, beside: bool = False) -> Pass:
        """One pass over batches. beside: in a background thread, while the main one runs Python."""
        self.ask("prepare", batches, beside)
        before = usage.usage(self.pid)
        seconds, batch_s, main_ratio = self.ask("run")
        return Pass(seconds, batch_s, main_ratio, usage.usage(self.pid).since(before))

    def peak_bytes(self) -> int:
        """The memory that opening and reading added at its highest, imports apart. Mapped pages
        count, the page cache does not. Children count with what they hold now."""
        children = usage.process_tree(self.pid)[1:]
        own: int = self.ask("peak")
        return own + sum(map(usage.proportional_bytes, children))

    def own_peak_bytes(self) -> int:
        """At its highest, the memory of all its processes that the kernel cannot drop."""
        tree = usage.process_tree(self.pid)
        own = sum(usage.memory_bytes(pid, "RssAnon", "RssShmem") for pid in tree)
        # What was taken for a read and given back; mapped files count with what they hold now.
        return own + sum(
            usage.memory_bytes(pid, "VmHWM") - usage.memory_bytes(pid, "VmRSS") for pid in tree
        )


def load(place: str) -> Any:
    """What "module:name" names."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def write(name: str, folder: Path, data: Data) -> list[Path]:
    """Write a format in a process of its own. Returns its files, all on the disk.

    Raises ProviderError.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=serve_write, args=(theirs, name, folder, data))
    process.start()
    theirs.close()
    try:
        error = pipe.recv()
    except EOFError:
        error = "its process ended"
    finally:
        process.join()
    if error:
        raise ProviderError(f"could not be written: {error}")
    files = usage.files_below(folder)
    usage.sync(files)
    return files


# ---------------------------------------------------------------------------------- in the process


def serve_write(pipe: Connection, name: str, folder: Path, data: Data) -> None:
    quieten()
    try:
        load(FORMATS[name])(folder, data)
    except Exception as error:  # whatever a peer raises is told, and the others go on
        pipe.send(one_line(error))
    else:
        pipe.send("")


def serve(pipe: Connection, provider: Provider, folder: Path, data: Data) -> None:
    quieten()
    answer_commands(pipe, Server(provider, folder, data))


def answer_commands(pipe: Connection, server: Any) -> None:
    """Do what the parent asks of `server` by its methods' names, until that is "close"."""
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:  # the parent has ended
            return
        try:
            pipe.send((True, getattr(server, command)(*arguments)))
        except (ProviderError, UnavailableError) as error:
            pipe.send((False, error))
        except Exception as error:  # whatever a peer raises is told, and the others go on
            pipe.send((False, ProviderError(one_line(error))))
        if command == "close":
            return


def quieten() -> None:
    """Ctrl-C is the parent's to answer; what a peer prints is neither table nor document."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def one_line(error: Exception) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())


class Server:
    """The commands."""

    def __init__(self, provider: Provider, folder: Path, data: Data) -> None:
        self.provider, self.folder, self.data = provider, folder, data
        self.reader: Reader
        self.batches: Sequence[Rows] = ()
        self.beside = False
        self.opened_bytes = 0

    def open(self) -> None:
        cls = load(self.provider.reader)
        usage.forget_peak()
        self.opened_bytes = usage.memory_bytes(os.getpid(), "VmRSS")
        self.reader = cls(self.folder, self.data, **self.provider.options)

    def open_again(self) -> None:
        """What a provider decides when it opens, it decides by the memory that there is now."""
        self.reader.close()
        self.reader = load(self.provider.reader)(self.folder, self.data, **self.provider.options)

    def check(self, batches: Sequence[Rows]) -> None:
        """Raises WrongBytesError."""
        delivered = 0
        for rows, batch in zip(batches, self.reader.batches(batches), strict=True):
            if batch.shape != (len(rows), *self.data.image_shape) or batch.dtype != np.float16:
                raise WrongBytesError(
                    f"delivers {batch.dtype}{list(batch.shape)} for {len(rows)} rows"
                )
            for row, image in zip(rows.tolist(), batch, strict=True):
                expected = self.data.image(row)
                if not np.array_equal(image.view(np.uint16), expected.view(np.uint16)):
                    raise WrongBytesError(f"delivers other bytes for row {row} than were written")
            delivered += len(rows)
        assert delivered == sum(map(len, batches))

    def prepare(self, batches: Sequence[Rows], beside: bool) -> None:
        self.batches, self.beside = batches, beside
        gc.collect()

    def run(self) -> tuple[float, list[float], float | None]:
        if not self.beside:
            return (*self.read_through(), None)
        return self.read_beside()

    def read_through(self) -> tuple[float, list[float]]:
        full = max(map(len, self.batches))
        batch_s = []
        start = last = time.perf_counter()
        for batch in self.reader.batches(self.batches):
            now = time.perf_counter()
            if len(batch) == full:
                batch_s.append(now - last)
            last = now
        return last - start, batch_s

    def read_beside(self) -> tuple[float, list[float], float | None]:
        """Read in a background thread while the main one counts."""
        over = threading.Event()
        timer = threading.Timer(ALONE_S, over.set)
        timer.start()
        alone = count_until(over)
        over.clear()
        found: list[Any] = []

        def read() -> None:
            try:
                found.append(self.read_through())
            except Exception as error:
                found.append(error)
            finally:
                over.set()

        thread = threading.Thread(target=read)
        thread.start()
        busy = count_until(over)
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return (*found[0], busy / alone)

    def release(self) -> None:
        usage.unmap_pages(self.folder)

    def peak(self) -> int:
        return usage.memory_bytes(os.getpid(), "VmHWM") - self.opened_bytes

    def close(self) -> None:
        self.reader.close()


def count_until(over: threading.Event) -> float:
    """Plain Python that never waits. Returns rounds a second."""
    start, rounds, total = time.perf_counter(), 0, 0
    while not over.is_set():
        for number in range(1000):
            total += number
        rounds += 1
    return rounds / (time.perf_counter() - start)
