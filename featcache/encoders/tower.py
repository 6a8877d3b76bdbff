"""What the families of vision encoders have in common: a frozen transformers model, which of its
tokens are patches, and how its layers are numbered.

Letters: B images, P patches, D encoder width, T tokens (patches and those before them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from featcache.encoders.preprocessing import Preprocessing, present_mask
from featcache.errors import EncoderError
from featcache.quiet import quiet
from featcache.registry import EncoderEntry

RANDOM_SEED = 0
"""Seed of `random_weights`, so that two extractions with random weights agree."""
RANDOM_REVISION = "random weights"
"""What stands for a revision where the weights are random."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What one pass gives. features: {layer: float[B, P, D]}; pooled: float[B, D] or None.

    grids: int64[B, 2] on the CPU, each image's (height, width) in patches, where they vary: its
    features then end after height * width patches, and zeros follow. None where they do not.
    """

    features: dict[str, Tensor]
    pooled: Tensor | None
    grids: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def __getitem__(self, images: slice) -> Encoded:
        return Encoded(
            {name: values[images] for name, values in self.features.items()},
            None if self.pooled is None else self.pooled[images],
            None if self.grids is None else self.grids[images],
        )

    def grid(self, i: int) -> tuple[int, int] | None:
        """Of image i, where they vary."""
        if self.grids is None:
            return None
        height, width = self.grids[i].tolist()
        return height, width

    def images(self, layer: str) -> list[Tensor]:
        """float32[P, D] on the CPU of each image's own patches."""
        values = self.features[layer].float().cpu()
        if self.grids is None:
            return list(values)
        lengths = self.grids.prod(1).tolist()
        return [image[:length] for image, length in zip(values, lengths, strict=True)]


class Tower:
    """A frozen vision tower. A family is a subclass that says what the class attributes say.

    Forward, as this class does it: pixels go through `model`; on the way the input of each block
    is layer 0, 1, ..., the output of the last one layer `depth`, which is transformers' numbering
    of `hidden_states`; the model's `last_hidden_state` is "last"; the tokens before the patches
    are cut off; the model's own pooled output is kept where it has the features' width.

    model_types: transformers' `model_type` of the checkpoints it loads. config_class: of their
    vision part. model_class: the vision tower's. processor_class: of transformers' PIL backend.
    processor_name: what a fingerprint calls it, if not that.
    varies: whether each image has its own patch grid. final_norm: whether "last" is after a
    LayerNorm that comes after the last block.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type[PreTrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[type[Any]]
    processor_name: ClassVar[str] = ""
    varies: ClassVar[bool] = False
    final_norm: bool = True

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        preprocessing: Preprocessing,
        layers: tuple[str, ...],
        entry: EncoderEntry | None = None,
    ) -> None:
        """name, entry: as it was asked for, and what the registry says of it.

        Raises EncoderError for pixels that the model does not take, or a layer it does not have.
        """
        self.name, self.model, self.entry = name, model, entry
        self.preprocessing, self.layers = preprocessing, layers
        self.require_pixels()
        for layer in layers:
            if not self.has_layer(layer):
                raise EncoderError(f"{name} has no layer {layer}; it has {self.layer_names}")

    # ------------------------------------------------------------------ what a family may override

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the first patch."""
        return 0

    @property
    def dropped_tokens(self) -> str:
        """What those are, for the fingerprint."""
        registers = self.prefix_tokens - 1
        if registers < 0:
            return "none"
        return f"cls+{registers} registers" if registers else "cls"

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def pools(self) -> bool:
        """Whether there is a pooled output of the features' width."""
        return True

    @property
    def depth(self) -> int:
        """Blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def grid(self) -> tuple[int, int]:
        """An image's (height, width) in patches."""
        height, width = self.preprocessing.size
        patch_height, patch_width = pair(self.config.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    @property
    def layer_names(self) -> str:
        """The layers there are, for a message."""
        return f"{-self.depth - 1} to {self.depth}, and 'last'"

    def has_layer(self, layer: str) -> bool:
        number = re.fullmatch(r"-?\d+", layer)
        return layer == "last" or bool(number and -self.depth - 1 <= int(layer) <= self.depth)

    def require_pixels(self) -> None:
        """Raise EncoderError where the preprocessing makes pixels that the model does not take: by
        default it takes one size, that of its position embeddings."""
        height, width = pair(self.config.image_size)
        if self.preprocessing.size != (height, width):
            raise EncoderError(
                f"{self.name} takes {height} x {width} pixels, its image processor makes "
                f"{' x '.join(map(str, self.preprocessing.size))}; mend preprocessor_config.json"
            )

    def describe(self) -> dict[str, Any]:
        """More of what decides the features, for the fingerprint."""
        return {}

    def inputs(self, pixels: Tensor, grids: Tensor | None) -> dict[str, Any]:
        """What the model is called with. pixels: float[B, 3, height, width]."""
        return {"pixel_values": pixels}

    def compiled(self) -> Sequence[nn.Module]:
        """The modules whose forward `torch.compile` takes."""
        return self.blocks

    def forward(self, pixels: Tensor, grids: Tensor | None) -> Encoded:
        """pixels: normalised, in the compute dtype, on the model's device. grids: of `Pixels`."""
        wanted = {layer: int(layer) % (self.depth + 1) for layer in self.layers if layer != "last"}
        with self._taking(set(wanted.values())) as taken:
            output = self.model(**self.inputs(pixels, grids))
        found = {layer: taken[index] for layer, index in wanted.items()}
        if "last" in self.layers:
            found["last"] = output.last_hidden_state
        features = {layer: self.patches(found[layer], grids) for layer in self.layers}
        return Encoded(features, output.pooler_output if self.pools else None, grids)

    def patches(self, tokens: Tensor, grids: Tensor | None) -> Tensor:
        """tokens: float[B, T, D] -> float[B, P, D]; zeros after an image's last patch."""
        kept = tokens[:, self.prefix_tokens :]
        if grids is None:
            return kept
        return kept * present_mask(grids, kept.shape[1], kept.device)[..., None]

    # ----------------------------------------------------------------------------- what they share

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model. Its buffers keep their precision, as transformers keeps that of rotary
        frequencies."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(device=device, dtype=dtype)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def blocks(self) -> list[nn.Module]:
        """In order; by whatever name this version of transformers keeps them."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        return list(next(found for found in lists if len(found) == self.depth))

    @property
    def architecture(self) -> dict[str, Any]:
        """The config values that decide numbers at equal weights, as JSON.

        All that the family's config class declares beyond transformers' common ones: those say how
        a model is loaded and what it returns. Dropout does nothing in a frozen model.
        """
        common = {each.name for each in fields(PreTrainedConfig)}
        return {
            each.name: list(value) if isinstance(value, tuple) else value
            for each in sorted(fields(self.config), key=lambda each: each.name)
            if each.name not in common
            and "dropout" not in each.name
            and not each.name.startswith("_")
            for value in (getattr(self.config, each.name),)
        }

    @contextmanager
    def _taking(self, indices: set[int]) -> Iterator[dict[int, Tensor]]:
        """Within: {index of `hidden_states`: float[B, T, D]} of each pass."""
        taken: dict[int, Tensor] = {}
        hooks = []

        def before(index: int) -> Any:
            def hook(_module: nn.Module, inputs: Any, named: Any) -> None:
                taken[index] = inputs[0] if inputs else named["hidden_states"]

            return hook

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            taken[self.depth] = output[0] if isinstance(output, tuple) else output

        blocks = self.blocks
        for index in indices:
            hooks.append(
                blocks[-1].register_forward_hook(after)
                if index == self.depth
                else blocks[index].register_forward_pre_hook(before(index), with_kwargs=True)
            )
        try:
            yield taken
        finally:
            for hook in hooks:
                hook.remove()

    # ------------------------------------------------------------------------------------- loading

    @classmethod
    def tower_config(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """The vision part of a checkpoint's config."""
        vision = getattr(config, "vision_config", config)
        vision._commit_hash = getattr(config, "_commit_hash", None)
        return vision

    @classmethod
    def read_processor(cls, name: str, source: str) -> Preprocessing:
        """What the checkpoint says of its image processor. Raises EncoderError."""
        try:
            processor = cls.processor_class.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise unreadable(name, source, error) from None
        return Preprocessing.from_processor(processor, name, called=cls.processor_name)

    @classmethod
    def read_model(cls, name: str, source: str, config: PreTrainedConfig) -> PreTrainedModel:
        """With the checkpoint's weights, in float32. Raises EncoderError."""
        with quiet():
            try:
                model, report = cls.model_class.from_pretrained(
                    source,
                    config=config,
                    dtype=torch.float32,
                    attn_implementation="sdpa" if cls.model_class._supports_sdpa else None,
                    output_loading_info=True,
                )
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise EncoderError(
                    f"cannot load the weights of {name!r} from {source}: {first_line(error)}"
                ) from None
        require_all_weights(source, [*report["missing_keys"], *report["mismatched_keys"]])
        return model

    @classmethod
    def random_model(cls, name: str, config: PreTrainedConfig) -> PreTrainedModel:
        """The same architecture with seeded random weights."""
        if cls.model_class._supports_sdpa:
            config._attn_implementation = "sdpa"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            return cls.model_class(config)


def auto_config(name: str, source: str) -> PreTrainedConfig:
    """Of a checkpoint, whatever it is. Raises EncoderError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise unreadable(name, source, error) from None


def unreadable(name: str, source: str, error: Exception) -> EncoderError:
    return EncoderError(
        f"cannot load the encoder {name!r} from {source}: {first_line(error)}; check the name "
        "and the network, or give the folder of a downloaded checkpoint"
    )


def require_all_weights(source: str, missing: Sequence[Any]) -> None:
    """Raise EncoderError for weights that a checkpoint lacks or has in another shape."""
    wrong = sorted(map(str, missing))
    if wrong:
        raise EncoderError(
            f"{source} lacks {len(wrong)} of the vision tower's weights, first {wrong[0]}; "
            "it would have run with random ones"
        )


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a config value that is one number or two."""
    height, width = value if isinstance(value, (list, tuple)) else (value, value)
    return int(height), int(width)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
