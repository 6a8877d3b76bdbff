"""Values that the threads of a process share: made once, kept while they fit a budget."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_all: weakref.WeakSet[OnceCache] = weakref.WeakSet()


class OnceCache(Generic[K, V]):
    """The most recently used values. Safe for threads; a forked child begins with none.

    budget_bytes: what all values together may take. size: bytes of a value. least: so many of the
    latest are kept whatever they take.
    """

    def __init__(self, budget_bytes: int, size: Callable[[V], int], least: int = 1) -> None:
        self._budget, self._size, self._least = budget_bytes, size, least
        self.clear()
        _all.add(self)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value, made by the first thread that asks for it while the others wait.

        Raises what `make` raises, in all threads that waited for it; the next one to ask makes it
        again.
        """
        with self._lock:
            future = self._futures.get(key)
            ours = future is None
            if future is None:
                future = self._futures[key] = Future()
            self._futures.move_to_end(key)
        if ours:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._futures.pop(key, None)
                future.set_exception(error)
                raise
            self._shrink()
        return future.result()

    def clear(self) -> None:
        """Forget all values."""
        self._lock = threading.Lock()
        self._futures: OrderedDict[K, Future[V]] = OrderedDict()

    def _shrink(self) -> None:
        with self._lock:
            done = {key: each for key, each in self._futures.items() if each.done()}
            taken = {key: self._size(each.result()) for key, each in done.items()}
            total = sum(taken.values())
            for key in list(taken)[: -self._least]:
                if total <= self._budget:
                    break
                total -= taken[key]
                del self._futures[key]


def _begin_anew_after_a_fork() -> None:
    """Another thread of the parent may have held a lock, or been making a value."""
    for each in list(_all):
        each.clear()


os.register_at_fork(after_in_child=_begin_anew_after_a_fork)
