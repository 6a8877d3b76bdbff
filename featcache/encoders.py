"""Frozen vision encoders, loaded through transformers, and the pixels they are given.

Letters: B images, P patches, D encoder width.
"""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import logging as transformers_logging

from featcache.device import resolve_device
from featcache.errors import EncoderError
from featcache.fingerprint import weights_digest
from featcache.registry import ENCODERS, EncoderEntry

RANDOM_SEED = 0
"""Seed of `random_weights`, so that two extractions with random weights agree."""
RANDOM_REVISION = "random weights"
"""What stands for a revision where the weights are random."""

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows' wording
    # oneDNN's; the second may have other causes, so the error for a single image quotes it.
    "could not create a memory",
    "could not create a primitive",
    "std::bad_alloc",
    # A full device leaves no room for cuBLAS' workspace, which is not torch's to allocate.
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Texts by which a RuntimeError says that memory is full; CUDA's allocator has a type for it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What one pass gives. features: {layer: float[B, P, D]}; pooled: float[B, D] or None."""

    features: dict[str, Tensor]
    pooled: Tensor | None


@dataclass(frozen=True, slots=True)
class Pixels:
    """A batch as an encoder takes it. values: uint8[B, height, width, 3]."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, images: slice) -> Pixels:
        return Pixels(self.values[images])

    def pin_memory(self) -> Pixels:
        """The same in page-locked memory, for asynchronous copies to CUDA."""
        return Pixels(self.values.pin_memory())

    def to(self, device: torch.device) -> Pixels:
        """The same on another device; from page-locked memory while the caller goes on."""
        return Pixels(self.values.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The settings of the checkpoint's image processor, and the same arithmetic split in two:
    resizing on the CPU gives uint8, normalising happens on the device.

    processor: class of the image processor. size: (height, width) in pixels. resample: PIL filter.
    mean, std: per channel, of [0, 1] values.
    """

    processor: str
    size: tuple[int, int]
    resample: Image.Resampling
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, processor: SiglipImageProcessorPil, name: str) -> Preprocessing:
        """Raises EncoderError for settings this class does not reproduce."""
        size = processor.size
        steps = (processor.do_resize, processor.do_rescale, processor.do_normalize)
        if not all(steps) or not (size.height and size.width):
            raise EncoderError(
                f"the image processor of {name} does not resize to a fixed height and width and "
                f"normalise (size {dict(size)}); only such processors are supported"
            )
        for step in ("do_center_crop", "do_pad"):
            if getattr(processor, step, None):
                raise EncoderError(
                    f"the image processor of {name} has {step} set; only processors that resize "
                    "to a fixed height and width and normalise are supported"
                )
        return cls(
            processor=type(processor).__name__,
            size=(size.height, size.width),
            resample=Image.Resampling(int(processor.resample)),
            rescale_factor=float(processor.rescale_factor),
            mean=tuple(map(float, processor.image_mean)),
            std=tuple(map(float, processor.image_std)),
        )

    def resize(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """RGB image -> uint8[height, width, 3]."""
        height, width = self.size
        return np.array(image.resize((width, height), self.resample))

    def normalisation_table(self) -> Tensor:
        """float32[3, 256]: the normalised value of each channel's 256 pixel values.

        Computed with the operations, order and precisions of transformers' `rescale` (float64
        product, cast to float32) and `normalize` (float32), so that looking a pixel up equals the
        processor's output bit for bit on any device.
        """
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean = np.array(self.mean, np.float32)[:, None]
        std = np.array(self.std, np.float32)[:, None]
        return torch.from_numpy((levels[None] - mean) / std)

    def describe(self) -> dict[str, Any]:
        """The settings as they stand in a store's fingerprint."""
        return {
            "processor": self.processor,
            "height": self.size[0],
            "width": self.size[1],
            "aspect": "squash",
            "pad": "none",
            "resample": self.resample.name.lower(),
            "rescale_factor": self.rescale_factor,
            "mean": list(self.mean),
            "std": list(self.std),
        }


@dataclass(slots=True)
class Encoder:
    """A frozen SigLIP vision tower on its device.

    layers: which outputs `encode` gives, in the numbering of `hidden_states`: "-1" is the last
    block's output before the post-layernorm, "-2" the one before, "0" the patch embeddings;
    "last" is after the post-layernorm (transformers' `last_hidden_state`).
    weights: `weights_digest` of the model in float32.
    max_batch: the most images that one pass takes, found by running out of memory; None before.
    backed_off: (images that did not fit, images that then did) of the latest time; None before.
        Changes whenever memory runs out again, so a caller tells its user when it has changed.
    """

    name: str
    revision: str | None
    weights: str
    model: SiglipVisionModel
    preprocessing: Preprocessing
    layers: tuple[str, ...]
    device: torch.device
    compute_dtype: torch.dtype
    max_batch: int | None = field(init=False, default=None)
    backed_off: tuple[int, int] | None = field(init=False, default=None)
    _table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._table = self.preprocessing.normalisation_table().to(self.device)
        depth = self.config.num_hidden_layers
        side = self.config.image_size
        if self.preprocessing.size != (side, side):
            raise EncoderError(
                f"{self.name} takes {side} x {side} pixels, its image processor makes "
                f"{' x '.join(map(str, self.preprocessing.size))}; mend preprocessor_config.json"
            )
        for layer in self.layers:
            number = re.fullmatch(r"-?\d+", layer)
            if layer != "last" and not (number and -depth - 1 <= int(layer) <= depth):
                raise EncoderError(
                    f"{self.name} has no layer {layer}; it has {-depth - 1} to {depth}, and 'last'"
                )

    @property
    def config(self) -> SiglipVisionConfig:
        return self.model.config

    @property
    def architecture(self) -> dict[str, Any]:
        """The config values that decide numbers at equal weights, as JSON.

        All that the model family's config class declares beyond transformers' common ones: those
        say how a model is loaded and what it returns. Dropout does nothing in a frozen model.
        """
        common = {each.name for each in fields(PreTrainedConfig)}
        return {
            each.name: list(value) if isinstance(value, tuple) else value
            for each in sorted(fields(self.config), key=lambda each: each.name)
            if each.name not in common and not each.name.endswith("dropout")
            for value in (getattr(self.config, each.name),)
        }

    @property
    def random_weights(self) -> bool:
        """Whether nothing was ever learned."""
        return self.revision == RANDOM_REVISION

    @property
    def num_patches(self) -> int:
        """P."""
        return (self.config.image_size // self.config.patch_size) ** 2

    @property
    def width(self) -> int:
        """D."""
        return self.config.hidden_size

    def preprocess(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """RGB image -> uint8[height, width, 3] at the encoder's resolution."""
        return self.preprocessing.resize(image)

    def collate(self, images: Sequence[np.ndarray[Any, Any]]) -> Pixels:
        """What `preprocess` gave for some images, as a batch."""
        return Pixels(torch.from_numpy(np.stack(images)))

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8[B, height, width, 3] on any device -> float32[B, 3, height, width] on ours."""
        index = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).int()
        return torch.stack([self._table[c][index[:, c]] for c in range(3)], dim=1)

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Encoded:
        """What `collate` gave -> features of each of `layers`, in the compute dtype.

        A batch for which the memory does not suffice is computed in parts, halved until they fit;
        later batches begin with what fitted. Cutting a batch may change a feature's last bits.

        Raises EncoderError where a single image does not fit.
        """
        parts: list[Encoded] = []
        size = min(len(pixels), self.max_batch or len(pixels))
        start, failed = 0, None
        while start < len(pixels):
            part = pixels[start : start + size]
            encoded = _unless_out_of_memory(partial(self._forward, part))
            if isinstance(encoded, str):
                if len(part) == 1:
                    raise self._no_room(1, encoded)
                failed, size = failed or len(part), (len(part) + 1) // 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if failed is not None:
                self.max_batch, self.backed_off, failed = size, (failed, size), None
            parts.append(encoded)
            start += len(part)
        if len(parts) == 1:
            return parts[0]
        joined = _unless_out_of_memory(partial(_concatenate, parts))
        if isinstance(joined, str):
            raise self._no_room(len(pixels), joined)
        return joined

    def _forward(self, pixels: Pixels) -> Encoded:
        """`encode` of a batch that fits."""
        taken: dict[int, Tensor] = {}
        blocks = self.model.encoder.layers
        depth = len(blocks)
        wanted = {layer: int(layer) % (depth + 1) for layer in self.layers if layer != "last"}
        hooks = []

        def take(index: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                taken[index] = output

            return hook

        for index in set(wanted.values()):
            source = self.model.embeddings if index == 0 else blocks[index - 1]
            hooks.append(source.register_forward_hook(take(index)))
        try:
            output = self.model(self.normalize(pixels.values).to(self.compute_dtype))
        finally:
            for hook in hooks:
                hook.remove()
        features = {layer: taken[index] for layer, index in wanted.items()}
        if "last" in self.layers:
            features["last"] = output.last_hidden_state
        return Encoded({layer: features[layer] for layer in self.layers}, output.pooler_output)

    def _no_room(self, batch: int, reason: str) -> EncoderError:
        smaller = "a smaller encoder" if batch == 1 else "a smaller --batch-size"
        elsewhere = "--device cpu or " if self.device.type == "cuda" else ""
        return EncoderError(
            f"the encoder {self.name} ran out of memory on {self.device} at batch {batch} "
            f"({reason}); use {elsewhere}{smaller}"
        )


def _unless_out_of_memory(compute: Callable[[], Encoded]) -> Encoded | str:
    """What `compute` returns; what was said where memory does not suffice.

    On return the exception is gone, and with its traceback's frames the tensors of the attempt:
    a retry from within `except` would find them all still there.
    """
    try:
        return compute()
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _first_line(error)
    except RuntimeError as error:
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return _first_line(error)


def _concatenate(parts: Sequence[Encoded]) -> Encoded:
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Encoded(
        {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features},
        torch.cat(pooled) if pooled else None,
    )


def load_encoder(
    name: str,
    *,
    layers: Sequence[str | int] = (-2,),
    device: str | torch.device = "cpu",
    random_weights: bool = False,
) -> Encoder:
    """Load an encoder by registered name, Hugging Face hub id, or local folder.

    random_weights: the full architecture with seeded random weights (benchmarks, tests); needs
    neither hub nor checkpoint for registered names.
    Compute is bfloat16 on CUDA and float32 elsewhere; attention is SDPA.
    Raises EncoderError: unknown name, unreachable hub, another architecture, missing weights.
    """
    entry = ENCODERS.get(name)
    source = _source(name, entry)
    device = resolve_device(device)
    if random_weights and entry is not None and entry.architecture is not None:
        config = SiglipVisionConfig(**entry.architecture)
        processor = SiglipImageProcessorPil(**(entry.processor or {}))
    else:
        config, processor = _read_checkpoint(name, source)
    model = _random_model(config) if random_weights else _load_model(name, source, config)
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Encoder(
        name=name,
        revision=RANDOM_REVISION if random_weights else getattr(config, "_commit_hash", None),
        weights=weights_digest(model),
        model=model.eval().requires_grad_(False).to(device=device, dtype=compute_dtype),
        preprocessing=Preprocessing.from_processor(processor, name),
        layers=tuple(str(layer) for layer in layers),
        device=device,
        compute_dtype=compute_dtype,
    )


def _source(name: str, entry: EncoderEntry | None) -> str:
    if entry is not None:
        if entry.asset is not None:
            return str(importlib.resources.files("featcache") / "assets" / entry.asset)
        assert entry.hub_id is not None
        return entry.hub_id
    if "/" in name or Path(name).exists():
        return name
    near = difflib.get_close_matches(name, ENCODERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise EncoderError(
        f"unknown encoder {name!r}; {hint}give a name from `featcache models`, a Hugging Face id "
        "(owner/name), or a folder with config.json"
    )


def _read_checkpoint(name: str, source: str) -> tuple[SiglipVisionConfig, SiglipImageProcessorPil]:
    try:
        config = AutoConfig.from_pretrained(source)
        processor = SiglipImageProcessorPil.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise EncoderError(
            f"cannot load the encoder {name!r} from {source}: {_first_line(error)}; check the name "
            "and the network, or give the folder of a downloaded checkpoint"
        ) from None
    if config.model_type not in ("siglip", "siglip_vision_model"):
        raise EncoderError(
            f"{name} is a {config.model_type!r} model; supported are SigLIP and SigLIP2 "
            "checkpoints of a fixed resolution (model_type 'siglip')"
        )
    vision = getattr(config, "vision_config", config)
    vision._commit_hash = getattr(config, "_commit_hash", None)
    return vision, processor


def _load_model(name: str, source: str, config: SiglipVisionConfig) -> SiglipVisionModel:
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    # The load report lists the text tower's weights as unexpected; what matters is checked below.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = SiglipVisionModel.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EncoderError(
            f"cannot load the weights of {name!r} from {source}: {_first_line(error)}"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    wrong = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if wrong:
        raise EncoderError(
            f"{source} lacks {len(wrong)} of the vision tower's weights, first {wrong[0]}; "
            "it would have run with random ones"
        )
    return model


def _random_model(config: SiglipVisionConfig) -> SiglipVisionModel:
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return SiglipVisionModel(config)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
