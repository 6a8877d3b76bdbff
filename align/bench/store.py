"""The same features in many formats, read in batches by many readers, beside their ceilings.

Each provider has a process of its own. A round runs every provider's pass over the same batches,
one after another, in an order drawn anew for each round, so that what else the machine does hits
all alike. See docs/performance.md for what each figure means.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from align.bench import usage
from align.bench.batches import random_batches, sequential_batches
from align.bench.cgroup import MemoryGroup
from align.bench.process import Pass, ProviderError, ProviderProcess, write
from align.bench.providers import ORDERS, Provider
from align.bench.providers.base import Data, Rows, UnavailableError
from align.bench.rows import Measured, Section, rows_of
from align.errors import AlignError

COLD_RATIO = 0.9
"""A pass of which less than this came from the disk was not cold."""
SMALL_RAM_RATIO = 1 / 3
"""Of the data set, how much of it the page cache may hold."""
FORMAT_OVERHEAD = 1.05

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class BenchError(AlignError):
    """A benchmark that cannot run here."""


@dataclass(frozen=True, slots=True)
class Plan:
    """data: what is read. caches: in which states. *_rounds: passes that count, of each provider
    and order. warm_images: at least so many in a pass from a warm cache; in the others a pass is
    every image once. is_quick: without the slow providers."""

    data: Data
    caches: tuple[str, ...]
    warm_rounds: int
    cold_rounds: int
    small_ram_rounds: int
    warm_images: int
    is_quick: bool


def full_plan(data: Data, caches: tuple[str, ...]) -> Plan:
    return Plan(data, caches, 9, 5, 3, warm_images=1024, is_quick=False)


def quick_plan(data: Data, caches: tuple[str, ...]) -> Plan:
    return Plan(data, caches, 3, 1, 1, warm_images=128, is_quick=True)


@dataclass(slots=True)
class Findings:
    """rows: of align.bench.results. left_out: {provider: why it was not measured, or not all of
    it}. failed: {provider: what went wrong}."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Watch:
    """What is told on the way. note: a line. progress: (done, total) openings and passes."""

    note: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int], None] = lambda done, total: None


def measure(
    folder: Path, plan: Plan, providers: Sequence[Provider], watch: Watch | None = None
) -> Findings:
    """Write, check and measure. folder: empty; the caller removes it.

    Raises BenchError where the disk is too small. What one provider cannot do is in the findings.
    """
    bench = Bench(folder, plan, watch or Watch())
    candidates = [provider for provider in providers if bench.can_run(provider)]
    require_space(folder, plan, candidates)
    interleaved = [cache for cache in plan.caches if cache != "small-ram"]
    if interleaved:
        bench.measure_interleaved(candidates, interleaved)
    if "small-ram" in plan.caches:
        bench.measure_small_ram(candidates)
    return bench.findings


def require_space(folder: Path, plan: Plan, providers: Sequence[Provider]) -> None:
    """Raises BenchError."""
    formats = {provider.format for provider in providers if provider.format}
    count = len(formats) if set(plan.caches) - {"small-ram"} else 1
    needed = int(count * plan.data.nbytes * FORMAT_OVERHEAD)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BenchError(
            f"{folder} has {free / 1e9:.1f} GB free, the benchmark needs {needed / 1e9:.1f} GB; "
            "choose another --dir, or fewer --images"
        )


class Bench:
    """One run; `findings` grows."""

    def __init__(self, folder: Path, plan: Plan, watch: Watch) -> None:
        self.folder, self.plan, self.watch = folder, plan, watch
        self.data = plan.data
        self.findings = Findings()
        self.done = self.total = 0  # of what `Watch.progress` counts
        self.telling = threading.Lock()  # providers are opened by several threads

    # ------------------------------------------------------------------------------ who takes part

    def can_run(self, provider: Provider) -> bool:
        if not set(provider.caches) & set(self.plan.caches):
            return False
        if provider.missing:
            self.leave_out(provider.name, f"pip install {' '.join(provider.missing)}")
            return False
        if provider.is_slow and self.plan.is_quick:
            self.leave_out(provider.name, "in full runs only")
            return False
        return True

    def step(self) -> None:
        with self.telling:
            self.done += 1
            self.watch.progress(self.done, self.total)

    def leave_out(self, name: str, why: str) -> None:
        with self.telling:
            self.findings.left_out[name] = why
            self.watch.note(f"left out: {name}: {why}")

    def fail(self, name: str, error: ProviderError) -> None:
        with self.telling:
            self.findings.failed[name] = str(error)
            self.watch.note(f"failed: {name}: {error}")

    # ------------------------------------------------------------------------- writing and opening

    def write(self, providers: Sequence[Provider]) -> list[Provider]:
        """Write their formats, where they are not there. Returns those that can be read."""

        def one(name: str) -> ProviderError | None:
            if (self.folder / name).exists():
                return None
            (self.folder / name).mkdir()
            try:
                write(name, self.folder / name, self.data)
            except ProviderError as error:
                return error
            return None

        names = sorted({provider.format for provider in providers if provider.format})
        failed = {name: error for name, error in zip(names, each(one, names), strict=True) if error}
        for provider in providers:
            if provider.format in failed:
                self.fail(provider.name, failed[provider.format])
        return [provider for provider in providers if provider.format not in failed]

    def start(self, provider: Provider, stack: contextlib.ExitStack) -> ProviderProcess:
        process = ProviderProcess(provider, self.folder / provider.format, self.data)
        stack.callback(process.close)
        return process

    def open(self, process: ProviderProcess) -> bool:
        """Open, compare every value with what was written, and read once more. False where that
        fails, which is noted."""
        provider = process.provider
        batches = self.batches(provider, Section("cold", provider.orders[0]), 0)
        try:
            process.ask("open")
            process.ask("check", batches)
            process.measure(batches)
        except UnavailableError as error:
            self.leave_out(provider.name, str(error))
        except ProviderError as error:
            self.fail(provider.name, error)
        else:
            return True
        process.close()
        return False

    def batches(self, provider: Provider, section: Section, number: int) -> list[Rows]:
        """What each provider reads in round `number`: from a warm cache at least so many images
        that the time can be taken, else every image once."""
        at_least = self.plan.warm_images if section.cache == "warm" else 1
        if section.order not in provider.orders:  # a ceiling
            return sequential_batches(self.data.images, at_least)
        if section.order == "sequential":
            return sequential_batches(self.data.images, at_least)
        found = random_batches(self.data.images, at_least, number)
        return found[:1] if provider.is_slow else found

    # ------------------------------------------------------------------------------- warm and cold

    def measure_interleaved(self, providers: Sequence[Provider], caches: Sequence[str]) -> None:
        wanted = [provider for provider in providers if set(provider.caches) & set(caches)]
        self.watch.note(f"writing {len({p.format for p in wanted if p.format})} formats")
        wanted = self.write(wanted)
        self.watch.note(f"opening {len(wanted)} providers, comparing every value")
        with contextlib.ExitStack() as stack:

            def start(provider: Provider) -> ProviderProcess | None:
                process = self.start(provider, stack)
                is_open = self.open(process)
                self.step()
                return process if is_open else None

            sections = [Section(cache, order) for cache in caches for order in ORDERS]
            if "warm" in caches:
                sections.append(Section("warm", "random", beside="pure Python"))
            self.total = len(wanted) + self.passes(wanted, sections)
            processes = [found for found in each(start, wanted) if found]
            wanted = [process.provider for process in processes]
            self.total = self.done + self.passes(wanted, sections)
            for section in sections:
                if section.cache == "cold":
                    self.release(processes)
                names = {provider.name for provider in participants(wanted, section)}
                self.run_section([p for p in processes if p.provider.name in names], section)
            for process in processes:  # side by side: to take torch apart takes half a second
                process.end()

    def release(self, processes: Sequence[ProviderProcess]) -> None:
        """Before the first drop: the providers of a format map the same files."""
        for process in processes:
            if process.provider.name not in self.findings.failed:
                process.ask("release")

    def passes(self, providers: Sequence[Provider], sections: Sequence[Section]) -> int:
        return sum(
            self.rounds(section) * len(participants(providers, section)) for section in sections
        )

    def rounds(self, section: Section) -> int:
        return self.plan.cold_rounds if section.cache == "cold" else self.plan.warm_rounds

    def run_section(self, processes: Sequence[ProviderProcess], section: Section) -> None:
        log: dict[str, list[tuple[list[Rows], Pass]]] = {p.provider.name: [] for p in processes}
        chance = random.Random(0)
        for number in range(self.rounds(section)):
            for process in chance.sample(processes, len(processes)):
                provider = process.provider
                if provider.name not in self.findings.failed:
                    batches = self.batches(provider, section, 1 + number)
                    try:
                        log[provider.name].append(
                            (batches, self.run_pass(process, section, batches))
                        )
                    except ProviderError as error:
                        self.fail(provider.name, error)
                self.step()
        measured = [
            Measured(
                process.provider,
                [batches for batches, _ in log[process.provider.name]],
                [found for _, found in log[process.provider.name]],
                process.peak_bytes(),
            )
            for process in processes
            if process.provider.name not in self.findings.failed
        ]
        if section.cache == "cold":
            measured = [each for each in measured if self.was_cold(each)]
        self.findings.rows += rows_of(section, self.data, measured)

    def run_pass(self, process: ProviderProcess, section: Section, batches: Sequence[Rows]) -> Pass:
        if section.cache == "warm":
            # The ceiling is the same whatever the main thread does.
            beside = bool(section.beside) and not process.provider.ceiling
            return process.measure(batches, beside=beside)
        process.ask("release")
        usage.drop(process.files)
        found = process.measure(batches)
        process.ask("release")  # before another provider of these files drops them
        return found

    def was_cold(self, measured: Measured) -> bool:
        ratio = min(measured.amplification(self.data))
        if ratio < COLD_RATIO:
            name = measured.provider.name
            self.leave_out(name, f"not cold: only {ratio:.0%} came from the disk")
        return ratio >= COLD_RATIO

    # ----------------------------------------------------------------------------------- small RAM

    def measure_small_ram(self, providers: Sequence[Provider]) -> None:
        """Format by format: written, read below a limit of memory, deleted."""
        wanted = [provider for provider in providers if "small-ram" in provider.caches]
        try:
            MemoryGroup("featcache-bench").close()
        except OSError as error:
            self.leave_out("small-ram", f"no memory cgroup can be made here: {error}")
            return
        formats = list(dict.fromkeys(provider.format for provider in wanted))
        for folder in self.folder.iterdir():
            if folder.name not in formats:
                shutil.rmtree(folder)
        self.watch.note(f"{len(wanted)} providers with RAM for a third of the data")
        self.total += len(wanted)
        measured = []
        for name in formats:
            for provider in self.write([each for each in wanted if each.format == name]):
                found = self.run_small_ram(provider)
                if found is not None:
                    measured.append(found)
                self.step()
            shutil.rmtree(self.folder / name)
        self.findings.rows += rows_of(Section("small-ram", "random"), self.data, measured)

    def run_small_ram(self, provider: Provider) -> Measured | None:
        section = Section("small-ram", "random")
        with contextlib.ExitStack() as stack:
            group = MemoryGroup("featcache-bench")
            stack.callback(group.close)
            process = self.start(provider, stack)
            # What was charged to another group would not count here.
            usage.drop(process.files)
            group.add(process.pid)
            if not self.open(process):
                return None
            batches = [
                self.batches(provider, section, number)
                for number in range(1 + self.plan.small_ram_rounds)
            ]
            try:
                group.limit(int(process.own_peak_bytes() + self.data.nbytes * SMALL_RAM_RATIO))
                process.ask("open_again")
                # The first pass after the limit is not counted: it begins with another cache.
                passes = [process.measure(each) for each in batches]
            except ProviderError as error:
                self.fail(provider.name, error)
                return None
            return Measured(provider, batches[1:], passes[1:], process.peak_bytes())


def participants(providers: Sequence[Provider], section: Section) -> list[Provider]:
    """Those that are measured in a section, and its ceiling."""

    def takes_part(provider: Provider) -> bool:
        if section.cache in provider.ceiling:
            return True
        if section.beside and not provider.beside:
            return False
        return section.cache in provider.caches and section.order in provider.orders

    return [provider for provider in providers if takes_part(provider)]


def each(do: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
    """`do` of every item, in threads that wait for a process each, as many as there are cores."""

    def leave_interrupts_to_the_main_thread() -> None:
        # Processes started here inherit it: Ctrl-C ends them by their parent, in order.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    pool = ThreadPoolExecutor(os.cpu_count(), initializer=leave_interrupts_to_the_main_thread)
    try:
        return list(pool.map(do, items))
    finally:
        pool.shutdown(cancel_futures=True)
