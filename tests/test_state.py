"""The state database: what is recorded, what is not, and what if it is lost."""

import os
import shutil
import sqlite3
from zlib import crc32

import pytest
from conftest import MIB, OLD, SNAPSHOT, earlier_database, fill
from scripted_s3 import error

SMALL_PARTS = {"SMALL_FILE": 5 * MIB, "PART_SIZE": 5 * MIB}

# No file may grow beyond this: what a full disk does to a database.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""


@pytest.fixture
def box(asyncssh_box):
    fill(asyncssh_box.root, {"a": b"aa", "folder/b": b"bbb"})
    return asyncssh_box


def integrity(path):
    with sqlite3.connect(path) as db:
        return db.execute("PRAGMA integrity_check").fetchone()[0]


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


def test_files_done_before_a_kill_are_recorded(archive, box):
    """A commit for each file: kill -9 loses what was under way and nothing else."""
    fill(box.root, {f"{n:02}": 2 * MIB for n in range(10)})
    running = archive.start(TRANSFERS="1", BANDWIDTH_LIMIT="4M")
    line = ""
    while line.count("archived") == 0 or "05" not in line:
        line = running.process.stderr.readline()
    running.process.kill()
    running.process.wait()

    assert {"./00", "./01", "./02", "./03", "./04"} <= set(archive.rows())
    archive.assert_invariant()


def test_an_object_of_a_failed_file_is_not_recorded(archive, box):
    os.chmod(box.root / "a", 0)

    assert archive().status == 3

    assert set(archive.rows()) == {"./folder/b"}
    assert archive.query("SELECT path FROM objects") == [("./folder/b",)]


# --- A database of an earlier script ---


def test_a_database_of_an_earlier_script_is_taken_over(archive, bucket):
    """Its files are in the bucket already, under the keys that we would give them."""
    for key, content in {"a": b"aa", "folder/b": b"bbb"}.items():
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=content)
    earlier_database(archive, [("./a", 2, OLD), ("./folder/b", 3, OLD)])
    before = len(bucket.writes())

    result = archive()

    assert (result.status, result.counts) == (0, (0, 2, 0))
    assert [w for w in bucket.writes()[before:] if SNAPSHOT not in w[1]] == []


def test_what_changed_since_an_earlier_script_is_archived(archive, box):
    earlier_database(archive, [("./a", 2, OLD), ("./folder/b", 3, OLD - 1)])

    result = archive()

    assert result.counts == (1, 1, 0)
    assert archive.rows() == {"./a": (2, OLD), "./folder/b": (3, OLD)}
    assert archive.contents() == {"folder/b": b"bbb"}


# --- Another destination, another source ---


@pytest.mark.parametrize(
    "setting, value",
    [
        ("S3_BUCKET", "another-bucket"),
        ("S3_PREFIX", "another/"),
        ("HETZNER_USER", "another"),
        ("REMOTE_PATH", "folder"),
    ],
)
def test_a_state_of_another_destination_or_source_is_refused(
    archive, box, bucket, setting, value
):
    archive()
    old = str(archive.settings.get(setting, ""))
    bucket.client.create_bucket(Bucket="another-bucket")
    before = len(bucket.writes())
    database = archive.state_db.read_bytes()
    if setting == "HETZNER_USER":
        box.user = value

    result = archive(**{setting: value})

    assert result.status == 1
    error = result.stderr
    assert setting in error and value in error and old in error
    assert "STATE_DB" in error  # what to do
    assert bucket.writes()[before:] == []
    assert archive.state_db.read_bytes() == database


def test_a_slash_after_remote_path_makes_no_other_place_of_it(archive):
    archive(REMOTE_PATH="folder")

    result = archive(REMOTE_PATH="folder/")

    assert (result.status, result.counts) == (0, (0, 1, 0))


# --- A database that is lost ---


def test_a_snapshot_of_the_state_is_beside_the_objects(archive, bucket, tmp_path):
    archive()

    [entry] = [entry for entry in bucket.list() if entry["Key"] == SNAPSHOT]
    assert entry["StorageClass"] == "STANDARD"
    snapshot = tmp_path / "snapshot.db"
    snapshot.write_bytes(bucket.content(SNAPSHOT))
    assert integrity(snapshot) == "ok"
    with sqlite3.connect(snapshot) as db:
        rows = db.execute("SELECT path, size FROM files ORDER BY path").fetchall()
    assert rows == [("./a", 2), ("./folder/b", 3)]


def test_a_run_that_archived_nothing_writes_no_snapshot(archive, bucket):
    archive()
    before = len(bucket.writes())

    archive()

    assert bucket.writes()[before:] == []


@pytest.mark.parametrize("loss", ["missing", "empty"])
def test_a_lost_database_is_taken_back_from_the_bucket(archive, box, loss):
    archive()
    archive.state_db.unlink()
    if loss == "empty":
        archive.state_db.touch()
    fill(box.root, {"new": b"new"})

    result = archive()

    assert (result.status, result.counts) == (0, (1, 2, 0))
    assert "snapshot" in result.stderr
    assert set(archive.rows()) == {"./a", "./folder/b", "./new"}
    archive.assert_invariant()


def without_snapshot(archive, bucket):
    bucket.client.delete_object(Bucket=bucket.name, Key=SNAPSHOT)


@pytest.mark.parametrize("loss", ["missing", "empty"])
def test_a_lost_database_without_a_snapshot_ends_the_run_with_the_way_out(
    archive, bucket, loss
):
    archive()
    without_snapshot(archive, bucket)
    archive.state_db.unlink()
    if loss == "empty":
        archive.state_db.touch()
    before = len(bucket.writes())

    # The second time tells that the first left no fresh database behind.
    for result in (archive(), archive()):
        assert result.status == 1
        assert "--new-state" in result.stderr
        assert bucket.writes()[before:] == []


def test_new_state_begins_anew_where_the_user_says_so(archive, bucket):
    archive()
    without_snapshot(archive, bucket)
    archive.state_db.unlink()

    result = archive("run", "--new-state")

    assert (result.status, result.counts) == (0, (2, 0, 0))
    archive.assert_invariant()


def test_other_objects_outside_of_the_prefix_are_no_lost_archive(archive_of, box, bucket):
    bucket.client.put_object(Bucket=bucket.name, Key="other/file", Body=b"x")

    result = archive_of(box, S3_PREFIX="mine/")()

    assert (result.status, result.counts) == (0, (2, 0, 0))


# --- A database in trouble ---


def assert_ends_before_any_upload(archive, bucket, **settings):
    """Status 1, the database named in one line, no write to the bucket."""
    before = len(bucket.writes())
    result = archive(**settings)
    assert result.status == 1
    assert str(archive.state_db) in result.stderr.splitlines()[-1]
    assert bucket.writes()[before:] == []
    return result


def test_a_damaged_database_ends_the_run_before_any_upload(archive, box, bucket):
    fill(box.root, {f"many/{n}": b"x" for n in range(300)})
    archive()
    content = bytearray(archive.state_db.read_bytes())
    content[4096:12288] = os.urandom(8192)
    archive.state_db.write_bytes(content)
    fill(box.root, {"new": b"new"})

    assert_ends_before_any_upload(archive, bucket)

    assert archive.state_db.read_bytes() == content


def test_a_file_that_is_no_database_ends_the_run_before_any_upload(archive, bucket):
    archive.state_db.write_bytes(b"not a database, but somebody's file\n" * 100)

    assert_ends_before_any_upload(archive, bucket)

    assert archive.state_db.read_bytes().startswith(b"not a database")


def test_a_read_only_database_ends_the_run_before_any_upload(archive, box, bucket):
    archive()
    # A format version that this SQLite may read, but not write; unlike the file's
    # mode it holds for root as well (https://www.sqlite.org/fileformat.html, 1.3.3).
    with archive.state_db.open("r+b") as file:
        file.seek(18)
        file.write(b"\x03")
    fill(box.root, {"new": b"new"})

    assert_ends_before_any_upload(archive, bucket)


def test_a_database_that_another_program_holds_ends_the_run_before_any_upload(
    archive, box, bucket
):
    archive()
    fill(box.root, {"new": b"new"})
    other = sqlite3.connect(archive.state_db)
    other.execute("BEGIN EXCLUSIVE")
    try:
        assert_ends_before_any_upload(archive, bucket)
    finally:
        other.close()


def test_a_state_path_whose_folder_is_missing_ends_the_run_with_its_path(archive, bucket):
    archive.state_db = archive.folder / "no" / "such" / "state.db"

    assert_ends_before_any_upload(archive, bucket, STATE_DB=archive.state_db)


def test_a_disk_that_fills_up_stops_the_uploads_and_harms_no_row(archive, box, bucket):
    archive()
    rows = archive.rows()
    fill(box.root, {f"many/{'x' * 200}{n:04}": b"x" for n in range(400)})
    limit = archive.state_db.stat().st_size + 20_000

    result = archive(before=FULL_DISK.format(limit=limit), LOG_FILE="")

    assert result.status == 1
    assert str(archive.state_db) in result.output
    assert rows.items() <= archive.rows().items()
    assert len(archive.objects()) < 402
    archive.assert_invariant()

    assert archive().status == 0
    assert len(archive.rows()) == 402
    archive.assert_invariant()


def test_a_database_may_be_moved_with_its_settings(archive, tmp_path):
    archive()
    moved = tmp_path / "moved.db"
    shutil.move(archive.state_db, moved)
    archive.state_db = moved

    assert archive(STATE_DB=moved).counts == (0, 2, 0)


def test_the_crc_that_is_kept_is_that_of_the_content(archive, box):
    fill(box.root, {"large": 6 * MIB})
    archive(constants=SMALL_PARTS)

    kept = dict(archive.query("SELECT path, crc32 FROM objects"))

    assert kept["./a"] == crc32(b"aa")
    assert kept["./large"] == crc32((box.root / "large").read_bytes())


@pytest.mark.parametrize("prefix", ["", "typo/"])
def test_an_earlier_scripts_state_of_another_bucket_is_doubted(archive, bucket, prefix):
    earlier_database(archive, [("./a", 2, OLD), ("./folder/b", 3, OLD)])
    bucket.client.put_object(Bucket=bucket.name, Key="folder/b", Body=b"abc")
    result = archive(S3_PREFIX=prefix)
    assert result.status == 0
    assert ("is not in s3://" in result.stderr) == bool(prefix)
    assert ("is not in s3://" in archive(S3_PREFIX=prefix).stderr) == bool(prefix)


@pytest.mark.parametrize("lost", [False, True])
def test_what_is_archived_now_does_not_vouch_for_an_earlier_script(archive, box, lost):
    """Nor does the snapshot of it."""
    earlier_database(archive, [("./a", 2, OLD)])
    fill(box.root, {"new": b"new"})
    assert "is not in s3://" in archive().stderr
    if lost:
        archive.state_db.unlink()
    result = archive()
    assert result.status == 0
    assert "is not in s3://" in result.stderr


def test_an_earlier_scripts_state_is_not_tied_while_s3_does_not_tell(
    archive_of, box, bucket, s3
):
    archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
    earlier_database(archive, [("./a", 2, OLD), ("./folder/b", 3, OLD)])
    s3.always("HeadObject", error(403, "AccessDenied"))
    assert archive(S3_PREFIX="rihgt/").status == 0
    s3.rules.clear()
    for key, content in {"a": b"aa", "folder/b": b"bbb"}.items():
        bucket.client.put_object(Bucket=bucket.name, Key=f"right/{key}", Body=content)
    assert archive(S3_PREFIX="right/").status == 0
    assert archive(S3_PREFIX="rihgt/").status == 1, "it is tied now"


def test_what_is_archived_before_s3_tells_of_an_earlier_scripts_objects_is_paid_once(
    archive_of, box, bucket, s3
):
    """Its policy may not have allowed to ask."""
    archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
    bucket.client.put_object(Bucket=bucket.name, Key="a", Body=b"aa")
    earlier_database(archive, [("./a", 2, OLD)])
    fill(box.root, {"a": b"aa", "new": b"new"})
    s3.on("HeadObject", error(403, "AccessDenied"), key="a")

    uploaded, skipped, _ = archive().counts
    assert (uploaded > 0, skipped) == (True, 1)
    assert archive().counts == (0, uploaded + skipped, 0)


@pytest.mark.parametrize("wrong", [{"S3_PREFIX": "rihgt/"}, {"S3_BUCKET": "another"}])
def test_an_earlier_scripts_state_is_not_tied_to_a_mistyped_place(archive, box, bucket, wrong):
    contents = {"a": b"aa", "folder/b": b"bbb"}
    for key, content in contents.items():
        bucket.client.put_object(Bucket=bucket.name, Key=f"right/{key}", Body=content)
    earlier_database(archive, [("./a", 2, OLD), ("./folder/b", 3, OLD)])
    fill(box.root, contents)
    fill(box.root, {"new": b"new"})

    bucket.client.create_bucket(Bucket="another")

    wrong = {"S3_PREFIX": "right/", **wrong}
    assert archive(**wrong).counts == (1, 2, 0)
    repair = archive("verify", "--repair", **wrong)
    assert repair.status == 1
    assert "archive.py run" in repair.stderr
    result = archive(S3_PREFIX="right/")

    assert (result.status, result.counts) == (0, (1, 2, 0)), result.stderr
    assert archive("verify", S3_PREFIX="right/").status == 0
    assert archive(S3_PREFIX="right/").counts == (0, 3, 0)
