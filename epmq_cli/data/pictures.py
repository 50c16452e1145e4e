"""One decoding rule for the pictures of every data source: whatever Pillow reads becomes RGB of 8 bits a channel.

| stored as | becomes |
|---|---|
| RGB, grey, palette, 1 bit, YCbCr, HSV, CMYK | what Pillow converts it to; opaque RGB pictures keep every pixel |
| LAB | sRGB, by the colour profiles of littlecms |
| with transparency: RGBA, grey with alpha, palette, a transparent colour | laid over `background` |
| 16-bit grey | divided by its white level: 65535, or 4095 where a TIFF says that it has 12 bits |
| 32-bit integers | likewise; those of a TIFF that do not exceed 255 are taken as 8 bits |
| floats | in 0..1; other ranges are refused |
| turned by an EXIF orientation | upright |
| several frames or pages | the first, which is said once |
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
from epmq_cli.errors import ConfigError, DataError, first_line, shown
from epmq_cli.runtime.console import log, say

ORIENTATION = 0x0112  # of EXIF
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
EIGHT, TWELVE, SIXTEEN = 255, 4095, 65535  # white in so many bits
NEVER = {"EPS", "MPEG"}  # the first runs Ghostscript, of the second Pillow only reads the size
FULL = {"PNG", "PPM"}  # formats whose 32-bit integers are 16 bits in full scale
PAGED = {"GIF", "PNG", "WEBP", "AVIF", "TIFF", "FLI", "DCX"}  # formats whose frames are pictures of their own
DARK = 4096  # of 65536: a picture of 16 bits below this is nearly black in 8 bits


class UnreadableError(Exception):
    """Why a picture has no meaning in 8 bits; the caller knows its name."""


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """The formats that Pillow decodes by itself, the usual ones first."""
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in NEVER and not _is_stub(Image.OPEN[name][0]))


def _is_stub(factory: Any) -> bool:
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


@lru_cache(maxsize=1)
def endings() -> frozenset[str]:
    """The endings of their files, in lower case, with the dot."""
    known = {*formats(), "MPO"}  # which Pillow reads as JPEG
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def check_decoding(background: object, white_level: object) -> None:
    """ConfigError where the options of a data source about its pictures are not ones that `Decoder` takes."""
    if background is not None:
        try:
            ImageColor.getrgb(str(background))
        except ValueError as error:
            raise ConfigError(
                "data.background must be a colour such as white, black or '#ff8000', or null to drop transparency, "
                f"got {shown(background)}"
            ) from error
    if white_level is not None:
        check_range("data.white_level", white_level, 0, math.inf, open_low=True)


def are_images(values: Sequence[Any]) -> bool:
    """Whether a column holds images as `datasets` stores them, or files of them."""
    value = next((value for value in values if value is not None), None)
    if isinstance(value, bytes):
        return not _is_text(value)
    return isinstance(value, Mapping) and {"bytes", "path"} == value.keys()


def _is_text(content: bytes) -> bool:
    """Whether bytes are a text in UTF-8, as no usual format of images is."""
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


class Decoder:
    """Decodes the pictures of one data source, and says once what it does to the first of a kind.

    `background`: the colour that transparent pictures are laid over; None drops their transparency, as
    `convert("RGB")` does. `white_level`: the value that is white in pictures of more than 8 bits, None for the usual.
    """

    def __init__(self, background: str | None = "white", white_level: float | None = None) -> None:
        self.background, self.white_level = background, white_level
        self._said: set[str] = set()
        self._integers: int | None = None

    @property
    def key(self) -> bytes:
        """What a stored picture means depends on this beside its bytes."""
        return f"{self.background} {self.white_level}\n".encode()

    def decode(self, content: bytes, where: str) -> Image.Image:
        """The picture that a file's content encodes; DataError names it by `where`."""
        try:
            return self._rgb(Image.open(io.BytesIO(content), formats=formats()), where)
        except UnreadableError as error:
            raise DataError(f"{where}: {error}") from error
        except Exception as error:  # Pillow has no common one, and pictures come from anywhere
            reason = "no format that Pillow reads" if isinstance(error, UnidentifiedImageError) else None
            raise DataError(
                f"{where} is not an image that Pillow can read ({reason or first_line(error)}); remove or replace it"
            ) from error

    def convert(self, image: Image.Image, where: str) -> Image.Image:
        """A picture that is decoded already; DataError names it by `where`."""
        try:
            return self._rgb(image, where)
        except UnreadableError as error:
            raise DataError(f"{where}: {error}") from error

    def _rgb(self, stored: Image.Image, where: str) -> Image.Image:
        if stored.format in PAGED and getattr(stored, "is_animated", False):
            self._once(say, "frames", f"{where} has several frames; epmq reads the first frame of such pictures")
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
            f"{where} has transparent pixels; epmq lays such pictures over {self.background} (data.background)",
        )
        ground = Image.new("RGB", layer.size, ImageColor.getrgb(self.background)[:3])
        ground.paste(picture, mask=alpha)
        return ground

    def _scaled(self, image: Image.Image, stored: Image.Image, where: str) -> Image.Image:
        """Grey of 8 bits, with an alpha channel where one of its values is transparent."""
        values = np.asarray(image)
        lowest, highest = float(values.min()), float(values.max())
        white = self._white(stored, highest)
        if not 0 <= lowest <= highest <= white:  # as NaN does not
            raise UnreadableError(
                f"its pixels are {'floats' if image.mode == 'F' else 'integers'} from {lowest:g} to {highest:g}, which "
                f"must lie in 0..{white:g}; set data.white_level to the value that is white, or save it in 8 bits"
            )
        if self.white_level is None and white == SIXTEEN and 0 < highest < DARK:
            self._once(
                log.warning,
                "dark",
                f"{where} has 16 bits and no value above {highest:g} of {SIXTEEN}, which is nearly black in 8 bits; if "
                f"{SIXTEEN} is not its white, set data.white_level to the value that is",
            )
        grey = values / white * 255
        if _tags(stored).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow turns those of 8 bits round, and no others
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
                f"its pixels are 32-bit integers up to {highest:g}, which suit a white of {white}, and those of others "
                f"beside it a white of {self._integers}; set data.white_level to the value that is white in all"
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
    """The picture as its EXIF data says that it is to be seen; as it is where they cannot be read."""
    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # viewers ignore damaged EXIF data, and Pillow has no common error for them
        return image
    return image if turned == 1 else ImageOps.exif_transpose(image)


def _with_alpha(image: Image.Image) -> Image.Image:
    """The picture as RGBA."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > EIGHT:  # of a PNG of 16 bits, which Pillow reads in 8
        image.info["transparency"] = tuple(part >> 8 for part in colour)
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    found = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert found is not None
    return found
