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
from functools import cache
from urllib.error import HTTPError

from base.console import Progress, UserError, duration, reason, whole_file
from base.photo import open_picture

MOST_BYTES = 10_000_000         # of one photo's file; Amazon's largest are about 2 MB
LEAST_SIDE = 10                 # pixels; a removed photo is often answered with a picture of 1 x 1
RETRIED = {403, 408, 429, 500, 502, 503, 504}   # HTTP answers that may be better next time
FAILURES = 10                   # in a row, after which a server is asked for a photo that it gave before
PAUSES = 0, 1, 10, 60, 240, 320         # seconds before each pass over the photos that are still missing
TRIES = 3                       # passes in which the servers answer
DEADLINE = 60                   # seconds for one photo, so that no trickle holds a connection
LONGEST_WAIT = 600              # seconds; a server that asks for a longer wait is not waited for


class NoPhoto(UserError):
    """Why a URL gave no photo.  again: the same request may do better later; after: seconds to wait first."""

    def __init__(self, why, again=False, after=0):
        super().__init__(why)
        self.again = again
        self.after = after


@dataclass
class State:
    """What all threads know of the servers."""

    good: str = ""              # the URL of a photo that came
    failures: int = 0           # in a row
    broken: str = ""            # why nothing more is asked in this pass over the photos
    wait: float = 0             # seconds that a server asked to be left alone


# ---------------------------------------------------------------------------------------- one photo


def check_url(url):
    if not url.lower().startswith(("http:", "https:")):
        raise NoPhoto(f"not an http(s) URL: {url}")


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(self, request, file, code, message, headers, url):
        file.close()                                    # urllib would read its body, however long that is
        check_url(url)
        return super().redirect_request(request, file, code, message, headers, url)


@cache                                                  # reading the certificates takes longer than a photo
def opener():
    director = urllib.request.build_opener(Redirects)
    director.addheaders = [("User-Agent", "EIVEN data set builder (research)")]
    return director


def request(url, timeout):
    """The bytes behind a URL.  timeout: seconds without a sign of life"""
    check_url(url)
    deadline = time.monotonic() + DEADLINE
    content = bytearray()
    with opener().open(url, timeout=timeout) as answer:
        while piece := answer.read1(65536):
            content += piece
            if len(content) + (answer.length or 0) > MOST_BYTES:
                raise NoPhoto(f"more than {MOST_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done in {DEADLINE:g} s")
    return content


def fetch(url, timeout):
    """The bytes of the photo behind a URL; NoPhoto, whatever goes wrong."""
    try:
        content = request(url, timeout)
        with open_picture(io.BytesIO(content)) as picture:
            picture.load()
        if min(picture.size) < LEAST_SIDE:
            raise NoPhoto(f"a picture of {picture.width} x {picture.height} pixels")
        return content
    except NoPhoto:
        raise
    except HTTPError as error:
        error.close()
        seconds = re.fullmatch("[0-9]{1,9}", error.headers.get("Retry-After", ""))
        after = int(seconds[0]) if seconds else 0
        raise NoPhoto(f"HTTP {error.code}", error.code in RETRIED, after) from None
    except Exception as error:                          # no connection, no picture, blanks in a URL, nonsense
        # A ValueError is about the URL or the size of a picture, which will not change.
        raise NoPhoto(reason(error), again=not isinstance(error, ValueError)) from None


# ---------------------------------------------------------------------------------------- many photos


def first_photo(urls, path, state, timeout):
    """Write to `path` the first photo that one of `urls` gives.  None, or (the last URL asked, why not,
    whether another pass may do better).

    What a URL may give later is not replaced by the photo of the next URL.
    """
    failure = "", "no URL", False
    for url in urls:
        if state.broken:
            return url, f"not asked ({state.broken})", True
        try:
            content = fetch(url, timeout)
        except NoPhoto as error:
            failure = url, str(error), error.again
            if error.again:
                state.failures += 1
                state.wait = max(state.wait, error.after)
                if error.after or state.failures >= FAILURES and not answers(state, timeout):
                    state.broken = f"{url}: {error}"
                break
        else:
            with whole_file(path) as partial:
                partial.write_bytes(content)
            state.failures = 0
            state.good = url
            return None
    return failure


def answers(state, timeout):
    """Whether a photo that came before comes again, or the answer that it is gone."""
    if not state.good:
        return False
    try:
        fetch(state.good, timeout)
    except NoPhoto as error:
        if error.again:
            return False
    state.failures = 0
    return True


def download(wanted, folder, connections=8, timeout=20):
    """Fetch the photos that `folder` does not have yet; returns {name: what `first_photo` says} of those
    that it still lacks.

    wanted       {name: urls}, best URL first; a name is a plain file name (here an ASIN)
    connections  how many photos are fetched at once, at most
    timeout      seconds without a sign of life from a server
    Errors       UserError where the web does not answer any more
    """
    folder.mkdir(parents=True, exist_ok=True)
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
            outcomes = pool.map(lambda name: first_photo(wanted[name], paths[name], state, timeout), todo)
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
