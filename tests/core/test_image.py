import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vpdeploy.errors import InputError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.image import decode_image, fit_image, load_pixels

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def preprocessing(size, **fields):
    return Preprocessing(image_size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **fields)


def smooth_photo(width, height):
    down, right = np.mgrid[0:height, 0:width]
    channels = [128 + 90 * np.sin(right / 70 + shift) * np.cos(down / 90) for shift in (0, 1, 2)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        # Where the picture's top-left (R) and top-right (B) pixels lie in the stored 2×2 image, row by row. By the
        # EXIF standard, stored row 0 shows the top (1, 2), the bottom (3, 4), the left (5, 8) or right side (6, 7).
        (1, "RB--"),
        (2, "BR--"),
        (3, "--BR"),
        (4, "--RB"),
        (5, "R-B-"),
        (6, "B-R-"),
        (7, "-B-R"),
        (8, "-R-B"),
    ],
)
def test_every_exif_orientation_is_turned_upright(orientation, stored):
    colours = {"R": RED, "B": BLUE, "-": WHITE}
    image = Image.new("RGB", (2, 2))
    image.putdata([colours[letter] for letter in stored])
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(decode_image(encode(image, exif=exif)))
    assert upright[0].tolist() == [list(RED), list(BLUE)]
    assert upright[1].tolist() == [list(WHITE), list(WHITE)]


def test_exif_rotation_swaps_width_and_height():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (40, 20), RED), "JPEG", exif=exif)
    assert decode_image(data).size == (20, 40)


def test_damaged_exif_does_not_cost_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(Image.new("RGB", (4, 2), RED), exif=exif))
    place = data.index(b"eXIf") + 4
    data[place : place + 4] = b"\xff\xff\xff\xff"
    length = struct.unpack(">I", data[place - 8 : place - 4])[0]
    data[place + length : place + length + 4] = struct.pack(">I", zlib.crc32(data[place - 4 : place + length]))
    assert decode_image(bytes(data)).size == (4, 2)


def test_exif_that_cannot_be_written_back_is_still_obeyed(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (4, 2), RED), exif=exif)

    def refuse(self: Image.Exif, offset: int = 8) -> bytes:
        raise struct.error("argument out of range")

    monkeypatch.setattr(Image.Exif, "tobytes", refuse)
    assert decode_image(data).size == (2, 4)


def test_sixteen_bit_grey_keeps_its_range():
    values = np.array([[0, 257, 257 * 200, 32768, 65535]], dtype=np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(values))))
    assert pixels.shape == (1, 5, 3)
    assert pixels[0].tolist() == [[value] * 3 for value in (0, 1, 200, 128, 255)]


def test_every_sixteen_bit_grey_is_rounded_to_the_nearest_of_eight_bits():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.asarray(decode_image(encode(Image.fromarray(values))))[..., 0]
    assert (pixels == np.round(values / 257)).all()


def test_images_of_several_bands_are_converted_as_small_ones_are():
    side = 1100  # more pixels than one band holds
    across = np.tile(np.arange(side, dtype=np.uint16) * 50, (side, 1))
    deep = np.asarray(decode_image(encode(Image.fromarray(across))))
    assert (deep == np.round(across / 257)[..., None]).all()
    veiled = Image.new("RGBA", (side, side), (255, 0, 0, 51))
    assert (np.asarray(decode_image(encode(veiled))) == (255, 204, 204)).all()


@pytest.mark.parametrize(
    ("image", "bytes_per_pixel"),
    [
        (Image.new("RGB", (1400, 1000)), 4),
        (Image.new("L", (1400, 1000)), 1),
        (Image.new("RGBA", (1400, 1000)), 8),
        (Image.fromarray(np.zeros((1000, 1400), np.uint16)), 3),
    ],
)
def test_what_decoding_takes_is_told_before_any_pixel_is_decoded(image, bytes_per_pixel):
    told = []

    def refuse(size: int) -> None:
        told.append(size)
        raise InputError("refused")

    data = encode(image)
    with pytest.raises(InputError, match="refused"):
        load_pixels(data, preprocessing(16), admit=refuse)
    assert told == [1400 * 1000 * bytes_per_pixel]


def test_a_jpeg_of_very_many_scans_is_refused():
    data = encode(smooth_photo(64, 64), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode_image(data).size == (64, 64)
    with pytest.raises(InputError, match="200 scans"):
        decode_image(data[:-2] + scan * 200 + data[-2:])


def test_float_grey_is_clipped_and_not_a_number_is_black():
    values = np.array([[-5.0, 0.0, 99.6, 300.0, np.nan]], dtype=np.float32)
    pixels = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))
    assert pixels[0, :, 0].tolist() == [0, 0, 100, 255, 0]


def test_grey_becomes_three_equal_channels():
    pixels = np.asarray(decode_image(encode(Image.new("L", (2, 2), 77))))
    assert pixels.tolist() == [[[77] * 3] * 2] * 2


def test_one_bit_images_become_black_and_white():
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    assert np.asarray(decode_image(encode(image))).tolist() == [[[0] * 3, [255] * 3]]


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 51)])
    pixels = np.asarray(decode_image(encode(image)))
    assert pixels[0].tolist() == [[255] * 3, [0] * 3, [255, 204, 204]]  # 51/255 is a fifth of red


def test_grey_with_alpha_is_laid_over_white():
    image = Image.new("LA", (2, 1))
    image.putdata([(0, 0), (40, 255)])
    assert np.asarray(decode_image(encode(image)))[0].tolist() == [[255] * 3, [40] * 3]


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert np.asarray(decode_image(encode(image, transparency=0)))[0].tolist() == [list(WHITE), list(BLUE)]


def test_a_transparent_colour_key_becomes_white():
    image = Image.new("RGB", (2, 1), BLUE)
    image.putpixel((0, 0), RED)
    assert np.asarray(decode_image(encode(image, transparency=RED)))[0].tolist() == [list(WHITE), list(BLUE)]


def test_cmyk_becomes_rgb():
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    decoded = decode_image(encode(cyan, "JPEG", quality=100), shorter_side=4)
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - [0, 255, 255]).max() <= 3


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(data))[4, 4].tolist() == list(RED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_a_truncated_file_is_refused(kind):
    data = encode(smooth_photo(120, 90), kind)
    with pytest.raises(InputError, match=r"^image: not a readable image"):
        decode_image(data[: len(data) // 2])


def test_a_truncated_jpeg_is_refused_at_a_reduced_scale_too():
    data = encode(smooth_photo(640, 480), "JPEG")
    with pytest.raises(InputError, match="truncated"):
        decode_image(data[: len(data) * 9 // 10], shorter_side=60)


def test_an_empty_file_is_refused_by_name(tmp_path):
    file = tmp_path / "empty.jpg"
    file.touch()
    with pytest.raises(InputError, match=r"empty\.jpg: not a readable image"):
        decode_image(file)


def test_text_is_refused_without_printing_an_address():
    with pytest.raises(InputError, match=r"image: not a readable image \(not in a known image format\)"):
        decode_image(b"hello")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.jpg: file not found"):
        decode_image(tmp_path / "none.jpg")


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        decode_image(tmp_path)


def test_a_vector_or_document_format_is_refused():
    with pytest.raises(InputError, match="not a readable image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    with pytest.raises(InputError, match="more than the accepted 64000000 pixels"):
        decode_image(png_header(side, side))


def test_the_pixel_limit_is_inclusive():
    data = encode(Image.new("RGB", (10, 10)))
    assert decode_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(InputError, match="10×10 is more than the accepted 99 pixels"):
        decode_image(data, max_pixels=99)


def test_random_damage_raises_nothing_but_input_errors():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    image = smooth_photo(52, 40)
    originals = [encode(image, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    originals += [encode(image, "GIF"), encode(image, "BMP"), encode(image, "TIFF", compression="tiff_lzw")]
    generator = random.Random(7)
    messages = []
    for original in originals:
        for _ in range(200):
            data = bytearray(original)
            for _ in range(generator.choice([1, 3, 10])):
                data[generator.randrange(min(len(data), 400))] = generator.randrange(256)
            try:
                decode_image(bytes(data), shorter_side=16, max_pixels=1_000_000)
            except InputError as error:
                messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert 100 < len(messages) < 1400


@pytest.mark.parametrize("size", [(1600, 1200), (1200, 1600), (449, 448), (447, 447), (2000, 500)])
def test_a_reduced_jpeg_is_no_smaller_than_asked(size):
    data = encode(smooth_photo(*size), "JPEG")
    assert min(decode_image(data, shorter_side=224).size) >= min(224, *size)


def test_a_reduced_jpeg_is_read_at_the_smallest_scale_that_suffices():
    data = encode(smooth_photo(1600, 1200), "JPEG")
    assert decode_image(data, shorter_side=300).size == (400, 300)
    assert decode_image(data, shorter_side=301).size == (800, 600)


def test_a_reduced_decode_gives_nearly_the_pixels_of_a_full_one():
    data = encode(smooth_photo(1600, 1200), "JPEG", quality=95)
    wanted = preprocessing(224)
    full = fit_image(decode_image(data), wanted).astype(int)
    reduced = load_pixels(data, wanted).astype(int)
    assert np.abs(full - reduced).mean() < 1
    assert np.abs(full - reduced).max() <= 8


def test_crop_keeps_the_centre_and_the_aspect_ratio():
    image = Image.new("RGB", (40, 20), BLUE)
    image.paste(RED, (10, 0, 30, 20))
    pixels = fit_image(image, preprocessing(20, crop_ratio=1.0))
    assert (pixels == RED).all()
    assert pixels.flags.writeable


def test_crop_ratio_cuts_the_margin_away():
    image = Image.new("RGB", (100, 100), BLUE)
    image.paste(RED, (10, 10, 90, 90))
    assert (fit_image(image, preprocessing(16, crop_ratio=0.75, interpolation="bilinear")) == RED).all()


def test_squash_keeps_everything():
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    pixels = fit_image(image, preprocessing(16, resize="squash", interpolation="bilinear"))
    assert pixels[8, 0].tolist() == list(RED)
    assert pixels[8, 15].tolist() == list(BLUE)


def test_file_and_bytes_give_the_same_pixels(tmp_path):
    file = tmp_path / "photo.jpg"
    file.write_bytes(encode(smooth_photo(300, 200), "JPEG"))
    wanted = preprocessing(64)
    from_file = load_pixels(file, wanted)
    assert from_file.shape == (64, 64, 3)
    assert from_file.dtype == np.uint8
    assert (from_file == load_pixels(file.read_bytes(), wanted)).all()
