"""Pruning of prompt sets: importance scores, what to keep, and the report."""
