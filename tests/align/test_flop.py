"""The formulas, against what torch counts on small models, and the figures they were known by."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from align.connectors import ConnectorConfig
from align.connectors.conv import ConvConfig
from align.connectors.mlp import MlpConfig
from align.connectors.pooling import PoolConfig
from align.connectors.resampler import ResamplerConfig
from align.connectors.sva import SvaConfig
from align.errors import ModelError
from align.flop import LANGUAGE_MODELS, LanguageModel, connector_step_flop, find_language_model
from align.llm import LLMConfig
from align.loss import linear_cross_entropy

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
ENCODE_TFLOP = 0.665


def counted_step(model: torch.nn.Module, tokens: int, supervised: int) -> int:
    """Operations that torch counts in a training step of a frozen model, one sample."""
    model.eval().requires_grad_(False)
    inputs = torch.randn(1, tokens, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        targets = torch.zeros(supervised, dtype=torch.long)
        weight = model.get_output_embeddings().weight
        linear_cross_entropy(hidden[0, :supervised], weight, targets).backward()
    assert inputs.grad is not None
    return counter.get_total_flops()


@pytest.mark.parametrize(("tokens", "supervised"), [(7, 1), (33, 20)])
def test_a_frozen_step_of_qwen3_is_what_torch_counts(
    tokens: int, supervised: int, tmp_path: Path
) -> None:
    config = Qwen3Config(**SIZES, head_dim=24, attn_implementation="eager")
    config.save_pretrained(tmp_path)
    counted = counted_step(Qwen3ForCausalLM(config), tokens, supervised)
    ours = find_language_model(str(tmp_path))
    # Eager attention computes what lies in the future, too.
    assert ours.frozen_step_flop(tokens, supervised, causal=False) == counted
    assert ours.frozen_step_flop(tokens, supervised) < counted


def test_a_frozen_step_of_llama_without_head_dim(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    config.save_pretrained(tmp_path)
    counted = counted_step(LlamaForCausalLM(config), 9, 3)
    assert find_language_model(str(tmp_path)).frozen_step_flop(9, 3, causal=False) == counted


def test_known_sizes_give_known_parameter_counts() -> None:
    """As the model cards have them: non-embedding, or all of them less two tables."""
    published = {
        "qwen3-0.6b": 0.44e9, "qwen3-1.7b": 1.4e9, "qwen3-4b": 3.6e9, "qwen3-8b": 6.95e9,
        "qwen3-14b": 13.2e9, "qwen3-32b": 31.2e9, "qwen2.5-7b": 6.53e9,
        "llama-3-8b": 8.03e9 - 2 * 128_256 * 4096,
        "vicuna-7b": 6.74e9 - 2 * 32_000 * 4096, "vicuna-13b": 13.02e9 - 2 * 32_000 * 5120,
    }  # fmt: skip
    found = {name: model.block_parameters for name, model in LANGUAGE_MODELS.items()}
    assert found == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("name", "tflop", "gain", "gain_729"),
    [
        ("qwen3-0.6b", "0.18", "4.6", "1.43"),
        ("qwen3-1.7b", "0.57", "2.2", "1.15"),
        ("qwen3-4b", "1.43", "1.5", "1.06"),
        ("qwen3-8b", "2.73", "1.24", "1.03"),
        ("qwen3-14b", "5.15", "1.13", "1.02"),
    ],
)
def test_the_figures_the_design_argues_with(
    name: str, tflop: str, gain: str, gain_729: str
) -> None:
    """64 or 729 visual and 32 text tokens, of which 20 are learned; causal attention."""

    def rounded(value: float, like: str) -> str:
        return f"{value:.{len(like.split('.')[1])}f}"

    model = LANGUAGE_MODELS[name]
    few, many = (model.frozen_step_flop(visual + 32, 20) / 1e12 for visual in (64, 729))
    assert rounded(few, tflop) == tflop
    assert rounded(1 + ENCODE_TFLOP / few, gain) == gain
    assert rounded(1 + ENCODE_TFLOP / many, gain_729) == gain_729


def depthwise_backward(
    grad_shape: list[int], input_shape: list[int], weight_shape: list[int], *_: object, **__: object
) -> int:
    """Twice the forward. Torch counts the weight's gradient as that of a dense convolution."""
    assert weight_shape[1] == 1
    return 2 * 2 * grad_shape[0] * math.prod(weight_shape) * math.prod(grad_shape[2:])


@pytest.mark.parametrize(
    "config",
    [
        ResamplerConfig(num_latents=5, depth=1, heads=2, head_dim=8, ff_ratio=2, mlp_ratio=3),
        ResamplerConfig(num_latents=16, depth=3, heads=4, head_dim=4),
        MlpConfig(),
        MlpConfig(depth=1),
        MlpConfig(depth=3),
        PoolConfig(kind="mean", depth=1),
        PoolConfig(kind="average", side=2),
        PoolConfig(kind="shuffle", factor=3, depth=3),
        PoolConfig(kind="stride", factor=2),
        ConvConfig(side=2, width=16, depth=2),
        ConvConfig(side=2, width=16, depth=1, mlp_depth=1, position=False),
        ConvConfig(side=3, width=24, depth=2, position=False),
    ],
    ids=str,
)
def test_a_connectors_step_is_what_torch_counts(config: ConnectorConfig) -> None:
    connector = config.build([(9, 24)], 40)
    features = torch.randn(2, 9, 24)
    counts = {torch.ops.aten.convolution_backward: depthwise_backward}
    with (
        FlopCounterMode(display=False, custom_mapping=counts) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        connector(features).sum().backward()
    assert 2 * connector_step_flop(config, [(9, 24)], 40) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "towers"),
    [
        (SvaConfig(width=16, side=2, depth=2, heads=4, token_lengths=[16]), [(9, 24)]),
        (
            SvaConfig(width=16, side=2, groups=2, depth=1, heads=4, token_lengths=[4, 16, 36]),
            [(9, 24), (4, 12), (36, 20)],
        ),
    ],
    ids=str,
)
def test_a_step_of_the_sva_is_what_torch_counts(
    config: SvaConfig, towers: list[tuple[int, int]]
) -> None:
    features = [torch.randn(2, *tower) for tower in towers]
    connector = config.build(towers, 40)
    with FlopCounterMode(display=False) as counter:
        connector(features, [(30, 20), (20, 20)]).sum().backward()
    assert 2 * connector_step_flop(config, towers, 40) == counter.get_total_flops()


def test_only_the_sva_takes_several_towers() -> None:
    with pytest.raises(ValueError, match="mlp takes the features of one encoder, got 2"):
        connector_step_flop(MlpConfig(), [(9, 24), (9, 24)], 40)


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B-Base", "qwen3-8b", "Qwen3-8B", "/no/such/folder/Qwen3-8B"]
)
def test_a_model_is_known_by_any_of_its_names(name: str) -> None:
    assert find_language_model(name).name == "Qwen3-8B"


def test_the_shipped_model_is_read_from_its_config() -> None:
    found = find_language_model(LLMConfig().name)
    assert isinstance(found, LanguageModel) and found.num_layers > 0


def test_what_is_not_known_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--llm qwen3-80b: not known by name; did you mean qwen3"):
        find_language_model("qwen3-80b")
    with pytest.raises(ModelError, match="--llm nobody/nothing: "):
        find_language_model("nobody/nothing")
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="operations a 'gpt2' model takes is not known"):
        find_language_model(str(tmp_path))
