"""Texts: tokens, windows, what is held out, and the n-gram that each language model stands beside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.options import DataOptions
from trainer.data import ngram
from trainer.data.dataset import DataSet, Memory
from trainer.data.description import TokenDescription
from trainer.data.sources import open_data
from trainer.data.text import UNKNOWN, Tokenizer, vocabulary_of

from .test_sources import complaint

SONG = (
    "Sing, o sing: the sea's the sea, and the land is far.\n\n" * 9
    + "Zürich is on land, and so am I; and the song ends."
)


def opened(text: str, tmp_path: Path, **settings: Any) -> tuple[DataSet, TokenDescription]:
    (tmp_path / "own.txt").write_text(text)
    data = open_data(DataOptions(name="text", **{"length": 8, **settings}), str(tmp_path / "own.txt"), "auto")
    assert isinstance(data.description, TokenDescription)
    return data, data.description


def tokens(split: Any) -> list[int]:
    """Those of consecutive windows, each once."""
    assert isinstance(split, Memory)
    windows = split["tokens"]
    assert torch.equal(windows[1:, 0], windows[:-1, -1])  # a window begins with the last token of the one before
    return [int(windows[0, 0]), *windows[:, 1:].flatten().tolist()]


# Tokens


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(0, 20))
def test_tokens_joined_are_the_text(text: str, words: int) -> None:
    tokenizer = Tokenizer(vocabulary_of(text, words))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unknown(text) == []
    assert len(set(tokenizer.vocabulary)) == len(tokenizer.vocabulary)


def test_a_frequent_word_is_a_token_and_any_other_is_spelled() -> None:
    tokenizer = Tokenizer(vocabulary_of(SONG, 3))
    assert tokenizer.vocabulary[-3:] == (" the", " and", " land")
    pieces = [tokenizer.vocabulary[index] for index in tokenizer.encode("land, the far land's")]
    assert pieces == ["l", "a", "n", "d", ",", " the", " ", "f", "a", "r", " ", "l", "a", "n", "d", "'", "s"]


def test_a_character_that_training_never_saw_is_the_unknown_one_and_refused_in_a_prompt() -> None:
    tokenizer = Tokenizer(vocabulary_of("a song", 0))
    assert tokenizer.decode(tokenizer.encode("a €uro")) == f"a {UNKNOWN}{UNKNOWN}{UNKNOWN}o"
    assert tokenizer.unknown("a €uro song") == ["r", "u", "€"]


# Windows and splits


def test_the_last_tenth_of_the_characters_is_held_out_for_every_vocabulary(tmp_path: Path) -> None:
    cut = int(len(SONG) * 0.9)
    for own in ({}, {"level": "word", "vocabulary": 5}, {"level": "word"}):
        data, description = opened(SONG, tmp_path, **own)
        tokenizer = Tokenizer(description.vocabulary)
        for part, text in ((data.train, SONG[:cut]), (data.held_out, SONG[cut:])):
            whole = tokenizer.encode(text)
            assert tokens(part) == whole[: len(part) * 8 + 1]
            assert len(whole) - 1 - len(part) * 8 < 8  # what is left is less than a window
        assert (data.split, data.streams) == ("val", True)
        assert description.characters == cut / len(tokenizer.encode(SONG[:cut]))
        assert (description.train_size, description.eval_size) == (len(data.train), len(data.held_out))


def test_the_vocabulary_is_that_of_the_training_part_in_one_order(tmp_path: Path) -> None:
    _, description = opened(SONG, tmp_path)
    assert description.vocabulary == tuple(sorted({*SONG[: int(len(SONG) * 0.9)], UNKNOWN}))
    assert "Z" not in description.vocabulary


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_folder_is_read_in_the_order_of_its_paths(where: str, tmp_path: Path) -> None:
    root = str(tmp_path / "texts") if where == "file" else "memory://texts"
    files = {"b/two.txt": b"zwei zwei zwei zwei", "a.txt": b"\xef\xbb\xbfone one\r\none one one", "notes.md": b"\xff"}
    for name, content in files.items():
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(content)
    data = open_data(DataOptions(name="text", length=1), root, "auto")
    assert isinstance(data.description, TokenDescription)
    text = Tokenizer(data.description.vocabulary).decode(tokens(data.train))
    assert "one one\none one one\nzwei zwei zwei zwei\n".startswith(text)
    assert len(text) == 36


# What a user may get wrong


@pytest.mark.parametrize(
    ("content", "settings", "mistake"),
    [
        ("ten times one", {"length": 64},
         "data.length: a window of 64 tokens and the one before it do not fit into the train part of '{root}', which "
         "has 11: lower data.length or take a longer text"),
        ("ten times one", {"length": 2},
         "data.length: a window of 2 tokens and the one before it do not fit into the val part of '{root}', which has "
         "2: lower data.length or take a longer text"),
        ("", {}, "data.length: a window of 64 tokens and the one before it do not fit into the train part of '{root}', "
                 "which has 0: lower data.length or take a longer text"),
        ("schön".encode("latin-1"), {},
         "data.root: {root} is not UTF-8 (byte 3): convert it, for example with iconv -t UTF-8"),
        ("long enough".encode("utf-16"), {},
         "data.root: {root} is not UTF-8 (byte 0): convert it, for example with iconv -t UTF-8"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_read_is_one_line(
    content: str | bytes, settings: dict[str, Any], mistake: str, tmp_path: Path
) -> None:
    root = tmp_path / "own.txt"
    root.write_bytes(content.encode() if isinstance(content, str) else content)
    assert complaint("text", root, **settings) == mistake.format(root=root)


def test_a_text_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# no text")
    assert complaint("text", tmp_path / "none") == (
        f"data.root: no file or folder '{tmp_path}/none': set it to a text file, or to a folder of *.txt files"
    )
    assert complaint("text", tmp_path) == (
        f"data.root: no *.txt in '{tmp_path}': a text of another name is read where data.root is the file"
    )
    assert complaint("tinyshakespeare", tmp_path).startswith(
        f"data.root: no tinyshakespeare.txt in '{tmp_path}': put it there ("
    )
    assert complaint("text", tmp_path / "notes.md", "test", length=1) == (
        "evaluate.split: text has no 'test' split; it has: train, val: add one or set evaluate.split"
    )


# The n-gram


def test_the_ngram_is_a_distribution_over_every_vocabulary() -> None:
    train = np.array(torch.randint(5, (200,), generator=torch.Generator().manual_seed(0)))
    for order in (1, 2, 4):
        for context in ([0, 1, 2], [4, 4, 4], [6, 6, 6], [train[-3], train[-2], train[-1]]):  # 5 and 6: never seen
            chances = [np.exp(-ngram.nats(train, np.array([*context, token]), 7, order)[-1]) for token in range(7)]
            assert sum(chances) == pytest.approx(1, abs=1e-12)
            assert min(chances) > 0


def slowly(train: list[int], gram: tuple[int, ...], vocabulary: int, highest: int) -> float:
    """The probability of the last token of a gram behind the others by Kneser-Ney, term by term."""
    if not gram:
        return 1 / vocabulary

    def counted(length: int) -> Counter[tuple[int, ...]]:
        return Counter(tuple(train[i : i + length]) for i in range(len(train) - length + 1))

    counts, size = counted(len(gram)), len(gram)
    if size < highest:
        preceded = Counter(longer[1:] for longer in counted(size + 1))
        counts = Counter({known: max(preceded[known], 1) for known in counts})
    once, twice = (sum(count == n for count in counts.values()) for n in (1, 2))
    discount = once / (once + 2 * twice) if once else 0.5
    lower = slowly(train, gram[1:], vocabulary, highest)
    following = [count for known, count in counts.items() if known[:-1] == gram[:-1]]
    if not following:
        return lower
    return (max(counts[gram] - discount, 0) + discount * len(following) * lower) / sum(following)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_ngram_is_interpolated_kneser_ney(order: int) -> None:
    generator = torch.Generator().manual_seed(1)
    train, held_out = (torch.randint(4, (size,), generator=generator).tolist() for size in (60, 40))
    nats = ngram.nats(np.array(train), np.array(held_out), 5, order)
    grams = [tuple(held_out[max(0, end - order) : end]) for end in range(1, len(held_out) + 1)]
    assert nats.tolist() == pytest.approx([-np.log(slowly(train, gram, 5, order)) for gram in grams], rel=1e-12)


def test_each_held_out_token_has_its_nats(tmp_path: Path) -> None:
    data, description = opened(SONG, tmp_path, ngram=3)
    assert isinstance(data.train, Memory)
    assert isinstance(data.held_out, Memory)
    encode = Tokenizer(description.vocabulary).encode
    cut = int(len(SONG) * 0.9)
    train, held_out = np.array(encode(SONG[:cut])), np.array(encode(SONG[cut:]))
    expected = ngram.nats(train, held_out, len(description.vocabulary), 3)[1:]
    actual = data.held_out["ngram_nats"].flatten()
    assert data.held_out["ngram_nats"].shape == (len(data.held_out), 8)
    assert actual.tolist() == expected[: len(actual)].tolist()
    assert data.train.fields.keys() == {"tokens"}
    assert opened(SONG, tmp_path, ngram=0)[0].held_out.fields.keys() == {"tokens"}  # type: ignore[union-attr]
