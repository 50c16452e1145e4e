"""Draws the images of the `tiny` suite: many 32 x 32 pictures at once, from uniform numbers, with numpy alone.

Pixels are computed with additions, products, square roots and comparisons only. These are exact in IEEE arithmetic, so
the same numbers give the same bytes on every machine. Lengths are in pixels, colours in [0, 1], angles in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Colour = tuple[float, float, float]  # red, green, blue

SIDE = 32  # pixels
COLUMNS = 64  # uniform numbers per sample

_AXIS = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
_X, _Y = _AXIS[None, None, :], _AXIS[None, :, None]

# Each digit has seven rows of five pixels, with the most significant bit on the left.
_DIGITS = (
    (0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110),
    (0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110),
    (0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111),
    (0b11111, 0b00010, 0b00100, 0b00010, 0b00001, 0b10001, 0b01110),
    (0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010),
    (0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110),
    (0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110),
    (0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000),
    (0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110),
    (0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100),
)


class Dice:
    """Uniform numbers, one row per sample, consumed column by column in the order of the calls."""

    def __init__(self, uniforms: npt.NDArray[np.float64]) -> None:
        self.uniforms = uniforms  # (n, COLUMNS) in [0, 1)
        self.count = len(uniforms)
        self.used = 0

    def between(self, low: float, high: float, width: int = 1) -> Array:
        """(n, 1, width) numbers in [low, high)."""
        columns = self.uniforms[:, None, self.used : self.used + width]
        self.used += width
        return (low + (high - low) * columns).astype(np.float32)

    def tint(self, low: Colour, high: Colour) -> Array:
        """(n, 1, 3) colours between two colours."""
        bottom, top = np.array(low), np.array(high)
        colour: Array = (bottom + (top - bottom) * self.between(0, 1, 3)).astype(np.float32)
        return colour

    def ranks(self, width: int) -> Labels:
        """(n, width): a random permutation of 0..width-1 in each row."""
        columns = self.uniforms[:, self.used : self.used + width]
        self.used += width
        return np.argsort(np.argsort(columns, axis=1, kind="stable"), axis=1, kind="stable")


def _turned(x: Array, y: Array, turns: npt.NDArray[np.floating[Any]]) -> tuple[Array, Array]:
    """The coordinates in axes rotated by `turns` (1 = a full circle)."""
    angle = 2 * np.pi * turns.astype(np.float64)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return x * cos + y * sin, y * cos - x * sin


def _radius(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)


def _cover(distance: Array) -> Array:
    """The fraction of each pixel that is inside, given the signed distance to the edge in pixels (inside < 0)."""
    cover: Array = np.clip(np.float32(0.5) - distance, 0, 1)
    return cover


def _over(picture: Array, cover: Array, colour: Array) -> Array:
    """The picture (n, 32, 32, 3) blended with a colour (n, 1, 3) by cover (n, 32, 32)."""
    return picture + cover[..., None] * (colour[:, :, None, :] - picture)


def _two_colours(dice: Dice) -> tuple[Array, Array]:
    """Two colours (n, 1, 3) that differ by at least 0.2 in every channel; either may be the brighter."""
    dark, light = dice.between(0.0, 0.4, 3), dice.between(0.6, 1.0, 3)
    swap = dice.between(0, 1) < 0.5
    return np.where(swap, light, dark), np.where(swap, dark, light)


def _backdrop(dice: Dice, colour: Array, clutter: int) -> Array:
    """A background (n, 32, 32, 3) of one colour that fades in a random direction, with a few faint spots."""
    along, _ = _turned(_X, _Y, dice.between(0, 1))
    shade = along * dice.between(0.0, 0.008)
    picture = np.broadcast_to(colour[:, :, None, :], (dice.count, SIDE, SIDE, 3)) + shade[..., None]
    for _ in range(clutter):
        x, y = _X - dice.between(-15, 15), _Y - dice.between(-15, 15)
        blot = _cover(_radius(x, y) - dice.between(1.0, 2.5))
        picture = picture + (blot * dice.between(-0.25, 0.25))[..., None]
    return picture


def _placed(dice: Dice, shift: float, small: float, large: float, turn: float) -> tuple[Array, Array, Array]:
    """Coordinates in units of a random size, around a random centre, in axes rotated by up to `turn`; and the size."""
    size = dice.between(small, large)
    x, y = _X - dice.between(-shift, shift), _Y - dice.between(-shift, shift)
    x, y = _turned(x, y, dice.between(-turn, turn))
    return x / size, y / size, size


def _shape_edges(x: Array, y: Array) -> list[Array]:
    """Signed distances in units of the shape's size, one per class of the task `shapes`, in label order."""
    r, ax, ay = _radius(x, y), np.abs(x), np.abs(y)
    square = np.maximum(ax, ay)
    return [
        r - 0.95,
        square - 0.8,
        np.maximum(0.866 * ax + 0.5 * y, -y) - np.float32(0.5),
        np.maximum(square - 0.95, np.minimum(ax, ay) - 0.3),
        np.abs(r - 0.7) - 0.25,
        np.float32(0.7) * (ax + ay - np.float32(1.1)),
        np.maximum(r - 0.95, 0.75 - _radius(x - 0.5, y)),
        np.maximum(ay - 0.9, np.float32(0.75) * (ax - ay * np.float32(0.9))),
    ]


def shapes(dice: Dice, labels: Labels) -> Array:
    """One filled shape of random size, slightly rotated."""
    x, y, size = _placed(dice, shift=4, small=7.5, large=11, turn=0.05)
    return _cover(np.choose(labels[:, None, None], _shape_edges(x, y)) * size)


def _wave(position: Array) -> Array:
    """A triangle wave of period 1 between -1 and 1 (a sine would not be exact on every machine)."""
    wave: Array = 4 * np.abs(position - np.floor(position) - np.float32(0.5)) - 1
    return wave


def textures(dice: Dice, labels: Labels) -> Array:
    """One pattern with a period of 5 to 9 pixels, behind a round window."""
    period = dice.between(5, 9)
    x, y = _turned(_X, _Y, dice.between(-0.04, 0.04))
    x, y = x / period + dice.between(0, 1), y / period + dice.between(0, 1)
    across, down = _wave(x), _wave(y)
    patterns = [
        down,
        across,
        _wave((x + y) * np.float32(0.7)),
        _wave((x - y) * np.float32(0.7)),
        across * down * 3,
        across + down - np.float32(0.7),
        _wave(_radius(_X - dice.between(-5, 5), _Y - dice.between(-5, 5)) / period),
        _wave(y + np.float32(0.4) * across),
    ]
    pattern = np.choose(labels[:, None, None], patterns)
    window = _cover(_radius(_X - dice.between(-4, 4), _Y - dice.between(-4, 4)) - dice.between(12, 18))
    cover: Array = _cover(-2 * pattern) * window
    return cover


def _bitmaps() -> npt.NDArray[np.bool_]:
    """(10, 9, 7): the digits with a border of one empty pixel, so that clipped indices read zero."""
    rows = np.array(_DIGITS)[:, :, None] >> np.arange(4, -1, -1) & 1
    return np.pad(rows.astype(bool), ((0, 0), (1, 1), (1, 1)))


def digits(dice: Dice, labels: Labels) -> Array:
    """One 5 x 7 digit, enlarged 2.8 to 3.8 times, slanted, rotated and moved."""
    x, y, _ = _placed(dice, shift=2, small=2.8, large=3.8, turn=0.03)
    x = x * dice.between(0.9, 1.15) + y * dice.between(-0.15, 0.15)
    column = np.clip(np.floor(x + np.float32(3.5)), 0, 6).astype(np.int64)
    row = np.clip(np.floor(y + np.float32(4.5)), 0, 8).astype(np.int64)
    cover: Array = _bitmaps()[labels[:, None, None], row, column].astype(np.float32)
    return cover


def arrows(dice: Dice, labels: Labels) -> Array:
    """One arrow of random length and thickness in one of eight directions, with an error of up to 9 degrees."""
    x, y = _X - dice.between(-2, 2), _Y - dice.between(-2, 2)
    x, y = _turned(x, y, labels[:, None, None] / np.float32(8) + dice.between(-0.025, 0.025))
    length, thick = dice.between(8, 12), dice.between(1.0, 2.0)
    head = np.maximum(length - dice.between(6, 8) - x, np.float32(0.75) * (np.abs(y) + x - length))
    shaft = np.maximum(np.abs(x) - length + 2, np.abs(y) - thick)
    return _cover(np.minimum(head, shaft))


def counts(dice: Dice, labels: Labels) -> Array:
    """One to six discs of random size that do not touch: each is in its own cell of a 3 x 3 grid."""
    cell = dice.ranks(9)[:, :6]
    cover = np.zeros((dice.count, SIDE, SIDE), dtype=np.float32)
    for disc in range(6):
        column, row = (cell[:, disc] % 3)[:, None, None], (cell[:, disc] // 3)[:, None, None]
        x = _X - np.float32(10) * (column - np.float32(1)) - dice.between(-1.2, 1.2)
        y = _Y - np.float32(10) * (row - np.float32(1)) - dice.between(-1.2, 1.2)
        present = (disc <= labels)[:, None, None]
        cover = np.maximum(cover, _cover(_radius(x, y) - dice.between(2.5, 4)) * present)
    return cover


SUBJECTS: dict[str, Callable[[Dice, Labels], Array]] = {
    "shapes": shapes,
    "textures": textures,
    "digits": digits,
    "arrows": arrows,
    "counts": counts,
}
"""Maps each task to the function that computes the cover (n, 32, 32) of its subject."""


@dataclass(frozen=True)
class Scene:
    """The setting of a task's pictures: the ranges of the background's and the subject's colours, and a veil.

    `veil` returns (n, 32, 32) in [-1, 1], the light and shade over the whole picture. `strength` scales it.
    """

    back: tuple[Colour, Colour]
    front: tuple[Colour, Colour]
    veil: Callable[[Dice], Array]
    strength: float


def _stripes(dice: Dice, position: Array, period: float) -> Array:
    wave = _wave(position / np.float32(period) + dice.between(0, 1))
    return np.broadcast_to(wave, (dice.count, SIDE, SIDE))


def _hatching(dice: Dice) -> Array:
    return _stripes(dice, _X + _Y, period=6)


def _lines(dice: Dice) -> Array:
    return _stripes(dice, _Y, period=5)


def _bars(dice: Dice) -> Array:
    return _stripes(dice, _X, period=7)


def _camouflage(dice: Dice) -> Array:
    checks = _stripes(dice, _X, period=9) * _stripes(dice, _Y, period=9)
    veil: Array = np.clip(checks * 6, -1, 1)
    return veil


def _glare(dice: Dice) -> Array:
    far = _radius(_X - dice.between(-12, 12), _Y - dice.between(-12, 12)) / np.float32(9)
    veil: Array = np.clip(1 - far, -1, 1)
    return veil


SCENES: dict[str, Scene] = {
    "shapes": Scene(((0.7, 0.7, 0.7), (1, 1, 1)), ((0, 0, 0), (0.5, 0.5, 0.5)), _hatching, 0.4),
    "textures": Scene(((0.6, 0.3, 0.1), (0.9, 0.5, 0.3)), ((0.1, 0.1, 0.1), (0.3, 0.3, 0.6)), _glare, 0.35),
    "digits": Scene(((0, 0, 0), (0.15, 0.15, 0.15)), ((0.65, 0.65, 0.65), (1, 1, 1)), _lines, 0.42),
    "arrows": Scene(((0, 0.1, 0.5), (0.2, 0.35, 0.9)), ((0.8, 0.8, 0.2), (1, 1, 1)), _camouflage, 0.08),
    "counts": Scene(((0.05, 0.4, 0.1), (0.3, 0.6, 0.3)), ((0.85, 0.8, 0.6), (1, 1, 0.9)), _bars, 0.2),
}


def paint(task: str, dice: Dice, labels: Labels, in_scene: bool) -> Array:
    """Pictures (n, 32, 32, 3): the subject in two random colours, or in the colours and under the veil of its scene."""
    cover = SUBJECTS[task](dice, labels)
    if not in_scene:
        back, front = _two_colours(dice)
        return _over(_backdrop(dice, back, clutter=2), cover, front)
    scene = SCENES[task]
    back, front = dice.tint(*scene.back), dice.tint(*scene.front)
    veil = scene.veil(dice) * dice.between(0.5, 1) * np.float32(scene.strength)
    return _over(_backdrop(dice, back, clutter=2), cover, front) + veil[..., None]
