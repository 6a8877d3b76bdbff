"""Tokenizers built in memory, with the pre-tokenizers, special tokens and ids of real ones.

Their vocabularies hold the bytes or characters and the few words that tests write out; everything
else falls apart into bytes. No merges are needed where a whole word may be looked up
(`ignore_merges`); SentencePiece has no words, so the Llama 2 look-alike has merges.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Sequence, Split
from transformers import PreTrainedTokenizerFast

from align.demo.tokenizer import QWEN_SPLIT

QWEN_SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|image_pad|>": 151655,
}
QWEN_WORDS = {
    "system": 8948,
    "user": 872,
    "assistant": 77091,
    "You": 2610,
    "Ġare": 525,
    "Ġa": 264,
    "Ġhelpful": 10950,
    "Ġassistant": 17847,
    "ĊĊ": 271,
    ".Ċ": 624,
}
QWEN_IMAGE = QWEN_SPECIALS["<|image_pad|>"]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|reserved_special_token_0|>": 128002,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
}
LLAMA3_WORDS = {"system": 9125, "user": 882, "assistant": 78191, "ĊĊ": 271, ".Ċ": 627}

# Of Llama 2: characters have the ids that they have there only where a test writes them out.
LLAMA2_MERGES = {
    ("▁", "A"): 319,
    ("S", "S"): 1799,
    ("I", "S"): 3235,
    ("IS", "T"): 9047,
    ("A", "N"): 2190,
    ("AN", "T"): 13566,
    ("▁", "U"): 501,
    ("▁U", "S"): 3148,
    ("E", "R"): 1001,
    ("U", "S"): 3308,
}
LLAMA2_CHARACTERS = {"▁": 29871, ":": 29901, "?": 29973, ".": 29889, "A": 29909, "S": 29903}


def byte_order() -> list[str]:
    """The 256 letters that stand for bytes, as GPT-2 numbers them: printable bytes, then others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def qwen3(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Qwen3's: byte-level, NFC, no begin-of-text, eos = pad."""
    tokenizer = _byte_level(QWEN_SPLIT, QWEN_WORDS, QWEN_SPECIALS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    return _fast(tokenizer, chat_template, eos_token=end, pad_token=end)


def llama3(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Llama 3's: byte-level, with begin-of-text, and offsets without their blanks."""
    tokenizer = _byte_level(LLAMA3_SPLIT, LLAMA3_WORDS, LLAMA3_SPECIALS)
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, LLAMA3_SPECIALS[begin])]
            ),
        ]
    )
    return _fast(tokenizer, chat_template, bos_token=begin, eos_token="<|end_of_text|>")


def llama2(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Llama 2's and Vicuna's: SentencePiece, with begin-of-text, a blank in front of a text but
    not behind a special token.
    """
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= LLAMA2_CHARACTERS
    free = iter(range(30000, 31000))
    vocab |= {chr(c): next(free) for c in range(33, 127) if chr(c) not in vocab}
    vocab |= {a + b: index for (a, b), index in LLAMA2_MERGES.items()}
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=list(LLAMA2_MERGES), byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _fast(tokenizer, chat_template, **names)


def _byte_level(split: str, words: dict[str, int], specials: dict[str, int]) -> Tokenizer:
    vocab = {letter: i for i, letter in enumerate(byte_order())} | words | specials
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(split), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    return tokenizer


def _fast(tokenizer: Tokenizer, chat_template: str | None, **names: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = chat_template
    return fast
