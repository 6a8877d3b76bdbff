"""Exports that other tools load, imports of theirs, and runs that start from them.

P = 16 patches, D = 48 encoder width, H = 64 LLM width; random towers, a few trained steps.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from align.checkpoint import find_checkpoint
from align.config import RunConfig
from align.connectors.conv import ConvConfig
from align.connectors.mlp import MlpConfig
from align.connectors.pooling import PoolConfig
from align.connectors.sva import SvaConfig
from align.errors import CheckpointError, InteropError, RunError
from align.interop import export_run, import_projector
from align.interop.hf import prompt_of
from align.live import caption_images, encoder_of
from align.run import RunFolder, load_speaker
from align.trainer import train
from featcache.errors import ConfigError, FingerprintMismatch
from featcache.extract import ExtractOptions, extract
from featcache.manifests import Record
from featcache.store import Store
from tests.align.conftest import save_siglip
from tests.support_models import save_clip, save_llama

MakeConfig = Callable[..., RunConfig]
P, D, H = 16, 48, 64

pytestmark = pytest.mark.usefixtures("remote_code")

SHORT = ("train.steps=2", "train.eval_every=0", "eval.max_new_tokens=12")


def mlp_config(make_config: MakeConfig, *overrides: str) -> RunConfig:
    """`make_config` names fields of the resampler, which an MLP has not."""
    config = make_config(*SHORT, *overrides)
    config.connector = MlpConfig()
    return config


@pytest.fixture(scope="module")
def mlp_run(
    store: Store, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """LLaVA's: two linear layers, every patch a slot."""
    out = tmp_path_factory.mktemp("mlp") / "run"
    train(mlp_config(make_config), [store.path], out)
    return out


@pytest.fixture(scope="module")
def resampler_run(
    store: Store, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """With a table that is computed and not in the checkpoint."""
    out = tmp_path_factory.mktemp("resampler") / "run"
    train(make_config(*SHORT, "connector.position=sincos"), [store.path], out)
    return out


@pytest.fixture(scope="module")
def padded_store(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("padded") / "store.zarr"
    extract(
        ExtractOptions(
            model=str(world / "siglip"),
            data=(world / "captions.jsonl",),
            image_root=world / "images",
            out=out,
            fit="pad",
        )
    )
    return out


@pytest.fixture(scope="module")
def newline_run(
    padded_store: Path, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Cambrian-S': an MLP, padding dropped, a vector after each row."""
    out = tmp_path_factory.mktemp("newline") / "run"
    config = mlp_config(make_config, "layout.newline=true", "layout.unpad=true")
    train(config, [padded_store], out)
    return out


def trained_weights(run: Path) -> dict[str, Tensor]:
    return load_file(find_checkpoint(run / "checkpoints").path / "connector.safetensors")


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def images_of(world: Path, *numbers: int) -> list[Path]:
    return [world / "images" / f"{number:03d}.png" for number in numbers]


# --------------------------------------------------------------------------------- projector files


def test_llava_takes_the_projector_strictly(mlp_run: Path, tmp_path: Path) -> None:
    """As its `--pretrain_mm_mlp_adapter` does: every key with the word, what follows strictly."""
    written = export_run(mlp_run, "llava", tmp_path / "out")
    weights = torch.load(tmp_path / "out" / "mm_projector.bin", map_location="cpu")
    projector = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, H))
    taken = {k.split("mm_projector.")[1]: v for k, v in weights.items() if "mm_projector" in k}
    projector.load_state_dict(taken, strict=True)
    # What answers loads with strict=False, where a wrong prefix is no error.
    assert list(weights) == [
        f"model.mm_projector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    ]
    own = trained_weights(mlp_run)
    for name, tensor in projector.state_dict().items():
        assert torch.equal(tensor, own[f"core.layers.{name}"])
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "mm_projector.bin",
        "config.json",
        "export.json",
    }
    assert written.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_llava_config_has_what_its_loaders_read(mlp_run: Path, world: Path, tmp_path: Path) -> None:
    written = export_run(mlp_run, "llava", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: value for key, value in config.items() if "mm_" in key} == {
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": D,
        "mm_vision_tower": str(world / "siglip"),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": True,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
    }
    assert (config["hidden_size"], config["image_aspect_ratio"]) == (H, "square")
    assert config["rope_theta"] == 10000.0
    assert len(written.notices) == 2
    assert written.notices[0].startswith("LLaVA has no class for qwen3 language models")


def test_one_layer_is_llavas_linear(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    config = mlp_config(make_config)
    config.connector.depth = 1  # type: ignore[attr-defined]
    train(config, [store.path], tmp_path / "run")
    export_run(tmp_path / "run", "llava", tmp_path / "out")
    weights = torch.load(tmp_path / "out" / "mm_projector.bin")
    nn.Linear(D, H).load_state_dict(
        {k.split("mm_projector.")[1]: v for k, v in weights.items() if "mm_projector" in k}
    )
    done = import_projector(tmp_path / "out" / "mm_projector.bin", "llava", tmp_path / "back")
    assert done.settings == "connector.name=mlp connector.depth=1"
    assert_equal(trained_weights(tmp_path / "run"), load_file(done.file))


def test_cambrian_files(newline_run: Path, tmp_path: Path) -> None:
    export_run(newline_run, "cambrian", tmp_path / "out")
    nested = torch.load(tmp_path / "out" / "mm_projector.pth")
    flat = torch.load(tmp_path / "out" / "mm_projector.bin")
    assert list(nested) == ["model"]
    assert_equal(nested["model"], flat)
    own = trained_weights(newline_run)
    # As its loader does: by the word and a dot, then the newline by its whole name.
    taken = {k.split("mm_projector.")[1]: v for k, v in flat.items() if "mm_projector." in k}
    nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, H)).load_state_dict(taken, strict=True)
    assert torch.equal(flat["model.image_newline"], own["layout.newline"])
    assert len(flat) == len(own) == 5


@pytest.mark.parametrize("file", ["mm_projector.pth", "mm_projector.bin"])
def test_cambrian_round_trip(newline_run: Path, tmp_path: Path, file: str) -> None:
    export_run(newline_run, "cambrian", tmp_path / "out")
    done = import_projector(tmp_path / "out" / file, "cambrian", tmp_path / "back.safetensors")
    assert done.file == tmp_path / "back.safetensors"
    with pytest.raises(InteropError, match=r"back.safetensors: is there already; choose another"):
        import_projector(tmp_path / "out" / file, "cambrian", tmp_path / "back.safetensors")
    assert_equal(trained_weights(newline_run), load_file(done.file))


def test_sva_round_trip(
    store: Store,
    make_config: MakeConfig,
    extract_again: Callable[..., Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "other").mkdir()
    other = extract_again(tmp_path / "other", seed=5)
    config = make_config(*SHORT, "layout.newline=true")
    config.connector = SvaConfig(
        width=16, side=2, depth=2, groups=2, heads=2, token_lengths=[4, 16]
    )
    run = tmp_path / "run"
    train(config, [store.path, other], run)
    export_run(run, "cambrian", tmp_path / "out")
    flat = torch.load(tmp_path / "out" / "mm_projector.bin")
    assert flat["model.vision_query"].shape == (2, 16)
    assert flat["model.vision_sampler_1.layers.0.pos_embed_1"].shape == (4, 16)
    assert flat["model.vision_sampler_0.layers.1.cross_attn.k_proj_1.1.weight"].shape == (16, 16)

    done = import_projector(tmp_path / "out" / "mm_projector.pth", "cambrian", tmp_path / "back")
    assert_equal(trained_weights(run), load_file(done.file))
    assert "connector.groups=2 connector.depth=2" in done.settings
    again = make_config(*SHORT, "layout.newline=true", f"train.init_from={tmp_path / 'back'}")
    again.connector = config.connector
    again.optim.lr = 0.0
    again.optim.weight_decay = 0.0
    train(again, [store.path, other], tmp_path / "again")
    assert_equal(trained_weights(run), trained_weights(tmp_path / "again"))

    with pytest.raises(InteropError, match="no SVA, this run's sva takes 2; give --format cambria"):
        export_run(run, "hf", tmp_path / "hf")
    with pytest.raises(InteropError, match="connector is sva; give --format cambrian"):
        export_run(run, "llava", tmp_path / "llava")


def test_what_a_format_cannot_express_is_refused(
    mlp_run: Path, resampler_run: Path, newline_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for run, form, message in (
        (resampler_run, "llava", "projectors, this run's connector is resampler; give --format hf"),
        (resampler_run, "cambrian", "this run's connector is resampler; give --format hf"),
        (newline_run, "llava", "has layout.newline=true on whole images; give --format cambrian"),
        (mlp_run, "cambrian", "layout.newline=false; give --format llava or hf"),
    ):
        with pytest.raises(InteropError, match=message):
            export_run(run, form, out)
    with pytest.raises(ConfigError, match="only for --format hf"):
        export_run(mlp_run, "llava", out, encoders=["x"])
    with pytest.raises(CheckpointError, match="no checkpoint 7; there are last, best and 2"):
        export_run(mlp_run, "llava", out, checkpoint="7")
    assert not out.exists()


def test_a_folder_is_whole_or_not_there(
    mlp_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_run(mlp_run, "llava", out)
    with pytest.raises(InteropError, match="holds an export; give --force, or another --out"):
        export_run(mlp_run, "llava", out)
    before = (out / "mm_projector.bin").read_bytes()

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for form, place in (("llava", "folder.publish"), ("hf", "hf.save_file")):
        with monkeypatch.context() as patch:
            patch.setattr(f"align.interop.{place}", no_space)
            with pytest.raises(InteropError, match="cannot be written: No space left on device"):
                export_run(mlp_run, form, out, force=True)
    assert (out / "mm_projector.bin").read_bytes() == before
    export_run(mlp_run, "llava", out, force=True)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
        with pytest.raises(InteropError, match=r"takes 0.02 GB, 0.00 GB are free there; free som"):
            export_run(mlp_run, "llava", tmp_path / "small")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    with pytest.raises(InteropError, match="is there and is no earlier export; choose another"):
        export_run(mlp_run, "llava", tmp_path / "mine", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


# ----------------------------------------------------------------------------------------- imports


def projector(depth: int = 2, prefix: str = "model.") -> dict[str, Tensor]:
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Linear(D, H), *(m for _ in range(depth - 1) for m in (nn.GELU(), nn.Linear(H, H)))
    )
    return {f"{prefix}mm_projector.{k}": v.detach() for k, v in layers.state_dict().items()}


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.model.", "base_model.model.model.", "module.module."]
)
def test_prefixes_of_wrappers(tmp_path: Path, prefix: str) -> None:
    torch.save(projector(3, prefix), tmp_path / "mm_projector.bin")
    done = import_projector(tmp_path / "mm_projector.bin", "llava", tmp_path / "out")
    assert done.settings == "connector.name=mlp connector.depth=3"
    assert done.parameters == D * H + H + 2 * (H * H + H)
    expected = {f"core.layers.{k.split('.', 2)[2]}": v for k, v in projector(3).items()}
    assert_equal(expected, load_file(done.file))


def test_half_precision_is_read_as_fp32(tmp_path: Path) -> None:
    torch.save({k: v.bfloat16() for k, v in projector().items()}, tmp_path / "mm_projector.bin")
    done = import_projector(tmp_path / "mm_projector.bin", "llava", tmp_path / "out")
    for name, tensor in load_file(done.file).items():
        theirs = projector()[name.replace("core.layers", "model.mm_projector")].bfloat16()
        assert torch.equal(tensor, theirs.float())


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        (projector() | {"model.embed_tokens.weight": torch.ones(2)}, "llava", "model.embed_tokens"),
        (projector() | {"model.image_newline": torch.ones(H)}, "llava", "give --format cambrian"),
        (projector(), "cambrian", "has no model.image_newline; it holds model.mm_projector.0.bias"),
        ({"optimizer": {}, "step": 3}, "llava", "optimizer, step are no tensors"),
        ({"model.layers.0": torch.ones(2)}, "llava", "has no model.mm_projector.0.bias, model.mm_"),
        ([1, 2], "llava", "holds no dictionary of tensors"),
        (
            projector() | {"model.mm_projector.2.weight": torch.ones(H, 7)},
            "llava",
            r"model.mm_projector.2.weight is \(64, 7\), by the other tensors it must be \(64, 64\)",
        ),
        (
            {name: torch.empty(0) for name in projector()},
            "llava",
            r"weights are \(0,\), \(0,\), no matrices; under DeepSpeed ZeRO-3 gather",
        ),
        (
            {
                "model.vision_query": torch.ones(1, 4),
                "model.vision_sampler_layers.0.layers.0.norm.bias": torch.ones(4),
            },
            "cambrian",
            "layers inside the language model",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: object, form: str, message: str) -> None:
    file = tmp_path / "mm_projector.bin"
    torch.save(content, file)
    with pytest.raises(InteropError, match=message) as caught:
        import_projector(file, form, tmp_path / "out")
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "harmed"),)  # type: ignore[return-value]

    torch.save({"model.mm_projector.0.weight": Harm()}, tmp_path / "harm.bin")
    (tmp_path / "text.bin").write_text("not a file of torch")
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save(projector(), tmp_path / "whole.bin")
    (tmp_path / "torn.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:5000])
    for name in ("harm.bin", "text.bin", "empty.bin", "torn.bin"):
        with pytest.raises(InteropError, match="not a file of tensors") as said:
            import_projector(tmp_path / name, "llava", tmp_path / "out")
        assert "\n" not in str(said.value)
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(InteropError, match="there is no such file"):
        import_projector(tmp_path / "none.bin", "llava", tmp_path / "out")


# --------------------------------------------------------------------------------------- init-from


def frozen(config: RunConfig) -> RunConfig:
    """Its steps change nothing."""
    config.optim.lr = 0.0
    config.optim.weight_decay = 0.0
    return config


def test_export_import_init_is_bit_equal(
    mlp_run: Path, store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    export_run(mlp_run, "llava", tmp_path / "out")
    done = import_projector(tmp_path / "out" / "mm_projector.bin", "llava", tmp_path / "back")
    config = frozen(mlp_config(make_config, f"train.init_from={tmp_path / 'back'}"))
    train(config, [store.path], tmp_path / "run")
    assert_equal(trained_weights(mlp_run), trained_weights(tmp_path / "run"))
    info = RunFolder(tmp_path / "run").read_info()["init_from"]
    assert (info["path"], info["file"], info["step"]) == (
        str(tmp_path / "back"),
        str(done.file),
        None,
    )
    assert re.fullmatch("[0-9a-f]{16}", info["xxh3_64"])
    state = find_checkpoint(tmp_path / "run" / "checkpoints").state()
    assert state["init_from"] == info
    assert state["config"]["train"]["init_from"] == str(tmp_path / "back")


@pytest.mark.parametrize("what", ["run", "checkpoint", "file"])
def test_init_from_our_own(
    mlp_run: Path, store: Store, make_config: MakeConfig, tmp_path: Path, what: str
) -> None:
    checkpoint = find_checkpoint(mlp_run / "checkpoints").path
    path = {
        "run": mlp_run,
        "checkpoint": checkpoint,
        "file": checkpoint / "connector.safetensors",
    }[what]
    config = frozen(mlp_config(make_config, f"train.init_from={path}"))
    train(config, [store.path], tmp_path / "run")
    assert_equal(trained_weights(mlp_run), trained_weights(tmp_path / "run"))
    info = RunFolder(tmp_path / "run").read_info()["init_from"]
    assert info["step"] == (None if what == "file" else 2)


def test_resume_does_not_start_from_it_again(
    mlp_run: Path, store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Equal to the run that was not stopped, also where the file is gone by then."""
    source = tmp_path / "source.safetensors"
    shutil.copy(find_checkpoint(mlp_run / "checkpoints").path / "connector.safetensors", source)

    def config() -> RunConfig:
        return mlp_config(
            make_config, f"train.init_from={source}", "train.steps=4", "train.save_every=2"
        )

    train(config(), [store.path], tmp_path / "whole")
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    source.unlink()
    train(config(), [store.path], cut, resume=True)
    assert_equal(trained_weights(tmp_path / "whole"), trained_weights(cut))
    first, second = (RunFolder(tmp_path / n).read_info()["init_from"] for n in ("whole", "cut"))
    assert first == second and first["file"] == str(source)
    other = mlp_config(make_config, "train.steps=4", "train.save_every=2")
    with pytest.raises(RunError, match=r"with other settings: train\.init_from"):
        train(other, [store.path], cut, resume=True)


def test_init_from_what_does_not_fit(
    mlp_run: Path,
    resampler_run: Path,
    newline_run: Path,
    store: Store,
    world: Path,
    make_config: MakeConfig,
    save_llm: Callable[..., None],
    tmp_path: Path,
) -> None:
    narrow = {k: v[:, :32] if v.shape == (H, D) else v for k, v in projector().items()}
    torch.save(narrow, tmp_path / "mm_projector.bin")
    import_projector(tmp_path / "mm_projector.bin", "llava", tmp_path / "narrow")
    export_run(newline_run, "cambrian", tmp_path / "cambrian")
    import_projector(tmp_path / "cambrian/mm_projector.pth", "cambrian", tmp_path / "newline")
    (tmp_path / "torn.safetensors").write_bytes(b"half")
    save_llm(tmp_path / "wide", hidden_size=80)
    wide = f"llm.name={tmp_path / 'wide'}"
    for path, more, message in (
        ("narrow", (), r"for encoders of width 32, the features here have 48; give the --features"),
        (mlp_run, (wide,), r"for a language model of width 64, this one's is 80; give --llm"),
        (
            newline_run,
            (),
            r"no layout.newline; give connector.name=mlp layout.newline=true layout.un",
        ),
        (
            resampler_run,
            (),
            r"no core.blocks.0\S+; give connector.name=resampler connector.num_lat",
        ),
        ("newline", (), r"connector has no layout.newline; give connector.name=mlp .* layout.newl"),
        ("torn.safetensors", (), r"cannot be read: .*; write it again"),
        ("mm_projector.bin", (), r"import a file of LLaVA or Cambrian first: align import FILE"),
        (
            "nowhere",
            (),
            r"there is no such file or folder, so no run.json, state.json or connector",
        ),
        ("wide", (), r"holds no run.json, state.json or connector.safetensors; give a run's"),
    ):
        config = mlp_config(make_config, f"train.init_from={tmp_path / path}", *more)
        with pytest.raises(CheckpointError, match=message) as caught:
            train(config, [store.path], tmp_path / "run")
        assert str(caught.value).startswith("--init-from ") and "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ transformers


def ours(run: Path, image: Path) -> tuple[Tensor, Tensor]:
    """Logits float[1, T, V] of the prompt, and pixels float[1, 3, 32, 32]; fp32, no store."""
    speaker = load_speaker(run)
    encoder = encoder_of(
        speaker, speaker.voices[0], speaker.voices[0].fingerprint["encoder"]["name"]
    )

    picture = Image.open(image).convert("RGB")
    pixels = encoder.collate([encoder.preprocess(picture)])
    features = encoder.encode(pixels).features[speaker.voices[0].layer]
    slots = speaker.model.connector.num_slots(picture.size)
    prompt = speaker.encoder.encode_prompt(Record("i", ("i",), (), None, "i"), [slots])
    ids, is_slot = torch.from_numpy(prompt.input_ids)[None], torch.from_numpy(prompt.is_slot)[None]
    with torch.inference_mode():
        embeds = speaker.model.inputs_embeds(ids, is_slot, [features], [picture.size])
        logits = speaker.model.llm.model(inputs_embeds=embeds, use_cache=False).logits
    return logits, encoder.normalize(pixels.values)


@pytest.mark.parametrize(
    ("kind", "trust"), [("mlp", False), ("resampler", True), ("newline", True)]
)
def test_exported_model_is_ours(
    kind: str,
    trust: bool,
    request: pytest.FixtureRequest,
    world: Path,
    tmp_path: Path,
) -> None:
    """Pixels bit for bit, logits, and the same words as `align caption`."""
    run = request.getfixturevalue(f"{kind}_run")
    out = tmp_path / f"exported_{kind}"
    written = export_run(run, "hf", out)
    assert any("trust_remote_code=True" in notice for notice in written.notices) is trust
    loading = {"trust_remote_code": True} if trust else {}
    model, report = AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, **loading
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert isinstance(model, LlavaForConditionalGeneration) is not trust
    model.eval()
    processor = AutoProcessor.from_pretrained(out, **loading)
    speaker = load_speaker(run)
    prompt = prompt_of(speaker.encoder)
    for image in images_of(world, 3, 31):  # 43 x 40 and 71 x 40
        inputs = processor(images=[Image.open(image)], text=prompt, return_tensors="pt")
        logits, pixels = ours(run, image)
        assert torch.equal(inputs["pixel_values"], pixels)
        with torch.inference_mode():
            theirs = model(**inputs).logits
        assert theirs.shape == logits.shape
        # Measured: 0 with transformers 5.17 and 5.23; logits reach 3.6. Room for other kernels.
        torch.testing.assert_close(theirs, logits, rtol=0, atol=5e-6)
        said = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert [speaker.encoder.answer_text(said.tolist())] == caption_images(speaker, [image])


@pytest.mark.parametrize("tied", [True, False])
def test_clip_and_llama(world: Path, make_config: MakeConfig, tmp_path: Path, tied: bool) -> None:
    """LLaVA-1.5's pair: a class token that is dropped, middle crops, BOS; tied weights or not."""
    save_clip(tmp_path / "clip", width=D)
    save_llama(
        tmp_path / "llama",
        starting_tokenizer(world),
        vocab_size=512,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    )
    extract(
        ExtractOptions(
            model=str(tmp_path / "clip"),
            data=(world / "captions.jsonl",),
            image_root=world / "images",
            out=tmp_path / "store.zarr",
        )
    )
    config = mlp_config(make_config, f"llm.name={tmp_path / 'llama'}", "template.name=plain")
    train(config, [tmp_path / "store.zarr"], tmp_path / "run")
    export_run(tmp_path / "run", "hf", tmp_path / "out")
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert isinstance(model, LlavaForConditionalGeneration)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    speaker = load_speaker(tmp_path / "run")
    for image in images_of(world, 3, 31):
        inputs = processor(
            images=[Image.open(image)], text=prompt_of(speaker.encoder), return_tensors="pt"
        )
        logits, pixels = ours(tmp_path / "run", image)
        assert torch.equal(inputs["pixel_values"], pixels)
        with torch.inference_mode():
            theirs = model(**inputs).logits
        # Measured: 0, as above.
        torch.testing.assert_close(theirs, logits, rtol=0, atol=5e-6)
        said = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert [speaker.encoder.answer_text(said.tolist())] == caption_images(speaker, [image])
    written = export_run(tmp_path / "run", "llava", tmp_path / "llava")
    assert written.notices == ()
    found = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (found["model_type"], found["architectures"]) == (
        "llava_llama",
        ["LlavaLlamaForCausalLM"],
    )


def starting_tokenizer(world: Path) -> PreTrainedTokenizerBase:
    """Qwen's, but that it begins every text with a token."""
    tokenizer = AutoTokenizer.from_pretrained(world / "qwen3")
    start = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
    )
    tokenizer.bos_token = start
    return tokenizer


@pytest.mark.parametrize("kind", ["pool", "conv", "deep", "last"])
def test_what_plain_llava_has_not(
    kind: str, world: Path, store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Other connectors, another encoder, the output of the final LayerNorm; saved and loaded once
    more by transformers itself."""
    source, encoder, layer = store.path, str(world / "siglip"), "-2"
    if kind == "pool":
        save_dinov2(tmp_path / "dinov2")
        encoder = str(tmp_path / "dinov2")
    if kind == "last":
        layer = "last"
    if kind in ("pool", "last"):
        source = tmp_path / "store.zarr"
        extract(
            ExtractOptions(
                model=encoder,
                data=(world / "captions.jsonl",),
                image_root=world / "images",
                out=source,
                layers=(layer,),
            )
        )
    config = make_config(*SHORT)
    config.connector = {
        "pool": PoolConfig(side=2),
        "conv": ConvConfig(side=2, width=16, depth=1),
        "deep": MlpConfig(depth=3),
        "last": MlpConfig(),
    }[kind]
    train(config, [source], tmp_path / "run")
    out = tmp_path / f"remote_{kind}"
    export_run(tmp_path / "run", "hf", out)
    image = images_of(world, 31)[0]
    prompt = prompt_of(load_speaker(tmp_path / "run").encoder)
    logits, pixels = ours(tmp_path / "run", image)
    folder = out
    for again in (tmp_path / f"saved_{kind}", None):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True
        )
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], pixels)
        with torch.inference_mode():
            # Measured: 0.
            torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=5e-6)
        if again is not None:
            model.save_pretrained(again)
            processor.save_pretrained(again)
            folder = again


def test_weights_under_other_names_are_an_error(resampler_run: Path, tmp_path: Path) -> None:
    """What another version of transformers names otherwise must not begin anew in silence."""
    out = tmp_path / "renamed"
    export_run(resampler_run, "hf", out)
    tensors = load_file(out / "model.safetensors")
    tensors["vision_tower.other"] = tensors.pop("vision_tower.embeddings.patch_embedding.bias")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        OSError, match=r"lacks 1 weights, first vision_tower.emb\S+; use .* export.json"
    ):
        AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)


def save_dinov2(folder: Path) -> None:
    torch.manual_seed(6)
    config = Dinov2Config(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=crop).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["mlp", "newline"])
def test_several_images_of_several_prompts(
    kind: str, request: pytest.FixtureRequest, world: Path, tmp_path: Path
) -> None:
    """A batch with padding on the left says what its rows say alone."""
    out = tmp_path / f"several_{kind}"
    export_run(request.getfixturevalue(f"{kind}_run"), "hf", out)
    model = AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32, trust_remote_code=kind != "mlp"
    )
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=kind != "mlp")
    processor.tokenizer.padding_side = "left"
    token = "<|image_pad|>"
    prompts = [f"{token}\n{token}\nDescribe both.\n", f"{token}\nDescribe it.\n"]
    pictures = [Image.open(path) for path in images_of(world, 2, 30, 9)]
    batch = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    start = batch["input_ids"].shape[1]
    together = model.generate(**batch, max_new_tokens=6, min_new_tokens=6)[:, start:]
    for row, (prompt, own) in enumerate(zip(prompts, (pictures[:2], pictures[2:]), strict=True)):
        alone = processor(images=own, text=prompt, return_tensors="pt")
        start = alone["input_ids"].shape[1]
        said = model.generate(**alone, max_new_tokens=6, min_new_tokens=6)[:, start:]
        assert said.tolist() == together[row : row + 1].tolist()
    if kind == "newline":
        with pytest.raises(ValueError, match=r"2 <\|image_pad\|> in the text for 1 images"):
            processor(images=pictures[:1], text=prompts[0], return_tensors="pt")
        with pytest.raises(ValueError, match="this model needs each image's original size"):
            model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
        with pytest.raises(ValueError, match=r"image tokens for \d+ slots of 1 images"):
            model(
                input_ids=batch["input_ids"],
                pixel_values=batch["pixel_values"][:1],
                image_sizes=batch["image_sizes"][:1],
            )


@pytest.mark.parametrize("kind", ["mlp", "resampler"])
def test_the_folders_readme_runs(
    kind: str,
    request: pytest.FixtureRequest,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = request.getfixturevalue(f"{kind}_run")
    out = tmp_path / f"readme_{kind}"
    export_run(run, "hf", out)
    (image,) = images_of(world, 3)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    code = code.replace('folder = "."', f"folder = {str(out)!r}")
    exec(code.replace('"image.jpg"', repr(str(image))), {})
    assert capsys.readouterr().out.strip() == caption_images(load_speaker(run), [image])[0]


def test_a_prompt_that_is_cut_otherwise_is_told(
    mlp_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a tokenizer that would join what two spans of the template keep apart."""
    assert export_run(mlp_run, "hf", tmp_path / "a").notices == ()
    monkeypatch.setattr("align.interop.hf.prompt_of", lambda _: "something else")
    (notice,) = export_run(mlp_run, "hf", tmp_path / "b").notices
    assert notice.startswith("the tokenizer cuts the prompt, given as one text, into other tokens")


def test_exported_names_are_those_that_both_versions_load(mlp_run: Path, tmp_path: Path) -> None:
    export_run(mlp_run, "hf", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    heads = {re.match(r"(\w+\.\w+)", name)[1] for name in tensors}  # type: ignore[index]
    assert heads == {
        "language_model.model",
        "language_model.lm_head",
        "vision_tower.vision_model",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_feature_select_strategy"] == "full"
    assert (config["vision_feature_layer"], config["image_seq_length"]) == (-2, P)
    assert config["text_config"]["rope_theta"] == 10000.0
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "LlavaImageProcessor"
    assert processor["crop_size"] == {"height": 32, "width": 32}


def test_shards_have_an_index(
    mlp_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.interop.hf.SHARD_BYTES", 100_000)
    export_run(mlp_run, "hf", tmp_path / "many")
    monkeypatch.undo()
    export_run(mlp_run, "hf", tmp_path / "one")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    joined = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert_equal(load_file(tmp_path / "one" / "model.safetensors"), joined)
    a, b = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("many", "one")
    )
    assert_equal(dict(a.named_parameters()), dict(b.named_parameters()))


def test_exported_in_another_precision(resampler_run: Path, tmp_path: Path) -> None:
    export_run(resampler_run, "hf", tmp_path / "exported_bf16")
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "exported_bf16", dtype=torch.bfloat16, trust_remote_code=True
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_another_encoder_is_not_exported(mlp_run: Path, tmp_path: Path) -> None:
    save_siglip(tmp_path / "other", seed=9)
    with pytest.raises(FingerprintMismatch, match=r"encoder.weights: .*; give the encoder that"):
        export_run(mlp_run, "hf", tmp_path / "out", encoders=[str(tmp_path / "other")])
    assert not (tmp_path / "out").exists()
