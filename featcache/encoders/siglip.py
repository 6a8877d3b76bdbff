"""SigLIP and SigLIP 2, of a fixed resolution and NaFlex.

Letters: B images, N patches of the largest grid, C values of a patch's pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from featcache.encoders.preprocessing import PatchGrid, present_mask
from featcache.encoders.tower import Tower
from featcache.errors import EncoderError


class Siglip(Tower):
    """SigLIP, and SigLIP 2 of a fixed resolution: their checkpoints say `siglip` alike."""

    model_types = ("siglip", "siglip_vision_model")
    config_class = SiglipVisionConfig
    model_class = SiglipVisionModel
    processor_class = SiglipImageProcessorPil

    @property
    def pools(self) -> bool:
        return bool(self.model.use_head)


class SiglipNaflex(Tower):
    """SigLIP 2 NaFlex: an image keeps its proportions, in up to `max_num_patches` patches."""

    model_types = ("siglip2", "siglip2_vision_model")
    config_class = Siglip2VisionConfig
    model_class = Siglip2VisionModel
    processor_class = Siglip2ImageProcessorPil
    varies = True

    @property
    def pools(self) -> bool:
        return bool(self.model.use_head)

    @property
    def num_patches(self) -> int:
        assert isinstance(self.preprocessing.fit, PatchGrid)
        return self.preprocessing.fit.max_num_patches

    def require_pixels(self) -> None:
        fit = self.preprocessing.fit
        if not isinstance(fit, PatchGrid) or fit.patch_size != self.config.patch_size:
            raise EncoderError(
                f"{self.name} takes patches of {self.config.patch_size} pixels, its image "
                f"processor makes {self.preprocessing.fit}; mend preprocessor_config.json"
            )

    def describe(self) -> dict[str, Any]:
        return {"lengths": "per image"}

    def inputs(self, pixels: Tensor, grids: Tensor | None) -> dict[str, Any]:
        """pixels: float[B, N, C]."""
        assert grids is not None
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": present_mask(grids, pixels.shape[1], pixels.device).int(),
            "spatial_shapes": grids,
        }
