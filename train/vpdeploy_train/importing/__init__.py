"""Importing checkpoints of the public VPT, E²VPT and VAPT code as runs."""
