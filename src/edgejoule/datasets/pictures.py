"""One image file as an upright RGB picture of the size that its annotation states. Knows no labels and no tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgejoule.errors import BadImageError


def read_picture(path: Path, size: tuple[int, int]) -> Any:
    """The file as a PIL image in RGB of ``size`` (width, height in pixels): grey, palette and CMYK files are converted.

    A camera's EXIF orientation is applied, unless only the stored pixels have the stated size: some annotation tools drew on those.
    Raises BadImageError where the file is missing, damaged or of another size.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            chosen = image if upright.size != size and image.size == size else upright
            picture = chosen.convert("RGB")
    except FileNotFoundError as error:
        raise BadImageError(f"no image {path}: expected the file that the annotations name") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"cannot read the image {path} ({error}): mend or remove it") from error
    if picture.size != size:
        found, stated = (" x ".join(map(str, sides)) for sides in (picture.size, size))
        raise BadImageError(
            f"{path} is {found} pixels and its annotation says {stated} (width x height): use the pair that belongs together"
        )
    return picture
