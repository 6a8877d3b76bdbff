"""The config and tokenizer files of a run's language model, as older readers need them too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from align.errors import InteropError, ModelError
from align.llm import LLMConfig, find_llm
from featcache.files import publish_json
from featcache.quiet import quiet

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def language_config(config: LLMConfig) -> dict[str, Any]:
    """config.json of a run's language model, see `with_old_names`. Raises ModelError."""
    source = find_llm(config.name)
    try:
        with quiet():
            found = AutoConfig.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"llm.name={config.name}: its config.json cannot be read: {str(error).splitlines()[0]}"
        ) from error
    return with_old_names(found)


def with_old_names(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as JSON values, with the names that transformers 4 reads beside those of 5.

    Version 5 writes the rotary base as `rope_parameters`. Version 4 does not read that, and would
    go on with its default of 10,000 where Qwen3 has 1,000,000.
    """
    settings: dict[str, Any] = config.to_dict()
    rope = settings.get("rope_parameters")
    if rope and "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]
        scaled = rope.get("rope_type", "default") != "default"
        rest = {name: value for name, value in rope.items() if name != "rope_theta"}
        settings["rope_scaling"] = rest if scaled else None
    if settings.get("dtype") is not None:
        settings["torch_dtype"] = settings["dtype"]
    settings.pop("_name_or_path", None)
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def copy_tokenizer(config: LLMConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The tokenizer's own files, byte for byte but for its class in tokenizer_config.json.

    That is written where it lacks, as the folder's model no longer says it; a name that only
    transformers 5 knows is replaced by the one that both know.

    Raises InteropError where the copy has not the tokens of `tokenizer`.
    """
    source = find_llm(config.name)

    def find(name: str) -> Path | None:
        found = cached_file(
            source,
            name,
            revision=config.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    for name in TOKENIZER_FILES:
        if file := find(name):
            shutil.copyfile(file, folder / name)
    settings = {}
    if file := find("tokenizer_config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
    kind = settings.get("tokenizer_class") or type(tokenizer).__name__
    kind = "PreTrainedTokenizerFast" if kind == "TokenizersBackend" else kind
    publish_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": kind})
    with quiet():
        copy = AutoTokenizer.from_pretrained(folder)
    before, now = tokenizer.get_vocab(), copy.get_vocab()
    if before != now:
        raise InteropError(
            f"llm.name={config.name}: a copy of its tokenizer files has {len(now):,} tokens, the "
            f"run's has {len(before):,}; save it with transformers' save_pretrained into a folder, "
            "and train with that"
        )
