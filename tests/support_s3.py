"""A real S3 server in a process of its own, and a proxy before it that misbehaves on demand.

The fixtures at the end are for the conftest.py of whoever needs them.
"""

from __future__ import annotations

import http.client
import http.server
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from featcache import object_store
from featcache.object_path import ObjectPath
from featcache.tier import default_tier

HOST = "127.0.0.1"
_PROGRAM = f"""
import os, sys, threading
from moto.server import main
def end_with_the_tests():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=end_with_the_tests, daemon=True).start()
main(["-H", "{HOST}", "-p", "0"])
"""


class S3Server:
    """moto's server: what it holds is in its memory, and gone when it ends."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stderr is not None
        self.port = 0
        while not self.port:
            line = self._process.stderr.readline()
            assert line, "the server ended before it said where it listens"
            if found := re.search(rf"http://{HOST}:(\d+)", line):
                self.port = int(found[1])
        self._log = threading.Thread(target=self._process.stderr.read, daemon=True)
        self._log.start()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request).close()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@dataclass(frozen=True, slots=True)
class Request:
    """method, path: as the client asked. size: bytes of the body that it sent."""

    method: str
    path: str
    size: int


@dataclass(slots=True)
class Fault:
    """What the proxy does to a request instead of passing it on, or to its answer.

    kind: "refuse" (answers `status` and `body`, the server sees nothing), "cut" (half of the
    answer's body), "lose" (the server does it, the answer is lost), "stall" (the answer comes
    `seconds` late).
    """

    kind: str
    status: int = 503
    body: bytes = b"<Error><Code>SlowDown</Code></Error>"
    seconds: float = 0.0


Choose = Callable[[Request], Fault | None]


@dataclass(slots=True)
class Proxy:
    """Passes requests on to a server, each unless `choose` says otherwise.

    seen: every request, those included that met a fault; faults: how many did. max_keys: names on a
    page of a listing, where fewer than the server's 1,000.
    """

    server: S3Server
    choose: Choose = field(default=lambda _: None)
    seen: list[Request] = field(default_factory=list)
    faults: int = 0
    max_keys: int | None = None
    _http: http.server.ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        assert self._http is not None
        return f"http://{HOST}:{self._http.server_port}"

    def start(self) -> None:
        proxy = self

        class Handler(_Handler):
            def handle_any(self) -> None:
                proxy._handle(self)

        self._http = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # a client that has hung up  # type: ignore
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()

    @contextmanager
    def failing(self, choose: Choose) -> Iterator[None]:
        """Within: with these faults; `seen` and `faults` count from here."""
        self.seen, self.faults = [], 0
        self.choose = choose
        try:
            yield
        finally:
            self.choose = lambda _: None

    def _handle(self, handler: _Handler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = Request(handler.command, handler.path, len(body))
        self.seen.append(request)
        fault = self.choose(request)
        self.faults += fault is not None
        if fault and fault.kind == "refuse":
            handler.answer(fault.status, [], fault.body)
            return
        if fault and fault.kind == "stall":
            time.sleep(fault.seconds)
        connection = http.client.HTTPConnection(HOST, self.server.port)
        path = handler.path
        if self.max_keys is not None and "list-type" in path:
            path += f"&max-keys={self.max_keys}"
        connection.request(handler.command, path, body, dict(handler.headers))
        answer = connection.getresponse()
        content = answer.read()
        length = int(answer.headers.get("Content-Length") or len(content))
        connection.close()
        if fault and fault.kind == "lose":
            handler.close_connection = True
            return
        if fault and fault.kind == "cut":
            content = content[: len(content) // 2]
            handler.close_connection = True
        handler.answer(answer.status, answer.getheaders(), content, length)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        raise NotImplementedError

    def answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = lambda self: self.handle_any()  # noqa: N815


def times(count: int, fault: Fault, match: Callable[[Request], bool] = lambda _: True) -> Choose:
    """The fault for the first `count` requests that match."""
    left = [count]
    lock = threading.Lock()

    def choose(request: Request) -> Fault | None:
        with lock:
            if not left[0] or not match(request):
                return None
            left[0] -= 1
            return fault

    return choose


def lasting(seconds: float, fault: Fault) -> Choose:
    """The fault for every request until so long after the first one."""
    began: list[float] = []

    def choose(_: Request) -> Fault | None:
        began.append(time.monotonic())
        return fault if began[-1] - began[0] < seconds else None

    return choose


_numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    started = S3Server(S3_UPLOAD_PART_MIN_SIZE="256")  # so that small uploads have many parts
    yield started
    started.stop()


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    started = Proxy(server)
    started.start()
    yield started
    started.stop()


@pytest.fixture
def environment(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a user would set it, for this process and its children."""
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "FEATCACHE_CACHE_DIR": str(tmp_path / "tier"),
        "FEATCACHE_RETRY_S": "20",
    }.items():
        monkeypatch.setenv(name, value)
    forget()
    yield
    forget()


def forget() -> None:
    """Let this process meet its buckets anew."""
    object_store._clients.of.clear()
    default_tier.cache_clear()


@pytest.fixture
def bucket(server: S3Server, environment: None) -> ObjectPath:
    name = f"bucket-{next(_numbers)}"
    server.make_bucket(name)
    return ObjectPath(f"s3://{name}")
