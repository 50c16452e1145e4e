"""Oracle: the encoded pixels, from the test or from Pillow, and the same bytes read through every data source."""

from __future__ import annotations

import io
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from epmq_cli.data.hub import Pictures
from epmq_cli.data.images import ArrayImages, ImageFiles, ImageFolder
from epmq_cli.data.pictures import Decoder, check_decoding, endings, formats
from epmq_cli.data.samples import Samples
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.pipeline.keys import hash_samples

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = RAMP.astype(np.uint16) * 257
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes, **options: Any) -> np.ndarray:
    image = Decoder(**options).decode(content, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(content: bytes, **options: Any) -> np.ndarray:
    """The one channel of a picture whose three channels are equal."""
    pixels = decoded(content, **options)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def tiff(values: np.ndarray, bits: int, photometric: int = 1) -> bytes:
    """An uncompressed grey TIFF, written by hand."""
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in values.ravel())
        data = int(packed, 2).to_bytes(len(packed) // 8, "big")
    else:
        data = values.astype(f"<u{bits // 8}").tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in {**tags, 279: len(data)}.items())
    return b"II*\0" + struct.pack("<IH", 8, 9) + entries + struct.pack("<I", 0) + data


PNM = b"P5 16 16 65535\n" + WIDE.astype(">u2").tobytes()
GREY = {
    "8 bits": encoded(Image.fromarray(RAMP), "PNG"),
    "16 bits": encoded(Image.fromarray(WIDE), "PNG"),
    "16 bits, TIFF": encoded(Image.fromarray(WIDE), "TIFF"),
    "16 bits, big-endian": encoded(Image.fromarray(WIDE.astype(">u2")), "TIFF"),
    "16 bits, JPEG 2000": encoded(Image.fromarray(WIDE), "JPEG2000"),
    "16 bits, PGM": PNM,
    "16 bits, white is 0": tiff(65535 - WIDE, 16, photometric=0),
    "12 bits": tiff(np.rint(RAMP / 255 * 4095).astype(int), 12),
    "32-bit integers": encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"),
    "32-bit integers of 8 bits": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "floats": encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "grey and opaque alpha": encoded(Image.fromarray(RAMP).convert("LA"), "PNG"),
}


@pytest.mark.parametrize("case", GREY)
def test_a_ramp_is_read_equally_from_every_format(case: str) -> None:
    assert np.array_equal(grey(GREY[case]), RAMP)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_opaque_pictures_keep_every_pixel(kind: str, mode: str) -> None:
    content = encoded(Image.fromarray(COLOURS).convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    wanted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    for background in ("white", "black", None):
        assert np.array_equal(decoded(content, background=background), wanted)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_in_pillow(mode: str) -> None:
    content = encoded(
        Image.fromarray(COLOURS).convert(mode), "TIFF" if mode == "YCbCr" else "PNG" if mode in "1P" else "JPEG"
    )
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_lab_is_converted_to_srgb() -> None:
    """White and mid grey in CIE L*a*b*."""
    content = encoded(Image.fromarray(np.array([[[255, 0, 0], [137, 0, 0]]], np.uint8), "LAB"), "TIFF")
    assert np.abs(decoded(content).astype(int) - [[[255] * 3, [128] * 3]]).max() <= 2


def transparent(mode: str) -> bytes:
    """Black, with the ramp as alpha if the mode has an alpha channel, and alpha 0 or 255 if it has a transparent
    colour."""
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (16, 16), 0)
        image.putalpha(Image.fromarray(RAMP))
        return encoded(image, "PNG")
    half = Image.fromarray(np.where(RAMP < 128, 7, 0).astype(np.uint8))
    if mode == "I;16":
        return encoded(Image.fromarray(np.where(RAMP < 128, 7, 0).astype(np.uint16)), "PNG", transparency=7)
    return encoded(half.convert(mode), "PNG", transparency=(7, 7, 7) if mode == "RGB" else 7)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "RGB", "P", "I;16"])
@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("black", 0), ("#404040", 64)])
def test_transparent_pictures_are_blended_with_the_background(mode: str, background: str, colour: int) -> None:
    content = transparent(mode)
    alpha = RAMP if mode in ("RGBA", "LA") else np.where(RAMP < 128, 0, 255)
    wanted = np.rint(colour * (1 - alpha / 255))
    assert np.abs(grey(content, background=background) - wanted).max() <= 1


def test_without_a_background_transparency_is_dropped() -> None:
    content = encoded(Image.fromarray(np.dstack([COLOURS, COLOURS[..., 0]])), "PNG")
    assert np.array_equal(decoded(content, background=None), COLOURS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_pictures_are_rotated_according_to_exif(kind: str, turned: int) -> None:
    """Orientations 1 to 8 tell where the stored upper left corner belongs."""
    pixels = np.zeros((16, 24), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = turned
    seen = decoded(encoded(Image.fromarray(pixels).convert("RGB"), kind, exif=exif))
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert seen.shape[:2] == ((16, 24) if turned < 5 else (24, 16))
    assert [corner for corner in {(0, 0), (0, -1), (-1, 0), (-1, -1)} if seen[corner][0] > 128] == [corners[turned]]


def test_damaged_exif_data_are_ignored() -> None:
    content = encoded(Image.fromarray(COLOURS), "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert np.array_equal(decoded(content), COLOURS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([[0, 3]]), r"x: its pixels are floats from 0 to 3, which must lie in 0..1; set data.white_level"),
        (np.float32([[-1, 1]]), r"x: its pixels are floats from -1 to 1"),
        (np.float32([[0, np.nan]]), r"x: its pixels are floats from nan to nan"),
        (np.int32([[0, 70000]]), r"x: its pixels are integers from 0 to 70000, which must lie in 0..65535"),
        (np.int32([[-5, 9]]), r"x: its pixels are integers from -5 to 9"),
    ],
)
def test_values_that_do_not_map_to_8_bits_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decoded(encoded(Image.fromarray(values), "TIFF"))


def test_the_white_level_can_be_set() -> None:
    twelve = np.rint(RAMP / 255 * 4095).astype(np.uint16)
    assert np.array_equal(grey(encoded(Image.fromarray(twelve), "PNG"), white_level=4095), RAMP)
    assert np.array_equal(grey(encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), white_level=255), RAMP)
    assert np.array_equal(grey(encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), white_level=255), RAMP)


def test_a_mix_of_8_bit_and_16_bit_pictures_is_refused() -> None:
    """A dark 16-bit picture would become a bright one."""
    decoder = Decoder()
    decoder.decode(GREY["32-bit integers"], "a")
    with pytest.raises(DataError, match=r"b: its pixels are 32-bit integers up to 255, so white is 255, but it is"):
        decoder.decode(GREY["32-bit integers of 8 bits"], "b")


def test_a_16_bit_picture_that_becomes_black_causes_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    decoder, dark = Decoder(), encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG")
    with caplog.at_level(logging.WARNING, "epmq"):
        decoder.decode(dark, "a.png")
        decoder.decode(dark, "b.png")
        decoder.decode(GREY["16 bits"], "c.png")
    (message,) = caplog.messages
    assert message.startswith("a.png has 16 bits and no value above 255 of 65535, which is nearly black in 8 bits")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_only_the_first_frame_is_read_with_one_message(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    decoder = Decoder()
    with caplog.at_level(logging.INFO, "epmq"):
        assert [decoder.decode(content, name).getpixel((0, 0)) for name in "ab"] == [(255, 0, 0)] * 2
    assert caplog.messages == ["a has several frames; epmq reads only the first frame of such pictures"]


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"no picture", encoded(Image.fromarray(COLOURS), "PNG")[:200]])
def test_pictures_that_cannot_be_decoded_are_named(content: bytes) -> None:
    with pytest.raises(
        DataError, match=r"x is not an image that Pillow can read \(.+\); remove or replace it"
    ) as raised:
        decoded(content)
    assert "\n" not in str(raised.value)


def test_postscript_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would pass it to Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(DataError, match="unknown format"):
        decoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_extensions_are_those_of_the_formats_that_pillow_decodes() -> None:
    assert {".png", ".jpg", ".jfif", ".webp", ".jp2", ".tif", ".gif", ".mpo"} <= endings()
    assert not {".h5", ".mpg", ".eps", ".pdf", ".wmf", ".txt"} & endings()
    assert set(formats()) <= set(Image.OPEN)


def test_all_sources_read_the_same_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = [*GREY.values(), transparent("RGBA"), encoded(Image.fromarray(COLOURS), "JPEG", exif=exif)]
    paths = [tmp_path / f"{index}.png" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    stored = [{"bytes": content, "path": None} for content in contents]
    pathed = [{"bytes": None, "path": str(path)} for path in paths]

    for index, content in enumerate(contents):
        wanted = decoded(content)
        for source in (ImageFiles(paths), Pictures(stored, "x"), Pictures(pathed, "x"), Pictures(contents, "x")):
            assert np.array_equal(np.asarray(source[index]), wanted)
    assert np.array_equal(np.asarray(ArrayImages(RAMP[None])[0]), decoded(GREY["8 bits"]))


def test_rows_without_an_image_are_named() -> None:
    for value in (None, {"bytes": None, "path": None}):
        with pytest.raises(DataError, match=r"here: image 0 is missing \(null\)"):
            _ = Pictures([value], "here")[0]


def test_the_hash_of_a_picture_depends_on_its_interpretation(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(transparent("RGBA"))
    options: list[dict[str, Any]] = [{}, {"background": "black"}, {"background": None}, {"white_level": 4095}]
    found = {hash_samples(ImageFolder(str(tmp_path), str(tmp_path), **each).load("train")) for each in options}
    assert len(found) == len(options)
    stored = [{"bytes": transparent("RGBA"), "path": None}]
    labels = ImageFolder(str(tmp_path), str(tmp_path)).load("train").labels[:1]
    hub = {hash_samples(Samples(Pictures(stored, "x", Decoder(**each)), labels)) for each in options}
    assert len(hub) == len(options)


def test_invalid_colours_and_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match="data.background must be a colour such as white, .* got 'ultraviolet'"):
        ImageFolder("a", "b", background="ultraviolet")
    with pytest.raises(ConfigError, match=r"data.white_level must be a number in \(0, inf\), got 0"):
        check_decoding("white", 0)
