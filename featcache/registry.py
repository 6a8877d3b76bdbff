"""The encoders known by name. Adding one is one entry here; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BILINEAR, BICUBIC = 2, 3
"""PIL's filters."""


@dataclass(frozen=True, slots=True)
class EncoderEntry:
    """An encoder by name.

    description: one line for `featcache models`.
    hub_id: Hugging Face repository. asset: folder under featcache/assets, for what we ship.
    num_patches, width: shape of one image's features; of the largest image and of all stages, where
    they vary. pixels: side of the square input.
    tflop: floating-point operations per image, in 1e12 (2 per multiply-add).
    model_type, architecture, processor: the family (featcache/encoders/families.py) and
    transformers' config values, for random weights without a hub.
    describes_itself: whether the repository says these itself; what it says is then what counts.
    resolution: side of the square input in pixels, if not the image processor's own.
    grid: cells to a side that a ConvNeXt's stages are interpolated to, if not the last stage's.
    """

    description: str
    num_patches: int
    width: int
    pixels: int
    tflop: float
    hub_id: str | None = None
    asset: str | None = None
    model_type: str = "siglip_vision_model"
    architecture: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None
    describes_itself: bool = True
    resolution: int | None = None
    grid: int | None = None

    @property
    def own_grids(self) -> bool:
        """Whether each image has a patch grid of its own (NaFlex)."""
        return self.model_type == "siglip2_vision_model"

    @property
    def bytes_per_image(self) -> int:
        """Stored bytes of one layer in a 16-bit codec."""
        return self.num_patches * self.width * 2


def same_encoder(a: str, b: str) -> bool:
    """Whether two encoder names mean one checkpoint at one resolution: a registered name equals its
    hub id, unless it stands for another resolution than that has."""

    def hub_id(name: str) -> str:
        entry = ENCODERS.get(name)
        if entry is None or entry.resolution is not None:
            return name
        return entry.hub_id or name

    return hub_id(a) == hub_id(b)


def _vit(width: int, hidden: int, depth: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }


SHAPES = {
    "base": _vit(768, 3072, 12, 12),
    "large": _vit(1024, 4096, 24, 16),
    "so400m": _vit(1152, 4304, 27, 16),
    "giant": _vit(1536, 6144, 40, 16),
}
"""Of SigLIP's vision towers; CLIP's large is the same."""


def _squashed(side: int, resample: int) -> dict[str, Any]:
    """The settings of an image processor that resizes to a square."""
    return {"size": {"height": side, "width": side}, "resample": resample}


def _cropped(side: int, edge: int) -> dict[str, Any]:
    """Of one that resizes the shortest edge and crops the middle."""
    return {
        "size": {"shortest_edge": edge},
        "crop_size": {"height": side, "width": side},
        "resample": BICUBIC,
    }


def _siglip(hub_id: str, shape: str, patch: int, side: int, tflop: float) -> EncoderEntry:
    """SigLIP, and SigLIP 2 of a fixed resolution."""
    second = "siglip2" in hub_id
    return EncoderEntry(
        description=f"SigLIP{' 2' * second} {shape}, {side} px in patches of {patch}",
        hub_id=hub_id,
        num_patches=(side // patch) ** 2,
        width=SHAPES[shape]["hidden_size"],
        pixels=side,
        tflop=tflop,
        architecture={**SHAPES[shape], "image_size": side, "patch_size": patch},
        processor={
            **_squashed(side, BILINEAR if second else BICUBIC),
            "image_mean": [*HALF],
            "image_std": [*HALF],
        },
    )


def _naflex(hub_id: str, shape: str, tflop: float) -> EncoderEntry:
    return EncoderEntry(
        description=f"SigLIP 2 {shape} NaFlex, up to 256 patches of 16 px in the image's own shape",
        hub_id=hub_id,
        num_patches=256,
        width=SHAPES[shape]["hidden_size"],
        pixels=256,
        tflop=tflop,
        model_type="siglip2_vision_model",
        architecture={**SHAPES[shape], "num_patches": 256, "patch_size": 16},
        processor={"patch_size": 16, "max_num_patches": 256, "resample": BILINEAR},
    )


def _clip(hub_id: str, side: int, tflop: float) -> EncoderEntry:
    return EncoderEntry(
        description=f"CLIP large, {side} px in patches of 14, without the class token",
        hub_id=hub_id,
        num_patches=(side // 14) ** 2,
        width=1024,
        pixels=side,
        tflop=tflop,
        model_type="clip_vision_model",
        architecture={
            **SHAPES["large"], "image_size": side, "patch_size": 14, "projection_dim": 768,
        },
        processor={
            **_cropped(side, side), "image_mean": [*CLIP_MEAN], "image_std": [*CLIP_STD],
        },
    )  # fmt: skip


def _dinov2(
    size: str, side: int, tflop: float, *, registers: bool = False, resolution: int | None = None
) -> EncoderEntry:
    width, depth, heads = {
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
        "giant": (1536, 40, 24),
    }[size]
    of = f", {side} px in patches of 14, without class{' and register' * registers} token"
    return EncoderEntry(
        description=f"DINOv2 {size}{of}{'s' * registers}",
        hub_id=f"facebook/dinov2-{'with-registers-' * registers}{size}",
        num_patches=(side // 14) ** 2,
        width=width,
        pixels=side,
        tflop=tflop,
        model_type="dinov2_with_registers" if registers else "dinov2",
        architecture={
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "use_swiglu_ffn": size == "giant",
            "image_size": 518,
            "patch_size": 14,
        },
        processor={
            **_cropped(224, 256), "image_mean": [*IMAGENET_MEAN], "image_std": [*IMAGENET_STD],
        },
        resolution=resolution,
    )  # fmt: skip


def _dinov3(name: str, shape: dict[str, int], tflop: float, **more: Any) -> EncoderEntry:
    return EncoderEntry(
        description=f"DINOv3 {name}, 224 px in patches of 16, without class and register tokens",
        hub_id=f"facebook/dinov3-{name}-pretrain-lvd1689m",
        num_patches=196,
        width=shape["hidden_size"],
        pixels=224,
        tflop=tflop,
        model_type="dinov3_vit",
        architecture={
            **shape, "image_size": 224, "patch_size": 16, "num_register_tokens": 4, **more,
        },
        processor={
            **_squashed(224, BILINEAR),
            "image_mean": [*IMAGENET_MEAN],
            "image_std": [*IMAGENET_STD],
        },
    )  # fmt: skip


def _clip_convnext(
    size: str, hub_id: str, widths: list[int], depths: list[int], eps: float, tflop: float
) -> EncoderEntry:
    return EncoderEntry(
        description=f"CLIP ConvNeXt {size} of LAION, 1024 px, all stages at 96 x 96 (Cambrian-1)",
        hub_id=hub_id,
        num_patches=96 * 96,
        width=sum(widths),
        pixels=1024,
        tflop=tflop,
        model_type="open_clip_convnext",
        architecture={
            "hidden_sizes": widths, "depths": depths, "layer_norm_eps": eps, "image_size": 1024,
        },
        processor={
            **_cropped(1024, 1024), "image_mean": [*CLIP_MEAN], "image_std": [*CLIP_STD],
        },
        describes_itself=False,
        grid=96,
    )  # fmt: skip


GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
"""DINOv3's SwiGLU."""

ENCODERS = {
    "siglip2-so400m": _siglip("google/siglip2-so400m-patch14-384", "so400m", 14, 384, 0.665),
    "siglip2-base-p32-256": _siglip("google/siglip2-base-patch32-256", "base", 32, 256, 0.0115),
    "siglip2-base-224": _siglip("google/siglip2-base-patch16-224", "base", 16, 224, 0.0354),
    "siglip2-base-256": _siglip("google/siglip2-base-patch16-256", "base", 16, 256, 0.0468),
    "siglip2-base-384": _siglip("google/siglip2-base-patch16-384", "base", 16, 384, 0.112),
    "siglip2-base-512": _siglip("google/siglip2-base-patch16-512", "base", 16, 512, 0.216),
    "siglip2-large-256": _siglip("google/siglip2-large-patch16-256", "large", 16, 256, 0.163),
    "siglip2-large-384": _siglip("google/siglip2-large-patch16-384", "large", 16, 384, 0.384),
    "siglip2-large-512": _siglip("google/siglip2-large-patch16-512", "large", 16, 512, 0.727),
    "siglip2-so400m-224": _siglip("google/siglip2-so400m-patch14-224", "so400m", 14, 224, 0.22),
    "siglip2-so400m-256": _siglip("google/siglip2-so400m-patch16-256", "so400m", 16, 256, 0.22),
    "siglip2-so400m-p16-384": _siglip(
        "google/siglip2-so400m-patch16-384", "so400m", 16, 384, 0.519
    ),
    "siglip2-so400m-512": _siglip("google/siglip2-so400m-patch16-512", "so400m", 16, 512, 0.98),
    "siglip2-giant-256": _siglip("google/siglip2-giant-opt-patch16-256", "giant", 16, 256, 0.599),
    "siglip2-giant-384": _siglip("google/siglip2-giant-opt-patch16-384", "giant", 16, 384, 1.39),
    "siglip2-base-naflex": _naflex("google/siglip2-base-patch16-naflex", "base", 0.0468),
    "siglip2-so400m-naflex": _naflex("google/siglip2-so400m-patch16-naflex", "so400m", 0.22),
    "siglip-base-224": _siglip("google/siglip-base-patch16-224", "base", 16, 224, 0.0354),
    "siglip-base-256": _siglip("google/siglip-base-patch16-256", "base", 16, 256, 0.0468),
    "siglip-base-256-i18n": _siglip(
        "google/siglip-base-patch16-256-multilingual", "base", 16, 256, 0.0468
    ),
    "siglip-base-384": _siglip("google/siglip-base-patch16-384", "base", 16, 384, 0.112),
    "siglip-base-512": _siglip("google/siglip-base-patch16-512", "base", 16, 512, 0.216),
    "siglip-large-256": _siglip("google/siglip-large-patch16-256", "large", 16, 256, 0.163),
    "siglip-large-384": _siglip("google/siglip-large-patch16-384", "large", 16, 384, 0.384),
    "siglip-so400m-224": _siglip("google/siglip-so400m-patch14-224", "so400m", 14, 224, 0.22),
    "siglip-so400m-384": _siglip("google/siglip-so400m-patch14-384", "so400m", 14, 384, 0.67),
    "siglip-so400m-256-i18n": _siglip(
        "google/siglip-so400m-patch16-256-i18n", "so400m", 16, 256, 0.22
    ),
    "clip-large-224": _clip("openai/clip-vit-large-patch14", 224, 0.162),
    "clip-large-336": _clip("openai/clip-vit-large-patch14-336", 336, 0.382),
    "dinov2-small": _dinov2("small", 224, 0.0122),
    "dinov2-base": _dinov2("base", 224, 0.0463),
    "dinov2-large": _dinov2("large", 224, 0.162),
    "dinov2-giant": _dinov2("giant", 224, 0.599),
    "dinov2-giant-378": _dinov2("giant", 378, 1.79, resolution=378),
    "dinov2-small-registers": _dinov2("small", 224, 0.0125, registers=True),
    "dinov2-base-registers": _dinov2("base", 224, 0.0471, registers=True),
    "dinov2-large-registers": _dinov2("large", 224, 0.165, registers=True),
    "dinov2-giant-registers": _dinov2("giant", 224, 0.608, registers=True),
    "dinov3-vits16": _dinov3("vits16", _vit(384, 1536, 12, 6), 0.0094),
    "dinov3-vits16plus": _dinov3("vits16plus", _vit(384, 1536, 12, 6), 0.0122, **GATED),
    "dinov3-vitb16": _dinov3("vitb16", _vit(768, 3072, 12, 12), 0.0359),
    "dinov3-vitl16": _dinov3("vitl16", _vit(1024, 4096, 24, 16), 0.126),
    "dinov3-vith16plus": _dinov3("vith16plus", _vit(1280, 5120, 32, 20), 0.344, **GATED),
    "dinov3-vit7b16": _dinov3(
        "vit7b16", _vit(4096, 8192, 40, 32), 2.73, **GATED, query_bias=False, value_bias=False
    ),
    "clip-convnext-large": _clip_convnext(
        "large",
        "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
        [192, 384, 768, 1536],
        [3, 3, 27, 3],
        1e-6,
        1.44,
    ),
    "clip-convnext-xxl": _clip_convnext(
        "XXL",
        "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
        [384, 768, 1536, 3072],
        [3, 4, 30, 3],
        1e-5,
        6.33,
    ),
    "tiny": EncoderEntry(
        description="the tiny SigLIP shipped for the demo, 64 px in patches of 8",
        asset="siglip-tiny",
        num_patches=64,
        width=96,
        pixels=64,
        tflop=0.00006,
    ),
}
