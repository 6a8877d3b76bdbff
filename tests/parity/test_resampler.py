"""The resampler against a second one, written out by hand from its description alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from align.connectors.resampler import ResamplerConfig


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_hand(w: dict[str, Tensor], features: Tensor, heads: int, depth: int) -> Tensor:
    """features[I, P, D] -> [I, Q, H], one image at a time."""
    out = []
    for image in features:
        if "vision_norm.weight" in w:
            image = norm(image, w["vision_norm.weight"], w["vision_norm.bias"])
        patches = image @ w["proj_in.weight"].T + w["proj_in.bias"]
        latents = w["latents"]
        for i in range(depth):
            b = f"blocks.{i}."
            seen = patches
            if b + "kv_norm.weight" in w:
                seen = norm(patches, w[b + "kv_norm.weight"], w[b + "kv_norm.bias"])
            placed = seen + w["position"] if "position" in w else seen
            wq, wk, wv = w[b + "attn.in_proj_weight"].chunk(3)
            bq, bk, bv = w[b + "attn.in_proj_bias"].chunk(3)
            q = norm(latents, w[b + "ln1.weight"], w[b + "ln1.bias"]) @ wq.T + bq
            k, v = placed @ wk.T + bk, seen @ wv.T + bv
            mixed = []
            for qh, kh, vh in zip(
                q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True
            ):
                weight = torch.exp(qh @ kh.T / math.sqrt(qh.shape[1]))
                mixed.append(weight / weight.sum(1, keepdim=True) @ vh)
            attended = torch.cat(mixed, 1) @ w[b + "attn.out_proj.weight"].T
            latents = latents + attended + w[b + "attn.out_proj.bias"]
            inner = norm(latents, w[b + "ln2.weight"], w[b + "ln2.bias"])
            inner = gelu(inner @ w[b + "ff.0.weight"].T + w[b + "ff.0.bias"])
            latents = latents + inner @ w[b + "ff.3.weight"].T + w[b + "ff.3.bias"]
        if "final_norm.weight" in w:
            latents = norm(latents, w["final_norm.weight"], w["final_norm.bias"])
        hidden = gelu(latents @ w["projector.0.weight"].T + w["projector.0.bias"])
        out.append(hidden @ w["projector.3.weight"].T + w["projector.3.bias"])
    return torch.stack(out)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("images", "patches", "depth"), [(1, 1, 1), (3, 49, 2), (2, 729, 2)])
def test_forward_and_gradients(extras: bool, images: int, patches: int, depth: int) -> None:
    torch.manual_seed(0)
    config = ResamplerConfig(
        num_latents=7,
        depth=depth,
        heads=4,
        head_dim=8,
        vision_norm=extras,
        kv_norm=extras,
        final_norm=extras,
        position="learned" if extras else "none",
    )
    connector = config.build([(patches, 24)], 40)
    with torch.no_grad():
        for parameter in connector.parameters():  # biases and norms start at 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    features = torch.randn(images, patches, 24)
    tokens = connector(features)
    tokens.square().sum().backward()

    exact = {name: p.detach().double().requires_grad_() for name, p in connector.named_parameters()}
    expected = by_hand(exact, features.double(), 4, depth)
    expected.square().sum().backward()
    # One key leaves the attention nothing to choose: its gradients are then exactly 0 here and
    # rounding there, so differences are held against the largest gradient of all.
    gradients = {name: p.grad for name, p in exact.items() if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    # Measured worst case: 1.5e-6 of an output of size 1 to 3, 5.4e-7 of the largest gradient.
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=1e-5)
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad.double(), gradients[name], rtol=0, atol=1e-5 * largest, msg=name
        )
