"""The data sets: the build against the naive one, interruptions, broken sources."""

import contextlib
import gzip
import json
import random
import re
import sqlite3
import time
from collections import Counter

import pytest
from conftest import FEW, contents

from base.console import UserError
from dataset import build, sources, stats
from dataset.values import ATTRIBUTES, VALUES, read_values
from experiments import naive_build


def test_the_build_is_the_naive_build(made):
    labels, metadata, root = made
    assert naive_build.differences(labels, metadata, root, **FEW) == []


def test_what_the_paper_says_of_the_data_sets(made):
    for name in ATTRIBUTES:
        parts = {part: stats.read_tsv(made[2] / name / f"{part}.tsv")[0] for part in stats.SPLITS}
        ids = [row["id"] for rows in parts.values() for row in rows]
        assert len(ids) == len(set(ids)) > 30                              # no product twice, none in two splits
        n = {part: Counter((row["attribute_names"], row["attribute_values"]) for row in rows)
             for part, rows in parts.items()}
        for value in n["train"]:
            total = sum(n[part][value] for part in parts)
            assert 5 < total <= 30
            assert n["val"][value] == n["test"][value] == round(total * 0.15 / 1.05)
        assert stats.find_problems(name, {}, made[2] / "images", {}) == []
        names = read_values(VALUES)[1]
        problems = [what for what, *_ in stats.find_problems(name, parts, made[2] / "images", names)]
        assert [what for what in problems if "titles" in what or "ids" in what] == []
        assert all(row["texts"].startswith("[Title] ") and row["images"] == row["id"] + ".jpg"
                   for rows in parts.values() for row in rows)


def test_no_raw_evidence_is_left_in_a_text(made):
    evidence = {}
    for line in made[0].read_bytes().split(b"\n"):
        try:
            item = json.loads(line.decode())
            evidence.setdefault(item["id"], [(each["key"], [e["value"] for e in each["evidences"]])
                                             for each in item["attributes"]])
        except (ValueError, KeyError, TypeError):
            pass
    for name in ATTRIBUTES:
        for part in stats.SPLITS:
            for row in stats.read_tsv(made[2] / name / f"{part}.tsv")[0]:
                for key, raws in evidence[row["id"]]:
                    for raw in raws * (key == row["attribute_names"]):
                        assert not re.search(rf"\b{re.escape(raw)}\b", row["texts"], re.IGNORECASE), (raw, row)


def test_another_seed_another_draw_and_the_sources_are_not_read_again(made, capsys):
    labels, metadata, root = made
    before = contents(root)
    build.build(labels, metadata, root, photos=False, seed=1, **FEW)
    assert capsys.readouterr().out.count("read before") == 2
    assert contents(root) != before
    build.build(labels, metadata, root, photos=False, **FEW)
    assert contents(root) == before


def test_editing_the_table_does_not_read_the_sources_again(made, tmp_path, capsys):
    labels, metadata, root = made
    (tmp_path / "v.tsv").write_text("dataset\tattribute\traw\tvalue\ngeneral\tPattern\tzigzag & more\tFloral\n")
    build.build(labels, metadata, root, values=tmp_path / "v.tsv", datasets=["general"], photos=False, **FEW)
    rows = stats.read_tsv(root / "general" / "train.tsv")[0]
    assert capsys.readouterr().out.count("read before") == 2 and {row["attribute_values"] for row in rows} == {"Floral"}
    assert "clothing\tNeckline" in (root / "unmapped.tsv").read_text()
    build.build(labels, metadata, root, photos=False, **FEW)              # as the other tests expect it


@pytest.mark.parametrize("times", [1, 2])
def test_gzip_and_gzip_in_gzip_give_the_same_bytes(made, tmp_path, times):
    paths = []
    for source in made[:2]:
        content = source.read_bytes()
        for _ in range(times):
            content = gzip.compress(content, 1)
        paths.append(tmp_path / (source.name + ".gz"))
        paths[-1].write_bytes(content)
    build.build(*paths, tmp_path / "root", photos=False, **FEW)
    assert contents(tmp_path / "root") == contents(made[2])


def test_two_processes_give_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(sources, "CHUNK", 300_000)
    build.build(*made[:2], tmp_path, photos=False, jobs=2, **FEW)
    assert contents(tmp_path) == contents(made[2])


@pytest.mark.parametrize("compress", [False, True])
def test_interrupted_after_any_chunk_it_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, compress):
    paths = made[:2]
    if compress:
        paths = [tmp_path / "l.gz", tmp_path / "m.gz"]
        for source, path in zip(made[:2], paths):
            path.write_bytes(gzip.compress(source.read_bytes(), 1))
    monkeypatch.setattr(sources, "CHUNK", 200_000)
    left = [0]

    def interrupted(store):
        def once(db, result):
            counts = store(db, result)
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt                 # after the rows, before the commit
            return counts
        return once

    with monkeypatch.context() as patch:
        for name in ("store_labels", "store_metadata"):
            patch.setattr(build, name, interrupted(getattr(build, name)))
        starts = 0
        while True:
            left[0] = random.Random(starts).randrange(1, 8)
            starts += 1
            try:
                build.build(*paths, tmp_path / "root", photos=False, **FEW)
                break
            except KeyboardInterrupt:
                pass
    assert starts > 5 and contents(tmp_path / "root") == contents(made[2])


def test_a_changed_source_is_read_again(made, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    labels.write_bytes(made[0].read_bytes()[:200_000])
    build.build(labels, made[1], tmp_path / "root", photos=False, **FEW)
    labels.write_bytes(made[0].read_bytes())
    build.build(labels, made[1], tmp_path / "root", photos=False, **FEW)
    assert capsys.readouterr().out.count("has changed since the last start") == 2
    assert contents(tmp_path / "root") == contents(made[2])


def test_a_line_that_never_ends_is_one_broken_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "CHUNK", 10_000)
    monkeypatch.setattr(sources, "LONGEST_LINE", 20_000)
    metadata = tmp_path / "m.json"
    metadata.write_bytes(b'{"asin": "B000000000", "title": "' + b"x" * 500_000 + b'"}\n' + made[1].read_bytes())
    build.build(made[0], metadata, tmp_path / "root", photos=False, **FEW)
    n = [int(each.replace(",", "")) for each in re.findall(r"metadata: ([\d,]+) broken", capsys.readouterr().out)]
    assert contents(tmp_path / "root") == contents(made[2])
    build.build(*made[:2], made[2], photos=False, **FEW)
    assert n[0] == 1 + int(re.search(r"metadata: ([\d,]+) broken", capsys.readouterr().out).group(1).replace(",", ""))


def test_wrong_sources_are_refused_by_name(made, tmp_path):
    labels, metadata, _ = made

    def refused(says, *paths):
        with pytest.raises(UserError, match=says):
            build.build(*paths, tmp_path / "root", photos=False)

    refused("cannot be opened", tmp_path / "none", metadata)
    refused("the right way round", metadata, labels)
    (bad := tmp_path / "bad").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:23\nsize 744855753\n")
    refused("git-LFS pointer", bad, metadata)
    bad.write_text("<!DOCTYPE html><html>")
    refused("web page", labels, bad)
    bad.write_bytes(b"PK\3\4")
    refused("zip archive", labels, bad)
    bad.write_text("")
    refused("none of its 0 lines", bad, metadata)
    bad.write_bytes(b"\x1f\x8bnot gzip at all")
    refused("damaged gzip", bad, metadata)
    bad.write_bytes(gzip.compress(metadata.read_bytes())[:-100_000])
    refused("breaks off", labels, bad)
    refused("cannot be opened", labels, tmp_path)


def test_two_builds_at_once_are_refused(made, tmp_path):
    with build.only_one(tmp_path / ".build"), pytest.raises(UserError, match="Another build is at work"):
        build.build(*made[:2], tmp_path, photos=False)


def test_an_id_that_is_no_asin_goes_nowhere(tmp_path, capsys):
    with open(tmp_path / "l", "w") as labels, open(tmp_path / "m", "w") as metadata:
        for asin in ("../../evil", "B0/../../X", "B00000000\n", "b000000001", "B000000002", "Ｂ000000003"):
            labels.write(json.dumps({"id": asin, "category": "Shoes", "attributes": [
                {"key": "Toe Style", "evidences": [{"value": "round toe", "pid": 0, "begin": 0, "end": 9}]}]}) + "\n")
            metadata.write(json.dumps({"asin": asin, "title": "A shoe, round toe", "imageURL": []}) + "\n")
    build.build(tmp_path / "l", tmp_path / "m", tmp_path / "root", photos=False, more_than=0)
    assert "5 whose id is no ASIN" in capsys.readouterr().out
    rows = [row for part in stats.SPLITS for row in stats.read_tsv(tmp_path / "root" / "footwear" / f"{part}.tsv")[0]]
    assert [(row["id"], row["texts"]) for row in rows] == [("B000000002", "[Title] A shoe")]


def test_several_files_of_metadata_are_one(made, tmp_path, capsys):
    """Cut in two, killed after the first, one of them changed: the same bytes."""
    labels, metadata, root = made
    lines = metadata.read_bytes().splitlines(keepends=True)
    parts = [tmp_path / "a.json", tmp_path / "b.json.gz"]
    parts[0].write_bytes(b"".join(lines[:1000]))
    parts[1].write_bytes(gzip.compress(b"".join(lines[1000:2000])))
    build.build(labels, parts, tmp_path / "root", photos=False, **FEW)
    assert contents(tmp_path / "root") != contents(root)
    parts[1].write_bytes(gzip.compress(b"".join(lines[1000:])))
    build.build(labels, parts, tmp_path / "root", photos=False, **FEW)
    assert contents(tmp_path / "root") == contents(root)
    build.build(labels, parts[:1], tmp_path / "root", photos=False, **FEW)
    capsys.readouterr()
    build.build(labels, parts, tmp_path / "root", photos=False, **FEW)
    assert capsys.readouterr().out.count("read before") == 1               # the labels; all metadata are read again
    assert contents(tmp_path / "root") == contents(root)


def test_metadata_as_python_dicts(made, tmp_path):
    """Amazon's files of 2014 hold repr() of dicts.  Nothing in them is executed, and none of them takes long."""
    labels, metadata, root = made
    lines = []
    for line in metadata.read_bytes().splitlines():
        try:
            lines.append(repr(json.loads(line)).encode())
        except ValueError:
            lines.append(line)
    lines[1:1] = [b"{'asin': __import__('os').mkdir('" + str(tmp_path / "evil").encode() + b"')}", b"{'asin': " + b"[" * 90_000,
                  b"{'asin': " + b"-" * 150_000 + b"1}", b"{'a': " * 30_000,
                  b"{'asin': 'B000000000', 'title': '" + b"x" * 10**6 + b"'}",
                  b"{'asin': {}, 'title': {1: b'x'}}", b"{'asin': 'B000000000', 'title': '\\d\\ud800'}"]
    (tmp_path / "m").write_bytes(b"\n".join(lines))
    start = time.monotonic()
    build.build(labels, tmp_path / "m", tmp_path / "root", photos=False, **FEW)
    assert time.monotonic() - start < 30 and not (tmp_path / "evil").exists()
    assert contents(tmp_path / "root") == contents(root)


def test_which_line_counts_of_a_product_given_twice(tmp_path):
    """Of each attribute the first label; of titles the first that can be used."""
    def label_of(key, value):
        return {"id": "B000000001", "category": "Shoes", "attributes": [
            {"key": key, "evidences": [{"value": value, "pid": 0, "begin": 0, "end": 9}]}]}

    (tmp_path / "l").write_text("\n".join(json.dumps(each) for each in (
        label_of("Toe Style", "round toe"), label_of("Toe Style", "pointed toe"), label_of("Heel Height", "flat"))))
    (tmp_path / "m").write_text("\n".join(json.dumps({"asin": "B000000001", "title": title}) for title in (
        "", "var x = getTime()", "First round shoe", "Second shoe")))
    build.build(tmp_path / "l", tmp_path / "m", tmp_path / "root", photos=False, more_than=0)
    with contextlib.closing(sqlite3.connect(tmp_path / "root/.build/sources.sqlite")) as db:
        assert db.execute("SELECT attribute, value FROM valued ORDER BY attribute").fetchall() == [
            ("Heel Height", "Flat"), ("Toe Style", "Round Toe")]
        assert db.execute("SELECT title FROM product").fetchall() == [("First round shoe",)]


def test_two_names_of_one_attribute_are_one_label(tmp_path, capsys):
    """Heel and Heel Height contradict each other in the first product, and agree in the second."""
    with open(tmp_path / "l", "w") as labels, open(tmp_path / "m", "w") as metadata:
        for asin, values in (("B000000001", ("flat", "high heel")), ("B000000002", ("flat", "flat"))):
            labels.write(json.dumps({"id": asin, "category": "Shoes", "attributes": [
                {"key": key, "evidences": [{"value": value, "pid": 0, "begin": 0, "end": 9}]}
                for key, value in zip(("Heel Height", "Heel"), values)]}) + "\n")
            metadata.write(json.dumps({"asin": asin, "title": "A shoe", "imageURL": []}) + "\n")
    build.build(tmp_path / "l", tmp_path / "m", tmp_path / "root", photos=False, more_than=0)
    rows = [row for part in stats.SPLITS for row in stats.read_tsv(tmp_path / "root" / "footwear" / f"{part}.tsv")[0]]
    assert [(row["id"], row["attribute_names"], row["attribute_values"]) for row in rows] == [("B000000002", "Heel Height", "Flat")]


def test_the_larger_photo_comes_first(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as db, db:
        db.execute("CREATE TABLE label (id)")
        db.execute("INSERT INTO label VALUES ('B000000001')")
    item = {"asin": "B000000001", "title": "A shoe", "imageURL": ["http://x/small.jpg"], "imageURLHighRes": ["http://x/large.jpg"]}
    [(_, _, urls)], _ = sources.parse_metadata(str(tmp_path / "db"), json.dumps(item).encode())
    assert json.loads(urls) == ["http://x/large.jpg", "http://x/small.jpg"]
