"""Hours, bytes and the verdict, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from align.connectors.mlp import MlpConfig
from align.connectors.resampler import ResamplerConfig
from align.flop import LANGUAGE_MODELS
from align.plan import Machine, Plan, Prices, Rate, Workload, connector_of, figure
from featcache.errors import ConfigError
from featcache.registry import ENCODERS, EncoderEntry

SO400M = ENCODERS["siglip2-so400m"]
SMALL, LARGE = LANGUAGE_MODELS["qwen3-0.6b"], LANGUAGE_MODELS["qwen3-8b"]
FAST_DISK = Machine(read_gbps=100, write_gbps=100, cores=1000)
IMAGES = 558_128


def plan(machine: Machine = FAST_DISK, prices: Prices | None = None, **workload: object) -> Plan:
    settings: dict = {"encoder": SO400M, "llm": SMALL, "images": IMAGES} | workload
    return Plan(Workload(**settings), machine, prices)


def test_bytes_are_those_of_the_shards() -> None:
    found = plan()
    assert found.image_bytes == 729 * 1152 * 2 == 1_679_616
    # 411 blocks of 4 KiB an image, 2 bytes for each of 1152 pooled values, an index a shard; the
    # last of 4361 shards has 48 images, and pooled outputs are whole files.
    assert found.shards == 4361
    pooled_and_index = 4361 * (128 * 2304 + 16 * 128 + 4)
    assert found.store_bytes == IMAGES * 411 * 4096 + pooled_and_index
    assert found.files == 3 * 4361
    int8 = plan(codec="int8")
    assert int8.image_bytes == 729 * 1152 + 729 * 4
    assert int8.files == 4 * 4361
    assert plan(codec="int4").image_bytes == 729 * 576 + 729 * 4


def test_rates_and_hours_by_hand() -> None:
    machine = Machine(
        gpus=2, gpu_tflops=1000, encode_efficiency=0.5, train_efficiency=0.25, cores=4,
        decode_images_per_s=100, read_gbps=1, write_gbps=0.5,
    )  # fmt: skip
    found = plan(machine, images=1_000_000, epochs=3, runs=2)
    train_tflop = (found.workload.llm_flop + found.workload.connector_flop) / 1e12
    assert found.extraction.limits == pytest.approx(
        {"encoder": 2 * 500 / 0.665, "image decoding": 400, "disk writes": 0.5e9 / 1_685_776.03},
        rel=1e-6,
    )
    assert found.extraction.bottleneck == "disk writes"
    assert found.live.limits == pytest.approx(
        {"GPU": 2 / (0.665 / 500 + train_tflop / 250), "image decoding": 400}
    )
    assert found.live.bottleneck == "image decoding"
    assert found.cached.limits == pytest.approx(
        {"GPU": 2 * 250 / train_tflop, "disk reads": 1e9 / 1_679_616}
    )
    assert found.cached.bottleneck == "disk reads"
    hours = 1e6 / 3600
    assert found.extraction_hours == pytest.approx(hours / (0.5e9 / 1_685_776.03))
    assert found.live_hours == pytest.approx(2 * 3 * hours / 400)
    assert found.cached_hours == pytest.approx(
        found.extraction_hours + 6 * hours / (1e9 / 1_679_616)
    )
    # The extraction, over what an epoch saves.
    saved = hours / 400 - hours / (1e9 / 1_679_616)
    assert found.break_even_epochs == pytest.approx(found.extraction_hours / saved)
    assert found.break_even_runs == pytest.approx(found.extraction_hours / saved / 3)
    assert found.write_gbps_needed == pytest.approx(400 * 1_685_776.03 / 1e9)
    assert found.read_gbps_needed == pytest.approx(2 * 250 / train_tflop * 1_679_616 / 1e9)
    assert found.cores_needed == 16  # 1504 images/s


def test_a_measured_encoder_takes_the_place_of_peak_and_efficiency() -> None:
    found = plan(replace(FAST_DISK, gpus=3, encode_images_per_s=50.0))
    assert found.extraction.images_per_s == 150
    assert found.live.limits["GPU"] < 150


@pytest.mark.parametrize("llm", [SMALL, LARGE], ids=lambda llm: llm.name)
@pytest.mark.parametrize("gpus", [1, 64])
def test_break_even_is_at_one_epoch_where_gpus_limit_everything(llm: object, gpus: int) -> None:
    machine = Machine(gpus=gpus, read_gbps=1e4, write_gbps=1e4, cores=10_000)
    one = plan(machine, llm=llm)
    assert one.break_even_epochs == pytest.approx(1)
    assert not one.pays
    assert plan(machine, llm=llm, epochs=2).pays
    assert plan(machine, llm=llm, runs=2).pays


@pytest.mark.parametrize("gbps", [0.1, 0.7, 0.8, 2.0, 50.0])
@pytest.mark.parametrize("codec", ["fp16", "int4"])
@pytest.mark.parametrize("cores", [1, 16])
@pytest.mark.parametrize("runs", [1, 2, 7])
def test_the_verdict_agrees_with_the_hours(gbps: float, codec: str, cores: int, runs: int) -> None:
    found = plan(Machine(read_gbps=gbps, write_gbps=gbps, cores=cores), codec=codec, runs=runs)
    after = found.break_even_runs
    assert found.pays == (after is not None and after < runs - 1e-6)
    if after is None:
        assert found.gain <= 1
        assert "does not pay: reading" in found.verdict
    elif found.pays:
        assert f"pays after {after:.1f} runs" in found.verdict
    else:
        assert found.verdict.startswith(f"does not pay in {runs} run")
        assert f"earned back after {after:.1f} runs" in found.verdict


def test_a_slow_disk_is_named_and_what_would_help() -> None:
    """445 images/s with the encoder, 298 from half a GB/s; half the bytes would do."""
    found = plan(Machine(read_gbps=0.5, write_gbps=0.5), runs=100)
    assert found.break_even_runs is None
    assert found.verdict == (
        "does not pay: reading 1.7 MB an image at 0.5 GB/s gives 298 images/s, and training with "
        "the encoder in the loop does 445; more than 0.75 GB/s would be needed; with --codec int8 "
        "it pays after 3.0 runs"
    )
    # What it says is so.
    int8 = replace(found, workload=replace(found.workload, codec="int8"))
    assert int8.pays and int8.break_even_runs == pytest.approx(3.0, abs=0.05)
    needed = replace(found, machine=replace(found.machine, read_gbps=0.76))
    assert needed.break_even_runs is not None


def test_figures_have_no_exponent() -> None:
    for number, three, two in [
        (2.73, "2.73", "2.7"), (99.64, "99.6", "100"), (110.2, "110", "110"), (0, "0", "0"),
        (1234.4, "1,234", "1,234"), (1.2e-5, "0.000012", "0.000012"),
    ]:  # fmt: skip
        assert (figure(number), figure(number, 2)) == (three, two)


def test_a_large_model_gains_little_and_says_so() -> None:
    found = plan(llm=LANGUAGE_MODELS["qwen3-14b"], runs=4)
    assert found.compute_gain == pytest.approx(1.13, abs=0.005)
    assert "each run is 1.11x as fast" in found.verdict  # encoding is the more efficient


def test_costs_need_prices_and_name_the_disk() -> None:
    assert plan().live_cost is None and plan().cached_cost is None
    free_disk = plan(prices=Prices(gpu_hour=3), runs=3)
    assert free_disk.live_cost == pytest.approx(3 * free_disk.live_hours)
    assert free_disk.cached_cost == pytest.approx(3 * free_disk.cached_hours)
    assert "costs" not in free_disk.verdict
    dear = plan(prices=Prices(gpu_hour=3, gb_month=0.1, months=2), runs=3)
    assert dear.storage_cost == pytest.approx(dear.store_bytes / 1e9 * 0.2)
    assert dear.pays
    assert "; but it costs 190 instead of 3, as the disk is not free" in dear.verdict


def test_memory_of_the_encoder_is_counted_from_its_blocks() -> None:
    assert plan().freed_bytes == 2 * 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    unknown = EncoderEntry("", num_patches=9, width=8, pixels=8, tflop=0.1)
    assert plan(encoder=unknown).freed_bytes is None


def test_the_connector_is_chosen_by_its_tokens() -> None:
    assert connector_of(None, 729) == ResamplerConfig(num_latents=64)
    assert connector_of(144, 729) == ResamplerConfig(num_latents=144)
    assert connector_of(729, 729) == MlpConfig()
    mlp = plan(connector=MlpConfig()).workload
    assert (mlp.visual_tokens, plan().workload.visual_tokens) == (729, 64)
    assert mlp.llm_flop > 8 * plan().workload.llm_flop


def test_more_supervised_than_text_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="--supervised-tokens 33: more than the sample's 32"):
        plan(supervised_tokens=33)


def test_the_slowest_part_is_the_bottleneck() -> None:
    rate = Rate({"a": 3.0, "b": 2.0, "c": 9.0})
    assert (rate.bottleneck, rate.images_per_s) == ("b", 2.0)
