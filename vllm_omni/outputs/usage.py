"""What a request is counted as, read from its pipeline. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def text_tokens(pipeline: Any, arguments: Mapping[str, Any]) -> int:
    """Tokens of prompt and negative prompt, without padding, for the text encoder that reads most of them."""
    texts = [arguments.get(name) for name in ("prompt", "negative_prompt")]
    readers = [reader for name in TOKENIZERS if (reader := _tokenizer(pipeline, name)) is not None]
    limits = [reader.model_max_length for reader in readers]
    if limits:  # of several, the last is the one that a longer or shorter sequence can be asked of
        limits[-1] = min(limits[-1], arguments.get("max_sequence_length") or limits[-1])
    counts = [
        sum(min(len(read(text)["input_ids"]), limit) for text in texts if text)
        for read, limit in zip(readers, limits, strict=True)
    ]
    return max(counts, default=0)


def _tokenizer(pipeline: Any, name: str) -> PreTrainedTokenizerBase | None:
    """A tokenizer of the pipeline; a processor in its place has one inside."""
    reader = getattr(pipeline, name, None)
    if isinstance(reader, ProcessorMixin):
        reader = getattr(reader, "tokenizer", None)
    return reader if isinstance(reader, PreTrainedTokenizerBase) else None
