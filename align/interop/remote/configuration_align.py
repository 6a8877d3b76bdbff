"""The config of a model that `align export --format hf` wrote."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class AlignVlmConfig(PretrainedConfig):
    """A vision encoder, a connector, and a language model.

    vision_config, text_config: of transformers. connector: fields of the core's config. layout:
    those of `LayoutConfig`. num_patches: P, of an image. vision_layer: index of the encoder's
    `hidden_states`, None for its `last_hidden_state`. prefix_tokens: before the first patch, left
    out. padded: whether images were padded to squares. image_token_id: of the slots.
    """

    model_type = "align_vlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        connector: dict[str, Any] | None = None,
        layout: dict[str, Any] | None = None,
        num_patches: int = 0,
        vision_layer: int | None = -2,
        prefix_tokens: int = 0,
        padded: bool = False,
        image_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _config(vision_config)
        self.text_config = _config(text_config)
        self.connector = connector or {}
        self.layout = layout or {}
        self.num_patches = num_patches
        self.vision_layer = vision_layer
        self.prefix_tokens = prefix_tokens
        self.padded = padded
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


def _config(given: Any) -> Any:
    """A config object of the JSON that it was saved as."""
    if not isinstance(given, dict):
        return given
    return AutoConfig.for_model(**given)
