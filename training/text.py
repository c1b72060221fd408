"""Trains a text vocabulary: lower-cased byte-level BPE on captions."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nuwa.spec.text import TextTokenizer


def train_text_tokenizer(
    captions: Iterable[str], vocabulary_size: int, length: int = 77
) -> TextTokenizer:
    """A tokenizer of at most `vocabulary_size` ids, all 256 bytes and the specials included.

    The library's trainer may number the same merges differently from run to run: keep the file.
    """
    specials = 3
    if vocabulary_size < 256 + specials:
        raise ValueError(f"vocabulary_size {vocabulary_size} is not at least {256 + specials}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((caption.lower() for caption in captions), trainer)
    return TextTokenizer(bpe, length)
