"""Values in words: raw spellings of one value, and its explicit mentions in a text.

Section 3 of the paper removes "all explicit attribute value mentions from the product text"; this is what counts as one.
"""

import html
import re
import unicodedata
from functools import lru_cache

JOINING = r"\s\-‐-―−/_"         # blanks and the hyphens and slashes that join words, for a regular expression's [...]


def clean(text):
    """A raw title or value as plain text: no HTML, control or invisible characters, one blank between words."""
    if "<" in text or "&" in text:
        text = html.unescape(text)
        text = re.sub(r"(?is)<(script|style)\b.*?</\1\s*>", " ", text)
        text = re.sub(r"<[a-zA-Z/!][^<>]*>", " ", text)
    text = unicodedata.normalize("NFC", text.encode("utf-8", "ignore").decode())    # JSON may hold half a surrogate pair
    if not text.isprintable():                  # soft hyphens and the like would hide a mention
        text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(text.replace("¾", " 3/4 ").split())


def stem(word):
    """A lower-case word without its plural s or its -ed: boots -> boot, striped -> stripe, dotted -> dot."""
    if len(word) > 1 and word.endswith("s"):
        if word.endswith(("sses", "shes", "ches", "xes")):
            return word[:-2]
        return word if word.endswith("ss") else word[:-1]       # tennis -> tenni: both sides of a comparison say so
    if len(word) > 4 and word.endswith("ed"):
        base = word[:-2]
        if base[-1] == base[-2] and base[-1] not in "sl":
            return base[:-1]                    # dotted
        short = re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", base)
        return base + "e" if short or base[-1] == "v" else base     # striped, sleeved; pointed, buttoned
    return word


def words(text):
    """The words of a value, lower-case: letters and digits, whatever stands between them."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


@lru_cache(100_000)
def folded(raw):
    """What raw spellings of one value have in common: Short-Sleeves, "short sleeved", shortsleeve -> shortsleeve."""
    return "".join(stem(word) for word in words(raw))


@lru_cache(20_000)
def mentions(names):
    """A pattern for every explicit mention of a value that has these names (a tuple), or None where they hold no word.

    Any case; words plain, in the plural, with 's or with -ed; up to three blanks, hyphens and the like between them.
    Whole words only: Round is found in "round-toe" and "rounded", not in "Surround".
    """
    alternatives = set()
    for name in names:
        forms = []
        for word in words(name):
            root = stem(word)
            ending = ("" if root.isdigit() else "(?:['’]?s)?" if len(root) < 2 else
                      "(?:['’]?s|es|ed" + ("|d)?" if root[-1] == "e" else f"|{root[-1]}ed)?"))
            more = f"|{word[:-1]}ies" if len(word) > 2 and word[-1] == "y" else ""      # galaxies; canvases by -es
            forms.append(f"(?:{root}{ending}|{word}(?:es)?{more})")         # a word holds letters and digits alone
        if forms:
            alternatives.add(r"[\W_]{0,3}".join(forms))
    if not alternatives:
        return None
    longest_first = "|".join(sorted(alternatives, key=lambda text: (-len(text), text)))
    return re.compile(rf"(?<![^\W_])(?:{longest_first})(?![^\W_])", re.IGNORECASE)


def without(text, pattern):
    """`text` without what `pattern` finds, and without what that leaves behind: blanks, hyphens, empty brackets."""
    while pattern is not None and pattern.search(text):     # again: "Short Short Sleeve Sleeve" hides one in another
        text = pattern.sub("\0", text)          # clean texts hold no such character
        text = re.sub(rf"[{JOINING}]*\0[{JOINING}\0]*", " ", text)         # round-toe-shoe -> shoe, not --shoe
        text = re.sub(r"\(\s*\)|\[\s*\]|\{\s*\}|\"\s*\"", " ", text)
        text = re.sub(r"\s+([,;:)\]])", r"\1", text)
        text = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", text)
        text = " ".join(text.split()).strip(" ,;:-/|&")
    return text
