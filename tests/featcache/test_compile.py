"""`torch.compile` of an encoder. Compiling takes up to a minute the first time on a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from featcache.encoders import Pixels, compiling, load_encoder
from featcache.errors import EncoderError, FingerprintMismatch
from featcache.extract import ExtractOptions, extract
from featcache.fingerprint import diff, fingerprint
from featcache.live import compare_live

LAYERS = ("-2", "last")

# Inductor's own modules, when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def noise(count: int) -> Pixels:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (count, 24, 24, 3), dtype=torch.uint8, generator=generator)
    return Pixels(values)


@pytest.mark.slow
def test_one_compilation_serves_all_blocks_and_batches(encoder_dir: Path) -> None:
    """fp32, tolerance 1e-5; largest difference measured: 3e-7 of the largest value."""
    plain = load_encoder(str(encoder_dir), layers=LAYERS)
    compiled = load_encoder(str(encoder_dir), layers=LAYERS, compile=True)
    counters.clear()
    for count in (5, 3, 8, 2):
        expected, encoded = plain.encode(noise(count)), compiled.encode(noise(count))
        for layer in LAYERS:
            torch.testing.assert_close(
                encoded.features[layer], expected.features[layer], rtol=1e-5, atol=1e-5
            )
        torch.testing.assert_close(encoded.pooled, expected.pooled, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_it_is_in_the_fingerprint_only_where_it_is_on(
    encoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every block goes through the compiler; here one that does nothing."""
    taken: list[object] = []

    def compile_nothing(function: Any, **_options: object) -> Any:
        taken.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    compiled = load_encoder(str(encoder_dir), layers=LAYERS, compile=True)
    assert len(taken) == 1 + 3  # a probe, and the blocks
    plain = fingerprint(load_encoder(str(encoder_dir), layers=LAYERS))
    assert "compile" not in plain["compute"]
    ((path, _, ours),) = diff(plain, fingerprint(compiled))
    assert (path, ours) == ("compute.compile", True)
    assert compiled.weights == plain["encoder"]["weights"]


@pytest.mark.slow
def test_a_compiled_store_is_compiled_again_and_nothing_else_gets_into_it(
    encoder_dir: Path, images_dir: Path, tmp_path: Path
) -> None:
    options = ExtractOptions(
        model=str(encoder_dir), data=(images_dir,), out=tmp_path / "store.zarr", batch_size=4,
        compile=True,
    )  # fmt: skip
    assert extract(options).features == 10
    report = compare_live(options.out, 10)
    assert (report.compared, report.wrong) == (10, ())
    plain = ExtractOptions(model=str(encoder_dir), data=(images_dir,), out=options.out)
    with pytest.raises(FingerprintMismatch, match=r"do not match: compute\.compile: True in"):
        extract(plain)


def test_no_compiler_is_one_line(encoder_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_compiler(_function: object, **_options: object) -> object:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one via CXX.")

    monkeypatch.setattr(torch, "compile", without_compiler)
    with pytest.raises(EncoderError) as caught:
        compiling.compile_blocks(load_encoder(str(encoder_dir)).tower, torch.device("cpu"))
    assert str(caught.value) == (
        "--compile needs a compiler that works on cpu, and none does: Failed to find C compiler.; "
        "install one (g++ for a CPU, Triton for CUDA), or leave --compile out"
    )
