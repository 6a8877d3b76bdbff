"""Images inside of tars, parquet files and saved datasets, read one by one."""

from __future__ import annotations

import os
import subprocess
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from featcache import containers, parquets
from featcache.containers import read_member, tar_members
from featcache.errors import DamagedFileError, FeatcacheError, ImageError, ManifestError
from featcache.once import OnceCache
from featcache.sources import ImageRef
from featcache.tars import TarTable, walk
from tests.support import write_images
from tests.support_inputs import hf_images, write_parquet, write_tar


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A tar of 20 members of many lengths, in folders, with a name of 200 characters."""
    names = [f"{i % 3}/{i:06d}.jpg" for i in range(19)] + ["x" * 196 + ".jpg"]
    return write_tar(
        tmp_path / "a.tar", [(name, os.urandom(i * 97)) for i, name in enumerate(names)]
    )


def test_tar_members_equal_tarfile(whole: Path) -> None:
    with tarfile.open(whole) as tar:
        expected = {each.name: tar.extractfile(each).read() for each in tar}  # type: ignore[union-attr]
    found = {name: ImageRef(str(whole.parent), f"a.tar/{name}").read() for name in expected}
    assert found == expected
    assert [member.name for member in walk(whole)] == list(expected)


def test_a_file_of_that_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "1.jpg").write_bytes(b"a file")
    assert ImageRef(str(tmp_path), "a.tar/1.jpg").read() == b"a file"


def test_the_shortest_leading_file_is_the_container(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", [("1.jpg", b"inner")])
    write_tar(
        tmp_path / "outer.tar", [("inner.tar/1.jpg", b"outer"), ("b.tar", inner.read_bytes())]
    )
    assert read_member(str(tmp_path), "outer.tar/inner.tar/1.jpg") == b"outer"
    with pytest.raises(ImageError, match=r"outer\.tar holds no b\.tar/1\.jpg"):
        read_member(str(tmp_path), "outer.tar/b.tar/1.jpg")


def reason_of(root: Path, key: str) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        ImageRef(str(root), key).read()
    return caught.value.reason, caught.value.detail


def test_what_is_not_there_has_a_reason(whole: Path) -> None:
    root = whole.parent
    assert reason_of(root, "a.tar/none.jpg") == ("missing", f"{whole} holds no none.jpg")
    assert reason_of(root, "b.tar/none.jpg")[0] == "missing"
    assert reason_of(root, "no/such/folder.jpg")[0] == "missing"
    (root / "c.jpg").write_bytes(b"an image")
    reason, detail = reason_of(root, "c.jpg/1.jpg")
    assert reason == "unreadable"
    assert detail == f"{root / 'c.jpg'} is a file, and neither a tar nor parquet"


@pytest.mark.parametrize("cut", [1, 511, 512, 1024, 5000])
def test_a_tar_that_was_cut_short_is_never_a_shorter_one(whole: Path, cut: int) -> None:
    raw = whole.read_bytes()
    with tarfile.open(whole) as tar:
        end = max(each.offset_data + -(-each.size // 512) * 512 for each in tar)
    for length in (cut, end - cut, end):
        whole.write_bytes(raw[:length])
        with pytest.raises(DamagedFileError, match=r"a\.tar is damaged or cut short after .*fetch"):
            list(walk(whole))
        assert reason_of(whole.parent, "a.tar/0/000000.jpg")[0] == "unreadable"
    whole.write_bytes(raw)
    assert ImageRef(str(whole.parent), "a.tar/1/000001.jpg").read() == raw[1024 : 1024 + 97]


def test_a_damaged_header_ends_nothing_silently(whole: Path) -> None:
    raw = bytearray(whole.read_bytes())
    with tarfile.open(whole) as tar:
        raw[tar.getmembers()[7].offset + 10] ^= 1
    whole.write_bytes(raw)
    with pytest.raises(DamagedFileError, match=r"cut short after 0/000006\.jpg"):
        list(walk(whole))


def test_an_empty_tar_has_no_members(tmp_path: Path) -> None:
    assert list(walk(write_tar(tmp_path / "a.tar", []))) == []
    (tmp_path / "b.tar").touch()
    with pytest.raises(DamagedFileError):
        list(walk(tmp_path / "b.tar"))


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(ManifestError, match=r"a\.tar is compressed.*decompress it first"):
        containers.kind_of(tmp_path / "a.tar")


def test_members_that_are_no_files_or_lead_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("../1.jpg", tarfile.REGTYPE), ("2.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "3.jpg"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("./4.jpg"))
        tar.addfile(tarfile.TarInfo("4.jpg"))
    assert [(each.name, each.problem) for each in walk(tmp_path / "a.tar")] == [
        ("../1.jpg", "its name leads out of the tar"),
        ("2.jpg", "it is a link, a special or a sparse file inside of the tar"),
        ("4.jpg", ""),
        ("4.jpg", "another member of this name comes before it"),
    ]


def test_a_sparse_member_is_not_read_as_it_lies(tmp_path: Path) -> None:
    with (tmp_path / "1.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    command = ["tar", "--sparse", "-cf", "a.tar", "1.jpg"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("no GNU tar")
    (member,) = walk(tmp_path / "a.tar")
    assert "sparse" in member.problem


def test_a_tar_that_changes_is_read_anew(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"one")])
    assert read_member(str(tmp_path), "a.tar/1.jpg") == b"one"
    write_tar(tmp_path / "b.tar", [("0.jpg", b"zero"), ("1.jpg", b"uno")])
    (tmp_path / "b.tar").replace(tmp_path / "a.tar")
    assert read_member(str(tmp_path), "a.tar/1.jpg") == b"uno"


def test_the_headers_are_walked_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Path] = []

    def counted(path: Path) -> object:
        walks.append(path)
        return walk(path)

    monkeypatch.setattr(containers, "walk", counted)
    members = tar_members(whole)
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda each: read_member(str(whole.parent), f"a.tar/{each.name}"), members)
        assert [len(data or b"") for data in read] == [member.size for member in members]
    assert walks == [whole]


def test_a_member_takes_24_bytes(whole: Path) -> None:
    assert TarTable(list(walk(whole))).nbytes == 24 * 20


def test_parquet_rows_over_row_groups(tmp_path: Path) -> None:
    names = write_images(tmp_path / "images", 10)
    write_parquet(tmp_path / "a.parquet", {"image": hf_images(tmp_path / "images", names)})
    for row in (9, 0, 3, 2, 5):
        found = ImageRef(str(tmp_path), f"a.parquet/{row}").read()
        assert found == (tmp_path / "images" / names[row]).read_bytes()
    with pytest.raises(ImageError, match="holds no row 10; it has 10"):
        read_member(str(tmp_path), "a.parquet/10")
    for spelling in ("01", "x", "-1", "1/0"):
        assert reason_of(tmp_path, f"a.parquet/{spelling}")[0] == "missing"


def test_parquet_binary_columns_and_lists(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"jpg": pa.array([b"one", None], pa.binary())})
    assert read_member(str(tmp_path), "a.parquet/0") == b"one"
    assert reason_of(tmp_path, "a.parquet/1") == (
        "missing",
        f"{tmp_path / 'a.parquet'}/1 holds no image bytes",
    )
    many = pa.array(
        [[{"bytes": b"one", "path": None}, {"bytes": b"two", "path": None}], []],
        pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    )
    write_parquet(tmp_path / "b.parquet", {"images": many})
    assert read_member(str(tmp_path), "b.parquet/0/1") == b"two"
    for key in ("b.parquet/0", "b.parquet/0/2", "b.parquet/1/0"):
        assert reason_of(tmp_path, key)[0] == "missing"


def test_a_row_group_is_read_once_by_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_images(tmp_path / "images", 12)
    write_parquet(tmp_path / "a.parquet", {"image": hf_images(tmp_path / "images", names)}, 6)
    groups: list[int | None] = []
    batches = parquets._batches

    def counted(
        path: Path, metadata: object, columns: list[str], group: int | None = None
    ) -> object:
        groups.append(group)
        return batches(path, metadata, columns, group)

    monkeypatch.setattr(parquets, "_batches", counted)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda row: read_member(str(tmp_path), f"a.parquet/{row}"), range(12)))
    assert read == [(tmp_path / "images" / name).read_bytes() for name in names]
    assert sorted(groups) == [0, 1]  # type: ignore[type-var]


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    names = write_images(tmp_path / "images", 4)
    path = write_parquet(tmp_path / "a.parquet", {"image": hf_images(tmp_path / "images", names)})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedFileError, match=r"a\.parquet is no parquet file, or damaged"):
        containers.open_parquet(path)
    assert reason_of(tmp_path, "a.parquet/0")[0] == "unreadable"


@pytest.mark.parametrize("library", ["pyarrow", "datasets"])
def test_a_missing_library_is_named(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    names = write_images(tmp_path / "images", 1)
    column = hf_images(tmp_path / "images", names)
    write_parquet(tmp_path / "a.parquet", {"image": column})
    datasets.Dataset(pa.table({"image": column})).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setitem(__import__("sys").modules, library, None)
    key = {"pyarrow": "a.parquet/0", "datasets": "saved/0"}[library]
    with pytest.raises(FeatcacheError, match=rf"needs {library}: pip install 'featcache\[data\]'"):
        ImageRef(str(tmp_path), key).read()


def test_the_cache_keeps_what_its_budget_holds() -> None:
    made: list[int] = []

    def maker(value: int) -> Callable[[], int]:
        return lambda: made.append(value) or value

    cache: OnceCache[int, int] = OnceCache(10, lambda value: value)
    for value in (4, 5, 4, 6, 5, 4, 100, 100, 4):
        assert cache.get(value, maker(value)) == value
    # 6 drops 5 (4 was used after it), 5 drops 4 and so on; 100 is kept although it is too large.
    assert made == [4, 5, 6, 5, 4, 100, 4]


def test_the_cache_gives_an_error_to_all_who_wait_and_tries_again() -> None:
    cache: OnceCache[str, int] = OnceCache(10, lambda value: value)
    began, go = threading.Event(), threading.Event()

    def fail() -> int:
        began.set()
        go.wait(10)
        raise OSError("not now")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "a", fail)
        began.wait(10)
        second = pool.submit(cache.get, "a", lambda: 1)
        go.set()
        assert isinstance(first.exception(), OSError)
        assert second.exception() is first.exception() or second.result() == 1
    assert cache.get("a", lambda: 2) in (1, 2)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_reads_although_a_thread_of_the_parent_was_reading(whole: Path) -> None:
    cache: OnceCache[str, int] = OnceCache(10, lambda value: value)
    began, go = threading.Event(), threading.Event()

    def make() -> int:
        began.set()
        go.wait(10)
        return 1

    thread = threading.Thread(target=cache.get, args=("a", make))
    thread.start()
    began.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(cache.get("a", lambda: 2))
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
