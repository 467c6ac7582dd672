"""Scores of texts: those of the programs that define them, with one reference and with several."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import pytest
import sacrebleu

from dist_transformer.cli.parsing import METRICS, OBJECTIVES, TOKENIZERS, WEIGHTS
from dist_transformer.config import TextMetric, TokenMetric, Weights
from dist_transformer.config.data import ObjectiveName
from dist_transformer.config.evaluate import Tokenize
from dist_transformer.scoring import group_by_source, lower_is_better, score_texts

OUTPUTS = ["Ein Hund läuft.", "Zwei Männer spielen im Park Ball", "", "Das ist gut , oder ?"]
REFERENCES = ["Ein Hund läuft schnell.", "Zwei Männer spielen Ball im Park.", "Nichts.", "Das ist gut, oder?"]
SINGLE = [[reference] for reference in REFERENCES]
TOKENISED = [
    "two dogs run over the GRASS .",
    "a man is on the roof",
    "the the the the",
    "a red ball , in the air",
]
SEVERAL = [
    ["two dogs run over grass .", "Two dogs are running over the grass ."],
    ["a man on the roof of a house", "a man is up on the roof", "someone is on a roof"],
    ["the cat is on the mat"],
    ["a red ball in the air .", "a ball , red , in the air"],
]


def multi_bleu(outputs: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool) -> float:
    """BLEU as Moses's multi-bleu.perl counts it, of text that is split at spaces."""

    def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    hits, totals, output_length, reference_length = [0] * 4, [0] * 4, 0, 0
    for text, rights in zip(outputs, references, strict=True):
        output, *wanted = ((each.lower() if lowercase else each).split() for each in (text, *rights))
        output_length += len(output)
        reference_length += min((abs(len(each) - len(output)), len(each)) for each in wanted)[1]
        for n in range(1, 5):
            most: Counter[tuple[str, ...]] = Counter()
            for each in wanted:
                most |= ngrams(each, n)
            hits[n - 1] += (ngrams(output, n) & most).total()
            totals[n - 1] += ngrams(output, n).total()
    brevity = min(1.0, math.exp(1 - reference_length / output_length))
    return (
        100
        * brevity
        * math.exp(sum(math.log(hit / total) for hit, total in zip(hits, totals, strict=True)) / 4)
    )


def test_bleu_and_chrf_are_sacrebleus() -> None:
    found = score_texts(OUTPUTS, SINGLE, ("bleu", "chrf"))
    assert found["bleu"].value == sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES]).score
    assert found["chrf"].value == sacrebleu.corpus_chrf(OUTPUTS, [REFERENCES]).score
    assert 0 < found["bleu"].value < found["chrf"].value < 100
    version = sacrebleu.__version__
    assert found["bleu"].signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    perfect = score_texts(REFERENCES, SINGLE, ("bleu", "chrf"))
    assert [score.value for score in perfect.values()] == [pytest.approx(100)] * 2


@pytest.mark.parametrize("lowercase", [False, True])
def test_bleu_without_tokenizer_is_multi_bleus(lowercase: bool) -> None:
    [found] = score_texts(TOKENISED, SEVERAL, ["bleu"], tokenize="none", lowercase=lowercase).values()
    assert found.value == pytest.approx(multi_bleu(TOKENISED, SEVERAL, lowercase), abs=1e-9)
    case = "lc" if lowercase else "mixed"
    assert found.signature.startswith(f"nrefs:var|case:{case}|eff:no|tok:none|smooth:exp")
    # Some word differs in case only.
    assert multi_bleu(TOKENISED, SEVERAL, True) > multi_bleu(TOKENISED, SEVERAL, False)


def test_more_references_never_make_it_worse() -> None:
    firsts = [references[:1] for references in SEVERAL]
    metrics: tuple[TextMetric, ...] = ("exact_match", "rouge_l", "wer", "cer")
    one, all_ = (
        score_texts(TOKENISED, references, metrics, lowercase=True) for references in (firsts, SEVERAL)
    )
    assert all_["rouge_l"].value > one["rouge_l"].value
    assert all_["wer"].value < one["wer"].value


def test_what_is_ignored_does_not_count_and_stands_in_the_signature() -> None:
    outputs, references = ["HH AH0 L OW1"], [["HH AH1 L OW1"]]
    [stressed] = score_texts(outputs, references, ["per"]).values()
    assert stressed.value == 25
    metrics: tuple[TextMetric, ...] = ("per", "exact_match", "bleu")
    for metric, score in score_texts(outputs, references, metrics, tokenize="none", ignore="[0-9]").items():
        assert score.value == pytest.approx(0 if metric == "per" else 100)
        assert score.signature.endswith("|ignored:[0-9]")
    assert "ignored" not in stressed.signature


# By Google's `rouge_score` 0.1.2, rougeL without stemming.
ROUGE_L = [
    ("the cat was found under the bed", "the cat was under the bed", 0.923077),
    ("police kill the gunman", "police killed the gunman", 0.75),
    ("a b c d e f g", "g f e d c b a", 0.142857),
    ("", "something", 0.0),
    ("It's 5-star rated", "its 5 star rating", 0.444444),
]


@pytest.mark.parametrize(("output", "reference", "expected"), ROUGE_L)
def test_rouge_l_is_googles(output: str, reference: str, expected: float) -> None:
    [found] = score_texts([output], [[reference]], ["rouge_l"]).values()
    assert found.value == pytest.approx(100 * expected, abs=1e-4)


def test_rouge_l_takes_the_best_reference_and_the_mean_of_outputs() -> None:
    # rouge_score's score_multi of the first: 0.66667.
    references = [["the cat sat on the mat", "a cat is sitting there"], ["nothing alike"]]
    [found] = score_texts(["a cat sat there", "über größe"], references, ["rouge_l"]).values()
    assert found.value == pytest.approx(100 * 0.6666667 / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        # dog: exact. read: one of the closest's three. cat: one too many. Of the two at distance 1 of `live`, the
        # longer one counts.
        ("per", 100 * (0 + 1 + 1 + 1) / (3 + 3 + 3 + 4)),
        ("wer", 100 * 3 / 13),
        ("exact_match", 25.0),
    ],
)
def test_the_closest_of_several_pronunciations_counts(metric: TextMetric, expected: float) -> None:
    outputs = ["D AO1 G", "R IY1 T", "K AE1 T S", "L IH1 V Z"]
    references = [
        ["D AA1 G", "D AO1 G"],
        ["R EH1 D", "R IY1 D"],
        ["K AE1 T"],
        ["L IH1 V", "L AY1 V Z"],
    ]
    [found] = score_texts(outputs, references, [metric]).values()
    assert found.value == pytest.approx(expected)
    assert found.signature.startswith("nrefs:var|case:mixed|")


def test_character_errors() -> None:
    [found] = score_texts(["abc  d", "xy"], [["abd d"], ["xy"]], ["cer"]).values()
    assert found.value == pytest.approx(100 * 1 / 7)
    [found] = score_texts(["", "b"], [["aa"], ["b"]], ["cer"]).values()
    assert found.value == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(("outputs", "references"), [([], []), (["a"], [[]]), (["a"], [["a"], ["b"]])])
def test_every_output_needs_a_reference(outputs: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="every output needs a reference"):
        score_texts(outputs, references, ["exact_match"])


def test_equal_sources_in_a_row_are_one() -> None:
    grouped = group_by_source(["a", "a", "b", "a"], [["1"], ["2", "3"], ["4"], ["5"]])
    assert grouped.sources == ["a", "b", "a"]
    assert grouped.references == [["1", "2", "3"], ["4"], ["5"]]


def test_which_way_is_better() -> None:
    assert [lower_is_better(f"eval/x/{name}") for name in ("loss", "per", "bleu", "accuracy")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_the_command_knows_what_the_configuration_knows() -> None:
    assert (*get_args(TextMetric), *get_args(TokenMetric)) == METRICS
    assert get_args(Tokenize) == TOKENIZERS
    assert get_args(Weights) == WEIGHTS
    assert set(get_args(ObjectiveName)) == set(OBJECTIVES)
