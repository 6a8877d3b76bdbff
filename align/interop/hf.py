"""transformers: a folder that `AutoModelForImageTextToText` and `AutoProcessor` load.

Plain Llava (`LlavaForConditionalGeneration`) where it can express the run: one SigLIP or CLIP
encoder, an MLP of two layers, every patch a slot. Otherwise a folder with code of its own
(`align/interop/remote/`, the connector's file and layout.py), for `trust_remote_code=True`. What
neither can express is refused.

Each tensor is in the precision it was trained or published in: connector and encoder in fp32, the
language model in the dtype of its checkpoint, which is also the one that config.json names.

Source of the names on disk: those of transformers 4, `vision_tower.vision_model.*` and
`language_model.model.*`. Version 5 renames both when it loads; version 4 given the names of 5 would
begin the tower anew with random weights and only warn.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig

from align.connectors import CONNECTORS
from align.connectors import layout as layout_module
from align.connectors.mlp import MlpConfig
from align.data.tokens import SampleEncoder
from align.errors import InteropError
from align.interop import remote
from align.interop.folder import Written, finish, published
from align.interop.language import copy_tokenizer, with_old_names
from align.interop.trained import Tower, Trained, load_trained, pads_with_mean
from align.live import encoder_names, encoder_of
from align.run import Speaker, load_speaker
from featcache.encoders import Encoder
from featcache.files import publish, publish_json
from featcache.manifests import Record

SHARD_BYTES = 4 << 30
REMOTE_TOWERS = ("SiglipVision", "CLIPVision", "Dinov2", "DINOv3ViT")
"""Beginnings of the class names of encoders that the folder's own code runs: a fixed resolution,
blocks in one list, patches after a known number of other tokens."""


def export(
    run: Path, checkpoint: str, out: Path, *, encoders: Sequence[str] = (), force: bool
) -> Written:
    """The whole model as a folder.

    encoders: where the encoder is now; empty takes the name in the checkpoint.

    Raises InteropError for what neither form expresses.
    """
    trained = load_trained(run, checkpoint)
    tower = _expressible(trained)
    # The checkpoint by its step: "last" may be another one by now.
    speaker = load_speaker(run, str(trained.step), as_stored=True)
    (name,) = encoder_names(speaker, encoders)
    encoder = encoder_of(speaker, speaker.voices[0], name)
    is_plain = fits_plain_llava(trained, tower)
    tensors = list(_tensors(speaker, encoder, is_plain))
    sizes = {name: tensor.nbytes for name, tensor in tensors}
    notices = []
    if not is_plain:
        notices.append(
            f"plain Llava has no {trained.config.connector.name} connector of this kind: the "
            "folder has code of its own, load it with trust_remote_code=True"
        )
    if not prompt_is_invertible(speaker.encoder):
        notices.append(
            "the tokenizer cuts the prompt, given as one text, into other tokens than in training: "
            "what the exported model says may differ from `align caption`"
        )
    with published(out, sum(sizes.values()), force) as folder:
        # First: read back while no config.json asks for the folder's own code.
        copy_tokenizer(trained.config.llm, speaker.encoder.tokenizer, folder)
        config = (
            _plain_config(speaker, encoder, tower)
            if is_plain
            else _remote_config(trained, speaker, encoder, tower)
        )
        publish_json(folder / "config.json", config)
        publish_json(folder / "generation_config.json", _generation(speaker.encoder))
        processor = "LlavaProcessor" if is_plain else "AlignVlmProcessor"
        publish_json(
            folder / "preprocessor_config.json", _image_processor(tower.preprocessing, processor)
        )
        publish_json(
            folder / "processor_config.json",
            _plain_processor(speaker, encoder) if is_plain else _remote_processor(trained, speaker),
        )
        if not is_plain:
            _copy_code(trained, folder)
        publish(folder / "README.md", [_readme(trained, speaker, is_plain).encode()])
        _save(folder, tensors, sizes)
        written = finish(folder, "hf", trained.describe(), notices)
    return Written(out, "hf", trained.step, written, tuple(notices))


def fits_plain_llava(trained: Trained, tower: Tower) -> bool:
    """Whether `LlavaForConditionalGeneration` computes what the run does."""
    connector, layout = trained.config.connector, trained.config.layout
    return (
        isinstance(connector, MlpConfig)
        and connector.depth == 2
        and not (layout.newline or layout.unpad)
        and (tower.is_clip or tower.is_siglip)
        and tower.hidden_state is not None
    )


def _expressible(trained: Trained) -> Tower:
    """The run's one encoder. Raises InteropError for what no folder can hold."""
    towers = trained.towers
    name = trained.config.connector.name
    if len(towers) != 1 or name == "sva":
        raise InteropError(
            f"{trained.path}: a transformers folder here holds one encoder and no SVA, this run's "
            f"{name} takes {len(towers)}; give --format cambrian for its weights"
        )
    (tower,) = towers
    if not tower.model.startswith(REMOTE_TOWERS):
        raise InteropError(
            f"{trained.path}: its encoder is a {tower.model}; only {', '.join(REMOTE_TOWERS)} "
            "models can be exported to transformers"
        )
    if tower.preprocessing["aspect"] == "pad" and not pads_with_mean(tower.preprocessing):
        raise InteropError(
            f"{trained.path}: its images were padded with {tower.preprocessing['pad']}, "
            "transformers' processor pads with the mean colour only; extract with --fit pad"
        )
    return tower


def _tensors(speaker: Speaker, encoder: Encoder, is_plain: bool) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor) of all parts."""
    for name, tensor in speaker.model.llm.model.state_dict().items():
        yield f"language_model.{name}", tensor
    inside = "vision_model." if is_plain else ""
    for name, tensor in encoder.model.state_dict().items():
        yield f"vision_tower.{inside}{name.removeprefix('vision_model.')}", tensor
    connector = speaker.model.connector
    if is_plain:
        own = connector.state_dict()
        for ours, theirs in ((0, 1), (2, 2)):
            for part in ("weight", "bias"):
                name = f"multi_modal_projector.linear_{theirs}.{part}"
                yield name, own.pop(f"core.layers.{ours}.{part}")
        assert not own, f"dropped: {list(own)}"
        return
    for name, tensor in (*connector.named_parameters(), *connector.named_buffers()):
        yield f"connector.{name}", tensor.detach()


def _save(folder: Path, tensors: list[tuple[str, Tensor]], sizes: dict[str, int]) -> None:
    """Shards of at most SHARD_BYTES, and their index where there are several."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    filled = 0
    for name, tensor in tensors:
        if filled and filled + sizes[name] > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += sizes[name]
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        places: set[int] = set()
        content = {}
        for name, tensor in shard:
            # Tied weights are one tensor twice; the file must hold both, for readers that do not
            # tie them.
            shared = tensor.data_ptr() in places
            content[name] = tensor.clone() if shared else tensor.contiguous()
            places.add(tensor.data_ptr())
            where[name] = file
        save_file(content, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        publish_json(folder / "model.safetensors.index.json", index)


def _plain_config(speaker: Speaker, encoder: Encoder, tower: Tower) -> dict[str, Any]:
    llm = speaker.model.llm
    text = with_old_names(llm.model.config)
    config = LlavaConfig(
        vision_config=encoder.config.to_dict(),
        text_config=llm.model.config.to_dict(),
        image_token_index=llm.image_token_id,
        projector_hidden_act="gelu",
        # "default" drops one token, CLIP's class token; SigLIP has none to drop.
        vision_feature_select_strategy="default" if tower.is_clip else "full",
        vision_feature_layer=tower.hidden_state,
        image_seq_length=tower.patches,
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )
    return {
        **with_old_names(config),
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": with_old_names(encoder.config),
        "dtype": text["dtype"],
        "torch_dtype": text["dtype"],
    }


def _remote_config(
    trained: Trained, speaker: Speaker, encoder: Encoder, tower: Tower
) -> dict[str, Any]:
    llm = speaker.model.llm
    text = with_old_names(llm.model.config)
    return {
        "model_type": "align_vlm",
        "architectures": ["AlignVlmForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_align.AlignVlmConfig",
            "AutoModel": "modeling_align.AlignVlmForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_align.AlignVlmForConditionalGeneration",
        },
        "text_config": text,
        "vision_config": with_old_names(encoder.config),
        "connector": asdict(trained.config.connector),  # type: ignore[call-overload]
        "layout": asdict(trained.config.layout),
        "num_patches": tower.patches,
        "vision_layer": tower.hidden_state,
        "prefix_tokens": encoder.tower.prefix_tokens,
        "padded": trained.connector.padded,
        "image_token_id": llm.image_token_id,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "dtype": text["dtype"],
        "torch_dtype": text["dtype"],
    }


def _image_processor(fitted: dict[str, Any], processor: str) -> dict[str, Any]:
    """preprocessor_config.json: `LlavaImageProcessor`, the one that can do all three fits.

    fitted: "preprocessing" of the store's fingerprint.
    """
    height, width = fitted["height"], fitted["width"]
    size = {
        "squash": {"height": height, "width": width},
        "crop": {"shortest_edge": fitted.get("shortest_edge")},
        "pad": {"shortest_edge": height},
    }[fitted["aspect"]]
    return {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": processor,
        "do_convert_rgb": True,
        "do_pad": fitted["aspect"] == "pad",
        "do_resize": True,
        "size": size,
        "resample": int(Image.Resampling[fitted["resample"].upper()]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": fitted["rescale_factor"],
        "do_normalize": True,
        "image_mean": fitted["mean"],
        "image_std": fitted["std"],
    }


def _plain_processor(speaker: Speaker, encoder: Encoder) -> dict[str, Any]:
    is_clip = encoder.tower.prefix_tokens == 1
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": encoder.config.patch_size,
        "image_token": speaker.config.llm.image_token,
        "vision_feature_select_strategy": "default" if is_clip else "full",
        "num_additional_image_tokens": int(is_clip),
    }


def _remote_processor(trained: Trained, speaker: Speaker) -> dict[str, Any]:
    layout, connector = trained.config.layout, trained.connector
    grid = list(connector.layout.grid) if connector.layout.newline is not None else None
    return {
        "processor_class": "AlignVlmProcessor",
        "auto_map": {"AutoProcessor": "processing_align.AlignVlmProcessor"},
        "image_token": speaker.config.llm.image_token,
        "num_tokens": connector.num_tokens,
        "grid": list(connector.layout.grid) if layout.unpad else grid,
        "newline": layout.newline,
        "unpad": layout.unpad,
    }


def _generation(encoder: SampleEncoder) -> dict[str, Any]:
    """Greedy, and what ends an answer in the run's template."""
    pad = encoder.tokenizer.pad_token_id
    stops = list(encoder.stop_ids)
    return {
        "do_sample": False,
        "eos_token_id": stops or None,
        "pad_token_id": pad if pad is not None else next(iter(stops), None),
    }


def _copy_code(trained: Trained, folder: Path) -> None:
    """The connector's own file, layout.py, and the files of `remote`.

    Those import what they need from `connector`, which is not written: transformers 4 copies only
    the files that a module itself imports, not those that these import in turn.
    """
    kind = CONNECTORS[trained.config.connector.name]
    core, layout = Path(inspect.getfile(kind)), Path(inspect.getfile(layout_module))
    for file in (core, layout):
        shutil.copyfile(file, folder / file.name)
    here = Path(inspect.getfile(remote)).parent
    direct = {
        "from .connector import CoreConfig, Layout, LayoutConfig\n": (
            f"from .{layout.stem} import Layout, LayoutConfig\n"
            f"from .{core.stem} import {kind.__name__} as CoreConfig\n"
        ),
        "from .connector import unpadded\n": f"from .{layout.stem} import unpadded\n",
    }
    for name in ("configuration_align.py", "modeling_align.py", "processing_align.py"):
        text = (here / name).read_text(encoding="utf-8")
        for indirect, own in direct.items():
            text = text.replace(indirect, own)
        assert "from .connector" not in text, name
        publish(folder / name, [text.encode()])


def prompt_is_invertible(encoder: SampleEncoder) -> bool:
    """Whether `prompt_of` comes to the tokens that the run was trained with."""
    again = encoder.tokenizer(prompt_of(encoder)).input_ids
    return list(again) == _prompt_ids(encoder)


def prompt_of(encoder: SampleEncoder) -> str:
    """The text that one image is asked with in the run's template, one image token for it.

    Without the begin-of-text token: a tokenizer that has one puts it there itself.
    """
    ids = _prompt_ids(encoder)
    start = encoder.tokenizer("").input_ids
    ids = ids[len(start) :] if start and ids[: len(start)] == start else ids
    return str(encoder.tokenizer.decode(ids))


def _prompt_ids(encoder: SampleEncoder) -> list[int]:
    record = Record("image", ("image",), (), None, "image")
    return [int(token) for token in encoder.encode_prompt(record, [1]).input_ids]


def _readme(trained: Trained, speaker: Speaker, is_plain: bool) -> str:
    trust = "" if is_plain else ", trust_remote_code=True"
    prompt = json.dumps(prompt_of(speaker.encoder), ensure_ascii=False)
    limit = trained.config.eval.max_new_tokens
    return f"""# Exported by `align export --format hf`

Language model {trained.config.llm.name}, encoder {trained.towers[0].name} (layer
{trained.towers[0].layer}), connector {trained.config.connector.name}; step {trained.step}.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this one
model = AutoModelForImageTextToText.from_pretrained(folder{trust}, dtype="auto")
processor = AutoProcessor.from_pretrained(folder{trust})
prompt = {prompt}  # as it was trained
image = Image.open("image.jpg").convert("RGB")
inputs = processor(images=[image], text=prompt, return_tensors="pt").to(model.dtype)
said = model.generate(**inputs, max_new_tokens={limit})[:, inputs["input_ids"].shape[1]:]
print(processor.tokenizer.decode(said[0], skip_special_tokens=True).strip())
```
"""
