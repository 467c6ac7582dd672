"""What benchmarks/gpu.py measures and in which order: plain data, which needs no library."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

PRESETS = ("modern_large", "t5_v1_1_large", "t5_v1_1_base")
"""Most wanted first: where time runs out, the last ones are left out."""
MODES = ("none", "selective", "full")
"""Of recomputation."""
COMPILED, FLEX, COMPILED_FLEX = "compile", "flex", "compile_flex"
"""Modes without recomputation: compiled layers, FlexAttention, both."""
COMPILED_ROWS = 64
"""The first size of compiled modes."""
LARGEST = "largest"
"""Stands for the largest preset whose states the device holds."""


@dataclass(frozen=True)
class Setting:
    """How everything is measured, the same for all sections."""

    device: str
    """cuda or cpu."""
    tiny: bool = False
    """Shrunken models and rows: shows that everything works, and says nothing about speed."""
    out: str = ""
    """Folder of profiles and traces."""
    shards: str | None = None
    """Pairs to train on; None: made up."""
    overrides: tuple[str, ...] = ()
    """section.key=value of our configuration."""
    source_len: int = 512
    target_len: int = 128
    vocab_size: int = 32128
    """Of made-up samples."""
    n_samples: int = 16384
    """Of which rows are made."""
    median_source_len: int = 80
    seconds: float = 2.0
    """That each size is timed for, about."""
    first_rows: int = 16
    last_rows: int = 1024
    """Micro-batches are doubled from the first to the last."""
    micro_batches: int = 4
    """Of an update: what the optimizer costs is shared by them, as in every real run."""
    n_steps: int = 100
    """In which synchronisations and recompilations are counted."""
    compile_backend: str = "inductor"
    """Of torch.compile around Hugging Face's model."""

    @classmethod
    def build(cls, device: str, tiny: bool, **others: Any) -> "Setting":
        """The setting, with what belongs to a tiny one."""
        if not tiny:
            return cls(device=device, **others)
        small = {
            "source_len": 48, "target_len": 16, "vocab_size": 512, "n_samples": 160, "median_source_len": 8,
            "seconds": 0.05, "first_rows": 2, "last_rows": 4, "micro_batches": 2, "n_steps": 3,
            "compile_backend": "eager",
        }  # fmt: skip
        return cls(device=device, tiny=True, **{**small, **others})


@dataclass(frozen=True)
class Section:
    """One child process."""

    name: str
    """Such as `ours/modern_large/full`."""
    kind: str
    """Which function of benchmarks/gpu_sections/__main__.py does it."""
    limit_s: float
    """After that it is ended; what it has found by then stays."""
    least_s: float
    """It is not started with less time left."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


def plan(
    setting: Setting, presets: Sequence[str] | None = None, modes: Sequence[str] | None = None
) -> list[Section]:
    """All sections: what is asked for most stands first, so that the end of the time takes the rest."""
    if setting.tiny:
        return _tiny_plan(setting, presets or PRESETS[:2], modes)
    # Modes like others to whoever names modes.
    compiled, flex = ((), ()) if modes else ((COMPILED,), (COMPILED_FLEX,))
    presets, modes = presets or PRESETS, modes or MODES
    first, others = presets[:2], presets[2:]
    profiles = [Section(f"profile/{preset}", "profile", 170, 60, {"preset": preset}) for preset in first]
    return [
        # Its first import of torch and CUDA is from a cold disk.
        Section("environment", "environment", 120, 10),
        Section("parity", "parity", 80, 25),
        *_trained(setting, first, modes[:1]),
        *_peers(first, False),
        *_trained(setting, first[:1], compiled),
        *profiles[:1],
        *_trained(setting, first[1:], compiled),
        *_trained(setting, first, flex),
        Section("tests", "tests", 290, 60),
        *profiles[1:],
        *(Section(f"attention/{preset}", "attention", 100, 25, {"preset": preset}) for preset in first),
        # Recomputation cannot be faster where memory suffices.
        *_trained(setting, first, modes[1:]),
        *_peers(first, True),
        *_trained(setting, others, modes),
        *_peers(others, False),
        *_peers(others, True),
        *_trained(setting, [LARGEST], modes[-1:], {"measured": list(presets), "first_rows": 4}),
    ]


def _tiny_plan(setting: Setting, presets: Sequence[str], modes: Sequence[str] | None) -> list[Section]:
    """Every kind of section, few of each: the first preset by each mode, the others by one."""
    t5 = [preset for preset in presets if preset.startswith("t5_")][:1]
    sections = [
        Section("environment", "environment", 0, 0),
        Section("parity", "parity", 0, 0),
        Section("tests", "tests", 0, 0),
        *_trained(setting, presets[:1], modes or MODES[:2]),
        *_trained(setting, presets[1:], modes or MODES[-1:]),
        *_peers(t5, False),
        *_peers(t5, True),
        *(Section(f"profile/{preset}", "profile", 0, 0, {"preset": preset}) for preset in presets[:1]),
        *(Section(f"attention/{preset}", "attention", 0, 0, {"preset": preset}) for preset in presets[:1]),
        *_trained(setting, [LARGEST], MODES[-1:], {"measured": list(presets)}),
    ]
    # Nothing takes long, but one that hangs must be ended.
    return [replace(section, limit_s=120, least_s=2) for section in sections]


def chosen(sections: Iterable[Section], patterns: Sequence[str]) -> list[Section]:
    """Those whose name fits one of the shell patterns; no pattern: all."""
    return [s for s in sections if not patterns or any(fnmatch(s.name, pattern) for pattern in patterns)]


def _trained(
    setting: Setting, presets: Iterable[str], modes: Sequence[str], more: Mapping[str, Any] | None = None
) -> Iterator[Section]:
    for preset in presets:
        for mode in modes:
            arguments = {"preset": preset, "mode": mode, **(more or {})}
            # Most of the largest one's time goes into drawing its weights, of a compiled one's into compiling.
            is_compiled = mode in (COMPILED, COMPILED_FLEX)
            limit_s, least_s = (120, 60) if preset == LARGEST or is_compiled else (75, 30)
            if is_compiled and not setting.tiny:
                arguments.setdefault(
                    "first_rows", COMPILED_ROWS
                )  # each size is compiled anew: few can be tried
            yield Section(f"ours/{preset}/{mode}", "ours", limit_s, least_s, arguments)


def _peers(presets: Iterable[str], compiled: bool) -> Iterator[Section]:
    for preset in presets:
        if preset.startswith("t5_"):
            arguments = {"preset": preset, "compiled": compiled}
            if compiled:
                yield Section(f"hf/{preset}/compile", "hf", 170, 60, arguments)
            else:
                yield Section(f"hf/{preset}/plain", "hf", 60, 25, arguments)
