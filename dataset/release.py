"""Turn the authors' later release, ImplicitAVE, into data sets, with whatever photos of it are there."""

import os
import shutil
from collections import defaultdict

from base.console import Progress, UserError, whole_file
from base.photo import open_photo
from base.tsv import COLUMNS, read_tsv, write_tsv
from dataset.stats import SPLITS, check_maker, write_splits

NAMES = {"jewlery_and_general_apparel": "general", "jewelry_and_general_apparel": "general"}


def import_release(folder, data, images=(), with_photos_only=False):
    """Write the authors' release ImplicitAVE, as it lies in `folder`, as data sets in `data`; say what is
    missing.

    Their domain Jewlery_and_General_Apparel is the paper's General; others keep their names, in lower case.
    images            more folders with photos; photos are looked for by name in all of these and in `folder`
    with_photos_only  leave rows without a photo out
    """
    release = {}                                        # {data set: {split: rows}}
    for domain in sorted(path.parent for path in folder.rglob("train.tsv")):
        name = domain.name.lower()
        parts = release[NAMES.get(name, name)] = {}
        for part in SPLITS:
            parts[part] = [row for _, row in read_tsv(domain / f"{part}.tsv")]
    if not release:
        raise UserError(f"{folder} holds no DOMAIN/train.tsv. Is it a clone of "
                        "github.com/HenryPengZou/ImplicitAVE?")
    check_maker(data, release, "import")
    there = find_photos([folder, *images])
    names = sorted({row["images"] for parts in release.values() for rows in parts.values() for row in rows})
    missing = {}                                        # {photo: why}
    with Progress("photos", len(names), "photos") as progress:
        for name in names:
            why = "is no plain file name"
            if name == os.path.basename(name):
                why = copy_photo(there[name], data / "images" / name)
            if why:
                missing[name] = why
            progress.step()
    write_tsv(data / "missing_photos.tsv", missing.items(), ["images", "reason"])
    print(f"{len(missing):,} photos missing or no photos: {data / 'missing_photos.tsv'}")
    if missing:
        print("The authors give the training photos behind the link in data/training_data/images/README.md. "
              "Unpack them anywhere (zip files are not unpacked here), and give that folder with --images.")
    for name, parts in release.items():
        for part, rows in parts.items():
            with_photo = [row for row in rows if row["images"] not in missing]
            kept = with_photo if with_photos_only else rows
            print(f"{name}/{part}.tsv: {len(kept):,} rows, {len(with_photo):,} of {len(rows):,} with "
                  "their photo")
            parts[part] = [[row[column] for column in COLUMNS] for row in kept]
    write_splits(data, release, "import")


def find_photos(folders):
    """{file name: [paths]} of all files under the folders."""
    there = defaultdict(list)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. Give the folder that the photos were unpacked into.")
        for path in sorted(folder.rglob("*")):
            if path.resolve().is_relative_to(folder.resolve()):         # a link must not lead out of it
                there[path.name].append(path)
    return there


def copy_photo(sources, target):
    """Copy the first photo of `sources` to `target`, if there is none; returns why there is none, or None."""
    why = "not found"
    for path in sources if target.is_symlink() else [target, *sources]:
        try:
            open_photo(path)
        except UserError as error:
            why = str(error)
            continue
        if path != target:
            target.unlink(missing_ok=True)              # a link would be written through
            with whole_file(target) as partial:
                shutil.copyfile(path, partial)
        return None
    return why
