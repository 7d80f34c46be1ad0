"""The frozen ViT's [cls] tokens of photos, computed once for each photo and kept on disk.

The ViT never changes, so its features do not change either: no later epoch, run or seed decodes a photo
again.  Each photo has a small file of its own, named by a hash of the ViT and of the photo's bytes.  It is
written whole, so any number of threads and processes may fill the same folder.  Another photo or another ViT
gives another file.
"""

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

from base.checkpoint import fingerprint
from base.console import Progress, UserError, cache_folder, own_copy, reading
from base.photo import open_photo
from eiven import cls_layers
from vit import load_vit, preprocess, weight_file

PREPROCESSING = "1"                                     # to be changed when open_photo or preprocess does
RECENT = 4096  # photos whose features stay in memory: 50 MB with ViT-B/16
THREADS = 8                                             # that decode photos; Pillow lets them run together
AHEAD = 64                                              # photos that they decode while the ViT computes


class PhotoFeatures:
    """The [cls] tokens of photos: `prepare` computes what is missing, `read` gives (P, K, V) for a batch.

    vit         file or folder of the ViT's weights
    images      folder that photo names are relative to
    single      the last layer's [cls] token only, K = 1 (the paper's "- MGVF"), not every third layer's
    cls_layers  the ViT layers whose [cls] tokens `read` gives
    Any thread may call.  Photos go through the ViT one by one, which on a CPU is as fast as several together.
    So the features of a photo do not depend on other photos, not even in their last bits.
    """

    def __init__(self, vit, images, single=False, device="cpu"):
        self.images = Path(images)
        self.device = device
        self.folder = cache_folder() / "features"
        self.vit = load_vit(vit, device)
        config = self.vit.config
        self.width = config.hidden_size                 # V
        self.all_layers = cls_layers(config.num_hidden_layers)
        self.cls_layers = self.all_layers[-1:] if single else self.all_layers
        weights = fingerprint([weight_file(vit)])
        self.vit_key = f"{weights} {config} {self.all_layers} {PREPROCESSING}".encode()
        self.keys = {}                                  # {name of a prepared photo: the name of its file}
        self.recent = lru_cache(RECENT)(self._load)

    def read(self, names):
        """Features (P, K, V) of prepared photos, on the CPU, or None for no photos."""
        if not names:
            return None
        tokens = [self.recent(self.keys[name]) for name in names]
        return torch.stack(tokens)[:, -len(self.cls_layers):]

    def prepare(self, names, skip_bad=False):
        """Make sure that the features of all these photos are there; progress on the way.

        A photo that is absent or cannot be read is a UserError.  With skip_bad it is left out, and the result
        is {name: what is wrong with it}.
        """
        names = list(dict.fromkeys(names))
        absent = [name for name in names if not os.path.isfile(self.images / name)]
        if absent and not skip_bad:
            raise UserError(f"{len(absent):,} of {len(names):,} photos are not in {self.images}, e.g. "
                            f"{', '.join(map(repr, absent[:3]))}. Download them (docs/data.md), or train "
                            "with --skip-missing-photos (without these products) or --no-image (no photos)")
        problems = {}
        with (ThreadPoolExecutor(THREADS) as threads,
              Progress("photo features", len(names), "photos") as progress):
            for start in range(0, len(names), AHEAD):
                part = names[start:start + AHEAD]
                for name, opened in zip(part, [threads.submit(self._open, name) for name in part]):
                    progress.step()
                    try:
                        key, pixels = opened.result()
                    except (UserError, OSError) as error:       # OSError: a name that is too long
                        if not skip_bad:
                            raise
                        problems[name] = str(error)
                        continue
                    self.keys[name] = key
                    if pixels is not None:
                        self._compute(key, pixels)
        return problems

    def _open(self, name):
        """The key of a photo, and its pixels (3, size, size), or None if its features are there."""
        path = self.images / name
        with reading(path, "a photo"), open(path, "rb") as file:
            # An absolute name is no row of a data set, but the user's own choice.
            if not os.path.isabs(name) and not path.resolve().is_relative_to(self.images.resolve()):
                raise UserError(f"{path}: leads out of the folder {self.images}; copy the photo itself there")
            key = hashlib.file_digest(file, lambda: hashlib.sha256(self.vit_key)).hexdigest()
        try:
            self._load(key)
        except (OSError, zlib.error):
            return key, preprocess(open_photo(path), self.vit.config.image_size)
        return key, None

    def _compute(self, key, pixels):
        """Compute the features of a photo, and keep them."""
        tokens = self.vit(pixels[None].to(self.device), self.all_layers).cpu()      # (1, all layers, V)
        if not tokens.isfinite().all():
            raise UserError("the ViT gives features that are not finite: its weights are damaged. "
                            "Download them again")
        try:
            with own_copy(self.folder / key[:2] / key) as own:
                own.write_bytes(zlib.compress(tokens.numpy()))          # with a checksum
        except OSError as error:
            raise UserError(f"{self.folder}: features of photos cannot be kept there ({error.strerror}). "
                            "Make room, or name another folder with the environment variable EIVEN_CACHE"
                            ) from error

    def _load(self, key):
        """The features (all layers, V) of a photo.

        Errors  OSError if they are not there, zlib.error if their file is damaged
        """
        values = zlib.decompress((self.folder / key[:2] / key).read_bytes())
        return torch.frombuffer(bytearray(values), dtype=torch.float32).view(-1, self.width)
