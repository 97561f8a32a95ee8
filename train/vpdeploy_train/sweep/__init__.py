"""Searching a task's hyper-parameters on its validation images, with Optuna."""
