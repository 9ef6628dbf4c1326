"""What may happen to the state database: damaged, full, locked, lost."""

import contextlib
import os
import random
import re
import sqlite3
import time
from pathlib import Path

import pytest
from conftest import SNAPSHOT
from faults import SMALL, assert_all_archived, write
from faulty_sftp import first
from scripted_s3 import halfway, headers, rewritten

IMPATIENT = {"LOCKED_LIMIT": 1, "COMMIT_LIMIT": 1}


@pytest.fixture
def box(faulty_box):
    return faulty_box


def fill(archive, box, count=40):
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


def assert_refused(archive, bucket, status=1, **settings):
    """A run that ends before anything is uploaded; its Result."""
    before = archive.objects()
    bucket.moto.requests.clear()
    result = archive(**settings)
    assert result.status == status, result.stderr
    assert archive.objects() == before
    assert [request for request in bucket.writes() if request[0] == "PUT"] == []
    return result


# --- Trouble with the database ----------------------------------------------


def test_database_in_a_folder_that_is_not_there_is_fatal(archive, box, bucket):
    write(box.root / "f", SMALL)
    missing = archive.folder / "missing" / "state.db"
    result = assert_refused(archive, bucket, STATE_DB=missing)
    assert str(missing) in result.stderr


def test_read_only_database_is_fatal_before_anything_is_uploaded(archive, box, bucket):
    """By its header (format write version 3), which binds root as well."""
    fill(archive, box)
    overwrite(archive.state_db, 18, b"\x03")
    result = assert_refused(archive, bucket)
    assert str(archive.state_db) in result.stderr


@pytest.mark.parametrize("page", ["first", "second", "last", "all"])
def test_damaged_database_is_fatal_before_anything_is_uploaded(archive, box, bucket, page):
    fill(archive, box, 100)
    size = archive.state_db.stat().st_size
    page_bytes = page_size(archive)
    start = {"first": 0, "second": page_bytes, "last": size - page_bytes, "all": 0}[page]
    junk = random.Random(1).randbytes(size if page == "all" else page_bytes)
    overwrite(archive.state_db, start, junk)
    damaged = archive.state_db.read_bytes()
    result = assert_refused(archive, bucket)
    assert str(archive.state_db) in result.stderr
    assert archive.state_db.read_bytes() == damaged, "it is evidence"


def test_file_that_is_no_database_is_fatal(archive, box, bucket):
    write(box.root / "f", SMALL)
    archive.state_db.write_text("This is a shopping list.\n" * 100)
    result = assert_refused(archive, bucket)
    assert str(archive.state_db) in result.stderr
    assert archive.state_db.read_text().startswith("This is a shopping list")


def test_locked_database_is_fatal_before_anything_is_uploaded(archive, box, bucket):
    fill(archive, box)
    db = sqlite3.connect(archive.state_db, isolation_level=None)
    with contextlib.closing(db):
        db.execute("BEGIN EXCLUSIVE")
        result = archive(constants=IMPATIENT)
        assert result.status == 1
        assert "locked" in result.stderr
        assert "new" not in archive.objects()
    assert archive().status == 0
    assert_all_archived(archive, box)


def test_database_that_is_locked_during_the_run_stops_the_uploads(archive, box, bucket):
    for number in range(40):
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


@pytest.mark.parametrize("room", [0, 32_768])
def test_full_disk_stops_the_uploads_and_leaves_the_database_whole(archive, box, room):
    """A limit on the size of files stands for the disk."""
    fill(archive, box)
    for number in range(120):
        write(box.root / f"later {number} {'x' * 150}", SMALL)
    limit = archive.state_db.stat().st_size + room
    full = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({limit}, {limit}))"
    result = archive.start(before=full, TRANSFERS=2, LOG_FILE="").wait()
    assert result.status == 1, result.stderr
    assert str(archive.state_db) in result.stderr
    assert len(archive.objects()) - len(archive.rows()) <= 4
    assert len(archive.rows()) < 160
    archive.assert_invariant()
    assert archive().status == 0
    assert_all_archived(archive, box)


# --- A lost database --------------------------------------------------------


def test_snapshot_is_stored_in_standard_class_after_a_run_that_archived(archive, box, bucket):
    write(box.root / "f", SMALL)
    assert archive().status == 0
    (stored,) = [entry for entry in bucket.list() if entry["Key"] == SNAPSHOT]
    assert stored["StorageClass"] == "STANDARD"
    bucket.moto.requests.clear()
    assert archive().status == 0
    assert bucket.writes() == [], "nothing was archived"


def test_snapshot_stands_under_the_prefix(archive_of, box, bucket):
    archive = archive_of(box, S3_PREFIX="nas/")
    write(box.root / "f", SMALL)
    assert archive().status == 0
    assert {entry["Key"] for entry in bucket.list()} == {"nas/f", f"nas/{SNAPSHOT}"}


def test_lost_database_is_taken_from_the_snapshot(archive, box, bucket):
    fill(archive, box)
    rows = archive.rows()
    archive.state_db.unlink()
    result = archive()
    assert (result.status, result.counts) == (0, (1, 40, 0)), result.stderr
    assert "snapshot" in result.stderr
    assert rows.items() <= archive.rows().items()
    assert_all_archived(archive, box)


def test_lost_database_without_a_snapshot_is_fatal_and_the_way_out_is_told(
    archive, box, bucket
):
    fill(archive, box)
    archive.state_db.unlink()
    bucket.client.delete_object(Bucket=bucket.name, Key=SNAPSHOT)
    result = assert_refused(archive, bucket)
    assert "--new-state" in result.stderr
    assert archive("run", "--new-state").counts == (41, 0, 0)
    assert_all_archived(archive, box)


@pytest.mark.parametrize("content", ["nothing", "no tables", "no rows"])
def test_empty_database_beside_a_bucket_with_objects_is_no_fresh_start(
    archive, box, bucket, content
):
    """It is an error, or the snapshot takes its place."""
    fill(archive, box)
    if content == "nothing":
        os.truncate(archive.state_db, 0)
    else:
        archive.state_db.unlink()
        with contextlib.closing(sqlite3.connect(archive.state_db)) as db, db:
            db.execute("PRAGMA user_version = 0")
            db.execute("CREATE TABLE t (c)")
            db.execute("DROP TABLE t")
            if content == "no rows":
                db.execute(
                    "CREATE TABLE files (path TEXT PRIMARY KEY, size INTEGER,"
                    " mtime INTEGER, uploaded_at INTEGER)"
                )
    result = archive()
    assert result.status in (0, 1)
    if result.status == 0:
        assert "snapshot" in result.stderr
        assert result.counts == (1, 40, 0)
        assert_all_archived(archive, box)
    else:
        assert "--new-state" in result.stderr
        assert "new" not in archive.objects()


@pytest.mark.parametrize("damage", ["not a database", "cut short", "empty"])
def test_damaged_snapshot_is_not_taken(archive, box, bucket, damage):
    fill(archive, box, 100)
    snapshot = bucket.content(SNAPSHOT)
    content = {
        "not a database": b"shopping list" * 1_000,
        "cut short": snapshot[: len(snapshot) // 2],
        "empty": b"",
    }[damage]
    bucket.client.put_object(Bucket=bucket.name, Key=SNAPSHOT, Body=content)
    archive.state_db.unlink()
    result = assert_refused(archive, bucket)
    assert "snapshot" in result.stderr
    assert "--new-state" in result.stderr
    assert not archive.state_db.exists(), "the next run would trust it"


def test_snapshot_of_another_box_is_not_taken(archive, box, bucket):
    fill(archive, box)
    archive.state_db.unlink()
    write(box.root / "elsewhere" / "f", SMALL)
    result = assert_refused(archive, bucket, REMOTE_PATH="./elsewhere")
    assert "REMOTE_PATH" in result.stderr
    assert "S3_PREFIX of its own" in result.stderr
    assert not archive.state_db.exists(), "it is another's, here as in the bucket"
    checked = archive("check", REMOTE_PATH="./elsewhere")
    assert checked.status == 1
    assert "WRONG  snapshot of the state: " in checked.stdout


def test_snapshot_that_is_older_than_an_object_is_not_believed_of_it(archive, box, bucket):
    """The run that replaced it was lost with its state; then the box was rolled back."""
    write(box.root / "f", 20)
    write(box.root / "g", 20)
    old, times = (box.root / "f").read_bytes(), ((box.root / "f").stat().st_mtime,) * 2
    assert archive().status == 0
    (box.root / "f").write_bytes(old[::-1])
    time.sleep(1.1)  # S3 tells whole seconds
    killed = "archive.Archive.put_snapshot = lambda *_: __import__('os')._exit(9)"
    assert archive.start(before=killed).wait().status == 9
    archive.state_db.unlink()
    (box.root / "f").write_bytes(old)
    os.utime(box.root / "f", times)
    assert archive().counts == (1, 1, 0)
    assert bucket.content("f") == old


def test_run_that_is_killed_does_not_leave_the_snapshot_of_another_box(archive, box):
    fill(archive, box)
    archive.state_db.unlink()
    write(box.root / "elsewhere" / "f", SMALL)
    killed = (
        "import os, signal\n"
        "replace = os.replace\n"
        "def replace_and_die(source, target):\n"
        "    replace(source, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = replace_and_die"
    )
    archive.start(before=killed, REMOTE_PATH="./elsewhere").wait()
    assert not archive.state_db.exists(), "the right settings would be refused by it"
    assert archive().status == 0


def test_snapshot_that_breaks_off_goes_on_where_it_broke(archive_of, box, s3):
    archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
    fill(archive, box)
    archive.state_db.unlink()
    cut = s3.on("GetObject", halfway(then_all=False), key=SNAPSHOT)
    result = archive()
    assert cut.fired
    assert (result.status, result.counts) == (0, (1, 40, 0)), result.stderr


def test_snapshot_that_is_damaged_on_its_way_is_named(archive_of, box, s3, bucket):
    archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
    fill(archive, box)
    archive.state_db.unlink()
    s3.always("GetObject", headers(x_amz_checksum_crc32="AAAAAA=="), key=SNAPSHOT)
    result = assert_refused(archive, bucket)
    assert f"its snapshot {SNAPSHOT} in the bucket is damaged" in result.stderr
    assert "--new-state" in result.stderr


def test_snapshot_is_as_old_as_the_listing_has_it(archive_of, box, s3):
    """Some servers list milliseconds, but answer a GET with whole seconds."""
    archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
    fill(archive, box)
    archive.state_db.unlink()

    def milliseconds(body):
        return re.sub(rb"(:\d\d)(\.\d+)?Z<", rb"\1.999Z<", body)

    s3.always("ListObjectsV2", rewritten(milliseconds))
    assert archive().counts == (1, 40, 0)


def test_folder_that_s3s_console_made_does_not_hinder_the_first_run(archive, box, bucket):
    for key in ("my-box/", "my-box/photos/"):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"")
    write(box.root / "f", SMALL)
    assert archive("check", S3_PREFIX="my-box/").status == 0
    assert archive(S3_PREFIX="my-box/").counts == (1, 0, 0)
    assert archive("verify", S3_PREFIX="my-box/").status == 0


def test_snapshot_that_went_to_a_cold_class_is_named(archive, box, bucket):
    fill(archive, box)
    archive.state_db.unlink()
    snapshot = bucket.content(SNAPSHOT)
    bucket.client.put_object(
        Bucket=bucket.name, Key=SNAPSHOT, Body=snapshot, StorageClass="DEEP_ARCHIVE"
    )
    result = assert_refused(archive, bucket)
    assert f"{SNAPSHOT} has gone to an archive class" in result.stderr


def test_wal_of_a_lost_database_does_not_get_into_the_snapshot(archive, box):
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
    assert result.status == 0, result.stderr
    assert_all_archived(archive, box)


def test_state_behind_a_link_has_one_lock(archive, box):
    fill(archive, box)
    linked = archive.folder / "elsewhere" / "linked.db"
    linked.parent.mkdir()
    linked.symlink_to(archive.state_db)
    with contextlib.closing(sqlite3.connect(f"{archive.state_db}.lock")) as holder:
        holder.isolation_level = None
        holder.execute("BEGIN EXCLUSIVE")
        assert archive(STATE_DB=linked).status == 11


def test_new_state_starts_beside_nothing_too(archive, box):
    write(box.root / "f", SMALL)
    assert archive("run", "--new-state").counts == (1, 0, 0)
    assert_all_archived(archive, box)
