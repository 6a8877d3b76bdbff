"""Every shipped recipe: at full size on the meta device, and as a tiny twin that goes all the way.

Twins are made in twins.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from align.checkpoint import find_checkpoint
from align.config import list_configs, load_config
from align.connectors import build_connector
from align.evaluate import evaluate
from align.interop import export_run, import_projector
from align.interop.hf import prompt_of
from align.live import caption_images
from align.run import load_run, load_speaker
from align.trainer import train
from featcache.registry import ENCODERS
from tests.align.twins import RECIPES, twin, write_parts

# The sampler with its queries, and the four projectors before it.
SVA = 47_296_512 + 1024 + 13_910_016
PARAMETERS = {
    "qwen3-0.6b-resampler": 13_226_752,
    "qwen3-1.7b-resampler": 27_911_936,
    "qwen3-4b-resampler": 38_400_256,
    "qwen3-14b-resampler": 122_299_136,
    "qwen3-8b-resampler": 82_445_824 + 2304,
    "qwen3-trial": 82_445_824,
    "llava15-7b": 20_979_712,
    "llava15-13b": 31_467_520,
    "cambrian-s-7b": 16_980_992 + 3584,
    # And the projector behind it, 1024-H-H, and the newline.
    "cambrian1-sva-8b": SVA + 20_979_712 + 4096,
    "cambrian1-sva-13b": SVA + 31_467_520 + 5120,
    "cambrian1-sva-34b": SVA + 1024 * 7168 + 7168 + 7168 * 7168 + 7168 + 7168,
}
OUT_WIDTH = {
    "qwen3-0.6b-resampler": 1024, "qwen3-1.7b-resampler": 2048, "qwen3-4b-resampler": 2560,
    "qwen3-8b-resampler": 4096, "qwen3-trial": 4096, "qwen3-14b-resampler": 5120,
    "llava15-7b": 4096, "llava15-13b": 5120, "cambrian-s-7b": 3584, "cambrian1-sva-8b": 4096,
    "cambrian1-sva-13b": 5120, "cambrian1-sva-34b": 7168,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_full_size(name: str) -> None:
    """Builds between the encoders that it names and a language model, with the known count."""
    config = load_config(name)
    entries = [ENCODERS[encoder] for encoder in config.features.encoders]
    towers = [
        (entry.num_patches, 5760 if layer == "multi-stage" else entry.width)
        for entry, layer in zip(entries, config.features.layers, strict=True)
    ]
    with torch.device("meta"):
        connector = build_connector(
            config.connector, towers, OUT_WIDTH[name], config.layout, padded=True
        )
    count = sum(parameter.numel() for parameter in connector.parameters())
    assert count == PARAMETERS[name]
    slots = {"resampler": 64, "mlp": 576, "sva": 600}[config.connector.name]
    square = connector.num_slots((384, 384))
    assert square == (756 if name == "cambrian-s-7b" else slots)


def test_every_recipe_opens_with_what_a_user_asks() -> None:
    for name, path in list_configs().items():
        head = path.read_text().split("\n\n", 1)[0]
        for word in ("Command:", "Hardware:", "Time:", "Result:"):
            assert f"# {word}" in head, f"{name} lacks {word}"


@pytest.fixture(scope="module")
def parts(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the twins."""
    return write_parts(world, tmp_path_factory.mktemp("parts"))


@pytest.mark.usefixtures("remote_code")
@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_trains_resumes_evaluates_speaks_and_is_exported(
    name: str, world: Path, parts: Path, tmp_path: Path
) -> None:
    config, stores = twin(name, world, parts)
    whole = train(config, stores, tmp_path / "whole")
    assert whole.step == 4 and whole.eval_loss is not None

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(find_checkpoint(cut / "checkpoints").path)
    assert find_checkpoint(cut / "checkpoints").step == 2
    assert train(config, stores, cut, resume=True).loss == whole.loss
    ends = [find_checkpoint(run / "checkpoints").path for run in (tmp_path / "whole", cut)]
    weights = [(end / "connector.safetensors").read_bytes() for end in ends]
    assert weights[0] == weights[1]

    result = evaluate(load_run(cut))
    assert len(result.captions) == 8
    images = [world / "images" / caption.images[0] for caption in result.captions]
    said = caption_images(load_speaker(cut), images)
    assert said == [caption.generated for caption in result.captions]

    # Its connector comes back from the files of the system that it is of, and a run starts there.
    path = cut
    if config.connector.name != "resampler":
        form = "cambrian" if config.layout.newline else "llava"
        export_run(cut, form, tmp_path / form)
        path = tmp_path / "back"
        import_projector(tmp_path / form / "mm_projector.bin", form, path)
    still = replace(
        config,
        train=replace(config.train, init_from=str(path), steps=1),
        optim=replace(config.optim, lr=0.0, slow_lr=None, weight_decay=0.0),
    )
    train(still, stores, tmp_path / "again")
    end = find_checkpoint(tmp_path / "again" / "checkpoints").path
    expected, found = (load_file(p / "connector.safetensors") for p in (ends[1], end))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())

    # And the whole model in transformers says what it says here.
    if config.connector.name != "sva":
        out = tmp_path / f"hf_{name}".replace(".", "_")
        export_run(cut, "hf", out)
        model = AutoModelForImageTextToText.from_pretrained(
            out, dtype=torch.float32, trust_remote_code=True
        )
        processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
        encoder = load_speaker(cut).encoder
        for image, text in zip(images[:3], said, strict=False):
            asked = processor(
                images=[Image.open(image)], text=prompt_of(encoder), return_tensors="pt"
            )
            answer = model.generate(**asked, max_new_tokens=4)[0, asked["input_ids"].shape[1] :]
            assert encoder.answer_text(answer.tolist()) == text
