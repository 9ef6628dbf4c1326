"""The state database: what is recorded, and whose archive it may speak for."""

import contextlib
import os
import re
import shutil
import sqlite3
from zlib import crc32

import pytest
from conftest import MIB, OLD, earlier_database, fill
from faults import LARGE, SIZES, assert_all_archived
from faulty_sftp import PERMISSION_DENIED, status
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from scripted_s3 import rewritten

# The tables of the first edition. Its databases have no user_version.
FIRST_EDITION = """
CREATE TABLE files
    (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, uploaded_at INTEGER);
CREATE TABLE objects
    (path TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, crc32 INTEGER NOT NULL,
     parts INTEGER NOT NULL, storage_class TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE recheck (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE replacing (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE uploads (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs
    (started_at INTEGER PRIMARY KEY, ended_at INTEGER, status INTEGER,
     uploaded INTEGER, skipped INTEGER, failed INTEGER, bytes INTEGER);
"""


@pytest.fixture
def box(faulty_box):
    fill(faulty_box.root, {"a": b"aa", "folder/b": b"bbb"})
    return faulty_box


@pytest.fixture
def archive(archive_of, box, s3):
    return archive_of(box, AWS_ENDPOINT_URL=s3.url)


def first_edition_database(archive, rows, pins=None, recheck=(), replacing=()):
    """A state as the first edition left it: rows of (path, size, mtime, CRC-32)."""
    with contextlib.closing(sqlite3.connect(archive.state_db)) as db, db:
        db.executescript(FIRST_EDITION)
        for path, size, mtime, crc in rows:
            key = path.removeprefix("./")
            db.execute("INSERT INTO files VALUES (?, ?, ?, ?)", (path, size, mtime, OLD))
            values = (path, key, crc, 0, "DEEP_ARCHIVE")
            db.execute("INSERT INTO objects VALUES (?, ?, ?, ?, ?)", values)
        db.executemany("INSERT INTO recheck VALUES (?)", [(path,) for path in recheck])
        db.executemany("INSERT INTO replacing VALUES (?)", [(path,) for path in replacing])
        pins = {
            "S3_BUCKET": archive.bucket.name,
            "S3_PREFIX": "",
            "HETZNER_USER": archive.box.user,
            "REMOTE_PATH": ".",
            "snapshot": "due",
            **(pins or {}),
        }
        db.executemany("INSERT INTO meta VALUES (?, ?)", pins.items())
        db.execute("INSERT INTO runs VALUES (1, 2, 0, 3, 0, 0, 9)")


def put(bucket, contents, prefix=""):
    """Objects as some other program stores them, with a checksum, without a time."""
    for key, content in contents.items():
        bucket.client.put_object(
            Bucket=bucket.name, Key=prefix + key, Body=content, ChecksumAlgorithm="CRC32"
        )


def put_any(bucket, keys):
    """Small objects with keys that no client of S3 would send as they are."""
    for key in keys:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket.name, key, b"xx")


# --- What is recorded ---


def test_the_files_table_is_exactly_the_documented_one(archive):
    archive()

    columns = archive.query("SELECT name, type, pk FROM pragma_table_info('files')")
    assert columns == [
        ("path", "TEXT", 1),
        ("size", "INTEGER", 0),
        ("mtime", "INTEGER", 0),
        ("uploaded_at", "INTEGER", 0),
    ]
    assert archive.query("PRAGMA journal_mode") == [("delete",)]


def test_each_file_has_its_row_with_the_time_of_its_upload(archive, bucket):
    archive()

    assert archive.rows() == {"./a": (2, OLD), "./folder/b": (3, OLD)}
    for path, uploaded_at in archive.query("SELECT path, uploaded_at FROM files"):
        head = bucket.client.head_object(Bucket=bucket.name, Key=path.removeprefix("./"))
        assert abs(head["LastModified"].timestamp() - uploaded_at) < 60


def test_what_s3_said_of_each_object_is_recorded(archive, box, bucket):
    fill(box.root, {"large": LARGE})
    archive(constants=SIZES)

    listed = {entry["Key"]: entry["ETag"].strip('"') for entry in bucket.list()}
    kept = archive.query("SELECT key, etag, crc32, storage_class FROM objects")
    assert {key: etag for key, etag, _, _ in kept} == listed
    assert "-" in listed["large"], "it is one of parts"
    sums = {key: (crc, storage_class) for key, _, crc, storage_class in kept}
    assert sums == {key: found[1:] for key, found in archive.objects().items()}


def test_files_done_before_a_kill_are_recorded(archive, box):
    """A commit for each file: kill -9 loses what was under way and nothing else."""
    fill(box.root, {f"{n:02}": MIB for n in range(8)})
    running = archive.start(TRANSFERS="1", BANDWIDTH_LIMIT="4M")
    line = ""
    while "archived" not in line or "03" not in line:
        line = running.process.stderr.readline()
    running.process.kill()
    running.process.wait()

    assert {"./00", "./01", "./02"} <= set(archive.rows())
    archive.assert_invariant()


def test_an_object_of_a_failed_file_is_not_recorded(archive, box):
    box.always("OPEN", b"a", status(PERMISSION_DENIED))

    assert archive().status == 3

    assert set(archive.rows()) == {"./folder/b"}
    assert archive.query("SELECT path FROM objects") == [("./folder/b",)]


def test_a_database_may_be_moved_with_its_settings(archive, tmp_path):
    archive()
    moved = tmp_path / "moved.db"
    shutil.move(archive.state_db, moved)
    archive.state_db = moved

    assert archive(STATE_DB=moved).counts == (0, 2, 0)


# --- A database of an earlier script ---


@pytest.mark.parametrize("there", ["all", "some", "none"])
def test_of_an_earlier_scripts_files_those_that_s3_lacks_are_uploaded(
    archive, box, bucket, s3, there
):
    """What is in the bucket under the key of the path, at the recorded size, is skipped
    and not even asked about."""
    contents = {"a": b"aa", "folder/b": b"bbb", "cut": b"whole", "folder/Ω x": b"x"}
    fill(box.root, contents)
    earlier_database(archive, [(f"./{n}", len(c), OLD) for n, c in contents.items()])
    held = {
        "all": contents,
        "some": {"a": b"aa", "folder/Ω x": b"x", "cut": b"who"},
        "none": {},
    }[there]
    put(bucket, held)
    right = [name for name, content in held.items() if content == contents[name]]
    missing = contents.keys() - set(right)
    in_2020 = b"<LastModified>2020-09-13T12:26:41.000Z<"
    listing = rewritten(lambda body: re.sub(b"<LastModified>[^<]*<", in_2020, body))
    s3.always("ListObjectsV2", listing)
    archive.settings["STORAGE_CLASS"] = "STANDARD"  # as that program's

    result = archive()

    assert (result.status, result.counts) == (0, (len(missing), len(right), 0)), result.stderr
    assert s3.requests["HeadObject"] == 0
    assert {key for operation, key in s3.about if operation == "PutObject"} == missing
    assert "of an earlier script" in result.stderr
    assert ("are dropped" in result.stderr) == bool(missing)
    assert archive.rows() == {f"./{name}": (len(c), OLD) for name, c in contents.items()}
    uploaded = dict(archive.query("SELECT path, uploaded_at FROM files"))
    then = {path for path, uploaded_at in uploaded.items() if uploaded_at == OLD + 1}
    assert then == {f"./{name}" for name in right}, "the age is that of the object"
    identified = archive.query("SELECT path FROM objects WHERE etag IS NOT NULL")
    assert {path for (path,) in identified} == archive.rows().keys()
    assert_all_archived(archive, box)
    assert archive().counts == (0, 4, 0)


def test_what_changed_since_an_earlier_script_is_archived(archive, bucket):
    """The other one is skipped, whatever S3 holds in its place: its row is believed."""
    put(bucket, {"a": b"--", "folder/b": b"old"})
    earlier_database(archive, [("./a", 2, OLD), ("./folder/b", 3, OLD - 1)])

    result = archive()

    assert result.counts == (1, 1, 0)
    assert archive.rows() == {"./a": (2, OLD), "./folder/b": (3, OLD)}
    assert archive.contents() == {"a": b"--", "folder/b": b"bbb"}


@pytest.mark.parametrize(
    "columns",
    [
        "path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, uploaded_at TEXT",
        "path TEXT PRIMARY KEY, mtime INTEGER, size INTEGER, uploaded_at TIMESTAMP",
        "path TEXT, size INTEGER, mtime INTEGER, uploaded_at TEXT",
        "id INTEGER PRIMARY KEY, path TEXT, size INTEGER, mtime INTEGER, uploaded_at TEXT",
    ],
    ids=["a time as text", "another order", "no key", "one more"],
)
def test_table_of_an_earlier_script_may_have_other_columns(archive, box, bucket, columns):
    """Its rows are believed, and its columns do not become those of the state."""
    put(bucket, {"a": b"aa", "folder/b": b"bbb"})
    rows = [("./a", 2, OLD), ("./folder/b", 3, OLD)]
    with contextlib.closing(sqlite3.connect(archive.state_db)) as db, db:
        db.execute(f"CREATE TABLE files ({columns})")
        insert = "INSERT INTO files (path, size, mtime, uploaded_at) VALUES (?, ?, ?, ?)"
        db.executemany(insert, [(*row, "2026-01-31T18:00:00") for row in rows])

    assert archive().counts == (0, 2, 0)
    fill(box.root, {"a": b"AA"}, OLD + 9)
    assert archive().counts == (1, 1, 0)
    fill(box.root, {"a": b"aa"}, OLD)
    assert archive().counts == (1, 1, 0)
    assert archive().counts == (0, 2, 0)
    assert len(archive.rows()) == 2
    assert_all_archived(archive, box)


@pytest.mark.parametrize("size", [3, 9], ids=["touched", "stored by another program"])
def test_what_s3_holds_as_it_is_now_is_compared_and_not_sent(archive, bucket, size):
    """Its row has another time, or another size."""
    put(bucket, {"a": b"aa", "folder/b": b"bbb"})
    earlier_database(archive, [("./a", 2, OLD), ("./folder/b", size, OLD - 1)])

    result = archive()

    assert (result.counts, result.compared) == ((0, 1, 0), 1)
    assert archive().counts == (0, 2, 0)


def test_rows_that_these_settings_cannot_have_made_are_dropped(archive, box, bucket):
    """Cut by position, "xyz.txt" would be the row of the object "z.txt". An escape that the
    name does not need would be the row of "A", whose object is another."""
    names = ("a", "z.txt", "no size", "half", "no time", "A")
    fill(box.root, dict.fromkeys(names, b"cc"))
    put(bucket, {name: b"cc" for name in names if name != "z.txt"} | {"A": b"!!"})
    rows = [
        ("./a", 2, OLD),
        ("xyz.txt", 2, OLD),
        ("/home/a", 2, OLD),
        ("./a//b", 1, OLD),
        ("./../a", 1, OLD),
        (None, 1, OLD),
        (b"./a", 2, OLD),
        ("./no size", None, OLD),
        ("./half", 2, OLD + 0.5),
        ("./no time", 2, None),
        ("./\u201b41", 2, OLD),
    ]
    earlier_database(archive, rows)

    result = archive()

    # Not there are z.txt and folder/b, and A is another. Not sure about are all but ./a.
    assert (result.status, result.counts, result.compared) == (0, (3, 1, 0), 3), result.stderr
    assert_all_archived(archive, box)
    assert len(archive.rows()) == len(names) + 1
    assert archive("verify").status == 0


def test_objects_whose_keys_no_path_has_do_no_harm(archive, box, bucket, s3):
    """Such as S3's console and other programs store. They stay, and are not ours."""
    keys = ["folder/", "a//b", "/a", "../up", "folder/./b", "with content/", "line\nfeed"]
    # An escape where none is needed, a missing one, and that of a byte that no name has.
    keys += ["\u201b41", "Icon\r", "nul \u201b00"]
    put_any(bucket, [f"mine/{key}" for key in keys])
    put(bucket, {"console/": b"", "": b""}, "mine/")
    put(bucket, {"mine": b"x", "mine-too/a": b"x", "a": b"x"})
    before = archive.contents()
    fill(box.root, {"A": b"xx", "Icon\r": b"xx", "line\nfeed": b"xx"})
    settings = {"S3_PREFIX": "mine/"}

    result = archive(**settings)

    assert (result.status, result.counts, result.failures) == (0, (5, 0, 0), [])
    assert before.items() <= archive.contents().items()
    assert len(archive.rows()) == 5
    assert archive("verify", **settings).status == 0
    assert archive(**settings).counts == (0, 5, 0)


# --- A database of the first edition ---


def test_of_the_first_editions_files_those_in_doubt_are_compared(archive, box, bucket, s3):
    """Those in `recheck` may have changed unseen, and those in `replacing` may have another
    object than the row says. None that S3 holds is sent."""
    contents = {
        "a": b"aa",
        "folder/b": b"bbb",
        "looked at again": b"same",
        "changed unseen": b"new!",
        "not replaced": b"same",
        "replaced": b"back",
        "both": b"new!",
    }
    fill(box.root, contents)
    rows = [(f"./{name}", len(c), OLD, crc32(c)) for name, c in contents.items()]
    first_edition_database(
        archive,
        rows,
        recheck=["./looked at again", "./changed unseen", "./both"],
        replacing=["./not replaced", "./replaced", "./both", "./never archived"],
    )
    put(bucket, {**contents, "changed unseen": b"old!", "replaced": b"lost", "both": b"???!"})

    result = archive()

    uploaded, skipped, failed = result.counts
    assert (result.status, uploaded, failed) == (0, 3, 0), result.stderr
    assert skipped + result.compared == 4
    assert result.compared >= 2
    sent = {key for operation, key in s3.about if operation == "PutObject"}
    assert sent == {"changed unseen", "replaced", "both"}
    assert archive.contents() == contents
    assert_all_archived(archive, box)
    assert archive().counts == (0, 7, 0)


def test_the_first_editions_copy_of_its_state_in_the_bucket_does_no_harm(archive, box, bucket):
    first_edition_database(
        archive, [("./a", 2, OLD, crc32(b"aa")), ("./folder/b", 3, OLD, crc32(b"bbb"))]
    )
    put(bucket, {"a": b"aa", "folder/b": b"bbb", ".archive_state.db": b"SQLite format 3\0"})

    assert archive().counts[0] == 0
    assert archive("verify").status == 0
    assert ".archive_state.db" in archive.objects()
    archive.assert_invariant()


def test_a_state_of_the_first_edition_is_not_believed_of_another_place(archive, bucket):
    """It says which bucket and prefix it belongs to."""
    rows = [("./a", 2, OLD, crc32(b"aa")), ("./folder/b", 3, OLD, crc32(b"bbb"))]
    first_edition_database(archive, rows)
    put(bucket, {"a": b"aa", "folder/b": b"bbb", "other/a": b"??", "other/folder/b": b"???"})

    before = archive.state_db.read_bytes()

    for command in ("run", "plan"):
        result = archive(command, S3_PREFIX="other/")
        assert result.status == 1
        assert "the state belongs to S3_PREFIX=(empty)" in result.stderr
    assert archive.state_db.read_bytes() == before
    assert archive().counts == (0, 0, 0)


def test_unfinished_uploads_of_the_first_edition_are_aborted(archive, box, bucket):
    """Of a file that is there, and of one that is gone."""
    fill(box.root, {"large": 5 * MIB})
    first_edition_database(archive, [])
    for key in ("large", "gone"):
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    archive.execute("INSERT INTO uploads VALUES ('large'), ('gone')")

    result = archive(constants=SIZES)

    assert result.status == 0, result.stderr
    assert archive.bucket.uploads() == []
    assert_all_archived(archive, box)


# --- Another destination, another source ---

SOURCE = ["HETZNER_USER", "REMOTE_PATH"]
DESTINATION = ["S3_BUCKET", "S3_PREFIX"]


@pytest.mark.parametrize("setting", SOURCE + DESTINATION)
def test_a_state_of_another_destination_or_source_is_refused(archive, box, bucket, setting):
    archive()
    value = "folder" if setting == "REMOTE_PATH" else "another"
    old = str(archive.settings.get(setting, ""))
    before = len(bucket.writes())
    database = archive.state_db.read_bytes()
    if setting == "HETZNER_USER":
        box.user = value
    if setting == "S3_BUCKET":
        bucket.client.create_bucket(Bucket=value)
        before += 1
    of_destination = setting in DESTINATION

    for arguments in (["run"], ["run", "--new-source"][: 1 + of_destination]):
        result = archive(*arguments, **{setting: value})

        assert result.status == 1
        assert setting in result.stderr and value in result.stderr and old in result.stderr
        assert "STATE_DB" in result.stderr  # what to do
        assert ("--new-source" in result.stderr) == (not of_destination)
        assert bucket.writes()[before:] == []
        assert archive.state_db.read_bytes() == database


def test_a_slash_after_remote_path_makes_no_other_place_of_it(archive):
    archive(REMOTE_PATH="folder")

    result = archive(REMOTE_PATH="folder/")

    assert (result.status, result.counts) == (0, (0, 1, 0))


@pytest.mark.parametrize("setting", SOURCE)
def test_new_source_pays_for_nothing_that_is_there(archive_of, box, s3, setting):
    """The archive's files are on another box, or in another folder of it, some with other
    times; one was changed with its size kept, one is new, one is gone."""
    names = ("kept", "folder/touched", "changed", "gone")
    fill(box.root / "old", dict.fromkeys(names, 1_000))
    fill(box.root / "old", {"large": LARGE, "large and touched": LARGE, "empty": 0})
    archive = archive_of(box, AWS_ENDPOINT_URL=s3.url, REMOTE_PATH="old")
    assert archive(constants=SIZES).counts == (7, 0, 0)
    before = archive.contents()

    root = box.root / "old"
    value = "another"
    if setting == "REMOTE_PATH":
        value = "new/folder"
        (box.root / "new").mkdir()
        root = root.rename(box.root / "new" / "folder")
    else:
        box.user = value
    for touched in ("folder/touched", "large and touched"):
        os.utime(root / touched, (OLD + 1_000, OLD + 1_000))
    fill(root, {"changed": bytes(1_000), "new": b"new"}, OLD + 1_000)
    (root / "gone").unlink()
    s3.requests.clear()
    s3.about.clear()

    archive.settings[setting] = value
    rows = archive.rows()
    table = archive("run", "--dry-run", "--new-source", constants=SIZES).stdout
    numbers = dict(re.findall(r"^(New files|Changed files|To compare) *: (\d+)", table, re.M))
    assert numbers == {"New files": "1", "Changed files": "0", "To compare": "6"}
    assert archive.rows() == rows
    result = archive("run", "--new-source", constants=SIZES)

    assert (result.status, result.counts, result.compared) == (0, (2, 0, 0), 5), result.stderr
    assert "of an earlier script or source: took over" in result.stderr
    assert s3.requests["PutObject"] == 2
    assert s3.requests["CreateMultipartUpload"] == 0
    assert archive.contents() == {**before, "changed": bytes(1_000), "new": b"new"}
    archive.assert_invariant()
    assert archive(constants=SIZES).counts == (0, 7, 0), "it is tied to the new source"
    assert archive("verify").status == 0


def test_new_source_that_is_not_reached_leaves_the_state_as_it_is(archive, box):
    """Its user may be mistyped."""
    archive()
    rows = archive.rows()

    assert archive("run", "--new-source", HETZNER_USER="mistyped").status == 1

    assert archive.rows() == rows
    assert archive().counts == (0, 2, 0)


def test_new_source_without_any_change_does_no_harm(archive, s3):
    for counts in ((2, 0, 0), (0, 0, 0)):
        assert archive("run", "--new-source").counts == counts
    assert s3.requests["PutObject"] == 2
    assert archive().counts == (0, 2, 0)


def test_state_of_a_newer_version_is_refused_and_left_as_it_is(archive):
    archive()
    archive.execute("PRAGMA user_version = 1000")
    before = archive.state_db.read_bytes()
    result = archive()
    assert result.status == 1
    assert "is of a newer archive.py" in result.stderr
    assert archive.state_db.read_bytes() == before


def test_state_whose_uploads_have_no_settings_is_taken_over(archive, s3):
    """One of version 4, before an upload in parts was tied to its settings."""
    archive()
    archive.execute("ALTER TABLE uploads DROP COLUMN settings")
    archive.execute("PRAGMA user_version = 4")
    result = archive()
    assert (result.status, result.counts, result.compared) == (0, (0, 0, 0), 2), result.stderr
    assert s3.requests["PutObject"] == 2
    assert archive().counts == (0, 2, 0)


@pytest.mark.parametrize("command", ["plan", "status"])
def test_another_programs_lock_on_the_state_is_not_waited_for_without_a_limit(archive, command):
    archive()
    with contextlib.closing(sqlite3.connect(archive.state_db, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        result = archive(command, constants={"LOCKED_LIMIT": 1})
    assert "locked" in result.stderr
    assert result.status == (1 if command == "plan" else 0)
