"""Product photos: fetched politely from the web, checked to be photos, and never half written.

Photos that are gone are left out.  A network that is gone is waited for: a data set without half of its photos is another one.

Section 3 of the paper takes the photos of Amazon Reviews 2018 by their URLs.  Whatever a URL or a server does, the
only thing this module writes is FOLDER/ID.jpg, and only after the bytes have been decoded as a picture.
"""

import contextlib
import email.utils
import http.client
import io
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from PIL import Image

from base.console import Progress, UserError, duration, whole_file
from base.photo import on_white, open_picture, upright

MOST_BYTES = 10_000_000         # of one photo's file; Amazon's largest are about 2 MB
MOST_PIXELS = 16_000_000        # of one photo; Amazon's largest have 7 million.  Only one is decoded at a time
LEAST_SIDE = 10                 # pixels; a removed photo is often answered with a picture of 1 x 1
RETRIED = {403, 407, 408, 425, 429, 500, 502, 503, 504}        # HTTP answers that may be better next time
PAUSES = 10, 20, 40, 80, 160, 320       # seconds before a server that has stopped answering is asked again
LONGEST_WAIT = 600              # seconds; a server that asks for a longer wait is given up for this start
MOST_LOST = 0.05                # of all photos, on servers that never answered
ENOUGH_FAILURES = 50            # with no photo before: the network is down, and waiting for 70,000 more would not help
_decoding = threading.Lock()


class NoPhoto(Exception):
    """Why a URL gave no photo.  again: whether the same request may do better later; after: seconds to wait first."""

    def __init__(self, reason, again=False, after=0):
        super().__init__(reason)
        self.again, self.after = again, after


def what_is(head):
    """What a file is by its first bytes, for an error message about one that should be a photo."""
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the photo itself (git lfs pull fetches it)"
    if head.startswith(b"\0\5\x16\7"):
        return "a macOS '._' file, not a photo"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a photo"
    return f"no picture: it begins with {head[:16]!r}"


def checked(file):
    """The open picture in `file` (a path or a binary file); raises NoPhoto if it is none.  Reads the header alone."""
    try:
        picture = open_picture(file)
    except Image.DecompressionBombError as error:
        raise NoPhoto(f"a picture that is too large: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:         # Pillow's words for "no picture" are all three
        if getattr(error, "errno", None):
            raise NoPhoto(error.strerror) from None
        with contextlib.nullcontext(file) if hasattr(file, "seek") else open(file, "rb") as opened:
            opened.seek(0)
            said = what_is(opened.read(64))
        # of a hotel's network or of a check for robots, perhaps; then every photo is one
        raise NoPhoto(said, again=said.startswith("a web page")) from None
    width, height = picture.size
    if min(width, height) < LEAST_SIDE or width * height > MOST_PIXELS:
        picture.close()
        raise NoPhoto(f"a picture of {width} x {height} pixels")
    return picture


def as_jpeg(content):
    """`content` (bytes) as the bytes of a JPEG file; raises NoPhoto unless all of it decodes as a picture."""
    with _decoding, checked(io.BytesIO(content)) as picture:
        jpeg = picture.format == "JPEG"
        if jpeg:
            picture.draft("RGB", (224, 224))    # the whole file is read, yet far fewer pixels are computed
        try:
            picture.load()
            if jpeg:
                return content
            picture = on_white(upright(picture))        # what is see-through becomes white, as in a shop
        except Exception as error:              # a decoder meets bytes from anywhere: any failure means one thing
            raise NoPhoto(f"a broken picture ({error})", again=True) from None
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        return file.getvalue()


class _WithinHttp(urllib.request.HTTPRedirectHandler):
    """Follows redirects within http(s), up to https but never down from it; any other one is refused."""

    def http_error_302(self, request, file, code, message, headers):
        file.close()                            # urllib would read its body, however long that is
        target = urljoin(request.full_url, headers.get("location") or headers.get("uri") or "file:")
        old, new = urlsplit(request.full_url).scheme, urlsplit(target).scheme
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise NoPhoto(f"redirected from {old} to {new}, which is not followed")
        return super().http_error_302(request, io.BytesIO(), code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@cache
def _tls():                                     # reading the system's certificates takes longer than a photo
    return ssl.create_default_context()


def _opener(opened):
    """A urllib opener for http(s) alone - none for file:, ftp: or data: - whose connections and sockets join `opened`."""

    def noted(kind):
        class Connection(kind):
            def connect(self):
                opened.append(self)             # its .sock while the TLS handshake and the headers last
                super().connect()
                opened.append(self.sock)        # once the body comes, the connection itself has let go of it
        return Connection

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(noted(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(noted(http.client.HTTPSConnection), request, context=self._context)

    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), Http(), Https(context=_tls()), _WithinHttp(),
                    urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "EIVEN data set builder (research)"), ("Accept", "image/*")]
    return opener


def _cut(opened):
    """Shut every socket down: reading and writing there ends at once, in whatever thread."""
    for each in list(opened):
        sock = getattr(each, "sock", each)
        try:
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass                                # closed already


def fetch(url, timeout=20, deadline=60, most_bytes=MOST_BYTES):
    """The bytes behind an http(s) URL; raises NoPhoto, whatever goes wrong.

    timeout: seconds without a sign of life; deadline: seconds for everything, so that no trickle - of the body, or of
    headers that never end - holds a connection.
    """
    opened = []
    end = time.monotonic() + deadline
    alarm = threading.Timer(deadline, _cut, [opened])
    alarm.daemon = True
    alarm.start()
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            raise NoPhoto("not an http(s) URL")
        with _opener(opened).open(url, timeout=timeout) as answer:
            length = answer.headers.get("Content-Length") or ""
            length = int(length) if plain_number(length) else None
            if length is not None and length > most_bytes:
                raise NoPhoto(f"{length:,} bytes, more than {most_bytes:,}")
            content = bytearray()
            while piece := answer.read1(65536):
                content += piece
                if len(content) > most_bytes:
                    raise NoPhoto(f"more than {most_bytes:,} bytes")
            if time.monotonic() > end:
                raise NoPhoto(f"not done in {deadline:g} s", again=True)
            if length is not None and len(content) < length:
                raise NoPhoto(f"ended after {len(content):,} of {length:,} bytes", again=True)
            return bytes(content)
    except urllib.error.HTTPError as error:
        error.close()
        raise NoPhoto(f"HTTP {error.code}", again=error.code in RETRIED,
                      after=retry_after(error.headers.get("Retry-After") or "")) from None
    except (OSError, http.client.HTTPException, ValueError) as error:      # URLError, time-outs, TLS, blanks in a URL
        cause = getattr(error, "reason", error)
        if time.monotonic() > end:
            raise NoPhoto(f"not done in {deadline:g} s", again=True) from None
        if isinstance(cause, TimeoutError):
            raise NoPhoto(f"no answer for {timeout:g} s", again=True) from None
        never = isinstance(error, (ValueError, http.client.InvalidURL))
        raise NoPhoto(" ".join(str(cause).split()) or type(cause).__name__, again=not never) from None
    finally:
        alarm.cancel()


def plain_number(text):
    """Whether a header holds a number that int() reads: not "²", and no thousand digits."""
    return text.isascii() and text.isdigit() and len(text) < 16


def retry_after(text):
    """The seconds that a Retry-After header asks to wait: a number, or the time until a date; 0 for anything else."""
    if plain_number(text):
        return int(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0


class Host:
    """What all threads know of one server.  Times are those of time.monotonic()."""

    def __init__(self, name):
        self.name = name
        self.good = deque(maxlen=5)             # URLs that gave a photo last, in this start or an earlier one
        self.alive = -1.0                       # when the latest request began that it answered, be it that there is no photo
        self.failures = 0                       # photos that failed although they were tried again
        self.early = set()                      # names of those that failed so before it gave any photo
        self.not_before = 0.0                   # until when it has asked not to be asked
        self.gone = None                        # why it is given up
        self.note = None                        # what it is waited for
        self.checking = threading.Lock()

    def wait(self, stop):
        while not stop.is_set() and (left := self.not_before - time.monotonic()) > 0:
            stop.wait(left)

    def failed(self, error, began):
        """Note that the request that began then has failed.  A wait that the server asks for holds for all threads."""
        self.not_before = max(self.not_before, time.monotonic() + min(error.after, LONGEST_WAIT))
        if error.after > LONGEST_WAIT:
            self.gone = f"{error}: it asks to wait {duration(error.after)}"
        if not error.again:
            self.alive = max(self.alive, began)

    def was_down(self, failed, timeout, deadline, stop):
        """Whether the server, not the photo, was the reason for a failure.  Returns when it answers again or is given up.

        It is asked for photos that it gave before: at once, then after longer and longer pauses, by one thread alone.
        failed  when the failure came; an answer to a request that began later says that the server is fine
        """
        with self.checking:
            for n, pause in enumerate((0, *PAUSES)):
                if self.alive > failed or not self.good or self.gone or stop.is_set():
                    return False
                if pause:
                    self.note = f"{self.name} does not answer, asked again in {duration(pause)}"
                    stop.wait(pause)
                    self.wait(stop)
                began = time.monotonic()
                try:
                    as_jpeg(fetch(self.good[n % len(self.good)], timeout, deadline))
                except NoPhoto as error:
                    reason = error
                    self.failed(error, began)
                    if error.again:
                        continue
                self.alive, self.note = max(self.alive, began), None
                return pause > 0
            self.gone = self.gone or f"{reason}; asked again for {duration(sum(PAUSES))}"
            return False


def host_name(url):
    try:
        return urlsplit(url).netloc
    except ValueError:                          # a broken URL, which is never asked for
        return ""


def from_url(url, host, timeout, deadline, tries, pause, stop):
    """The photo at `url` as the bytes of a JPEG file; NoPhoto when it has failed `tries` times while its server answers.

    Before and after the last try the server is checked; if it was down, the tries are counted anew.
    """
    attempt = 1
    while True:
        host.wait(stop)
        if host.gone:
            raise NoPhoto(f"{host.name} does not answer ({host.gone})")
        if stop.is_set():
            raise NoPhoto("interrupted")
        began = time.monotonic()
        try:
            content = as_jpeg(fetch(url, timeout, deadline))
            host.good.append(url)
            host.alive = max(host.alive, began)
            return content
        except NoPhoto as error:
            host.failed(error, began)
            failed, again, last = time.monotonic(), error.again, attempt == tries
            if not again or last and not host.was_down(failed, timeout, deadline, stop):
                host.failures += again
                if host.failures >= 3 and host.alive < 0 and not host.good:
                    host.gone = host.gone or str(error)         # it has never answered: no reason to wait for it
                raise NoPhoto(str(error) + (f" ({attempt} times)" if attempt > 1 else ""), again) from None
            if not last:
                stop.wait(max(min(error.after, LONGEST_WAIT), pause * 2 ** (attempt - 1)))  # 1 s, 2 s, ...: it is busy
        attempt = 1 if last else attempt + 1
        if 1 < attempt == tries and host.was_down(failed, timeout, deadline, stop):
            attempt = 1


def one_photo(name, urls, folder, timeout, deadline, tries, pause, stop, hosts):
    """Write FOLDER/NAME.jpg from the first of `urls` that gives a photo; returns [(url, reason)] if none does, else [].

    hosts  {host name: Host} of all URLs
    """
    failures = []
    for url in urls:
        host = hosts[host_name(url)]
        try:
            content = from_url(url, host, timeout, deadline, tries, pause, stop)
        except NoPhoto as error:
            if error.again and not host.good:
                host.early.add(name)
            failures.append((url, str(error)))
            continue
        with whole_file(folder / f"{name}.jpg") as partial:
            partial.write_bytes(content)
        return []
    return failures or [("", "no http(s) URL")]


def have_photo(path):
    """Whether a photo lies at `path`: its header is that of a picture of a sensible size."""
    try:
        checked(path).close()
        return True
    except NoPhoto:
        return False


def download(wanted, folder, connections=8, timeout=20, deadline=60, tries=3, pause=1.0):
    """Fetch the photos that `folder` does not have yet; returns {name: [(url, reason), ...]} of those it still lacks.

    wanted       {name: urls}, best URL first; a name is a plain file name (here an ASIN)
    connections  how many photos are fetched at once, at most
    timeout, deadline, pause   seconds: without a byte; for one URL; before the first retry (doubled each time)
    tries        how often a URL is asked while its answer may improve (busy, timed out, cut short)
    Raises UserError where the first 50 of this start (or all) fail, unless it goes on from another and servers answer; where
    a server that gave photos stops answering for 10 minutes; and where more than 5 % are on servers that never answer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for litter in folder.glob(".*.jpg.*.partial"):      # of a start that was killed
        litter.unlink(missing_ok=True)
    for name in wanted:
        if name != os.path.basename(name) or name.startswith("."):
            raise ValueError(f"{name!r} is no plain file name")
    hosts = {name: Host(name) for name in {host_name(url) for urls in wanted.values() for url in urls}}
    todo = []
    for name in sorted(wanted):
        if not have_photo(folder / f"{name}.jpg"):
            todo.append(name)
        elif wanted[name]:
            hosts[host_name(wanted[name][0])].good.append(wanted[name][0])
    failed, tried, answered, stop = {}, 0, False, threading.Event()
    how_to_go_on = "No split was written. Start the same command again to go on from here, or build with --no-photos."
    with Progress("photos", total=len(wanted), unit="photos", done=len(wanted) - len(todo)) as progress, \
            ThreadPoolExecutor(connections) as pool:
        try:
            running, todo = {}, iter(todo)
            while True:
                for name in todo:
                    job = pool.submit(one_photo, name, wanted[name], folder, timeout, deadline, tries, pause, stop, hosts)
                    running[job] = name
                    if len(running) >= 2 * connections:
                        break
                early = {name for host in hosts.values() if host.good for name in host.early} & failed.keys()
                if not running and early:               # there was nothing to check their server with: now there is
                    for host in hosts.values():
                        host.early -= early
                    failed = {name: failures for name, failures in failed.items() if name not in early}
                    progress.done -= len(early)
                    todo = iter(sorted(early))
                    continue
                if not running:
                    gone = [host for host in hosts.values() if host.gone]
                    lost = [name for name in failed if any(hosts[host_name(url)] in gone for url in wanted[name])]
                    if len(lost) > MOST_LOST * len(wanted):
                        raise UserError(f"{len(lost):,} of {len(wanted):,} photos are on servers that do not answer: "
                                        + ", ".join(f"{host.name} ({host.gone})" for host in gone) + f". {how_to_go_on}")
                    return failed
                done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for job in done:
                    name = running.pop(job)
                    tried += 1
                    if failures := job.result():
                        failed[name] = failures
                        answered |= any(reason.startswith("HTTP ") for _, reason in failures)
                notes = [host.note for host in hosts.values() if host.note]
                progress.step(len(done), ", ".join([*notes, f"{len(failed):,} failed"]) if failed or notes else "")
                # A later start tries what failed before: there many failures are natural, but some server answers.
                if tried == len(failed) >= min(ENOUGH_FAILURES, len(wanted)) and not (answered and progress.done > tried):
                    name, ((url, reason), *_) = next(iter(failed.items()))
                    raise UserError(f"the first {len(failed):,} photos all failed, {name} with {reason!r} at "
                                    f"{url or 'no URL'}. Is this machine online? Start again to go on, or build "
                                    "with --no-photos.")
                for host in hosts.values():
                    if host.gone and host.good:         # it gave photos: what is missing now is not gone for good
                        raise UserError(f"{host.name} has stopped answering ({host.gone}) after {progress.done - len(failed):,} "
                                        f"of {len(wanted):,} photos. {how_to_go_on}")
        finally:
            stop.set()                          # on Ctrl-C: no new tries, so that the threads end soon
