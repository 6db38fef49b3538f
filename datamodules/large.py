"""Photographs of any size in bounded memory.

Up to `WHOLE_PIXELS` they are decoded as all images are; larger ones at a half, a quarter or an
eighth of their size, which is still far more than a network sees.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from common.geometry import fitted, interpolation_weights
from datamodules.decoding import is_transparent, read_image, to_grey_levels
from datamodules.problems import BadFileError
from datamodules.transforms import resize_image

__all__ = ["WHOLE_PIXELS", "Photograph", "read_photograph"]

# Decoded at their own size up to here.
WHOLE_PIXELS = 25_000_000
# Of a decoded picture that are turned to RGB at once.
STRIP_PIXELS = 4_000_000
_FLIP = Image.Transpose
# By EXIF orientation: how the stored picture is turned upright, and which of its sides (left, top,
# right, bottom) then lie left, top, right and bottom.
_TURNS = {
    2: (_FLIP.FLIP_LEFT_RIGHT, (2, 1, 0, 3)),
    3: (_FLIP.ROTATE_180, (2, 3, 0, 1)),
    4: (_FLIP.FLIP_TOP_BOTTOM, (0, 3, 2, 1)),
    5: (_FLIP.TRANSPOSE, (1, 0, 3, 2)),
    6: (_FLIP.ROTATE_270, (3, 0, 1, 2)),
    7: (_FLIP.TRANSVERSE, (3, 2, 1, 0)),
    8: (_FLIP.ROTATE_90, (1, 2, 3, 0)),
}
_limit = threading.Lock()


@dataclass(frozen=True)
class Photograph:
    """A decoded photograph, upright.

    Attributes:
        image: RGB uint8 `(h, w, 3)`; of a large photograph at reduced size.
        size: height and width of the file's picture, upright, in px.
        blank: share of a pixel at the left, top, right and bottom edge of `image` that lies outside
            the photograph, where its size is no multiple of the reduction.
        transparent: whether some of its pixels are, which are as on white.
    """

    image: np.ndarray
    size: tuple[int, int]
    blank: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    transparent: bool = False

    @property
    def reduced(self) -> bool:
        """Whether `image` is smaller than the photograph."""
        return self.image.shape[:2] != self.size

    def squared(self, side: int, antialias: bool | str, letterbox: bool) -> np.ndarray:
        """Return the network's square, RGB uint8 `(side, side, 3)`, as `resize_image` does.

        A reduced photograph is always low-passed, whatever `antialias` says.
        """
        if not self.reduced:
            return resize_image(self.image, side, antialias, letterbox)
        box = fitted(self.size, side, letterbox)
        weights, shares = [], []
        for axis, start, extent in ((0, box.top, box.height), (1, box.left, box.width)):
            length = self.image.shape[axis]
            before, after = self.blank[1 - axis], self.blank[3 - axis]
            step = (length - before - after) / extent
            part = interpolation_weights(length, side, before - start * step, step)
            weights.append(part.astype(np.float32))
            cells = np.arange(side + 1)
            shares.append(np.diff(cells.clip(start, start + extent)))
        height, width = self.image.shape[:2]
        rows = weights[0] @ self.image.reshape(height, -1).astype(np.float32)
        inside = weights[1] @ rows.reshape(side, width, 3)
        share = np.outer(*shares)[..., None]
        square = share * inside + (1 - share) * self.image.mean(axis=(0, 1))
        return (square + 0.5).clip(0, 255).astype(np.uint8)


def read_photograph(path: Path, least: int, max_megapixels: float) -> Photograph:
    """Decode a photograph of any size.

    Args:
        path: the file.
        least: shortest side in px below which a large photograph is not reduced.
        max_megapixels: the largest photograph that is decoded, in 10^6 px.

    Raises:
        BadFileError: it is no file, larger than that, or cannot be decoded.
    """
    # A pipe would be waited for without end.
    if not path.is_file():
        what = "a link to a file that is missing" if path.is_symlink() else "no regular file"
        raise BadFileError(
            "no file", path, f"The image {path} is {what}; replace it by a photograph or remove it."
        )
    try:
        with _opened(path) as picture:
            width, height = picture.size
            if width * height > max_megapixels * 1e6:
                raise BadFileError(
                    "photograph too large",
                    path,
                    f"The image {path} has {width * height / 1e6:.0f} megapixels; set "
                    f"max_megapixels, which is {max_megapixels:g}, to read it.",
                )
            if width * height > WHOLE_PIXELS:
                return _reduced(picture, least)
    except BadFileError:
        raise
    except Exception as error:
        # Damaged bytes can make a decoder fail in any way, such as by a SyntaxError.
        raise BadFileError(
            "undecodable file",
            path,
            f"The image {path} cannot be decoded ({error}); replace it by an intact copy.",
        ) from error
    image = read_image(path)
    return Photograph(image, image.shape[:2], transparent=is_transparent(path))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image of any size; Pillow would refuse or warn of large ones."""
    with _limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        yield picture


def _reduced(picture: Image.Image, least: int) -> Photograph:
    """Decode a large picture at a reduced size."""
    # A PNG's own method would decode it to look for tags behind the pixels.
    turn = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
    size = picture.size
    factor = 1
    while (
        factor < 8
        and size[0] * size[1] > WHOLE_PIXELS * factor**2
        and min(size) >= 2 * factor * least
    ):
        factor *= 2
    # Of JPEG the decoder averages blocks itself, and never holds the whole; others do nothing.
    picture.draft(None, (size[0] // factor, size[1] // factor))
    rest = max(1, round(factor * picture.width / size[0]))
    picture.load()
    if picture.format == "TIFF":
        # It turns upright as it is loaded.
        size, turn = picture.size, None
    small, transparent = _shrunk(picture, rest)
    blank = (0.0, 0.0, small.width - size[0] / factor, small.height - size[1] / factor)
    if turn in _TURNS:
        method, sides = _TURNS[turn]
        small = small.transpose(method)
        blank = tuple(blank[side] for side in sides)
        if turn >= 5:
            size = size[::-1]
    return Photograph(np.asarray(small), size[::-1], blank, transparent)


def _shrunk(picture: Image.Image, factor: int) -> tuple[Image.Image, bool]:
    """Return a picture as RGB at a fraction of its size, and whether it is transparent."""
    width, height = picture.size
    small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    deep = picture.mode.startswith(("I", "F"))
    highest = float(picture.getextrema()[1]) if deep else 0.0
    if deep and not np.isfinite(highest):
        raise ValueError("it has values that are not finite")
    largest = next((top for top in (1.0, 255.0, 65535.0) if highest <= top), highest)
    transparent, opaque = False, not picture.has_transparency_data
    rows = max(1, STRIP_PIXELS // (width * factor)) * factor
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        if deep:
            strip = Image.fromarray(to_grey_levels(np.asarray(strip), largest))
        elif picture.has_transparency_data:
            strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
            least, most = strip.getchannel("A").getextrema()
            transparent, opaque = transparent or least < 255, opaque or most > 0
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        small.paste(strip.convert("RGB").reduce(factor), (0, top // factor))
    if not opaque:
        raise ValueError("it is wholly transparent")
    return small, transparent
