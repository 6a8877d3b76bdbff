"""A model that `align export --format hf` wrote: vision encoder -> connector -> language model.

B samples, I images, P patches, D encoder width, S slots of all images, H LLM width, T tokens
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_align import AlignVlmConfig
from .connector import CoreConfig, Layout, LayoutConfig


class AlignConnector(nn.Module):
    """A core, then a layout: float[I, P, D] -> slots float[S, H], of the first image first."""

    def __init__(self, config: AlignVlmConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        tower = (config.num_patches, config.vision_config.hidden_size)
        self.core = CoreConfig(**config.connector).build([tower], width)
        self.layout = Layout(
            LayoutConfig(**config.layout),
            self.core.num_tokens,
            self.core.grid,
            width,
        )
        # Loading makes a model without memory first, and would leave computed tables empty: they
        # are in the weights' file.
        for module in self.core.modules():
            for name, table in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, table, persistent=True)

    def forward(self, features: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """sizes: original (width, height) of the I images."""
        slots: Tensor = self.layout(self.core(features), sizes)
        return slots


class AlignVlmForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images and text -> text.

    1. The encoder's `hidden_states[vision_layer]` without the tokens before the patches.
    2. The connector: as many slots of an image as the processor wrote image tokens.
    3. The slots replace the embeddings of the image tokens, in their order.
    4. The language model.
    """

    config_class = AlignVlmConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    def __init__(self, config: AlignVlmConfig) -> None:
        super().__init__(config)
        tower = AutoModel.from_config(config.vision_config)
        # Versions of transformers differ in whether a SigLIP has this level around its parts.
        self.vision_tower = getattr(tower, "vision_model", tower)
        self.connector = AlignConnector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As everywhere in transformers, but weights that are missing are an error.

        Raises OSError: versions of transformers differ in how they name some encoders' weights.
        """
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        lacking = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
        if lacking:
            raise OSError(
                f"transformers {transformers.__version__} lacks {len(lacking)} weights, first "
                f"{lacking[0]}; use the version that export.json names, or export again with this"
            )
        return (model, report) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Slots float[S, H] of pixel_values float[I, 3, height, width].

        image_sizes: int64[I, 2], original (height, width); needed where images of different shapes
        have different numbers of slots.
        """
        if image_sizes is None:
            if self.connector.layout.needs_sizes:
                raise ValueError("image_sizes: this model needs each image's original size")
            sizes = [(1, 1)] * len(pixel_values)
        else:
            sizes = [(width, height) for height, width in image_sizes.tolist()]
        features = self._patches(pixel_values.to(next(self.vision_tower.parameters()).dtype))
        return self.connector(features.to(next(self.connector.parameters()).dtype), sizes)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids, labels: int64[B, T]; pixel_values, image_sizes: see `get_image_features`, all
        images of the first sample first. Returns what the language model does.

        Raises ValueError where the image tokens are not as many as the images have slots.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids: these say where the images are")
            slots = self.get_image_features(pixel_values, image_sizes)
            places = input_ids == self.config.image_token_id
            if int(places.sum()) != len(slots):
                raise ValueError(
                    f"{int(places.sum())} image tokens for {len(slots)} slots of "
                    f"{len(pixel_values)} images; let the processor of this folder write the text"
                )
            inputs_embeds = inputs_embeds.masked_scatter(
                places[..., None], slots.to(inputs_embeds.device, inputs_embeds.dtype)
            )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The images belong to the first step; later ones find them in the cache."""
        found = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return {
            name: value
            for name, value in found.items()
            if name not in ("pixel_values", "image_sizes")
        }

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """Of the wanted layer, float[I, P, D].

        Taken where it passes by rather than asked for: what `output_hidden_states` returns, and of
        which module, differs between versions of transformers.
        """
        config = self.config.vision_config
        depth, wanted = config.num_hidden_layers, self.config.vision_layer
        if wanted is None:
            found = self.vision_tower(pixel_values).last_hidden_state
            return found[:, self.config.prefix_tokens :]
        lists = [each for each in self.vision_tower.modules() if isinstance(each, nn.ModuleList)]
        blocks = next(each for each in lists if len(each) == depth)
        taken: list[Tensor] = []

        def before(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            taken.append(inputs[0] if inputs else named["hidden_states"])

        def after(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)

        index = wanted % (depth + 1)
        hook = (
            blocks[-1].register_forward_hook(after)
            if index == depth
            else blocks[index].register_forward_pre_hook(before, with_kwargs=True)
        )
        try:
            self.vision_tower(pixel_values)
        finally:
            hook.remove()
        return taken[0][:, self.config.prefix_tokens :]
