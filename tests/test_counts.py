"""What a run costs, counted at the servers: round trips, requests, bytes, memory.

Trees of a million files as well: TEST_EFFORT=5.
"""

import contextlib
import re
import sqlite3
import threading
import time

import pytest
from conftest import MIB
from faults import EFFORT, LARGE, SIZES, SMALL, assert_all_archived, write
from faulty_sftp import LONG_AGO, FaultyBox, many_files
from scripted_s3 import error, until

QUIET = 0.15  # s without a request, after which a flight is taken to have ended

# Runs the program in a child, which has a peak of its own to report.
MEASURED = """
import os
child = os.fork()
if child:
    _, status, usage = os.wait4(child, 0)
    print("peak", usage.ru_maxrss, "KiB", file=sys.stderr, flush=True)
    os._exit(os.waitstatus_to_exitcode(status))
"""


# --- Round trips to the box -------------------------------------------------


def test_folder_and_small_file_cost_two_round_trips_each(archive_of):
    with FaultyBox(quiet=QUIET) as box:
        files = [f"d{n}/f{m}" for n in range(4) for m in range(5)]
        for name in files:
            write(box.root / name, SMALL)
        archive = archive_of(box)
        assert archive().status == 0
        for name in files:
            assert box.round_trips[name.encode()] == 2, name
            assert box.opened[name.encode()] == 1
        for number in range(4):
            assert box.round_trips[b"d%d" % number] == 2
        # All at once: not two for each, one after another.
        assert box.flights <= 16


def test_unchanged_file_costs_no_request_to_the_box(archive_of):
    with FaultyBox(quiet=QUIET) as box:
        for number in range(20):
            write(box.root / "d" / f"f{number}", SMALL)
        archive = archive_of(box)
        assert archive().status == 0
        box.round_trips.clear()
        assert archive().counts == (0, 20, 0)
        assert not [path for path in box.round_trips if b"f" in path]
        assert box.round_trips[b"d"] == 2


def test_run_takes_one_connection(archive_of):
    with FaultyBox() as box:
        for number in range(50):
            write(box.root / f"d{number % 7}" / f"f{number}", SMALL)
        write(box.root / "big", LARGE)
        archive = archive_of(box)
        assert archive(constants=SIZES).status == 0
        assert box.connections == box.requests["INIT"] == 1


def test_large_file_is_read_while_s3_begins_its_upload(archive_of, s3):
    """The box does not wait for S3's answer to CreateMultipartUpload."""
    with FaultyBox() as box:
        write(box.root / "big", LARGE)
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        is_read = threading.Event()
        box.on_data = is_read.set
        begun = s3.on("CreateMultipartUpload", until(is_read))
        limits = {"S3_READ_LIMIT": 5, "S3_ATTEMPTS": 1}
        assert archive(constants=SIZES | limits).counts == (1, 0, 0)
        assert begun.fired


# --- Requests to S3 ---------------------------------------------------------


def test_requests_to_s3_are_as_few_as_can_be(archive_of, strict_s3):
    """No HEAD: the answer to Complete has the checksum."""
    s3 = strict_s3
    with FaultyBox() as box:
        for number in range(20):
            write(box.root / f"small{number}", SMALL)
        write(box.root / "small0", SMALL, mtime=int(time.time()) + 86_400)  # a wrong clock's
        write(box.root / "large", LARGE)
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        assert archive(constants=SIZES).status == 0
        assert_all_archived(archive, box)
        of_large = {op: n for (op, key), n in s3.about.items() if key == "large"}
        assert of_large == {
            "CreateMultipartUpload": 1,
            "UploadPart": 2,
            "CompleteMultipartUpload": 1,
        }
        for number in range(20):
            of_small = {op: n for (op, key), n in s3.about.items() if key == f"small{number}"}
            assert of_small == {"PutObject": 1}

        s3.about.clear()
        assert archive(constants=SIZES).counts == (0, 21, 0)
        assert s3.about.total() == 0, "the state settles them all"


# --- Memory -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "limit"), [(MIB - 1, 32), (40 * MIB, 64)], ids=["small", "large"]
)
def test_bytes_held_never_exceed_the_memory_limit(archive_of, s3, size, limit):
    """S3 takes nothing until the program stops asking the box for more."""
    count = 2 * limit * MIB // size
    with FaultyBox(many_files(1, count, size)) as box:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url, MEMORY_LIMIT=f"{limit}M")
        held = []
        box.on_data = lambda: held.append(box.handed_out - s3.received)
        gate = threading.Event()
        s3.always("PutObject", until(gate))
        s3.always("UploadPart", until(gate))
        running = archive.start(constants=SIZES)
        wait_until_idle(box, running)
        assert box.handed_out >= limit * MIB // 4, "nothing was there to be held"
        gate.set()
        assert running.wait().counts == (count, 0, 0)
        assert max(held) <= limit * MIB


def test_large_file_is_read_while_the_last_part_of_another_one_is_sent(archive_of, s3):
    """Both would not fit into MEMORY_LIMIT as a whole."""
    size = 30 * MIB  # six parts
    with FaultyBox(many_files(1, 2, size)) as box:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url, MEMORY_LIMIT="48M")
        gate = threading.Event()
        s3.on("UploadPart", until(gate), key="d0/f0", nth=6)
        running = archive.start(constants=SIZES)
        wait_until_idle(box, running)
        read_before = box.handed_out
        gate.set()
        assert running.wait().counts == (2, 0, 0)
    assert read_before == 2 * size


def wait_until_idle(box, running):
    """Until the box has handed out something, and then nothing for a second."""
    before = -1
    while not box.handed_out or box.handed_out != before:
        before = box.handed_out
        assert running.process.poll() is None
        time.sleep(1)


@pytest.mark.as_users_do
def test_files_that_fail_do_not_keep_their_bytes(archive_of, s3):
    """Seen by what the process holds: the box may read on, whatever is kept."""
    size, count = 8 * MIB, 30
    s3.always("PutObject", error(400, "InvalidTag"))
    with FaultyBox(many_files(1, count, size)) as box:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url, MEMORY_LIMIT="32M")
        result = archive.start(before=MEASURED, constants={"SAME_FAILURES": 1_000}).wait()
    assert (result.status, len(result.failures)) == (3, count), result.stderr
    assert peak(result) < 256


def peak(result):
    """Peak resident memory, in MiB, of a run that was MEASURED."""
    return int(re.search(r"peak (\d+) KiB", result.stderr)[1]) / 1024


def peak_of_an_unchanged_run(archive_of, folders, files):
    """Peak resident memory, in MiB, of a run that finds all of these archived."""
    with FaultyBox() as box:
        archive = archive_of(box)
        assert archive().status == 0  # which makes the state
        box.tree = many_files(folders, files, SMALL)
        keys = [f"d{d}/f{f}" for d in range(folders) for f in range(files)]
        with contextlib.closing(sqlite3.connect(archive.state_db)) as db, db:
            db.executemany(
                "INSERT INTO files VALUES ('./' || ?, ?, ?, 0)",
                ((key, SMALL, LONG_AGO) for key in keys),
            )
            db.execute(
                "INSERT INTO objects (path, key) SELECT path, substr(path, 3) FROM files"
            )
        result = archive.start(before=MEASURED).wait(timeout=300)
        assert (result.status, result.counts) == (0, (0, folders * files, 0))
        return peak(result)


@pytest.mark.as_users_do
@pytest.mark.timeout(120 * EFFORT)
def test_memory_does_not_grow_with_the_number_of_files(archive_of):
    # Both have more folders than are listed ahead, whose names are in memory.
    small = peak_of_an_unchanged_run(archive_of, 70, 1_000)
    large = peak_of_an_unchanged_run(archive_of, 170, 1_000)
    assert large < small + 8
    wide = peak_of_an_unchanged_run(archive_of, 1, 100_000)
    assert wide < small + 48, "the names of one folder are held, and little else"
    if EFFORT >= 5:
        assert peak_of_an_unchanged_run(archive_of, 1_000, 1_000) < small + 8
    assert max(small, large, wide) < 256
