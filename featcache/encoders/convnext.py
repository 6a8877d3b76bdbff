"""ConvNeXt, its stages brought to one grid as Cambrian-1 does it.

Letters: B images, P cells of the grid, D channels, S side of a stage's map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils.hub import extract_commit_hash

from featcache.encoders.tower import (
    RANDOM_SEED,
    Encoded,
    Tower,
    first_line,
    require_all_weights,
    unreadable,
)
from featcache.errors import EncoderError

REDUCTION = 32
"""Pixels to a side of a cell of the last stage."""
MULTI_STAGE = "multi-stage"
"""The layer that is all stages, their channels one after the other."""


class ConvNext(Tower):
    """ConvNeXt. Layer k is stage k ("0" the stem, "-1" the last); "multi-stage" is all stages,
    their channels side by side. Each is interpolated to one grid: bilinear, in float32, corners not
    aligned, as `CLIPConvNextTower` of Cambrian-1 does.

    The grid is the registry's, else that of the last stage. There is no final LayerNorm for cells,
    so no "last", and the pooled output has another width than several stages, so none is kept.
    """

    model_types = ("convnext",)
    config_class = ConvNextConfig
    model_class = ConvNextModel
    processor_class = ConvNextImageProcessorPil

    @property
    def pools(self) -> bool:
        return False

    @property
    def depth(self) -> int:
        return len(self.config.hidden_sizes)

    @property
    def width(self) -> int:
        return self.layer_width(self.layers[0])

    def layer_width(self, layer: str) -> int:
        """D of a layer."""
        sizes = list(self.config.hidden_sizes)
        if layer == MULTI_STAGE:
            return int(sum(sizes))
        return int([self.stem_width, *sizes][int(layer) % (self.depth + 1)])

    @property
    def stem_width(self) -> int:
        """Channels of layer 0."""
        return int(self.config.hidden_sizes[0])

    @property
    def grid(self) -> tuple[int, int]:
        if self.entry is not None and self.entry.grid is not None:
            return self.entry.grid, self.entry.grid
        height, width = self.preprocessing.size
        return height // REDUCTION, width // REDUCTION

    @property
    def layer_names(self) -> str:
        return f"'{MULTI_STAGE}' (--layer {MULTI_STAGE}), and stages {-self.depth} to {self.depth}"

    def has_layer(self, layer: str) -> bool:
        return layer == MULTI_STAGE or (layer != "last" and super().has_layer(layer))

    def require_pixels(self) -> None:
        if any(side % REDUCTION for side in self.preprocessing.size):
            raise EncoderError(
                f"{self.name} takes multiples of {REDUCTION} pixels, its image processor makes "
                f"{' x '.join(map(str, self.preprocessing.size))}; mend preprocessor_config.json"
            )
        widths = {layer: self.layer_width(layer) for layer in self.layers if self.has_layer(layer)}
        if len(set(widths.values())) > 1:
            said = ", ".join(f"{layer} has {width}" for layer, width in widths.items())
            raise EncoderError(
                f"the stages of {self.name} differ in width ({said} channels), and a store has "
                "one; extract each into a store of its own"
            )

    def describe(self) -> dict[str, Any]:
        height, width = self.grid
        return {"interpolated": f"bilinear in float32 to {height} x {width}"}

    def compiled(self) -> Sequence[nn.Module]:
        return [
            layer for stage in self.blocks for layer in stage.get_submodule("layers").children()
        ]

    def forward(self, pixels: Tensor, grids: Tensor | None) -> Encoded:
        stages = {
            layer: (
                list(range(1, self.depth + 1))
                if layer == MULTI_STAGE
                else [int(layer) % (self.depth + 1)]
            )
            for layer in self.layers
        }
        with self._taking({index for of in stages.values() for index in of}) as taken:
            self.model(pixel_values=pixels)
        cells = {index: self._interpolate(values) for index, values in taken.items()}
        return Encoded(
            {
                layer: torch.cat([cells[index] for index in of], dim=-1)
                for layer, of in stages.items()
            },
            None,
        )

    def _interpolate(self, stage: Tensor) -> Tensor:
        """float[B, D, S, S] -> float[B, P, D]."""
        resized = functional.interpolate(
            stage.float(), size=self.grid, mode="bilinear", align_corners=False
        )
        return resized.to(stage.dtype).flatten(2).transpose(1, 2)


class Dinov3ConvNext(ConvNext):
    """DINOv3's ConvNeXt; its layer 0 is the pixels, so it is left out."""

    model_types = ("dinov3_convnext",)
    config_class = DINOv3ConvNextConfig
    model_class = DINOv3ConvNextModel
    processor_class = ViTImageProcessorPil
    processor_name = "DINOv3ViTImageProcessor"

    @property
    def layer_names(self) -> str:
        return (
            f"'{MULTI_STAGE}' (--layer {MULTI_STAGE}), and stages 1 to {self.depth} or "
            f"{-self.depth} to -1"
        )

    def has_layer(self, layer: str) -> bool:
        return super().has_layer(layer) and (
            layer == MULTI_STAGE or int(layer) % (self.depth + 1) != 0
        )


class OpenClipConvNext(ConvNext):
    """The ConvNeXt image tower of an OpenCLIP checkpoint, as Cambrian-1 loads it.

    Such a repository describes itself for open_clip, and its tower has timm's names: the
    architecture and the image processor are the registry's, the names are translated. All of its
    LayerNorms have `layer_norm_eps`, where transformers' own ConvNeXt has 1e-6 for every config.
    """

    model_types = ("open_clip_convnext",)
    processor_class = CLIPImageProcessorPil

    WEIGHT_FILES = (
        "open_clip_model.safetensors",
        "model.safetensors",
        "open_clip_pytorch_model.bin",
        "pytorch_model.bin",
    )
    """Tried in this order; timm's own copies of these towers have the second."""

    NAMES = (
        (r"^visual\.trunk\.", ""),
        (r"^stem\.0\.", "embeddings.patch_embeddings."),
        (r"^stem\.1\.", "embeddings.layernorm."),
        (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.norm\.", ".layernorm."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
        (r"\.gamma$", ".layer_scale_parameter"),
    )
    """timm's names of weights -> transformers'."""

    @classmethod
    def read_model(cls, name: str, source: str, config: PreTrainedConfig) -> PreTrainedModel:
        path = _weights_file(name, source, cls.WEIGHT_FILES)
        config._commit_hash = extract_commit_hash(str(path), None)
        weights = cls.translate(_read_weights(name, path))
        model = cls._build(config)
        own = model.state_dict()
        wrong = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
        require_all_weights(source, wrong)
        model.load_state_dict({key: weights[key].float() for key in own})
        return model

    @classmethod
    def random_model(cls, name: str, config: PreTrainedConfig) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            return cls._build(config)

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trunk's weights by transformers' names; the text tower and the head are left out."""
        found = {}
        for name, value in weights.items():
            renamed = name
            for pattern, replacement in cls.NAMES:
                renamed = re.sub(pattern, replacement, renamed)
            if renamed.startswith(("embeddings.", "encoder.")):
                found[renamed] = value
        return found

    @classmethod
    def _build(cls, config: PreTrainedConfig) -> PreTrainedModel:
        model = ConvNextModel(config)
        # The norm of transformers' pooled output, which is not used; timm's head has another.
        model.layernorm = nn.Identity()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
        return model


def _weights_file(name: str, source: str, files: Sequence[str]) -> Path:
    """The first of `files` that the repository or folder has. Raises EncoderError."""
    for file in files:
        if Path(source).is_dir():
            if (Path(source) / file).exists():
                return Path(source) / file
            continue
        try:
            return Path(hf_hub_download(source, file))
        except LocalEntryNotFoundError as error:  # the hub cannot be reached
            raise unreadable(name, source, error) from None
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise unreadable(name, source, error) from None
    raise EncoderError(f"{source} has none of {', '.join(files)}")


def _read_weights(name: str, path: Path) -> dict[str, Tensor]:
    """Raises EncoderError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise EncoderError(
            f"cannot load the weights of {name!r} from {path}: {first_line(error)}"
        ) from None
