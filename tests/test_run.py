"""The ordinary job: what is on the box gets into the bucket, once, bit for bit."""

import os
import re
import socket
import subprocess
import time

import pytest
from conftest import MIB, OLD, fill, tree
from relay import Relay
from scripted_s3 import ScriptedS3, error
from servers import OpenSSH

# The smallest parts that S3 allows, so that a large file can be a small one here.
SMALL_PARTS = {"SMALL_FILE": 5 * MIB, "PART_SIZE": 5 * MIB}

COLD = "DEEP_ARCHIVE"


# For what does not depend on the server.
ONE_SERVER = pytest.mark.parametrize("box", [OpenSSH], indirect=True, ids=["openssh"])


def as_objects(root):
    """What the bucket must hold for a folder whose names need no escaping."""
    return {os.fsdecode(path): (size, crc, COLD) for path, (size, crc) in tree(root).items()}


# --- Everything arrives, once ---


@pytest.mark.as_users_do
def test_a_tree_arrives_bit_for_bit_and_a_second_run_writes_nothing(archive, box):
    sizes = [0, 1, 5 * MIB - 1, 5 * MIB, 5 * MIB + 1, 10 * MIB, 10 * MIB + 1]
    fill(box.root, {f"sizes/{size}": size for size in sizes})
    fill(box.root, {f"many/{n % 7}/{n}.txt": n for n in range(60)})
    fill(box.root, {"deep/a/b/c/d/e/f/g/file": 1000, "top": 1000})

    first = archive(constants=SMALL_PARTS)

    assert first.status == 0, first.stderr
    expected = as_objects(box.root)
    assert archive.objects() == expected
    assert archive.rows() == {f"./{key}": (size, OLD) for key, (size, *_) in expected.items()}
    assert first.counts == (len(expected), 0, 0)
    assert first.summary["Bytes uploaded"] == sum(s for s, *_ in expected.values())
    archive.assert_invariant()

    before = len(archive.bucket.writes())
    second = archive(constants=SMALL_PARTS)

    assert second.status == 0
    assert second.counts == (0, len(expected), 0)
    assert second.summary["Bytes uploaded"] == 0
    assert archive.bucket.writes()[before:] == []


@pytest.mark.as_users_do
@ONE_SERVER
def test_files_of_the_default_limits_arrive_bit_for_bit(archive, box):
    limit = 16 * MIB
    sizes = [limit - 1, limit, limit + 1]
    fill(box.root, {str(size): size for size in sizes})

    result = archive()

    assert result.status == 0, result.stderr
    assert archive.objects() == as_objects(box.root)
    archive.assert_invariant()


@pytest.mark.as_users_do
@ONE_SERVER
def test_new_and_changed_files_are_archived_and_nothing_else(archive, box):
    names = ["same", "grown", "touched", "rewritten", "folder/same"]
    fill(box.root, dict.fromkeys(names, b"first"))
    assert archive().counts == (5, 0, 0)
    before = len(archive.bucket.writes())

    fill(box.root, {"grown": b"first and more", "new": b"new"})
    fill(box.root, {"touched": b"first", "rewritten": b"other"}, mtime=OLD + 1)
    result = archive()

    assert result.counts == (3, 2, 0)
    assert result.compared == 1, "the touched one"
    written = {path for _, path, _ in archive.bucket.writes()[before:]}
    name = archive.bucket.name
    assert written == {f"/{name}/{key}" for key in ("grown", "new", "rewritten")}
    assert archive.objects() == as_objects(box.root)
    assert archive.rows()["./touched"] == (5, OLD + 1)
    archive.assert_invariant()


@ONE_SERVER
def test_what_vanished_from_the_box_stays_in_the_bucket(archive, box):
    fill(box.root, {"kept": b"kept", "gone": b"gone"})
    archive()
    os.unlink(box.root / "gone")

    result = archive()

    assert (result.status, result.counts) == (0, (0, 1, 0))
    assert set(archive.objects()) == {"kept", "gone"}
    archive.assert_invariant()


@ONE_SERVER
def test_an_empty_box_is_archived_with_status_0(archive):
    result = archive()

    assert result.status == 0
    assert result.counts == (0, 0, 0)
    assert archive.objects() == {}


@ONE_SERVER
def test_objects_carry_the_time_of_modification_as_rclone_writes_it(archive, box):
    fill(box.root, {"small": b"small", "large": 6 * MIB})

    archive(constants=SMALL_PARTS)

    for key in ("small", "large"):
        head = archive.bucket.client.head_object(Bucket=archive.bucket.name, Key=key)
        assert float(head["Metadata"]["mtime"]) == OLD


@pytest.mark.as_users_do
@ONE_SERVER
def test_the_summary_is_the_end_of_the_output_with_its_five_labels(archive, box):
    fill(box.root, {str(n): 1000 for n in range(1, 4)})

    lines = archive().stdout.splitlines()

    start = lines.index("==== SUMMARY ====")
    assert lines[start + 1 : start + 5] == [
        "Uploaded files : 3",
        "Skipped files  : 0",
        "Failed files   : 0",
        "Bytes uploaded : 3,000",
    ]
    assert re.fullmatch(r"Duration \(sec\) : \d+", lines[start + 5])


def test_bytes_that_had_to_be_sent_twice_are_counted_once(archive_of, asyncssh_box):
    fill(asyncssh_box.root, {"small": 1000, "large": 6 * MIB})
    archive = archive_of(asyncssh_box)
    with ScriptedS3(archive.bucket.moto.url) as s3:
        for operation in ("PutObject", "UploadPart"):
            s3.on(operation, error(503, "SlowDown"))

        result = archive(constants=SMALL_PARTS, AWS_ENDPOINT_URL=s3.url)

    assert result.counts == (2, 0, 0)
    assert result.summary["Bytes uploaded"] == 1000 + 6 * MIB
    assert archive.objects() == as_objects(asyncssh_box.root)
    archive.assert_invariant()


# --- What is left out ---


@ONE_SERVER
def test_hidden_entries_are_skipped_counted_and_reported(archive, box):
    fill(box.root, {"seen": b"seen", ".hidden": b"x", "folder/.hidden": b"x"})
    fill(box.root, {".folder/inside": b"x"})

    result = archive()

    assert result.status == 0
    assert set(archive.objects()) == {"seen"}
    assert re.search(r"(?i)hidden\D*\b3\b|\b3\b\D*hidden", result.output)


@ONE_SERVER
def test_include_hidden_archives_them(archive, box):
    fill(box.root, {"seen": b"seen", ".hidden": b"x", ".folder/inside": b"x"})

    assert archive(INCLUDE_HIDDEN="true").status == 0

    assert set(archive.objects()) == {"seen", ".hidden", ".folder/inside"}


@ONE_SERVER
@pytest.mark.parametrize("setting", ["EXCLUDE_PATHS", "EXCLUDE_DIRS"])
def test_exclusions_hold_for_files_and_folders_and_for_nothing_like_them(archive, box, setting):
    fill(
        box.root,
        {
            "cache/a": b"x",
            "cache/deep/b": b"x",
            "cache2/a": b"kept",
            "www/cache/a": b"kept",
            "www/skip.iso": b"x",
            "www/skip.iso.txt": b"kept",
            "kept": b"kept",
        },
    )

    result = archive(**{setting: "cache, www/skip.iso"})

    assert result.status == 0
    assert set(archive.objects()) == {"cache2/a", "www/cache/a", "www/skip.iso.txt", "kept"}


@ONE_SERVER
def test_exclusions_may_be_written_with_the_remote_path_before_them(archive, box):
    fill(box.root, {"base/cache/a": b"x", "base/file": b"x", "base/kept": b"kept"})

    archive(REMOTE_PATH="base", EXCLUDE_PATHS="base/cache,base/file")

    assert set(archive.objects()) == {"kept"}


@ONE_SERVER
def test_exclusions_may_be_globs(archive, box):
    fill(box.root, {"a.tmp": b"x", "b/c.tmp": b"x", "b/kept": b"kept", "d1/e": b"x"})

    archive(EXCLUDE_PATHS="*.tmp,b/*.tmp,d?")

    assert set(archive.objects()) == {"b/kept"}


def test_links_and_special_files_are_never_opened_and_do_no_harm(archive, box):
    fill(box.root, {"file": b"content", "folder/inside": b"content"})
    os.mkfifo(box.root / "fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(box.root / "socket"))
    for name, target in {
        "to-file": "file",
        "to-folder": "folder",
        "to-itself": "to-itself",
        "dangling": "nowhere",
        "folder/up": "..",
    }.items():
        os.symlink(target, box.root / name)

    result = archive()

    assert result.status == 0, result.stderr
    assert result.counts == (2, 0, 0)
    assert archive.objects() == as_objects(box.root)
    assert set(archive.rows()) == {"./file", "./folder/inside"}
    assert re.search(
        r"(?i)(link|special)\D*\b[257]\b|\b[257]\b\D*(link|special)", result.output
    )


# --- Trouble with single files ---


@pytest.mark.as_users_do
def test_unreadable_files_and_folders_fail_and_the_rest_is_archived(archive, box):
    """Also a folder without x, of which OpenSSH sends a listing without any entry."""
    fill(box.root, {"good": b"x", "secret": b"x", "closed/file": b"x", "z/good": b"x"})
    fill(box.root, {"only_r/file": b"x", "only_r/folder/file": b"x"})
    (box.root / "empty").mkdir()
    os.chmod(box.root / "secret", 0)
    os.chmod(box.root / "closed", 0)
    os.chmod(box.root / "only_r", 0o444)

    result = archive()

    assert result.status == 3
    assert set(archive.objects()) == {"good", "z/good"}
    assert set(archive.rows()) == {"./good", "./z/good"}
    failed = sorted(line.partition(":")[0] for line in result.failures)
    assert failed == ["./closed", "./only_r", "./secret"]
    assert all("permission" in line.lower() for line in result.failures)
    assert result.counts == (2, 0, 3)
    archive.assert_invariant()

    os.chmod(box.root / "secret", 0o644)
    os.chmod(box.root / "closed", 0o755)
    os.chmod(box.root / "only_r", 0o755)
    again = archive()

    assert (again.status, again.counts) == (0, (4, 2, 0))
    archive.assert_invariant()


@ONE_SERVER
def test_the_earlier_object_stays_when_a_new_version_cannot_be_read(archive, box):
    fill(box.root, {"file": b"first"})
    archive()
    fill(box.root, {"file": b"second"})
    os.chmod(box.root / "file", 0)

    result = archive()

    assert (result.status, result.counts) == (3, (0, 0, 1))
    assert archive.rows() == {"./file": (5, None)}, "still there, to be compared"
    assert archive.contents() == {"file": b"first"}

    fill(box.root, {"back": b"first"})
    os.replace(box.root / "back", box.root / "file")
    again = archive()

    assert (again.status, again.counts, again.compared) == (0, (0, 0, 0), 1)
    archive.assert_invariant()


# --- Shapes of the tree ---


@ONE_SERVER
def test_depth_is_no_limit(archive, box):
    # Not on ProFTPD: its own work grows with the third power of the depth.
    depth = 1100
    cwd = os.open(box.root, os.O_RDONLY)
    try:
        for level in range(depth):
            os.mkdir("d", dir_fd=cwd)
            below = os.open("d", os.O_RDONLY, dir_fd=cwd)
            os.close(cwd)
            cwd = below
            if level + 1 in (1, 500, depth):
                os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=cwd))
                os.utime("f", (OLD, OLD), dir_fd=cwd)
    finally:
        os.close(cwd)

    try:
        result = archive()
    finally:  # shutil's rmtree is recursive
        subprocess.run(["rm", "-rf", box.root / "d"], check=True)

    # The last is found, but its key would be longer than S3's limit.
    assert result.status == 3
    assert set(archive.objects()) == {"d/f", "d/" * 500 + "f"}
    [failure] = result.failures
    assert failure.startswith("./" + "d/" * depth + "f: ")
    assert "1,024" in failure or "1024" in failure
    archive.assert_invariant()


def test_a_large_folder_and_many_folders_are_walked_whole(archive_of, asyncssh_box):
    fill(asyncssh_box.root, {"plain": b"x"})
    for n in range(100):
        (asyncssh_box.root / f"folder{n}").mkdir()
    wide = asyncssh_box.root / "wide"
    wide.mkdir()
    for n in range(1200):
        (wide / f".{n}").touch()
    fill(asyncssh_box.root, {f"folder{n}/file": b"x" for n in range(0, 100, 5)})

    archive = archive_of(asyncssh_box)
    result = archive()

    assert result.status == 0
    assert archive.objects() == {
        key: value
        for key, value in as_objects(asyncssh_box.root).items()
        if not key.startswith("wide/.")
    }
    assert re.search("(?i)hidden.*1,200", result.output)


# --- Limits that the user sets ---


def test_after_max_runtime_nothing_new_is_started(archive_of, asyncssh_box):
    fill(asyncssh_box.root, {str(n): MIB for n in range(6)})
    archive = archive_of(asyncssh_box)

    result = archive(TRANSFERS="1", BANDWIDTH_LIMIT="1M", MAX_RUNTIME="1s")

    assert result.status == 3
    # One after the other; what is being read when it is over is left to the next run.
    assert len(archive.rows()) == result.counts[0] <= 1
    assert re.search(r"^Ended early +: MAX_RUNTIME", result.stdout, re.M)
    archive.assert_invariant()
    assert archive().status == 0
    assert archive.objects() == as_objects(asyncssh_box.root)


def test_bandwidth_limit_is_that_of_all_files_together(archive_of, asyncssh_box):
    fill(asyncssh_box.root, {str(n): MIB // 4 for n in range(8)})
    archive = archive_of(asyncssh_box)
    began = time.monotonic()
    assert archive(BANDWIDTH_LIMIT="1M").counts == (8, 0, 0)
    assert time.monotonic() - began >= 2  # s, for 2 MiB


# --- The lock, and the end by a signal ---


@pytest.fixture
def slow(archive_of, asyncssh_box):
    """An archive behind a relay, with a large file to read."""
    fill(asyncssh_box.root, {"large": 12 * MIB})
    with Relay(asyncssh_box.host, asyncssh_box.port) as relay:
        archive = archive_of(asyncssh_box)
        archive.settings.update(asyncssh_box.settings(port=relay.port))
        archive.relay = relay
        yield archive


def until(condition, limit=30):
    """Wait for a condition; the test fails if it does not come true."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.as_users_do
def test_a_second_run_ends_with_11_and_touches_nothing(slow):
    slow.relay.freeze(after=8 * MIB)
    first = slow.start(constants=SMALL_PARTS)
    noted = "SELECT 1 FROM uploads WHERE upload_id IS NOT NULL"
    until(lambda: slow.relay.frozen and slow.bucket.uploads() and slow.query(noted))
    database = slow.state_db.read_bytes()

    with (
        Relay(slow.box.host, slow.box.port) as to_box,
        Relay("127.0.0.1", slow.bucket.moto.port) as to_s3,
    ):
        second = slow(
            AWS_ENDPOINT_URL=f"http://{to_s3.host}:{to_s3.port}",
            **slow.box.settings(port=to_box.port),
        )

    assert second.status == 11
    assert len(second.stderr.splitlines()) == 1
    assert to_box.connections == to_s3.connections == 0
    assert slow.state_db.read_bytes() == database

    slow.relay.thaw()
    assert first.wait().status == 0
    slow.assert_invariant()


@pytest.mark.as_users_do
def test_a_run_after_one_that_was_killed_just_runs(slow):
    slow.relay.freeze(after=8 * MIB)
    first = slow.start(constants=SMALL_PARTS)
    until(lambda: slow.relay.frozen and slow.bucket.uploads())
    first.process.kill()
    first.process.wait()
    slow.relay.cut()
    slow.relay.thaw()

    result = slow()

    assert result.status == 0, result.stderr
    assert slow.objects() == as_objects(slow.box.root)
    slow.assert_invariant()


# The system starts no thread beyond these, as under a limit of processes or in a container.
# It refuses the first one when S3 has acknowledged a file, so that there is one to record.
FEW_THREADS = """
import threading
acknowledged = threading.Event()
put = archive.Bucket.put
def put_and_note(*values):
    stored = put(*values)
    acknowledged.set()
    return stored
archive.Bucket.put = put_and_note
start = threading.Thread.start
def start_few(thread):
    if threading.active_count() > 20:
        acknowledged.wait(30)
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = start_few
"""


@pytest.mark.as_users_do
@ONE_SERVER
def test_what_s3_has_acknowledged_is_recorded_though_no_thread_can_be_started(archive, box):
    for number in range(60):
        path = box.root / f"f{number}"
        path.write_bytes(b"content")
        os.utime(path, (OLD, OLD))
    result = archive.start(before=FEW_THREADS).wait()
    assert result.status == 1
    assert "can't start new thread" in result.stderr
    sent = archive.objects()
    assert sent
    assert {f"./{key}" for key in sent} == archive.rows().keys()
    result = archive()
    assert result.status == 0, result.stderr
    assert result.counts == (60 - len(sent), len(sent), 0)
