"""Being asked to go: SIGTERM (Kubernetes, torchrun, a spot instance) or SIGUSR1 (Slurm's
`--signal=USR1@120`) is noted, and acted upon between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Inside, the first of `SIGNALS` is noted, and further ones are ignored: Slurm signals every
    process of a step, and torchrun's agent passes its own signal on as well.

    signal: the one that came; None so far. Only the main thread can listen; in another one this
    does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
