"""Texts as windows of tokens, characters or words, and what each held-out token costs under an n-gram of the rest.

Tokens joined are the text again, spaces and line ends included: a word is kept with the space before it, and a word
outside the vocabulary is spelled in characters. So the nats of a text, divided by its characters, compare across
vocabularies. A character that the training part does not have is `UNKNOWN`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.options import DataOptions, UserError
from . import ngram
from .dataset import DataSet, Memory, choose_split, filesystem, reason_of
from .description import TokenDescription

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
HELD_OUT = 0.1  # of the text, its end
PIECES = re.compile(r" ?\w+(?:['’]\w+)*| ?[^\w\s]|\s")  # words and signs with the space before them; all of a text


class Tokenizer:
    """Text to ids and back, by a vocabulary."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = vocabulary
        self.ids = {token: index for index, token in enumerate(vocabulary)}

    def unknown(self, text: str) -> list[str]:
        """The characters of a text that can only be spelled as `UNKNOWN`, or not at all."""
        missing = {c for piece in set(PIECES.findall(text)) - self.ids.keys() for c in piece if c not in self.ids}
        return sorted(missing)

    def encode(self, text: str) -> list[int]:
        """Raises KeyError for an unknown character where the vocabulary has no `UNKNOWN`."""
        pieces = PIECES.findall(text)
        spelled = {piece: self._spelled(piece) for piece in set(pieces)}
        return list(itertools.chain.from_iterable(spelled[piece] for piece in pieces))

    def _spelled(self, piece: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        return [self.ids[c if c in self.ids else UNKNOWN] for c in piece]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.vocabulary[index] for index in ids)


def vocabulary_of(text: str, words: int) -> tuple[str, ...]:
    """All characters of a text and `UNKNOWN`, then so many of its most frequent words.

    A word that occurs once is none of them: what is rare must be spelled in training too.
    """
    characters = sorted({*text, UNKNOWN})
    counts = Counter(PIECES.findall(text)) if words else Counter()
    frequent = (piece for piece, count in counts.most_common() if count > 1 and len(piece) > 1)
    return (*characters, *itertools.islice(frequent, words))


def tinyshakespeare(options: DataOptions, root: str, split: str) -> DataSet:
    """A megabyte of Shakespeare (Karpathy 2015), one file."""
    fs, base = filesystem(root)
    path = f"{base}/tinyshakespeare.txt"
    if not fs.isfile(path):
        raise UserError(
            f"data.root: no tinyshakespeare.txt in {root!r}: put it there (data/tinyshakespeare/input.txt of "
            f"github.com/karpathy/char-rnn), or set data.root or TRAINER_DATA to the folder that has it"
        )
    return _data_set(options, _read(fs, path), path, split)


def text(options: DataOptions, root: str, split: str) -> DataSet:
    """A text file, or all *.txt of a folder and the folders in it, in the order of their paths."""
    fs, base = filesystem(root)
    if fs.isfile(base):
        return _data_set(options, _read(fs, base), root, split)
    if not fs.isdir(base):
        raise UserError(f"data.root: no file or folder {root!r}: set it to a text file, or to a folder of *.txt files")
    paths = sorted(str(path) for path in fs.glob(f"{base}/**/*.txt"))
    if not paths:
        raise UserError(f"data.root: no *.txt in {root!r}: a text of another name is read where data.root is the file")
    texts = (_read(fs, path) for path in paths)
    return _data_set(options, "".join(t if t.endswith("\n") else f"{t}\n" for t in texts), root, split)


def _read(fs: Any, path: str) -> str:
    try:
        content: str = fs.cat_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.root: {path} is not UTF-8 (byte {error.start}): convert it, for example with iconv -t UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"data.root: {path} cannot be read: {reason_of(error)}") from None
    return content.replace("\r\n", "\n")


def _data_set(options: DataOptions, text: str, where: str, split: str) -> DataSet:
    """The windows of a text, each with the token before its first; what is left behind the last one is not used."""
    held_out = choose_split(split, ["train", "val"], options.name)
    cut = int(len(text) * (1 - HELD_OUT))  # in characters: the same end of the text for every vocabulary
    texts = {"train": text[:cut], "val": text[cut:]}
    words = options.vocabulary if options.level == "word" else 0
    vocabulary = vocabulary_of(texts["train"], words)
    tokenizer = Tokenizer(vocabulary)
    train, other = (torch.tensor(tokenizer.encode(texts[part]), dtype=torch.int64) for part in ("train", held_out))
    for part, tokens in (("train", train), (held_out, other)):
        if len(tokens) <= options.length:
            raise UserError(
                f"data.length: a window of {options.length} tokens and the one before it do not fit into the {part} "
                f"part of {where!r}, which has {len(tokens)}: lower data.length or take a longer text"
            )
    fields = {"tokens": _windows(other, options.length)}
    if options.ngram:
        nats = ngram.nats(train.numpy(), other.numpy(), len(vocabulary), options.ngram)
        fields["ngram_nats"] = _windows(torch.from_numpy(nats), options.length)[:, 1:]
    parts = Memory({"tokens": _windows(train, options.length)}, ()), Memory(fields, ())
    description = TokenDescription(
        options.name, len(parts[0]), len(parts[1]), vocabulary, options.length, cut / len(train)
    )
    return DataSet(description, *parts, held_out, streams=True)


def _windows(values: Tensor, length: int) -> Tensor:
    return values.unfold(0, length + 1, length)
