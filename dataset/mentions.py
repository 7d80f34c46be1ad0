"""Values in words: raw spellings of one value, and its explicit mentions in a text.

Section 3 of the paper removes "all explicit attribute value mentions from the product text"; this is what
counts as one.  One rule decides both: a raw value means v, and a piece of a title mentions v, if `folded`
makes it equal to a spelling of v.
"""

import html
import re
import unicodedata
from functools import lru_cache

# blanks and the hyphens and slashes that join words, for a regular expression's [...]
JOINING = r"\s\-‐-―−/_"
GAP = 3                         # characters, at most, between two words of one mention: "polka - dot"
MOST_WORDS = 8                  # of one mention
WORD = re.compile(r"[^\W_]+(?:'s(?![^\W_]))?")          # letters and digits, and a possessive 's
APOSTROPHES = re.compile("[’‘ʼ′`´]")
ENDINGS = (                     # of words, and what stands there instead; the first that is found goes
    ("(?<=..)ies$", "y"),                               # galaxies
    ("(?<=ss|sh|ch|.x)es$", ""),                        # dresses
    ("(?<=[^s])s$", ""),                                # tennis -> tenni: both sides of a comparison say so
    (r"^(?=.{5})((?:[^aeiou]|qu)*[aeiou][^aeiouwxy])ed$", r"\1e"),      # striped, flared, squared
    ("(?<=..[vc])ed$", "e"),                            # sleeved, fleeced
    ("(?<=...)ed$", ""),                                # pointed, buttoned
    ("(?<=o)ed$", "e"),                                 # toed
)


def plain(text):
    """`text` in the characters of a keyboard where there is a choice: full width, ligatures, fractions."""
    text = text.encode("utf-8", "ignore").decode()      # JSON may hold half a surrogate pair
    if text.isascii() and text.isprintable():           # nothing of what follows would change it
        return text
    text = re.sub("[¼-¾⅐-⅞]", lambda fraction: f" {fraction[0]} ", text)          # "1¾" is not 13/4,
    text = re.sub("[™℠]", " ", text)                    # nor "Nike™" NikeTM
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
    text = re.sub(r"\s", " ", text)
    return "".join(c for c in text if unicodedata.category(c)[0] != "C")          # soft hyphens and the like


def clean(text):
    """A raw title or value as plain text: no HTML, control or invisible characters, one blank between
    words.
    """
    before = None
    while text != before:                               # again: shops escape twice, "A&amp;amp;B"
        before = text
        text = html.unescape(plain(text))
    text = re.sub(r"(?is)<(script|style)\b.*?</\1\s*>", " ", text)
    text = re.sub(r"<[a-zA-Z/!][^<>]*>", " ", text)
    return " ".join(text.split())


@lru_cache(100_000)
def stem(word):
    """A lower-case word without its possessive, its plural or its -ed: stiletto's, galaxies -> galaxy, dotted
    -> dot.
    """
    word = word.removesuffix("'s")
    for ending, instead in ENDINGS:
        word, found = re.subn(ending, instead, word)
        if found:
            break
    word = re.sub("(?<=..)ie$", "y", word)              # bootie, booties, booty
    return re.sub(r"(?<=.)([^aeiou])\1$", r"\1", word)  # dott(ed) -> dot; dress and press likewise


def joined(stems):
    """Stems as one word.  Its last e goes where -ed and -es leave it open: camouflag(ed), fring(ed),
    canvas(es), and then its s: canvas.

    A short word keeps it: a cape is no cap.
    """
    return re.sub("([^aeiouy]{2}|[aeiouy][^aeiouy]+[aeiouy]+[^aeiouy]+)e$",
                  lambda start: re.sub("(?<!s)s$", "", start[1]), "".join(stems))


@lru_cache(100_000)
def folded(raw):
    """What raw spellings of one value share: Short-Sleeves, "short sleeved", shortsleeve -> shortsleeve."""
    words = WORD.findall(APOSTROPHES.sub("'", plain(raw).lower()))
    return joined(stem(word) for word in words)


@lru_cache(20_000)
def mentions(names):
    """What `find` looks for: the folded spellings of a value that has these names (a tuple)."""
    return frozenset(folded(name) for name in names) - {""}


def find(text, wanted):
    """[(start, end)] of every explicit mention in a clean text.  wanted: of `mentions`.

    Whole words only: Round is found in "round-toe" and "rounded", not in "Surround".  The longest mention at
    a place wins.
    """
    words = list(WORD.finditer(APOSTROPHES.sub("'", text.lower())))
    stems = [stem(word[0]) for word in words]
    initials = {name[0] for name in wanted}             # most words begin no mention
    places = []
    start = 0
    while start < len(words):
        end = start + (stems[start][0] in initials)     # words[start:end] may be a mention
        most = min(len(words), start + MOST_WORDS)
        while start < end < most and words[end].start() - words[end - 1].end() <= GAP:
            end += 1
        while end > start and joined(stems[start:end]) not in wanted:
            end -= 1
        if end > start:
            places.append((words[start].start(), words[end - 1].end()))
        start = max(end, start + 1)
    return places


def without(text, wanted):
    """A clean `text` without its mentions of `wanted`, and without the blanks, hyphens, empty brackets they
    leave.
    """
    while places := find(text, wanted):  # again: "Short Short Sleeve Sleeve" hides one in another
        for start, end in reversed(places):
            text = text[:start] + "\0" + text[end:]     # clean texts hold no such character
        text = re.sub(rf"[{JOINING}]*\0[{JOINING}\0]*", " ", text)  # round-toe-shoe -> shoe, not --shoe
        text = re.sub(r"\(\s*\)|\[\s*\]|\{\s*\}|\"\s*\"", " ", text)
        text = re.sub(r"\s+([,;:)\]])", r"\1", text)
        text = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", text)
        text = " ".join(text.split()).strip(" ,;:-/|&")
    return text
