"""How long an engine takes to build ahead of time, without a GPU.

python -m benchmarks.engines --backbone vit_base_patch16_224 --targets sm_75,sm_80,sm_86,sm_89,sm_120
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.table import write_zoo
from vpdeploy.engines.building import BuildRequest, build_engine
from vpdeploy.engines.target import parse_targets
from vpdeploy.format.artifact import Artifact
from vpdeploy.machine import cpu_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--targets", default="sm_75,sm_80,sm_86,sm_89,sm_120")
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        write_zoo(Path(folder) / "zoo", options.backbone, options.prompts, "fp16")
        artifact = Artifact.open(Path(folder) / "zoo")
        request = BuildRequest(runtime="tensorrt-rtx", targets=parse_targets(options.targets), force=True)
        cards = [build_engine(artifact, request).engine.card for _ in range(options.times)]
    seconds = [card.build_seconds for card in cards]
    print(
        f"{options.backbone}, fp16, switchable, {options.targets}: {statistics.median(seconds):.1f} s "
        f"({min(seconds):.1f}-{max(seconds):.1f}, {options.times} times), {cards[0].size_bytes / 1e6:.0f} MB; "
        f"TensorRT-RTX {cards[0].runtime_version}, {cpu_name()}"
    )


if __name__ == "__main__":
    main()
