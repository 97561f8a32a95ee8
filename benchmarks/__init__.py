"""Measurements: ``python -m benchmarks.NAME``; what they found is in docs/benchmarks.md."""
