"""Paths in object stores, and what requests that fail come to."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from pathlib import Path

import pytest

import featcache
from featcache import files, object_store
from featcache.errors import ConfigError, ObjectStoreError, StoreError
from featcache.object_path import ObjectPath, parse_location, read_each, size_of
from tests.support_s3 import Fault, Proxy, Request, S3Server, forget, times


def test_locations() -> None:
    path = parse_location("s3://bucket/a/store.zarr/")
    assert path == ObjectPath("s3://bucket", "a/store.zarr")
    assert (path.name, path.suffix) == ("store.zarr", ".zarr")
    assert str(path) == "s3://bucket/a/store.zarr"
    assert str(path / "c/0") == "s3://bucket/a/store.zarr/c/0"
    assert path.parent / "store.zarr" == path.with_name("store.zarr") == path.absolute() == path
    assert parse_location("gs://bucket").parent == parse_location("gs://bucket")
    assert str(path.relative_to(ObjectPath("s3://bucket", "a"))) == "store.zarr"
    assert parse_location("some/folder") == Path("some/folder")
    assert parse_location(path) is path
    assert parse_location("./s3:/folder") == Path("s3:/folder")
    for wrong, message in {
        "http://host/x": "unknown scheme http://",
        "s3://": "names no bucket",
        "s3:/bucket/x": "a bucket is written with two slashes: s3://bucket/x",
        str(Path("az://bucket/x")): "two slashes: az://bucket/x",
        "s3:///x": "names no bucket",
        "s3://bucket/a//b": "no empty",
        "s3://bucket/a/../b": "no empty",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_location(wrong)
    with pytest.raises(ValueError, match="not below"):
        path.relative_to(ObjectPath("s3://other", "a"))


def test_what_a_path_answers(bucket: ObjectPath, tmp_path: Path) -> None:
    folder = bucket / "ä folder"
    assert not folder.exists() and not folder.is_dir() and not bucket.is_dir()
    names = ["1.txt", "2.txt", "deep/3.txt", "odd % +?#[é].txt"]
    for name in names:
        (folder / name).write([name.encode(), 3, b"!"])
    one = folder / "1.txt"
    assert one.exists() and one.is_file() and not one.is_dir()
    assert folder.exists() and folder.is_dir() and not folder.is_file()
    assert one.read_bytes() == b"1.txt\0\0\0!"
    assert one.stat().st_size == 9
    assert bytes(one.read_range(2, 4)) == b"txt\0"
    assert bytes(one.read_range(7, 40)) == b"\0!"
    assert one.read_at_most(8) == 9 and one.read_at_most(9) == one.read_bytes()
    one.download(tmp_path / "1")
    assert (tmp_path / "1").read_bytes() == one.read_bytes()
    assert sorted(folder.listing()) == sorted((n, len(n.encode()) + 4) for n in names)
    assert {path.name for path in folder.iterdir()} == {"1.txt", "2.txt", "deep", names[3]}
    assert [path.name for path in folder.glob("[0-9].txt")] == ["1.txt", "2.txt"]
    assert list(read_each([one, folder / "no", folder / "2.txt"])) == [
        one.read_bytes(), None, (folder / "2.txt").read_bytes()
    ]  # fmt: skip
    for asked in (size_of(bucket, ["ä folder"]), size_of(bucket)):
        assert asked("ä folder/deep/3.txt") == 14 and asked("ä folder/4.txt") is None
    one.unlink()
    one.unlink(missing_ok=True)
    for refused in (one.unlink, one.read_bytes, one.stat):
        with pytest.raises(FileNotFoundError):
            refused()
    with pytest.raises(OSError) as caught:
        (folder / "2.txt").read_range(50, 4)
    assert caught.value.errno == errno.ERANGE
    folder.remove_tree()
    assert bucket.listing() == []
    folder.remove_tree()


@pytest.mark.parametrize("nbytes", [0, 1, 4_000, 8_000_000, 21_000_000])
def test_an_upload_is_the_file_that_a_disk_would_hold(
    bucket: ObjectPath, tmp_path: Path, nbytes: int
) -> None:
    content = os.urandom(nbytes)
    parts = [content[: nbytes // 3], 2_500_000, memoryview(content)[nbytes // 3 :], 0, 17]
    seal = files.publish(bucket / "x", parts)
    assert seal == files.publish(tmp_path / "x", parts)
    assert (bucket / "x").read_bytes() == (tmp_path / "x").read_bytes()


def test_more_than_a_page_is_listed(bucket: ObjectPath, proxy: Proxy) -> None:
    proxy.max_keys = 10
    for i in range(25):
        (bucket / f"x/{i}").write([b"1"])
    (bucket / "xy").write([b"a name that only begins alike"])

    def cut(request: Request) -> bool:
        return "list-type" in request.path and "continuation" in request.path

    with proxy.failing(times(1, Fault("cut"), cut)):
        found = (bucket / "x").listing()
    assert proxy.faults == 1
    assert len(found) == 25
    (bucket / "x").remove_tree()
    assert bucket.listing() == [("xy", 29)]


def test_only_the_first_of_two_writers_succeeds(bucket: ObjectPath, proxy: Proxy) -> None:
    path = bucket / "plan"
    path.write_after(b"first", None)
    path.write_after(b"first", None)  # the same
    with pytest.raises(FileExistsError):
        path.write_after(b"second", None)
    path.write_after(b"second", b"first")
    with pytest.raises(FileExistsError):
        path.write_after(b"third", b"first")
    assert path.read_bytes() == b"second"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        path.write_after(b"third", b"second")
    for fault in ("lose", "cut"):  # it was written, and nobody said so
        with proxy.failing(times(1, Fault(fault), lambda request: request.method == "PUT")):
            (bucket / fault).write_after(b"mine", None)
        assert (bucket / fault).read_bytes() == b"mine"


def test_a_server_without_conditional_writes_is_told(
    bucket: ObjectPath, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATCACHE_RETRY_S", "1")
    no = Fault("refuse", 501, b"<Error><Code>NotImplemented</Code></Error>")
    with proxy.failing(lambda _: no), pytest.raises(OSError, match="does not support") as caught:
        (bucket / "plan").write_after(b"first", None)
    assert caught.value.errno == errno.ENOTSUP


@pytest.mark.parametrize("kind", ["refuse", "cut", "lose"])
def test_every_operation_survives_faults(bucket: ObjectPath, proxy: Proxy, kind: str) -> None:
    path = bucket / "folder/x"
    big = os.urandom(9_000_000)
    operations = {
        "write": lambda: path.write([b"12345"]),
        "stat": lambda: path.stat().st_size == 5,
        "read": lambda: path.read_bytes() == b"12345",
        "range": lambda: path.read_range(1, 3) == b"234",
        "list": lambda: bucket.listing() == [("folder/x", 5)],
        "iterdir": lambda: [each.name for each in bucket.iterdir()] == ["folder"],
        "is_dir": lambda: (bucket / "folder").is_dir(),
        "multipart": lambda: (bucket / "folder/big").write([big]),
        "whole": lambda: (bucket / "folder/big").read_bytes() == big,
        "unlink": lambda: path.unlink(missing_ok=True),
        "remove": lambda: (bucket / "folder").remove_tree(),
    }
    for name, operation in operations.items():
        with proxy.failing(times(2, Fault(kind))):
            assert operation() in (None, True), name
        assert proxy.faults >= 1, name
    assert bucket.listing() == []


def test_who_is_not_let_in_hears_so_at_once(
    bucket: ObjectPath, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(url: str) -> str:
        forget()
        start = time.monotonic()
        with pytest.raises(StoreError) as caught:
            featcache.open(url)
        assert time.monotonic() - start < 15
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setattr(object_store, "PROBE_S", 1.0)
    assert re.match(
        r"s3://nowhere/.*: there is no bucket 'nowhere' at http://.*; check the address",
        said("s3://nowhere/store.zarr"),
    )
    assert re.match(
        rf"{bucket}/store.zarr is not a feature store .*no such", said(f"{bucket}/store.zarr")
    )
    denied = Fault("refuse", 403, b"<Error><Code>AccessDenied</Code></Error>")
    with proxy.failing(lambda _: denied):
        assert re.match(rf"{bucket}/s: access denied .*AccessDenied", said(f"{bucket}/s"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert re.search("connection refused", said(f"{bucket}/s"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    assert re.search("no such host", said(f"{bucket}/s"))
    monkeypatch.setenv("FEATCACHE_RETRY_S", "soon")
    forget()
    with pytest.raises(ConfigError, match="FEATCACHE_RETRY_S=soon"):
        featcache.open(f"{bucket}/s")


def test_without_obstore(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigError, match=r"needs obstore: pip install 'featcache\[s3\]'"):
        featcache.open("s3://bucket/store.zarr")


def test_wrong_credentials(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server(INITIAL_NO_AUTH_ACTION_COUNT="1")
    try:
        server.make_bucket("guarded")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with pytest.raises(ObjectStoreError, match=r"refused .*InvalidAccessKeyId.*set AWS_ACC"):
            featcache.open("s3://guarded/store.zarr")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setattr(object_store, "PROBE_S", 0.5)
        forget()
        with pytest.raises(ObjectStoreError, match=r"no credentials were found; set AWS_ACCESS"):
            featcache.open("s3://guarded/store.zarr")
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_asks_through_a_helper(bucket: ObjectPath, tmp_path: Path) -> None:
    """obstore itself hangs there."""
    (bucket / "x").write([b"1"])
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(writing, "wb") as pipe:
            big = [os.urandom(9_000_000), 5, memoryview(b"end")]
            (bucket / "y").write(big)
            same = bytes((bucket / "y").read_range(9_000_000, 8)) == b"\0" * 5 + b"end"
            (bucket / "y").download(tmp_path / "y")
            whole = (tmp_path / "y").read_bytes() == big[0] + bytes(5) + b"end"
            try:
                (bucket / "z").read_bytes()
            except FileNotFoundError as error:
                pipe.write(f"{same} {whole} {bucket.listing()} {error}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    expected = "True True [('x', 1), ('y', 9000008)] [Errno 2] no such object: "
    assert said == f"{expected}'{bucket}/z'"
    assert (bucket / "x").read_bytes() == b"1"
