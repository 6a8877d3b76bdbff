"""Vision transformers with tokens before the patches: CLIP, DINOv2, DINOv3."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from featcache.encoders.tower import Tower, pair
from featcache.errors import EncoderError


class Clip(Tower):
    """CLIP. Layer 0 is after its first LayerNorm. "last" is the last block's output once more: its
    final LayerNorm is only for the class token, whose output is the pooled one."""

    model_types = ("clip", "clip_vision_model")
    config_class = CLIPVisionConfig
    model_class = CLIPVisionModel
    processor_class = CLIPImageProcessorPil
    prefix_tokens = 1
    final_norm = False


class Dinov2(Tower):
    """DINOv2. Its position embeddings are interpolated, so it takes any whole number of patches.
    The pooled output is the class token after the final LayerNorm."""

    model_types = ("dinov2",)
    config_class = Dinov2Config
    model_class = Dinov2Model
    processor_class = BitImageProcessorPil

    @property
    def prefix_tokens(self) -> int:
        return 1

    def require_pixels(self) -> None:
        patches = pair(self.config.patch_size)
        if any(side % patch for side, patch in zip(self.preprocessing.size, patches, strict=True)):
            raise EncoderError(
                f"{self.name} takes whole patches of {patches[0]} x {patches[1]} pixels, its image "
                f"processor makes {' x '.join(map(str, self.preprocessing.size))}; mend "
                "preprocessor_config.json"
            )


class Dinov2WithRegisters(Dinov2):
    """DINOv2 with register tokens, which come after the class token."""

    model_types = ("dinov2_with_registers",)
    config_class = Dinov2WithRegistersConfig
    model_class = Dinov2WithRegistersModel

    @property
    def prefix_tokens(self) -> int:
        return 1 + int(self.config.num_register_tokens)


class Dinov3(Dinov2WithRegisters):
    """DINOv3. Its positions are rotary, so it takes any whole number of patches.

    transformers has its image processor for torchvision only, which resizes floats. This one
    resizes 8-bit pixels with the same filter: equal but for the rounding to 8 bits.
    """

    model_types = ("dinov3_vit",)
    config_class = DINOv3ViTConfig
    model_class = DINOv3ViTModel
    processor_class = ViTImageProcessorPil
    processor_name = "DINOv3ViTImageProcessor"
