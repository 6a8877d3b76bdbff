"""B images, P patches, D width. The bounds tested are those in the codecs' docstrings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from featcache.bfloat16 import BFloat16
from featcache.codecs import CODECS, LayerCodec, get_codec, int4, scaled
from featcache.errors import ConfigError

SCALED = [name for name, codec in CODECS.items() if codec.scaled]
WIDTHS = [1152, 1024, 768, 96, 24, 7, 1]


def activations(images: int, patches: int, width: int, seed: int = 0) -> Tensor:
    """Heavy tails, channels of unequal spread, one of them far from zero and nearly constant."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(images, patches, width, generator=rng)
    values *= 1 + 5 * torch.rand(images, patches, 1, generator=rng) ** 8
    values *= torch.linspace(0.02, 3, width)
    values += torch.linspace(-1, 1, width)
    values[..., width // 3] = 25 + 0.1 * values[..., width // 3]
    return values


def calibrated(name: str, features: Tensor) -> LayerCodec:
    codec = get_codec(name)
    return LayerCodec(codec, *features.shape[1:], codec.calibrate(features))


def error_bound(name: str, x: Tensor, scales: Tensor | None, channels: Tensor | None) -> Tensor:
    """The largest |error| of each value that the docstring of codec `name` allows."""
    if name in ("fp16", "bf16"):
        return (x.abs() / {"fp16": 2048, "bf16": 256}[name]).clamp_min(2.0**-25)
    assert scales is not None and channels is not None
    offset, scale = channels
    step = scale * scales[..., None]
    float32_rounding = 1e-5 * step + 2**-22 * (x.abs() + offset.abs())
    bound = {
        "int8": 0.5 * step,
        "fp8": torch.maximum((x - offset).abs() / 16 * (1 + 1e-5), step / 1024),
        "int4": 0.45 * math.sqrt(x.shape[-1]) * step,
    }
    return bound[name] + float32_rounding


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CODECS)
def test_the_error_stays_within_the_stated_bound(name: str, width: int) -> None:
    layer = calibrated(name, activations(4, 9, width))
    x = activations(3, 9, width, seed=1)
    x[0, 0] *= 100
    x[0, 1] *= 1e-6
    x[0, 2] = 0
    x[0, 2, 0] = 1000
    stored, problems = layer.encode(x)
    assert problems == [None] * 3
    assert stored.codes.dtype == layer.codec.dtype
    assert stored.codes.shape == (3, *layer.code_shape)
    error = (stored.decode(torch.float32) - x).abs()
    bound = error_bound(name, x, stored.scales, layer.channels)
    assert (error <= bound).all(), (error / bound).max()
    if name == "int4":
        assert stored.scales is not None and layer.channels is not None
        squares = (error / layer.channels[1]).square().sum(-1)
        assert (squares <= 0.2 * width * stored.scales.square() + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "limit"),
    [("fp16", 3e-4), ("bf16", 3e-3), ("int8", 0.011), ("fp8", 0.03), ("int4", 0.11)],
)
def test_the_error_is_as_small_as_measured(name: str, limit: float) -> None:
    """Of the deviation from the channels' means. Measured: 2.6e-4, 2.1e-3, 0.0084, 0.025, 0.10."""
    layer = calibrated(name, activations(8, 64, 1152))
    x = activations(2, 64, 1152, seed=1)
    y = layer.encode(x)[0].decode(torch.float32)
    assert float((y - x).norm() / (x - x.mean((0, 1))).norm()) < limit


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CODECS)
def test_encoding_what_was_decoded_moves_a_code_by_one_step_at_most(name: str, width: int) -> None:
    x = activations(4, 9, width)
    layer = calibrated(name, x)
    if layer.channels is not None:
        layer.channels[0] = 0  # its rounding in float32 is another matter
        spike = torch.zeros(1, width).index_fill_(1, torch.tensor([width // 2]), 1.0)
        rotation = int4.rotation_of(width, x.device)
        x[1, 0] = rotation.undo(spike)[0] * layer.channels[1]  # what int4 clips most
        x[1, 1] = x[1, 0] + 0.02 * x[1, 1]
    first = layer.encode(x)[0]
    again = layer.encode(first.decode(torch.float32))[0]
    if name == "fp8":
        first.codes[first.codes == 0x80] = 0  # a small negative value's zero
    if name != "int4":
        assert torch.equal(first.codes, again.codes)
        return
    for shift in (0, 4):
        old, new = first.codes.int() >> shift & 15, again.codes.int() >> shift & 15
        assert (old - new).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_any_float_dtype_and_any_strides(name: str, dtype: torch.dtype) -> None:
    x = activations(2, 6, 24).to(dtype)
    layer = calibrated(name, x.float())
    expected = layer.encode(x.float())[0].decode()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(layer.encode(x)[0].decode(), expected)
    assert torch.equal(layer.encode(strided)[0].decode(), expected)
    for wanted in (torch.float16, torch.bfloat16, torch.float32):
        assert layer.encode(x)[0].decode(wanted).dtype == wanted
    assert layer.encode(x[:0])[0].decode().shape == (0, 6, 24)
    assert layer.encode(x[:0])[1] == []


@pytest.mark.parametrize("name", SCALED)
def test_blocks_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU does in small blocks, a GPU does in one expression."""
    x = activations(2, 50, 96)
    layer = calibrated(name, x)
    outcomes = []
    for block_values in (7 * 96, 64 * 96, 10**9):
        monkeypatch.setattr(scaled, "CPU_BLOCK_VALUES", block_values)
        stored, _ = layer.encode(x)
        outcomes.append((stored.codes, stored.scales, stored.decode()))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("name", SCALED)
def test_an_images_bytes_do_not_depend_on_its_neighbours(name: str) -> None:
    x = activations(3, 729, 96)
    layer = calibrated(name, x)
    together, _ = layer.encode(x)
    for i in range(3):
        alone, _ = layer.encode(x[i : i + 1])
        assert torch.equal(alone.codes[0], together.codes[i])
        assert torch.equal(alone.decode()[0], together.decode()[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", CODECS)
def test_what_the_encoder_got_wrong_is_caught_wherever_it_is(name: str, bad: float) -> None:
    """And is not called an overflow. One image for each channel, the dead one among them."""
    width = 24
    x = activations(4, 3, width)
    x[..., 5] = 0
    layer = calibrated(name, x)
    hurt = x[:1].repeat(width + 1, 1, 1)
    hurt[range(width), 1, range(width)] = bad
    stored, problems = layer.encode(hurt)
    assert problems == ["non_finite: the encoder gave NaN or infinity"] * width + [None]
    assert not stored.decode(torch.float32)[:width].isfinite().all((1, 2)).any()


@pytest.mark.parametrize("name", CODECS)
def test_huge_values_are_stored_or_refused(name: str) -> None:
    """Whatever is not refused decodes to finite values within the bound."""
    layer = calibrated(name, activations(4, 3, 24))
    peaks = [10.0**k for k in range(38)] + [3e38, torch.finfo(torch.float32).max]
    x = activations(1, 3, 24).repeat(len(peaks), 1, 1)
    x[:, 1, 2] = torch.tensor(peaks)
    x[:, 2, 7] = -torch.tensor(peaks)
    stored, problems = layer.encode(x)
    refused = torch.tensor([problem is not None for problem in problems])
    y = stored.decode(torch.float32)[~refused]
    scales = None if stored.scales is None else stored.scales[~refused]
    assert ((y - x[~refused]).abs() <= error_bound(name, x[~refused], scales, layer.channels)).all()
    assert all("overflow: the largest |feature| is" in p for p in problems if p is not None)
    largest_stored = peaks[int((~refused).sum()) - 1]
    assert largest_stored >= {"fp16": 1e4, "bf16": 3e38, "int4": 1e18}.get(name, 1e34)


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, 1e-30, 1.0, 1e-4])
@pytest.mark.parametrize("name", CODECS)
def test_constant_and_denormal_patches(name: str, value: float) -> None:
    x = torch.full((2, 3, 24), value)
    for layer in (calibrated(name, x), calibrated(name, activations(4, 3, 24))):
        stored, problems = layer.encode(x)
        assert problems == [None, None]
        error = (stored.decode(torch.float32) - x).abs()
        bound = error_bound(name, x, stored.scales, layer.channels)
        assert (error <= bound).all()


@pytest.mark.parametrize("name", SCALED)
def test_calibration_ignores_images_that_are_not_finite(name: str) -> None:
    codec = get_codec(name)
    x = activations(4, 9, 24)
    hurt = torch.cat([x, x])
    hurt[4:6, 0, 3] = float("nan")
    hurt[6:, 1, 4] = float("inf")
    channels = codec.calibrate(x)
    assert channels is not None
    assert channels.dtype == torch.float32 and channels.shape == (2, 24)
    assert torch.equal(codec.calibrate(hurt), channels)
    assert torch.equal(codec.calibrate(hurt[4:]), torch.tensor([0.0, 1.0])[:, None].expand(2, 24))
    assert torch.equal(codec.calibrate(x[:0]), torch.tensor([0.0, 1.0])[:, None].expand(2, 24))
    assert torch.equal(codec.calibrate(x * 0)[1], torch.ones(24))
    assert codec.calibrate(x[:1, :1]).isfinite().all()
    assert codec.calibrate(x * 1e37).isfinite().all()


@pytest.mark.parametrize("name", SCALED)
def test_a_channel_that_was_still_while_calibrating_may_move(name: str) -> None:
    """Measured: the error of the others grows 1.6 times (int8)."""
    seen, x = activations(8, 16, 768), activations(4, 16, 768, seed=1)
    still = seen.clone()
    still[..., 400:403] = 0.5
    others = [d for d in range(768) if not 400 <= d < 403]

    def error(calibration: Tensor) -> float:
        y = calibrated(name, calibration).encode(x)[0].decode()
        return float((y - x)[..., others].norm())

    assert error(still) < 2 * error(seen)


def test_int4_is_what_its_docstring_says() -> None:
    """Decoded by a second program, written from the docstring alone."""
    width, a, b = 24, 4, 6
    x = activations(1, 2, width)
    layer = calibrated("int4", x)
    stored, _ = layer.encode(x)
    assert layer.channels is not None and stored.scales is not None

    def dct(n: int) -> np.ndarray:
        k, j = np.mgrid[:n, :n]
        return np.sqrt(np.where(k, 2, 1) / n) * np.cos(np.pi * (j + 0.5) * k / n)

    upper = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326]
    levels = np.array([-v for v in reversed(upper)] + upper)
    signs = [1 - 2 * (hashlib.sha256(b"%d" % d).digest()[0] % 2) for d in range(width)]
    offset, scale = layer.channels.numpy()
    for patch in range(2):
        packed = stored.codes[0, patch].numpy()
        codes = np.stack([packed % 16, packed // 16], axis=1).reshape(a, b)
        normal = dct(a).T @ (levels[codes] * float(stored.scales[0, patch])) @ dct(b)
        expected = normal.reshape(-1) * signs * scale + offset
        np.testing.assert_allclose(stored.decode()[0, patch], expected, rtol=1e-5, atol=1e-5)


def test_fp8_codes_are_e4m3fn() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F].reshape(1, 1, -1)  # without the two NaN
    width = codes.shape[-1]
    channels = torch.stack([torch.zeros(width), torch.ones(width)])
    decoded = get_codec("fp8").decode(codes, torch.ones(1, 1), channels, torch.float32)
    assert torch.equal(decoded, codes.view(torch.float8_e4m3fn).float())


def test_rows_without_features_decode_to_nan() -> None:
    for name in SCALED:
        codec = get_codec(name)
        codes = torch.full((1, 2, codec.code_width(8)), codec.fill_value, dtype=codec.dtype)
        scales = torch.full((1, 2), float("nan"))
        decoded = codec.decode(codes, scales, codec.calibrate(torch.randn(2, 2, 8)), torch.float16)
        assert decoded.isnan().all()
        assert not codec.is_finite(codes, scales).any()


def test_what_inference_mode_made_works_outside_it() -> None:
    int4.rotation_of.cache_clear()
    x = activations(2, 3, 30)
    layer = calibrated("int4", x)
    with torch.inference_mode():
        stored, _ = layer.encode(x)
    weight = torch.ones(30, requires_grad=True)
    (layer.encode(x)[0].decode() * weight).sum().backward()
    assert torch.equal(stored.codes, layer.encode(x)[0].codes)


def test_autocast_changes_no_bit() -> None:
    for name in SCALED:
        x = activations(2, 3, 96)
        layer = calibrated(name, x)
        stored, _ = layer.encode(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again, _ = layer.encode(x)
            decoded = again.decode()
        assert torch.equal(again.codes, stored.codes)
        assert torch.equal(decoded, stored.decode())


def test_an_overflow_is_named_and_so_is_its_cure() -> None:
    values = torch.zeros(3, 2, 2)
    values[1, 0, 1] = -70_000.0
    stored, problems = calibrated("fp16", values).encode(values)
    assert problems == [
        None,
        "overflow: the largest |feature| is 7e+04, beyond fp16's range; use --codec bf16",
        None,
    ]
    assert stored.codes[0].eq(0).all()
    bf16 = calibrated("bf16", values)
    assert bf16.encode(values)[1] == [None] * 3
    beyond = bf16.encode(torch.full((1, 2, 2), 3.4e38))[1]
    assert beyond == ["overflow: the largest |feature| is 3.4e+38, beyond bf16's range"]


def test_images_are_sliced_with_their_scales() -> None:
    x = activations(3, 2, 24)
    stored, _ = calibrated("int8", x).encode(x)
    assert len(stored[1:]) == 2
    assert torch.equal(stored[1:].decode(), stored.decode()[1:])


def test_unknown_codec() -> None:
    with pytest.raises(ConfigError, match="unknown codec 'fp61'; choose one of fp16, bf16, int8"):
        get_codec("fp61")


def test_bfloat16_is_a_registered_zarr_data_type() -> None:
    """And declared to zarr-python as its documentation says, for versions that look."""
    declared = importlib.metadata.entry_points(group="zarr.data_type")
    assert declared["bfloat16"].load() is BFloat16
    array = zarr.create_array({}, shape=(4,), dtype="bfloat16", fill_value=float("nan"))
    assert np.isnan(array[0].astype(np.float32))
    array[:] = np.array([1.5, -2, 3, 65536 * 4])
    assert array[:].astype(np.float32).tolist() == [1.5, -2, 3, 262144]
    assert array.metadata.to_dict()["data_type"] == "bfloat16"
