"""Turn the authors' later release, ImplicitAVE, into data sets, with whatever photos of it are there."""

import os
import shutil
from collections import defaultdict
from pathlib import Path

from base.console import Progress, UserError, whole_file
from base.tsv import COLUMNS, write_tsv
from dataset.stats import SPLITS, read_tsv, remove_splits


def find_photos(places):
    """({file name: [paths]} of the photos under the folders `places`, the number of '._' files, [zip files])."""
    found, litter, zips = defaultdict(list), 0, []
    given = [Path(place).resolve() for place in places]
    for place in places:
        if not Path(place).is_dir():
            raise UserError(f"{place} is not a folder. Give the folder that the photos were unpacked into.")
        for inside, folders, files in os.walk(place):
            folders[:] = sorted(name for name in folders if name not in (".git", "__MACOSX"))
            for name in sorted(files):
                if name.lower().endswith(".zip"):
                    zips.append(Path(inside, name))
                elif name.startswith("._"):     # what macOS leaves beside each file in an archive
                    litter += 1
                elif name.lower().endswith((".jpg", ".jpeg", ".png")):
                    path = Path(inside, name)
                    real = Path(os.path.realpath(path))
                    if path.is_symlink() and not any(real.is_relative_to(folder) for folder in given):
                        print(f"note: {path} leads to {real}, outside of the folders given, and is not used; "
                              "--images gives more folders")
                    else:
                        found[name].append(path)
    return found, litter, zips


def place_photo(target, sources):
    """Put the first photo of `sources` at `target`, linked or else copied; returns why there is none, or None."""
    from dataset.photos import NoPhoto, checked, have_photo  # here, so that everything else starts without Pillow
    if have_photo(target):
        return None
    reason = "not found"
    for source in sources:
        try:
            checked(source).close()
        except NoPhoto as error:
            reason = f"{source}: {error}"
            continue
        target.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:                         # another disk, or one that knows no links
            with whole_file(target) as partial:
                shutil.copyfile(source, partial)
        return None
    return reason


def import_release(folder, root, more_images=(), with_photos_only=False):
    """Write the authors' release ImplicitAVE, as it lies in `folder`, as data sets in `root`, and say what is missing.

    Their domain Jewlery_and_General_Apparel is the paper's General; others keep their names, in lower case.  Photos are
    looked for by name in all of `folder` and `more_images`.
    """
    folder, root = Path(folder), Path(root)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Clone github.com/HenryPengZou/ImplicitAVE and give the clone.")
    domains = next((found for inside in ("data/training_data/texts", "training_data/texts", "texts", ".")
                    if (found := sorted(path.parent for path in (folder / inside).glob("*/train.tsv")))), None)
    if not domains:
        raise UserError(f"{folder} holds no data/training_data/texts/DOMAIN/train.tsv. Is it the whole of ImplicitAVE?")
    found, litter, zips = find_photos([folder, *more_images])
    release = {}                                # all is read before anything is written
    for domain in domains:
        name = domain.name.lower()
        name = "general" if name in ("jewlery_and_general_apparel", "jewelry_and_general_apparel") else name
        release[name] = {}
        for part in SPLITS:
            release[name][part], problems = read_tsv(domain / f"{part}.tsv")
            print(*(f"note: {problem}\n" for problem in problems), sep="", end="")
        if (root / name / "train.tsv").exists():
            theirs = {row["id"] for rows in release[name].values() for row in rows}
            if any(row["id"] not in theirs for row in read_tsv(root / name / "train.tsv")[0]):
                raise UserError(f"{root / name} holds another data set, with other products. Move it away, or give "
                                "another --data.")
    (root / "images").mkdir(parents=True, exist_ok=True)
    missing = {}                                # photo: why
    for name, parts in release.items():         # the photos of all data sets, before any split is written
        wanted = sorted({row["images"] for rows in parts.values() for row in rows})
        with Progress(f"{name} photos", total=len(wanted), unit="photos") as progress:
            for image in wanted:
                if reason := place_photo(root / "images" / image, found.get(image, ())):
                    missing[image] = reason
                progress.step()
    write_tsv(root / "missing_photos.tsv", sorted(missing.items()), ["images", "reason"])
    empty = [f"{name}/{part}" for name, parts in release.items() for part, rows in parts.items()
             if with_photos_only and all(row["images"] in missing for row in rows)]
    if empty:
        raise UserError(f"--with-photos-only leaves no row in {', '.join(empty)}: their photos are not there "
                        f"({root / 'missing_photos.tsv'}). Give their folder with --images, or leave --with-photos-only out.")
    for name, parts in release.items():
        remove_splits(root / name)
        for part, rows in parts.items():
            with_photo = [row for row in rows if row["images"] not in missing]
            kept = with_photo if with_photos_only else rows
            write_tsv(root / name / f"{part}.tsv", [[row[column] for column in COLUMNS] for row in kept])
            print(f"{name}/{part}.tsv: {len(kept):,} rows, {len(with_photo):,} of {len(rows):,} with their photo")
    bad = sum(reason != "not found" for reason in missing.values())
    print(f"{len(missing):,} photos missing, {bad:,} of them files that are no photo: {root / 'missing_photos.tsv'}"
          + (f"; {litter:,} '._' files of macOS passed over" if litter else ""))
    if missing:
        print("The authors publish the training photos behind the link in data/training_data/images/README.md; unpack them "
              "anywhere and give that folder with --images" + (f" ({zips[0]} is not unpacked)" if zips else "") + ".")
