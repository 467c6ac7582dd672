"""Pictures of runs: the curves that go into them, and PNG files that show something."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_transformer.errors import UserError
from dist_transformer.tracking import MetricsLog, draw_run
from dist_transformer.tracking.curves import load_curves, smooth

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def write_run(run_dir: Path, first: int, last: int, level: float = 2.0, evals: bool = True) -> None:
    """One process's rows of a run that learns."""
    noise = random.Random(first)
    log = MetricsLog(run_dir)
    for step in range(first, last, 10):
        values: dict[str, float] = {
            "train/loss": level + 8 * math.exp(-step / 200) + noise.gauss(0, 0.05),
            "trainer/tokens_seen": step * 5000,
            "train/lr": 1e-3 * min(1, step / 100),
            "train/grad_norm": 1 + 50 * math.exp(-step / 50),
            "perf/tokens_per_sec": 50_000 + noise.gauss(0, 500),
        }
        log.log("train", step, values)
        if evals and step % 200 == 0:
            log.log(
                "eval",
                step,
                {"eval/news/loss": level + 0.2 + 8 * math.exp(-step / 200), "eval/news/bleu": step / 100},
            )
    log.close()


def pixels_of(path: Path, colour: tuple[int, int, int]) -> int:
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(image - np.array(colour)).sum(axis=2) < 12).sum())


def test_a_run_with_restarts_and_nans_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0, 600)
    write_run(tmp_path / "run", 500, 1000)
    log = MetricsLog(tmp_path / "run")
    log.log("train", 1000, {"train/loss": math.nan, "train/grad_norm": math.inf})
    log.close()
    out = draw_run([tmp_path / "run"], tmp_path / "pictures/run.png")
    assert out == tmp_path / "pictures/run.png" and [path.name for path in out.parent.iterdir()] == [
        "run.png"
    ]
    image = Image.open(out)
    assert image.format == "PNG" and image.size[0] >= 1200 and image.size[1] >= 700
    assert pixels_of(out, BLUE) > 3000 and pixels_of(out, ORANGE) > 300

    curves = load_curves(tmp_path / "run", "run")
    assert curves.scalars["train/loss"].steps == list(range(0, 1001, 10))
    assert curves.scalars["train/loss"].nonfinite_steps() == [1000]
    assert curves.restart_steps == [500, 1000] and curves.last_step == 1000
    assert curves.eval_losses["news"].steps == [0, 200, 400, 600, 800]
    assert curves.tokens.step_of(2_525_000) == 505


def test_several_runs_get_a_colour_each(tmp_path: Path) -> None:
    for number, name in enumerate(["a/run", "b/run", "c/$x_{"]):
        write_run(tmp_path / name, 0, 400, level=2.0 + number, evals=number != 1)
    out = draw_run([tmp_path / name for name in ("a/run", "b/run", "c/$x_{")], tmp_path / "all.png")
    assert (
        pixels_of(out, BLUE) > 1000
        and pixels_of(out, ORANGE) > 1000
        and pixels_of(out, (0, 0x9E, 0x73)) > 1000
    )


@pytest.mark.parametrize(
    "rows",
    [
        [("train", 1, {"train/loss": 3.0})],
        [("train", 1, {"train/loss": math.nan}), ("train", 2, {"train/loss": math.nan})],
        [("eval", 5, {"eval/loss": 2.0, "trainer/tokens_seen": 10})],
        [
            (
                "train",
                0,
                {
                    "train/lr": 0.0,
                    "train/grad_norm": 0.0,
                    "perf/tokens_per_sec": 0.0,
                    "trainer/tokens_seen": 0,
                },
            )
        ],
        [("train", s, {"train/loss": 1e9 if s == 7 else 1.0, "trainer/tokens_seen": 5}) for s in range(40)],
    ],
)
def test_odd_runs_are_drawn_too(tmp_path: Path, rows: list[tuple[str, int, dict[str, float]]]) -> None:
    log = MetricsLog(tmp_path)
    for event, step, values in rows:
        log.log(event, step, values)  # type: ignore[arg-type]
    log.close()
    with Image.open(draw_run([tmp_path], tmp_path / "out.png")) as image:
        assert image.size[0] >= 1200


def test_nothing_to_draw_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        draw_run([tmp_path], tmp_path / "out.png")
    (tmp_path / "metrics.jsonl").write_text('{"event": "tr')
    with pytest.raises(UserError, match="no training or evaluation rows yet"):
        draw_run([tmp_path], tmp_path / "out.png")
    with pytest.raises(UserError, match="no run directory"):
        draw_run([], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
    write_run(tmp_path / "run", 0, 50)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out.png cannot be written"):
        draw_run([tmp_path / "run"], tmp_path / "file/out.png")


def test_smoothing_follows_the_curve_and_ignores_spikes() -> None:
    noise = random.Random(0)
    truth = [2 + 8 * math.exp(-place / 300) for place in range(2000)]
    noisy = [value + noise.gauss(0, 0.1) + (30 if noise.random() < 0.01 else 0) for value in truth]
    errors = [abs(a - b) for a, b in zip(smooth(noisy), truth, strict=True)]
    assert max(errors[5:]) < 0.2 and sum(errors) / len(errors) < 0.03
    assert smooth([5.0] * 30) == pytest.approx([5.0] * 30) and smooth([1.0]) == [1.0] and smooth([]) == []
