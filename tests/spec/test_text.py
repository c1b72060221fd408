"""Text tokens: fixed length, any Unicode, nothing a user writes becomes a special token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuwa.spec.text import TextTokenizer
from nuwa.training.text import train_text_tokenizer

CAPTIONS = ["a red 3 on a black background moving left .", "a blue 7 moving up then down ."]
TOKENIZER = train_text_tokenizer(CAPTIONS, 300, 20)


def body(text: str) -> list[int]:
    ids = TOKENIZER.encode(text)
    return ids[1 : int(np.flatnonzero(ids == TOKENIZER.eos)[0])].tolist()


def test_layout_and_lower_case():
    ids = TOKENIZER.encode("A  RED 3\n")
    assert ids.dtype == np.int32
    assert ids.shape == (20,)
    assert ids[0] == TOKENIZER.bos
    assert (ids[TOKENIZER.used(ids) :] == TOKENIZER.pad).all()
    assert ids[TOKENIZER.used(ids) - 1] == TOKENIZER.eos
    assert (ids == TOKENIZER.encode("a red 3")).all()
    assert TOKENIZER.vocabulary_size <= 300


@given(st.text(max_size=300))
def test_any_unicode_encodes_without_special_tokens(text):
    ids = TOKENIZER.encode(text)
    used = TOKENIZER.used(ids)
    assert (ids[1 : used - 1] < TOKENIZER.bos).all()
    assert ids[used - 1] == TOKENIZER.eos


@pytest.mark.parametrize("text", ["<bos>", "<eos> <pad>", "<|endoftext|>", "[PAD]", "\ud800"])
def test_special_tokens_cannot_be_injected(text):
    assert all(token < TOKENIZER.bos for token in body(text))
    assert len(body(text)) >= 1


def test_long_texts_are_cut_and_say_so():
    long = "word " * 100
    assert TOKENIZER.encode(long).shape == (20,)
    assert TOKENIZER.room == 18 < TOKENIZER.count(long)
    fitting = "a red 3"
    assert TOKENIZER.count(fitting) == len(body(fitting)) <= 18


def test_file_round_trip_and_refusals(tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    again = TextTokenizer.from_file(path)
    for text in (*CAPTIONS, "größer 日本 😀"):
        assert (again.encode(text) == TOKENIZER.encode(text)).all()
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="not a tokenizer file"):
        TextTokenizer.from_file(path)
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="nuwa-text-tokenizer/1"):
        TextTokenizer.from_file(path)
    with pytest.raises(ValueError, match="at least 259"):
        train_text_tokenizer(CAPTIONS, 100)
