"""Requests to object stores on behalf of a forked process.

obstore works with threads of its own, which a fork leaves behind and which cannot be started again
in the child: there its requests would wait for ever. So a child whose parent has used an object
store starts a fresh process once, and has that do them: slower by one copy through a pipe.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from featcache.errors import ObjectStoreError

THREADS = 32


class Helper:
    """The fresh process. May be used by several threads."""

    def __init__(self) -> None:
        # The modules that this process finds, that one must find too.
        paths = os.pathsep.join(path or os.curdir for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from featcache.object_helper import serve; serve()"],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._count = 0
        threading.Thread(target=self._receive, name="featcache-helper", daemon=True).start()

    def request(self, url: str, bucket: str, ask: Callable[[Any], Any]) -> Any:
        """`object_store.request`, over there."""
        answer: Future[Any] = Future()
        with self._lock:
            self._count += 1
            self._waiting[self._count] = answer
            assert self._process.stdin is not None
            try:
                _send(self._process.stdin, (self._count, url, bucket, ask))
            except BrokenPipeError:
                raise _gone(url) from None
        return answer.result()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        while (message := _receive(self._process.stdout)) is not None:
            number, result, error = message
            answer = self._waiting.pop(number)
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)
        for answer in self._waiting.values():
            answer.set_exception(_gone("the object store"))


def serve() -> None:
    """Answer requests from stdin on stdout until there are no more."""
    from featcache import object_store

    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    lock = threading.Lock()

    def answer(number: int, url: str, bucket: str, ask: Callable[[Any], Any]) -> None:
        result, error = None, None
        try:
            result = object_store.request(url, bucket, ask)
        except Exception as raised:  # the other process raises it
            error = raised
        with lock:
            _send(sink, (number, result, error))

    with ThreadPoolExecutor(THREADS) as pool:
        while (message := _receive(source)) is not None:
            pool.submit(answer, *message)
    os._exit(0)


def _gone(url: str) -> ObjectStoreError:
    return ObjectStoreError(f"{url}: the process that asks it for this forked one has ended")


def _send(sink: IO[bytes], message: object) -> None:
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = _Buffers(copyreg.dispatch_table)
    pickler.dump(message)
    sink.write(len(buffer.getbuffer()).to_bytes(8, "little"))
    sink.write(buffer.getbuffer())
    sink.flush()


class _Buffers(dict[type, Any]):
    """Of obstore's and of Python's views of bytes: as bytes."""

    def __missing__(self, kind: type) -> Any:
        if kind is memoryview or kind.__name__ == "Bytes":
            return lambda view: (bytes, (bytes(view),))
        raise KeyError(kind)


def _receive(source: IO[bytes]) -> Any:
    """None where the other side has ended."""
    head = source.read(8)
    if len(head) < 8:
        return None
    body = source.read(int.from_bytes(head, "little"))
    return pickle.loads(body)
