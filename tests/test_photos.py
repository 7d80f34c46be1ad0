"""The photos of the data sets: downloaded from bad servers, written into a build, with kills on the way."""

import http.server
import threading
import time

import mave
import pytest
from conftest import command, ends_at, jpeg
from test_dataset import contents, rows

from base.console import UserError
from base.tsv import read_tsv
from dataset import photos
from dataset.__main__ import main

GOOD = jpeg()
OK = 200, {}, [GOOD]
BUSY = 503, {}, []
GONE = 404, {}, []


class Site(http.server.ThreadingHTTPServer):
    """A server on a free port until the block ends.

    reply  of a path: (status, {header: value}, pieces of the body); a number among the pieces is a pause in
           seconds, and without a status the pieces are all that is sent
    asked  [(time, path)] of all requests
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 99

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def photos(self, numbers):
        """{name: [URL]} to be downloaded."""
        return {f"P{n:04}": [f"{self.url}/{n}"] for n in numbers}

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *what):
        pass

    def do_GET(self):
        self.server.asked.append((time.monotonic(), self.path))
        status, headers, pieces = self.server.reply(self.path)
        try:
            if status:
                self.send_response(status)
                for header in headers.items():
                    self.send_header(*header)
                self.end_headers()
            for piece in pieces:
                if isinstance(piece, bytes):
                    self.wfile.write(piece)
                else:
                    time.sleep(piece)
        except OSError:
            pass                                        # the other side has had enough


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits of less than a second in all."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(photos, "PAUSES", [pause / 1000 for pause in photos.PAUSES])


NOWHERE = "http://127.0.0.1:1/x"
BAD = {"404": GONE, "500": (500, {}, []), "html": (200, {}, [b"<html>"]),
       "file": (302, {"Location": "file:///etc/passwd"}, []), "loop": (302, {"Location": "/loop"}, []),
       "cut": (200, {"Content-Length": "5000"}, [GOOD[:500]]), "half": (200, {}, [GOOD[:len(GOOD) // 2]]),
       "pixel": (200, {}, [jpeg((1, 1), "GIF")]), "big": (200, {"Content-Length": "200000000"}, [b"x"]),
       "endless": (200, {}, [bytes(100_000)] * 2000), "slow": (None, {}, [3, GOOD]),
       "trickle": (200, {}, [b"x", 0.2] * 30)}
BAD_URLS = [NOWHERE, "file:///etc/passwd", "http://[broken/x", "http://", "http://a b\r\nX: y/", "http://é/é"]
SAYS = {"404": "HTTP 404", "file": "HTTP 302", "url1": "not an http(s) URL", "url0": "refused",
        "pixel": "a picture of 1 x 1 pixels", "big": "more than 10,000,000 bytes", "slow": "timed out",
        "endless": "more than 10,000,000 bytes", "trickle": "not done in 1.2 s"}
FINE = {"good": OK, "png": (200, {}, [jpeg(kind="PNG")]),
        "endless-redirect": (302, {"Location": "/good"}, [bytes(100_000)] * 2000)}


def test_a_server_that_misbehaves(tmp_path, monkeypatch):
    """What is bad is listed with its reason, what is bad once comes, and nothing else is written."""
    monkeypatch.setattr(photos, "DEADLINE", 1.2)
    monkeypatch.setattr(photos, "TIMEOUT", 1)
    replies = FINE | BAD

    def reply(path):
        name = path[1:]
        if name.endswith("-once"):
            again = sum(asked == path for _, asked in site.asked) > 1
            return OK if again else replies[name.removesuffix("-once")]
        return replies[name]

    with Site(reply) as site:
        good = {name: [f"{site.url}/{name}"] for name in (*FINE, "500-once", "cut-once", "html-once")}
        good["second"] = [f"{site.url}/404", f"{site.url}/good"]
        bad = {name: [f"{site.url}/{name}"] for name in BAD}
        bad |= {f"url{n}": [url] for n, url in enumerate(BAD_URLS)} | {"none": []}
        assert photos.download({"good": good["good"]}, tmp_path / "images") == {}   # so it is known to work
        failed = photos.download(good | bad, tmp_path / "images")
        asked = [path for _, path in site.asked]
        assert photos.download(good, tmp_path / "images") == {} and len(site.asked) == len(asked)
    assert failed.keys() == bad.keys()
    for name, says in SAYS.items():
        assert says in str(failed[name]), failed[name]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {f"images/{name}.jpg" for name in good}     # nothing else, nowhere else, nothing half
    assert (tmp_path / "images/500-once.jpg").read_bytes() == GOOD
    assert asked.count("/404") == 2 < asked.count("/500")       # what will not change is not asked again


@pytest.mark.parametrize("back", [True, False])
def test_a_server_that_stops_answering(back, tmp_path):
    """Away after 100 and after 200 requests, with every fifth photo gone for good and one that always fails.
    If it comes back once it is left alone for 0.2 s, nothing is lost.  If not, the download stops soon, and
    the next start has the rest.
    """
    away = []

    def reply(path):
        (before, _), (now, _) = site.asked[-2:] if site.asked[1:] else site.asked * 2
        if len(site.asked) in (100, 200):
            away.append(now)
        elif back and now - before > 0.2:
            away.clear()
        if away or path == "/7":
            return 200, {}, [b"<html>"]
        return OK if int(path[1:]) % 5 else GONE

    with Site(reply) as site:
        wanted = site.photos(range(400))
        if not back:
            with pytest.raises(UserError, match=r"does not answer \(.*Start the same command again"):
                photos.download(wanted, tmp_path, connections=4)
            assert len(site.asked) < 200 and 60 < len(list(tmp_path.iterdir())) < 100
            away.clear()
            site.asked += [(0, "")] * 1000
        failed = photos.download(wanted, tmp_path, connections=4)
        assert failed.keys() == {"P0007", *site.photos(range(0, 400, 5))}
        # The rest alone: that it fails is no sign of a server that is down.
        assert photos.download(wanted, tmp_path, connections=4).keys() == failed.keys()


def test_a_server_that_never_answers(tmp_path):
    """It is not asked for every photo, and the download fails.  Beside a server that answers, its photos are
    listed.
    """
    with Site(lambda path: BUSY) as site:
        with pytest.raises(UserError, match=r"500 of 500 photos are missing, .*HTTP 503"):
            photos.download(site.photos(range(500)), tmp_path)
        assert len(site.asked) < 50
    with Site(lambda path: OK) as site:
        wanted = site.photos(range(100))
        lost = {f"P0050{n}": [NOWHERE] for n in range(20)}
        assert photos.download(wanted | lost, tmp_path).keys() == lost.keys()


def test_a_wait_that_the_server_asks_for_holds_for_all(tmp_path):
    """Once told to wait, no thread asks before the time, and no more than 4 at once ask; hours are not waited
    for.
    """
    at_once = threading.Semaphore(4)
    told = []

    def reply(path):
        assert at_once.acquire(blocking=False)
        time.sleep(0.01)
        at_once.release()
        if path != "/0" or told:
            return OK
        told.append(time.monotonic())
        return 429, {"Retry-After": "1"}, []

    with Site(reply) as site:
        assert photos.download(site.photos(range(30)), tmp_path, connections=4) == {}
        assert not any(0.1 < moment - told[0] < 0.9 for moment, _ in site.asked)
    with Site(lambda path: (429, {"Retry-After": "7200"}, [])) as site:
        with pytest.raises(UserError, match="HTTP 429"):
            photos.download(site.photos(range(40)), tmp_path / "other")


def build_flags(labels, metadata, root):
    return ["build", "--labels", str(labels), "--metadata", str(metadata), "--data", str(root),
            "--more-than", "2", "--at-most", "10", "--dataset", "clothing"]


def test_a_build_with_photos(tmp_path):
    """A server that loses some photos: those products are dropped and listed.  One that goes: no split is
    written.
    """
    with Site(lambda path: BUSY) as site:
        flags = build_flags(*mave.make(tmp_path, 1500, site.url), tmp_path)
        with pytest.raises(UserError, match="does not answer"):
            main(flags)
        assert not (tmp_path / "clothing").exists() and not (tmp_path / "failed.tsv").exists()
        site.reply = lambda path: GONE if path.endswith(("0.jpg", "5.jpg")) else OK
        main(flags)
    ids = {row[0] for part in ("train", "val", "test") for row in rows(tmp_path / "clothing" / f"{part}.tsv")}
    lost = {row["id"]: row["reason"] for _, row in read_tsv(tmp_path / "failed.tsv", required=())}
    assert set(lost.values()) == {"HTTP 404"} and all(asin[-1] in "05" for asin in lost)
    assert {path.stem for path in (tmp_path / "images").iterdir()} == ids and len(ids) > 50


def test_killed_again_and_again_it_gives_the_same_bytes(tmp_path):
    """Killed when the sources are read, and while photos come; each photo has bytes of its own."""
    with Site(lambda path: (200, {}, [GOOD, path.encode()])) as site:
        sources = mave.make(tmp_path, 1500, site.url)
        whole = command("-m dataset", build_flags(*sources, tmp_path / "whole"), tmp_path)
        assert whole.code == 0, whole.err
        killed = build_flags(*sources, tmp_path / "killed")
        for n in (1, 2, 20, 50, 200):
            assert command("-m dataset", killed, tmp_path, before=ends_at(n)).signal
        done = command("-m dataset", killed, tmp_path)
        assert done.code == 0, done.err
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
