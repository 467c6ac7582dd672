"""The metrics by name: each a function of outputs and their references, with a signature that says how it counted.

All are percentages over the whole corpus. BLEU and chrF are sacreBLEU's own; edit distances and longest common
subsequences are RapidFuzz's.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dist_transformer import __version__
from dist_transformer.config import LOWER_IS_BETTER, TextMetric

References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Score:
    """A metric's value and what it means."""

    value: float
    """Percent."""
    signature: str
    """`key:value` pairs, as sacreBLEU writes them: two scores with one signature may be compared."""


def score_texts(
    outputs: Sequence[str],
    references: References,
    metrics: Sequence[TextMetric],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    ignore: str | None = None,
) -> dict[TextMetric, Score]:
    """Score outputs by each of the metrics.

    Args:
        references: for each output, one or more; outputs need not have equally many.
        tokenize: BLEU's tokenizer, one of sacreBLEU's; `none` for text that is tokenised: the score is then that of
            Moses's multi-bleu.perl.
        lowercase: compare everything in lower case.
        ignore: a regular expression; what it matches, in outputs and references, does not count.

    Raises:
        ValueError: nothing to score, or an output without a reference.
    """
    if not outputs or len(outputs) != len(references) or not all(references):
        raise ValueError("every output needs a reference, and there must be one output at least")
    groups: References = references
    if ignore is not None:
        outputs = [re.sub(ignore, "", output) for output in outputs]
        groups = [[re.sub(ignore, "", each) for each in group] for group in references]
    fixed = _Texts(list(outputs), [list(group) for group in groups], tokenize, lowercase, ignore)
    return {metric: _METRICS[metric](fixed) for metric in metrics}


def lower_is_better(name: str) -> bool:
    """Whether a metric is an error or a loss; `eval/<set>/` may stand before its name."""
    return name.rpartition("/")[2] in LOWER_IS_BETTER


@dataclass(frozen=True)
class _Texts:
    outputs: list[str]
    references: list[list[str]]
    tokenize: str
    lowercase: bool
    ignored: str | None
    """What was taken out of them."""

    @property
    def streams(self) -> list[list[str | None]]:
        """References as sacreBLEU wants them: first ones, second ones, ..; None where there are fewer."""
        return [list(stream) for stream in zip_longest(*self.references)]

    def comparable(self) -> list[tuple[str, list[str]]]:
        """(output, references), in lower case where that is wanted."""
        pairs = zip(self.outputs, self.references, strict=True)
        if not self.lowercase:
            return list(pairs)
        return [(output.lower(), [each.lower() for each in references]) for output, references in pairs]

    def signature(self, **choices: str) -> str:
        counts = {len(references) for references in self.references}
        n_references = str(counts.pop()) if len(counts) == 1 else "var"
        pairs = {"nrefs": n_references, "case": "lc" if self.lowercase else "mixed", **choices}
        return self.signed(
            "|".join(f"{key}:{value}" for key, value in {**pairs, "version": __version__}.items())
        )

    def signed(self, signature: str) -> str:
        """A signature that also says what was taken out."""
        return signature if self.ignored is None else f"{signature}|ignored:{self.ignored}"


def _bleu(texts: _Texts) -> Score:
    """Papineni et al. 2002, of four orders, with the closest reference's length, by sacreBLEU (Post 2018)."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=texts.tokenize, lowercase=texts.lowercase, force=True)
    value = metric.corpus_score(texts.outputs, texts.streams).score
    return Score(float(value), texts.signed(str(metric.get_signature())))


def _chrf(texts: _Texts) -> Score:
    """Popovic 2015: F2 of character 6-grams, by sacreBLEU."""
    from sacrebleu.metrics import CHRF

    metric = CHRF(lowercase=texts.lowercase)
    value = metric.corpus_score(texts.outputs, texts.streams).score
    return Score(float(value), texts.signed(str(metric.get_signature())))


def _exact_match(texts: _Texts) -> Score:
    """Outputs that are one of their references, runs of spaces counted as one."""
    n_right = sum(
        output.split() in [each.split() for each in references] for output, references in texts.comparable()
    )
    return Score(100 * n_right / len(texts.outputs), texts.signature(space="folded"))


def _rouge_l(texts: _Texts) -> Score:
    """Lin 2004, section 3.1, with beta 1: F1 of the longest common subsequence, the best over the references, the mean
    over outputs. Words are runs of letters and digits in lower case, not stemmed: as Google's `rouge_score` in English,
    which knows no other letters.
    """
    pairs = zip(texts.outputs, texts.references, strict=True)
    scores = [max(_f1(_words(output), _words(each)) for each in references) for output, references in pairs]
    signature = texts.signature(case="lc", tok="alphanumeric", stem="no", beta="1")
    return Score(100 * sum(scores) / len(scores), signature)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _f1(output: Sequence[str], reference: Sequence[str]) -> float:
    from rapidfuzz.distance import LCSseq

    common = LCSseq.similarity(output, reference)
    return 2 * common / (len(output) + len(reference)) if common else 0.0


def _error_rate(split: Callable[[str], Sequence[Hashable]], unit: str) -> Callable[[_Texts], Score]:
    """Insertions, deletions and substitutions / length, each output against its closest reference.

    Among references at the same distance the longest counts. Where a word has several pronunciations, this is the
    phoneme error rate of Yao and Zweig 2015, section 3.1.
    """

    def rate(texts: _Texts) -> Score:
        from rapidfuzz.distance import Levenshtein

        n_errors = n_symbols = 0
        for output, references in texts.comparable():
            written = split(output)
            rights = [split(each) for each in references]
            errors, length = min((Levenshtein.distance(written, right), -len(right)) for right in rights)
            n_errors, n_symbols = n_errors + errors, n_symbols - length
        return Score(100 * n_errors / max(1, n_symbols), texts.signature(unit=unit, ref="closest"))

    return rate


_METRICS: dict[TextMetric, Callable[[_Texts], Score]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "exact_match": _exact_match,
    "rouge_l": _rouge_l,
    "wer": _error_rate(str.split, "word"),
    "cer": _error_rate(lambda text: " ".join(text.split()), "character"),
    "per": _error_rate(str.split, "phoneme"),
}
