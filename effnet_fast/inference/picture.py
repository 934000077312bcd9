"""Drawing class activation maps with Pillow: over the photograph, with a scale, and tiles side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFont

# Dark violet to yellow, lightness rising evenly: at values 0, 1/6, ... 1.
_COLOURS = np.array(
    [(13, 8, 135), (84, 2, 163), (139, 10, 165), (185, 50, 137), (219, 92, 104), (244, 136, 73), (240, 249, 33)], dtype=float
)
INK, FAINT, GOOD, BAD = "#1c1c28", "#6b6b7b", "#1a7f4b", "#c62828"
_OPACITY = 0.78


def font(size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # type: ignore[return-value]  # sized: always the scalable one


def overlay(photo: Image.Image, evidence: np.ndarray, limit: float) -> Image.Image:
    """``evidence`` [h, w] over a grey ``photo``, stretched to its size: clear at 0 and below, bright at ``limit``."""
    from PIL import Image

    stretched = Image.fromarray(evidence.astype(np.float32)).resize(photo.size, Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(stretched) / max(limit, 1e-12), 0, 1)[..., None]
    grey = np.asarray(photo.convert("L").convert("RGB"), dtype=np.float32)
    opacity = _OPACITY * np.sqrt(values)
    return Image.fromarray(np.rint(grey * (1 - opacity) + colours(values[..., 0]) * opacity).astype(np.uint8))


def colours(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1, of any shape -> RGB from 0 to 255 in a further last dimension."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, at, _COLOURS[:, channel]) for channel in range(3)], axis=-1)


def scale_bar(width: int, height: int) -> Image.Image:
    """The colours of :func:`overlay`, its limit on top."""
    from PIL import Image

    column = colours(np.linspace(1, 0, height))
    return Image.fromarray(np.rint(np.repeat(column[:, None], width, axis=1)).astype(np.uint8))


def beside(photo: Image.Image, evidence: np.ndarray, title: str, note: str, warning: str = "") -> Image.Image:
    """The photograph, the map over it, and the scale: one row, under a title line, a note, and a warning in red."""
    from PIL import Image, ImageDraw

    side, margin, bar, head = photo.height, 20, 18, 84
    limit = float(evidence.max())
    row = Image.new("RGB", (2 * photo.width + 4 * margin + bar + 70, side + head + margin), "white")
    draw = ImageDraw.Draw(row)
    draw.text((margin, 14), _shortened(title, font(22), row.width - 2 * margin), INK, font(22))
    draw.text((margin, 48), _shortened(note, font(16), row.width // 2), FAINT, font(16))
    if warning:
        draw.text((row.width - margin, 48), warning, BAD, font(16), anchor="ra")
    row.paste(photo, (margin, head))
    second = photo.width + 2 * margin
    row.paste(overlay(photo, evidence, limit), (second, head))
    left = second + photo.width + margin
    row.paste(scale_bar(bar, side), (left, head))
    draw.text((left + bar + 8, head), f"{max(limit, 0):.2g}", INK, font(16), anchor="la")
    draw.text((left + bar + 8, head + side), "0", INK, font(16), anchor="ld")
    return row


def compared(photo: Image.Image, tiles: list[tuple[Image.Image, list[str]]], title: str, warning: str = "") -> Image.Image:
    """The photograph and pictures of its size side by side, each over its lines of text; a title, and a warning in red."""
    from PIL import Image, ImageDraw

    margin, head, line = 16, 52, 22
    lines = max(len(told) for _, told in tiles)
    width, height = photo.size
    row = Image.new("RGB", ((1 + len(tiles)) * (width + margin) + margin, head + height + lines * line + 2 * margin), "white")
    draw = ImageDraw.Draw(row)
    reserved = font(16).getlength(warning) + 2 * margin
    draw.text((margin, 14), _shortened(title, font(22), int(row.width - margin - reserved)), INK, font(22))
    draw.text((row.width - margin, 20), warning, BAD, font(16), anchor="ra")
    for number, (tile, told) in enumerate([(photo, ["photograph"]), *tiles]):
        left = margin + number * (width + margin)
        row.paste(tile, (left, head))
        for place, text in enumerate(told):
            of = font(18 if place == 0 else 15)
            draw.text((left, head + height + 8 + place * line), _shortened(text, of, width), FAINT if place else INK, of)
    return row


def stack(rows: list[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    from PIL import Image

    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page


def grid(tiles: list[tuple[Image.Image, str, bool]], columns: int, title: str, note: str) -> Image.Image:
    """Tiles of one size, each (picture, caption, right): wrong ones framed and captioned in red."""
    from PIL import Image, ImageDraw

    width, height = tiles[0][0].size
    margin, caption, head = 18, 26, 84
    across, down = width + margin, height + caption + margin
    lines = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * across + margin, lines * down + head + margin // 2), "white")
    draw = ImageDraw.Draw(page)
    draw.text((margin, 14), title, INK, font(22))
    draw.text((margin, 48), note, FAINT, font(16))
    for number, (tile, text, right) in enumerate(tiles):
        left, top = margin + number % columns * across, head + number // columns * down
        page.paste(tile, (left, top))
        if not right:
            draw.rectangle((left - 4, top - 4, left + width + 3, top + height + 3), outline=BAD, width=4)
        draw.text((left + width / 2, top + height + 6), text, GOOD if right else BAD, font(16), anchor="ma")
    return page


def _shortened(text: str, of: ImageFont.FreeTypeFont, width: int) -> str:
    """``text``, or as much of its start as fits ``width`` pixels with three dots after it."""
    shown = text
    while of.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}..."
    return shown
