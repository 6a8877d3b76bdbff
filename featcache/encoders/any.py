"""A vision tower of any other family: what its config says, checked by running it.

Letters: B images, P patches, T tokens (patches and those before them), D encoder width.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from featcache.encoders.preprocessing import Preprocessing
from featcache.encoders.tower import (
    RANDOM_SEED,
    Encoded,
    Tower,
    first_line,
    pair,
    require_all_weights,
    unreadable,
)
from featcache.errors import EncoderError
from featcache.quiet import quiet

PARTS = ("vision_model", "vision_tower", "visual", "vision_encoder", "image_encoder")
"""Where a model of images and text keeps its vision tower."""
MOST_PREFIX_TOKENS = 32
"""More tokens beside the patches than this are no class and register tokens."""


class AnyTower(Tower):
    """Any vision tower of transformers that makes one token of each patch.

    Nothing is known of it but its config, so it is tried: three images, of which two differ from
    the first in one patch, go through it. Its `hidden_states` and `last_hidden_state` must all be
    float[B, T, D] of one T and D; as many tokens as the grid has patches are the last ones, and
    those before them are dropped; the first and the last patch must move the first and the last of
    those tokens in layer 0, and no other. What is otherwise is refused.

    The tower of a model of images and text is found by its usual names (`PARTS`).
    """

    _prefix: int
    _depth: int
    _pools: bool

    @property
    def prefix_tokens(self) -> int:
        return self._prefix

    @property
    def dropped_tokens(self) -> str:
        registers = int(getattr(self.config, "num_register_tokens", 0) or 0)
        if self._prefix in (0, 1 + registers):
            return super().dropped_tokens
        return f"{self._prefix} before the patches"

    @property
    def pools(self) -> bool:
        return self._pools

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def architecture(self) -> dict[str, Any]:
        common = PreTrainedConfig().to_dict()
        settings = json.loads(json.dumps(self.config.to_dict(), default=str))
        return {
            name: value
            for name, value in sorted(settings.items())
            if name not in common and "dropout" not in name and not name.startswith("_")
        }

    def require_pixels(self) -> None:
        if not (hasattr(self.config, "patch_size") and hasattr(self.config, "hidden_size")):
            raise self._refusal("its config names no patch_size and hidden_size")
        patches = pair(self.config.patch_size)
        if any(side % patch for side, patch in zip(self.preprocessing.size, patches, strict=True)):
            raise self._refusal(
                f"its image processor makes {' x '.join(map(str, self.preprocessing.size))} "
                f"pixels, which are no whole patches of {' x '.join(map(str, patches))}"
            )
        self._examine(*patches)

    def forward(self, pixels: Tensor, grids: Tensor | None) -> Encoded:
        numbered = any(layer != "last" for layer in self.layers)
        output = self.model(pixel_values=pixels, output_hidden_states=numbered)
        tokens = {
            layer: output.last_hidden_state
            if layer == "last"
            else output.hidden_states[int(layer) % (self.depth + 1)]
            for layer in self.layers
        }
        return Encoded(
            {layer: self.patches(values, grids) for layer, values in tokens.items()},
            output.pooler_output if self.pools else None,
        )

    def compiled(self) -> list[nn.Module]:
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        of_blocks = [found for found in lists if len(found) == self.depth]
        if not of_blocks:
            raise self._refusal("its blocks, which --compile would compile, are not found")
        return list(of_blocks[0])

    @torch.inference_mode()
    def _examine(self, patch_height: int, patch_width: int) -> None:
        """Find out what its outputs are. Raises EncoderError."""
        images = torch.zeros(3, 3, *self.preprocessing.size)
        images[1, :, :patch_height, :patch_width] = 1.0
        images[2, :, -patch_height:, -patch_width:] = 1.0
        try:
            output = self.model(pixel_values=images, output_hidden_states=True)
        except (RuntimeError, ValueError, TypeError) as error:
            raise self._refusal(f"it does not take pixels alone ({first_line(error)})") from None
        states = [*(getattr(output, "hidden_states", None) or ())]
        last = getattr(output, "last_hidden_state", None)
        shapes = {tuple(state.shape) for state in [*states, *([] if last is None else [last])]}
        if last is None or len(states) < 2 or len(shapes) > 1 or last.ndim != 3:
            raise self._refusal(f"its outputs are no tokens of one shape ({sorted(shapes)})")
        count, width = last.shape[1:]
        self._prefix = count - self.num_patches
        self._depth = len(states) - 1
        if width != self.width or not 0 <= self._prefix <= MOST_PREFIX_TOKENS:
            raise self._refusal(
                f"it makes {count} x {width} of {self.num_patches} patches and a hidden_size of "
                f"{self.width}"
            )
        moved = [
            (states[0][i] != states[0][0]).any(-1).nonzero().flatten().tolist() for i in (1, 2)
        ]
        if moved != [[self._prefix], [count - 1]]:
            raise self._refusal(
                "its tokens are not the patches row by row: the first and the last patch moved "
                f"tokens {moved[0][:3]} and {moved[1][:3]} of {count}"
            )
        self.final_norm = not torch.equal(states[-1], last)
        pooled = getattr(output, "pooler_output", None)
        self._pools = pooled is not None and tuple(pooled.shape) == (3, width)

    def _refusal(self, why: str) -> EncoderError:
        return EncoderError(
            f"{self.name} is a {self.config.model_type!r} model, for which there is no family "
            f"here, and it cannot be understood as a tower of patches: {why}; docs/encoders.md "
            "says what can be"
        )

    @classmethod
    def tower_config(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """The whole model's: which part is the tower shows when it is loaded."""
        return config

    @classmethod
    def read_processor(cls, name: str, source: str) -> Preprocessing:
        """Raises EncoderError where ours does not make the processor's very pixels."""
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
        except (OSError, ValueError) as error:
            raise unreadable(name, source, error) from None
        named = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
        of_pil = re.sub(
            r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "ImageProcessorPil", named
        )
        processor_class = getattr(transformers, of_pil, None)
        if processor_class is None:
            raise EncoderError(
                f"the image processor of {name}, {named}, has no form in transformers that works "
                "without torchvision, so its pixels cannot be made here"
            )
        processor = processor_class.from_pretrained(source)
        preprocessing = Preprocessing.from_processor(processor, name)
        for height, width in ((37, 61), (700, 500)):
            image = _pattern(height, width)
            theirs = processor(images=image, return_tensors="np").get("pixel_values")
            pixels = torch.from_numpy(preprocessing.resize(image))[None].int()
            table = preprocessing.normalisation_table()
            ours = torch.stack([table[c][pixels[..., c]] for c in range(3)], dim=1).numpy()
            if np.shape(theirs) != ours.shape or not np.array_equal(theirs, ours):
                raise EncoderError(
                    f"the image processor of {name}, {type(processor).__name__}, makes other "
                    "pixels than its settings say; only processors that resize to a fixed height "
                    "and width, or crop to one, and normalise are supported"
                )
        return preprocessing

    @classmethod
    def read_model(cls, name: str, source: str, config: PreTrainedConfig) -> PreTrainedModel:
        with quiet():
            try:
                model, report = AutoModel.from_pretrained(
                    source, config=config, dtype="auto", output_loading_info=True
                )
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise EncoderError(
                    f"cannot load {name!r} from {source}: {first_line(error)}"
                ) from None
        tower, path = _tower_of(model)
        missing = [*report["missing_keys"], *map(str, report["mismatched_keys"])]
        missing = [key for key in missing if key.startswith(path)]
        # Many checkpoints come without the pooling layer that the class would train.
        if missing and all(key.startswith(f"{path}pooler.") for key in missing):
            tower.pooler = None
            missing = []
        require_all_weights(source, missing)
        return tower.float()

    @classmethod
    def random_model(cls, name: str, config: PreTrainedConfig) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            try:
                model = AutoModel.from_config(config)
            except ValueError as error:
                raise EncoderError(f"cannot build {name!r}: {first_line(error)}") from None
        return _tower_of(model)[0].float()


def _tower_of(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The vision part of a model, and the prefix of its weights' names; else the model itself."""
    for part in PARTS:
        tower = getattr(model, part, None)
        if isinstance(tower, PreTrainedModel):
            return tower, f"{part}."
    return model, ""


def _pattern(height: int, width: int) -> Image.Image:
    """An RGB image in which every pixel differs from its neighbours."""
    values = np.arange(height * width * 3, dtype=np.uint32) * 2654435761
    return Image.fromarray((values >> 13).astype(np.uint8).reshape(height, width, 3))
