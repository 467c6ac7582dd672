"""slurm/prepare_array.sbatch on a real cluster: an array of tasks, and a merge that waits for them."""

import random
from pathlib import Path

import pytest

from dist_transformer.data.array import merge
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.prepare import prepare_text
from dist_transformer.data.train_tokenizer import train_tokenizer
from tests.e2e.conftest import sentence
from tests.tools.slurm import LIMIT_S, ROOT, Cluster, Job

N_TASKS = 3
PREPARE_TEMPLATE = ROOT / "slurm" / "prepare_array.sbatch"

pytestmark = pytest.mark.timeout(4 * LIMIT_S)


def test_array_and_merge(cluster: Cluster, tmp_path: Path) -> None:
    generator = random.Random(2)
    files = [tmp_path / f"{i}.txt" for i in range(5)]
    for i, file in enumerate(files):
        file.write_text("".join(f"{sentence(generator)[0]}\n" for _ in range(40 + 30 * i)))
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in files))
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer(files, tokenizer, vocab_size=420)

    arguments = ("text", "--files-from", tmp_path / "list.txt", "--tokenizer", tokenizer, "--shards", "7")
    done = cluster.run(
        "sbatch", "--parsable", f"--array=0-{N_TASKS - 1}", "--cpus-per-task=1", f"--output={tmp_path}/%a.log",
        PREPARE_TEMPLATE, *arguments, "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    array = done.stdout.strip()
    done = cluster.run(
        "sbatch", "--parsable", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--cpus-per-task=1",
        f"--output={tmp_path}/merge.log", PREPARE_TEMPLATE, "merge", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    Job(cluster, done.stdout.strip(), tmp_path / "merge.log").finish()

    for task in range(N_TASKS):
        log = (tmp_path / f"{task}.log").read_text()
        assert f"task {task} of job {array}" in log
        assert f"when all tasks are done: dist-transformer prepare merge {tmp_path / 'out'}" in log
        prepare_text(
            files, tmp_path / "here", tokenizer=tokenizer, n_shards=7, workers=1, task=task, n_tasks=N_TASKS
        )
    merge(tmp_path / "here")
    there, here = load_manifest(tmp_path / "out"), load_manifest(tmp_path / "here")
    assert len(there.train) == 7
    assert there.fingerprint() == here.fingerprint()
