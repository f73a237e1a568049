"""This machine: what it has, and what it could do at best. Knows no models.

Facts come from the operating system's own files and calls; what a system does not tell is None.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dapji.ops import native

FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)
"""Names, as Linux writes them, of the instructions that matter for integer and float dot products."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    system: str
    processor: str | None
    features: tuple[str, ...] | None
    """Those of FEATURES that the processor has."""
    processors: int
    """Logical processors that this process may use."""
    memory: int | None
    """Bytes; in a container, its limit."""
    memory_available: int | None
    """Bytes that a new process could use without swapping."""
    huge_pages: str | None
    """Linux: when memory comes in pages of 2 MiB: always, madvise or never."""


def describe_machine() -> Machine:
    facts = _proc_cpuinfo()
    flags = facts.get("flags") or facts.get("Features")
    memory, available = _memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=facts.get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or None,
        features=None if flags is None else tuple(name for name in FEATURES if name in flags.split()),
        processors=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory=memory,
        memory_available=available,
        huge_pages=_huge_pages(),
    )


def resident_memory() -> int | None:
    """Bytes of this process that lie in memory."""
    pages = _read("/proc/self/statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What no program on this machine can exceed by much, measured just now."""

    read_bandwidth: float
    """Bytes per second that all threads together read from memory."""
    int8_peak: float | None
    """Operations per second in 8-bit dot products, a multiplication and an addition counted as two; None: this
    installation has no compiled kernels to measure it with."""


def measure_limits(threads: int) -> Limits:
    """Takes about a second."""
    if native.available():
        return Limits(read_bandwidth=native.read_bandwidth(threads), int8_peak=native.int8_peak(threads))
    return Limits(read_bandwidth=_read_bandwidth(threads), int8_peak=None)


def _read_bandwidth(threads: int) -> float:
    """By numpy, which lets go of the interpreter's lock while it reduces: the best of four passes over 256 MiB."""
    shares = np.array_split(np.ones(1 << 25, dtype=np.int64), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(np.max, shares))
            seconds.append(time.perf_counter() - start)
    return sum(share.nbytes for share in shares) / min(seconds)


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor's entry; empty where there is no such file."""
    lines = _read("/proc/cpuinfo").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _memory() -> tuple[int | None, int | None]:
    """(total, available): the system's, or where it is smaller the limit of this process's control group."""
    total = available = None
    for line in _read("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == "MemTotal":
            total = int(value.split()[0]) * 1024
        elif key == "MemAvailable":
            available = int(value.split()[0]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal() and total is not None and available is not None:
        used = int(_read("/sys/fs/cgroup/memory.current").strip() or 0)
        total, available = min(total, int(limit)), min(available, max(0, int(limit) - used))
    if total is None and (size := _sysctl("hw.memsize")) is not None:
        total = int(size)
    return total, available


def _huge_pages() -> str | None:
    text = _read("/sys/kernel/mm/transparent_hugepage/enabled")  # as in "always [madvise] never"
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _sysctl(name: str) -> str | None:
    """A value of macOS's sysctl."""
    if sys.platform != "darwin":
        return None
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
