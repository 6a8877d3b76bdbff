"""The model's forward pass: injection, causality without a mask, frozen parts, loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from align.config import EvalConfig
from align.connectors import build_connector
from align.connectors.resampler import ResamplerConfig
from align.data.collate import Batch
from align.data.dataset import DataConfig, build_splits
from align.data.loader import Loader
from align.data.templates import TemplateConfig
from align.data.tokens import IGNORE, SampleEncoder
from align.errors import DataError
from align.generate import generate
from align.llm import FrozenLLM, LLMConfig, load_llm
from align.vlm import AlignModel
from featcache.join import StoreJoin
from featcache.store import Store

Q = 4


@pytest.fixture
def model(llm: FrozenLLM) -> AlignModel:
    torch.manual_seed(0)
    config = ResamplerConfig(num_latents=Q, depth=1, heads=2, head_dim=16)
    return AlignModel(build_connector(config, [(16, 48)], llm.hidden_size), llm)


@pytest.fixture
def batch(store: Store, llm: FrozenLLM) -> Batch:
    samples = build_splits(DataConfig(eval_ratio=0), TemplateConfig(), StoreJoin([store])).train
    encoder = SampleEncoder(llm.tokenizer, TemplateConfig(), llm.image_token_id, 100)
    stores = StoreJoin([store])
    loader = Loader(stores.reader(), samples, encoder, lambda _: Q, stores.sizes_of)
    return loader.load(np.array([0, 2, 7, 5, 33]))


def test_only_the_connector_is_trained(model: AlignModel, batch: Batch) -> None:
    own = {name for name, _ in model.named_parameters()}
    assert own == {f"connector.{name}" for name, _ in model.connector.named_parameters()}
    loss, count = model(batch)
    loss.backward()
    assert count == batch.num_supervised
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.llm.model.parameters())


def test_injection_is_out_of_place_and_in_order(model: AlignModel, batch: Batch) -> None:
    table = model.llm.embedding.weight.clone()
    visual = model.visual(batch.features, batch.sizes)
    embeds = model.inject(batch.input_ids, batch.slots, visual)
    assert torch.equal(embeds[batch.is_slot], visual)
    text = ~batch.is_slot
    assert torch.equal(embeds[text], model.llm.embedding(batch.input_ids)[text])
    assert torch.equal(table, model.llm.embedding.weight)
    by_mask = model.inputs_embeds(batch.input_ids, batch.is_slot, batch.features, batch.sizes)
    assert torch.equal(by_mask, embeds)


def test_loss_is_transformers_loss(model: AlignModel, batch: Batch) -> None:
    """Against `labels=` of transformers with an attention mask over the padding."""
    loss, count = model(batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    T = batch.input_ids.shape[1]
    lengths = torch.tensor([int((row != IGNORE).nonzero().max()) + 1 for row in batch.labels])
    mask = (torch.arange(T)[None] < lengths[:, None]).long()
    assert mask.min() == 0  # the batch does have padding
    expected = model.llm.model(
        inputs_embeds=model.inputs_embeds(
            batch.input_ids, batch.is_slot, batch.features, batch.sizes
        ),
        attention_mask=mask,
        labels=batch.labels,
        use_cache=False,
    ).loss
    expected.backward()
    # Measured worst case: the loss equal, gradients 9.4e-7 of their largest element.
    torch.testing.assert_close(loss / count, expected, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            ours[name] / count, parameter.grad, rtol=0, atol=1e-5 * largest + 1e-9
        )


def test_padding_changes_nothing(model: AlignModel, batch: Batch, store: Store) -> None:
    """No mask: what stands to the right of a sample is never looked at."""
    wider = F.pad(batch.input_ids, (0, 9), value=17)
    T, W = batch.input_ids.shape[1], wider.shape[1]

    def widen(flat: torch.Tensor) -> torch.Tensor:
        return flat // T * W + flat % T

    padded = Batch(
        input_ids=wider,
        labels=F.pad(batch.labels, (0, 9), value=IGNORE),
        is_slot=F.pad(batch.is_slot, (0, 9)),
        features=batch.features,
        sizes=batch.sizes,
        slots=widen(batch.slots),
        predictors=widen(batch.predictors),
        targets=batch.targets,
        ids=batch.ids,
        keys=batch.keys,
        lengths=batch.lengths,
    )
    torch.testing.assert_close(model(padded)[0], model(batch)[0], rtol=1e-6, atol=0)


def test_the_plain_causal_kernel_runs(model: AlignModel, batch: Batch) -> None:
    """Without a mask transformers hands SDPA is_causal=True and no mask tensor."""
    calls = []
    embeds = model.inject(batch.input_ids, batch.slots, model.visual(batch.features, batch.sizes))
    original = F.scaled_dot_product_attention

    def spy(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        calls.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return original(*args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        model.llm.backbone(inputs_embeds=embeds, use_cache=False)
    assert calls and all(mask is None and causal for mask, causal in calls)


def test_vocabulary_sized_logits_exist_for_supervised_positions_only(
    model: AlignModel, batch: Batch
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    V = len(model.llm.head)
    rows: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim >= 2 and out.shape[-1] == V:
                rows.append(out.numel() // V)
            return out

    with Watch():
        loss, _ = model(batch)
        loss.backward()
    rows = [count for count in rows if count != model.llm.hidden_size]  # the weight, transposed
    assert rows and max(rows) == batch.num_supervised < batch.input_ids.numel()


def test_bf16_autocast_keeps_fp32_weights_and_gradients(model: AlignModel, batch: Batch) -> None:
    half = AlignModel(model.connector, model.llm, torch.bfloat16)
    exact = model(batch)[0].item()
    loss, _ = half(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.float32}
    assert loss.item() == pytest.approx(exact, rel=2e-3)  # measured 1.4e-4


def test_features_of_another_dtype_and_stored_ones_are_taken(
    model: AlignModel, batch: Batch
) -> None:
    (stored,) = batch.features
    assert not isinstance(stored, torch.Tensor)
    plain = stored.decode()
    assert plain.dtype == torch.float16
    for features in (stored, plain):
        visual = model.visual([features], batch.sizes)
        assert visual.dtype == torch.float32
        assert torch.equal(visual, model.connector([plain.float()], batch.sizes))


def test_features_are_normed_before_they_are_rounded_to_bf16(llm: FrozenLLM) -> None:
    """An encoder's few large channels leave the others within bf16's rounding of one another."""
    torch.manual_seed(0)
    config = ResamplerConfig(num_latents=Q, depth=1, heads=2, head_dim=16, vision_norm=True)
    connector = build_connector(config, [(16, 48)], llm.hidden_size)
    half = AlignModel(connector, llm, torch.bfloat16)
    features = (100 + torch.randn(3, 16, 48)).half()
    seen: list[torch.Tensor] = []
    connector.core.vision_norm.register_forward_hook(lambda _, __, out: seen.append(out))
    with half.precision():
        half.visual([features], [(1, 1)] * len(features))
    exact = F.layer_norm(features.float(), (48,))
    torch.testing.assert_close(seen[0].float(), exact, rtol=0, atol=1e-4)


def test_features_of_another_number_of_patches_are_refused(model: AlignModel) -> None:
    with pytest.raises(DataError, match=r"have 9 patches an image, the connector was built for 16"):
        model.visual([torch.zeros(2, 9, 48)], [(1, 1)] * 2)


def test_a_bf16_language_model_trains_and_generates(
    store: Store, world: Path, batch: Batch
) -> None:
    """The real set-up: frozen weights in bf16, the connector's in fp32, products under autocast."""
    llm = load_llm(LLMConfig(name=str(world / "qwen3")), torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(0)
    config = ResamplerConfig(num_latents=Q, depth=1, heads=2, head_dim=16, vision_norm=True)
    connector = build_connector(config, [(16, 48)], llm.hidden_size)
    model = AlignModel(connector, llm, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss, count = model(batch)
        assert loss.dtype == torch.float32
        loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / count)
    assert losses[-1] < losses[0] - 0.1
    encoder = SampleEncoder(llm.tokenizer, TemplateConfig(), llm.image_token_id, 100)
    sample = build_splits(DataConfig(eval_ratio=0), TemplateConfig(), StoreJoin([store])).train[0]
    (said,) = generate(
        model,
        encoder,
        [sample.record],
        [batch.features[0][:1]],
        batch.sizes[:1],
        EvalConfig(max_new_tokens=4),
    )
    assert said
