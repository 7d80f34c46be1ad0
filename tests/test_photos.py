"""The photos of the data sets: checked, downloaded from bad servers, written into a build, with kills on the way."""


import contextlib
import csv
import email.utils
import http.server
import io
import math
import os
import random
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import types
import zlib
from collections import Counter
from datetime import UTC, datetime, timedelta

import conftest
import numpy as np
import pytest
from conftest import GOOD, contents, jpeg
from PIL import Image

from base.console import UserError
from dataset import build, photos, stats
from experiments import make_mave

ROUGH = dict(timeout=0.4, deadline=1.2, tries=2, pause=0.01)        # seconds: impatient, for tests


PNG = jpeg(kind="PNG", mode="LA")
BOMB = b"IHDR" + struct.pack(">IIBBBBB", 65536, 65536, 8, 2, 0, 0, 0)      # a PNG of 4 gigapixels, in 45 bytes
BOMB = (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + BOMB + struct.pack(">I", zlib.crc32(BOMB))
        + struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT")))
asked = Counter()


class BadServer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *what):
        pass

    def do_GET(self):
        asked[self.path] += 1
        try:
            self.answer(self.path.strip("/").split("/")[0])
        except OSError:
            pass                                        # the other side has had enough

    def send(self, code, body=b"", kind="image/jpeg", length=None, **headers):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body) if length is None else length),
                            **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer(self, what):
        first = asked[self.path] == 1
        if what == "good":
            self.send(200, GOOD)
        elif what == "png":
            self.send(200, PNG)
        elif what == "busy-once":
            self.send(*((503,) if first else (200, GOOD)))
        elif what == "cut-once":
            self.send(200, GOOD[:500] if first else GOOD, length=len(GOOD))
        elif what.isdigit():
            self.send(int(what))
        elif what == "to":
            self.send(302, Location={"file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/x.jpg", "data": "data:,x",
                                     "good": "/good/redirected", "loop": self.path}[self.path.split("/")[2]])
        elif what == "cut":
            self.send(200, GOOD[:500], length=len(GOOD))
        elif what == "half":
            self.send(200, GOOD[:len(GOOD) // 2])
        elif what == "html":
            self.send(200, b"<html>Robot check</html>")
        elif what == "empty":
            self.send(200)
        elif what == "pixel":
            self.send(200, jpeg((1, 1), "GIF", "P"))
        elif what == "bomb":
            self.send(200, BOMB)
        elif what == "big":
            self.send(200, b"x", length=200_000_000)
        elif what == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(2000):
                self.wfile.write(bytes(100_000))        # 200 MB, unannounced
        elif what == "slow":
            time.sleep(1)
            self.send(200, GOOD)
        elif what == "trickle":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                time.sleep(0.2)
        elif what == "headers":
            for _ in range(30):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                time.sleep(0.2)
        elif what == "nonsense":
            self.wfile.write(b"\0\1\2 not http\r\n\r\n")


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


BAD = {"404": "HTTP 404", "500": "HTTP 500 (2 times)", "to/file": "redirected from http to file",
       "to/ftp": "redirected from http to ftp", "to/data": "redirected from http to data", "to/loop": "HTTP 302",
       "cut": "ended after 500 of", "half": "a broken picture", "html": "a web page, not a photo",
       "empty": "an empty file", "pixel": "a picture of 1 x 1 pixels", "bomb": "pixels", "big": "200,000,000 bytes",
       "endless": "more than 10,000,000 bytes", "slow": "no answer for 0.4 s (2 times)", "trickle": "not done in 1.2 s",
       "headers": "not done in 1.2 s", "nonsense": ""}


def test_a_server_that_misbehaves(server, tmp_path):
    wanted = {"GOOD000000": [f"{server}/good/0"]}               # there from an earlier start: this server is known to work
    assert photos.download(wanted, tmp_path / "images", **ROUGH) == {}
    asked.clear()
    wanted |= {f"BAD{n:07}": [f"{server}/{path}"] for n, path in enumerate(BAD)}
    wanted |= {"GOOD000001": [f"{server}/good/1"], "GOOD000002": [f"{server}/busy-once"], "GOOD000003": [f"{server}/cut-once"],
               "GOOD000004": [f"{server}/to/good"], "GOOD000005": [f"{server}/404/5", f"{server}/good/5"],
               "GOOD000006": [f"{server}/png"]}
    wanted |= {"EVIL000001": ["file:///etc/passwd"], "EVIL000002": ["ftp://127.0.0.1/x"], "EVIL000003": [],
               "EVIL000004": ["http://[broken/x"], "EVIL000005": ["http://127.0.0.1:1/x"], "EVIL000006": [f"{server}/a b\r\nX: y"],
               "EVIL000007": ["http://"], "EVIL000008": [f"{server}/é"]}
    start = time.monotonic()
    failed = photos.download(wanted, tmp_path / "images", connections=8, **ROUGH)
    assert time.monotonic() - start < 20
    assert sorted(failed) == sorted(name for name in wanted if not name.startswith("GOOD"))
    for name, says in zip(sorted(name for name in wanted if name.startswith("BAD")), BAD.values()):
        (url, reason), = failed[name]
        assert url == wanted[name][0] and says in reason, (url, reason)
    assert failed["EVIL000001"] == [("file:///etc/passwd", "not an http(s) URL")]
    assert failed["EVIL000003"] == [("", "no http(s) URL")]
    there = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert there == [f"images/GOOD{n:06}.jpg" for n in range(7)]            # nothing else, nowhere else, nothing half
    assert (tmp_path / "images/GOOD000002.jpg").read_bytes() == GOOD
    with Image.open(tmp_path / "images/GOOD000006.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (60, 40)
    assert asked["/404"] == 1 and 1 <= asked["/500"] <= 2           # what will not change is not asked again; a busy machine may time out
    asked.clear()
    again = photos.download({name: urls for name, urls in wanted.items() if name.startswith("GOOD")},
                            tmp_path / "images", **ROUGH)
    assert again == {} and not asked                                        # what is there is not fetched again


def test_concurrency_is_bounded_and_other_names_are_refused(server, tmp_path, monkeypatch):
    now, most, lock = [0], [0], threading.Lock()

    def fetch(url, *_):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    assert photos.download({f"P{n}": ["http://x/"] for n in range(60)}, tmp_path, connections=4) == {}
    assert most[0] <= 4 and len(list(tmp_path.iterdir())) == 60
    for name in ("../x", "a/b", ".x"):
        with pytest.raises(ValueError, match="plain file name"):
            photos.download({name: ["http://x/"]}, tmp_path)


def test_without_a_network_it_ends_soon(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(photos, "fetch", lambda url, *_: asked.append(url) or (_ for _ in ()).throw(photos.NoPhoto("no route")))
    with pytest.raises(UserError, match="the first [5-9][0-9] photos all failed, P.* with 'no route' at http"):
        photos.download({f"P{n}": ["http://x/"] for n in range(9000)}, tmp_path)
    assert len(asked) < 200
    (tmp_path / "P0.jpg").write_bytes(GOOD)             # a later start
    with pytest.raises(UserError, match="photos all failed"):
        photos.download({f"P{n}": ["http://x/"] for n in range(9000)}, tmp_path)
    monkeypatch.setattr(photos, "fetch", lambda url, *_: (_ for _ in ()).throw(photos.NoPhoto("HTTP 404")))
    assert len(photos.download({f"P{n}": ["http://x/"] for n in range(200)}, tmp_path)) == 199      # gone, but the server answers


@pytest.fixture
def patient(monkeypatch):
    """Pauses of less than a second in all."""
    monkeypatch.setattr(photos, "PAUSES", (0.02, 0.04, 0.08, 0.16))
    return dict(tries=3, pause=0.005)


OUTAGES = [photos.NoPhoto("[Errno 111] Connection refused", again=True), photos.NoPhoto("no answer for 20 s", again=True),
           photos.NoPhoto("[Errno 101] Network is unreachable", again=True), photos.NoPhoto("HTTP 503", again=True),
           photos.NoPhoto("HTTP 429", again=True), photos.NoPhoto("a web page, not a photo", again=True)]


@pytest.mark.parametrize("outage", OUTAGES, ids=str)
def test_a_server_that_stops_answering_stops_the_download(outage, patient, monkeypatch, tmp_path):
    """After 101 of 360 photos: it is asked a few times more, not 259 times, and the next start has all."""
    asked, down = Counter(), [True]

    def fetch(url, *_):
        asked[url] += 1
        if down[0] and len(asked) > 101:
            raise outage
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    wanted = {f"P{n:04}": [f"http://x/{n}"] for n in range(360)}
    with pytest.raises(UserError, match=r"x has stopped answering \(.*Start the same command again"):
        photos.download(wanted, tmp_path, **patient)
    there = len(list(tmp_path.iterdir()))
    assert 85 < there <= 110 and asked.total() < there + 60
    down[0] = False
    assert photos.download(wanted, tmp_path, **patient) == {} and len(list(tmp_path.iterdir())) == 360


@pytest.mark.parametrize("outage", OUTAGES, ids=str)
def test_a_server_that_comes_back_has_lost_nothing(outage, patient, monkeypatch, tmp_path):
    """Away for a while after 60 and after 200 requests, with every fifth photo gone for good and one that always fails."""
    lock, asked, back = threading.Lock(), [0], [0.0]

    def fetch(url, *_):
        n = int(url.rpartition("/")[2])
        with lock:
            asked[0] += 1
            if asked[0] in (60, 200):
                back[0] = time.monotonic() + 0.12
            if time.monotonic() < back[0]:
                raise outage
        if n % 5 == 0:
            raise photos.NoPhoto("HTTP 404")
        if n == 7:
            raise outage
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    failed = photos.download({f"P{n:04}": [f"http://x/{n}"] for n in range(500)}, tmp_path, connections=4, **patient)
    assert sorted(failed) == sorted({f"P{n:04}" for n in range(0, 500, 5)} | {"P0007"})
    assert asked[0] < 600


def test_a_server_that_is_away_before_it_gave_any_photo(patient, monkeypatch, tmp_path):
    """The first answer is that there is no photo; then it is away for the next ten, of which one never comes."""
    asked = []

    def fetch(url, *_):
        asked.append(url)
        if url.endswith("/0"):
            raise photos.NoPhoto("HTTP 404")
        if len(asked) < 30 or url.endswith("/5"):
            raise OUTAGES[0]
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    failed = photos.download({f"P{n:03}": [f"http://x/{n}"] for n in range(40)}, tmp_path, connections=1, **patient)
    assert sorted(failed) == ["P000", "P005"]


def test_another_server_that_never_answers(patient, monkeypatch, tmp_path):
    """A few photos on a dead server are listed; with many, the data set would be another one."""
    def fetch(url, *_):
        if "dead" in url:
            raise photos.NoPhoto("[Errno -2] Name or service not known", again=True)
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    wanted = {f"P{n:04}": [f"http://{'dead' if n % 50 == 1 else 'x'}/{n}"] for n in range(200)}
    failed = photos.download(wanted, tmp_path, **patient)
    assert len(failed) == 4 and any("dead does not answer" in reason for [(_, reason)] in failed.values())
    with pytest.raises(UserError, match="20 of 200 photos are on servers that do not answer: dead "):
        photos.download({f"Q{n:04}": [f"http://{'dead' if n % 10 == 1 else 'x'}/{n}"] for n in range(200)}, tmp_path, **patient)


def test_no_split_is_written_without_the_photos(made, server, patient, monkeypatch, tmp_path):
    labels, metadata = make_mave.make(tmp_path, 1500, 1500, photos=f"{server}/good")
    settings = dict(more_than=2, at_most=20, datasets=["clothing"], **patient)
    real_fetch, left = photos.fetch, [20]

    def fetch(*what):
        left[0] -= 1
        if left[0] < 0:
            raise photos.NoPhoto("[Errno 111] Connection refused", again=True)
        return real_fetch(*what)

    with monkeypatch.context() as patch:
        patch.setattr(photos, "fetch", fetch)
        with pytest.raises(UserError, match="has stopped answering"):
            build.build(labels, metadata, tmp_path / "root", **settings)
    assert not (tmp_path / "root/clothing").exists() and not (tmp_path / "root/failed.tsv").exists()
    build.build(labels, metadata, tmp_path / "root", **settings)
    build.build(labels, metadata, tmp_path / "whole", **settings)
    assert contents(tmp_path / "root") == contents(tmp_path / "whole")


def test_retry_after_is_a_number_or_a_date():
    assert [photos.retry_after(text) for text in ("", "7", "-7", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "²",
                                                         "Mon, 01 Jan 0001 00:00:00 +2359")] == [0, 7, 0, 0, 0, 0, 0]
    in_a_minute = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 58 <= photos.retry_after(in_a_minute) <= 60


def test_a_wait_that_the_server_asks_for_holds_for_all(monkeypatch, tmp_path):
    """Once told to wait, no thread asks before the time; a wait of hours is not waited for."""
    asked, start = [], time.monotonic()

    def fetch(url, *_):
        asked.append(time.monotonic() - start)
        if len(asked) == 1:
            raise photos.NoPhoto("HTTP 429", again=True, after=0.5)
        time.sleep(0.01)
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    assert photos.download({f"P{n}": [f"http://x/{n}"] for n in range(30)}, tmp_path, connections=4, pause=0.01) == {}
    assert sum(0.05 < when < 0.45 for when in asked) == 0 and len(asked) == 31
    monkeypatch.setattr(photos, "fetch", lambda *_: (_ for _ in ()).throw(photos.NoPhoto("HTTP 429", again=True, after=7200)))
    with pytest.raises(UserError, match="HTTP 429: it asks to wait 2 h 00 min"):
        photos.download({f"P{n}": [f"http://x/{n}"] for n in range(40)}, tmp_path, pause=0.01)


def test_numbers_in_headers():
    assert [photos.plain_number(x) for x in ("12", "", "²", "-1", "9" * 5000)] == [True, False, False, False, False]


def test_back_off_doubles_and_obeys_the_server(monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds: waits.append(seconds))
    monkeypatch.setattr(photos, "time", types.SimpleNamespace(monotonic=lambda: sum(waits)))
    monkeypatch.setattr(photos, "fetch", lambda *_: (_ for _ in ()).throw(photos.NoPhoto("busy", again=True, after=3)))
    photos.one_photo("X", ["http://x/"], tmp_path, 1, 1, 4, 1, threading.Event(), {"x": photos.Host("x")})
    assert waits == [3, 3, 4]


def test_a_build_with_photos(made, server, tmp_path, capsys):
    """Photos from a server that loses some: those products are dropped, counted and listed, and a new start finds them."""
    labels, metadata = make_mave.make(tmp_path, 1500, 1500, photos=f"{server}/good")
    lost = re.sub(rb"/good/(B0\w*[05]\.jpg|B0\w*[05]\._SS40_\.jpg)", rb"/404/\1", metadata.read_bytes())
    metadata.write_bytes(lost)
    settings = dict(more_than=2, at_most=20, datasets=["clothing"], pause=0.01)
    build.build(labels, metadata, tmp_path / "root", **settings)
    out = capsys.readouterr().out
    rows = [row for part in stats.SPLITS for row in stats.read_tsv(tmp_path / "root" / "clothing" / f"{part}.tsv")[0]]
    assert rows and all((tmp_path / "root" / "images" / row["images"]).read_bytes() == GOOD for row in rows)
    with open(tmp_path / "root" / "failed.tsv", newline="") as file:
        failed = list(csv.DictReader(file, dialect="excel-tab"))
    ids = {row["id"] for row in failed}
    assert ids and all(row["reason"] == "HTTP 404" and row["id"][-1] in "05" for row in failed)
    assert not ids & {row["id"] for row in rows}
    found = re.search(r"photos: ([\d,]+) of ([\d,]+) \([\d.]+ %\); ([\d,]+) products dropped", out)
    assert [int(n) for n in found.groups()] == [len(rows), len(rows) + len(ids), len(ids)]
    before = contents(tmp_path / "root")
    build.build(labels, metadata, tmp_path / "root", **settings)
    assert contents(tmp_path / "root") == before


def read_so_far(root):
    """How many of the two sources a build has read."""
    try:
        with contextlib.closing(sqlite3.connect(f"{(root / '.build/sources.sqlite').as_uri()}?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM pass WHERE done").fetchone()[0]
    except sqlite3.OperationalError:            # killed before there was a table
        return 0


def test_killed_at_random_moments_it_gives_the_same_bytes(server, tmp_path):
    """SIGKILL from the first import to the last photo.  More of it: KILLS=10 LINES=300000 in the environment."""
    lines, kills = (int(os.environ.get(name, n)) for name, n in (("LINES", 6000), ("KILLS", 3)))
    labels, metadata = make_mave.make(tmp_path, lines, lines, photos=f"{server}/good")

    def command(root):
        return [sys.executable, "-m", "dataset", "build", "--labels", labels, "--metadata", metadata,
                "--data", tmp_path / root, "--more-than", "5", "--at-most", "30", "--connections", "4"]

    start = time.monotonic()
    whole = subprocess.run(command("whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    needs, stages = time.monotonic() - start, Counter()
    for n in range(kills):
        build = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.05, 0.4) * needs)
        build.send_signal(signal.SIGKILL)
        assert build.wait() in (-signal.SIGKILL, 0)
        done = read_so_far(tmp_path / "killed")
        stages[("in the labels", "in the metadata", "after the sources")[done]] += 1
    done = subprocess.run(command("killed"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    print(f"{kills} kills {dict(stages)}; then {len(contents(tmp_path / 'whole')):,} files with the same bytes")


class OwnPhotos(http.server.BaseHTTPRequestHandler):
    """Gives each path a photo of its own, in a hundredth of a second."""

    def log_message(self, *what):
        pass

    def do_GET(self):
        self.server.asked += 1
        time.sleep(0.005)
        blocks = np.random.default_rng(zlib.crc32(self.path.encode())).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(blocks).resize((80, 60)).save(file, "JPEG")
        with contextlib.suppress(OSError):              # whoever asked was killed
            self.send_response(200)
            self.end_headers()
            self.wfile.write(file.getvalue())


@contextlib.contextmanager
def own_photos(port=0, gone_after=None, away=0):
    """The port of a server of OwnPhotos that ends with the block.  It goes once, after so many requests, for `away` seconds:
    connections are refused then."""
    over = threading.Event()

    def listen(port):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), OwnPhotos)
        server.daemon_threads, server.block_on_close, server.asked = True, False, 0
        return server

    def serve(server, most):
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        while not over.wait(0.02) and (most is None or server.asked < most):
            pass
        server.shutdown()
        server.server_close()

    def life(server):
        if gone_after is not None:
            serve(server, gone_after)
            over.wait(away)
            server = listen(port)
        serve(server, None)

    server = listen(port)
    port = server.server_port
    thread = threading.Thread(target=life, args=[server])
    thread.start()
    try:
        yield port
    finally:
        over.set()
        thread.join()


def test_killed_while_photos_come_and_the_server_goes(tmp_path):
    """Killed before, while and after the server is away, again and again: the same bytes as undisturbed.

    More of it: KILLS=10 AWAY=60 (seconds) in the environment.
    """
    kills, away = int(os.environ.get("KILLS", 3)), float(os.environ.get("AWAY", 1))
    images = tmp_path / "killed/images"

    def fetched():
        return len(list(images.glob("[!.]*.jpg")))

    def start(root, ends=None):
        """Run a build; ends: (photos, seconds) it kills itself so many seconds after it has so many photos."""
        def kill():
            while fetched() < ends[0]:
                time.sleep(0.01)
            time.sleep(ends[1])
            os.kill(os.getpid(), signal.SIGKILL)

        def before():
            photos.PAUSES = [away * share for share in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)]     # in all 3 times as long as `away`
            os.closerange(3, 1000)                              # the server's socket: a child would keep it open
            if ends:
                threading.Thread(target=kill, daemon=True).start()

        return conftest.command("-m dataset", ["build", "--labels", str(labels), "--metadata", str(metadata), "--data",
                                               str(tmp_path / root), "--more-than", "5", "--at-most", "30", "--connections", "2"],
                                tmp_path, 120 + 10 * math.ceil(away), before)

    with own_photos() as port:
        labels, metadata = make_mave.make(tmp_path, 6000, 6000, photos=f"http://127.0.0.1:{port}/photo")
        whole = start("whole")
    assert whole.code == 0, whole.err
    slice_n, progress = len(list((tmp_path / "whole/images").iterdir())) // (kills + 1), []
    for n in range(kills + 1):                                  # the last one is not killed
        ends = (fetched() + slice_n // 2, away * random.choice((0, 0.5, 1.2))) if n < kills else None
        with own_photos(port, slice_n // 2, away):
            outcome = start("killed", ends)
        assert outcome.signal == signal.SIGKILL if ends else outcome.code == 0 and outcome.seconds > away, outcome.err
        progress.append(fetched())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    print(f"{kills} kills with {progress[:-1]} photos; then {len(contents(tmp_path / 'whole')):,} files with the same bytes")
