"""The best figure so far, and when a run is done because none gets better."""

from typing import Any

import pytest

from dist_transformer.checkpoints.folder import TrainerState
from dist_transformer.config import Config, build_config
from dist_transformer.errors import ConfigError
from dist_transformer.train.selection import Selection, check_selection

BLEU, LOSS = "eval/held/bleu", "eval/held/loss"


def config(best: str | None = None, early: dict[str, Any] | None = None, **sections: Any) -> Config:
    return build_config(
        {
            "run": {"dir": "x"},
            "data": {"train": "x", "eval": "some/held", "objective": "pairs"},
            "train": {"steps": 9, "early_stopping": early or {}},
            "checkpoint": {"best_metric": best},
            "evaluate": {"sentences": 4},
        }
        | sections
    )


def record(selection: Selection, name: str, values: list[float]) -> list[bool]:
    return [selection.record(10 * (i + 1), {name: value}) for i, value in enumerate(values)]


def test_the_largest_or_the_smallest_is_best() -> None:
    state = TrainerState()
    assert record(Selection(config(BLEU), state), BLEU, [3.0, 5.0, 5.0, 4.0, float("nan"), 6.0]) == [
        True, True, False, False, False, True,
    ]  # fmt: skip
    assert state.best == {"metric": BLEU, "value": 6.0, "step": 60}
    assert record(Selection(config(LOSS), TrainerState()), LOSS, [3.0, 5.0, 2.0]) == [True, False, True]
    upside_down = config(checkpoint={"best_metric": LOSS, "best_mode": "max"})
    assert record(Selection(upside_down, TrainerState()), LOSS, [3.0, 5.0, 2.0]) == [True, True, False]


def test_what_is_no_number_is_never_best() -> None:
    state, nan = TrainerState(), float("nan")
    selection = Selection(config(BLEU, {"metric": LOSS, "patience": 3}), state)
    assert record(selection, BLEU, [nan, 3.0, nan, 4.0]) == [False, True, False, True]
    assert record(selection, LOSS, [nan, nan]) == [False, False]
    assert state.early_stopping is not None and state.early_stopping["n_without"] == 2
    record(selection, LOSS, [5.0, 6.0])
    assert state.early_stopping == {"metric": LOSS, "value": 5.0, "n_without": 1}
    assert selection.why_done is None


def test_a_resumed_run_knows_its_best_unless_another_figure_counts() -> None:
    state = TrainerState()
    record(Selection(config(BLEU), state), BLEU, [3.0, 5.0])
    assert record(Selection(config(BLEU), state), BLEU, [4.0, 5.5]) == [False, True]
    assert record(Selection(config(LOSS), state), LOSS, [9.0]) == [True]
    assert Selection(config(), state).state.best is None


def test_a_best_that_could_not_be_saved_is_none() -> None:
    state = TrainerState()
    selection = Selection(config(BLEU), state)
    record(selection, BLEU, [3.0, 5.0, 7.0])
    selection.forget(20)
    assert state.best is not None
    assert state.best["step"] == 30
    selection.forget(30)
    assert state.best["step"] == 10
    selection.forget(10)
    assert state.best is None
    assert selection.record(40, {BLEU: 1.0})


def test_early_stopping_counts_evaluations_without_a_better_one() -> None:
    early = {"metric": BLEU, "patience": 2, "min_delta": 0.5}
    state = TrainerState()
    selection = Selection(config(early=early), state)
    why = []
    for value in (10.0, 10.4, 10.8, 11.0):
        selection.record(1, {BLEU: value})
        why.append(selection.why_done)
    # 10.4 is not better by more than 0.5, and 10.8 is; 11.0 is the first that is no better than it.
    assert why == [None, None, None, None]
    # A resumed run counts on; a set that could not be read counts for nothing.
    resumed = Selection(config(early=early), state)
    resumed.record(2, {})
    assert resumed.why_done is None
    resumed.record(3, {BLEU: 11.1})
    assert resumed.why_done == f"{BLEU} was not better than 10.8 in 2 evaluations in a row"
    # More patience, or none asked for: the run goes on.
    assert Selection(config(early={**early, "patience": 3}), state).why_done is None
    assert Selection(config(), state).why_done is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (config("eval/other/bleu"), "checkpoint.best_metric=eval/other/bleu is no figure"),
        (config("bleu"), "there are eval/held/loss, eval/held/accuracy, eval/held/bleu, eval/held/chrf"),
        (config(early={"metric": "eval/held/per"}), "train.early_stopping.metric=eval/held/per is no"),
        (config(BLEU, evaluate={"sentences": 0}), "there are eval/held/loss, eval/held/accuracy$"),
        (config(LOSS, data={"train": "x"}), r"it has no held-out set \(data.eval\)"),
    ],
)
def test_figures_that_are_not_measured_are_refused(changed: Config, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_selection(changed)


def test_figures_that_are_measured() -> None:
    metrics = {"sentences": 1, "metrics": ["per", "sequence_accuracy"]}
    check_selection(config("eval/held/per", {"metric": "eval/held/sequence_accuracy"}, evaluate=metrics))
    check_selection(config())


def test_averaged_weights_need_an_average() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.weights=ema needs train\.ema_decay"):
        config(evaluate={"weights": "ema"})


def test_the_earlier_name_of_sentences() -> None:
    assert config(evaluate={"bleu_sentences": 7}).evaluate.sentences == 7
    with pytest.raises(ConfigError, match="earlier name of sentences"):
        config(evaluate={"bleu_sentences": 7, "sentences": 8})
