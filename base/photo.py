"""Opening pictures: the only place where bytes become an image, and only in formats that we name."""

import warnings

from PIL import ExifTags, Image

from base.console import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")        # Pillow knows more; some of them start other programs
MOST_PIXELS = 50_000_000        # of a picture: converting it takes at most 16 bytes a pixel, 0.8 GB
MOST_RATIO = 100                # of the sides: CLIP sees a square from the middle, and the rest is resized for nothing
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), start=2))   # EXIF's orientations


def open_picture(file):
    """The picture in `file` (a path or an open binary file), in one of FORMATS; its pixels are not read yet.

    Errors  Pillow's own; Image.DecompressionBombError for a size that we do not read
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)         # MOST_PIXELS is our own limit
        picture = Image.open(file, formats=FORMATS)
    width, height = picture.size
    if width * height > MOST_PIXELS or max(width, height) > MOST_RATIO * min(width, height):
        picture.close()
        raise Image.DecompressionBombError(f"it has {width:,} x {height:,} pixels; at most {MOST_PIXELS:,} are read, and sides "
                                           f"of at most 1 : {MOST_RATIO}")
    return picture


def open_photo(path):
    """The photo at `path` as an RGB image: upright, and what is transparent in it on white.

    The pixels are those that transformers' CLIP processor sees (docs/weights.md).
    Errors  UserError that says what the file really is
    """
    # Imported here, because it needs torch, and the data set builder does not.
    from base.checkpoint import check_file
    check_file(path, "a photo")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of Pillow, about odd but readable files
            with open_picture(path) as picture:
                picture.load()
                return on_white(upright(picture))
    except Image.UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}"
    except Exception as error:                          # Pillow's readers raise a dozen kinds for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"{path}: cannot be read as a photo ({reason})")


def upright(picture):
    """A loaded picture, turned as its EXIF says.  EXIF that cannot be read turns nothing."""
    try:
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:                                   # as above; the picture itself may be whole
        turn = None
    return picture if turn is None else picture.transpose(turn)


def on_white(picture):
    """A loaded picture of any mode -> RGB.  ValueError where the mode does not say which value is white."""
    if picture.mode.startswith("I;16"):
        picture = eight_bits(picture)
    if picture.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel, and nothing says which value is white; save it with 8 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def eight_bits(picture):
    """A grey picture of 16 bits -> L: the upper byte of each value, as Pillow itself reads colours of 16 bits."""
    bits, zero_is_black = 258, 262                      # tags of TIFF, the only format here where they vary
    tags = getattr(picture, "tag_v2", {bits: (16,), zero_is_black: 1})
    if (tags.get(bits), tags.get(zero_is_black)) != ((16,), 1) or "transparency" in picture.info:
        raise ValueError("it is an unusual grey picture of 16 bits; save it with 8 bits")
    return Image.frombytes("L", picture.size, picture.tobytes("raw", "I;16B")[::2])
