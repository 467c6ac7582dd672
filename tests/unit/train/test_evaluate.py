"""Names and figures of held-out sets."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dist_transformer.config import DataConfig, build_config
from dist_transformer.parallel.cross_entropy import TokenLoss
from dist_transformer.train.evaluate import Sample, count_sequences, measured, set_name
from dist_transformer.train.hooks import write_samples


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("shards/multi30k-en-de", "multi30k_en_de"),
        ("shards/a.b c/", "a_b_c"),
        ("/data/books", "books"),
        ("shards/../other", "other"),
        ("/", "held_out"),
        ("shards/größe", "gr__e"),
    ],
)
def test_set_name(folder: str, name: str) -> None:
    data = DataConfig(train="x", eval=folder)
    assert set_name(data, data.corpora()[0]) == name


def test_set_names_of_a_mixture_are_the_corpora() -> None:
    parts = [{"train": "shards/a b", "eval": "held"}, {"train": "c", "eval": "held", "name": "news/2024"}]
    data = DataConfig(mixture=parts)
    assert [set_name(data, corpus) for corpus in data.corpora()] == ["a_b", "news_2024"]


def test_sequences_are_counted_by_segment() -> None:
    """Two samples of a row, one of them wrong at one token; a wrong one alone; a row of padding."""
    segments = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 3, 3]])
    is_correct = (segments > 0).clone()
    is_correct[0, 3] = is_correct[1, 0] = is_correct[3, 1] = False
    # Ranks that share rows may have padded them to an even length.
    padded = F.pad(is_correct, (0, 1))
    nothing = torch.zeros(())
    loss = TokenLoss(nothing, nothing, padded.sum(), (segments > 0).sum(), padded.flatten())
    assert count_sequences(loss, segments).tolist() == [3.0, 6.0]


def test_what_an_evaluation_measures() -> None:
    data = {"mixture": [
        {"train": "a", "eval": "x", "name": "news", "objective": "pairs"},
        {"train": "b", "eval": "y", "name": "books"},
        {"train": "c", "name": "without"},
    ]}  # fmt: skip
    tree = {"run": {"dir": "r"}, "data": data, "train": {"steps": 1}}
    scored = {"sentences": 9, "metrics": ["sequence_accuracy", "cer", "bleu"]}
    plain = ["eval/news/loss", "eval/news/accuracy", "eval/books/loss", "eval/books/accuracy"]
    assert measured(build_config(tree)) == plain
    assert measured(build_config({**tree, "evaluate": scored})) == [
        *plain[:2], "eval/news/sequence_accuracy", "eval/news/bleu", "eval/news/cer",
        *plain[2:], "eval/books/sequence_accuracy",
    ]  # fmt: skip


def test_samples_are_three_lines_each(tmp_path: Path) -> None:
    samples = [Sample("a\nb", "c", ("d", "x")), Sample("e", "", ("f\r\ng",))]
    path = write_samples(tmp_path, 12, samples)
    assert path == tmp_path / "samples" / "step-00000012.txt"
    assert write_samples(tmp_path, 12, samples, "news").name == "step-00000012-news.txt"
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    assert [len(block.strip("\n").splitlines()) for block in blocks] == [3, 3]
    assert "source:    a⏎b" in blocks[0]
    assert "reference: f⏎g" in blocks[1]
