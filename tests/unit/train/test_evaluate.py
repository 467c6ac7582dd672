"""Names and scores of held-out sets."""

from pathlib import Path

import pytest
import sacrebleu

from dist_transformer.config import DataConfig
from dist_transformer.train.evaluate import Sample, score_texts, set_name
from dist_transformer.train.hooks import write_samples

OUTPUTS = ["Ein Hund läuft.", "Zwei Männer spielen im Park Ball", "", "Das ist gut , oder ?"]
REFERENCES = ["Ein Hund läuft schnell.", "Zwei Männer spielen Ball im Park.", "Nichts.", "Das ist gut, oder?"]


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


def test_scores_are_sacrebleus() -> None:
    found = score_texts(OUTPUTS, REFERENCES)
    assert found["bleu"] == sacrebleu.metrics.BLEU().corpus_score(OUTPUTS, [REFERENCES]).score
    assert found["chrf"] == sacrebleu.metrics.CHRF().corpus_score(OUTPUTS, [REFERENCES]).score
    assert 0 < found["bleu"] < found["chrf"] < 100
    assert score_texts(REFERENCES, REFERENCES) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}


def test_samples_are_three_lines_each(tmp_path: Path) -> None:
    samples = [Sample("a\nb", "c", "d"), Sample("e", "", "f\r\ng")]
    path = write_samples(tmp_path, 12, samples)
    assert path == tmp_path / "samples" / "step-00000012.txt"
    assert write_samples(tmp_path, 12, samples, "news").name == "step-00000012-news.txt"
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    assert [len(block.strip("\n").splitlines()) for block in blocks] == [3, 3]
    assert "source:    a⏎b" in blocks[0]
    assert "reference: f⏎g" in blocks[1]
