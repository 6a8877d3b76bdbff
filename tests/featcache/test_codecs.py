from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import torch
import zarr

from featcache.bfloat16 import BFloat16
from featcache.codecs import CODECS, get_codec
from featcache.errors import ConfigError


@pytest.mark.parametrize("name", CODECS)
def test_values_survive_within_the_formats_rounding(name: str) -> None:
    codec = get_codec(name)
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 30
    stored, reasons = codec.encode(values)
    assert stored.dtype == codec.dtype
    assert reasons == [None] * 3
    eps = torch.finfo(codec.dtype).eps / 2
    assert ((stored.float() - values).abs() <= eps * values.abs()).all()


def test_an_overflow_is_named_and_so_is_its_cure() -> None:
    values = torch.zeros(3, 2, 2)
    values[1, 0, 1] = -70_000.0
    stored, reasons = get_codec("fp16").encode(values)
    assert reasons == [
        None,
        "overflow: the largest |feature| is 7e+04, beyond fp16's 65504; use --codec bf16",
        None,
    ]
    assert get_codec("bf16").encode(values)[1] == [None] * 3
    beyond = get_codec("bf16").encode(torch.full((1, 1, 1), 3.4e38))[1][0]
    assert beyond == "overflow: the largest |feature| is 3.4e+38, beyond bf16's 3.3895e+38"
    assert stored[0].eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", CODECS)
def test_what_the_encoder_got_wrong_is_not_called_an_overflow(name: str, bad: float) -> None:
    values = torch.zeros(2, 2, 2)
    values[0, 1, 1] = bad
    _, reasons = get_codec(name).encode(values)
    assert reasons == ["non_finite: the encoder gave NaN or infinity", None]


def test_unknown_codec() -> None:
    with pytest.raises(ConfigError, match="unknown codec 'fp61'; choose one of fp16, bf16"):
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
