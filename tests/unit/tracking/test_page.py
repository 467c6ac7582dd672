"""The HTML report: what is in it, and how a real browser shows it on a phone, on a screen and on paper."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_transformer.errors import UserError
from dist_transformer.tracking import MetricsLog
from dist_transformer.tracking.page import write_report
from dist_transformer.tracking.page_data import load_page
from tests.tools.browser import Browser, find_chromium
from tests.unit.tracking.test_report import write_run

NASTY = "</script><script>document.title='x'</script><b>&\"'"
OVERFLOW = """[...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect(), scrolls = e.closest(".wide, .tip, svg, details:not([open])");
  return !scrolls && box.width && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 120))"""


def accounted(run_dir: Path, first: int, last: int, resumed: int = 0, alert: str = "") -> None:
    """One process's rows as a real run has them."""
    log = MetricsLog(run_dir)
    if log.n_restarts:
        log.log("alert", resumed, {"alert/kind": "restart", "alert/text": f"goes on after step {resumed}"})
    for number, step in enumerate(range(first, last)):
        done = 0.1 * (number + 1)
        log.log("train", step, {
            "train/loss": 2 + 8 * math.exp(-step / 200), "train/lr": 1e-3, "train/grad_norm": 1 + 50 / step,
            "trainer/tokens_seen": step * 5000, "perf/tokens_per_sec": 5e4, "perf/source_tokens_per_sec": 4e4,
            "perf/target_tokens_per_sec": 1e4, "perf/mfu_pct": 41.5, "perf/hfu_pct": 50.0, "perf/padding_pct": 3.0,
            "perf/source_padding_pct": 2.0, "perf/target_padding_pct": 4.0, "perf/communication_pct": 11.0,
            "perf/data_time_pct": 1.0, "perf/step_time_s": 0.1, "perf/goodput_pct": 87.5,
            "memory/max_allocated_gib": 40.0, "health/disk_free_gib": 100.0,
            "time/compute_s": 0.8 * done, "time/communication_s": 0.1 * done, "time/input_s": 0.1 * done,
            "time/checkpoint_s": 0.0, "time/evaluation_s": 0.0, "time/other_s": 2.0, "time/wall_s": 2.0 + done,
        })  # fmt: skip
        if step % 50 == 0:
            log.log("eval", step, {"eval/news/loss": 2.5, "eval/news/bleu": step / 20})
            log.log("checkpoint", step, {"checkpoint/save_s": 0.5})
    if alert:
        log.log("alert", last - 1, {"alert/kind": "divergence", "alert/text": alert})
    log.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    first, second = folder / "a-run-with-quite-a-long-name-as-people-give-them", folder / "second"
    accounted(first, 1, 140)
    accounted(first, 101, 260, resumed=100, alert=f"loss 9 is above 3: {NASTY}")
    accounted(second, 1, 200)
    for run_dir, lr in ((first, 0.001), (second, 0.01)):
        (run_dir / "config.yaml").write_text(f"optimizer: {{lr: {lr}}}\nrun: {{dir: runs/{'x' * 90}}}\n")
    samples = first / "samples"
    samples.mkdir()
    (samples / "step-00000050.txt").write_text("source:    old\noutput:    old\nreference: old\n")
    (samples / "step-00000250.txt").write_text(
        f"source:    A dog runs.\noutput:    {NASTY}\nreference: Ein Hund {'läuft ' * 60}\n"
    )
    return [first, second]


def data_of(page: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def test_the_page_holds_the_run_and_needs_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs[:1], tmp_path / "deep" / "report.html")
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "@import" not in text
    assert NASTY not in text and "Ein Hund" in text and "lr: 0.001" in text
    (run,) = data_of(page)["runs"]
    assert [point[0] for point in run["series"]["train/loss"]] == list(range(1, 260))
    assert [point[0] for point in run["series"]["eval/news/loss"]] == [50, 100, 150, 200, 250]
    assert [event["step"] for event in run["checkpoints"]] == [50, 100, 150, 200, 250]
    assert [alert["kind"] for alert in run["alerts"]] == ["restart", "divergence"]
    lost, whole = run["processes"]
    assert (lost["resumed"], whole["resumed"]) == (100, None)
    assert lost["start"] < lost["lost"] <= lost["end"]
    accounts = {entry["name"]: entry["seconds"] for entry in run["accounts"]}
    # 100 steps of the first process count, and all 159 of the second; each took 0.1 s.
    assert accounts["compute"] == pytest.approx(0.8 * 0.1 * (100 + 159))
    assert accounts["trained again"] == pytest.approx(0.1 * 39)
    assert accounts["other"] == pytest.approx(4.0)


def test_several_runs_are_compared(runs: list[Path], tmp_path: Path) -> None:
    text = write_report(runs, tmp_path / "both.html").read_text()
    assert "<th>optimizer.lr</th><td>0.001</td><td>0.01</td>" in text
    assert "run.dir</th>" not in text, "only what differs is compared"
    assert len(data_of(tmp_path / "both.html")["runs"]) == 2


def test_long_runs_are_thinned_and_keep_their_spikes(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 20_001):
        log.log("train", step, {"train/loss": 99.0 if step == 12_345 else 1.0 + (step % 7) / 100})
    log.close()
    points = load_page(tmp_path, "long").data["series"]["train/loss"]
    assert len(points) < 1500 and [12_345, 99.0] in points
    steps = [step for step, _ in points]
    assert steps == sorted(set(steps)) and steps[-1] == 20_000


def test_runs_of_older_versions_and_young_runs_are_shown(tmp_path: Path) -> None:
    """Rows without time accounts, without tokens; one single row."""
    write_run(tmp_path / "old", 0, 600)
    log = MetricsLog(tmp_path / "young")
    log.log("train", 1, {"train/loss": math.nan, "train/lr": 0.0})
    log.close()
    page = write_report([tmp_path / "old", tmp_path / "young"], tmp_path / "out.html")
    assert data_of(page)["runs"][0]["accounts"] == []
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_report([tmp_path / "none"], tmp_path / "none.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out\.html cannot be written"):
        write_report([tmp_path / "old"], tmp_path / "file" / "out.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip(
            "no Chromium here: how the report looks was NOT tested (Debian: apt-get install chromium)"
        )
    with Browser(program) as opened:
        yield opened


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize(("scheme", "media"), [("light", ""), ("dark", ""), ("light", "print")])
@pytest.mark.parametrize("n_runs", [1, 2])
def test_a_browser_shows_it_without_overflow_or_error(
    runs: list[Path], browser: Browser, tmp_path: Path, width: int, scheme: str, media: str, n_runs: int
) -> None:
    page = write_report(runs[:n_runs], tmp_path / "report.html")
    browser.problems.clear()
    browser.requests.clear()
    browser.open(page, width, scheme=scheme, media=media)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.title") == (runs[0].name if n_runs == 1 else "2 runs")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OVERFLOW) == []
    # Every chart has its curves, within its frame; text of charts does not leave it either.
    n_charts = browser.run("document.querySelectorAll('.chart[data-panel]').length")
    assert n_charts >= 10
    assert browser.run(
        "[...document.querySelectorAll('.chart[data-panel]')].every(c => c.querySelector('path.line'))"
    )
    assert browser.run("""[...document.querySelectorAll("svg text")].filter(t => {
      const box = t.getBoundingClientRect(), frame = t.closest("svg").getBoundingClientRect();
      return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
    }).map(t => t.textContent)""") == []  # fmt: skip
    assert browser.problems == []
    assert [address for address in browser.requests if not address.startswith(("file:", "data:"))] == []


def test_a_dark_page_is_dark_and_paper_is_white(runs: list[Path], browser: Browser, tmp_path: Path) -> None:
    page = write_report(runs[:1], tmp_path / "report.html")
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.open(page, 1400, scheme="dark")
    assert max(map(int, re.findall(r"\d+", browser.run(colour)))) < 60
    browser.open(page, 1400, scheme="dark", media="print")
    assert browser.run(colour) == "rgb(255, 255, 255)"
    assert browser.pdf().startswith(b"%PDF")


def test_the_axis_can_be_chosen_and_values_are_read_off(
    runs: list[Path], browser: Browser, tmp_path: Path
) -> None:
    page = write_report(runs[:1], tmp_path / "report.html")
    browser.open(page, 1400)
    first_tip = """(() => {
      const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 14, clientY: box.top + 50}));
      return document.querySelector(".tip").textContent;
    })()"""
    assert re.match(r"step 259.*training 4\.19", browser.run(first_tip))
    browser.run("document.querySelector('input[value=tokens]').click()")
    assert "tokens 1.29M" in browser.run(first_tip) or "tokens 1.3M" in browser.run(first_tip)
    assert browser.problems == []
