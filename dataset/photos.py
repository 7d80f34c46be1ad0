"""Product photos: fetched politely from the web, checked to be photos, and never half written.

Photos that are gone are left out.  A server that stops answering is waited for, and then ends the download: a
data set without half of its photos is another one.

Section 3 of the paper takes the photos of Amazon Reviews 2018 by their URLs.  Whatever a URL or a server
does, this module writes only FOLDER/ID.jpg, and only after the bytes have been decoded as a picture.
"""

import io
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.error import HTTPError

from base.console import Progress, UserError, duration, reason, whole_file
from base.photo import open_picture

MOST_BYTES = 10_000_000         # of one photo's file; Amazon's largest are about 2 MB
LEAST_SIDE = 10                 # pixels; a removed photo is often answered with a picture of 1 x 1
RETRIED = {403, 408, 429, 500, 502, 503, 504}   # HTTP answers that may be better next time
FAILURES = 10                   # in a row, after which a server is asked for a photo that it gave before
PAUSES = 0, 1, 10, 60, 240, 320         # seconds before each pass over the photos that are still missing
TRIES = 3                       # passes in which the servers answer
TIMEOUT = 20                    # seconds without a sign of life from a server
DEADLINE = 60                   # seconds for one photo, so that no trickle holds a connection
LONGEST_WAIT = 600              # seconds; a server that asks for a longer wait is not waited for


@dataclass
class State:
    """What all threads know of the servers."""

    good: str = ""              # the URL of a photo that came
    failures: int = 0           # in a row
    broken: str = ""            # why nothing more is asked in this pass over the photos
    wait: float = 0             # seconds that a server asked to be left alone


# ---------------------------------------------------------------------------------------- one photo


class Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        file.close()                                    # urllib would read its body, however long that is
        return super().redirect_request(request, file, code, message, headers, url)


OPENER = urllib.request.build_opener(Redirects)
OPENER.addheaders = [("User-Agent", "EIVEN data set builder (research)")]


def request(url):
    """The bytes behind a URL."""
    if not url.lower().startswith(("http:", "https:")):
        raise ValueError(f"not an http(s) URL: {url}")
    deadline = time.monotonic() + DEADLINE
    content = bytearray()
    with OPENER.open(url, timeout=TIMEOUT) as answer:
        while piece := answer.read1(65536):
            content += piece
            if len(content) + (answer.length or 0) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done in {DEADLINE:g} s")
    return content


def fetch(url):
    """(the bytes of the photo behind a URL, "", False, 0), or, whatever goes wrong, (None, why, whether the
    same request may do better later, seconds to wait first).
    """
    try:
        content = request(url)
        picture = open_picture(io.BytesIO(content))
        if min(picture.size) < LEAST_SIDE:
            raise ValueError(f"a picture of {picture.width} x {picture.height} pixels")
        return content, "", False, 0
    except HTTPError as error:
        error.close()
        seconds = re.fullmatch("[0-9]{1,9}", error.headers.get("Retry-After", ""))
        return None, f"HTTP {error.code}", error.code in RETRIED, int(seconds[0]) if seconds else 0
    except Exception as error:                          # no connection, no picture, blanks in a URL, nonsense
        # A ValueError is about the URL or the photo, which will not change.
        return None, reason(error), not isinstance(error, ValueError), 0


# ---------------------------------------------------------------------------------------- many photos


def first_photo(urls, path, state):
    """Write to `path` the first photo that one of `urls` gives.  None, or (the last URL asked, why not,
    whether another pass may do better).

    What a URL may give later is not replaced by the photo of the next URL.
    """
    failure = "", "no URL", False
    for url in urls:
        if state.broken:
            return url, f"not asked ({state.broken})", True
        content, why, again, after = fetch(url)
        if content:
            with whole_file(path) as partial:
                partial.write_bytes(content)
            state.failures = 0
            state.good = url
            return None
        failure = url, why, again
        if again:
            state.failures += 1
            state.wait = max(state.wait, after)
            if after or state.failures >= FAILURES and not answers(state):
                state.broken = f"{url}: {why}"
            break
    return failure


def answers(state):
    """Whether a photo that came before comes again, or the answer that it is gone."""
    if not state.good or fetch(state.good)[2]:
        return False
    state.failures = 0
    return True


def download(wanted, folder, connections=8):
    """Fetch the photos that `folder` does not have yet; returns {name: what `first_photo` says} of those
    that it still lacks.

    wanted       {name: urls}, best URL first; a name is a plain file name (here an ASIN)
    connections  how many photos are fetched at once, at most
    Errors       UserError where the web does not answer any more
    """
    paths = {name: folder / f"{name}.jpg" for name in sorted(wanted)}
    todo = [name for name, path in paths.items() if not path.exists()]
    state = State(next((urls[0] for name, urls in wanted.items() if urls and paths[name].exists()), ""))
    failed = {}                                         # {name: what first_photo returned}
    tries = 0
    with (Progress("photos", len(wanted), "photos", len(wanted) - len(todo)) as progress,
          ThreadPoolExecutor(connections) as pool):
        for pause in PAUSES:
            if not todo or tries == TRIES or state.wait > LONGEST_WAIT:
                break
            pause = max(pause, state.wait)
            if state.broken:
                print(f"\nno answer ({state.broken}); asked again in {duration(pause)}", file=sys.stderr)
            time.sleep(pause)
            state.broken = ""
            state.wait = 0
            outcomes = pool.map(lambda name: first_photo(wanted[name], paths[name], state), todo)
            for name, failure in zip(todo, outcomes):
                failed[name] = failure
                progress.step(not failure)
            todo = [name for name in todo if failed[name] and failed[name][2]]
            tries += not (state.broken and state.good)  # a server that gave photos is waited for
    if state.broken:
        raise UserError(f"{len(todo):,} of {len(wanted):,} photos are missing, and their server does not "
                        f"answer ({state.broken}). No split was written. Start the same command again to go "
                        "on from here, or build with --no-photos.")
    return {name: failure for name, failure in failed.items() if failure}
