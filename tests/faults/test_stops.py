"""A stop at every single publication of an extraction: first, append, and rerun.

What is on disk after a SIGKILL between two system calls is what is there when every later
publication fails and nothing is cleaned up. kill_extract.py does it with real signals at random
moments; here every moment is tried once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import featcache
from featcache.extract import ExtractOptions, extract
from tests.support import Killed, Publications, feature_files, write_images


@pytest.mark.parametrize("codec", ["fp16", "int8"])
@pytest.mark.parametrize("append", [False, True])
def test_a_stop_at_any_publication_loses_nothing(
    encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append: bool, codec: str
) -> None:
    write_images(tmp_path / "images", 5)
    options = ExtractOptions(
        model=str(encoder_dir), data=(tmp_path / "images",), out=tmp_path / "reference.zarr",
        shard_images=4, batch_size=2, limit=3 if append else None, codec=codec,
    )  # fmt: skip
    if append:
        extract(options)
    publications = Publications(monkeypatch)
    everything = replace(options, limit=None)
    extract(everything)
    total = publications.count
    whole = feature_files(options.out)
    assert total > 20
    stops = 0
    for last in range(total):
        stopped = replace(everything, out=tmp_path / f"{last}.zarr")
        if append:
            extract(replace(stopped, limit=3))
        with publications.stopped(after=last), pytest.raises(Killed):
            extract(stopped)
        if append:
            store = featcache.open(stopped.out)
            assert (store.rows(["0000.png", "0001.png", "0002.png"]) == [0, 1, 2]).all()
            with store.reader() as reader:
                assert reader.read(store.rows(["0000.png", "0002.png"])).isfinite().all()
        result = extract(stopped)
        assert (result.ok, result.features) == (True, 5)
        assert feature_files(stopped.out) == whole
        assert not list(stopped.out.rglob(".partial-*"))
        assert len(list((stopped.out / "index").glob("0*"))) == 1
        stops += 1
    assert stops == total
