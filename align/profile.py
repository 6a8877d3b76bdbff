"""`align train --profile`: what the steps spend their time on, as a trace and as a table.

RUN/profile/rank-0.trace.json.gz    for chrome://tracing or ui.perfetto.dev
RUN/profile/rank-0.txt              the operators by their own time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from align.errors import RunError
from align.run import Run
from align.tracking import NoticeEvent

SKIPPED, WARM_UP, RECORDED = 2, 1, 4
"""Steps: the first ones compile and fill caches, one more is for the profiler to settle."""
ROWS = 40


@contextmanager
def recorded(
    run: Run, wanted: bool, tell: Callable[[NoticeEvent], object]
) -> Iterator[Callable[[], None]]:
    """What is to be called at each step's end; where a profile is wanted, it is written after
    `SKIPPED + WARM_UP + RECORDED` steps, or at the end of a shorter run."""
    if not wanted:
        yield lambda: None
        return
    folder = run.path / "profile"
    name = f"rank-{run.ranks.index}"

    def write(done: profile) -> None:
        trace = folder / f"{name}.trace.json.gz"
        try:
            folder.mkdir(exist_ok=True)
            done.export_chrome_trace(str(trace))
        except OSError as error:
            raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
        by = "self_cuda_time_total" if run.model.device.type == "cuda" else "self_cpu_time_total"
        text = done.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        table = trace.with_name(f"{name}.txt")
        table.write_text(text, encoding="utf-8")
        tell(NoticeEvent(f"profile of up to {RECORDED} steps: {trace}, {table}"))

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
