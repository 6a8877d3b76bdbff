"""Attention without a mask: the plain causal kernel of padded rows, and documents kept apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from align.attention import _varlen, causal_attention
from align.config import EvalConfig, RunConfig
from align.data.collate import Batch
from align.data.templates import TemplateConfig
from align.data.tokens import SampleEncoder
from align.errors import ModelError
from align.generate import generate
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

FAMILIES = ("qwen3", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AlignModel:
    return make_model(save_language_model(tmp_path_factory.mktemp("llm"), request.param))


def kernel_calls(model: AlignModel, batch: Batch) -> list[tuple[Any, Any, torch.Size]]:
    """Of each call of torch's attention: mask, is_causal, and the shape of the queries."""
    calls = []
    original = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((kwargs.get("attn_mask"), kwargs.get("is_causal"), query.shape))
        return original(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        run_step(model, batch)
    return calls


def test_padded_rows_run_the_plain_causal_kernel(model: AlignModel) -> None:
    batch = random_parts().collate()
    B, T = batch.input_ids.shape
    calls = kernel_calls(model, batch)
    assert len(calls) == model.llm.model.config.num_hidden_layers
    assert {(mask, causal) for mask, causal, _ in calls} == {(None, True)}
    assert {(shape[0], shape[2]) for *_, shape in calls} == {(B, T)} and B > 1


def test_transformers_alone_runs_it_too(model: AlignModel) -> None:
    """That a batch without `attention_mask` gets no mask does not hang on our attention function,
    which only spares asking the device for documents."""
    calls = []
    original = F.scaled_dot_product_attention

    def spy(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        embeds = torch.randn(3, 7, model.llm.hidden_size)
        model.llm.backbone(inputs_embeds=embeds, use_cache=False)
    assert calls and set(calls) == {(None, True)}


@pytest.mark.parametrize("options", [{}, {"length_multiple": 64}, {"length_multiple": 7}])
def test_packed_is_padded(model: AlignModel, options: dict[str, Any]) -> None:
    parts = random_parts()
    padded = run_step(model, parts.collate())
    packed = run_step(model, parts.collate(packed=True, **options))
    loss, gradient = packed.apart(padded)
    # Measured worst case: the loss equal, 2.9e-7 of the largest gradient.
    assert loss < 1e-6 and gradient < 3e-6


@pytest.mark.parametrize("options", [{"length_multiple": 16}, {"length_multiple": 64}])
def test_padding_to_static_shapes_changes_nothing(
    model: AlignModel, options: dict[str, Any]
) -> None:
    parts = random_parts()
    loss, gradient = run_step(model, parts.collate(**options)).apart(
        run_step(model, parts.collate())
    )
    assert loss < 1e-6 and gradient < 3e-6


@pytest.mark.parametrize("options", [{"packed": True}, {"packed": False}])
def test_nothing_of_the_size_of_a_mask_is_made(model: AlignModel, options: Any) -> None:
    """With its own kernels transformers would make bool[1, 1, T, T] of documents."""
    batch = random_parts(MIXED * 8).collate(**options)
    T = batch.input_ids.shape[1]
    made: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-2:] == (T, T):
                made.append(out.shape)
            return out

    with Watch():
        run_step(model, batch)
        assert not made
        if batch.documents is not None:
            with torch.no_grad():
                embeds = torch.randn(1, T, model.llm.hidden_size)
                model.llm.backbone(
                    inputs_embeds=embeds, position_ids=batch.documents.positions, use_cache=False
                )
            assert made


def test_the_step_asks_the_device_for_nothing(model: AlignModel) -> None:
    """On CUDA each value that Python asks for, and each size that only data tells, is a wait."""
    asked: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func.name().partition(".")[0]
            if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
                asked.append(name)
            return func(*args, **(kwargs or {}))

    batch = random_parts().collate()
    model.zero_grad()
    with Watch():
        loss, _ = model(batch)
        loss.backward()
    assert not asked
    with Watch(), torch.no_grad():  # what our attention function spares
        embeds = torch.randn(3, 7, model.llm.hidden_size)
        model.llm.backbone(inputs_embeds=embeds, use_cache=False)
    assert asked


def test_documents_see_nothing_of_each_other(model: AlignModel) -> None:
    """Other tokens in one document: the hidden states of the others stay the same bit for bit."""
    parts = random_parts(((8, 0), (6, 0), (7, 0)))
    before = model.supervised_hidden(parts.collate(packed=True))
    parts.tokenized[1].input_ids[:] = 3
    after = model.supervised_hidden(parts.collate(packed=True))
    same = (before == after).all(1)
    batch = parts.collate(packed=True)
    inside = (batch.predictors >= 8) & (batch.predictors < 14)
    assert torch.equal(same, ~inside)


def test_generation_goes_on_with_its_masks(model: AlignModel) -> None:
    """A packed step in between changes nothing of what the same model says to prompts of several
    lengths, which need a mask."""
    encoder = SampleEncoder(
        model.llm.tokenizer, TemplateConfig(), model.llm.image_token_id, max_length=100
    )
    turns = (
        (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "")),
        (Turn("user", "<image>\nWhat is it, and where in the picture?"), Turn("assistant", "")),
    )
    records = [Record(f"r{i}", (f"{i}.png",), turn, None, "test") for i, turn in enumerate(turns)]
    features = torch.randn(2, PATCHES, WIDTH)

    def said() -> list[str]:
        config = EvalConfig(max_new_tokens=6)
        return generate(model, encoder, records, [features], [(1, 1)] * 2, config)

    with torch.no_grad():
        before = said()
        run = model(random_parts().collate(packed=True))
        assert said() == before
        assert torch.equal(model(random_parts().collate(packed=True))[0], run[0])
    assert model.llm.model.config._attn_implementation == "sdpa"


def test_an_error_leaves_the_model_as_it_was(model: AlignModel) -> None:
    with pytest.raises(RuntimeError, match="inside"), causal_attention(model.llm.model):
        raise RuntimeError("inside")
    assert model.llm.model.config._attn_implementation == "sdpa"


def test_other_attention_is_not_packed(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "llm", "qwen3")
    parts = random_parts()
    eager = make_model(folder, attention="eager")
    assert eager(parts.collate())[1] == parts.collate().num_supervised
    with pytest.raises(ModelError, match=r"qwen3 model with llm.attention=eager cannot keep"):
        eager(parts.collate(packed=True))


def test_a_run_that_cannot_pack_is_refused_before_it_starts(
    store: Store, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config("train.packing=true", "llm.attention=eager")
    with pytest.raises(ModelError, match=r"packing takes .* set train.packing=false"):
        train(config, [store.path], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sliding_windows_keep_their_mask_and_are_not_packed(tmp_path: Path) -> None:
    folder = save_language_model(
        tmp_path / "llm", "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0
    )
    model = make_model(folder)
    parts = random_parts()
    calls = kernel_calls(model, parts.collate())
    assert calls and all(mask is not None for mask, *_ in calls)
    with pytest.raises(ModelError, match=r"cannot keep documents apart"):
        model(parts.collate(packed=True))


def test_the_kernel_of_cuda_takes_what_it_is_given() -> None:
    """Names, shapes and groups of heads, on tensors without values: the kernel is CUDA's alone."""
    query, key, value = queries_keys_values(30)
    cumulative = torch.empty(5, dtype=torch.int32, device="meta")
    out = _varlen(query, key, value, cumulative, 20, 0.25)
    assert out.shape == (30, 8, 16)
    out.sum().backward()
    for each in (query, key, value):
        assert each.grad is not None and each.grad.shape == each.shape


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_kernel_of_cuda_is_compiled_once_and_whole() -> None:
    """However many tokens and documents there are, and however long the longest is."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, documents, longest in ((30, 4, 20), (64, 7, 32), (50, 3, 33), (128, 2, 128)):
        cumulative = torch.empty(documents + 1, dtype=torch.int32, device="meta")
        out = compiled(*queries_keys_values(tokens), cumulative, longest, 0.25)
        assert out.shape == (tokens, 8, 16)
    assert counters["stats"]["unique_graphs"] == 1


def queries_keys_values(tokens: int) -> list[torch.Tensor]:
    """bf16[1, heads, tokens, 16] without values: 8 heads of queries over 2."""
    options: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(1, heads, tokens, 16, **options) for heads in (8, 2, 2)]
