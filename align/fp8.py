"""The frozen language model's products in fp8: weights quantised once, activations as they come.

    y[m, n] = sx[m] * sw[n] * sum_k x8[m, k] * w8[n, k]

    M tokens, K inputs and N outputs of a linear layer

Weights: float8_e4m3fn, one fp32 scale an output channel. Activations: the same type, one scale a
token, from its largest magnitude. Scales stand outside the sum, so a channel of large weights or a
token of large activations costs no other its precision. Source of the recipe: "row-wise" scaling of
torchao's float8 training; here nothing is trained, so the weights are quantised only once and there
is no gradient for them.

The gradient to the inputs, dx[m, k] = sum_n g[m, n] w[n, k], sums over the output channels, so the
forward pass's scales do not stand outside of it. `backward`:

    "fp8"   a second copy of the weight, transposed, with a scale an input channel; g is e4m3 with
            a scale a token. e5m2, which training in fp8 takes for gradients, is for tensors with
            one scale for all: with one a token its range is not needed, and it rounds twice as
            coarsely (benchmarks/bench_fp8.py). Both copies take what bf16 took.
    "bf16"  the weight back in bf16 for the time of the product. Half the memory, and bf16's speed.

On CUDA the products are `torch._scaled_mm`, which has row-wise scales from compute capability 9.0
(H100, H200). On the CPU the same numbers are multiplied in fp32: exact, for tests, and slow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from align.errors import ModelError
from align.layers import decoder_layers

TYPE = torch.float8_e4m3fn
GRADIENT_TYPE = TYPE
MULTIPLE = 16
"""What `torch._scaled_mm` asks of K and N."""
CAPABILITY = (9, 0)
BACKWARDS = ("fp8", "bf16")


def quantize_layers(model: PreTrainedModel, backward: str) -> None:
    """Puts an `Fp8Linear` in the place of each linear layer of the decoder layers.

    Embeddings, norms and the output layer stay as they are. Layer by layer, so that no second model
    is in memory. backward: see `Fp8Linear`.

    Raises ModelError for a CUDA device without fp8 products, a model whose layers are not known, or
    one with sizes that fp8 products do not take.
    """
    device = model.get_input_embeddings().weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ModelError(
            f"llm.quantize=fp8: {torch.cuda.get_device_name(device)} has no fp8 products with a "
            "scale a row (compute capability 9.0: H100 or later); set llm.quantize=none"
        )
    layers = decoder_layers(model, "llm.quantize=fp8")
    found = [
        (name, module) for name, module in layers.named_modules() if isinstance(module, nn.Linear)
    ]
    for name, module in found:
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            raise ModelError(
                f"llm.quantize=fp8: layer {name} has {module.in_features} inputs and "
                f"{module.out_features} outputs, fp8 products take multiples of {MULTIPLE}; set "
                "llm.quantize=none"
            )
    # Each one's weight is freed once its module is replaced: no reference to it is kept.
    while found:
        name, module = found.pop()
        parent, _, own = name.rpartition(".")
        setattr(layers.get_submodule(parent), own, Fp8Linear.of(module, backward))


class Fp8Linear(nn.Module):
    """A frozen linear layer in fp8: float[..., K] -> float[..., N] in the type of its weight.

    backward: "fp8" or "bf16", how the gradient to the input is computed, see the module.
    """

    weight: Tensor
    scale: Tensor
    transposed: Tensor | None
    transposed_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, backward: str) -> None:
        """weight: float[N, K]; bias: float[N] or None."""
        super().__init__()
        assert backward in BACKWARDS
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        # Buffers: nothing here is trained, and no optimizer or DDP should meet it.
        with torch.no_grad():
            quantised, scale = quantize_rows(weight.detach())
            self.register_buffer("weight", quantised)
            self.register_buffer("scale", scale)
            back = quantize_rows(weight.detach().T) if backward == "fp8" else (None, None)
            self.register_buffer("transposed", back[0])
            self.register_buffer("transposed_scale", back[1])
            self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def of(cls, linear: nn.Linear, backward: str) -> Fp8Linear:
        """In place of a linear layer."""
        return cls(linear.weight, linear.bias, backward)

    def forward(self, x: Tensor) -> Tensor:
        """float[..., K] -> float[..., N]."""
        y: Tensor = _Product.apply(
            x.flatten(0, -2),
            self.weight,
            self.scale,
            self.transposed,
            self.transposed_scale,
            self.dtype,
        )
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        """For `print(model)`."""
        back = "bf16" if self.transposed is None else "fp8"
        return f"{self.in_features}, {self.out_features}, backward={back}"


class _Product(torch.autograd.Function):
    """float[M, K] -> float[M, N]; rounding to fp8 is passed by in the gradient, as is usual."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        transposed: Tensor | None,
        transposed_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.x_dtype = x.dtype
        if transposed is None or transposed_scale is None:
            ctx.save_for_backward(weight, scale)
        else:
            ctx.save_for_backward(transposed, transposed_scale)
        ctx.is_fp8 = transposed is not None
        return multiply(*quantize_rows(x), weight, scale, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        if ctx.is_fp8:
            dx = multiply(*quantize_rows(grad, GRADIENT_TYPE), weight, scale, ctx.x_dtype)
        else:
            # The scales go to the gradient: N of them instead of N * K.
            scaled = grad * scale.T.to(grad.dtype)
            dx = (scaled @ weight.to(grad.dtype)).to(ctx.x_dtype)
        return dx, None, None, None, None, None


def quantize_rows(x: Tensor, dtype: torch.dtype = TYPE) -> tuple[Tensor, Tensor]:
    """float[M, K] -> fp8[M, K] and float32[M, 1], whose product is x rounded.

    The largest magnitude of a row comes to the largest number of the type. A row with a value that
    is not finite comes out as not finite.
    """
    x = x.float()
    largest = torch.finfo(dtype).max
    # The least normal number: rows of zeros divide by something.
    scale = (x.abs().amax(dim=1, keepdim=True) / largest).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).to(dtype).contiguous(), scale


def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of two quantised matrices, [M, N] in `dtype`.

    a: fp8[M, K]; a_scale: float32[M, 1]; b: fp8[N, K], transposed here; b_scale: float32[N, 1].
    """
    if a.device.type == "cuda":
        return scaled_mm(a, a_scale, b, b_scale, torch.bfloat16).to(dtype)
    with torch.autocast(a.device.type, enabled=False):
        return (F.linear(a.float(), b.float()) * a_scale * b_scale.T).to(dtype)


def scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`multiply` by torch's fp8 product; on CUDA `dtype` can only be bf16."""
    out: Tensor = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scale,
        scale_b=b_scale.t(),
        out_dtype=dtype,
        # Sums in the tensor cores' own precision: with row-wise scales the other way is slow.
        use_fast_accum=a.device.type == "cuda",
    )
    return out
