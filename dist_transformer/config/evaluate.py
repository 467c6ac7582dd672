"""The `evaluate` section: what is measured on held-out data, and by which weights."""

import re
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from dist_transformer.config.base import Section, refuse, unfit

TextMetric = Literal["bleu", "chrf", "exact_match", "rouge_l", "wer", "cer", "per"]
"""Of outputs against references, in percent: sacreBLEU's BLEU and chrF, exact match, ROUGE-L, and error rates of
words, characters and phonemes."""
TokenMetric = Literal["token_accuracy", "sequence_accuracy"]
"""Of the reference's tokens that have the largest probability after those before them, and of references that have
only such: in percent, without decoding."""
Metric = Literal[TextMetric, TokenMetric]
LOWER_IS_BETTER = ("loss", "wer", "cer", "per")
Tokenize = Literal["13a", "none", "intl", "char", "zh"]
Weights = Literal["current", "ema"]
Mode = Literal["max", "min"]


def check_expression(text: str) -> None:
    """Raise a `ValueError` with a sentence if a text is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from None


class EvaluateConfig(Section):
    """Evaluation on held-out data while training."""

    every: PositiveInt = 1000
    """Steps between evaluations; the last step is always evaluated."""
    at_start: bool = False
    """Evaluate the initial weights too, before the first step."""
    batches: PositiveInt | None = 50
    """Global batches of the held-out split that are read; null: all of it."""
    metrics: tuple[Metric, ...] = ("bleu", "chrf")
    """Besides loss and accuracy: bleu, chrf, exact_match, rouge_l, wer, cer, per of the sources in `sentences`, and
    token_accuracy, sequence_accuracy of all held-out rows that are read (docs/evaluation.md)."""
    sentences: NonNegativeInt = 0
    """Held-out sources that are decoded and scored by `metrics` (objective `pairs`); 0: none."""
    group_sources: bool = False
    """Consecutive equal held-out sources are one, with all their targets as references."""
    tokenize: Tokenize = "13a"
    """BLEU's tokenizer, one of sacreBLEU's; none: the text is tokenised (multi-bleu style)."""
    lowercase: bool = False
    """Score in lower case."""
    ignore: str | None = None
    """Regular expression: what it matches, in outputs and references, counts in no score (`[0-9]`: the stress)."""
    weights: Weights = "current"
    """ema: measure, and decode with, the weights averaged by `train.ema_decay`."""
    samples: NonNegativeInt = 0
    """Held-out samples whose source, output and reference are written to `RUN_DIR/samples/`."""

    @field_validator("ignore")
    @classmethod
    def _is_expression(cls, ignore: str | None) -> str | None:
        if ignore is not None:
            check_expression(ignore)
        return ignore

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, tree: Any) -> Any:
        """Run directories of earlier versions stay readable."""
        if not isinstance(tree, dict) or "bleu_sentences" not in tree:
            return tree
        if "sentences" in tree:
            refuse(
                cls.__name__, [unfit("bleu_sentences", tree, "is the earlier name of sentences: give one")]
            )
        rest = {name: value for name, value in tree.items() if name != "bleu_sentences"}
        return {**rest, "sentences": tree["bleu_sentences"]}


class EarlyStoppingConfig(Section):
    """The run is done before its last step where evaluations stop getting better."""

    metric: str | None = None
    """What is watched, as it stands in `metrics.jsonl`: `eval/SET/loss`, `eval/SET/bleu`; null: nothing."""
    mode: Mode | None = None
    """Which is better, larger or smaller values; null: min of losses and error rates, max of the rest."""
    patience: PositiveInt = 5
    """Evaluations in a row without a better value after which the run ends."""
    min_delta: NonNegativeFloat = 0.0
    """A value is better if it is so by more than this."""
