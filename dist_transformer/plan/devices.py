"""What GPUs are, from their makers' data sheets, and what share of that programs reach."""

import difflib
from dataclasses import dataclass

import torch

from dist_transformer.errors import ConfigError
from dist_transformer.tracking.peak import table_peak


@dataclass(frozen=True)
class Gpu:
    """One device of a cluster."""

    name: str
    """As people say it."""
    sheet: str
    """As in `tracking.peak`, where its FLOP/s stand."""
    memory_gib: float
    """What torch reports of it, error correction and firmware taken off."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second to other devices of its node, in one direction."""
    host: float
    """Bytes a second to and from the host's memory."""

    def peak_flops(self, dtype: torch.dtype) -> float:
        """Dense FLOP/s of matrix products."""
        peak = table_peak(self.sheet, dtype)
        assert peak is not None
        return peak.flops_per_s


_PCIE_4, _PCIE_5 = 25e9, 50e9
"""Bytes a second that 16 lanes reach."""

GPUS: dict[str, Gpu] = {
    "b200": Gpu("B200", "B200", 178.0, 7.7e12, 900e9, _PCIE_5),
    "h200": Gpu("H200", "H200", 139.8, 4.8e12, 450e9, _PCIE_5),
    "gh200": Gpu("GH200", "GH200", 94.5, 4.0e12, 450e9, 200e9),
    "h100": Gpu("H100", "H100", 79.1, 3.35e12, 450e9, _PCIE_5),
    "h100-nvl": Gpu("H100 NVL", "H100 NVL", 93.1, 3.9e12, _PCIE_5, _PCIE_5),
    "h100-pcie": Gpu("H100 PCIe", "H100 PCIe", 79.1, 2.0e12, _PCIE_5, _PCIE_5),
    "a100": Gpu("A100", "A100", 79.1, 2.0e12, 300e9, _PCIE_4),
    "a100-40": Gpu("A100 40 GB", "A100", 39.4, 1.555e12, 300e9, _PCIE_4),
    "a40": Gpu("A40", "A40", 44.4, 0.696e12, _PCIE_4, _PCIE_4),
    "a30": Gpu("A30", "A30", 23.5, 0.933e12, _PCIE_4, _PCIE_4),
    "a10g": Gpu("A10G", "A10G", 22.0, 0.6e12, _PCIE_4, _PCIE_4),
    "l40s": Gpu("L40S", "L40S", 44.4, 0.864e12, _PCIE_4, _PCIE_4),
    "l4": Gpu("L4", "L4", 22.0, 0.3e12, _PCIE_4 / 2, _PCIE_4 / 2),
    "rtx6000-ada": Gpu("RTX 6000 Ada", "RTX 6000 Ada", 47.5, 0.96e12, _PCIE_4, _PCIE_4),
    "rtx4090": Gpu("RTX 4090", "RTX 4090", 23.5, 1.008e12, _PCIE_4, _PCIE_4),
    "rtx3090": Gpu("RTX 3090", "RTX 3090", 23.6, 0.936e12, _PCIE_4, _PCIE_4),
    "mi300x": Gpu("MI300X", "MI300X", 191.5, 5.3e12, 450e9, _PCIE_5),
}


def find_gpu(name: str) -> Gpu:
    """A GPU by the name that people type.

    Raises:
        ConfigError: if it is not in the table.
    """
    gpu = GPUS.get(name.lower().replace("_", "-").removeprefix("nvidia-"))
    if gpu is None:
        close = difflib.get_close_matches(name.lower(), GPUS, n=2)
        hint = f"did you mean {' or '.join(close)}? There are" if close else "there are"
        raise ConfigError(f"--gpu {name} is not in the table: {hint} {', '.join(GPUS)}")
    return gpu


@dataclass(frozen=True)
class Rates:
    """What programs reach of a data sheet's figures, and what the host needs. Assumptions, but for the hooks."""

    products: float = 0.7
    """Of the peak FLOP/s, in large matrix products."""
    attention: float = 0.35
    """Of the peak FLOP/s, in fused attention, forward and backward."""
    memory: float = 0.8
    """Of the memory's bandwidth, in passes over tensors."""
    links: float = 0.8
    """Of links and network, in collectives of large tensors."""
    hidden: float = 0.8
    """Of a pass, behind how much of it communication goes on, where DeepSpeed overlaps the two."""
    kernel_s: float = 2e-6
    """The least that a kernel takes."""
    launch_s: float = 25e-6
    """What the host needs to start one kernel from Python, autograd and views included: what small models wait for."""
    zero_2_hook_s: float = 70e-6
    """What DeepSpeed's hooks need for a module with parameters in a backward pass (measured, docs/log.md)."""
    zero_3_hooks_s: float = 650e-6
    """The same in ZeRO 3, in both passes together."""
    cpu_adam: float = 1e9
    """Elements a second that a node's processors update, with offloaded optimizer states."""
