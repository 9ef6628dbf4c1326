"""kill -9 at any instant: what the state says stays true, and the end is complete.

More rounds: TEST_EFFORT=50. The same rounds again: TEST_SEED=the seed printed.
"""

import contextlib
import random
import subprocess
import time

import faulty_sftp
import pytest
from faults import (
    EFFORT,
    LARGE,
    SEED,
    SIZES,
    SMALL,
    assert_all_archived,
    assert_rows_are_true,
    recorded,
    strict_fixtures,
    wait_for,
    write,
)
from faulty_sftp import freeze, unanswered
from scripted_s3 import first, lost_answer, reset

ROUNDS = 4 * EFFORT
A_RUN = 2.5  # s, about what a whole run takes here

# Requests that each run makes here before it has come to its last file.
INSTANTS = [
    *(("box", kind, 1) for kind in ("INIT", "OPENDIR", "READDIR", "CLOSE")),
    *(("box", kind, nth) for kind in ("OPEN", "FSTAT", "READ") for nth in (1, 2, 3)),
    *(("s3", "PutObject", nth) for nth in (1, 2, 3)),
    ("s3", "CreateMultipartUpload", 1),
    ("s3", "UploadPart", 1),
    ("s3", "UploadPart", 2),
    ("s3", "CompleteMultipartUpload", 1),
]


box, s3, archive = strict_fixtures()


def kill_at(archive, s3, operation, fault, nth):
    """Kill the run at the `nth` of these requests; then S3 meets it with `fault`."""
    s3.on(operation, first(archive.kill, fault), nth=nth)


@pytest.mark.as_users_do
@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_run_that_is_killed_again_and_again_ends_complete(archive, box, s3):
    print(f"TEST_SEED={SEED}")
    draw = random.Random(SEED)
    names = [*(f"small{n}" for n in range(20)), *(f"large{n}" for n in range(3))]
    for round_ in range(ROUNDS):
        for name in draw.sample(names, 8):  # new and changed ones
            size = LARGE if name.startswith("large") else SMALL
            write(box.root / name, size + round_, mtime=1_700_000_000 + round_)
        if draw.random() < 0.3:
            running = archive.start(constants=SIZES)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(draw.uniform(0.3, A_RUN))
            running.process.kill()
        else:
            # At a request, before S3 got it or when S3 has done what it asks for.
            fault = draw.choice([reset, lost_answer])
            kill_at(archive, s3, None, fault, nth=draw.randint(1, 25))
            running = archive.start(constants=SIZES)
        running.process.wait()
        wait_for(lambda: not s3.under_way)
        s3.rules.clear()
        assert_rows_are_true(archive)
    result = archive(constants=SIZES)
    assert result.status == 0, result.stderr
    assert_all_archived(archive, box)


@pytest.mark.parametrize("at", [30, 99])
def test_signal_loses_nothing_that_s3_has_stored(archive, box, s3, at):
    """While small files go up, what has arrived is being committed nearly all the time."""
    for number in range(150):
        write(box.root / f"f{number}", 100)
    s3.on("PutObject", first(archive.terminate), nth=at)
    ended = archive()
    assert ended.status == 143
    assert at <= ended.counts[0] < 150
    assert archive.rows().keys() == {f"./{key}" for key in archive.objects()}
    assert archive().status == 0
    assert {s3.about["PutObject", f"f{number}"] for number in range(150)} == {1}


def test_what_s3_has_stored_is_recorded_while_the_walk_finds_only_folders(archive, box, s3):
    def at_depth(depth, action):
        box.on("OPENDIR", b"/".join([b"d"] * depth), faulty_sftp.first(action))

    write(box.root / "f", SMALL)
    box.root.joinpath(*["d"] * 60).mkdir(parents=True)
    at_depth(30, lambda: wait_for(lambda: s3.requests["PutObject"] and not s3.under_way))
    at_depth(60, archive.kill)
    box.always("OPENDIR", None, faulty_sftp.first(lambda: time.sleep(0.05)))
    # No listing takes this long, but the last 30 together do.
    running = archive.start(constants={"COMMIT_PAUSE": 0.3})
    assert running.wait().status == -9
    assert recorded(archive).keys() == {"./f"}


@pytest.mark.parametrize(
    ("operation", "nth"),
    [("CreateMultipartUpload", 1), ("UploadPart", 2), ("CompleteMultipartUpload", 1)],
)
def test_upload_of_a_file_that_is_gone_after_a_kill_is_aborted_and_nobody_elses(
    archive, box, s3, bucket, operation, nth
):
    """The kill comes when S3 has done what was asked, and nobody was told."""
    write(box.root / "big", LARGE)
    for key in ("other", "big.other", "bi"):
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    others = bucket.upload_ids()
    kill_at(archive, s3, operation, lost_answer, nth)
    running = archive.start(constants=SIZES)
    assert running.wait().status == -9
    wait_for(lambda: not s3.under_way)
    assert_rows_are_true(archive)
    left = bucket.upload_ids() - others
    assert len(left) == (operation != "CompleteMultipartUpload")

    (box.root / "big").unlink()  # even if there is nothing to archive any more
    write(box.root / "small", SMALL)
    result = archive(constants=SIZES)
    assert result.status == 0, result.stderr
    assert bucket.upload_ids() == others
    s3.requests.clear()
    assert "aborted" not in archive(constants=SIZES).stderr
    assert s3.requests.total() == 0  # nothing is left to be asked about


@pytest.mark.timeout(45)  # the box owes its answer for 60 s
def test_what_s3_has_is_recorded_while_the_box_is_silent_about_a_folder(archive, box):
    write(box.root / "a", SMALL)
    write(box.root / "b" / "c", SMALL)
    box.always("OPENDIR", b"b", unanswered)
    running = archive.start(constants=SIZES)
    wait_for(lambda: archive.objects() and archive.rows())
    running.process.kill()
    running.process.wait()
    assert recorded(archive).keys() == {"./a"}
    assert_rows_are_true(archive)


@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_run_that_is_told_to_stop_at_any_instant_ends_and_the_next_ones_go_on(archive, box, s3):
    """It cannot end on its own here, since the box never gives the last file."""
    print(f"TEST_SEED={SEED}")
    draw = random.Random(SEED)
    for round_ in range(ROUNDS):
        for name in ("large", "small1", "small2", "small3", "zzz"):
            size = LARGE if name == "large" else SMALL
            write(box.root / name, size + round_, mtime=1_700_000_000 + round_)
        server, what, nth = draw.choice(INSTANTS)
        if server == "s3":
            s3.on(what, first(archive.terminate), nth=nth)
        else:
            box.on(what, None, faulty_sftp.first(archive.terminate), nth=nth)
        box.always("READ", b"zzz", freeze)
        # One file after another, so that all of these instants come before that.
        running = archive.start(constants={**SIZES, "STOP_LIMIT": 2}, TRANSFERS=1)
        result = running.wait(timeout=20)
        assert result.status == 143, (server, what, nth, result.stderr)
        box.rules.clear()
        s3.rules.clear()
        assert_rows_are_true(archive)
        archive.assert_invariant()  # what is left in the bucket is known to the state
    assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)
