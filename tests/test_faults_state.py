"""What may happen to the state database: damaged, full, locked, lost."""

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import OLD, PROGRAM, earlier_database
from conftest import fill as fill_tree
from faults import LARGE, SIZES, SMALL, assert_all_archived, scripted_fixtures, wait_for, write
from faulty_sftp import first
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from scripted_s3 import Answer, error, hang, reset

IMPATIENT = {"LOCKED_LIMIT": 1}


box, scripted = scripted_fixtures()  # beside `archive`, which asks S3 directly


@pytest.fixture
def many(box, bucket):
    """More objects than a listing has on its first page, for the files a and z, which
    another program has stored, and for others that the box does not have."""
    contents = {"a": b"aa", "z": b"zz"}
    fill_tree(box.root, contents)
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for number in range(1_200):
        backend.put_object(bucket.name, f"m{number:04}", b"m")
    for key, content in contents.items():
        bucket.client.put_object(
            Bucket=bucket.name, Key=key, Body=content, ChecksumAlgorithm="CRC32"
        )


def fill(archive, box, count=20):
    """Archive `count` files, and make one more for the next run."""
    for number in range(count):
        write(box.root / f"f{number}", SMALL)
    assert archive().status == 0
    write(box.root / "new", SMALL)


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def page_size(archive):
    return archive.query("PRAGMA page_size")[0][0]


def assert_refused(archive, bucket, **settings):
    """A run that ends with 1 before it has written to the bucket; its Result."""
    before = len(bucket.writes())
    result = archive(**settings)
    assert result.status == 1, result.stderr
    assert bucket.writes()[before:] == []
    assert str(settings.get("STATE_DB", archive.state_db)) in result.stderr.splitlines()[-1]
    return result


# --- A signal ---------------------------------------------------------------

INTERRUPTED = """
import contextlib, os, random, signal, sys
sys.path.insert(0, sys.argv[1])
import archive

def stop(*_):
    raise archive.Stopped

state = archive.State(archive.load_config(None))
signal.signal(signal.SIGALRM, stop)
for _ in range(3_000):
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-4))
            while True:
                state.note_seen(["./f"])
    except archive.Stopped:  # whose traceback still has the frames
        if state._db.in_transaction:
            sys.exit("the transaction was left open")
"""


def test_signal_at_any_instant_leaves_no_transaction_open(tmp_path):
    """What S3 has acknowledged until then is committed by another one."""
    settings = {
        "HETZNER_HOST": "localhost",
        "HETZNER_USER": "u",
        "HETZNER_PASSWORD": "p",
        "S3_BUCKET": "bucket",
        "STATE_DB": str(tmp_path / "state.db"),
    }
    command = [sys.executable, "-c", INTERRUPTED, PROGRAM.parent]
    subprocess.run(command, env=os.environ | settings, check=True)


# --- Trouble with the database ----------------------------------------------


def test_database_in_a_folder_that_is_not_there_is_fatal(archive, box, bucket):
    write(box.root / "f", SMALL)
    result = assert_refused(archive, bucket, STATE_DB=archive.folder / "missing" / "state.db")
    assert_is_not_blamed(result)


def assert_is_not_blamed(result):
    """The database is whole: the advice is about what is around it."""
    assert "permissions" in result.stderr
    assert "TMPDIR" in result.stderr or "local disk" in result.stderr
    assert "move it away" not in result.stderr


def test_read_only_database_is_fatal_before_anything_is_uploaded(archive, box, bucket):
    """By its header (format write version 3), which binds root as well."""
    fill(archive, box)
    overwrite(archive.state_db, 18, b"\x03")
    assert_refused(archive, bucket)


@pytest.mark.parametrize("page", ["first", "last"])
def test_damaged_database_is_fatal_before_anything_is_uploaded(archive, box, bucket, page):
    fill(archive, box, 100)
    size = archive.state_db.stat().st_size
    page_bytes = page_size(archive)
    start = {"first": 0, "last": size - page_bytes}[page]
    overwrite(archive.state_db, start, random.Random(1).randbytes(page_bytes))
    damaged = archive.state_db.read_bytes()
    assert_refused(archive, bucket)
    assert archive.state_db.read_bytes() == damaged, "it is evidence"


def test_copy_that_was_made_during_a_commit_is_fatal_before_anything_is_uploaded(
    archive, box, bucket
):
    """It has pages from before and after: its tables and indexes are whole, but disagree.

    Most versions of SQLite find that with integrity_check alone, not with quick_check.
    """
    fill(archive, box, 400)
    before, size = archive.state_db.read_bytes(), page_size(archive)
    archive.execute("DELETE FROM files WHERE path LIKE '%7%'")
    after = archive.state_db.read_bytes()
    torn = []
    for start in range(size, len(after), size):
        copy = after[:start] + before[start : start + size] + after[start + size :]
        archive.state_db.write_bytes(copy)
        if archive.query("PRAGMA integrity_check(1)") != [("ok",)]:
            torn.append(copy)
    assert torn

    for copy in torn:
        archive.state_db.write_bytes(copy)
        assert_refused(archive, bucket)


def test_damaged_database_that_was_moved_away_is_made_anew(archive, box, bucket):
    """As its message says."""
    fill(archive, box)
    os.truncate(archive.state_db, archive.state_db.stat().st_size // 2)
    result = assert_refused(archive, bucket)
    assert "move it away" in result.stderr
    archive.state_db.rename(archive.folder / "damaged.db")
    result = archive()
    assert (result.status, result.counts, result.compared) == (0, (1, 0, 0), 20)
    assert_all_archived(archive, box)


def test_file_that_is_no_database_is_fatal(archive, box, bucket):
    write(box.root / "f", SMALL)
    archive.state_db.write_text("This is a shopping list.\n" * 100)
    assert_refused(archive, bucket)
    assert archive.state_db.read_text().startswith("This is a shopping list")


def test_locked_database_is_fatal_before_anything_is_uploaded(archive, box):
    fill(archive, box)
    db = sqlite3.connect(archive.state_db, isolation_level=None)
    with contextlib.closing(db):
        db.execute("BEGIN EXCLUSIVE")
        result = archive(constants=IMPATIENT)
        assert result.status == 1
        assert "locked" in result.stderr
        assert_is_not_blamed(result)
        assert "new" not in archive.objects()
    assert archive().status == 0
    assert_all_archived(archive, box)


def test_database_that_is_locked_during_the_run_stops_the_uploads(archive, box):
    for number in range(30):
        write(box.root / f"f{number:02}", SMALL)
    db = sqlite3.connect(archive.state_db, isolation_level=None, check_same_thread=False)
    with contextlib.closing(db):
        box.on("OPEN", b"f20", first(lambda: db.execute("BEGIN EXCLUSIVE")))
        result = archive(constants=IMPATIENT, TRANSFERS=1)
        assert result.status == 1, result.stderr
        assert 20 <= len(archive.objects()) <= 23
    assert "locked" in result.stderr
    archive.assert_invariant()
    assert archive().status == 0
    assert_all_archived(archive, box)


LOCKED_AT_THE_END = """
import sqlite3
def close(state, close=archive.State.close):
    other = sqlite3.connect({path!r}, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    close(state)
    other.close()
archive.State.close = close
"""


def test_database_that_is_locked_when_all_is_done_is_not_waited_for(archive, box):
    write(box.root / "f", SMALL)
    running = archive.start(before=LOCKED_AT_THE_END.format(path=str(archive.state_db)))
    result = running.wait(timeout=30)  # less than LOCKED_LIMIT
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr


@pytest.mark.parametrize("room", [0, 16_384])
def test_full_disk_stops_the_uploads_and_leaves_the_database_whole(archive, box, room):
    """A limit on the size of files stands for the disk."""
    fill(archive, box, 10)
    rows = archive.rows()
    for number in range(80):
        write(box.root / f"later {number} {'x' * 200}", SMALL)
    limit = archive.state_db.stat().st_size + room
    full = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({limit}, {limit}))"
    result = archive(before=full, TRANSFERS=2, LOG_FILE="")
    assert result.status == 1, result.stderr
    assert str(archive.state_db) in result.stderr
    assert rows.items() <= archive.rows().items()
    assert len(archive.objects()) - len(archive.rows()) <= 4
    assert len(archive.rows()) < 91
    archive.assert_invariant()
    assert archive().status == 0
    assert_all_archived(archive, box)


# How each connection commits, as it begins to write.
COMMITS = """
import functools, sqlite3
class Connection(sqlite3.Connection):
    def execute(self, statement, *values):
        if statement.startswith(("BEGIN IMMEDIATE", "INSERT OR REPLACE INTO uploads")):
            (_, _, path), *_ = super().execute("PRAGMA database_list")
            (mode,) = super().execute("PRAGMA journal_mode").fetchone()
            (level,) = super().execute("PRAGMA synchronous").fetchone()
            print(os.path.basename(path), mode, level, flush=True)
        return super().execute(statement, *values)
archive.sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)
"""


def test_commit_outlasts_a_loss_of_power(archive, box):
    """SQLite syncs a journal that it has truncated, from FULL (2) on. One that it has deleted
    may come back and undo what was committed. No test can cut the power."""
    fill(archive, box, 1)
    write(box.root / "f0", SMALL + 1)  # a row to be marked before its new version is sent
    write(box.root / "large", LARGE)  # an upload to be noted, by a connection of its own
    result = archive(constants=SIZES, before=COMMITS)
    assert result.counts == (3, 0, 0)
    commits = [line.split()[1:] for line in result.stdout.splitlines() if "state.db " in line]
    assert commits == [["truncate", "2"]] * len(commits)
    assert len(commits) >= 4  # those of `doubt` and `record`, and two of `note_upload`
    assert not Path(f"{archive.state_db}-journal").exists()


# --- A lost database --------------------------------------------------------


@pytest.mark.parametrize("loss", ["deleted", "0 bytes", "no rows"])
def test_lost_database_is_made_anew_and_nothing_is_paid_twice(scripted, box, s3, loss):
    """What has changed since is sent, and nothing else."""
    archive = scripted
    names = ("kept", "folder/Ω x", "touched", "changed", "grown", "%41 + é")
    fill_tree(box.root, dict.fromkeys(names, 2_000))
    large = ("large", "large and touched", "large and changed")
    fill_tree(box.root, {"empty": 0, **dict.fromkeys(large, LARGE)})
    assert archive(constants=SIZES).counts == (10, 0, 0)
    sizes = archive.rows()

    archive.state_db.unlink()
    if loss == "0 bytes":
        archive.state_db.touch()
    elif loss == "no rows":
        earlier_database(archive, [])
    for name in ("touched", "large and touched"):
        os.utime(box.root / name, (OLD + 9, OLD + 9))
    changed = {"changed": bytes(2_000), "grown": 2_001, "large and changed": LARGE, "new": 7}
    fill_tree(box.root, changed, OLD + 9)
    overwrite(box.root / "large and changed", LARGE - 5, b"other")
    os.utime(box.root / "large and changed", (OLD + 9, OLD + 9))
    s3.requests.clear()
    s3.about.clear()

    result = archive(constants=SIZES)

    assert (result.status, result.counts, result.compared) == (0, (4, 0, 0), 7), result.stderr
    assert "is new" in result.stderr
    assert "took over 10 objects" in result.stderr
    sent = {key for operation, key in s3.about if operation in ("PutObject", "UploadPart")}
    assert sent == changed.keys()
    assert sizes.keys() | {"./new"} == archive.rows().keys()
    assert_all_archived(archive, box)
    s3.requests.clear()
    assert archive(constants=SIZES).counts == (0, 11, 0)
    assert s3.requests.total() == 0


def test_lost_database_does_not_hide_a_change_within_the_same_second(archive, box):
    """The object's time is that of the file, but the file was archived shortly after that."""
    now = int(time.time()) - 10
    write(box.root / "f", SMALL, now)
    assert archive().status == 0
    archive.state_db.unlink()
    (box.root / "f").write_bytes(bytes(SMALL))
    os.utime(box.root / "f", (now, now))
    assert archive().counts == (1, 0, 0)
    assert_all_archived(archive, box)


def test_lost_database_under_a_prefix_takes_over_what_is_below_it(archive, box, bucket):
    write(box.root / "f", SMALL)
    assert archive(S3_PREFIX="mine/").status == 0
    bucket.client.put_object(Bucket=bucket.name, Key="other/g", Body=b"x")
    bucket.client.put_object(Bucket=bucket.name, Key="mine-too/g", Body=b"x")
    archive.state_db.unlink()

    result = archive(S3_PREFIX="mine/")

    assert (result.counts, result.compared) == ((0, 0, 0), 1)
    assert "took over 1 objects" in result.stderr
    assert archive.rows().keys() == {"./f"}


def test_other_objects_outside_of_the_prefix_are_no_lost_archive(archive, box, bucket):
    bucket.client.put_object(Bucket=bucket.name, Key="other/f", Body=b"x")
    write(box.root / "f", SMALL)

    result = archive(S3_PREFIX="mine/")

    assert (result.status, result.counts) == (0, (1, 0, 0))
    assert "took over" not in result.stderr


def test_wal_of_a_lost_database_does_not_get_into_the_new_one(archive, box):
    """An earlier script's, killed, whose database was deleted since."""
    fill(archive, box)
    with contextlib.closing(sqlite3.connect(archive.state_db)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("INSERT INTO files VALUES ('./ghost', 1, 1, 1)")
        db.commit()
        wal = Path(f"{archive.state_db}-wal").read_bytes()
    for left in archive.state_db.parent.glob("state.db*"):
        left.unlink()
    Path(f"{archive.state_db}-wal").write_bytes(wal)
    result = archive()
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_state_behind_a_link_has_one_lock(archive, box):
    fill(archive, box)
    linked = archive.folder / "elsewhere" / "linked.db"
    linked.parent.mkdir()
    linked.symlink_to(archive.state_db)
    with contextlib.closing(sqlite3.connect(f"{archive.state_db}.lock")) as holder:
        holder.isolation_level = None
        holder.execute("BEGIN IMMEDIATE")
        assert archive(STATE_DB=linked).status == 11


# --- The listing that makes a new state -------------------------------------


@pytest.mark.parametrize(
    ("kind", "fault", "nth"),
    [
        ("lost", error(403, "AccessDenied"), 1),
        ("lost", reset, 2),
        ("lost", lambda _: Answer(200, {"content-type": "application/xml"}), 2),
        ("earlier script's", error(500, "InternalError"), 2),
        ("new source", error(403, "AccessDenied"), 2),
    ],
    ids=["denied", "cut midway", "an empty answer", "an earlier script's", "a new source's"],
)
def test_listing_that_fails_ends_the_run_and_the_next_one_begins_it_again(
    scripted, box, bucket, s3, many, kind, fault, nth
):
    """Nothing is uploaded, and no row is believed that was not looked for."""
    archive = scripted
    arguments = []
    if kind == "earlier script's":
        lost = "zz, which is not in the bucket"
        fill_tree(box.root, {lost: 5})
        earlier_database(archive, [("./a", 2, OLD), ("./z", 2, OLD), (f"./{lost}", 5, OLD)])
    elif kind == "new source":
        assert archive().status == 0
        box.user = archive.settings["HETZNER_USER"] = "another"
        arguments = ["run", "--new-source"]
    fill_tree(box.root, {"new": 5})
    s3.requests.clear()
    rule = s3.on("ListObjectsV2", fault, nth=nth, times=float("inf"))
    before = len(bucket.writes())

    result = archive(*arguments, constants={"S3_ATTEMPTS": 1})

    assert rule.fired
    assert result.status == 1
    assert result.summary["Uploaded files"] == 0
    assert bucket.writes()[before:] == []
    assert archive.query("PRAGMA integrity_check") == [("ok",)]

    s3.rules.clear()
    s3.requests.clear()
    result = archive()

    expected = {"lost": (1, 0), "earlier script's": (2, 2), "new source": (1, 0)}[kind]
    assert (result.status, result.counts) == (0, (*expected, 0)), result.stderr
    assert result.compared == (0 if kind == "earlier script's" else 2)
    assert s3.requests["ListObjectsV2"] == 2, "it was begun again"
    archive.assert_invariant()
    assert len(archive.rows()) == 1_202 + expected[0]


def test_run_that_is_killed_while_it_lists_is_begun_again(scripted, box, s3, many):
    archive = scripted
    fill_tree(box.root, {"new": 5, "zz, which is not in the bucket": 5})
    earlier_database(archive, [("./a", 2, OLD), ("./zz, which is not in the bucket", 5, OLD)])
    frozen = s3.on("ListObjectsV2", hang, nth=2)
    running = archive.start()
    wait_for(lambda: frozen.fired)
    running.process.kill()
    running.process.wait()

    result = archive()

    assert (result.status, result.counts, result.compared) == (0, (2, 1, 0), 1), result.stderr
    archive.assert_invariant()
