"""Large files whose upload was interrupted: the next run goes on with them."""

import base64
import json
import os
import random
import re
import subprocess
import threading
import time
from collections import Counter
from functools import partial
from zlib import crc32

import pytest
from conftest import MIB
from faults import (
    LARGE,
    SEED,
    SIZES,
    SMALL,
    assert_all_archived,
    assert_failed,
    assert_rows_are_true,
    max_runtime_at,
    strict_fixtures,
    wait_for,
    write,
)
from faulty_sftp import PERMISSION_DENIED, drop, first, freeze, status
from relay import Relay
from scripted_s3 import (
    cut_headers,
    error,
    hang,
    lost_answer,
    proxy_page,
    reset,
    rewritten,
    until,
)
from scripted_s3 import first as first_in_s3

PART = SIZES["PART_SIZE"]
PARTS = 4
BIG = (PARTS - 1) * PART + 1_000  # bytes
# One part after the other, so that it is known which have arrived.
IN_ORDER = {**SIZES, "PARTS_AT_ONCE": 1}


box, s3, archive = strict_fixtures()


def sent(s3, key="big"):
    """How often each part of a file has arrived at S3, by its number."""
    return Counter(number for name, number, _ in s3.parts if name == key)


def interrupt(archive, s3, at_part=4, **settings):
    """A run that is killed when S3 has all parts before that one."""
    s3.on("UploadPart", first_in_s3(archive.kill, reset), nth=at_part)
    result = archive.start(constants=IN_ORDER, **settings).wait()
    assert result.status == -9
    wait_for(lambda: not s3.under_way)
    s3.rules.clear()
    assert_rows_are_true(archive)
    assert archive.query("SELECT path FROM uploads") == [("./big",)]


def any_of(*conditions):
    return any(condition() for condition in conditions)


def slow_source(box, seconds, path=b"big"):
    """Each READ, which is of 252 KiB at most, takes that long."""
    box.always("READ", path, first(lambda: time.sleep(seconds)))


# --- Going on ---------------------------------------------------------------


def test_next_run_after_a_kill_goes_on_behind_the_stored_parts(archive, box, s3):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    assert sent(s3) == dict.fromkeys([1, 2, 3], 1)
    box.reads.clear()
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert result.summary["Bytes uploaded"] == BIG
    assert sent(s3) == dict.fromkeys(range(1, PARTS + 1), 1)
    assert sum(size for _, _, size in s3.parts) == BIG
    assert min(offset for path, offset, _ in box.reads if path == b"big") == 3 * PART
    assert s3.requests["CreateMultipartUpload"] == 1
    assert_all_archived(archive, box)


def test_plan_counts_what_an_unfinished_upload_may_need(archive, box, s3):
    """A LIST of its parts, and a HEAD if S3 does not have it any more."""
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    plan = archive("plan", "--json", constants=SIZES)
    assert json.loads(plan.stdout)["requests"] == {
        "put": 0,
        "create": 1,
        "part": PARTS,
        "complete": 1,
        "head": 1,
        "list": 1,
    }
    text = archive("plan", constants=SIZES).stdout
    assert f": 1 create, {PARTS} part, 1 complete, 1 head, 1 list\n" in text


def test_another_memory_limit_goes_on_behind_the_stored_parts(archive, box, s3):
    write(box.root / "big", 33 * MIB)
    s3.on("UploadPart", first_in_s3(archive.kill, reset), nth=3)
    assert archive.start(constants={"PARTS_AT_ONCE": 1}).wait().status == -9
    wait_for(lambda: not s3.under_way)
    assert archive(MEMORY_LIMIT="32M").counts == (1, 0, 0)
    assert sent(s3) == {1: 1, 2: 1, 3: 1}
    assert_all_archived(archive, box)


def test_part_that_arrived_though_its_answer_was_lost_is_not_sent_again(archive, box, s3):
    write(box.root / "big", BIG)
    s3.on("UploadPart", first_in_s3(archive.kill, lost_answer), nth=3)
    assert archive.start(constants=IN_ORDER).wait().status == -9
    wait_for(lambda: not s3.under_way)
    assert archive(constants=SIZES).status == 0
    assert sent(s3) == dict.fromkeys(range(1, PARTS + 1), 1)
    assert_all_archived(archive, box)


@pytest.mark.parametrize("parts", [1, PARTS], ids=["one part", "all parts"])
def test_going_on_at_the_first_or_the_last_part_is_right(archive, box, s3, parts):
    """All are there if the kill came before the request that completes them; S3 has a part
    that is as large as the others as the last one here."""
    write(box.root / "big", PARTS * PART)
    s3.on("CompleteMultipartUpload", first_in_s3(archive.kill, reset))
    s3.on("UploadPart", first_in_s3(archive.kill, reset), nth=parts + 1)
    assert archive.start(constants=IN_ORDER).wait().status == -9
    wait_for(lambda: not s3.under_way)
    s3.rules.clear()
    assert archive(constants=SIZES).status == 0
    assert sum(sent(s3).values()) <= PARTS + (parts == PARTS)
    assert_all_archived(archive, box)


@pytest.mark.parametrize("how", ["SIGTERM", "MAX_RUNTIME", "box gone", "S3 gone"])
def test_parts_stay_however_the_run_ends_and_the_next_one_goes_on(
    archive_of, box, s3, tmp_path, how
):
    write(box.root / "big", 8 * PART)
    sign = tmp_path / "over"

    def run_out_of_time():
        sign.touch()
        wait_for(lambda: not box.transports[-1].is_active())  # it has begun to end

    with Relay(box.host, box.port) as relay:
        archive = archive_of(box, **box.settings(port=relay.port), AWS_ENDPOINT_URL=s3.url)
        happens = {
            "SIGTERM": archive.terminate,
            "MAX_RUNTIME": run_out_of_time,
            "box gone": relay.stop,
            "S3 gone": lambda: s3.always("UploadPart", reset),
        }[how]
        s3.on("UploadPart", first_in_s3(happens), nth=2)
        limits = {"RECONNECT_PAUSES": (0, 0), "S3_ATTEMPTS": 2, "READ_WINDOW": MIB}
        settings = max_runtime_at(sign) if how == "MAX_RUNTIME" else {}
        result = archive.start(constants={**IN_ORDER, **limits}, **settings).wait()
        statuses = {"SIGTERM": 143, "MAX_RUNTIME": 3, "box gone": 1, "S3 gone": 3}
        assert result.status == statuses[how], result.stderr
        assert result.summary["Uploaded files"] == 0
        # The others are not the file's failure.
        assert len(result.failures) == (how == "S3 gone"), result.stderr
        archive.assert_invariant()
        assert 1 <= len(s3.parts) < 8
        s3.rules.clear()
        if how == "box gone":
            relay.start()
        assert archive(constants=SIZES).counts == (1, 0, 0)
    assert sent(s3) == dict.fromkeys(range(1, 9), 1)
    assert_all_archived(archive, box)


def test_file_that_is_killed_every_few_seconds_is_complete_in_the_end(archive, box, s3):
    print(f"TEST_SEED={SEED}")
    draw = random.Random(SEED)
    write(box.root / "big", 2 * BIG)
    slow_source(box, 0.03)  # 0.6 s for a part
    kills, result = 0, None
    while result is None:
        arrived = threading.Event()
        s3.on("UploadPart", first_in_s3(arrived.set))
        running = archive.start(constants=SIZES)
        # Or nothing was left to be sent.
        wait_for(
            partial(any_of, arrived.is_set, lambda p=running.process: p.poll() is not None)
        )
        try:
            result = running.wait(timeout=draw.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            archive.kill()
            kills += 1
            wait_for(lambda: not s3.under_way)
            s3.rules.clear()
            assert_rows_are_true(archive)
    assert result.status == 0
    assert kills >= 2
    # The source is slower than S3, so that hardly anything is in flight.
    assert sum(sent(s3).values()) <= 2 * PARTS - 1 + kills
    assert_all_archived(archive, box)


def test_file_is_complete_in_the_end_though_max_runtime_is_far_too_short(archive, box, s3):
    """Night after night, and with a source that takes four times as long."""
    parts = 6
    write(box.root / "big", (parts - 1) * PART + 1_000)
    slow_source(box, 0.04)  # 0.8 s for a part
    results = []
    while not results or results[-1].status == 3:
        results.append(archive(constants={**SIZES, "READ_WINDOW": MIB}, MAX_RUNTIME="2s"))
        assert results[-1].failures == []
        assert len(results) <= 5 * parts  # a slow login may leave a run no time
        archive.assert_invariant()
    assert results[-1].status == 0, results[-1].stderr
    assert len(results) > 2
    assert sent(s3) == dict.fromkeys(range(1, parts + 1), 1)
    assert_all_archived(archive, box)


@pytest.mark.parametrize("silent", ["box", "S3"])
def test_max_runtime_ends_a_large_file_also_if_nothing_answers_any_more(
    archive, box, s3, silent
):
    """With the limits as they are it takes at most a minute."""
    write(box.root / "big", BIG)
    if silent == "box":
        box.on("READ", b"big", freeze, at=2 * PART)
    else:
        s3.always("UploadPart", hang)
    began = time.monotonic()
    result = archive(constants={**SIZES, "RUNTIME_GRACE": 2, "STOP_LIMIT": 1}, MAX_RUNTIME="1s")
    assert time.monotonic() - began < 1 + 2 + 1 + 5
    assert result.status == 3, result.stderr
    assert result.summary
    assert "MAX_RUNTIME" in result.output
    archive.assert_invariant()


def test_limits_after_max_runtime_are_less_than_a_minute_together(archive, box):
    write(box.root / "f", SMALL)
    total = "assert archive.RUNTIME_GRACE + archive.STOP_LIMIT < 60"
    assert archive.start(before=total).wait().status == 0


@pytest.mark.parametrize("how", ["another file", "MAX_RUNTIME"])
def test_part_that_is_under_way_when_the_run_has_to_end_is_sent(
    archive, box, s3, tmp_path, how
):
    """And the run ends then, though the end is seen by s3transfer's threads, too."""
    s3.take_little_ahead()
    write(box.root / "big", 8 * PART)
    write(box.root / "small", SMALL)
    sign = tmp_path / "over"

    def hold(exchange):
        """Take the part only when the run has to end: it could not be cut off any more."""
        if how == "MAX_RUNTIME":
            sign.touch()
        wait_for(lambda: not box.transports[-1].is_active())  # it has begun to end
        time.sleep(1)  # so that s3transfer's threads have seen it
        return exchange.forward()

    held = s3.on("UploadPart", hold)
    settings = {"BANDWIDTH_LIMIT": "10M"}
    if how == "MAX_RUNTIME":
        settings |= max_runtime_at(sign)
    else:
        refused = error(403, "AccessDenied")
        s3.on("PutObject", first_in_s3(lambda: wait_for(lambda: held.fired), then=refused))
    running = archive.start(constants={**SIZES, "READ_WINDOW": MIB}, **settings)
    result = running.wait()
    assert result.status == (1 if how == "another file" else 3), result.stderr
    assert 0 < s3.requests["UploadPart"] == len(sent(s3)) < 8
    stored = f"S3 has {len(sent(s3)) * PART:,} of {8 * PART:,} bytes"
    assert f"unfinished ./big: {stored}" in result.stderr.splitlines()
    assert archive(constants=SIZES).status == 0
    assert sent(s3) == dict.fromkeys(range(1, 9), 1)
    assert_all_archived(archive, box)


# --- Beginning anew ---------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({1: PART + 1, 2: PART}, id="another size"),
        pytest.param({2: PART, 3: PART}, id="the first is missing"),
        pytest.param({1: None, 3: PART}, id="one between is missing"),
        pytest.param({1: (PART, "no CRC-32"), 2: (PART, "no CRC-32")}, id="no CRC-32"),
    ],
)
def test_parts_that_cannot_be_used_are_not_and_the_file_is_sent_anew(
    archive, box, s3, bucket, parts
):
    """Parts with other bytes, so that it would be seen; None stands for the right ones.  The
    state has the id of an upload with these parts."""
    write(box.root / "big", BIG)
    interrupt(archive, s3, at_part=1)
    (ours,) = bucket.upload_ids()
    upload = {"Bucket": bucket.name, "Key": "big"}
    bucket.client.abort_multipart_upload(**upload, UploadId=ours)
    summed = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
    begun = bucket.client.create_multipart_upload(**upload, **summed)
    made = {**upload, "UploadId": begun["UploadId"]}
    archive.execute("UPDATE uploads SET upload_id = ?", begun["UploadId"])
    for number, what in parts.items():
        size, no_crc = what if isinstance(what, tuple) else (what, False)
        data = os.urandom(size) if size else (box.root / "big").read_bytes()[:PART]
        bucket.client.upload_part(**made, PartNumber=number, Body=data)
        if not no_crc:
            s3.part_sums["big", begun["UploadId"], number] = crc32(data), len(data)
    s3.parts.clear()
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert bucket.upload_ids() == set()
    assert sent(s3) == {
        number: 1 for number in range(1, PARTS + 1) if number not in parts or parts[number]
    }
    assert_all_archived(archive, box)


def other_mtime(path):
    os.utime(path, (1_700_000_005,) * 2)


def other_content(path):
    write(path, path.stat().st_size, mtime=1_700_000_005)
    path.write_bytes(path.read_bytes()[::-1])
    other_mtime(path)


def other_size(path):
    write(path, BIG + 1)


def small_now(path):
    write(path, SMALL)


@pytest.mark.parametrize("change", [other_content, other_size, small_now])
def test_file_that_has_changed_since_is_sent_anew_and_its_parts_are_aborted(
    archive, box, s3, bucket, change
):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    old = bucket.upload_ids()
    change(box.root / "big")
    s3.parts.clear()
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert len(old) == 1
    assert bucket.upload_ids() == set()
    assert sum(size for _, _, size in s3.parts) in (0, (box.root / "big").stat().st_size)
    assert_all_archived(archive, box)


def test_parts_of_a_size_that_is_not_used_any_more_are_aborted(archive, box, s3, bucket):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    result = archive(constants={**SIZES, "PART_SIZE": 8 * MIB})
    assert result.status == 0, result.stderr
    assert bucket.upload_ids() == set()
    assert_all_archived(archive, box)


def test_file_that_changes_while_it_goes_on_is_not_recorded(archive, box, s3):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    box.on("OPEN", b"big", first(lambda: other_content(box.root / "big")))
    assert_failed(archive(constants=SIZES), {"big": "changed"})
    assert archive.rows() == {}
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert_all_archived(archive, box)


def test_parts_of_a_version_that_was_never_listed_are_not_gone_on_with(archive, box, s3):
    """Another version is there when the file is opened, and the first one again, with its
    size and mtime, when the next run comes."""
    path = box.root / "big"
    write(path, BIG)
    content, times = path.read_bytes(), (path.stat().st_mtime,) * 2
    box.on("OPEN", b"big", first(lambda: other_content(path)))
    s3.on("UploadPart", first_in_s3(archive.kill, reset), nth=3)
    result = archive.start(constants=IN_ORDER).wait()
    assert result.status in (-9, 3), result.stderr
    wait_for(lambda: not s3.under_way)
    s3.rules.clear()
    path.write_bytes(content)
    os.utime(path, times)
    assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)


def test_parts_of_another_source_are_not_gone_on_with(archive, box, s3):
    """The file of that path, size and mtime has other content there."""
    path = box.root / "big"
    write(path, BIG)
    interrupt(archive, s3)
    times = (path.stat().st_mtime,) * 2
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, times)
    box.user = archive.settings["HETZNER_USER"] = "another"
    assert archive("run", "--new-source", constants=SIZES).counts == (1, 0, 0)
    assert archive.contents()["big"] == path.read_bytes()
    assert_all_archived(archive, box)


def test_file_that_is_emptied_after_it_was_listed_fails_with_the_reason(archive, box, s3):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    box.on("OPEN", b"big", first(lambda: os.truncate(box.root / "big", 0)))
    assert_failed(archive(constants=SIZES), {"big": "changed since it was listed"})
    assert archive(constants=SIZES).counts == (1, 0, 0)
    archive.assert_invariant()


@pytest.mark.parametrize("row", [False, True], ids=["a new file", "one that was compared"])
def test_file_that_is_rewritten_within_its_second_is_not_gone_on_with(archive, box, s3, row):
    """Its parts would be of two versions that have the same size and mtime."""
    path = box.root / "big"
    if row:
        write(path, BIG)
        assert archive(constants=IN_ORDER).status == 0
        s3.requests.clear()
    now = int(time.time())
    path.write_bytes(os.urandom(BIG))
    os.utime(path, (now, now))
    s3.on("UploadPart", first_in_s3(archive.kill, reset), nth=3)
    assert archive.start(constants={**IN_ORDER, "RECENT": 60}).wait().status == -9
    wait_for(lambda: not s3.under_way)
    assert s3.requests["UploadPart"] == 3
    s3.rules.clear()
    path.write_bytes(os.urandom(BIG))
    os.utime(path, (now, now))
    assert archive(constants=SIZES).status == 0
    assert_rows_are_true(archive)
    assert archive.contents()["big"] == path.read_bytes()


# --- Whose uploads ----------------------------------------------------------


def test_uploads_of_other_people_stay_also_of_keys_that_begin_alike(archive, box, s3, bucket):
    write(box.root / "big", BIG)
    write(box.root / "new", LARGE)  # of which somebody else has an upload under way, too
    for key in ("bigger", "big/x", "bi", "other", "new"):
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    others = bucket.upload_ids()
    interrupt(archive, s3, EXCLUDE_PATHS="new")
    assert len(bucket.upload_ids() - others) == 1
    assert archive(constants=SIZES).status == 0
    (box.root / "big").unlink()
    assert archive(constants=SIZES).status == 0
    assert bucket.upload_ids() == others


@pytest.mark.parametrize("how", ["gone", "excluded", "archived since"])
def test_upload_of_a_file_that_is_gone_or_excluded_is_aborted_after_a_whole_walk(
    archive, box, s3, bucket, how
):
    write(box.root / "big", BIG)
    write(box.root / "folder" / "f", SMALL)
    interrupt(archive, s3)
    settings = {}
    if how == "gone":
        (box.root / "big").unlink()
    elif how == "excluded":
        settings = {"EXCLUDE_PATHS": "big"}
    else:  # perhaps by a run with another machine's state
        size, mtime = BIG, int((box.root / "big").stat().st_mtime)
        row = ("./big", size, mtime, mtime)
        archive.execute("INSERT INTO files VALUES (?, ?, ?, ?)", *row)
        archive.execute("INSERT INTO objects VALUES (?, 'big', 'e', 1, NULL)", "./big")
    unlistable = box.always("OPENDIR", b"folder", status(PERMISSION_DENIED))
    assert archive(constants=SIZES, **settings).status == 3
    assert unlistable.fired
    assert len(bucket.upload_ids()) == 1
    assert archive.query("SELECT key FROM uploads") == [("big",)]
    box.rules.clear()

    result = archive(constants=SIZES, **settings)
    assert result.status == 0, result.stderr
    assert bucket.upload_ids() == set()
    assert archive.query("SELECT key FROM uploads") == []
    assert "aborted the unfinished upload of big" in result.stderr


def test_max_runtime_leaves_uploads_of_files_that_were_not_come_to(archive, box, s3, bucket):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    assert archive(constants=SIZES, MAX_RUNTIME="0s").status == 3
    assert len(bucket.upload_ids()) == 1
    assert archive(constants=SIZES).status == 0
    assert sent(s3) == dict.fromkeys(range(1, PARTS + 1), 1)


@pytest.mark.parametrize(
    ("why", "fault"),
    [
        ("changed", error(500, "InternalError")),
        ("gone", error(403, "AccessDenied")),
        ("gone", proxy_page(404)),
    ],
    ids=["changed, 500", "gone, 403", "gone, a proxy's 404"],
)
def test_abort_that_is_refused_is_a_warning_with_key_and_upload_id(
    archive, box, s3, bucket, why, fault
):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    (left,) = bucket.upload_ids()
    if why == "changed":
        other_content(box.root / "big")
    else:
        (box.root / "big").unlink()
    s3.always("AbortMultipartUpload", fault)
    result = archive(constants={**SIZES, "S3_ATTEMPTS": 2})
    assert (result.status, result.failures) == (0, []), result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if left in line]
    assert "warning" in warning
    assert " big " in warning
    assert bucket.upload_ids() == {left}
    if why == "gone":
        s3.rules.clear()
        assert archive(constants=SIZES).status == 0
        assert bucket.upload_ids() == set(), "a later run has aborted it"


def test_upload_that_could_not_be_looked_for_is_not_left_for_ever(archive, box, s3, bucket):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    s3.always("ListMultipartUploads", error(500, "InternalError"))
    result = archive(constants={**SIZES, "S3_ATTEMPTS": 2})
    assert result.status in (0, 3)
    assert "big" in result.stderr
    archive.assert_invariant()
    s3.rules.clear()

    assert archive(constants=SIZES).status == 0
    assert bucket.upload_ids() == set()
    assert_all_archived(archive, box)


@pytest.mark.parametrize("is_refused", [False, True])
def test_upload_whose_first_answer_was_lost_is_aborted(archive, box, s3, bucket, is_refused):
    """The request was made again, so that there are two, and one id is not known."""
    write(box.root / "big", LARGE)
    s3.on("CreateMultipartUpload", lost_answer)
    if is_refused:
        s3.on("CompleteMultipartUpload", error(400, "BadDigest"))
    assert archive(constants=SIZES).status == (3 if is_refused else 0)
    assert s3.requests["CreateMultipartUpload"] == 2
    assert bucket.upload_ids() == set()
    assert archive(constants=SIZES).status == 0
    assert bucket.upload_ids() == set()
    assert_all_archived(archive, box)


def test_warning_of_an_upload_whose_id_got_lost_has_the_id(archive, box, s3, bucket):
    write(box.root / "big", LARGE)
    s3.on("CreateMultipartUpload", lost_answer)
    s3.on("ListMultipartUploads", cut_headers)
    s3.on("AbortMultipartUpload", error(403, "AccessDenied"))
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    (left,) = bucket.upload_ids()
    assert f"the unfinished upload of big (id {left}) could not be aborted" in result.stderr


@pytest.mark.parametrize(
    "changed",
    [
        {"STORAGE_CLASS": "STANDARD"},
        {"SMALL_FILES_BELOW": "1G", "SMALL_FILES_CLASS": "STANDARD"},
        {"S3_EXTRA_ARGS": "Tagging=kind=backup"},
    ],
    ids=str,
)
def test_upload_that_was_begun_with_other_settings_is_begun_anew(
    archive, box, s3, bucket, changed
):
    """Its class, encryption and tags are those with which it was begun."""
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    assert archive(constants=SIZES, **changed).counts == (1, 0, 0)
    assert s3.requests["CreateMultipartUpload"] == 2
    assert bucket.upload_ids() == set()
    storage_class = "DEEP_ARCHIVE" if "S3_EXTRA_ARGS" in changed else "STANDARD"
    assert archive.objects()["big"][2] == storage_class
    assert archive.query("SELECT storage_class FROM objects") == [(storage_class,)]


def test_upload_goes_on_at_a_server_that_does_not_say_that_its_listing_is_whole(
    archive, box, s3, bucket
):
    """As `rclone serve s3`."""
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    s3.always(
        "ListParts", rewritten(lambda body: re.sub(b"<IsTrun.*?/IsTruncated>", b"", body))
    )
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert sent(s3) == dict.fromkeys(range(1, PARTS + 1), 1)
    assert_all_archived(archive, box)


def test_parts_stay_if_the_box_fails_while_others_are_on_their_way(archive, box, s3, bucket):
    """s3transfer would cut these off after an error."""
    write(box.root / "big", BIG)
    s3.take_little_ahead()
    has_failed = threading.Event()
    held = s3.on("UploadPart", until(has_failed))

    def fail():
        wait_for(lambda: held.fired)
        threading.Timer(0.5, has_failed.set).start()

    box.on("READ", b"big", first(fail, status(PERMISSION_DENIED)), at=3 * PART)
    failed = archive(constants={**SIZES, "READ_WINDOW": MIB})
    assert_failed(failed, {"big": "the box answered: told to"})
    assert len(bucket.upload_ids()) == 1
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert s3.requests["CreateMultipartUpload"] == 1
    assert_all_archived(archive, box)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (error(503, "SlowDown"), "SlowDown"),
        (proxy_page(404), "ListParts: 404"),
        (proxy_page(404, b"<html>Not Found</html>"), "ListParts: 404"),
        (cut_headers, "S3's answer is no listing"),
    ],
    ids=["503", "a proxy's 404", "the same as XML", "cut off"],
)
def test_parts_that_cannot_be_listed_are_not_sent_again(
    archive, box, s3, bucket, fault, reason
):
    """S3 has no time for it, or was not asked: the run after gets it."""
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    s3.on("ListParts", fault)
    busy = archive(constants={**SIZES, "S3_ATTEMPTS": 1})
    assert_failed(busy, {"big": reason})
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert sent(s3) == dict.fromkeys(range(1, PARTS + 1), 1)
    assert_all_archived(archive, box)


def test_part_that_s3_refuses_cuts_off_the_others(archive, box, s3):
    """These are not tried again, which would take minutes here."""
    write(box.root / "big", BIG)
    s3.take_little_ahead()
    is_refused = threading.Event()
    held = s3.on("UploadPart", until(is_refused))

    def refuse(exchange):
        wait_for(lambda: held.fired)
        threading.Timer(1, is_refused.set).start()
        return error(400, "InvalidRequest")(exchange)

    s3.on("UploadPart", refuse, nth=2)
    refused = archive(constants={**SIZES, "S3_ATTEMPTS": 9}, timeout=50)
    assert_failed(refused, {"big": "InvalidRequest"})


def test_upload_whose_parts_s3_refuses_is_begun_anew_by_the_next_run(archive, box, s3, bucket):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    s3.on("UploadPart", error(400, "InvalidRequest"))
    refused = archive(constants=SIZES)
    assert_failed(refused, {"big": "InvalidRequest"})
    assert bucket.upload_ids() == set()
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert_all_archived(archive, box)


def test_upload_whose_only_answer_was_lost_is_gone_on_with_or_aborted(archive, box, s3, bucket):
    write(box.root / "big", BIG)
    s3.on("CreateMultipartUpload", first_in_s3(archive.kill, lost_answer))
    assert archive.start(constants=SIZES).wait().status == -9
    wait_for(lambda: not s3.under_way)
    assert len(bucket.upload_ids()) == 1
    archive.assert_invariant()
    assert archive(constants=SIZES).status == 0
    assert bucket.upload_ids() == set()
    assert_all_archived(archive, box)


def test_parts_of_another_version_are_not_gone_on_with_after_a_run_that_sent_nothing(
    archive, box, s3, bucket
):
    """The second run notes the new version, and ends before the file's turn comes."""
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    other_content(box.root / "big")
    assert archive(constants=SIZES, MAX_COST="0").status == 3
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert_all_archived(archive, box)
    assert bucket.uploads() == []


def test_parts_of_another_version_that_cannot_be_aborted_are_not_gone_on_with(archive, box, s3):
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    other_content(box.root / "big")
    s3.on("AbortMultipartUpload", error(400, "Odd"))
    s3.on("UploadPart", first_in_s3(archive.kill, reset), nth=2)
    assert archive.start(constants=IN_ORDER).wait().status == -9
    wait_for(lambda: not s3.under_way)
    s3.rules.clear()
    assert archive(constants=SIZES).counts == (1, 0, 0)
    content = (box.root / "big").read_bytes()
    assert archive.objects()["big"][:2] == (BIG, crc32(content))


def test_parts_from_before_the_state_was_lost_are_not_gone_on_with(archive, box, s3):
    """The lost state alone has known which version of the file they are of."""
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    archive.state_db.unlink()
    other_content(box.root / "big")
    interrupt(archive, s3, at_part=2)
    assert archive(constants=SIZES).counts == (1, 0, 0)
    content = (box.root / "big").read_bytes()
    assert archive.objects()["big"][:2] == (BIG, crc32(content))


def test_parts_of_a_file_that_changed_while_it_was_read_are_of_no_use(archive, box, s3):
    """They may be torn, which cannot be seen once the file is put back with its old time."""
    path = box.root / "big"
    write(path, 8 * PART)
    original, times = path.read_bytes(), (path.stat().st_atime, path.stat().st_mtime)

    def overwrite():
        with path.open("r+b") as file:
            file.write(original[::-1])

    s3.on("UploadPart", first_in_s3(overwrite), nth=2)
    narrow = {**IN_ORDER, "READ_WINDOW": MIB}
    assert_failed(archive(constants=narrow), {"big": "changed while it was read"})
    path.write_bytes(original)
    os.utime(path, times)
    s3.parts.clear()
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert sent(s3) == dict.fromkeys(range(1, 9), 1)
    assert_all_archived(archive, box)


def test_upload_that_a_comparison_has_led_to_goes_on_in_the_next_run(archive, box, s3):
    write(box.root / "big", 8 * PART)
    archive(constants=SIZES)
    other_content(box.root / "big")
    s3.parts.clear()
    s3.on("UploadPart", first_in_s3(archive.terminate), nth=3)
    cut_off = archive(constants={**IN_ORDER, "READ_WINDOW": MIB})
    assert (cut_off.status, cut_off.counts[0]) == (143, 0)
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert sent(s3) == dict.fromkeys(range(1, 9), 1)
    assert s3.requests["CreateMultipartUpload"] == 2
    assert_all_archived(archive, box)


def test_upload_that_s3_cannot_begin_costs_no_reading_of_the_whole_file(archive, box, s3):
    write(box.root / "big", 20 * PART)
    s3.always("CreateMultipartUpload", error(400, "Odd"))
    assert_failed(archive(constants=IN_ORDER, MEMORY_LIMIT="64M"), {"big": "Odd"})
    assert box.handed_out < 16 * PART


# --- Completing -------------------------------------------------------------


def test_parts_stay_if_s3_is_too_busy_to_complete_the_upload(archive, box, s3):
    write(box.root / "big", BIG)
    s3.on("CompleteMultipartUpload", error(503, "SlowDown"), times=2)
    assert_failed(archive(constants={**SIZES, "S3_ATTEMPTS": 2}), {"big": "SlowDown"})
    s3.parts.clear()
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert len(sent(s3)) == 1  # upload_fileobj cannot send less
    assert_all_archived(archive, box)


def test_upload_that_s3_refuses_to_complete_is_aborted(archive, box, s3, bucket):
    for name in ("big", "other"):
        write(box.root / name, LARGE)
    s3.on("CompleteMultipartUpload", error(400, "BadDigest"), key="big")
    result = archive(constants=SIZES)
    assert_failed(result, {"big": "BadDigest"})
    assert archive.rows().keys() == {"./other"}
    assert bucket.upload_ids() == set()
    archive.assert_invariant()
    assert archive(constants=SIZES).counts == (1, 1, 0)
    assert_all_archived(archive, box)


def test_upload_is_completed_with_the_checksum_of_what_was_read(archive, box, s3, bucket):
    """S3 tells another checksum of a stored part than that of the bytes it has, and so what
    it puts together is not what the box has."""
    write(box.root / "big", BIG)
    interrupt(archive, s3)
    s3.on("ListParts", rewritten(lambda body: body.replace(told_sum(s3, 1), b"AAAAAA==")))
    result = archive(constants=SIZES)
    assert_failed(result, {"big": "BadDigest"})
    assert archive.rows() == archive.objects() == {}
    assert bucket.upload_ids() == set()

    told = {}

    def look(exchange):
        told[exchange.operation] = exchange.headers
        return exchange.forward()

    s3.on("CreateMultipartUpload", look)
    s3.on("CompleteMultipartUpload", look)
    assert archive(constants=SIZES).counts == (1, 0, 0)
    # Otherwise S3 takes it for a checksum of the parts' checksums.
    assert [told[name].get("x-amz-checksum-type") for name in told] == ["FULL_OBJECT"] * 2
    assert told["CompleteMultipartUpload"].get("x-amz-mp-object-size") == str(BIG)
    assert_all_archived(archive, box)


def told_sum(s3, number):
    """A part's CRC-32 as it is in ListParts."""
    (crc,) = [crc for (_, _, part), (crc, _) in s3.part_sums.items() if part == number]
    return base64.b64encode(crc.to_bytes(4, "big"))


@pytest.mark.parametrize("told", ["checksum", "composite"])
def test_answer_to_complete_with_another_checksum_is_not_believed(
    archive, box, s3, bucket, told
):
    write(box.root / "big", LARGE)

    def other(body):
        start, _, rest = body.partition(b"<ChecksumCRC32>")
        own, _, end = rest.partition(b"<")
        sum_text = b"AAAAAA==" if told == "checksum" else own + b"-2"
        return start + b"<ChecksumCRC32>" + sum_text + b"<" + end

    s3.on("CompleteMultipartUpload", rewritten(other))
    result = archive(constants=SIZES)
    if told == "composite":  # is none of the whole: HEAD is asked
        assert result.status == 0, result.stderr
        assert s3.requests["HeadObject"] == 1
    else:
        assert_failed(result, {"big": "S3 holds CRC-32 AAAAAA== read"})
        assert archive.rows() == {}
        assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)


def test_completion_whose_answer_was_lost_is_found_by_head(archive, box, s3):
    write(box.root / "big", BIG)
    s3.on("CompleteMultipartUpload", lost_answer)
    s3.on("CompleteMultipartUpload", error(404, "NoSuchUpload"), nth=2)
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert s3.requests["CompleteMultipartUpload"] == 2
    assert s3.requests["HeadObject"] == 1
    assert_all_archived(archive, box)
    s3.requests.clear()
    assert archive(constants=SIZES).counts == (0, 1, 0)
    assert s3.requests.total() == 0


def test_parts_stay_if_s3_is_gone_when_the_upload_is_to_be_completed(archive, box, s3):
    """Night after night. The last part is sent again: its size is not that of the others."""
    write(box.root / "big", BIG)
    s3.always("CompleteMultipartUpload", reset)
    for _ in range(2):
        result = archive(constants={**SIZES, "S3_ATTEMPTS": 2})
        assert_failed(result, {"big": "S3 does not answer"})
    s3.rules.clear()
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert sent(s3) == {1: 1, 2: 1, 3: 1, PARTS: 3}
    assert_all_archived(archive, box)


@pytest.mark.parametrize("held", ["another object", "nothing"])
def test_upload_that_is_gone_and_whose_object_is_another_has_failed(
    archive, box, s3, bucket, held
):
    path = box.root / "big"
    if held != "nothing":
        write(path, LARGE)
        assert archive(constants=SIZES).status == 0
    write(path, LARGE, mtime=1_700_000_005)
    path.write_bytes(path.read_bytes()[::-1])
    other_mtime(path)
    s3.on("CompleteMultipartUpload", reset)
    s3.on("CompleteMultipartUpload", error(404, "NoSuchUpload"), nth=2)
    assert_failed(archive(constants=SIZES), {"big": "NoSuchUpload"})
    assert_rows_are_true(archive)
    assert bucket.upload_ids() == set()
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert_all_archived(archive, box)


@pytest.mark.parametrize("how", ["killed", "no answer"])
def test_object_that_is_complete_though_nobody_was_told_is_not_sent_again(
    archive, box, s3, how
):
    """The upload is gone since S3 has completed it: HEAD tells the next run."""
    write(box.root / "big", BIG)
    done = archive.kill if how == "killed" else (lambda: None)
    fault = first_in_s3(done, lost_answer)
    s3.on("CompleteMultipartUpload", fault)
    s3.on("CompleteMultipartUpload", reset, nth=2, times=9)
    limits = {**SIZES, "S3_ATTEMPTS": 2}
    result = archive.start(constants=limits).wait()
    assert result.status == (-9 if how == "killed" else 3), result.stderr
    wait_for(lambda: not s3.under_way)
    s3.rules.clear()
    assert "big" in archive.objects()

    result = archive(constants=SIZES)
    assert result.status == 0, result.stderr
    assert sent(s3) == dict.fromkeys(range(1, PARTS + 1), 1)
    assert_all_archived(archive, box)


def test_parts_stay_although_the_box_breaks_each_connection(archive, box, s3):
    write(box.root / "big", BIG)
    box.on("READ", b"big", drop, times=float("inf"), at=2 * PART + 1_000)
    constants = {**IN_ORDER, "RECONNECT_PAUSES": (0, 0, 0)}
    assert_failed(archive(constants=constants), {"big": "lost the connection"})
    box.rules.clear()
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert s3.requests["CreateMultipartUpload"] == 1
    assert max(sent(s3).values()) == 1
