"""The `align` program on a quick demo: what it prints, what it leaves, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from align.demo.shapes import ATTRIBUTES
from align.run import load_run
from tests.support_inputs import write_tar

from .conftest import Align


def test_demo_leaves_every_part(demo: Path) -> None:
    assert sorted(path.name for path in demo.iterdir()) == [
        "data",
        "demo.json",
        "run",
        "store.zarr",
    ]
    for name in ("val", "val-shuffled"):
        assert sorted(path.name for path in (demo / "run" / "eval" / name).iterdir()) == [
            "captions.jsonl",
            "metrics.json",
            "report.md",
        ]
    page = (demo / "run" / "report.html").read_text()
    captions = (demo / "run" / "eval" / "val" / "captions.jsonl").read_text().splitlines()
    assert json.loads(captions[0])["id"] in page
    assert page.count("data:image/png;base64,") >= 24


def test_demo_again_reuses_what_is_there(demo: Path, align: Align) -> None:
    made = [
        *demo.glob("data/*.jsonl"),
        *demo.glob("run/checkpoints/*/*"),
        *demo.glob("store.zarr/features/-2/c/*/*/*"),
    ]
    before = {path: path.stat().st_mtime_ns for path in made if path.is_file()}
    done = align("demo", "--quick", "--out", demo, "--json")
    assert done.code == 0
    assert len(before) >= 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    document = done.document
    assert [row["name"] for row in document["rows"]] == [*ATTRIBUTES, "attributes", "exact_match"]
    assert list(document["seconds"]) == [
        "data",
        "extract",
        "train",
        "eval",
        "eval, shuffled",
        "report",
    ]
    assert document["passed"] is None and document["missed"] == []
    assert f"report: {demo}/run/report.html\n" in done.err


def test_demo_of_other_settings_is_refused(demo: Path, align: Align) -> None:
    done = align("demo", "--out", demo)
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith(
        f"error: {demo}: holds a demo of other settings (num_train, num_val, overrides, judged); "
        "add --fresh to start over, or choose another --out\n"
    )


def test_demo_does_not_touch_other_folders(tmp_path: Path, align: Align) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("precious")
    done = align("demo", "--quick", "--fresh", "--out", tmp_path)
    assert done.code == 1
    assert "exists and is no demo's folder" in done.err
    assert (tmp_path / "data" / "mine").read_text() == "precious"


def test_train_eval_report(demo: Path, tmp_path: Path, align: Align) -> None:
    """The same through the commands, with data files given and another split."""
    run = tmp_path / "run"
    data = demo / "data"
    trained = align(
        *("train", "--features", demo / "store.zarr", "--config", "demo", "--out", run),
        *("--data", data / "train.jsonl", "--images", data, "--llm", "tiny", "--json"),
        *("train.steps=2", "train.batch_size=8", "data.eval_ratio=0.2", "train.sample_every=2"),
    )
    assert trained.code == 0
    assert trained.document["step"] == 2
    assert "77 samples to train on, 19 held out, 2 steps of 8" in trained.err
    result = align("eval", run, "--split", "train", "--limit", "6", "--max-new-tokens", 5, "--json")
    assert result.code == 0
    document = result.document
    assert (document["n"], document["split_size"], document["step"]) == (6, 77, 2)
    assert document["decoding"]["max_new_tokens"] == 5
    assert document["metrics"]["size"]["chance"] is not None
    assert "exact_match" in result.err and str(run / "eval" / "train") in result.err
    reported = align("report", run, "--json")
    assert reported.document == {"report": str(run / "report.html")}


def test_resume_alone_takes_the_runs_own_settings(demo: Path, tmp_path: Path, align: Align) -> None:
    run = shutil.copytree(demo / "run", tmp_path / "run")
    done = align("train", "--features", demo / "store.zarr", "--out", run, "--resume")
    assert done.code == 0
    assert "resuming at step 4 of 4" in done.err


def test_caption_is_the_cached_path_live(demo: Path, align: Align, tmp_path: Path) -> None:
    rows = [
        json.loads(line)
        for line in (demo / "run" / "eval" / "val" / "captions.jsonl").read_text().splitlines()[:3]
    ]
    images = [demo / "data" / row["images"][0] for row in rows]
    done = align("caption", demo / "run", *images, "--json")
    assert done.code == 0
    assert done.document["captions"] == [
        {"image": str(image), "caption": row["generated"]}
        for image, row in zip(images, rows, strict=True)
    ]
    assert done.err.endswith(
        "".join(f"{i}: {r['generated']}\n" for i, r in zip(images, rows, strict=True))
    )
    tar = write_tar(tmp_path / "t.tar", [("00001" + images[0].suffix, images[0].read_bytes())])
    member = tar / f"00001{images[0].suffix}"
    done = align("caption", demo / "run", member, "--json")
    assert done.document["captions"] == [{"image": str(member), "caption": rows[0]["generated"]}]
    done = align("caption", demo / "run", tar / "2.png")
    assert done.code == 1 and "t.tar holds no 2.png" in done.err and "\n" not in done.err[:-1]


def test_export_import_and_start_from_it(demo: Path, align: Align, tmp_path: Path) -> None:
    """The resampler for transformers; an MLP for LLaVA, back, and a run that starts there."""
    done = align("export", demo / "run", "--format", "hf", "--out", tmp_path / "hf", "--json")
    assert done.code == 0
    assert done.document["form"] == "hf" and done.document["step"] == 4
    assert "load it with trust_remote_code=True" in done.err
    assert done.err.splitlines()[-1].startswith(f"{tmp_path / 'hf'}: step 4, ")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "README.md",
        "config.json",
        "configuration_align.py",
        "export.json",
        "generation_config.json",
        "layout.py",
        "model.safetensors",
        "modeling_align.py",
        "preprocessor_config.json",
        "processing_align.py",
        "processor_config.json",
        "resampler.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    settings = ("--features", demo / "store.zarr", "connector.name=mlp", "train.steps=1")
    settings = (*settings, "train.batch_size=4", "train.eval_every=0", "data.max_length=128")
    mlp = tmp_path / "mlp"
    assert align("train", "--out", mlp, *settings).code == 0
    assert align("export", mlp, "--format", "llava", "--out", tmp_path / "llava").code == 0
    file = tmp_path / "llava" / "mm_projector.bin"
    done = align("import", file, "--format", "llava", "--out", tmp_path / "back", "--json")
    back = tmp_path / "back" / "connector.safetensors"
    assert done.document == {
        "file": str(back),
        "settings": "connector.name=mlp connector.depth=2",
        "parameters": 96 * 128 + 128 + 128 * 128 + 128,
    }
    assert f"align train --init-from {back} connector.name=mlp connector.depth=2 ..." in done.err
    again = tmp_path / "again"
    done = align("train", "--out", again, "--init-from", tmp_path / "back", *settings)
    assert done.code == 0
    assert f"the connector starts from {back}\n" in done.err
    resumed = align("train", "--out", again, "--resume", "--features", demo / "store.zarr")
    assert resumed.code == 0 and "resuming at step 1 of 1" in resumed.err


def test_show(demo: Path, align: Align) -> None:
    done = align("show", "--config", "demo", "--features", demo / "store.zarr", "-n", 1, "--json")
    assert done.code == 0
    (sample,) = done.document["samples"]
    assert sample["text"].startswith("<image 1 x 16>\nDescribe the image in one sentence.\na ")
    target = sample["target"].removesuffix("<|endoftext|>")
    assert sample["text"].endswith(sample["target"]) and target != sample["target"]
    assert sum(sample["is_slot"]) == 16
    assert len(sample["input_ids"]) == len(sample["is_slot"]) == len(sample["is_supervised"])
    first, image, asked, text, ids, *_ = done.err[done.err.index(sample["id"]) :].splitlines()
    assert first.startswith(f"{sample['id']}  {sample['images'][0]}  ")
    assert first.endswith(f"16 slots, {sum(sample['is_supervised'])} supervised")
    assert (image, asked) == ("(image 1 x 16)\\n", "Describe the image in one sentence.\\n")
    assert text.startswith("[a][ ") and text.endswith("[<|endoftext|>]")
    assert ids.startswith("ids  ") and f"{sample['input_ids'][0]}x16 " in ids


def test_show_of_a_conversation(demo: Path, align: Align) -> None:
    done = align(
        *("show", "--config", "demo", "--features", demo / "store.zarr", "-n", 1, "--json"),
        "template.name=qwen",
    )
    assert done.code == 0
    (sample,) = done.document["samples"]
    lines = done.err[done.err.index(sample["id"]) :].splitlines()[1:]
    assert lines[:7] == [
        "<|im_start|>system\\n",
        "You are a helpful assistant.<|im_end|>\\n",
        "<|im_start|>user\\n",
        "(image 1 x 16)\\n",
        "Describe the image in one sentence.<|im_end|>\\n",
        "<|im_start|>assistant\\n",
        lines[6],
    ]
    assert lines[6].startswith("[a][ ") and lines[6].endswith("[<|im_end|>]\\n")
    assert lines[7].startswith("ids  ")
    assert sample["text"].endswith(f"assistant\n{sample['target']}\n")


def test_show_goes_on_after_a_sample_that_does_not_fit(
    demo: Path, tmp_path: Path, align: Align
) -> None:
    rows = [json.loads(line) for line in (demo / "data/train.jsonl").read_text().splitlines()[:3]]
    rows[1]["images"] += rows[0]["images"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = align(
        *("show", "--config", "demo", "--features", demo / "store.zarr", "-n", 3, "--json"),
        *(f"data.files=[{tmp_path}/data.jsonl]", f"data.images={demo}/data", "data.eval_ratio=0"),
        "data.max_length=45",
    )
    assert done.code == 0
    assert [s["id"] for s in done.document["samples"]] == [rows[0]["id"], rows[2]["id"]]
    told = f"{rows[1]['id']}: cannot be trained on: its images and prompt alone fill data.max_len"
    assert told in done.err


def test_configs(align: Align) -> None:
    done = align("configs", "--json")
    assert done.code == 0
    found = {config["name"]: config for config in done.document["configs"]}
    assert found["demo"]["headline"] in done.err
    assert all(config["headline"] for config in found.values())


@pytest.mark.parametrize(
    ("argv", "code", "error"),
    [
        (["eval", "{tmp}/none"], 1, "{tmp}/none: not a run's folder"),
        (["eval", "{demo}"], 1, "{demo}: not a run's folder (it has no run.json); give the --out"),
        (["report", "{tmp}/none"], 1, "{tmp}/none: not a run's folder"),
        (["caption", "{tmp}/none", "x.png"], 1, "{tmp}/none: not a run's folder"),
        (["eval", "{demo}/run", "--split", "test"], 1, "split test: there are train and val"),
        (["eval", "{demo}/run", "--checkpoint", "7"], 1, "7"),
        (["export", "{tmp}", "--format", "hf", "--out", "{tmp}/o"], 1, "{tmp}: not a run's folder"),
        (
            ["export", "{demo}/run", "--format", "llava", "--out", "{tmp}/o"],
            1,
            "{demo}/run: LLaVA has linear and mlpNx_gelu projectors, this run's connector is",
        ),
        (["export", "{demo}/run", "--format", "gguf", "--out", "{tmp}/o"], 2, "'gguf' is not one"),
        (["export", "{demo}/run", "--format", "hf", "--out", "{demo}"], 1, "no earlier export"),
        (["import", "{tmp}/x", "--format", "llava", "--out", "{tmp}/o"], 1, "{tmp}/x: there is no"),
        (
            ["import", "{demo}/demo.json", "--format", "llava", "--out", "{tmp}/o"],
            1,
            "{demo}/demo.json: not a file of tensors that torch.save wrote",
        ),
        (
            [
                *("train", "--features", "{demo}/store.zarr", "--out", "{tmp}/r"),
                *("--init-from", "{tmp}/none"),
            ],
            1,
            "--init-from {tmp}/none: there is no such file or folder",
        ),
        (["caption", "{demo}/run", "{tmp}/none.png"], 1, "{tmp}/none.png: missing"),
        (["caption", "{demo}/run", "{demo}/demo.json"], 1, "{demo}/demo.json: undecodable"),
        (["train", "--features", "{tmp}/none.zarr", "--out", "{tmp}/r"], 1, "{tmp}/none.zarr"),
        (
            ["train", "--features", "{demo}/store.zarr", "--config", "demoo", "--out", "{tmp}/r"],
            2,
            "did you mean `demo`?",
        ),
        (
            ["train", "--features", "{demo}/store.zarr", "--out", "{tmp}/r", "optim.lrr=1"],
            2,
            "optim.lrr: no such field, did you mean `lr`?",
        ),
        (["train", "--features", "{demo}/store.zarr", "--out", "{demo}/run"], 1, "--resume"),
        (["evl", "{demo}/run"], 2, "no command 'evl'; did you mean 'eval'? (align --help)"),
        (["eval", "{demo}/run", "--temperature", "-1"], 2, "--temperature"),
        (["eval"], 2, "Missing argument 'RUN'. (align eval --help)"),
    ],
)
def test_mistakes_are_one_line(
    demo: Path, tmp_path: Path, align: Align, argv: list[str], code: int, error: str
) -> None:
    places = {"demo": demo, "tmp": tmp_path}
    done = align(*(part.format(**places) for part in argv))
    assert done.code == code
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ") and error.format(**places) in last
    assert done.err.count("error:") == 1 and "Traceback" not in done.err


def test_eval_of_a_run_without_checkpoint(demo: Path, tmp_path: Path, align: Align) -> None:
    run = shutil.copytree(demo / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    done = align("eval", run)
    assert done.code == 1
    assert done.err.startswith(f"error: {run}/checkpoints: ")
    assert done.err.count("\n") == 1


def test_caption_needs_neither_store_nor_data(demo: Path, tmp_path: Path, align: Align) -> None:
    image = demo / "data" / load_run(demo / "run").splits.val[0].record.images[0]
    shutil.copy(image, tmp_path / "image.png")
    run = shutil.copytree(demo / "run", tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(demo), "/nowhere"))
    info = run / "run.json"
    info.write_text(info.read_text().replace(str(demo), "/nowhere"))
    there = align("caption", demo / "run", image, "--json")
    here = align("caption", run, tmp_path / "image.png", "--json")
    assert here.code == 0
    assert here.document["captions"][0]["caption"] == there.document["captions"][0]["caption"]


def test_caption_refuses_another_encoder(demo: Path, tmp_path: Path, align: Align) -> None:
    from transformers import SiglipModel

    import featcache

    tiny = Path(featcache.__file__).parent / "assets" / "siglip-tiny"
    other = shutil.copytree(tiny, tmp_path / "other")
    model = SiglipModel.from_pretrained(tiny)
    model.vision_model.post_layernorm.weight.data += 1
    model.save_pretrained(other)
    image = load_run(demo / "run").splits.val[0].record.images[0]
    done = align("caption", demo / "run", demo / "data" / image, "--encoder", other)
    assert done.code == 1
    assert "encoder.weights" in done.err and "--encoder" in done.err
