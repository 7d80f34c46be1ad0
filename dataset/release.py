"""Turn the authors' later release, ImplicitAVE, into data sets, with whatever photos of it are there."""

import shutil

from base.console import Progress, UserError, whole_file
from base.tsv import COLUMNS, read_tsv
from dataset.stats import SPLITS, check_maker, photo_problem, write_splits


def import_release(folder, data, images):
    """Write the authors' release ImplicitAVE, as it lies in `folder`, as data sets in `data`; say what is
    missing.

    Their domain Jewlery_and_General_Apparel is the paper's General; others keep their names, in lower case.
    images  more folders with photos; photos are looked for by name in all of these and in `folder`
    """
    release = {}                                        # {data set: {split: rows}}
    for domain in sorted(path.parent for path in folder.rglob("train.tsv")):
        name = domain.name.lower()
        parts = release["general" if "general" in name else name] = {}
        for part in SPLITS:
            parts[part] = [[row[column] for column in COLUMNS] for _, row in read_tsv(domain / f"{part}.tsv")]
    if not release:
        raise UserError(f"{folder} holds no DOMAIN/train.tsv. Is it a clone of "
                        "github.com/HenryPengZou/ImplicitAVE?")
    check_maker(data, release, "import")
    names = {row[1] for parts in release.values() for rows in parts.values() for row in rows}
    missing = copy_photos(names, [folder, *images], data / "images")
    print(f"{len(names) - len(missing):,} of {len(names):,} photos are there")
    if missing:
        print("The authors give the training photos behind the link in data/training_data/images/README.md. "
              "Unpack them anywhere (zip files are not unpacked here), and give that folder with --images. "
              "Or train without those rows: train.py --skip-missing-photos.")
    write_splits(data, release, "import")


def copy_photos(names, folders, target):
    """Copy the photos with these names from anywhere in `folders` to `target`; return the names without a
    photo.
    """
    missing = {name for name in names if photo_problem(target / name, target)}
    with Progress("photos", len(names), "photos", len(names) - len(missing)) as progress:
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder; give that of the unpacked photos")
            for path in sorted(folder.rglob("*")):
                if path.name in missing and not photo_problem(path, folder):
                    (target / path.name).unlink(missing_ok=True)        # a link would be written through
                    with whole_file(target / path.name) as partial:
                        shutil.copyfile(path, partial)
                    missing.remove(path.name)
                    progress.step()
    return missing
