"""The accuracy table: prompt methods on small tasks whose images travel in packages.

See ``docs/accuracy.md``; run from the repository's root: ``python -m benchmarks.accuracy --help``.
"""
