"""Photos are read right, whatever their file."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from vision_attn.data.reading import decode_image, find_damage, find_images, read_image
from vision_attn.errors import UsageError

BLOCKS = np.kron(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_a_jpeg_is_read_as_pillow_reads_it():
    content = encoded(Image.fromarray(BLOCKS), "JPEG", quality=95)
    assert difference(decode_image(content), np.asarray(Image.open(io.BytesIO(content)))) < 1


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, -1), (8, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, turn, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(BLOCKS), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    assert difference(decode_image(content), np.rot90(BLOCKS, turn)) < 6


def test_grey_palette_and_cmyk_files_become_rgb():
    image = Image.fromarray(BLOCKS)
    grey = np.asarray(image.convert("L"))
    assert difference(decode_image(encoded(image.convert("L"), "JPEG", quality=95)), grey[..., None].repeat(3, 2)) < 2
    paletted = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    assert difference(decode_image(encoded(paletted, "PNG")), BLOCKS) < 4
    assert difference(decode_image(encoded(image.convert("CMYK"), "JPEG", quality=95)), BLOCKS) < 6


def test_transparency_is_laid_on_white_not_on_the_colour_under_it():
    rgba = np.dstack([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)])
    rgba[:, 4:, 3] = 255
    image = decode_image(encoded(Image.fromarray(rgba), "PNG"))
    assert (image[:, :4] == 255).all()
    assert (image[:, 4:] == 0).all()
    half = np.full((8, 8, 4), (0, 0, 0, 128), np.uint8)
    assert abs(int(decode_image(encoded(Image.fromarray(half), "PNG"))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = decode_image(encoded(Image.fromarray(pixels), kind))
    assert difference(image[..., 0], np.rint(pixels / 257)) == 0
    assert image[..., 0].max() == 255


def test_reduced_decoding_keeps_the_asked_size_and_the_picture():
    content = encoded(Image.fromarray(BLOCKS), "JPEG", quality=95)
    assert decode_image(content, min_size=96).shape == (96, 144, 3)
    assert decode_image(content, min_size=49).shape == (96, 144, 3)
    half = decode_image(content, min_size=48)
    assert half.shape == (48, 72, 3)
    assert difference(half, BLOCKS[::2, ::2]) < 10


def test_damage_is_told_in_one_line(tmp_path):
    whole = encoded(Image.fromarray(BLOCKS), "JPEG", quality=95)
    files = {
        "truncated.jpg": (whole[: len(whole) // 2], "damaged"),
        "text.jpg": (b"not a photo", "no image"),
        "empty.jpg": (b"", "empty file"),
        "pixel.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), "at least 4 x 4 pixels"),
        "truncated.png": (encoded(Image.fromarray(BLOCKS), "PNG")[:-40], "damaged"),
    }
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=reason) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
        assert reason in (find_damage(tmp_path / name) or "")
    with pytest.raises(UsageError, match="No such file"):
        read_image(tmp_path / "absent.jpg")


def test_the_end_of_a_thumbnail_is_not_taken_for_the_end_of_the_photo(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 144, 3), dtype=np.uint8))
    thumbnail = encoded(image.resize((36, 24)), "JPEG")
    # A camera's EXIF: a directory without tags, then one with the thumbnail's place (44 bytes on) and length.
    tiff = b"II*\0" + struct.pack("<IHIHHHIIHHIII", 8, 0, 14, 2, 0x201, 4, 1, 44, 0x202, 4, 1, len(thumbnail), 0)
    content = encoded(image, "JPEG", quality=95, exif=b"Exif\0\0" + tiff + thumbnail)
    assert content.count(b"\xff\xd9") == 2
    (tmp_path / "whole.jpg").write_bytes(content)
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    assert b"\xff\xd9" in (tmp_path / "cut.jpg").read_bytes()
    assert find_damage(tmp_path / "whole.jpg") is None
    assert "cut.jpg, got a damaged one" in find_damage(tmp_path / "cut.jpg")


def test_a_good_photo_is_never_called_damaged(tmp_path):
    whole = encoded(Image.fromarray(BLOCKS), "JPEG", quality=95)
    # A film behind the photo, as phones append it, hides the end marker.
    (tmp_path / "film.jpg").write_bytes(whole + struct.pack("<I", 7) * 30_000)
    (tmp_path / "plain.jpg").write_bytes(whole)
    (tmp_path / "photo.webp").write_bytes(encoded(Image.fromarray(BLOCKS), "WEBP"))
    assert [find_damage(path) for path in find_images([tmp_path])] == [None] * 3


def test_photos_are_found_once_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPG", "b/1.png", "a.jpeg", "notes.txt", "._a.jpeg"):
        (tmp_path / name).write_bytes(b"x")
    found = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path, tmp_path / "a.jpeg"])]
    assert found == ["a.jpeg", "b/1.png", "b/2.JPG"]
    with pytest.raises(UsageError, match="does not exist"):
        find_images([tmp_path / "nope"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="at least one photo"):
        find_images([tmp_path / "empty"])
