"""Opening pictures: one place where bytes from anywhere become an image, and only in formats that we name."""

from PIL import Image

from base.checkpoint import check_file
from base.console import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")        # Pillow knows more; some of them start other programs


def open_photo(path):
    """The photo at `path` as an RGB image, or a UserError that says what the file really is."""
    check_file(path, "a photo")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:                          # Pillow's readers raise a dozen kinds for a damaged file
        raise UserError(f"{path}: cannot be read as a photo ({error})") from None
