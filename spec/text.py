"""Text to token ids: lower-cased byte-level BPE through `tokenizers`, fixed length.

Ids of <bos>, <eos> and <pad> lie above the BPE vocabulary, so no text can produce them; bytes are
the alphabet, so any Unicode text encodes. Training a vocabulary is done elsewhere.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .files import write_text

FORMAT = "nuwa-text-tokenizer/1"


class TextTokenizer:
    """bpe: a `tokenizers` model; length: ids per text, <bos> and <eos> included."""

    def __init__(self, bpe: Tokenizer, length: int) -> None:
        if length < 2:
            raise ValueError(f"length {length} leaves no room for <bos> and <eos>")
        self.bpe, self.length = bpe, length
        size = bpe.get_vocab_size(with_added_tokens=True)
        self.bos, self.eos, self.pad = size, size + 1, size + 2

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, the three special ones included."""
        return self.pad + 1

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """int32 [length]: <bos>, the text, <eos>, then <pad>. Longer texts are cut at the end."""
        ids = self._ids(text)[: self.room]
        row = np.full(self.length, self.pad, np.int32)
        row[: len(ids) + 2] = [self.bos, *ids, self.eos]
        return row

    def used(self, ids: npt.NDArray[np.int32]) -> int:
        """How many of a row's ids are not <pad>."""
        return int((ids != self.pad).sum())

    @property
    def room(self) -> int:
        """Most ids of a text that `encode` keeps."""
        return self.length - 2

    def count(self, text: str) -> int:
        """How many ids a text has, without <bos> and <eos>; `encode` drops those beyond `room`."""
        return len(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        plain = " ".join(unicodedata.normalize("NFC", text).lower().split())
        # A lone surrogate cannot be written as UTF-8; it becomes "?".
        plain = plain.encode("utf-8", "replace").decode("utf-8")
        return self.bpe.encode(plain, add_special_tokens=False).ids

    def save(self, path: Path) -> None:
        """Writes one JSON file; atomic."""
        data = {"format": FORMAT, "length": self.length, "bpe": json.loads(self.bpe.to_str())}
        write_text(path, json.dumps(data, ensure_ascii=False) + "\n")

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        """Reads `save`'s file; ValueError or FileNotFoundError naming the file otherwise."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a tokenizer file: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is not a tokenizer file of format {FORMAT!r}")
        try:
            return cls(Tokenizer.from_str(json.dumps(data["bpe"])), int(data["length"]))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} holds no usable BPE model: {error}") from None
