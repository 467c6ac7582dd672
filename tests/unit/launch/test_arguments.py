"""Mistakes in calling the launch scripts: exit code 2 and one sentence, before anything has started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
KEPT = ("PATH", "HOME", "LANG")
TWO_NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_NNODES": "2"}


def call(script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return subprocess.run(
        [str(ROOT / "launch" / script), *arguments],
        cwd=ROOT,
        env={**kept, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def refuses(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, ("NNODES is not set",)),
        ({"NNODES": "two"}, ("NNODES=two",)),
        ({"NNODES": "0"}, ("NNODES=0",)),
        ({"NNODES": "4:2"}, ("NNODES=4:2", "a range")),
        ({"NNODES": "1:2:3"}, ("NNODES=1:2:3",)),
        ({"NNODES": "1:4", "NODE_RANK": "4"}, ("NODE_RANK=4", "0 to 3")),
        ({"NNODES": "2"}, ("NODE_RANK is not set",)),
        ({"NNODES": "2", "NODE_RANK": "2"}, ("NODE_RANK=2", "0 to 1")),
        ({"NNODES": "2", "NODE_RANK": "-1"}, ("NODE_RANK=-1",)),
        ({"NNODES": "2", "NODE_RANK": "1"}, ("MASTER_ADDR is not set",)),
        ({**TWO_NODES, "MASTER_PORT": "70000"}, ("MASTER_PORT=70000",)),
        ({**TWO_NODES, "RDZV_TIMEOUT": "soon"}, ("RDZV_TIMEOUT=soon",)),
        ({**TWO_NODES, "NPROC": "0"}, ("0 is not a number of ranks",)),
        (STEP, ("started by srun",)),
        ({**STEP, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16"}, ("16 tasks on 2 nodes",)),
    ],
)  # fmt: skip
def test_variables_of_a_node(variables: dict[str, str], words: tuple[str, ...]) -> None:
    refuses(call("node.sh", CONFIG, **variables), "node.sh: ", *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("no configuration",)),
        ((CONFIG, "--nproc"), ("--nproc needs a number",)),
        ((CONFIG, "--nproc", "many"), ("many is not a number",)),
        ((CONFIG, "--max-restarts=some"), ("--max-restarts some",)),
        ((CONFIG, "--max-restart", "3"), ("no option --max-restart ",)),
    ],
)
def test_arguments_of_a_node(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refuses(call("node.sh", *arguments, **TWO_NODES), "node.sh: ", *words)


def test_a_wrong_configuration_is_found_before_torchrun_starts() -> None:
    refuses(call("node.sh", CONFIG, "train.stepps=3", **TWO_NODES), "train.stepps")
    refuses(call("node.sh", "configs/nothing.yaml", **TWO_NODES), "configs/nothing.yaml")
    refuses(call("local.sh", CONFIG, "train.stepps=3"), "train.stepps")


@pytest.mark.parametrize("arguments", [("--nproc",), ("--nproc", "0"), ("--nproc=many",)])
def test_arguments_of_local(arguments: tuple[str, ...]) -> None:
    refuses(call("local.sh", CONFIG, *arguments), "local.sh: --nproc")


@pytest.mark.parametrize("script", ["node.sh", "local.sh"])
def test_help_shows_how_to_call_it(script: str) -> None:
    done = call(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script} CONFIG.yaml" in done.stdout


@pytest.mark.parametrize(
    ("node", "address"), [("localhost", "localhost"), ("node7.invalid", "10.1.2.3")], ids=["known", "unknown"]
)
def test_a_job_meets_at_its_first_node(tmp_path: Path, node: str, address: str) -> None:
    """By the node's name where it can be looked up, else by the address that Slurm has for it."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'  "show hostnames {node},other") printf "{node}\\nother\\n" ;;\n'
        f'  "-o show node {node}") echo "NodeName={node} Arch=x86_64 NodeAddr={address} NodeHostName={node}" ;;\n'
        "esac\n"
    )
    scontrol.chmod(0o755)
    done = call(
        "node.sh",
        "--head-address",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_NODELIST=f"{node},other",
    )
    assert done.stdout.strip() == address, done.stderr
