"""Opening photos: the only place where bytes become an image, and only in formats that we name."""

import io
import warnings
from pathlib import Path

from PIL import ExifTags, Image

from base.console import reading

# Pillow knows more; some of them start other programs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 100_000_000                               # of a photo: decoded, 0.4 GB
MOST_RATIO = 100                                        # of the sides: CLIP sees a square from the middle
PNG_PARTS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")      # what the pixels of a PNG depend on
# for EXIF's orientations 2 to 8
TURNS = dict(enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE "
                       "ROTATE_90".split(), start=2))


def open_picture(file):
    """The picture in `file` (a path or an open binary file), in one of FORMATS, loaded.

    Errors  Pillow's own; ValueError for a size that we do not read
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # about large, odd but readable files
        try:
            picture = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:            # Pillow's own limit is a higher one
            raise ValueError(f"it has more than {MOST_PIXELS:,} pixels; make it smaller") from None
        with picture:
            width, height = picture.size
            if width * height > MOST_PIXELS or max(width, height) > MOST_RATIO * min(width, height):
                raise ValueError(f"it has {width:,} x {height:,} pixels; at most {MOST_PIXELS:,} are read, "
                                 f"and sides of at most 1 : {MOST_RATIO}; make it smaller")
            picture.load()
            return picture


def open_photo(path):
    """The photo at `path` as an RGB image: upright, and what is transparent in it on white.

    The pixels are those that transformers' CLIP processor sees (docs/weights.md).
    Errors  UserError that says what the file really is
    """
    with reading(path, f"a photo ({', '.join(FORMATS)})"):
        try:
            picture = open_picture(path)
        except Exception:                               # Pillow has many kinds for one fault
            if not Path(path).read_bytes().startswith(b"\x89PNG"):
                raise
            # Its pixels may be whole, and only a colour profile or a text in it damaged.
            picture = open_picture(io.BytesIO(bare_png(path)))
        return on_white(upright(picture))


def bare_png(path):
    """The bytes of a PNG without the chunks that its pixels do not depend on."""
    with open(path, "rb") as file:
        parts = [file.read(8)]
        while len(head := file.read(8)) == 8:           # length and name of a chunk
            chunk = file.read(int.from_bytes(head[:4], "big") + 4)
            if head[4:] in PNG_PARTS:
                parts += [head, chunk]
    return b"".join(parts)


def upright(picture):
    """A loaded picture, turned as its EXIF says.  EXIF that cannot be read turns nothing."""
    try:
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:                                   # of a dozen kinds; the picture itself may be whole
        turn = None
    return picture.transpose(Image.Transpose[turn]) if turn else picture


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
    """A grey picture of 16 bits -> L: the upper byte of each value, as Pillow itself reads colours of 16
    bits.
    """
    # Tags of TIFF, the only format here where they vary: 258 bits a pixel; 262 is 1 where zero is black.
    tags = getattr(picture, "tag_v2", {258: (16,), 262: 1})
    if (tags.get(258), tags.get(262)) != ((16,), 1) or "transparency" in picture.info:
        raise ValueError("it is an unusual grey picture of 16 bits; save it with 8 bits")
    return Image.frombytes("L", picture.size, picture.tobytes("raw", "I;16B")[::2])
