"""Build the three data sets from their public sources, MAVE's labels and Amazon's metadata (section 3).

What the paper leaves open is settled here, and said where it is done: a product has one row in a data set;
where it has two values of one attribute, it has no row for that attribute; products that are nearly the same
are in one split.
"""

import hashlib
from collections import Counter, defaultdict

from base.console import Progress, locked, reading
from base.duplicates import photo_key, title_key
from base.tsv import write_tsv
from dataset.mentions import folded, mentions, without
from dataset.photos import download
from dataset.sources import collect, collected
from dataset.stats import SPLITS, check_maker, print_table, write_splits
from dataset.values import read_values


def build(labels, metadata, data, values, dataset, seed, more_than, at_most, no_photos, connections):
    """Build data sets in the folder `data` from MAVE's labels and Amazon's metadata; section 3 of the paper.

    metadata   files that are read one after the other
    values     the table values.tsv
    dataset    names of the data sets to build
    more_than  a value needs more products than this; at_most: products drawn for a value
    connections  photos fetched at once, at most
    What is read of the sources is kept in data/.build; a start with another seed or table goes on from there.
    """
    table, spellings = read_values(values)
    check_maker(data, dataset, "build")
    for source in (labels, *metadata):
        with reading(source, "a source of the data sets"):      # before anything is made
            pass
    with locked(data / ".build", "building"):
        sources = data / ".build" / "sources.jsonl"
        collect(labels, metadata, sources)
        ids, unmapped = map_values(collected(sources), table, dataset, no_photos)
        write_tsv(data / "unmapped.tsv", unmapped, ["dataset", "attribute", "raw", "category", "products"])
        print(f"raw values that {values.name} does not map, the commonest first: {data / 'unmapped.tsv'}")
        chosen = choose(ids, seed, more_than, at_most)
        rows, urls = table_rows(collected(sources), chosen, spellings)
        images = None if no_photos else data / "images"
        failed = {}
        if images:
            failed = download(urls, images, connections)
            write_tsv(data / "failed.tsv", [(asin, url, why) for asin, (url, why, _) in failed.items()],
                      ["id", "url", "reason"])
            print(f"photos: {len(urls) - len(failed):,} of {len(urls):,}; {len(failed):,} products dropped, "
                  f"see {data / 'failed.tsv'} (another start tries these again)")
        parts = {}
        for name in dataset:
            kept = [row for row in rows[name] if row[0] not in failed]
            parts[name] = split(kept, images, seed, name)
            print_table(name, {part: label_counts(its) for part, its in parts[name].items()})
        write_splits(data, parts, "build")


def label_counts(rows):
    """Counter of the (attribute, value) of rows of a TSV."""
    return Counter(tuple(row[4:]) for row in rows)


def draw(*what):
    """A number drawn for `what`, the same on every machine: products are ordered by it, never by their
    lines.
    """
    return hashlib.sha256("\t".join(map(str, what)).encode()).digest()[:8]


def map_values(products, table, data_sets, no_photos):
    """({(data set, attribute, value): [id]}, rows of unmapped.tsv), by the table of values.

    A label whose evidences name several values of the attribute gets none: its right answer would be a
    toss-up.
    """
    unmapped = Counter()
    ids = defaultdict(list)
    for asin, _, urls, labels in products:
        for dataset, attribute, category, raws in labels:
            of_raw = table[dataset, attribute, category]
            values = {of_raw[folded(raw)] for raw in raws if folded(raw) in of_raw}
            unmapped.update((dataset, attribute, raw, category) for raw in raws if folded(raw) not in of_raw)
            if len(values) == 1 and dataset in data_sets and (urls or no_photos):
                ids[dataset, attribute, values.pop()].append(asin)
    rows = [(*key, n) for key, n in unmapped.items()]
    return ids, sorted(rows, key=lambda row: (*row[:2], -row[4], row))


def choose(ids, seed, more_than, at_most):
    """{(data set, id): (attribute, value)}: values with more than `more_than` products, `at_most` drawn from
    each.

    A product is drawn once for a data set: values choose in turn, the rarest first, from what no other has
    drawn.
    """
    chosen = {}
    for (dataset, attribute, value), asins in sorted(ids.items(), key=lambda item: (len(item[1]), item[0])):
        free = [asin for asin in asins if (dataset, asin) not in chosen]
        if len(free) > more_than:
            free.sort(key=lambda asin: (draw(seed, dataset, attribute, value, asin), asin))
            chosen.update(((dataset, asin), (attribute, value)) for asin in free[:at_most])
        else:
            print(f"{dataset}: {attribute} = {value} left out: {len(free):,} products, not more than "
                  f"{more_than:,}")
    return chosen


def table_rows(products, chosen, spellings):
    """({data set: [row of its TSV]}, {id: photo URLs}), with every mention of the value out of title and
    category.

    A product whose title is nothing but the value is left out.
    """
    rows = defaultdict(list)
    photo_urls = {}
    for asin, title, urls, labels in products:
        for dataset, attribute, category, raws in labels:
            its_attribute, value = chosen.get((dataset, asin), (None, None))
            if attribute == its_attribute:
                wanted = mentions((value, *raws, *spellings[dataset, attribute, value]))
                text = without(title, wanted)
                if text:
                    rows[dataset].append([asin, f"{asin}.jpg", without(category, wanted), f"[Title] {text}",
                                          attribute, value])
                    photo_urls[asin] = urls
    return rows, photo_urls


def groups(*keys):
    """[a name of a group for each product]: products that share a key are in one group, also in a chain.

    keys  lists of the products' keys, one list for each sign
    """
    parent = {}                                         # of products, and of the keys that join them

    def root(node):
        while node in parent:
            node = parent[node]
        return node

    for i, its_keys in enumerate(zip(*keys)):
        for sign_and_key in enumerate(its_keys):
            if sign_and_key[1] is not None and root(i) != root(sign_and_key):
                parent[root(i)] = root(sign_and_key)
    return [root(i) for i in range(len(keys[0]))]


def split(rows, images, seed, dataset):
    """{split: rows}: each value's products 0.75 : 0.15 : 0.15, in an order drawn for (seed, product).

    Rows with the same id, title words or photo (in the folder `images`, or None) go to one split, so that the
    test does not ask what training has shown.  Groups of more than 20 and a tenth of all rows are an
    exception: there the title or the photo says nothing, such as "photo not available".
    val takes the first groups that fit into its share of each value, test the next, and train has the rest.
    """
    keys = [[row[0] for row in rows], [title_key(row[3].removeprefix("[Title]")) for row in rows]]
    if images:
        keys.append([])
        with Progress("comparing photos", len(rows), "products") as progress:
            for row in rows:
                keys[-1].append(photo_key(images / row[1]))
                progress.step()
    group = groups(*keys)
    size = Counter(group)
    together = defaultdict(list)
    for row, its_group in zip(rows, group):
        says_nothing = size[its_group] > max(20, len(rows) // 10)
        together[row[0] if says_nothing else its_group].append(row)
    counts = label_counts(rows)
    share = {value: round(n * SPLITS["val"] / sum(SPLITS.values())) for value, n in counts.items()}
    free = {"val": Counter(share), "test": Counter(share), "train": counts}
    parts = {part: [] for part in SPLITS}
    for same in sorted(together.values(), key=lambda same: draw(seed, dataset, "split", min(same)[0])):
        needed = label_counts(same)
        part = next(part for part in free if needed <= free[part])
        parts[part] += same
        free[part] -= needed
    for part in parts.values():
        part.sort(key=lambda row: draw(seed, dataset, "order", row[0]))
    return parts
