"""An S3 server for the tests of this folder, and a bucket for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from featcache import object_store
from featcache.object_path import ObjectPath
from featcache.tier import default_tier
from tests.support_s3 import Proxy, S3Server

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
