"""What one more task costs: memory against the bytes of its compiled prompt set, and the time to add it.

    python -m benchmarks.table --backbone vit_base_patch16_224 --prompts 10 --tasks 256

The resident memory of the process is read before and after; Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.models import CLASSES, prompted_model, random_vit, trained
from vpdeploy import load
from vpdeploy.format.bundle import Bundle
from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.machine import cpu_name
from vpdeploy_export import Switchable, export_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=256)
    options = parser.parse_args()
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        prompt_set = write_zoo(Path(folder) / "zoo", options.backbone, options.prompts)
        with load(Path(folder) / "zoo", runtime="onnxruntime-cpu", threads=1) as session:
            seconds = []
            before = resident_bytes()
            for number in range(options.tasks):
                started = time.perf_counter()
                session.add_task(replace(prompt_set, card=replace(prompt_set.card, name=f"copy-{number}")))
                seconds.append(time.perf_counter() - started)
            grown = resident_bytes() - before
            slots = session.describe().slots
    added = slots - 1  # the table grows by a thirty-second: a few slots wait for further tasks
    task_bytes = grown / options.tasks
    print(f"{options.backbone}, {options.prompts} prompts, {CLASSES} classes, float32; {cpu_name()}")
    print(f"one compiled prompt set: {prompt_set.size_bytes / 1000:.0f} kB")
    print(
        f"{options.tasks} tasks more ({added} slots): {grown / 1e6:.0f} MB resident, {task_bytes / 1000:.0f} kB each, "
        f"{task_bytes / prompt_set.size_bytes:.3f} of its compiled bytes"
    )
    print(f"adding one: median {statistics.median(seconds) * 1000:.1f} ms, longest {max(seconds) * 1000:.0f} ms")


def write_zoo(path: Path, backbone: str, prompts: int, precision: Precision = "fp32") -> CompiledPromptSet:
    """Write a bundle of one task and return its prompt set."""
    model = prompted_model(random_vit(backbone), prompts)
    export_model([trained(model, "first", backbone=backbone)], path, target=Switchable(), precision=precision)
    return Bundle.open(path).read_task("first")


def resident_bytes() -> int:
    """Return the process's resident memory after everything free went back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
