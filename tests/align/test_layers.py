"""Decoder layers compiled and checkpointed: the same results, less memory, few compilations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config import EvalConfig, RunConfig
from align.data.templates import TemplateConfig
from align.data.tokens import SampleEncoder
from align.errors import ModelError
from align.generate import generate
from align.layers import decoder_layers, prepare_layers
from align.run import load_run
from align.trainer import train
from align.vlm import AlignModel
from featcache.manifests import Record, Turn
from featcache.store import Store
from tests.support_steps import (
    MIXED,
    PATCHES,
    WIDTH,
    make_model,
    random_parts,
    run_step,
    save_language_model,
)

# torch's compiler warns of what it does itself: of its use of torch.jit, and of looking whether
# tensors have a gradient, which it hides unless warnings are errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("llm"), request.param, num_hidden_layers=3)


def prepared(folder: Path, compiled: bool, checkpointed: bool, **options: Any) -> AlignModel:
    model = make_model(folder, **options)
    prepare_layers(model.llm.model, compiled, checkpointed)
    return model


def answer(model: AlignModel) -> str:
    encoder = SampleEncoder(model.llm.tokenizer, TemplateConfig(), model.llm.image_token_id, 100)
    record = Record("r", ("0.png",), (Turn("user", "<image>\nWhat?"),), None, "test")
    features = torch.linspace(-1, 1, PATCHES * WIDTH).view(1, PATCHES, WIDTH)
    config = EvalConfig(max_new_tokens=6)
    return generate(model, encoder, [record], [features], [(1, 1)], config)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_changes_no_bit(folder: Path, packed: bool) -> None:
    """Packed, too: the layers run again after the forward pass has put its attention away."""
    batch = random_parts().collate(packed=packed)
    plain = run_step(make_model(folder), batch)
    model = prepared(folder, compiled=False, checkpointed=True)
    assert not model.llm.model.training
    step = run_step(model, batch)
    assert step.loss == plain.loss
    for name, gradient in plain.gradients.items():
        assert torch.equal(step.gradients[name], gradient), name
    assert model.llm.model.config._attn_implementation == "sdpa"


def test_checkpointing_keeps_less(folder: Path) -> None:
    batch = random_parts(MIXED * 4).collate()

    def saved_bytes(model: AlignModel) -> int:
        """Of distinct tensors kept for the backward pass, the model's own weights aside."""
        weights = {p.untyped_storage().data_ptr() for p in model.llm.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch)
        return sum(kept.values())

    plain = saved_bytes(make_model(folder))
    checkpointed = saved_bytes(prepared(folder, compiled=False, checkpointed=True))
    # Measured: 0.12 (qwen3), 0.15 (llama) of what 3 layers keep without.
    assert checkpointed < 0.25 * plain


def test_generation_runs_the_layers_as_written(folder: Path) -> None:
    """Its lengths change with each token: to compile for them would take longer than to run."""
    plain, both = make_model(folder), prepared(folder, compiled=True, checkpointed=True)
    torch._dynamo.utils.counters.clear()
    assert answer(both) == answer(plain)
    assert not torch._dynamo.utils.counters["frames"]


def test_a_checkpointed_run_is_the_plain_one(
    store: Store, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """From the setting on: the same weights bit for bit after some steps."""
    weights = []
    for setting in ("false", "true"):
        out = tmp_path / setting
        config = make_config(f"train.checkpoint_activations={setting}", "train.steps=3")
        train(config, [store.path], out)
        weights.append(load_run(out).model.connector.state_dict())
    assert all(torch.equal(weights[1][name], each) for name, each in weights[0].items())


def test_models_of_other_making_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(folder).llm.model
    layers = model.base_model.layers
    assert decoder_layers(model, "x") is layers
    del model.base_model.layers
    with pytest.raises(ModelError, match=r"train.compile=true: the decoder layers of a \w+ model"):
        prepare_layers(model, compiled=True, checkpointed=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_compute_the_same_and_are_compiled_once(
    folder: Path, checkpointed: bool
) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, model = make_model(folder), prepared(folder, True, checkpointed)
    worst = (0.0, 0.0)
    for kinds in (MIXED, MIXED[:2], MIXED[2:], MIXED * 2, ((40, 1), (7, 0), (30, 0))):
        for multiple in (1, 16):
            batch = random_parts(kinds).collate(length_multiple=multiple)
            apart = run_step(model, batch).apart(run_step(plain, batch))
            worst = max(worst[0], apart[0]), max(worst[1], apart[1])
    # Measured worst case: 1.2e-7 of the loss, 1.3e-6 of the largest gradient.
    assert worst[0] < 1e-6 and worst[1] < 5e-6, worst
    # Three layers, ten shapes: one graph, and one for the first layer, which is given a view.
    assert counters["stats"]["unique_graphs"] == 2, counters
    run_step(model, random_parts(MIXED[2:3]).collate())
    assert counters["stats"]["unique_graphs"] == 4, counters  # the same two for a single row
    with torch.no_grad():
        batch = random_parts().collate()
        torch.testing.assert_close(model(batch)[0], plain(batch)[0], rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_layers_keep_documents_apart(folder: Path) -> None:
    """On the CPU the loop over documents cuts each layer's graph in two; CUDA's kernel does not,
    see test_attention.py."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, model = make_model(folder), prepared(folder, True, True)

    def compare(kinds: Any, **options: Any) -> None:
        batch = random_parts(kinds).collate(packed=True, **options)
        loss, gradient = run_step(model, batch).apart(run_step(plain, batch))
        assert loss < 1e-6 and gradient < 5e-6  # measured worst case: 2e-7, 1e-6

    compare(MIXED, length_multiple=64)
    compare(MIXED[1:])
    graphs = counters["stats"]["unique_graphs"]
    compare(MIXED * 2, length_multiple=16)
    compare(MIXED[:3])
    assert counters["stats"]["unique_graphs"] == graphs, counters
