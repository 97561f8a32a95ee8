"""Engines: a deployed graph compiled for named GPUs, and the folder in which they lie beside it."""
