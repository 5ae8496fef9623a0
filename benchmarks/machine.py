"""The machine that measured, without anything that identifies its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("torch", "adapterkit", "peft", "lycoris-lora", "transformers", "safetensors")


def describe() -> dict[str, str]:
    """CPU, cores, memory, system, and the versions of what is compared."""
    import psutil

    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    """The model's name and what it can do with matrices, for names alone say little on rented machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = [f for f in ("avx2", "avx512f", "amx_bf16") if f in fields.get("flags", "").split()]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return ", ".join([name, *flags])
