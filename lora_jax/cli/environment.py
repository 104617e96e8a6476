"""Where a result came from: commit, versions, hardware."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("lora-jax", "jax", "jaxlib", "flax", "optax", "numpy")


def environment() -> dict[str, Any]:
    """All of it, as JSON has it; what cannot be found out is None."""
    devices = jax.local_devices()
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def free_bytes() -> int | None:
    """The memory of this machine that nobody has taken; None where the system does not tell."""
    found = _meminfo("MemAvailable")
    return None if found is None else found * 1024


def _commit() -> str | None:
    """Of the current folder's repository, with -dirty if something in it is not committed."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _processor() -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or None


def _memory_gib() -> float | None:
    found = _meminfo("MemTotal")
    return None if found is None else round(found / 2**20, 1)


def _meminfo(name: str) -> int | None:
    """In KiB."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) if found else None
    return None
