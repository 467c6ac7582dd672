"""Processes of benchmarks/data.py: measurements in one of their own, and CPU time and memory of those that run."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENTRY = Path(__file__).resolve().parents[1] / "data.py"
"""What a child runs: its settings come before the libraries are imported, as in the parent."""
MIB = 2**20


def child(name: str, *arguments: Any) -> dict[str, Any]:
    """What a function of the entry's `CHILDREN` prints in its own process, where only the disk's cache is warm."""
    command = [sys.executable, str(ENTRY), "--child", name, *map(str, arguments)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command))
    return found


def descendants(process: int) -> list[int]:
    """Processes started by one, and by those."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # PID (NAME) STATE PPID ..., and a name may hold anything.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(process, ()))
    for each in found:
        found += children.get(each, ())
    return found


def cpu_time_of(process: int) -> float:
    """Seconds that a process has run so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Memory:
    """Bytes of a process."""

    rss: int = 0
    pss: int = 0


def memory_of(process: int) -> Memory:
    """Of one that runs; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return Memory()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return Memory(kib["Rss"] * 1024, kib["Pss"] * 1024)


class MemoryWatch:
    """Looks twice a second at all processes below this one, which are loader workers and what starts them."""

    def __init__(self) -> None:
        self.largest = Memory()
        """The largest of each figure over processes and time."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            for process in descendants(os.getpid()):
                seen = memory_of(process)
                self.largest = Memory(max(self.largest.rss, seen.rss), max(self.largest.pss, seen.pss))
            if self._done.wait(0.5):
                return
