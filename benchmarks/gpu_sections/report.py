"""results.json of benchmarks/gpu.py as tables for people, and whether the targets are met. Needs no library."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MFU_PCT = 50.0
"""Of the card's dense peak, in useful operations, for each of MFU_PRESETS."""
MFU_PRESETS = ("modern_large", "t5_v1_1_large")
TIMES_HF = 2.0
"""Our tokens a second over Hugging Face's T5, of the same shape."""
N_STEPS = 100
"""In which nothing may wait for the device or be compiled."""

Sections = Mapping[str, Mapping[str, Any]]


def best_of(sections: Sections, preset: str, kind: str = "ours") -> dict[str, Any] | None:
    """The fastest of a preset's modes (of a peer's ways): its figures, `mode` and `section`; None: not measured."""
    found = [
        {**section["figures"]["best"], "mode": section["figures"].get("mode"), "section": name}
        for name, section in sections.items()
        if name.split("/")[:2] == [kind, preset] and section.get("figures", {}).get("best")
    ]
    return max(found, key=lambda best: best["tokens_per_s"], default=None)


def targets(sections: Sections) -> list[dict[str, Any]]:
    """What is aimed at: the value found, and whether it holds (None: not measured)."""
    found = []
    for preset in MFU_PRESETS:
        best = best_of(sections, preset)
        value = None if best is None else best["mfu_pct"]
        found.append(_target(f"{preset}: MFU of at least {MFU_PCT:.0f} %", value, lambda v: v >= MFU_PCT))
    for name in sorted({name.split("/")[1] for name in sections if name.startswith("hf/")}):
        ours, theirs = best_of(sections, name), best_of(sections, name, "hf")
        value = None if not (ours and theirs) else ours["tokens_per_s"] / theirs["tokens_per_s"]
        claim = f"{name}: at least {TIMES_HF:.0f} x the tokens/s of Hugging Face's T5"
        found.append(_target(claim, value, lambda v: v >= TIMES_HF))
    for name, section in sections.items():
        if name.startswith("profile/"):
            counted = section.get("figures", {}).get("counted")
            value = None if counted is None else counted["n_waits"] + counted["n_recompilations"]
            is_whole = counted is not None and counted["n_steps"] >= N_STEPS
            preset = name.split("/")[1]
            claim = (
                f"{preset}: no synchronisation in forward and backward, no recompilation in {N_STEPS} steps"
            )
            found.append(_target(claim, value, lambda v, is_whole=is_whole: v == 0 and is_whole))
    return found


def _target(claim: str, value: float | None, holds: Any) -> dict[str, Any]:
    return {"claim": claim, "value": value, "holds": None if value is None else bool(holds(value))}


def describe(name: str, section: Mapping[str, Any]) -> str:
    """A section's end, as one line."""
    line = f"{name:<32}{section['status']:<14}"
    best = section.get("figures", {}).get("best")
    if best:
        line += (
            f"{best['tokens_per_s']:>12,.0f} tokens/s  MFU {best['mfu_pct']:.1f} %  {best['rows']} rows  "
            f"{best['peak_memory_gib']:.1f} GiB  "
        )
    return line + str(section.get("reason", ""))


def write_table(content: Mapping[str, Any], path: Path) -> None:
    """All tables, in Markdown."""
    sections: Sections = content["sections"]
    lines = [
        "# GPU benchmark", "", *_environment(sections), "", *_targets(content["targets"]), "", *_parity(sections), "",
        *_training(sections), "", *_profiles(sections), "", *_attention(sections), "", *_left_out(sections),
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


def _environment(sections: Sections) -> Iterator[str]:
    found = sections.get("environment", {}).get("figures", {})
    if "device" not in found:
        return
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    yield f"{found['device']}, torch {found['torch']}, {packages}."
    if "gemm_peak_tflops" in found:
        share = 100 * found["gemm_peak_tflops"] / found["peak_tflops"]
        yield (
            f"Dense bf16 peak {found['peak_tflops']:,.1f} TFLOP/s ({found['peak_source']}); matrix products reach "
            f"{found['gemm_peak_tflops']:,.1f} ({share:.0f} %); a copy {found['copy_gb_per_s']:,.0f} GB/s."
        )


def _targets(found: list[dict[str, Any]]) -> Iterator[str]:
    yield from ("| target | found | holds |", "|---|---|---|")
    words = {True: "yes", False: "**no**", None: "not measured"}
    for target in found:
        value = "-" if target["value"] is None else f"{target['value']:.2f}"
        yield f"| {target['claim']} | {value} | {words[target['holds']]} |"


def _parity(sections: Sections) -> Iterator[str]:
    section = sections.get("parity", {})
    tests = sections.get("tests", {}).get("figures", {})
    if tests:
        yield f"tests/gpu: {tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed."
    for preset, found in section.get("figures", {}).items():
        yield (
            f"{preset}: bf16 is off from fp32 by {found['bf16_relative']:.1e} in {len(found['losses']['fp32'])} "
            f"losses, packed from unpacked rows by {found['packing_relative']:.1e}."
        )


def _training(sections: Sections) -> Iterator[str]:
    yield (
        "| | rows | tokens/s | useful TFLOP/s | MFU % | of GEMM % | padding % | memory GiB | planned: tokens/s | GiB | "
        "first step s | ended |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name, section in sections.items():
        found = section.get("figures", {})
        best = found.get("best")
        if not best:
            continue
        gemm = best["mfu_of_gemm_pct"]
        what = (
            f"{name} ({found['attention']})"
            if "attention" in found
            else name.replace("largest", found.get("preset", "largest"))
        )
        yield (
            f"| {what} | {best['rows']} | {best['tokens_per_s']:,.0f} | {best['useful_tflops']:,.2f} | "
            f"{best['mfu_pct']:.1f} | {'-' if gemm is None else f'{gemm:.1f}'} | {best['padding_pct']:.1f} | "
            f"{best['peak_memory_gib']:.1f} | {_planned(found)} | {found['first_step_s']:.1f} | "
            f"{found.get('stopped', 'by its limit')} |"
        )


def _planned(found: Mapping[str, Any]) -> str:
    """What the planner had said."""
    planned = found.get("planned")
    return f"{planned['tokens_per_s']:,.0f} | {planned['peak_memory_gib']:.1f}" if planned else "- | -"


def _profiles(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        found = section.get("figures", {})
        if not name.startswith("profile/") or "groups" not in found:
            continue
        parts = ", ".join(f"{group} {part['share_pct']:.1f} %" for group, part in found["groups"].items())
        yield (
            f"{found['preset']}, {found['mode']}, {found['rows']} rows: {1e3 * found['step_s']:.1f} ms a step while "
            f"traced, {found['n_kernels']:,.0f} kernels: {parts}."
        )
        if "counted" in found:
            counted = found["counted"]
            waits = ", ".join(f"{call} {count}" for call, count in counted["waits"].items()) or "none"
            yield (
                f"In {counted['n_steps']} steps of micro-batches of {counted['rows']} rows: waits for the device in "
                f"forward and backward: {waits}, in the update: {counted.get('n_waits_of_update', 'not counted')}; "
                f"recompilations: {counted['n_recompilations']}. "
                + " ".join(f"`{place}` {count}." for place, count in counted["where"].items())
            )
        yield ""


def _attention(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        found = section.get("figures", {})
        if not name.startswith("attention/") or "cases" not in found:
            continue
        yield f"{found['preset']}: {found['rows']} rows, {found['heads']} heads of {found['head_dim']}."
        yield from (
            "",
            "| attention | kernel | forward ms | with backward ms | largest relative error |",
            "|---|---|---|---|---|",
        )
        for case, kernels in found["cases"].items():
            for kernel, figures in kernels.items():
                yield f"| {case} | {kernel} | {_attention_cells(figures)} |"


def _attention_cells(figures: Mapping[str, Any]) -> str:
    if "why_not" in figures:
        return f"{figures['why_not']} | | "
    both = figures.get("forward_backward_ms")
    errors = figures.get("relative_error")
    cells = (
        f"{figures['forward_ms']:.3f}",
        figures.get("no_backward", "-") if both is None else f"{both:.3f}",
        "-" if errors is None else f"{max(errors.values()):.1e}",
    )
    return " | ".join(cells)


def _left_out(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        if section["status"] != "ok":
            yield f"- {name}: {section['status']}: {section['reason']}"
