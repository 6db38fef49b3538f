"""Decoding of photographs and masks."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from datamodules.problems import BadFileError

__all__ = [
    "EXIF",
    "Header",
    "is_transparent",
    "read_header",
    "read_image",
    "read_mask",
    "to_grey_levels",
]

# What may be done with an EXIF orientation.
EXIF = ("apply", "ignore")
# How each orientation is undone; 1 is upright.
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP")
_HEIGHT, _WIDTH = 257, 256  # TIFF tags


@dataclass(frozen=True)
class Header:
    """What an image file's header says.

    Attributes:
        stored: height and width in px as the pixels are stored.
        orientation: the EXIF orientation, 1 (upright) to 8.
    """

    stored: tuple[int, int]
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width in px after turning by the orientation."""
        return self.stored if self.orientation < 5 else self.stored[::-1]


def read_header(path: Path) -> Header | None:
    """Read size and orientation without decoding; None where the file is no readable image."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            tags = getattr(image, "tag_v2", {})
            stored = (tags.get(_HEIGHT, image.height), tags.get(_WIDTH, image.width))
            return Header(stored, _orientation(image))
    except Exception:
        # Damaged bytes can make a parser fail in any way; decoding the file reports it.
        return None


def read_image(path: Path, exif: str = "apply") -> np.ndarray:
    """Decode a photograph to RGB uint8 `(H, W, 3)`.

    Grey, CMYK and palette images become RGB; transparent pixels are composed on white; of 16 bits
    the upper 8 stay.

    Args:
        path: the file.
        exif: `apply` turns it upright by its EXIF orientation, `ignore` keeps the stored pixels.

    Raises:
        BadFileError: the file cannot be decoded, or is wholly transparent.
    """
    picture, _ = _decode(path, exif)
    if isinstance(picture, np.ndarray):
        if not np.isfinite(picture).all():
            raise BadFileError(
                "values that are not finite",
                path,
                f"The image {path} has values that are not finite; save it with whole numbers.",
            )
        grey = to_grey_levels(picture, _largest(picture.clip(0)))
        return np.repeat(grey[..., None], 3, axis=2)
    cut_out = _transparent(picture)
    if cut_out is None:
        # Pillow warns of palettes with transparency otherwise, also of opaque ones.
        opaque = _rgba(picture) if picture.mode == "P" else picture
        return np.asarray(opaque.convert("RGB"))
    if cut_out.getchannel("A").getextrema()[1] == 0:
        raise BadFileError(
            "transparent image",
            path,
            f"The image {path} is wholly transparent; save it without its alpha channel.",
        )
    white = Image.new("RGBA", cut_out.size, "white")
    return np.asarray(Image.alpha_composite(white, cut_out).convert("RGB"))


def to_grey_levels(values: np.ndarray, largest: float) -> np.ndarray:
    """Return numbers from 0 to `largest` as 256 grey levels, uint8; of 16 bits the upper 8 stay."""
    if largest < 1.5:
        return (values.clip(0, 1) * 255).round().astype(np.uint8)
    return (values.clip(0) / (largest + 1) * 256).astype(np.uint8)


def is_transparent(path: Path) -> bool:
    """Tell whether a photograph has transparent pixels, which `read_image` composes on white.

    Only files with an alpha channel or a transparent colour are decoded.

    Raises:
        BadFileError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if not image.has_transparency_data:
                return False
    except Exception as error:
        raise _undecodable(path, error) from error
    picture, _ = _decode(path, "apply")
    return not isinstance(picture, np.ndarray) and _transparent(picture) is not None


def read_mask(path: Path, exif: str = "apply", threshold: float | None = None) -> np.ndarray:
    """Decode a mask to uint8 `(H, W)` of {0, 1}, lesion = 1.

    A mask has black (0) for skin and one other grey level or colour for lesion; one colour alone is
    an empty or a full mask. Lossy files, such as JPEG, must have a lesion of at least half the
    largest value, because black is not exact there.

    Args:
        path: the file.
        exif: as in `read_image`.
        threshold: in (0, 1); where a mask has more levels, lesion is where the largest channel
            reaches this share of the largest value that the file's type can hold. Masks with more
            levels are refused without it.

    Raises:
        BadFileError: the file cannot be decoded, has more levels and no threshold is given, has no
            black, or has another shape in its alpha channel.
    """
    picture, lossy = _decode(path, exif, wide=True)
    values, alpha = (picture, None) if isinstance(picture, np.ndarray) else _colours(picture)
    lesion = _lesion(values, lossy)
    if lesion is None:
        if threshold is None or not (values >= 0).all():
            raise _levels_problem(path, values, lossy)
        peak = values.max(axis=-1) if values.ndim == 3 else values
        lesion = peak >= threshold * _largest(values)
    if alpha is not None and alpha.min() < alpha.max():
        state = {0: "empty", lesion.size: "full"}.get(int(lesion.sum()))
        if state is None and (lesion & (alpha == 0)).any():
            state = "transparent where its lesion is"
        if state is not None:
            raise BadFileError(
                "mask in its alpha channel",
                path,
                f"The mask {path} is {state} by its colours, and its alpha channel (transparency), "
                "which is not read, has another shape; save it without alpha channel, 0 for skin "
                "and 255 for lesion.",
            )
    return lesion.astype(np.uint8)


def _colours(picture: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a mask's grey levels `(H, W)` or colours `(H, W, 3)`, and its alpha channel if any."""
    alpha = None
    if picture.has_transparency_data:
        rgba = _rgba(picture)
        alpha, colours = np.asarray(rgba.getchannel("A")), np.asarray(rgba.convert("RGB"))
    else:
        colours = np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
    if picture.mode == "P":
        indices = np.asarray(picture)
        # With a palette of one colour the classes are in the indices alone.
        if (colours == colours[0, 0]).all() and (indices != indices[0, 0]).any():
            colours = indices
    return colours, alpha


def _lesion(values: np.ndarray, lossy: bool) -> np.ndarray | None:
    """Return where a mask is not 0, bool `(H, W)`; None where that has more than one value."""
    lesion = values.any(axis=-1) if values.ndim == 3 else values != 0
    if not lesion.any():
        return lesion
    colour = values[np.unravel_index(lesion.argmax(), lesion.shape)]
    if np.min(colour) < 0 or (lossy and np.max(colour) < 128):
        return None
    same = values == colour
    return lesion if np.array_equal(same.all(axis=-1) if same.ndim == 3 else same, lesion) else None


def _largest(values: np.ndarray) -> float:
    """Return the largest value that the type of a mask file can hold."""
    if values.dtype == np.uint8:
        return 255.0
    # Larger types also hold values of smaller ones.
    tops = (255.0, 65535.0) if values.dtype == np.uint16 else (1.0, 255.0, 65535.0)
    return next((top for top in tops if values.max() <= top), float(values.max()))


def _levels_problem(path: Path, values: np.ndarray, lossy: bool) -> BadFileError:
    # Comparisons with NaN are false.
    if not (values >= 0).all():
        return BadFileError(
            "mask with negative values",
            path,
            f"The mask {path} has values that are negative or not finite; save it with 0 for skin "
            "and 255 for lesion.",
        )
    levels = values
    if values.ndim == 3:
        levels = values.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    count = len(np.unique(levels))
    what = "grey levels" if values.ndim == 2 else "colours"
    if lossy:
        what += " in a lossy format"
    elif count == 2 and levels.min() > 0:
        peak = values.max(axis=-1) if values.ndim == 3 else values
        divided = peak.min() < 0.5 * _largest(values) <= peak.max()
        way = (
            ", or set datamodule.mask_threshold=0.5 to read the brighter half of the range as "
            "lesion"
        )
        return BadFileError(
            "mask without black",
            path,
            f"The mask {path} has {count} {what} and none is 0, so its lesion is not known; save "
            f"0 for skin and 255 for lesion{way if divided else ''}.",
        )
    return BadFileError(
        "mask with grey levels",
        path,
        f"The mask {path} has {count} {what}; a mask has 0 for skin and one other value for "
        "lesion. Save it without lossy compression or smoothing, or set "
        "datamodule.mask_threshold=0.5 to read the brighter half of the range as lesion.",
    )


def _transparent(picture: Image.Image) -> Image.Image | None:
    """Return a picture with transparent pixels as RGBA, None where it has none."""
    if not picture.has_transparency_data:
        return None
    rgba = _rgba(picture)
    return rgba if rgba.getchannel("A").getextrema()[0] < 255 else None


def _rgba(picture: Image.Image) -> Image.Image:
    # Pillow converts premultiplied grey in no other way.
    return (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")


def _decode(path: Path, exif: str, wide: bool = False) -> tuple[Image.Image | np.ndarray, bool]:
    """Return an image, as numbers where it has more than 8 bits a channel, and if it is lossy.

    Args:
        path, exif: as in `read_image`.
        wide: whether colours of 16 bits are numbers too, `(H, W, 3)`; otherwise their upper 8 stay.
    """
    try:
        if path.exists() and not path.is_file():
            # Opening a pipe would wait for ever.
            raise OSError("it is no regular file")
        with Image.open(path) as image:
            orientation, lossy = _orientation(image), image.format in _LOSSY
            if wide and orientation == 1 and any(";16" in str(part[3]) for part in image.tile):
                colours = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
                if colours is not None and colours.ndim == 3:
                    return colours[..., :3], lossy
            # A TIFF turns upright as it is loaded, other files by this.
            upright = image if orientation == 1 else ImageOps.exif_transpose(image)
            upright.load()
            if exif == "ignore" and orientation != 1:
                upright = upright.transpose(_UNDO[orientation])
            deep = upright.mode.startswith(("I", "F"))
            return (np.asarray(upright) if deep else upright), lossy
    except Exception as error:
        # Damaged bytes can make a decoder fail in any way, such as by a SyntaxError.
        raise _undecodable(path, error) from error


def _undecodable(path: Path, error: Exception) -> BadFileError:
    return BadFileError(
        "undecodable file",
        path,
        f"The image {path} cannot be decoded ({error}); replace it by an intact copy.",
    )


def _orientation(image: Image.Image) -> int:
    # A PNG's own method would decode it to look for tags behind the pixels.
    value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return value if value in _UNDO else 1
