"""What many images, many classes and large photos cost: seconds, images/s and peak memory, each in a fresh process.

::

    python -m benchmarks.scale_data make /tmp/scale --images 200000 --classes 10000
    python -m benchmarks.scale_data measure /tmp/scale/manifest.csv --epochs 1
    python -m benchmarks.scale_data photos /tmp/photos --images 200
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vpdeploy.machine import cpu_name, usable_cores

_SIDE = 64
_FILES_IN_A_FOLDER = 1_000
_PHOTO_SIZE = (4_032, 3_024)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one process took.

    Attributes:
        seconds: Of the wall clock, from start to end.
        peak_bytes: The most memory it held at once, resident; that of its largest process where there are several.
    """

    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.peak_bytes / 2**20:,.0f} MiB"


def make_images(root: Path, *, images: int, classes: int) -> Path:
    """Write small JPEGs of so many classes and a manifest without splits; every file is another one.

    Each class is a pattern of its own; the images of a class differ in a JPEG comment alone, so that 200,000 of them
    are written in seconds.

    Returns:
        The manifest.
    """
    root.mkdir(parents=True, exist_ok=True)
    manifest = root / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["path", "label"])
        encoded: dict[int, bytes] = {}
        for number in range(images):
            label = number % classes
            if label not in encoded:
                encoded[label] = _pattern(label)
            path = Path(f"{number // _FILES_IN_A_FOLDER:04}") / f"{number:07}.jpg"
            if number % _FILES_IN_A_FOLDER == 0:
                (root / path.parent).mkdir(exist_ok=True)
            (root / path).write_bytes(with_comment(encoded[label], str(number)))
            writer.writerow([str(path), f"class {label}"])
    return manifest


def make_photos(root: Path, *, images: int) -> Path:
    """Write 12-megapixel JPEGs in two class folders; a few scenes, of which every file is a different encoding.

    Returns:
        The folder.
    """
    scenes = [_scene(number) for number in range(4)]
    for number in range(images):
        folder = root / ("even", "odd")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05}.jpg").write_bytes(with_comment(scenes[number % len(scenes)], str(number)))
    return root


def with_comment(jpeg: bytes, text: str) -> bytes:
    """Return a JPEG with a comment segment behind its start marker (ITU-T T.81, B.2.4.5)."""
    body = text.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


def run_alone(arguments: list[str]) -> Cost:
    """Run a Python process to its end and return what it took.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    # Of all children so far the largest counts, so each is measured by a process of its own.
    code = (
        "import resource, subprocess, sys, time\n"
        "begun = time.monotonic()\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=sys.stderr)\n"
        "print(time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds, kilobytes = found.stdout.split()
    return Cost(seconds=float(seconds), peak_bytes=int(kilobytes) * 1024)


def measure(data: str, *, method: str, epochs: int, options: list[str]) -> None:
    """Print what it takes to list a data set, and to train on it and evaluate."""
    print(f"{cpu_name()}, {usable_cores()} cores; {data}")
    listing = "import sys; from vpdeploy_train.data import resolve_data; resolve_data(sys.argv[1], seed=0)"
    print(f"listed: {run_alone(['-c', listing, data])}")
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        verb = ["-m", "vpdeploy", "train", "--data", data, "--method", method, "--no-prune", "--epochs", str(epochs)]
        print(f"trained, {epochs} epochs: {run_alone([*verb, *options, '--out', run])}")
        print((Path(run) / "history.csv").read_text())
        print(f"evaluated: {run_alone(['-m', 'vpdeploy', 'eval', run])}")


def _pattern(label: int) -> bytes:
    """Return the JPEG of a class: blotches of random colours."""
    cells = np.random.default_rng(label).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return _encode(Image.fromarray(cells).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def _scene(number: int) -> bytes:
    """Return the JPEG of a large photo: blotches under fine grain, so that it is as large as a camera's."""
    rng = np.random.default_rng(number)
    blotches = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(_PHOTO_SIZE)
    grain = rng.integers(-12, 13, (_PHOTO_SIZE[1], _PHOTO_SIZE[0], 1), dtype=np.int16)
    return _encode(Image.fromarray(np.clip(np.asarray(blotches, np.int16) + grain, 0, 255).astype(np.uint8)))


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for name, images in (("make", 200_000), ("photos", 200)):
        step = steps.add_parser(name)
        step.add_argument("folder", type=Path)
        step.add_argument("--images", type=int, default=images)
        step.add_argument("--classes", type=int, default=10_000)
    step = steps.add_parser("measure")
    step.add_argument("data")
    step.add_argument("--method", default="vpt-deep")
    step.add_argument("--epochs", type=int, default=1)
    arguments, options = parser.parse_known_args()

    started = time.monotonic()
    if arguments.step == "measure":
        measure(arguments.data, method=arguments.method, epochs=arguments.epochs, options=options)
        return
    if arguments.step == "make":
        made = make_images(arguments.folder, images=arguments.images, classes=arguments.classes)
    else:
        made = make_photos(arguments.folder, images=arguments.images)
    print(f"{made}: {arguments.images} images in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
