"""Texts as arrays of words, the order in which a run reads them, and plain baselines.

Needs numpy alone. A text is a row of words with an end-of-sentence mark after each line; it is cut
into columns of equal length, which are read side by side.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from darts_jax.files import write_text
from darts_jax.genotype import nearest

UNKNOWN, END = "<unk>", "<eos>"
SPLITS = ("train", "valid", "test")
# Names that a split's file may have, for Penn Treebank and WikiText-2 as they are handed around.
FILES = ("{}.txt", "ptb.{}.txt", "wiki.{}.tokens")

SPLIT_SEED = 0  # of the embedded text, whose topics are sorted
MIN_COUNT = 3  # of a word of the embedded text to be in its vocabulary
RULE = re.compile(r"^[^\w\n]+$", re.MULTILINE)  # under a heading; it is no sentence


class Corpus(NamedTuple):
    """A text in three parts.

    Attributes:
      name: as given to `load`.
      train, valid, test: int32 [N], words by their place in the vocabulary.
      characters: number of characters of each part, end marks counted as one.
      vocabulary: the words; `<unk>` stands for every other.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    characters: Mapping[str, int]
    vocabulary: tuple[str, ...]


def fingerprint(corpus: Corpus) -> str:
    """16 characters that tell a text from another one."""
    digest = hashlib.sha256("\n".join(corpus.vocabulary).encode())
    for part in (corpus.train, corpus.valid, corpus.test):
        digest.update(f" {part.shape} ".encode() + np.ascontiguousarray(part, np.int32).data)
    return digest.hexdigest()[:16]


class Windows(NamedTuple):
    """The pieces of an epoch: int32 [steps] each, the first row of a piece and its length."""

    starts: np.ndarray
    lengths: np.ndarray


def load(name: str, path: str | Path | None = None, limit: int | None = None) -> Corpus:
    """Loads a text by its name, one of `NAMES`.

    `pydoc` comes with Python: the topics of its `help`, about 80,000 words and marks, which differ
    a little from version to version of Python. The others are read from a folder.

    Args:
      name: of the text.
      path: the folder, for all but `pydoc`.
      limit: how many words of each part to keep, the first ones; None for all.

    Raises:
      ValueError: if the name is unknown, the folder or one of its files is missing, or a file is
        not UTF-8 or holds less than two lines.
    """
    check(name, path)
    if limit is not None and limit < 2:
        raise ValueError(f"a limit of {limit} words leaves nothing to predict; give at least 2")
    lines, min_count = (_pydoc(), MIN_COUNT) if name == "pydoc" else (_folder(Path(path)), 1)
    words = {split: _words(lines[split])[:limit] for split in SPLITS}
    vocabulary = make_vocabulary(words["train"], min_count)
    characters = {split: sum(map(_length, words[split])) for split in SPLITS}
    arrays = (encode(words[split], vocabulary) for split in SPLITS)
    return Corpus(name, *arrays, MappingProxyType(characters), vocabulary)


def check(name: str, path: str | Path | None) -> None:
    """Raises a ValueError for an unknown text, or one that needs a folder and has none."""
    if name not in NAMES:
        raise ValueError(f"unknown text {name!r}; use one of: {nearest(name, NAMES)}")
    if name != "pydoc" and path is None:
        raise ValueError(
            f"text {name!r} is read from a folder of train, valid and test files; name it by"
            " --data.path"
        )


def make_vocabulary(words: Iterable[str], min_count: int = 1) -> tuple[str, ...]:
    """The words that occur often enough, most frequent first, with `<unk>` and `<eos>`."""
    counts = Counter(words)
    for mark in (UNKNOWN, END):
        counts[mark] = max(counts[mark], min_count)
    kept = [word for word, count in counts.items() if count >= min_count]
    return tuple(sorted(kept, key=lambda word: (-counts[word], word)))


def encode(words: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    """int32 [N]: the place of each word in the vocabulary; that of `<unk>` for one it lacks."""
    places = {word: i for i, word in enumerate(vocabulary)}
    unknown = places[UNKNOWN]
    return np.array([places.get(word, unknown) for word in words], np.int32)


def decode(tokens: Iterable[int], vocabulary: Sequence[str]) -> str:
    """The words as text, one sentence a line."""
    words = (vocabulary[token] for token in tokens)
    lines = " ".join("\n" if word == END else word for word in words).split("\n")
    return "\n".join(line.strip() for line in lines)


def save_vocabulary(vocabulary: Sequence[str], path: str | Path) -> None:
    """Writes a vocabulary to a JSON file, whole or not at all.

    Raises:
      ValueError: if the file is there and holds another.
    """
    path, content = Path(path), json.dumps(list(vocabulary), ensure_ascii=False, indent=0) + "\n"
    if not path.exists():
        write_text(path, content)
    elif path.read_text("utf-8") != content:
        raise ValueError(
            f"{path} is not the vocabulary of this text; continue with the text that it was made"
            " from, or give another folder"
        )


def columns(tokens: np.ndarray, batch: int) -> np.ndarray:
    """A text as int32 [N // batch, batch], each column going on where the one before ends.

    Raises:
      ValueError: if a column would hold less than two words.
    """
    length = len(tokens) // batch if batch > 0 else 0
    if length < 2:
        raise ValueError(
            f"a text of {len(tokens)} words gives no {batch} columns of 2 words or more; give a"
            f" batch size of 1 to {max(1, len(tokens) // 2)}"
        )
    return np.ascontiguousarray(tokens[: length * batch].reshape(batch, length).T)


def search_windows(seed: int, epoch: int, rows: int, length: int) -> Windows:
    """The windows of a search's epoch: most of this length, one in twenty of half of it.

    An epoch is a fixed number of windows, so it ends a little before the text where some are short.

    Args:
      seed, epoch: fix the order.
      rows: of the columns that are read.
      length: in rows.
    """
    steps = num_windows(rows, length)
    short = np.random.default_rng((seed, epoch)).random(steps) >= LONG_SHARE
    return _windows(np.where(short, max(length // 2, 1), length), rows)


def training_windows(seed: int, epoch: int, rows: int, length: int) -> Windows:
    """The windows of a training's epoch: normal about this length, or one in twenty about half.

    With a deviation of 5, and within 5 and length + 20 rows. Args: as for `search_windows`.
    """
    steps = num_windows(rows, length)
    rng = np.random.default_rng((seed, epoch))
    mean = np.where(rng.random(steps) < LONG_SHARE, length, length / 2)
    drawn = rng.normal(mean, LENGTH_DEVIATION).astype(int)
    low, high = min(LENGTH_MIN, length), length + LENGTH_EXTRA
    return _windows(np.clip(drawn, low, min(high, rows - 1)), rows)


def num_windows(rows: int, length: int) -> int:
    """Windows in an epoch.

    Raises:
      ValueError: if the columns hold no window of this length and the words one later.
    """
    if not 0 < length < rows:
        raise ValueError(
            f"columns of {rows} words hold no window of {length} and the word after it; give a"
            f" length of 1 to {rows - 1}, or a smaller batch"
        )
    return (rows - 1) // length


# Sections 3.1 and A.1.2 of arXiv 1806.09055, and its code.
LONG_SHARE = 0.95
LENGTH_DEVIATION = 5.0
LENGTH_MIN, LENGTH_EXTRA = 5, 20


def _windows(lengths: np.ndarray, rows: int) -> Windows:
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    starts = np.minimum(starts, rows - 1 - lengths)
    return Windows(starts.astype(np.int32), lengths.astype(np.int32))


def consecutive(text: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All of a text in columns, in windows of one length.

    Args:
      text: int32 [N, B].
      length: of a window, in rows.

    Returns:
      tokens, targets: int32 [windows, length, B], the last window filled up with 0.
      valid: bool [windows, length], False where it is filled up.
    """
    count = -(-(len(text) - 1) // length)
    fill = np.zeros((count * length - (len(text) - 1), text.shape[1]), np.int32)
    tokens, targets = (np.concatenate([part, fill]) for part in (text[:-1], text[1:]))
    valid = np.arange(count * length) < len(text) - 1
    shape = (count, length, text.shape[1])
    return tokens.reshape(shape), targets.reshape(shape), valid.reshape(count, length)


# Baselines.


def unigram_perplexity(corpus: Corpus, split: str = "test") -> float:
    """Perplexity of the words' frequencies in the training text, each count one larger.

    `<unk>` counts as a word like any other.
    """
    text = getattr(corpus, split)
    return float(np.exp(-np.log(_unigram(corpus)[text[1:]]).mean()))


def bigram_perplexity(corpus: Corpus, split: str = "test") -> float:
    """Perplexity of frequencies of pairs in the training text, mixed with those of single words.

    The weight is the one of 19 that suits the validation text best. `<unk>` counts as a word like
    any other.
    """

    def probabilities(split: str, weight: float) -> np.ndarray:
        text = getattr(corpus, split)
        keys, found = text[:-1].astype(np.int64) * size + text[1:], np.zeros(len(text) - 1)
        places = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
        found = np.where(pairs[places] == keys, counts[places], 0) / np.maximum(
            firsts[text[:-1]], 1
        )
        return weight * found + (1 - weight) * unigram[text[1:]]

    size, train = len(corpus.vocabulary), corpus.train
    unigram, firsts = _unigram(corpus), np.bincount(train[:-1], minlength=size)
    pairs, counts = np.unique(train[:-1].astype(np.int64) * size + train[1:], return_counts=True)
    weights = np.arange(1, 20) / 20
    best = max(weights, key=lambda weight: np.log(probabilities("valid", weight)).sum())
    return float(np.exp(-np.log(probabilities(split, best)).mean()))


def _unigram(corpus: Corpus) -> np.ndarray:
    counts = np.bincount(corpus.train, minlength=len(corpus.vocabulary)) + 1
    return counts / counts.sum()


def bits_per_character(nats_per_token: float, corpus: Corpus, split: str) -> float:
    """Cross-entropy of a part of the text in bits per character of it, end marks counted as one.

    `<unk>` is predicted as one word, whichever word it stands for, while the characters are those
    of the word that the text has there: its spelling costs nothing. Not to be compared with models
    of characters, nor between vocabularies.
    """
    tokens = len(getattr(corpus, split))
    return nats_per_token * tokens / corpus.characters[split] / float(np.log(2))


# Reading.


def _words(lines: Sequence[Sequence[str]]) -> list[str]:
    return [word for line in lines for word in (*line, END)]


def _length(word: str) -> int:
    return 1 if word == END else len(word) + 1  # and the space after it


def _pydoc() -> dict[str, list[list[str]]]:
    """The topics in an order of their own, lower case: 80% to train, 10% to validate and test.

    A paragraph makes a line, and each is taken once: topics repeat a fifth of their paragraphs,
    which would be known from training.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    paragraphs = [
        tuple(re.findall(r"\w+|[^\w\s]", paragraph.lower()))
        for i in order
        for paragraph in re.split(r"\n\s*\n", re.sub(RULE, "", topics[names[i]]))
    ]
    lines = [list(words) for words in dict.fromkeys(paragraphs) if words]
    bounds = np.cumsum([len(line) for line in lines])
    first, second = np.searchsorted(bounds, [0.8 * bounds[-1], 0.9 * bounds[-1]])
    parts = lines[:first], lines[first:second], lines[second:]
    return dict(zip(SPLITS, parts, strict=True))


def _folder(path: Path) -> dict[str, list[list[str]]]:
    if not path.is_dir():
        raise ValueError(
            f"{path} is no folder; give the one that holds train, valid and test files"
        )
    forms = [form for form in FILES if any(map(Path.is_file, _files(path, form)))]
    if len(forms) > 1:
        names = " and ".join(form.format("*") for form in forms)
        raise ValueError(f"{path} holds texts named in two ways, {names}; move those of one away")
    files = _files(path, *forms) if forms else ()
    for i, split in enumerate(SPLITS):
        if not (files and files[i].is_file()):
            names = ", ".join(form.format(split) for form in forms or FILES)
            raise ValueError(f"{path} holds no {split} text; put it there as {names}")
    return dict(zip(SPLITS, map(_file, files), strict=True))


def _files(path: Path, form: str) -> tuple[Path, ...]:
    return tuple(path / form.format(split) for split in SPLITS)


def _file(path: Path) -> list[list[str]]:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; convert the file, as by iconv -t utf-8"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a readable file") from error
    lines = [line.split() for line in text.removesuffix("\n").split("\n")]
    if sum(map(bool, lines)) < 2:
        raise ValueError(f"{path} holds less than two lines of text; give a whole text")
    return lines


NAMES = ("pydoc", "ptb", "wikitext2")
