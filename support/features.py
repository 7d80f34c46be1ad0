"""The frozen ViT's [cls] tokens of photos, computed once for each photo and cached on disk.

The ViT never changes, so its features do not change either: no later epoch, run or seed decodes a photo again.
The cache is one SQLite file: safe against power cuts, and against two runs that fill it at the same time.
A photo is identified by its bytes and the ViT by its weights.  Changing either gives a new entry; moving files does not.
"""

import hashlib
import os
import sqlite3
import time
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

try:
    import fcntl
except ImportError:                                     # not on Windows: there the cache is not locked while it is made
    fcntl = None

import numpy as np
import torch

from base.console import Progress, UserError
from base.photo import open_photo
from eiven import cls_layers
from vit import crop, load_vit, normalize, weight_file

BATCH = 16                                              # photos that go through the ViT together
PREPROCESSING = "clip-2"                                # part of the key: to be changed when open_photo or preprocess does


def digest_of(path):
    """SHA-256 of a file's bytes, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def photo_key(vit_key, path):
    """What a photo's features are found by: a hash of the ViT and of the photo's bytes."""
    return hashlib.sha256(vit_key + digest_of(path)).digest()


def open_cache(path, patience=60):
    """The SQLite database with the table `cls`, new or old.  Only one process at a time makes it.

    SQLite's own time-out does not hold for the change to WAL: of two processes that make that change at the same time, one
    is told at once that the database is locked, or that the disk has an error.
    """
    database = sqlite3.connect(path, timeout=patience)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        for _ in range(100 if fcntl else 0):            # 1 s at most: a run in the same folder holds its lock for long
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)      # released when the folder is closed
                break
            time.sleep(0.01)
        give_up = {"database is locked": time.monotonic() + patience, "disk I/O error": time.monotonic() + 1}
        while True:
            try:
                database.execute("pragma journal_mode = wal")       # readers and one writer at the same time
                database.execute("create table if not exists cls (key blob primary key, layers integer, tokens blob)")
                return database
            except sqlite3.OperationalError as error:
                if time.monotonic() > give_up.get(str(error), 0):
                    raise
                time.sleep(0.01)
    finally:
        os.close(folder)


@contextmanager
def damage_named():
    """An error of the cache as a UserError."""
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"the cache of photo features cannot be used ({error}); is the disk full, or the file locked "
                        "or damaged? It may be deleted, and is made again") from None


class PhotoFeatures:
    """The [cls] tokens of photos: `prepare` computes what is missing, `read` gives (P, K, V) for a batch.

    cache       the SQLite file, or None: nothing is kept, and only `complete` gives features
    vit         file or folder of the ViT's weights
    images      folder that photo names are relative to
    single      the last layer's [cls] token only, K = 1 (the paper's "- MGVF"), instead of every third layer's
    cls_layers  the ViT layers whose [cls] tokens `read` gives
    """

    def __init__(self, cache, vit, images, single=False, device="cpu"):
        self.images, self.cache, self.device = Path(images), cache, device
        weights = weight_file(vit)
        self.vit = load_vit(vit, device)
        self.width = self.vit.config.hidden_size        # V
        self.cls_layers = cls_layers(self.vit.config.num_hidden_layers)[-1 if single else 0:]
        config = weights.parent / "config.json"         # it says how many heads the weights are for
        every = cls_layers(self.vit.config.num_hidden_layers)
        self.vit_key = digest_of(weights) + (digest_of(config) if config.exists() else b"") + f"{PREPROCESSING} {every}".encode()
        if cache is None:
            return
        try:
            Path(cache).parent.mkdir(parents=True, exist_ok=True)
            self.database = open_cache(cache)
            # The photos of this run: a temporary table on the disk, since the names of a million fill the memory.
            self.database.execute("create temporary table photo (name blob primary key, key blob)")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{cache}: the cache of photo features cannot be used ({error}); if the disk is not full, delete it, "
                            "and it is made again, or name another folder with the environment variable EIVEN_CACHE") from None
        self.read_one = lru_cache(maxsize=4096)(self._read_one)     # of ViT-B/16 50 MB at most

    def prepare(self, names):
        """Make sure that all these photos are in the cache; progress on the way, work saved as it is done."""
        with damage_named():
            self._find(names)
            self._compute_missing()

    def _find(self, names):
        """Put the photos and their keys into the table `photo`; UserError if some are not there."""
        absent = {}
        with Progress("photos looked up", unit="photos") as progress, self.database:
            for name in names:
                progress.step()
                known = self.database.execute("select 1 from photo where name = ?", (os.fsencode(name),)).fetchone()
                if known or name in absent:
                    continue
                if not name or not os.path.isfile(self.images / name):       # False also for a name that no file can have
                    absent[name] = True
                    continue
                # Once one is absent there will be an error, and the others are only counted.
                key = b"" if absent else photo_key(self.vit_key, self.images / name)
                self.database.execute("insert into photo values (?, ?)", (os.fsencode(name), key))
            [there] = self.database.execute("select count(*) from photo").fetchone()
            self.database.execute("delete from photo where key = ?", (b"",))
        if absent:
            raise UserError(f"{len(absent):,} of {there + len(absent):,} photos are not in {self.images}, e.g. "
                            f"{', '.join(repr(name) for name in list(absent)[:3])}. Download them (docs/data.md), or leave "
                            "photos out with --no-image")

    def _compute_missing(self):
        missing = "from photo where not exists (select 1 from cls where cls.key = photo.key)"
        [total] = self.database.execute(f"select count(distinct key) {missing}").fetchone()
        last = 0
        with Progress("photo features", total, "photos") as progress:
            while batch := self.database.execute(f"select rowid, name, key {missing} and rowid > ? order by rowid "
                                                 "limit ?", (last, BATCH)).fetchall():
                once = {key: os.fsdecode(name) for _, name, key in batch}       # equal photos are one
                self._compute([(name, key) for key, name in once.items()])
                last = batch[-1][0]
                progress.step(len(once))

    def _compute(self, batch):
        pixels = [crop(open_photo(self.images / name), self.vit.config.image_size) for name, _ in batch]
        self._save({key: tokens for (_, key), tokens in zip(batch, self.encode(pixels))})

    @torch.no_grad()
    def encode(self, pixels):
        """[cls] tokens of cropped photos, a list of (size, size, 3) uint8: (P, all layers of cls_layers, V), fp32 on the CPU."""
        pixels = normalize(np.stack(pixels)).to(self.device)
        tokens = self.vit(pixels, cls_layers(self.vit.config.num_hidden_layers)).float().cpu()
        if not tokens.isfinite().all():
            raise UserError("the ViT gives features that are not finite; are its weights whole?")
        return tokens

    def _save(self, computed):
        with self.database:                             # one transaction
            self.database.executemany("insert or replace into cls values (?, ?, ?)", [
                (key, one.shape[0], one.numpy().tobytes()) for key, one in computed.items()])           # (K, V)

    def look_up(self, names):
        """{name: (key, whether its features are in the cache)} for `complete`, or a text that says what is wrong with a photo.

        Without a cache a photo's key is its name.
        """
        found = {}
        with damage_named():
            for name in names:
                path = self.images / name
                if not name or not os.path.isfile(path):       # False also for a name that no file can have
                    found[name] = f"there is no photo {name!r} in {self.images}"
                    continue
                try:
                    key = name if self.cache is None else photo_key(self.vit_key, path)
                    found[name] = key, self._known(key)
                except OSError as error:
                    found[name] = f"{path}: {error.strerror}"
        return found

    def complete(self, photos):
        """The features {name: (K, V)} of photos {name: (key, pixels)}.

        pixels  of one photo as for `encode`; None: its features are in the cache
        What is computed is saved in one transaction, since the last bits of features depend on the photo's batch: after an
        interruption either all photos of the call are in the cache, or the batches are the same again.
        """
        with damage_named():
            # Another call may have computed them since look_up.  Equal photos have one key.
            new = {key: pixels for key, pixels in photos.values() if pixels is not None and not self._known(key)}
            keys, computed = list(new), {}
            for start in range(0, len(keys), BATCH):
                some = keys[start:start + BATCH]
                computed.update(zip(some, self.encode([new[key] for key in some])))
            if self.cache is not None:
                self._save(computed)
            for key, _ in photos.values():
                if key not in computed:
                    computed[key] = self._cached("cls where key = ?", key)
        return {name: computed[key][-len(self.cls_layers):] for name, (key, _) in photos.items()}

    def _known(self, key):
        """Whether the features of a photo are in the cache."""
        return self.cache is not None and self.database.execute("select 1 from cls where key = ?", (key,)).fetchone() is not None

    def _read_one(self, name):
        return self._cached("photo join cls using (key) where name = ?", os.fsencode(name))[-len(self.cls_layers):]     # (K, V)

    def _cached(self, where, value):
        layers, tokens = self.database.execute(f"select layers, tokens from {where}", (value,)).fetchone()
        return torch.tensor(np.frombuffer(tokens, dtype=np.float32).reshape(layers, -1))

    def read(self, names, device):
        """Features (P, K, V) of prepared photos, or None for no photos."""
        return torch.stack([self.read_one(name) for name in names]).to(device) if names else None
