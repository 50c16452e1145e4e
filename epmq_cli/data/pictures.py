"""Decodes the pictures of every data source by the same rules: all become RGB with 8 bits per channel.

| stored as | becomes |
|---|---|
| RGB, grey, palette, 1 bit, YCbCr, HSV, CMYK | converted by Pillow; opaque RGB pictures keep every pixel |
| LAB | converted to sRGB with the colour profiles of littlecms |
| with transparency: RGBA, grey with alpha, palette, a transparent colour | composited over `background` |
| 16-bit grey | divided by its white level: 65535, or 4095 for a TIFF with 12 bits |
| 32-bit integers | divided by 65535; by 255 in a TIFF whose values do not exceed 255 |
| floats | must lie in 0..1 |
| with an EXIF orientation | rotated upright |
| several frames or pages | the first, with one message |
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageFile, ImageOps, UnidentifiedImageError

from epmq_cli.config.validate import check_range
from epmq_cli.errors import ConfigError, DataError, first_line, literal
from epmq_cli.runtime.console import log, say

ORIENTATION = 0x0112  # of EXIF
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
EIGHT, TWELVE, SIXTEEN = 255, 4095, 65535  # white in so many bits
NEVER = {"EPS", "MPEG"}  # EPS runs Ghostscript; of MPEG, Pillow only reads the size
FULL = {"PNG", "PPM"}  # formats whose 32-bit integers are 16 bits at full scale
PAGED = {"GIF", "PNG", "WEBP", "AVIF", "TIFF", "FLI", "DCX"}  # formats whose frames are separate pictures
DARK = 4096  # a 16-bit picture whose values are all below this is nearly black in 8 bits


class UnreadableError(Exception):
    """A picture cannot be converted to 8 bits; the message states the reason. The caller adds the name."""


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """The formats that Pillow decodes without other programs, common ones first."""
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in NEVER and not _is_stub(Image.OPEN[name][0]))


def _is_stub(factory: Any) -> bool:
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


@lru_cache(maxsize=1)
def endings() -> frozenset[str]:
    """The file extensions of these formats, in lower case, with the dot."""
    names = {*formats(), "MPO"}  # Pillow reads MPO as JPEG
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in names)


def check_decoding(background: object, white_level: object) -> None:
    """ConfigError if the options of a data source are invalid for `Decoder`."""
    if background is not None:
        try:
            ImageColor.getrgb(str(background))
        except ValueError as error:
            raise ConfigError(
                "data.background must be a colour such as white, black or '#ff8000', or null to drop transparency, "
                f"got {literal(background)}"
            ) from error
    if white_level is not None:
        check_range("data.white_level", white_level, 0, math.inf, open_low=True)


def are_images(values: Sequence[Any]) -> bool:
    """Whether a column holds images, as `datasets` stores them or as the bytes of files."""
    value = next((value for value in values if value is not None), None)
    if isinstance(value, bytes):
        return not _is_text(value)
    return isinstance(value, Mapping) and {"bytes", "path"} == value.keys()


def _is_text(content: bytes) -> bool:
    """Whether bytes are text in UTF-8; files of the common image formats are not."""
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


class Decoder:
    """Decodes the pictures of one data source, and reports each kind of conversion once.

    `background`: the colour behind transparent pictures; None drops the transparency, as `convert("RGB")` does.
    `white_level`: the value of white in pictures with more than 8 bits, None for the default.
    """

    def __init__(self, background: str | None = "white", white_level: float | None = None) -> None:
        self.background, self.white_level = background, white_level
        self._said: set[str] = set()
        self._integers: int | None = None

    @property
    def key(self) -> bytes:
        """The options, on which decoding depends beside the bytes of a picture."""
        return f"{self.background} {self.white_level}\n".encode()

    def decode(self, content: bytes, where: str) -> Image.Image:
        """The picture in the content of a file. `where` names it in the DataError."""
        try:
            return self._rgb(Image.open(io.BytesIO(content), formats=formats()), where)
        except UnreadableError as error:
            raise DataError(f"{where}: {error}") from error
        except Exception as error:  # Pillow raises unrelated errors on corrupted files
            reason = "unknown format" if isinstance(error, UnidentifiedImageError) else None
            raise DataError(
                f"{where} is not an image that Pillow can read ({reason or first_line(error)}); remove or replace it"
            ) from error

    def convert(self, image: Image.Image, where: str) -> Image.Image:
        """The RGB picture of a decoded picture. `where` names it in the DataError."""
        try:
            return self._rgb(image, where)
        except UnreadableError as error:
            raise DataError(f"{where}: {error}") from error

    def _rgb(self, stored: Image.Image, where: str) -> Image.Image:
        if stored.format in PAGED and getattr(stored, "is_animated", False):
            self._once(say, "frames", f"{where} has several frames; epmq reads only the first frame of such pictures")
        stored.load()
        if 0 in stored.size:
            raise UnreadableError("the picture has no pixels")
        image = _upright(stored)
        if image.mode == "F" or image.mode[0] == "I":
            image = self._scaled(image, stored, where)
        if image.has_transparency_data:
            return self._over_background(image, where)
        if image.mode == "LAB":
            return _from_lab(image)
        return image if image.mode == "RGB" else image.convert("RGB")

    def _over_background(self, image: Image.Image, where: str) -> Image.Image:
        layer = _with_alpha(image)
        picture, alpha = layer.convert("RGB"), layer.getchannel("A")
        if self.background is None or alpha.getextrema()[0] == 255:
            return picture
        self._once(
            say,
            "transparent",
            f"{where} has transparent pixels; epmq composites such pictures over {self.background} (data.background)",
        )
        ground = Image.new("RGB", layer.size, ImageColor.getrgb(self.background)[:3])
        ground.paste(picture, mask=alpha)
        return ground

    def _scaled(self, image: Image.Image, stored: Image.Image, where: str) -> Image.Image:
        """The picture in 8-bit grey, with an alpha channel if one of its values is transparent."""
        values = np.asarray(image)
        lowest, highest = float(values.min()), float(values.max())
        white = self._white(stored, highest)
        if not 0 <= lowest <= highest <= white:  # false for NaN
            raise UnreadableError(
                f"its pixels are {'floats' if image.mode == 'F' else 'integers'} from {lowest:g} to {highest:g}, which "
                f"must lie in 0..{white:g}; set data.white_level to the value of white, or save it with 8 bits"
            )
        if self.white_level is None and white == SIXTEEN and 0 < highest < DARK:
            self._once(
                log.warning,
                "dark",
                f"{where} has 16 bits and no value above {highest:g} of {SIXTEEN}, which is nearly black in 8 bits; if "
                f"white is not {SIXTEEN}, set data.white_level to the value of white",
            )
        grey = values / white * 255
        if _tags(stored).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts only those with 8 bits
            grey = 255 - grey
        scaled = Image.fromarray(np.rint(grey).astype(np.uint8))
        if "transparency" in image.info:
            scaled.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
        return scaled

    def _white(self, stored: Image.Image, highest: float) -> float:
        if self.white_level is not None:
            return self.white_level
        if stored.mode == "F":
            return 1
        if stored.mode != "I":
            return TWELVE if tuple(_tags(stored).get(BITS, ())) == (12,) else SIXTEEN
        white = EIGHT if highest <= EIGHT and stored.format not in FULL else SIXTEEN
        if self._integers not in (None, white):
            raise UnreadableError(
                f"its pixels are 32-bit integers up to {highest:g}, so white is {white}, but it is {self._integers} in "
                "other pictures of the data set; set data.white_level to the value of white in all of them"
            )
        self._integers = white
        return white

    def _once(self, tell: Callable[[str], None], kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            tell(message)


def _tags(stored: Image.Image) -> Any:
    """The tags of a TIFF."""
    return getattr(stored, "tag_v2", {})


def _upright(image: Image.Image) -> Image.Image:
    """The picture rotated by its EXIF orientation; unchanged if the EXIF data cannot be read."""
    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # viewers ignore corrupted EXIF data, for which Pillow raises unrelated errors
        return image
    return image if turned == 1 else ImageOps.exif_transpose(image)


def _with_alpha(image: Image.Image) -> Image.Image:
    """The picture as RGBA."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > EIGHT:  # of a 16-bit PNG, which Pillow reads with 8 bits
        image.info["transparency"] = tuple(part >> 8 for part in colour)
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted
