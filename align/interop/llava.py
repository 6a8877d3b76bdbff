"""LLaVA: `mm_projector.bin` beside `config.json`, what its stage 1 leaves.

Source: `safe_save_model_for_hf_trainer`, `initialize_vision_modules` (llava/train/train.py,
llava/model/llava_arch.py) and `load_pretrained_model` (llava/model/builder.py) of LLaVA, commit
c121f043. Training (`--pretrain_mm_mlp_adapter`) takes every key that contains `mm_projector` and
loads what follows strictly; inference (`--model-base`) builds the model from config.json and loads
with `strict=False`, so that a wrong prefix would vanish in silence.

The weights are written in fp32, as they were trained: LLaVA rounds them itself, to fp16 where it
answers and to the training's dtype where it trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.connectors.mlp import MlpConfig
from align.errors import InteropError
from align.interop.folder import Written, finish, published, save_tensors
from align.interop.language import language_config
from align.interop.names import Projector, as_mlp, original_tensors, read_tensors
from align.interop.trained import Tower, Trained, load_trained, pads_with_mean
from featcache.files import publish_json
from featcache.registry import ENCODERS

PROJECTOR_FILE = "mm_projector.bin"
MODEL_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
"""Of a language model -> model_type and class of LLaVA (the last one of LLaVA-NeXT)."""


def export(run: Path, checkpoint: str, out: Path, *, force: bool) -> Written:
    """The folder that LLaVA's `--pretrain_mm_mlp_adapter` and `--model-path` take.

    Raises InteropError for a connector, a layout, an encoder or a layer that LLaVA has not.
    """
    trained = load_trained(run, checkpoint)
    tower = _expressible(trained)
    notices: list[str] = []
    config = _config(trained, tower, notices)
    tensors = original_tensors(trained.connector)
    nbytes = sum(each.nbytes for each in tensors.values())
    with published(out, nbytes, force) as folder:
        save_tensors(folder / PROJECTOR_FILE, tensors)
        publish_json(folder / "config.json", config)
        written = finish(folder, "llava", trained.describe(), notices)
    return Written(out, "llava", trained.step, written, tuple(notices))


def read(file: Path) -> Projector:
    """A `mm_projector.bin`. Raises InteropError where it is none."""
    tensors = read_tensors(file)
    if "model.image_newline" in tensors:
        raise InteropError(
            f"{file}: has model.image_newline, which LLaVA's stage 1 does not save; give --format "
            "cambrian"
        )
    return as_mlp(file, tensors, newline=False)


def _expressible(trained: Trained) -> Tower:
    """The run's one encoder. Raises InteropError naming what LLaVA cannot express."""
    config, layout = trained.config.connector, trained.config.layout
    if not isinstance(config, MlpConfig):
        forms = "cambrian (or hf)" if config.name == "sva" else "hf"
        raise InteropError(
            f"{trained.path}: LLaVA has linear and mlpNx_gelu projectors, this run's connector is "
            f"{config.name}; give --format {forms}"
        )
    if layout.newline or layout.unpad:
        part = "layout.newline" if layout.newline else "layout.unpad"
        raise InteropError(
            f"{trained.path}: LLaVA puts image_newline after the rows of tiles (anyres) only, and "
            f"this run has {part}=true on whole images; give --format cambrian or hf"
        )
    (tower,) = trained.towers
    if not (tower.is_clip or tower.is_siglip):
        raise InteropError(
            f"{trained.path}: LLaVA runs CLIP and SigLIP encoders, this run's is {tower.model}; "
            "give --format hf"
        )
    if tower.hidden_state is None or (tower.is_siglip and tower.hidden_state != -2):
        raise InteropError(
            f"{trained.path}: LLaVA-NeXT takes SigLIP's hidden_states[-2], this run's layer is "
            f"{tower.layer}; give --format hf"
        )
    return tower


def _config(trained: Trained, tower: Tower, notices: list[str]) -> dict[str, Any]:
    """config.json: the language model's own, and what LLaVA's loaders read beside it."""
    settings = language_config(trained.config.llm)
    before = settings["model_type"]
    if before in MODEL_TYPES:
        settings["model_type"], name = MODEL_TYPES[before]
        settings["architectures"] = [name]
    else:
        notices.append(
            f"LLaVA has no class for {before} language models: config.json keeps model_type "
            f"{before}; a fork that has one loads {PROJECTOR_FILE} with --pretrain_mm_mlp_adapter"
        )
    if tower.is_siglip:
        notices.append("the encoder is SigLIP: LLaVA-NeXT has it, LLaVA itself has CLIP only")
    connector = trained.config.connector
    assert isinstance(connector, MlpConfig)
    entry = ENCODERS.get(tower.name)
    return {
        **settings,
        "use_mm_proj": True,
        "mm_projector_type": "linear" if connector.depth == 1 else f"mlp{connector.depth}x_gelu",
        "mm_hidden_size": tower.width,
        "mm_vision_tower": (entry.hub_id if entry else None) or tower.name,
        "mm_vision_select_layer": tower.hidden_state,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": True,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "image_aspect_ratio": _aspect(tower, notices),
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": trained.config.data.max_length,
    }


def _aspect(tower: Tower, notices: list[str]) -> str:
    """LLaVA's image_aspect_ratio: "pad", or "square" for what the checkpoint's processor does."""
    fit = tower.preprocessing["aspect"]
    if fit == "pad":
        if not pads_with_mean(tower.preprocessing):
            notices.append(
                f"LLaVA pads with the encoder's mean colour, this run's images were padded with "
                f"{tower.preprocessing['pad']}"
            )
        return "pad"
    own = "crop" if tower.is_clip else "squash"
    if fit != own:
        notices.append(
            f"LLaVA will {own} images for this encoder, this run's features are of images fitted "
            f"by {fit}"
        )
    return "square"
