"""How much memory decoded images may take."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MEMORY_SHARE: Final = 0.5
"""Share of the memory that is free at the start which decoded images may take."""

_UNKNOWN_BYTES: Final = 2 << 30  # where the system does not tell


class CacheBudget:
    """Bytes of decoded images that one or several data sets may keep between them.

    Args:
        limit_bytes: The largest number of bytes; 0 lets nothing be kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.kept_bytes = 0

    @classmethod
    def of_free_memory(cls) -> CacheBudget:
        """Return a budget of ``MEMORY_SHARE`` of the memory that is free now."""
        return cls(int(MEMORY_SHARE * free_memory()))

    @classmethod
    def of(cls, limit_bytes: int | None) -> CacheBudget:
        """Return a budget of so many bytes, or where that is None of a share of the memory that is free now."""
        return cls.of_free_memory() if limit_bytes is None else cls(limit_bytes)

    @property
    def free_bytes(self) -> int:
        """Bytes that are not taken yet."""
        return self.limit_bytes - self.kept_bytes

    def take(self, size_bytes: int) -> bool:
        """Take so many bytes; False, and none are taken, where fewer are left."""
        if size_bytes > self.free_bytes:
            return False
        self.kept_bytes += size_bytes
        return True


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process can still take: the system's, or less in a limited container.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    free = [size for size in (_system_bytes(root), _container_bytes(root)) if size is not None]
    return max(min(free, default=_UNKNOWN_BYTES), 0)


def _system_bytes(root: Path) -> int | None:
    """Return what Linux reports as available."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return int(sizes[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None


def _container_bytes(root: Path) -> int | None:
    """Return what is left of the limit of a container (cgroup, version 2 or 1)."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        folder = root / "sys/fs/cgroup"
        try:
            return int((folder / limit).read_text(encoding="ascii")) - int((folder / used).read_text(encoding="ascii"))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None
