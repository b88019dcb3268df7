"""Decoding, cropping and resizing: what comes out of every kind of image, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from shards.conversion.images import MAX_PIXELS, ImageError, decode_image, decoder_version, prepare, to_ppm
from tests.support.shards_fixtures import encoded, picture


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def with_orientation(image: Image.Image, orientation: int, format: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, format, exif=exif)


@pytest.mark.parametrize("format", ["PNG", "PPM"])
def test_lossless_formats_give_the_pixels_back(format: str) -> None:
    image = picture(0)
    assert np.array_equal(pixels(decode_image(encoded(image, format))), np.asarray(image))


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats_give_nearly_the_pixels_back(format: str) -> None:
    image = picture(0)
    error = pixels(decode_image(encoded(image, format, quality=95))).astype(int) - np.asarray(image)
    assert np.abs(error).mean() < 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation: int, format: str) -> None:
    corners = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    upright = np.kron(corners, np.ones((16, 24, 1), np.uint8))  # red, green; blue, white; wider than high
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    image = decode_image(with_orientation(Image.fromarray(np.ascontiguousarray(stored)), orientation, format))
    assert image.size == (48, 32)
    error = pixels(image)[8::16, 12::24].astype(int) - corners
    assert np.abs(error).max() < 40


def test_damaged_exif_leaves_the_picture_as_it_is_stored() -> None:
    data = encoded(picture(0), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(data).size == (90, 120)


def test_grey_becomes_equal_red_green_and_blue() -> None:
    grey = picture(0).convert("L")
    assert np.array_equal(pixels(decode_image(encoded(grey, "PNG"))), np.repeat(np.asarray(grey)[..., None], 3, 2))


def test_black_and_white_becomes_0_and_255() -> None:
    assert pixels(decode_image(b"P4\n8 1\n\x0f"))[0, :, 0].tolist() == [255] * 4 + [0] * 4


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16)), "PNG"),
        b"P5\n5 1\n65535\n\x00\x00\x00\xff\x01\x00\x80\x00\xff\xff",
    ],
    ids=["PNG", "PPM"],
)
def test_sixteen_bit_grey_is_scaled_and_not_clipped(data: bytes) -> None:
    assert pixels(decode_image(data))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bit_colour_keeps_its_upper_byte() -> None:
    assert pixels(decode_image(b"P6\n1 1\n65535\n\x12\x34\x56\x78\x9a\xbc")).tolist() == [[[0x12, 0x56, 0x9A]]]


def test_cmyk_becomes_the_colour_that_it_prints() -> None:
    magenta = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 0, 0)), quality=95))
    assert np.abs(pixels(magenta).astype(int) - [255, 0, 255]).max() <= 2


def test_palette_becomes_its_colours() -> None:
    image = picture(0).quantize(16)
    assert np.array_equal(pixels(decode_image(encoded(image, "PNG"))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_laid_over_white(format: str) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 255), (200, 0, 0, 0), (0, 0, 0, 128)])
    found = pixels(decode_image(encoded(image, format, **({"lossless": True} if format == "WEBP" else {}))))
    assert found[0].tolist() == [[10, 20, 30], [255, 255, 255], [127, 127, 127]]


def test_grey_with_alpha_is_laid_over_white() -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(40, 255), (40, 0)])
    assert pixels(decode_image(encoded(image, "PNG")))[0].tolist() == [[40] * 3, [255] * 3]


def test_transparent_palette_entry_is_laid_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.putdata([0, 1])
    assert pixels(decode_image(encoded(image, "PNG", transparency=1)))[0].tolist() == [[1, 2, 3], [255] * 3]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animation_gives_its_first_frame(format: str) -> None:
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    data = encoded(red, format, save_all=True, append_images=[blue], **({"lossless": True} if format == "WEBP" else {}))
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert pixels(decode_image(data))[8, 8].tolist() == [255, 0, 0]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8000, 8001), (10_000, 10_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(ImageError, match=rf"^too large: .*{MAX_PIXELS} pixels$"):
        decode_image(png_of_size(*size))
    assert len(recwarn) == 0


def test_the_largest_allowed_size_is_not_taken_for_a_bomb() -> None:
    with pytest.raises(ImageError, match=r"^damaged: "):
        decode_image(png_of_size(8000, 8000))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG", "PPM"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_an_error(format: str, kept: float) -> None:
    data = encoded(picture(0), format)
    with pytest.raises(ImageError):
        decode_image(data[: int(kept * len(data))])


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(ImageError, match=r"^not a readable JPEG, WebP, PNG or PPM image$"):
        decode_image(encoded(picture(0), format))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"hello", b"P6\n0 0\n255\n", b"Pf\n1 1\n-1.0\n\0\0\0\0"])
def test_what_is_no_image_is_an_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data)


def test_random_damage_gives_a_picture_or_a_reason_of_one_line_that_repeats() -> None:
    rng = np.random.default_rng(0)
    sound = [encoded(picture(0, 20, 30), format) for format in ("JPEG", "WEBP", "PNG", "PPM")]
    outcomes = {"picture": 0, "reason": 0}
    for round in range(400):
        data = bytearray(sound[round % 4])
        for place in rng.integers(0, len(data), 1 + round % 5):
            data[place] = rng.integers(256)
        reasons = set()
        for _ in range(2):
            try:
                assert decode_image(bytes(data)).mode == "RGB"
                outcomes["picture"] += 1
            except ImageError as error:
                outcomes["reason"] += 1
                reasons.add(str(error))
        assert len(reasons) <= 1
        assert all(reason.isprintable() and len(reason) < 250 and "0x" not in reason for reason in reasons)
    assert min(outcomes.values()) > 50


def test_a_reason_names_no_memory_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(f"cannot\nread {object()}")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match=r"^damaged: cannot read the data$"):
        decode_image(b"")


def test_prepare_takes_the_centred_square() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = 10, 20, 30
    assert np.unique(pixels(prepare(Image.fromarray(wide), 10))).tolist() == [20]
    assert np.unique(pixels(prepare(Image.fromarray(wide.transpose(1, 0, 2).copy()), 10))).tolist() == [20]


def test_prepare_leaves_an_image_of_the_final_size_alone() -> None:
    image = picture(0, 64, 64)
    assert np.array_equal(pixels(prepare(image, 64)), np.asarray(image))


@pytest.mark.parametrize("size", [(256, 341), (341, 256), (257, 300), (64, 64), (20, 1000), (1, 1)])
def test_prepare_gives_the_size_asked_for(size: tuple[int, int]) -> None:
    assert prepare(picture(0, *size), 64).size == (64, 64)


def test_prepare_filters_exactly_over_the_full_picture() -> None:
    image = picture(3, 256, 256)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for full in (image, Image.fromarray(noise)):
        expected = full.resize((64, 64), Image.Resampling.LANCZOS)
        assert np.array_equal(pixels(prepare(full, 64)), np.asarray(expected))


def test_ppm_is_read_back_by_pillow_and_has_the_header_of_the_format() -> None:
    image = picture(0, 64, 64)
    ppm = to_ppm(image)
    assert ppm.startswith(b"P6\n64 64\n255\n") and len(ppm) == 12_301
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(ppm))), np.asarray(image))


def test_decoder_version_names_pillow_and_a_jpeg_library() -> None:
    assert decoder_version().startswith("Pillow ") and "libjpeg" in decoder_version()
