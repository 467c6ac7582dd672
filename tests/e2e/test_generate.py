"""The command `generate`: order, prefixes, n-best, sampling, streams, processes, and input of every kind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import LIMIT_S, command, environment

WriteConfig = Callable[..., Path]
MAX_LEN = 24


@pytest.fixture(scope="module")
def run_dir(module_config: WriteConfig, pair_shards: Path) -> Path:
    """A translation run: 64 tokens a source, 24 an output."""
    config = module_config(
        pair_shards,
        train={"steps": 60},
        optimizer={"lr": 0.01},
        evaluate={"every": 60},
        generate={"beam_size": 3, "max_len": MAX_LEN},
    )
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    return config.parent / "run"


@pytest.fixture(scope="module")
def lines(pair_files: Path) -> list[str]:
    return (pair_files / "source.txt").read_text().splitlines()[:12]


def generate(run_dir: Path, text: list[str], *options: str | Path) -> list[str]:
    """Output lines; nothing may be said on stderr."""
    done = command("generate", run_dir, *options, stdin="".join(f"{line}\n" for line in text))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_every_line_in_its_place(run_dir: Path, lines: list[str]) -> None:
    """Empty, blank and equal lines, characters never seen, bytes that are no letters."""
    text = [
        *lines[:3],
        "",
        "日本語 🦊 ẞ\u2028\u0085\x0b\x00",
        "   ",
        "\t",
        lines[0],
        "</s> <pad> <extra_id_0>",
        "",
    ]
    outputs = generate(run_dir, text, "--window", "4")
    assert [bool(output) for output in outputs] == [bool(line.strip()) for line in text]
    assert outputs[7] == outputs[0]
    assert outputs[:3] == generate(run_dir, lines[:3])


def test_processes_and_windows_change_nothing(run_dir: Path, lines: list[str], tmp_path: Path) -> None:
    text = [*lines[:5], "", *lines[5:]]
    (tmp_path / "in.txt").write_text("\n".join(text))  # the last line without an end
    for options in (
        ["--n-best", "2", "--scores"],
        ["--sample", "--n-best", "2", "--seed", "5", "--top-p", "0.9"],
    ):
        expected = generate(run_dir, text, *options)
        assert len(expected) == 2 * (len(text) - 1) + 1
        out = tmp_path / "out.txt"
        assert generate(run_dir, [], *options, "--input", tmp_path / "in.txt", "--output", out,
                        "--nproc", "2", "--window", "7") == []  # fmt: skip
        found = out.read_text().splitlines()
        assert [row.split("\t")[-1] for row in found] == [row.split("\t")[-1] for row in expected]
        assert [row.split("\t")[0] for row in found] == [row.split("\t")[0] for row in expected]


def test_rows_of_tabs_and_of_json(run_dir: Path, lines: list[str]) -> None:
    text = [lines[0], "", lines[1]]
    rows = [row.split("\t") for row in generate(run_dir, text, "--n-best", "3", "--scores")]
    assert [row[0] for row in rows] == ["1", "1", "1", "2", "3", "3", "3"]
    assert rows[3] == ["2", "0.0000", ""]
    scores = [float(row[1]) for row in rows]
    assert scores[:3] == sorted(scores[:3], reverse=True) and scores[0] < 0
    objects = [json.loads(row) for row in generate(run_dir, text, "--n-best", "3", "--json")]
    assert [one["line"] for one in objects] == [1, 2, 3]
    assert [[o["text"] for o in one["outputs"]] for one in objects] == [
        [row[2] for row in rows[:3]], [""], [row[2] for row in rows[4:]],
    ]  # fmt: skip
    assert objects[0]["outputs"][0]["score"] == pytest.approx(scores[0], abs=1e-4)
    assert generate(run_dir, text, "--scores") == ["\t".join(rows[i][1:]) for i in (0, 3, 4)]
    assert generate(run_dir, text) == [rows[i][2] for i in (0, 3, 4)]


def test_prefixes(run_dir: Path, lines: list[str], tmp_path: Path) -> None:
    text, prefixes = [lines[0], lines[1], "", lines[2]], ["ECHO", "", "INDIA", "INDIA OH"]
    (tmp_path / "prefixes.txt").write_text("".join(f"{prefix}\n" for prefix in prefixes))
    for options in (["--beam-size", "1"], ["--beam-size", "3"], ["--sample"]):
        found = generate(run_dir, text, *options, "--prefix-file", tmp_path / "prefixes.txt")
        assert [output.startswith(prefix) for output, prefix in zip(found, prefixes, strict=True)] == [
            True, True, False, True,
        ]  # fmt: skip
        assert found[2] == ""
        assert found[1] == generate(run_dir, text, *options)[1]
        tabbed = [f"{line}\t{prefix}" for line, prefix in zip(text, prefixes, strict=True)]
        assert generate(run_dir, tabbed, *options, "--tab-prefixes") == found
    done = command("generate", run_dir, "--prefix-file", tmp_path / "prefixes.txt", stdin="a\nb\n")
    assert done.returncode == 1
    assert "standard input ends after 2 lines" in done.stderr and "parallel" in done.stderr


def test_what_is_too_long_is_cut_and_named(run_dir: Path, lines: list[str], tmp_path: Path) -> None:
    text = [lines[0], "alpha bravo " * 300, lines[1], "charlie " * 3000]
    done = command("generate", run_dir, "--window", "3", stdin="".join(f"{line}\n" for line in text))
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 4
    assert "1 of 3 inputs are longer than data.max_source_len=64 tokens and were cut: line 2\n" in done.stderr
    assert "1 of 1 inputs are longer than data.max_source_len=64 tokens and were cut: line 4\n" in done.stderr
    (tmp_path / "prefixes.txt").write_text("ECHO\n" + "ECHO " * 200 + "\n")
    done = command("generate", run_dir, "--prefix-file", tmp_path / "prefixes.txt", stdin="alpha\nbravo\n")
    assert done.returncode == 0
    assert "1 of 2 prefixes are longer than the longest output" in done.stderr and "line 2\n" in done.stderr
    assert done.stdout.splitlines()[1].startswith("ECHO ECHO ECHO")


def test_bad_input_is_one_sentence(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"alpha\nbravo\n\xfcber\n")
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b\x08 nothing")
    for options, exit_code, says in (
        (["--input", tmp_path / "latin.txt", "--window", "1"], 1, "latin.txt: not UTF-8 at byte 0 of line 3"),
        (["--input", tmp_path / "broken.gz"], 2, "broken.gz: cannot be read"),
        (["--input", tmp_path / "none.txt"], 2, "none.txt: cannot be read: No such file"),
        (["--output", tmp_path / "no" / "out.txt"], 2, "cannot be written: No such file"),
        (["--n-best", "4"], 2, "4 best outputs need a beam of as many: beam_size is 3"),
        (["--sample", "--top-p", "1.5"], 2, "generate.top_p"),
        (["--prefix-file", "a", "--tab-prefixes"], 2, "choose"),
        (["--nproc", "2", "--temperature", "0"], 2, "generate.temperature"),
        (["--max-ratio", "inf"], 2, "generate.max_ratio"),
        (["--length-penalty", "nan"], 2, "generate.length_penalty"),
        (["--checkpoint", "²"], 1, "no checkpoint ²"),
    ):
        done = command("generate", run_dir, *options, stdin="alpha\n")
        assert done.returncode == exit_code, done.stderr
        assert says in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
        if "latin" in says:
            assert len(done.stdout.splitlines()) == 2, "what came before is written"


def test_no_file_is_lost(run_dir: Path, lines: list[str], tmp_path: Path) -> None:
    source, prefixes, before = tmp_path / "source.txt", tmp_path / "prefixes.txt", tmp_path / "before.txt"
    for path in (source, prefixes, before):
        path.write_text("alpha\nbravo\n")
    read = ["--input", source, "--prefix-file", prefixes]
    for options, says in (
        ([*read, "--output", source], "source.txt is a file that is read"),
        ([*read, "--output", prefixes], "prefixes.txt is a file that is read"),
        (["--input", tmp_path / "none.txt", "--output", before], "none.txt: cannot be read"),
        (["--input", source, "--n-best", "4", "--output", before], "need a beam of as many"),
        (["--input", source, "--output", "/dev/full"], "/dev/full: cannot be written: No space left"),
    ):
        done = command("generate", run_dir, *options)
        assert done.returncode in (1, 2) and says in done.stderr and done.stderr.count("\n") == 1
    for path in (source, prefixes, before):
        assert path.read_text() == "alpha\nbravo\n"
    done = command("generate", run_dir, "--input", source, "--n-best", "4", "--output", tmp_path / "new.txt")
    assert done.returncode == 2 and not (tmp_path / "new.txt").exists()
    assert command("generate", run_dir, "--input", source, "--output", before).returncode == 0
    assert before.read_text().splitlines() == generate(run_dir, ["alpha", "bravo"])
    # A byte order mark is no part of the first line.
    source.write_text("\ufeffalpha\nbravo\n")
    assert command("generate", run_dir, "--input", source).stdout == before.read_text()


def start(run_dir: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "dist_transformer", "generate", str(run_dir), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def test_a_stream_is_answered_as_it_comes(run_dir: Path, lines: list[str]) -> None:
    expected = generate(run_dir, lines[:3])
    process = start(run_dir, "--window", "1")
    assert process.stdin is not None and process.stdout is not None
    for line, output in zip(lines[:3], expected, strict=True):
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{output}\n"  # while the input is open
    assert process.poll() is None
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_a_closed_pipe_ends_it_quietly(run_dir: Path, lines: list[str], nproc: str) -> None:
    """Input without an end, in bounded memory, until the reader has enough."""
    process = start(run_dir, "--window", "4", "--nproc", nproc, "--beam-size", "1")
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    feeder = subprocess.Popen(["yes", lines[0]], stdout=process.stdin)
    process.stdin.close()
    try:
        first = [process.stdout.readline() for _ in range(6)]
        assert len(set(first)) == 1 and first[0].strip()
        process.stdout.close()
        until = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert process.poll() is not None
        assert process.stderr.read() == ""
    finally:
        feeder.kill()
        feeder.wait()
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    "launcher", [{"WORLD_SIZE": "2", "RANK": "0"}, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}]
)
def test_under_a_launcher_it_says_what_to_use(run_dir: Path, launcher: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_transformer", "generate", str(run_dir)],
        input="alpha\n",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**environment(), **launcher},
    )
    assert done.returncode == 2
    assert "--nproc N" in done.stderr


def test_memory_does_not_grow_with_the_input(run_dir: Path, tmp_path: Path) -> None:
    """The peak of a run over 20,000 lines is that of one over 200, but for a few MiB."""
    peaks = []
    for n in (200, 20_000):
        (tmp_path / "in.txt").write_text("\n" * (n - 20) + "alpha bravo\n" * 20)
        code = (
            "import resource, sys; from dist_transformer.cli import main; code = main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", str(run_dir), "--input", str(tmp_path / "in.txt"),
             "--window", "200", "--output", os.devnull],
            capture_output=True, text=True, timeout=LIMIT_S, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr.split()[-1]))
    assert peaks[1] < peaks[0] + 16 * 1024
