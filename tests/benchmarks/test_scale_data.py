from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.scale_data import make_images, make_photos, run_alone, with_comment
from vpdeploy.image import decode_image
from vpdeploy_train.data import resolve_data


def test_every_file_of_a_class_is_another_one_with_the_same_pixels(tmp_path):
    source = resolve_data(str(make_images(tmp_path / "set", images=12, classes=3)), seed=0)
    assert source.labels == ("class 0", "class 1", "class 2")
    files = [example for split in ("train", "val", "test") for example in source.split(split)]
    assert len({example.source.read_bytes() for example in files}) == 12
    pixels = {
        label: {np.asarray(decode_image(each.source)).tobytes() for each in files if each.label == label}
        for label in range(3)
    }
    assert [len(found) for found in pixels.values()] == [1, 1, 1]
    assert pixels[0] != pixels[1]


def test_photos_have_twelve_megapixels_and_two_classes(tmp_path):
    folder = make_photos(tmp_path / "photos", images=2)
    sizes = {path.parent.name: decode_image(path).size for path in folder.glob("*/*.jpg")}
    assert sizes == {"even": (4032, 3024), "odd": (4032, 3024)}


def test_a_comment_can_be_read_back():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(buffer, format="JPEG")
    with Image.open(io.BytesIO(with_comment(buffer.getvalue(), "hello"))) as image:
        assert image.info["comment"] == b"hello"


def test_the_peak_memory_is_that_of_the_process_alone():
    small, large = run_alone(["-c", "pass"]), run_alone(["-c", "b = bytearray(200_000_000); b[::4096] = b[::4096]"])
    assert large.peak_bytes - small.peak_bytes == pytest.approx(200e6, rel=0.2)
