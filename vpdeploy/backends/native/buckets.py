"""Batch sizes that are run: few enough to keep a captured graph for each, close enough to waste little."""

from __future__ import annotations

from vpdeploy.engines.profile import Range


def bucket_sizes(batch: Range) -> tuple[int, ...]:
    """Return the batch sizes to run, ascending: powers of two and the sizes halfway between them, within a profile.

    1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ... Exact sizes would need a graph, a context and a tuned shape for each of them;
    powers of two alone would compute up to twice what was asked. So at most a third of a batch is padding.
    """
    sizes = {batch.smallest, batch.largest}
    power = 1
    while power < batch.largest:
        sizes |= {power, power + power // 2}
        power *= 2
    return tuple(sorted(size for size in sizes if batch.holds(size)))


def bucket_for(count: int, sizes: tuple[int, ...]) -> int:
    """Return the smallest of the sizes that holds ``count`` images, or the largest if none does."""
    return next((size for size in sizes if size >= count), sizes[-1])
