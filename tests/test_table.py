"""python -m dataset table: what it reads of spreadsheets, and the data set that it makes of them."""

import random
import re
import zipfile

import pytest
from test_dataset import rows

from base.console import UserError
from dataset.__main__ import main
from dataset.table import read_products, xlsx_lines

SPACE = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def make(folder, content, *flags, attributes=("Boot Style", "Heel", "Toe")):
    """The rows of the files that `table` makes of a file, {name: [row]}."""
    (folder / "products.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    main(["table", str(folder / "products.csv"), "--id", "SKU", "--out", str(folder / "shop/boots"),
          "--title", "Title", "--attributes", *attributes, *flags])
    return {path.stem: rows(path) for path in (folder / "shop/boots").glob("*.tsv")}


def shop():
    """A table of products with three attributes, some of them empty, some values rare."""
    draw = random.Random(0)
    lines = ["SKU;Title;Boot Style;Heel;Toe"]
    for n in range(80):
        cells = [draw.choice(["", *"aaaabbbcccd"]) for _ in range(3)]
        lines.append(f"P{n};shoe {n // 2};{';'.join(cells)}")           # two products have one title
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- .xlsx


def workbook(path, rows, strings=""):
    """Write an .xlsx of two sheets; the first is in the second file.  Rows and shared strings are XML."""
    sheets = "".join(f'<sheet name="{n}" sheetId="{n}" r:id="rId{n}"/>' for n in (2, 1))
    files = "".join(f'<Relationship Id="rId{n}" Target="worksheets/sheet{n}.xml"/>' for n in (1, 2))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml",
                         f'<workbook {SPACE} xmlns:r="r"><sheets>{sheets}</sheets></workbook>')
        archive.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="p">{files}</Relationships>')
        archive.writestr("xl/worksheets/sheet1.xml", "<other/>")
        archive.writestr("xl/worksheets/sheet2.xml",
                         f"<worksheet {SPACE}><sheetData>{rows}</sheetData></worksheet>")
        if strings:
            archive.writestr("xl/sharedStrings.xml", f"<sst {SPACE}>{strings}</sst>")
    return path


@pytest.mark.parametrize("cell, text", re.findall("(.*)  (.*)", """
t="s"><v>0</v>  Größe 42
t="s"><v>1</v>  靴
t="s"><v>2</v>  two_lines
t="inlineStr"><is><r><t>A</t></r><r><t xml:space="preserve"> b</t></r></is>  A b
t="n"><v>4.006381333931E12</v>  4006381333931
t="n"><v>1234567890123450</v>  1234567890123450
><v>0.30000000000000004</v>  0.3
t="str"><f>B1</f><v>7 cm</v>  7 cm
t="b"><v>1</v>  TRUE
t="e"><v>#N/A</v>  #N/A
"""))
def test_what_a_cell_holds(cell, text, tmp_path):
    """As a spreadsheet program shows it: a whole number without .0, a text without its fonts and ruby."""
    strings = ("<si><r><rPr><b/></rPr><t>Grö</t></r><r><t>ße 42</t></r></si>"
               "<si><t>靴</t><rPh sb='0' eb='1'><t>クツ</t></rPh></si><si><t>two_x005F_lines</t></si>")
    rows = f'<row r="1"><c r="A1"><v>1</v></c><c r="B1" {cell}</c><c r="C1"><v>2</v></c></row>'
    assert xlsx_lines(workbook(tmp_path / "x.xlsx", rows, strings)) == [f"1\t{text}\t2\n"]


def test_a_formula_without_a_result_is_no_empty_cell(tmp_path):
    """As programs write it that do not compute."""
    with pytest.raises(UserError, match="cell A1 is a formula without a result"):
        xlsx_lines(workbook(tmp_path / "x.xlsx", '<row><c r="A1"><f>1+1</f><v></v></c></row>'))


def test_cells_stand_where_their_references_say(tmp_path):
    """A column whose header is empty is left out."""
    rows = ('<row r="2"><c r="A2"><v>1</v></c><c r="AB2"><v>2</v></c><c r="AC2" s="1"/></row>'
            '<row r="5"><c r="B5"><v>3</v></c><c r="AB5"><v>4</v></c></row>')
    assert xlsx_lines(workbook(tmp_path / "x.xlsx", rows)) == ["\n", "1\t2\n", "\n", "\n", "\t4\n"]
    rows = re.sub(' r="[^"]*"', "", rows)               # some programs write none
    assert xlsx_lines(workbook(tmp_path / "y.xlsx", rows)) == ["1\t2\n", "3\t4\n"]


# ---------------------------------------------------------------------------------------- text


TEXT = ['SKU\tTitle \t"S, M, L, XL, XXL"\tBoot Style', '007\tStiefel  für 5"\t½\tChelsea ',
        '10\t"of ""two""\nlines, yes"\t\t']              # its second line has three commas, as the header


@pytest.mark.parametrize("encoding, separator, end, says", [
    ("utf-16", "\t", "\r\n", "read as utf-16, tabs"), ("utf-8-sig", ",", "\r", "read as utf-8, commas"),
    ("cp1252", ";", "\r\n", "cp1252 (is 'für' right? If not, save it as UTF-8), semicolons")])
def test_encodings_separators_and_line_ends(encoding, separator, end, says, tmp_path, capsys):
    text = end.join(TEXT).replace("\t", separator) + end + 3 * separator + end     # an empty row at the end
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    columns = "sku", None, None, " title"
    products = read_products(tmp_path / "x.csv", columns, ["BOOT  style", "S, M, L, XL, XXL"], tmp_path)
    out = capsys.readouterr().out
    assert says in out and "NOTES" not in out
    assert products == [(["007", "", "", 'Stiefel für 5"'], {"BOOT  style": "Chelsea",
                                                                "S, M, L, XL, XXL": "½"}),
                        (["10", "", "", 'of "two" lines, yes'], {"BOOT  style": "", "S, M, L, XL, XXL": ""})]


# ---------------------------------------------------------------------------------------- the data set


def test_what_has_no_value_goes_to_rest(tmp_path):
    """And what does not apply goes nowhere; each cell of the table is in one place.  A folder that holds
    something is not written to.
    """
    lines = shop().replace(";d", ";N/A").splitlines()
    made = make(tmp_path, "\n".join(lines), "--skip-value", "n/a", "--category", "Heel")
    cells = [[row[0], name, row[5], part == "rest"] for part, its in made.items() for row in its
             for name in row[4].split("|")]
    assert sorted(cells) == sorted([line.split(";")[0], name, value, value == ""] for line in lines[1:]
                                   for name, value in zip(lines[0].split(";")[2:], line.split(";")[2:])
                                   if value != "N/A")
    with pytest.raises(UserError, match="--out .*boots: is there already, and not empty"):
        make(tmp_path, shop())


def test_rows_that_are_left_out_are_listed(tmp_path, capsys):
    lines = shop().splitlines()
    lines[3:3] = ["P0;again;b;b;b", ";no id;a;a;a", "P99;too few", "P98;too;many;a;b;c", 'P97;"open;a;b;c']
    made = make(tmp_path, "\n".join(lines))
    out = capsys.readouterr().out
    for says in ("left out)\n      row 4: P0\n      row 5: \n", "row 6 has 2 cells, the header 5",
                 "row 7 has 6 cells", "row 8 has a cell that cannot be read"):
        assert says in out, out
    assert {row[0] for rows in made.values() for row in rows} == {f"P{n}" for n in range(80)}


@pytest.mark.parametrize("cell, name", [
    ("C:\\photos\\a.jpg", "a.jpg"), ("/srv/red, a.jpg", "red, a.jpg"), (" b/c.jpg ", "b/c.jpg"),
    ("http://x/a.png?v=3;http://x/b.png", "a.png"), ("a.webp\nb.webp,\nc.webp", "a.webp")])
def test_the_photo_of_a_cell(cell, name, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.jpg").touch()
    (tmp_path / "x.csv").write_text(f'id\tphoto\n7\t"{cell}"\n')
    [(product, _)] = read_products(tmp_path / "x.csv", ("id", "photo", None, None), [], tmp_path)
    assert product[1] == name


def test_what_is_odd_in_cells_is_said(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("id,photo,Heel\n1,http://x/1/main.jpg,#N/A\n2,http://x/2/main.jpg,Flat\n")
    read_products(tmp_path / "x.csv", ("id", "photo", None, None), ["Heel"], tmp_path)
    out = capsys.readouterr().out
    assert "with one name: 1 (taken for one photo)" in out and "2: http://x/2/main.jpg" in out
    assert "cells with an error: 1 (a value like others)" in out and "1: #N/A" in out


def test_the_last_lines_are_commands_that_fit(tmp_path, capsys):
    make(tmp_path, shop())
    end = f" --data {tmp_path}/shop --dataset boots --labels all --no-image\n"
    answer = f"python -m tools.catalogue RUN --input {tmp_path}/shop/boots/rest.tsv "
    assert f"Next:  python train.py{end}Then:  {answer}" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    make(tmp_path / "other", shop(), "--photo", "title")
    out = capsys.readouterr().out
    assert "missing or cannot be read: 40" in out and " --labels all --skip-missing-photos\n" in out
    assert "\nNext, if only missing photos are REFUSED:  python train.py" in out


def test_products_without_any_value_make_rest_alone(tmp_path, capsys):
    """As the new products of a shop that has trained before."""
    assert list(make(tmp_path, "SKU;Title;Boot Style;Heel;Toe\nP1;a shoe;;;\n")) == ["rest"]
    assert "train.py" not in capsys.readouterr().out


def test_hidden_answers(tmp_path):
    lines = ["SKU;Title;Heel", *(f"{n};Shoe {n} with flats;Flat" for n in range(9))]
    [test] = make(tmp_path, "\n".join(lines), "--hide-answers", attributes=["Heel"])["test"]
    assert test[3:] == [f"Shoe {test[0]} with", "Heel", "Flat"]


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("content, flags, says", [
    (shop(), ("--title", "Titel"), r"lacks titel \(did you mean 'title'\?\)"),
    (shop().replace("SKU", "heel "), ("--id", "Toe"), "names heel twice"),
    (b"\xd0\xcf\x11\xe0" + bytes(600), (), "it is an Excel workbook"),
    (b"PK\3\4damaged", (), "is a damaged Excel workbook"),
    ("Title;SKU;Boot Style;Heel;Toe\nx;;;;\n", (), "no product"),
    ("SKU;Title;Boot Style;Heel;Toe\n1;a;b;;\n", (), "no product is left for boots/val, boots/test"),
    (shop(), ("--attributes", "Heel", "heel"), "names a column twice"),
    (shop(), ("--attributes", "Heel|Toe"), "names a column twice, or one with '|'")])
def test_mistakes_are_one_line(content, flags, says, tmp_path):
    with pytest.raises(UserError, match=says):
        make(tmp_path, content, *flags)
