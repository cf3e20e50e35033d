"""Texts: vocabulary, reading order, baselines, and what is wrong with a folder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from darts_jax import text
from darts_jax.text import END, UNKNOWN, Corpus

LINES = {"train": "a b a\nc a b\n", "valid": "a b\nd a\n", "test": "b a c\na\n"}


def write_folder(folder, form="{}.txt", lines=LINES):
    folder.mkdir(exist_ok=True)
    for split, content in lines.items():
        (folder / form.format(split)).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return folder


@pytest.fixture(scope="module")
def pydoc():
    return text.load("pydoc")


def test_a_fingerprint_tells_texts_apart():
    corpus = text.load("pydoc", limit=100)
    assert text.fingerprint(corpus) == text.fingerprint(text.load("pydoc", limit=100))
    others = [
        text.load("pydoc", limit=101),
        corpus._replace(train=corpus.train[::-1]),
        corpus._replace(vocabulary=corpus.vocabulary[::-1]),
        corpus._replace(test=corpus.valid, valid=corpus.test),
    ]
    assert len({text.fingerprint(other) for other in [corpus, *others]}) == 5


def test_embedded_text_is_english_of_some_length(pydoc):
    sizes = [len(getattr(pydoc, split)) for split in text.SPLITS]
    assert 75_000 < sum(sizes) < 120_000
    np.testing.assert_allclose(np.array(sizes) / sum(sizes), [0.8, 0.1, 0.1], atol=0.02)
    assert 1_500 < len(pydoc.vocabulary) < 2_000
    unknown = pydoc.vocabulary.index(UNKNOWN)
    for split, most in (("train", 0.04), ("valid", 0.1), ("test", 0.1)):
        words = getattr(pydoc, split)
        assert words.dtype == np.int32
        assert words.min() >= 0 and words.max() < len(pydoc.vocabulary)
        assert (words == unknown).mean() < most
        assert 3 < pydoc.characters[split] / len(words) < 6
    assert "the" in pydoc.vocabulary[:20]
    train, *others = (text.decode(getattr(pydoc, split), pydoc.vocabulary) for split in text.SPLITS)
    known = set(train.splitlines())
    for lines in map(str.splitlines, others):  # few paragraphs of twelve words or more
        long = [line for line in lines if len(line.split()) >= 12]
        assert len(long) > 50 and np.mean([line in known for line in long]) < 0.02
    again = text.load("pydoc")
    assert again.vocabulary == pydoc.vocabulary
    np.testing.assert_array_equal(again.train, pydoc.train)


@pytest.mark.parametrize("form", text.FILES)
def test_folder(tmp_path, form):
    corpus = text.load("ptb", write_folder(tmp_path / "texts", form))
    assert set(corpus.vocabulary) == {"a", "b", "c", UNKNOWN, END}
    assert corpus.vocabulary[0] == "a"
    assert text.decode(corpus.train, corpus.vocabulary) == "a b a\nc a b\n"
    assert text.decode(corpus.valid, corpus.vocabulary) == f"a b\n{UNKNOWN} a\n"
    assert corpus.characters == {"train": 14, "valid": 10, "test": 10}


def test_limit_keeps_the_first_words(tmp_path):
    corpus = text.load("ptb", write_folder(tmp_path / "texts"), limit=5)
    assert text.decode(corpus.train, corpus.vocabulary) == "a b a\nc"


def test_vocabulary_is_by_frequency_then_by_name():
    words = "b a c c a b d".split()
    assert text.make_vocabulary(words) == ("a", "b", "c", END, UNKNOWN, "d")
    assert text.make_vocabulary(words, 2) == (END, UNKNOWN, "a", "b", "c")
    assert text.make_vocabulary([UNKNOWN] * 3 + words, 2)[0] == UNKNOWN  # as in Penn Treebank


def test_vocabulary_file(tmp_path):
    vocabulary = ("the", END, "Süß", '"')
    text.save_vocabulary(vocabulary, tmp_path / "vocabulary.json")
    assert tuple(json.loads((tmp_path / "vocabulary.json").read_text())) == vocabulary
    text.save_vocabulary(vocabulary, tmp_path / "vocabulary.json")
    with pytest.raises(ValueError, match="vocabulary.json is not the vocabulary of this text"):
        text.save_vocabulary(vocabulary[1:], tmp_path / "vocabulary.json")
    assert tuple(json.loads((tmp_path / "vocabulary.json").read_text())) == vocabulary


def test_columns_go_on_where_the_one_before_ends():
    rows = text.columns(np.arange(11, dtype=np.int32), 3)
    np.testing.assert_array_equal(rows, [[0, 3, 6], [1, 4, 7], [2, 5, 8]])


@pytest.mark.parametrize("make", [text.search_windows, text.training_windows])
def test_windows_follow_each_other(make):
    rows, length = 2000, 35
    windows = make(0, 3, rows, length)
    assert len(windows.starts) == len(windows.lengths) == text.num_windows(rows, length) == 57
    np.testing.assert_array_equal(windows.starts[1:], np.cumsum(windows.lengths)[:-1])
    assert windows.starts[0] == 0
    assert (windows.starts + windows.lengths < rows).all()  # the word after each is there
    again, other = make(0, 3, rows, length), make(0, 4, rows, length)
    np.testing.assert_array_equal(windows.lengths, again.lengths)
    assert (windows.lengths != other.lengths).any()


def test_lengths_are_those_of_the_original():
    lengths = np.concatenate([text.search_windows(0, e, 40_000, 35).lengths for e in range(20)])
    assert set(lengths) == {35, 17}
    np.testing.assert_allclose((lengths == 35).mean(), 0.95, atol=0.01)
    lengths = np.concatenate([text.training_windows(0, e, 40_000, 35).lengths for e in range(20)])
    assert lengths.min() >= 5 and lengths.max() <= 55
    np.testing.assert_allclose(lengths.mean(), 0.95 * 35 + 0.05 * 17.5 - 0.5, atol=0.3)


def test_windows_of_a_short_text_end_with_it():
    for epoch in range(50):
        windows = text.training_windows(0, epoch, 40, 35)
        assert (windows.starts >= 0).all() and (windows.starts + windows.lengths < 40).all()


@pytest.mark.parametrize("length", [3, 4, 100])
def test_consecutive_windows_hold_all_of_a_text_once(length):
    rows = text.columns(np.arange(1, 30, dtype=np.int32), 2)
    tokens, targets, valid = text.consecutive(rows, length)
    assert tokens.shape == targets.shape == (*valid.shape, 2)
    np.testing.assert_array_equal(tokens[valid], rows[:-1])
    np.testing.assert_array_equal(targets[valid], rows[1:])


def corpus_of(train, valid, test, size):
    arrays = (np.array(x, np.int32) for x in (train, valid, test))
    names = tuple(map(str, range(size)))
    return Corpus("x", *arrays, {"test": 20}, names)


def test_unigram_perplexity_by_hand():
    corpus = corpus_of([0, 0, 1, 0], [0, 1], [1, 0, 2, 0], 3)
    # Counts 3, 1, 0, each one larger: 4/7, 2/7, 1/7; the first word is not predicted.
    expected = math.exp(-(2 * math.log(4 / 7) + math.log(1 / 7)) / 3)
    np.testing.assert_allclose(text.unigram_perplexity(corpus), expected, rtol=1e-12)


def test_bigram_perplexity_by_hand():
    corpus = corpus_of([0, 1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 2], 3)
    # After 0 always 1, after 1 always 0: the validation text asks for the largest weight, 0.95.
    unigram = np.array([4, 3, 1]) / 8
    probabilities = [0.95 * 1 + 0.05 * unigram[0], 0.05 * unigram[2]]
    expected = np.exp(-np.log(probabilities).mean())
    np.testing.assert_allclose(text.bigram_perplexity(corpus), expected, rtol=1e-12)


def test_bigrams_know_more_than_words(pydoc):
    for split in ("valid", "test"):
        unigram, bigram = (
            text.unigram_perplexity(pydoc, split),
            text.bigram_perplexity(pydoc, split),
        )
        assert 100 < unigram < len(pydoc.vocabulary)
        assert 20 < bigram < unigram / 1.5


def test_bits_per_character():
    corpus = corpus_of([0], [0], [0] * 5, 1)
    np.testing.assert_allclose(text.bits_per_character(2 * math.log(2), corpus, "test"), 0.5)


# Bad input.


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "ptb",
            {"train": "a\nb\n", "valid": "a\nb\n"},
            "no test text; put it there as test.txt",
        ),
        ("ptb", LINES | {"valid": ""}, "valid.txt holds less than two lines"),
        ("ptb", LINES | {"test": "a b c\n\n \n"}, "test.txt holds less than two lines"),
        ("ptb", LINES | {"train": b"ab\n\xffc\n"}, "train.txt: byte 3 is not UTF-8; convert"),
    ],
)
def test_bad_folder_is_one_line(tmp_path, name, lines, message):
    folder = write_folder(tmp_path / "texts", lines=lines)
    with pytest.raises(ValueError, match=message) as error:
        text.load(name, folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_two_namings_in_a_folder(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "ptb.valid.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"two ways, \*.txt and ptb.\*.txt; move those of one"):
        text.load("ptb", tmp_path)


def test_a_folder_without_texts(tmp_path):
    message = "holds no train text; put it there as train.txt, ptb.train.txt, wiki.train.tokens"
    with pytest.raises(ValueError, match=message):
        text.load("ptb", tmp_path)


def test_bad_names_and_numbers():
    def refused(message, function, *args):
        with pytest.raises(ValueError, match=message) as error:
            function(*args)
        assert "\n" not in str(error.value)

    refused("unknown text 'pidoc'; use one of: pydoc", text.load, "pidoc")
    refused("'ptb' is read from a folder .* --data.path", text.load, "ptb")
    refused("nowhere is no folder", text.load, "ptb", Path("nowhere"))
    refused("limit of 1 words leaves nothing", text.load, "pydoc", None, 1)
    refused("text of 7 words gives no 4 columns .* 1 to 3", text.columns, np.arange(7), 4)
    refused("no 0 columns", text.columns, np.arange(7), 0)
    refused("columns of 35 words hold no window of 35 .* 1 to 34", text.num_windows, 35, 35)
    refused("no window of 0", text.num_windows, 35, 0)
