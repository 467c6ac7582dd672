"""A real Slurm cluster of two nodes on this machine, and jobs on it."""

import contextlib
import fcntl
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "slurm" / "slurm_cluster.sh"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
APT = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
LIMIT_S = float(os.environ.get("SLURM_TEST_LIMIT_S", "240"))
"""Of one thing that is waited for; more on a machine that is busy with other work."""
ENDED = ("FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "COMPLETED")


@dataclass(frozen=True)
class Cluster:
    """Commands of a running cluster."""

    env: dict[str, str]

    def run(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """A command such as sbatch, called in the checkout as a person would."""
        return subprocess.run(
            [str(argument) for argument in arguments],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def must(self, *arguments: str | Path) -> str:
        """Output of a command that has to work."""
        done = self.run(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def cli(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """`dist-transformer ARGUMENTS`."""
        return self.run(self.env["PYTHON"], "-m", "dist_transformer", *arguments)

    def sbatch(
        self, log: Path, template: str, *arguments: str | Path, options: tuple[str, ...] = ()
    ) -> "Job":
        """`sbatch OPTIONS slurm/TEMPLATE ARGUMENTS`."""
        script = ROOT / "slurm" / template
        said = self.must("sbatch", "--parsable", f"--output={log}", *options, script, *arguments)
        return Job(self, said.strip(), log)

    def submit(self, run_dir: Path, *arguments: str | Path, nodes: str = "2", ranks: int = 1) -> "Job":
        """`dist-transformer submit ARGUMENTS`; `ranks` on each node."""
        done = self.cli(
            "submit", *arguments, f"run.dir={run_dir}", "--nodes", nodes, "--ranks-per-node", str(ranks)
        )
        assert done.returncode == 0, done.stderr
        job = done.stdout.splitlines()[0].removeprefix("job ").split()[0]
        return Job(self, job, run_dir / f"slurm-{job}.log")

    def kill_node(self, node: str) -> None:
        """Everything on it dies at once, and Slurm is not told."""
        self.must(SCRIPT, "kill-node", node)

    def start_node(self, node: str) -> None:
        """It is back, and takes jobs."""
        self.must(SCRIPT, "start-node", node)
        deadline = time.monotonic() + LIMIT_S
        while "down" in (states := self.must("sinfo", "-h", "-N", "-o", "%N %T")) or "unk" in states:
            assert time.monotonic() < deadline, states
            time.sleep(0.2)


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    id: str
    log: Path

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.cluster.run("scontrol", "-o", "show", "job", self.id).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.fields().get("JobState", "")

    def restarts(self) -> int:
        """How often it was put back into the queue."""
        return int(self.fields().get("Restarts", "0"))

    def output(self) -> str:
        """The job's log so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def signal(self, *options: str) -> None:
        """`scancel OPTIONS JOB`."""
        self.cluster.must("scancel", *options, self.id)

    def wait_for(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        """Poll until the condition holds; a job that ended before that, or too late, fails with its log."""
        deadline = time.monotonic() + limit_s
        while not condition():
            ended = self.state() in ENDED and not condition()
            assert not ended, f"{what}: {self.fields()}: {self.output()}"
            assert time.monotonic() < deadline, f"{what}: not within {limit_s} s: {self.output()}"
            time.sleep(0.1)

    def finish(self) -> None:
        """Wait until the job is COMPLETED."""
        self.wait_for(lambda: self.state() == "COMPLETED", "completing")


def why_not(mode: str) -> str:
    """Why there can be no cluster here, in a sentence; empty: there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"NOT TESTED ON SLURM: no {', '.join(missing)} here; install them with: {APT}"
    if mode == "netns":
        if os.geteuid() != 0:
            return "NOT TESTED ON SLURM WITH A NETWORK FOR EACH NODE (netns): that needs root"
        tried = subprocess.run(
            ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "try0", "type", "bridge"],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": PATH},
        )
        if tried.returncode:
            reason = tried.stderr.strip()
            return f"NOT TESTED ON SLURM WITH A NETWORK FOR EACH NODE (netns): not permitted: {reason}"
    return ""


@contextlib.contextmanager
def _own_ports() -> Iterator[int]:
    """The first of a hundred ports that no other cluster has, also not one of the same process.

    Job numbers follow from it, and from those the ports at which ranks meet: so these differ too.
    """
    for port in random.sample(range(20000, 30000, 100), 100):
        with (
            (Path(tempfile.gettempdir()) / f"dt-slurm-{port}.lock").open("a") as lock,
            socket.socket() as probe,
        ):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                probe.bind(("", port))
            except OSError:
                continue
            probe.close()
            yield port
            return
    raise AssertionError("no free ports for a cluster")


@contextlib.contextmanager
def start_cluster(mode: str, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """Two nodes; taken down at the end, whatever happens.

    Args:
        mode: `loopback`: the nodes share this machine's name and network; `netns` (root): each has its own.
        environment: Of jobs.
    """
    # Short: Slurm makes unix sockets below it. It must not exist, or the script takes it for somebody else's.
    folder = Path(tempfile.mkdtemp(prefix="dt-slurm-", dir="/tmp"))
    folder.chmod(0o755)  # munge insists
    with _own_ports() as port:
        env = {
            **{key: value for key, value in environment.items() if not key.startswith(("SLURM_", "SBATCH_"))},
            "PATH": PATH,
            "SLURMLAB_DIR": str(folder / "lab"),
            "SLURMLAB_MODE": mode,
            "SLURMLAB_NODES": "2",
            "SLURMLAB_PORT": str(port),
            "SLURMLAB_SUBNET": f"10.64.{port // 100 % 100}",
            "SLURMLAB_SLURMD_TIMEOUT": "6",
            "SLURM_CONF": str(folder / "lab" / "etc" / "slurm.conf"),
        }
        try:
            up = subprocess.run([SCRIPT, "up"], env=env, capture_output=True, text=True, timeout=120)
            assert up.returncode == 0, f"the cluster did not come up: {up.stderr}"
            yield Cluster(env)
        finally:
            down = subprocess.run([SCRIPT, "down"], env=env, capture_output=True, text=True, timeout=120)
            shutil.rmtree(folder, ignore_errors=True)
            assert down.returncode == 0, down.stderr
