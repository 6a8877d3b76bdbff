"""A run's folder, and the parts of a run put together: for training, and to load it back.

RUN/config.yaml      the resolved config
RUN/run.json         store, language model, counts, versions, status
RUN/metrics.jsonl    see align.tracking
RUN/checkpoints/     see align.checkpoint
RUN/eval/, RUN/report.html    written by `align eval` and `align report`
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedTokenizerBase

import featcache
from align.attention import require_packing
from align.checkpoint import Checkpoint, find_checkpoint, load_connector
from align.config import RunConfig, diff_fields, load_config
from align.connectors import build_connector, check_connector
from align.data.batching import BatchLimits
from align.data.collate import Batch
from align.data.dataset import DataSplits, Sample, build_splits, shards_of
from align.data.loader import Loader
from align.data.sampling import StepSampler, Windows
from align.data.tokens import SampleEncoder, check_template
from align.distributed import ALONE, Ranks, shard_layers
from align.errors import CheckpointError, RunError
from align.flop import StepFlop, language_model_of
from align.fp8 import quantize_layers
from align.layers import prepare_layers
from align.llm import SHIPPED, FrozenLLM, LLMConfig, load_llm
from align.vlm import AlignModel
from featcache.codecs import LayerCodec, describe_codec, load_codec
from featcache.device import resolve_device
from featcache.encoders import fit_of
from featcache.errors import ConfigError, FingerprintMismatch
from featcache.files import publish_json
from featcache.fingerprint import require_same
from featcache.join import JoinReader, StoreJoin
from featcache.object_path import StorePath, is_url, parse_location
from featcache.registry import same_encoder
from featcache.store import Store


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run keeps what."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def not_finite(self) -> Path:
        """Steps whose loss or gradient was not finite, one JSON object a line."""
        return self.path / "not_finite.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read_info(self) -> dict[str, Any]:
        """The content of run.json.

        Raises RunError where this is no run's folder.
        """
        try:
            return dict(json.loads(self.info.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RunError(
                f"{self.path}: not a run's folder (it has no {self.info.name}); give the --out of "
                "`align train`"
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path}: not a run's folder: {self.info}: {error}") from error

    def write_info(self, info: dict[str, Any]) -> None:
        """Replaces run.json in one go."""
        publish_json(self.info, info)


@dataclass(slots=True)
class Run:
    """A run's parts, ready to train or to generate.

    path: its folder.
    stores: whose features it reads. layers: the array of each.
    step: optimizer steps that the connector has seen.
    step_size: samples of each, over all ranks.
    ranks: the processes that train it together.
    """

    path: Path
    config: RunConfig
    stores: StoreJoin
    layers: tuple[str, ...]
    splits: DataSplits
    model: AlignModel
    encoder: SampleEncoder
    step_size: int
    ranks: Ranks = ALONE
    step: int = 0
    checkpoint: Checkpoint | None = None
    _loaders: dict[str, Loader] = field(default_factory=dict, repr=False)
    _reader: JoinReader | None = field(default=None, repr=False)
    _data: dict[str, Any] | None = field(default=None, repr=False)
    _flop: StepFlop | None = field(default=None, repr=False)

    @property
    def folder(self) -> RunFolder:
        """Where it keeps what."""
        return RunFolder(self.path)

    @property
    def store(self) -> Store:
        """The first store: what it was extracted from, and the images' sizes, hold for all."""
        return self.stores.stores[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's."""
        return self.model.llm.tokenizer

    def loader(self, split: str) -> Loader:
        """Batches of "train" or "val"; the same loader each time, so that it keeps its tokens.

        Raises DataError where the split is empty.
        """
        if split not in self._loaders:
            samples = self.splits.split(split)
            limits = self.limits
            if split != "train":  # the same memory, but a row for each sample
                limits = dataclasses.replace(limits, packed=False)
            self._loaders[split] = self.loader_of(samples, limits)
        return self._loaders[split]

    def loader_of(self, samples: Sequence[Sample], limits: BatchLimits | None = None) -> Loader:
        """Batches of these samples, read by the run's reader onto its device.

        limits: of a training; None pads each batch to its longest sample.
        """
        return Loader(
            self.reader,
            samples,
            self.encoder,
            self.model.connector.num_slots,
            self.stores.sizes_of,
            self.model.device,
            limits,
        )

    @property
    def reader(self) -> JoinReader:
        """Of the run's layers: one for all splits, so that a row is checked and buffers are made
        once."""
        if self._reader is None:
            train = self.config.train
            self._reader = self.stores.reader(
                self.layers,
                threads=train.read_threads,
                depth=train.read_ahead,
                budget_bytes=train.read_budget_mb << 20,
                pin_memory=self.model.device.type == "cuda",
                check=train.verify_features,
                io=train.read_mode,
            )
        return self._reader

    def close(self) -> None:
        """Stop reading; the run may be used again."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._loaders.clear()

    def sampler(self) -> StepSampler:
        """Which training samples each step sees.

        Raises DataError where there are none.
        """
        train = self.config.train
        samples = self.splits.split("train")
        windows = None
        if train.shuffle_window:
            shards = shards_of(samples, self.store.info.shard_images)
            windows = Windows(shards, train.shuffle_window)
        return StepSampler(len(samples), self.step_size, train.seed, windows)

    @property
    def limits(self) -> BatchLimits:
        """What one forward pass may hold."""
        train = self.config.train
        return BatchLimits(
            train.batch_size, train.batch_tokens, train.length_multiple, train.packing
        )

    def flop(self, batch: Batch) -> int | None:
        """Operations that a training step over a batch needs (align/flop.py); None where those of
        its language model or connector are not known."""
        if self._flop is None:
            llm = self.model.llm
            self._flop = StepFlop.find(
                language_model_of(llm.model.config, self.config.llm.name),
                self.config.connector,
                self.model.connector.towers,
                llm.hidden_size,
            )
        return self._flop.of(batch.lengths, batch.num_supervised, len(batch.keys))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this run remembers besides weights, JSON-able.

        `data` has digests of the training samples in their order (ids, image keys and turns), of
        those images' bytes, of what was held out, and of the shards where these decide the order of
        the samples. `precision` is what `train.precision` came
        to on the device; `quantized` is None, or how the language model was.
        """
        if self._data is None:  # once: there may be half a million samples
            digest, images = xxhash.xxh3_64(), xxhash.xxh3_64()
            digests = self.store.index.digests
            for sample in self.splits.train:
                record = sample.record
                said = [text for turn in record.turns for text in (turn.role, turn.text)]
                parts = [record.id, *record.images, *said]
                digest.update(json.dumps(parts).encode() + b"\n")
                images.update(digests[sample.rows[:, 0]].tobytes())
            self._data = {
                "train": len(self.splits.train),
                "digest": digest.hexdigest(),
                "images": images.hexdigest(),
                "division": self.splits.division,
            }
            if windows := self.sampler().windows:
                self._data["shards"] = xxhash.xxh3_64_hexdigest(windows.shards.tobytes())
        return {
            "stores": [store.fingerprint for store in self.stores.stores],
            "llm": self.model.llm.identity,
            "widths": _widths(self.model),
            "features": [
                {
                    "layer": layer,
                    "codec": describe_codec(store.layer_codec(layer)),
                    "converted_from": store.source.get("converted_from"),
                }
                for store, layer in zip(self.stores.stores, self.layers, strict=True)
            ],
            "precision": "fp32" if self.model.autocast is None else "bf16",
            "quantized": _quantized(self.config.llm),
            "data": self._data,
            "versions": versions(),
        }


@dataclass(frozen=True, slots=True)
class Voice:
    """How the features of one store were made that a run was trained on.

    fingerprint: of the store. layer: of the features in it. codec: how they are stored.
    """

    fingerprint: dict[str, Any]
    layer: str
    codec: LayerCodec


@dataclass(frozen=True, slots=True)
class Speaker:
    """What a trained run needs to say something about new images: neither its stores nor its data.

    voices: of each store that it was trained on.
    """

    path: Path
    config: RunConfig
    model: AlignModel
    encoder: SampleEncoder
    voices: tuple[Voice, ...]


def assemble(
    config: RunConfig, features: Sequence[StorePath | str], path: Path, ranks: Ranks = ALONE
) -> Run:
    """Opens the stores, loads the language model, joins the data, builds an untrained connector.

    features: as many stores as the connector takes. ranks: the processes that do this together.

    Raises the errors of each part: StoreError, ModelError, DataError, ConfigError.
    """
    cache = config.train
    opened = [
        featcache.open(
            store,
            cache_dir=cache.cache_dir,
            cache_bytes=None if cache.cache_gb is None else int(cache.cache_gb * 1e9),
        )
        for store in features
    ]
    _check_encoders(config, opened)
    for store in opened:
        _require_one_length(store)
    stores = StoreJoin(opened)
    layers = _layers(config, opened)
    towers = [(store.num_patches, store.width) for store in opened]
    # Before the language model is loaded, which may take minutes.
    check_connector(config.connector, towers, config.layout)
    padded = are_padded(config, [store.fingerprint for store in opened])
    model, encoder = _build(config, towers, padded, ranks)
    return Run(
        path=path,
        config=config,
        stores=stores,
        layers=layers,
        splits=build_splits(config.data, config.template, stores),
        model=model,
        encoder=encoder,
        step_size=config.train.batch_size * config.train.grad_accum * ranks.count,
        ranks=ranks,
    )


def _build(
    config: RunConfig,
    towers: Sequence[tuple[int, int]],
    padded: bool,
    ranks: Ranks = ALONE,
    *,
    as_stored: bool = False,
) -> tuple[AlignModel, SampleEncoder]:
    """The language model with an untrained connector in front, and what writes its sequences.

    as_stored: see `load_speaker`.
    """
    device = torch.device("cpu") if as_stored else resolve_device(config.train.device)
    bf16 = not as_stored and _is_bf16(config, device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    shards = config.train.shard_llm and ranks.count > 1
    place = torch.device("cpu") if shards else device  # whole, it may not fit the device
    llm = load_llm(config.llm, place, None if as_stored else dtype)
    check_template(llm.tokenizer, config.template)
    if not as_stored:
        _prepare(llm, config)
    if shards:  # last: it looks at the layers as they are then
        shard_layers(llm.model, device)
        llm.is_sharded = True
    torch.manual_seed(config.train.seed)
    connector = build_connector(
        config.connector, towers, llm.hidden_size, config.layout, padded=padded
    )
    model = AlignModel(connector.to(device), llm, torch.bfloat16 if bf16 else None)
    encoder = SampleEncoder(
        llm.tokenizer, config.template, llm.image_token_id, config.data.max_length
    )
    return model, encoder


def _prepare(llm: FrozenLLM, config: RunConfig) -> None:
    """Makes the language model compute as the settings say.

    Raises ModelError where it cannot, ConfigError for settings that exclude one another.
    """
    train = config.train
    if config.llm.quantize == "fp8" and train.shard_llm:
        raise ConfigError(
            "llm.quantize=fp8, train.shard_llm=true: what is quantised is not divided among ranks; "
            "choose one of them"
        )
    if config.llm.quantize == "fp8":
        quantize_layers(llm.model, config.llm.fp8_backward)
    if train.packing:
        require_packing(llm.model)
    prepare_layers(llm.model, train.compile, train.checkpoint_activations)


def _widths(model: AlignModel) -> dict[str, Any]:
    """Between which a connector stands, JSON-able."""
    return {
        "towers": [list(tower) for tower in model.connector.towers],
        "out_width": model.llm.hidden_size,
    }


def load_run(
    path: Path | str,
    checkpoint: str = "last",
    *,
    features: Sequence[StorePath | str] = (),
    overrides: Sequence[str] = (),
) -> Run:
    """A trained run with the connector of one of its checkpoints, in eval mode.

    checkpoint: "last", "best", or a step.
    features: another place of the same store, or other images' features by the same encoder; empty
        takes the store that the run was trained on.
    overrides: KEY=VALUE on the run's config, e.g. "train.device=cpu".

    Raises RunError where `path` is no run, CheckpointError where the checkpoint does not fit or
    what was held out of its training is not what is held out now, and FingerprintMismatch where the
    store's features were made by other means.
    """
    folder = RunFolder(Path(path))
    info = folder.read_info()
    config = load_config(folder.config, overrides)
    found = find_checkpoint(folder.checkpoints, checkpoint)
    for store in () if features else info["features"]:
        if not parse_location(store).exists():
            raise RunError(
                f"{folder.path}: its store {store} is gone; if it has moved, give --features STORE "
                "(`align caption` needs none)"
            )
    if features and len(features) != len(info["features"]):
        raise RunError(
            f"--features: {folder.path} was trained on {len(info['features'])} stores, "
            f"{len(features)} are given; give each of them, in the same order"
        )
    run = assemble(config, features or info["features"], folder.path)
    _check_same_division(restore(run, found), run)
    run.model.eval()
    return run


def load_speaker(path: Path | str, checkpoint: str = "last", *, as_stored: bool = False) -> Speaker:
    """A trained run's connector and language model, in eval mode; its store may be gone.

    as_stored: on the CPU, the language model in the dtype of its checkpoint, to be written again
        rather than run.

    Raises RunError and CheckpointError as `load_run` does.
    """
    folder = RunFolder(Path(path))
    folder.read_info()
    config = load_config(folder.config)
    found = find_checkpoint(folder.checkpoints, checkpoint)
    state = found.state()
    towers = [(patches, width) for patches, width in state["widths"]["towers"]]
    model, encoder = _build(
        config, towers, are_padded(config, state["stores"]), as_stored=as_stored
    )
    _check_same_model(state, model, found)
    load_connector(found, model.connector)
    model.eval()
    return Speaker(
        path=folder.path,
        config=config,
        model=model,
        encoder=encoder,
        voices=tuple(
            Voice(fingerprint, features["layer"], load_codec(features["codec"]))
            for fingerprint, features in zip(state["stores"], state["features"], strict=True)
        ),
    )


def restore(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """Puts a checkpoint's weights into an assembled run; returns its state.

    Raises CheckpointError or FingerprintMismatch where it was trained with another language model,
    tokenizer or encoder.
    """
    state = checkpoint.state()
    if len(state["stores"]) != len(run.stores.stores):
        raise CheckpointError(
            f"{checkpoint.path}: trained on {len(state['stores'])} stores, here are "
            f"{len(run.stores.stores)}; give each of them with --features, in the same order"
        )
    for fingerprint, store in zip(state["stores"], run.stores.stores, strict=True):
        require_same(
            fingerprint,
            store.fingerprint,
            left_name=str(checkpoint.path),
            right_name=str(store.path),
            cure="use the store that the run was trained on, or one of the same encoder and codec",
        )
    _check_same_features(state, run)
    _check_same_model(state, run.model, checkpoint)
    load_connector(checkpoint, run.model.connector)
    run.step = checkpoint.step
    run.checkpoint = checkpoint
    return state


def _check_same_features(state: dict[str, Any], run: Run) -> None:
    """Raises FingerprintMismatch for another layer, or features that another codec has rounded.

    The channel values of a codec may differ here: they are those of the images that each store was
    begun with.
    """
    pairs = zip(state["features"], run.identity()["features"], run.stores.stores, strict=True)
    for before, now, store in pairs:
        compared = ("layer", "converted_from")
        require_same(
            {"features": {name: before[name] for name in compared}},
            {"features": {name: now[name] for name in compared}},
            left_name=f"{run.path}",
            right_name=f"{store.path}",
            cure="use the store that the run was trained on, or train on this one",
        )


def _check_same_division(state: dict[str, Any], run: Run) -> None:
    """Raises CheckpointError where what is held out now may have been trained on.

    Files of `data.val_files` are held out whatever the other files hold.
    """
    before = state["data"]["division"]
    if run.config.data.val_files or before == run.splits.division:
        return
    raise CheckpointError(
        f"{run.path}: the records in {', '.join(run.config.data.files)} are not those that it was "
        "started with, so what would be held out of them now may have been trained on: "
        f"data.division: {before!r} -> {run.splits.division!r}; give it the same file again, or "
        f"name a file to evaluate on in data.val_files of {run.folder.config}"
    )


def _check_same_model(state: dict[str, Any], model: AlignModel, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where the checkpoint's connector was trained for another model."""
    before, now = state["llm"], model.llm.identity
    head = f"{checkpoint.path}: trained with another "
    cure = f"use llm.name={before['name']}"
    if before["name"] == now["name"]:
        cure = f"what {now['name']} holds has changed since: bring that back, or train again"
    if state["widths"]["out_width"] != model.llm.hidden_size:
        raise CheckpointError(
            f"{head}model: its connector makes vectors of width {state['widths']['out_width']} "
            f"({before['name']}), {now['name']} takes {model.llm.hidden_size}; {cure}"
        )
    # A model may be reached by another name; the probe tells whether it is another model.
    changed = [
        line for line in diff_fields(before, now) if not line.startswith(("name:", "revision:"))
    ]
    if changed:
        only = all(line.startswith("tokenizer.") for line in changed)
        raise CheckpointError(
            f"{head}{'tokenizer' if only else 'model'}: {'; '.join(changed)}; {cure}"
        )
    towers = [tuple(tower) for tower in state["widths"]["towers"]]
    if towers != list(model.connector.towers):
        raise CheckpointError(
            f"{checkpoint.path}: its connector is for encoders of (patches, width) "
            f"{', '.join(map(str, towers))}, the features here have "
            f"{', '.join(map(str, model.connector.towers))}; use the stores it was trained on"
        )


def _quantized(llm: LLMConfig) -> dict[str, str] | None:
    if llm.quantize == "none":
        return None
    return {"type": llm.quantize, "backward": llm.fp8_backward}


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}


def absolute(features: Sequence[StorePath | str]) -> list[str]:
    """Store paths as run.json keeps them: independent of the working directory."""
    return [str(parse_location(path).absolute()) for path in features]


def absolute_paths(config: RunConfig) -> RunConfig:
    """The config with paths that hold from any working directory, however they were written.

    Of `llm.name` only one that is a folder: the others are names.
    """

    def absolute_path(path: str) -> str:
        if is_url(path):
            return path
        # Links are kept: a hub's cache links readable names to files named by their digest.
        return os.path.abspath(Path(path).expanduser())  # noqa: PTH100

    data, llm, train = config.data, config.llm, config.train
    is_folder = llm.name not in SHIPPED and Path(llm.name).expanduser().is_dir()
    return dataclasses.replace(
        config,
        llm=dataclasses.replace(llm, name=absolute_path(llm.name)) if is_folder else llm,
        data=dataclasses.replace(
            data,
            files=[absolute_path(path) for path in data.files],
            val_files=[absolute_path(path) for path in data.val_files],
            images=None if data.images is None else absolute_path(data.images),
        ),
        train=dataclasses.replace(
            train,
            cache_dir=None if train.cache_dir is None else absolute_path(train.cache_dir),
            init_from=None if train.init_from is None else absolute_path(train.init_from),
        ),
    )


def _check_encoders(config: RunConfig, stores: Sequence[Store]) -> None:
    wanted = config.features.encoders
    if not wanted:
        return
    if len(wanted) != len(stores):
        raise ConfigError(
            f"--features: {len(stores)} stores are given, the config is for {len(wanted)}: of "
            f"{', '.join(wanted)}; give one of each, in this order"
        )
    for name, store in zip(wanted, stores, strict=True):
        there = store.fingerprint["encoder"]["name"]
        if not same_encoder(name, there):
            raise FingerprintMismatch(
                f"features.encoders={name}: {store.path} was extracted with {there}; extract with "
                f"--model {name}, or set features.encoders=[] to train on it all the same"
            )


def are_padded(config: RunConfig, fingerprints: Sequence[dict[str, Any]]) -> bool:
    """Whether images were padded to squares, in every store.

    Raises ConfigError where the stores differ in how images were fitted, or where unpadding is
    asked for without padding.
    """
    fits = [fit_of(fingerprint).partition(":")[0] for fingerprint in fingerprints]
    if config.layout.unpad and set(fits) != {"pad"}:
        raise ConfigError(
            f"layout.unpad=true: the images of the stores were fitted by {', '.join(fits)}, not "
            "padded to a square; extract with --fit pad, or set layout.unpad=false"
        )
    if len(set(fits)) > 1:
        raise ConfigError(
            f"--features: the images of the stores were fitted by {', '.join(fits)}, so that a "
            "place in the features of one is another place in those of another; extract all of "
            "them with the same --fit"
        )
    return fits[0] == "pad"


def _require_one_length(store: Store) -> None:
    if store.info.varies:
        raise ConfigError(
            f"--features: {store.path} has another number of patches for each image (encoder "
            f"{store.fingerprint['encoder']['name']}), and the connectors here take one number; "
            "extract with an encoder of a fixed resolution"
        )


def _layers(config: RunConfig, stores: Sequence[Store]) -> tuple[str, ...]:
    wanted = config.features.layers
    if wanted and len(wanted) != len(stores):
        raise ConfigError(
            f"features.layers: {len(wanted)} are named for {len(stores)} stores; name one of each"
        )
    return tuple(_layer(store, wanted[i] if wanted else None) for i, store in enumerate(stores))


def _layer(store: Store, wanted: str | None) -> str:
    if wanted is None:
        if len(store.layers) > 1:
            raise ConfigError(
                f"{store.path} holds the layers {', '.join(store.layers)}; "
                f"choose one with features.layers=[{store.layers[0]}]"
            )
        return store.layers[0]
    if wanted not in store.layers:
        raise ConfigError(
            f"features.layers={wanted}: {store.path} holds {', '.join(store.layers)}; "
            f"extract it with --layer {wanted}"
        )
    return wanted


def _is_bf16(config: RunConfig, device: torch.device) -> bool:
    if config.train.precision == "auto":
        return device.type == "cuda"
    return config.train.precision == "bf16"
