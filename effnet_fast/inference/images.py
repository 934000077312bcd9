"""Images: found in directories, decoded whatever their mode, prepared as some weights want them. Pillow and numpy only."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effnet_fast.weights.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# A sliver resized to the network's size becomes a giant: 1 x 10,000 pixels would be 256 x 2,560,000.
_MAX_RESIZED_PIXELS = 1 << 26

Box = tuple[float, float, float, float]


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as given; directories searched recursively for ``EXTENSIONS`` in any case, each in sorted order.

    Raises FileNotFoundError for a path that does not exist, ValueError for a directory without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
            if not inside:
                raise ValueError(f"{path} holds no images ({' '.join(EXTENSIONS)})")
            found += inside
        else:
            found.append(path)
    return found


def check_images(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Decode the files among ``paths``, directories excepted; raises what :func:`read_image` raises."""
    for path in map(Path, paths):
        if not path.is_dir():
            read_image(path)


def read_image(path: str | os.PathLike[str], channels: int = 3) -> Image.Image:
    """Decode the first frame, upright as its EXIF orientation says, as 8-bit RGB (``channels`` 3) or greyscale (1).

    What is transparent becomes white; 16 bits are scaled to 8. Raises ValueError, naming the file, where it cannot be decoded.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ValueError(f"read_image: channels is {channels}; 1 (greyscale) or 3 (RGB) would do")
    try:
        with Image.open(path) as file:
            image = _eight_bits(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except Exception as error:  # a decoder raises whatever a damaged file makes it raise: OSError, SyntaxError, struct.error, ...
        reason = "no image that can be recognised" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Wide greyscale as 8 bits: Pillow's own conversion clips it instead of scaling it."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        image.load()
        return image
    values = np.asarray(image, dtype=np.float64)
    limit = 65535.0 if image.mode != "F" else 1.0
    if values.min() < 0 or values.max() > limit:
        raise ValueError(f"its grey values are {values.min():g} to {values.max():g}; within 0 to {limit:g} would do")
    return Image.fromarray(np.rint(values * (255 / limit)).astype(np.uint8))


def resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) after the resize and before the crop."""
    target = preprocessing.resize
    if preprocessing.crop_mode == "squash":
        return target, target
    short, long = sorted(size)
    other = int(target * long / short)
    return (target, other) if size[0] <= size[1] else (other, target)


def _crop_box(resized: tuple[int, int], crop: int) -> tuple[int, int, int, int]:
    left, top = round((resized[0] - crop) / 2), round((resized[1] - crop) / 2)
    return left, top, left + crop, top + crop


def seen_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """(left, top, right, bottom) of what the network sees, in pixels of the original ``size`` (width, height)."""
    resized = resized_size(size, preprocessing)
    left, top, right, bottom = _crop_box(resized, preprocessing.crop)
    across, down = size[0] / resized[0], size[1] / resized[1]
    return left * across, top * down, right * across, bottom * down


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """What the network sees of an RGB or greyscale image: [crop, crop, C] uint8, C being the image's."""
    from PIL import Image

    size = resized_size(image.size, preprocessing)
    if size[0] * size[1] > _MAX_RESIZED_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels is too elongated to be resized to {size[0]} x {size[1]}")
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    image = image.resize(size, filters[preprocessing.interpolation]).crop(_crop_box(size, preprocessing.crop))
    return np.atleast_3d(np.asarray(image))


def prepare(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB or greyscale image as the network's input: [C, crop, crop] float32, C being the image's.

    Mean and std follow :meth:`Preprocessing.for_channels` where the image has other channels than they.
    """
    pixels = resize_and_crop(image, preprocessing).astype(np.float32) / np.float32(255)
    preprocessing = preprocessing.for_channels(pixels.shape[2])
    mean, std = np.array(preprocessing.mean, dtype=np.float32), np.array(preprocessing.std, dtype=np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
