"""What S3 may do to a run: refuse, fail, hang, and answer wrongly."""

import dataclasses
import os
import re
import signal
import time

import faulty_sftp
import pytest
from conftest import MIB, SNAPSHOT, tree
from faults import (
    LARGE,
    SIZES,
    SMALL,
    assert_all_archived,
    assert_failed,
    assert_rows_are_true,
    wait_for,
    write,
)
from faulty_sftp import EOF, PERMISSION_DENIED, FaultyBox, ends_at, one_file
from scripted_s3 import error, first, hang, headers, lost_answer, no_checksums, reset

IMPATIENT = {**SIZES, "S3_CONNECT_LIMIT": 1, "S3_READ_LIMIT": 1, "S3_ATTEMPTS": 2}

# Each request that an upload consists of, with a file that it is needed for.
OPERATIONS = {
    "PutObject": SMALL,
    "CreateMultipartUpload": LARGE,
    "UploadPart": LARGE,
    "CompleteMultipartUpload": LARGE,
    "HeadObject": LARGE,
}


@pytest.fixture
def box(faulty_box):
    return faulty_box


@pytest.fixture
def archive(archive_of, box, s3):
    return archive_of(box, AWS_ENDPOINT_URL=s3.url)


def recorded(archive):
    return {os.path.basename(path) for path in archive.rows()}


# --- What no later request can heal -----------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "remedy"),
    [
        ("AccessDenied", 403, "policy"),
        ("NoSuchBucket", 404, "S3_BUCKET"),
        ("PermanentRedirect", 301, "AWS_REGION"),
        ("RequestTimeTooSkewed", 403, "clock"),
        ("ExpiredToken", 400, "renew"),
        ("InvalidAccessKeyId", 403, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "AWS_SECRET_ACCESS_KEY"),
    ],
)
@pytest.mark.parametrize("operation", [None, "PutObject"], ids=["at the start", "at a PUT"])
def test_refusal_that_concerns_every_file_ends_the_run_at_the_first(
    archive, box, s3, operation, code, status, remedy
):
    for number in range(20):
        write(box.root / f"f{number}", SMALL)
    s3.always(operation, error(status, code, x_amz_bucket_region="eu-west-1"))
    result = archive(TRANSFERS=4)
    assert result.status == 1, result.stderr
    told = [line for line in result.stderr.splitlines() if code in line]
    assert len(told) == 1, result.stderr
    assert remedy in told[0]
    assert result.failures == []
    # Those under way at the time, each followed to the other region once.
    assert s3.requests["PutObject"] <= 4 * (2 if status == 301 else 1)
    assert archive.rows() == {}
    archive.assert_invariant()


@pytest.mark.parametrize(
    "operation", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]
)
def test_refusal_of_a_large_file_ends_the_run_and_leaves_no_upload(archive, box, s3, operation):
    write(box.root / "large", LARGE)
    s3.always(operation, error(403, "AccessDenied"))
    result = archive(constants=SIZES)
    assert result.status == 1, result.stderr
    assert archive.rows() == {}
    archive.assert_invariant()


@pytest.mark.parametrize(
    ("fault", "status"), [(error(403, "ExpiredToken"), 1), (error(400, "BadDigest"), 3)]
)
def test_nothing_more_is_read_of_a_file_that_s3_refuses(archive_of, s3, fault, status):
    with FaultyBox(one_file(b"huge", 2**30)) as box:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        s3.always("UploadPart", fault)
        assert archive().status == status
        assert box.handed_out <= 256 * MIB
        archive.assert_invariant()


def test_missing_permission_to_confirm_ends_the_run_at_the_first(archive, box, s3):
    """HEAD needs s3:GetObject, and its refusal comes without an error code."""
    for name in ("large", "larger"):
        write(box.root / name, LARGE)
    s3.always("HeadObject", error(403, "AccessDenied"))
    result = archive(constants=SIZES, TRANSFERS=1)
    assert result.status == 1, result.stderr
    assert re.search("HeadObject.*policy", result.stderr)
    assert s3.requests["HeadObject"] == 1
    assert archive.rows() == {}
    archive.assert_invariant()


def test_missing_credentials_end_the_run_before_anything_is_uploaded(archive, box, s3):
    write(box.root / "f", SMALL)
    result = archive(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    assert result.status == 1
    assert "AWS_ACCESS_KEY_ID" in result.stderr
    assert s3.requests.total() == 0


def test_refusal_keeps_what_was_archived_before(archive, box, s3):
    for name in ("a", "b", "c"):
        write(box.root / name, SMALL)
    s3.on("PutObject", error(403, "ExpiredToken"), key="b")
    result = archive(TRANSFERS=1)
    assert result.status == 1
    assert result.counts[0] == 1
    assert recorded(archive) == {"a"}
    archive.assert_invariant()


# --- What a later request heals ---------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [error(500, "InternalError"), error(503, "SlowDown"), reset],
    ids=["500", "503", "reset"],
)
def test_trouble_that_passes_costs_nothing_and_is_counted_once(archive, box, s3, fault):
    troubles = []
    for operation, size in OPERATIONS.items():
        write(box.root / operation, size)
        troubles.append(s3.on(operation, fault, key=operation, times=2))
    result = archive(constants=SIZES)
    assert [trouble.fired for trouble in troubles] == [2] * 5
    assert (result.status, result.counts) == (0, (5, 0, 0)), result.stderr
    assert result.summary["Bytes uploaded"] == sum(OPERATIONS.values())
    assert_all_archived(archive, box)


def test_answer_that_is_lost_is_asked_for_again(archive, box, s3):
    lost = []
    for operation in ("PutObject", "UploadPart", "HeadObject"):
        write(box.root / operation, OPERATIONS[operation])
        lost.append(s3.on(operation, lost_answer, key=operation))
    result = archive(constants=SIZES)
    assert [rule.fired for rule in lost] == [1] * 3
    assert (result.status, result.counts) == (0, (3, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_upload_whose_first_answer_was_lost_is_aborted_in_the_end(archive, box, s3):
    """The request was made again, so that there are two, and one id is not known."""
    write(box.root / "large", LARGE)
    s3.on("CreateMultipartUpload", lost_answer)
    assert archive(constants=SIZES).status == 0
    assert archive(constants=SIZES).status == 0
    assert s3.requests["CreateMultipartUpload"] == 2
    assert_all_archived(archive, box)


def test_completion_whose_answer_was_lost_is_found_or_made_again(archive, box, s3):
    """Made again, it may find its upload gone."""
    write(box.root / "large", LARGE)
    s3.on("CompleteMultipartUpload", lost_answer)
    assert archive(constants=SIZES).status in (0, 3)
    archive.assert_invariant()
    assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)


@pytest.mark.parametrize("fault", [error(500, "InternalError"), hang], ids=["500", "hang"])
def test_trouble_that_stays_with_one_file_costs_only_that_file(archive, box, s3, fault):
    write(box.root / "other", SMALL)
    troubles = []
    for operation, size in OPERATIONS.items():
        write(box.root / operation, size)
        troubles.append(s3.always(operation, fault, key=operation))
    result = archive(constants=IMPATIENT)
    assert all(1 <= rule.fired <= 2 * IMPATIENT["S3_ATTEMPTS"] for rule in troubles)
    assert_failed(result, dict.fromkeys(OPERATIONS, "S3"))
    assert recorded(archive) == {"other"}
    archive.assert_invariant()
    s3.rules.clear()
    assert archive(constants=SIZES).counts == (5, 1, 0)
    assert_all_archived(archive, box)


def test_s3_that_never_answers_ends_the_run(archive, box, s3):
    write(box.root / "f", SMALL)
    s3.always(None, hang)
    assert archive(constants=IMPATIENT).status == 1
    assert archive.rows() == {}


def test_signal_ends_a_run_that_waits_for_s3(archive, box, s3, moto):
    write(box.root / "large", LARGE)
    for number in range(4):
        write(box.root / f"f{number}", SMALL)
    puts = s3.always("PutObject", hang)
    parts = s3.always("UploadPart", hang)
    running = archive.start(constants={**SIZES, "STOP_LIMIT": 1})
    wait_for(lambda: puts.fired and parts.fired)
    running.process.send_signal(signal.SIGTERM)
    result = running.wait(timeout=10)
    assert result.status == 143
    assert result.summary
    assert archive.rows() == {}
    assert archive(constants=SIZES, AWS_ENDPOINT_URL=moto.url).status == 0
    assert_all_archived(archive, box)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_signal_while_s3_does_what_was_asked_leaves_nothing_half_done(
    archive, box, s3, operation
):
    write(box.root / "f", OPERATIONS[operation])

    def stop():
        running.process.terminate()
        wait_for(lambda: "ending" in archive.log_file.read_text())

    s3.on(operation, first(stop))
    running = archive.start(constants=SIZES)
    result = running.wait(timeout=20)
    # It may have been the last request of all, and nothing was left to be ended.
    assert result.status == 143 or result.counts == (1, 0, 0), result.stderr
    assert "could not be aborted" not in result.stderr
    archive.assert_invariant()
    assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)


# --- What S3 says it holds --------------------------------------------------


def test_object_that_differs_from_what_was_read_is_not_recorded(archive, box, s3):
    for name in ("size", "crc", "well"):
        write(box.root / name, LARGE)
    s3.on("HeadObject", headers(content_length="5"), key="size")
    s3.on("HeadObject", headers(x_amz_checksum_crc32="AAAAAA=="), key="crc")
    result = archive(constants=SIZES)
    reasons = {"size": f"S3 holds 5 bytes read {LARGE}", "crc": "S3 holds CRC-32 AAAAAA=="}
    assert_failed(result, reasons)
    assert recorded(archive) == {"well"}
    assert archive(constants=SIZES).counts == (2, 1, 0)
    assert_all_archived(archive, box)


def test_server_without_checksums_is_told_of_once_and_sizes_are_compared(archive, box, s3):
    for name, size in (("a", SMALL), ("b", SMALL), ("c", LARGE), ("d", LARGE)):
        write(box.root / name, size)
    s3.always(None, no_checksums)
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (4, 0, 0)), result.stderr
    assert len(re.findall("warning: .*CRC-32", result.stderr)) == 1
    held = {os.fsencode(key): found[:2] for key, found in archive.objects().items()}
    assert held == tree(box.root)


def test_server_without_checksums_that_holds_another_size_is_not_believed(archive, box, s3):
    def other_size(exchange):
        answer = no_checksums(exchange)
        answer.headers["content-length"] = "5"
        return answer

    for name, size in (("small", SMALL), ("large", LARGE)):
        write(box.root / name, size)
    s3.always("HeadObject", other_size)
    s3.always(None, no_checksums)
    assert_failed(archive(constants=SIZES), {"small": "holds 5", "large": "holds 5"})
    assert archive.rows() == {}


def test_small_file_that_was_damaged_on_its_way_is_not_recorded(archive, box, s3):
    for name in ("well", "damaged"):
        write(box.root / name, SMALL)
    s3.always("PutObject", error(400, "BadDigest"), key="damaged")
    assert_failed(archive(), {"damaged": "BadDigest"})
    assert recorded(archive) == {"well"}
    archive.assert_invariant()


def test_small_file_is_sent_with_the_checksum_that_lets_s3_refuse_damage(archive, box, s3):
    write(box.root / "f", SMALL)
    sent = []

    def look(exchange):
        sent.append(exchange.headers.get("x-amz-checksum-crc32"))
        return exchange.forward()

    s3.on("PutObject", look, key="f")
    assert archive().status == 0
    assert sent != [None]
    assert_all_archived(archive, box)


# --- Abort and snapshot -----------------------------------------------------


def test_upload_that_cannot_be_aborted_is_told_of_and_aborted_by_the_next_run(
    archive, box, s3, bucket
):
    write(box.root / "large", LARGE)
    box.always("READ", b"large", ends_at(LARGE - 1))
    s3.always("AbortMultipartUpload", error(403, "AccessDenied"))
    result = archive(constants=SIZES)
    assert_failed(result, {"large": "ended at"})
    (upload,) = bucket.client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
    assert upload["UploadId"] in result.stderr
    s3.rules.clear()
    box.rules.clear()
    assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)


@pytest.mark.parametrize(
    "fault",
    [error(403, "AccessDenied"), error(500, "InternalError"), hang],
    ids=["403", "500", "hang"],
)
def test_snapshot_that_cannot_be_stored_leaves_the_files_done(archive, box, s3, fault):
    write(box.root / "f", SMALL)
    s3.always("PutObject", fault, key=SNAPSHOT)
    result = archive(constants=IMPATIENT)
    assert (result.status, result.counts) == (3, (1, 0, 0)), result.stderr
    assert re.search("warning: .*snapshot", result.stderr)
    assert_all_archived(archive, box)


# --- Secrets ----------------------------------------------------------------


def test_no_secret_is_shown_however_much_is_told(archive, box, s3):
    """Every run of the tests is searched for secrets; this one tells the most."""
    token = "canary-token-90ab"
    archive.secrets.append(token)
    for name in ("a", "b", "c", "large"):
        write(box.root / name, LARGE if name == "large" else SMALL)
    s3.on("PutObject", error(503, "SlowDown"), key="a")
    s3.on("PutObject", error(400, "BadDigest"), key="b")
    s3.on("UploadPart", reset)
    leak = error(403, "SignatureDoesNotMatch", " ".join(archive.secrets))
    s3.always("PutObject", leak, key="c")
    result = archive("-v", constants=SIZES, AWS_SESSION_TOKEN=token)
    assert result.status == 1
    assert "SignatureDoesNotMatch" in result.log


def test_no_secret_is_in_the_process_list(archive, box, s3):
    write(box.root / "f", SMALL)
    seen = []

    def look(exchange):
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{process}/cmdline", "rb") as file:
                    seen.append(file.read().decode("utf-8", "replace"))
            except OSError:
                pass  # it has ended
        return exchange.forward()

    s3.on("PutObject", look, key="f")
    assert archive().status == 0
    assert any("archive.py" in line for line in seen)
    assert not [line for line in seen for secret in archive.secrets if secret in line]


def test_row_of_an_object_that_was_replaced_without_an_answer_is_not_believed(archive, box, s3):
    """The old version, put back with its time, is not what S3 holds."""
    path = box.root / "f"
    write(path, SMALL)
    old, times = path.read_bytes(), (path.stat().st_mtime,) * 2
    assert archive().status == 0
    path.write_bytes(b"new!")
    s3.on("PutObject", lost_answer, key="f", times=2)
    assert archive(constants=IMPATIENT).status == 3
    path.write_bytes(old)
    os.utime(path, times)
    assert '"changed": {\n    "files": 1' in archive("plan", "--json").stdout
    assert archive().counts == (1, 0, 0)
    archive.assert_invariant()
    assert archive().counts == (0, 1, 0)


@pytest.mark.parametrize("how", ["no answer", "killed"])
def test_row_of_an_object_that_was_looked_at_again_and_replaced_is_not_believed(
    archive, box, s3, how
):
    path = box.root / "f"
    write(path, SMALL, mtime=int(time.time()) + 2)  # so that it is looked at again
    old, times = path.read_bytes(), (int(path.stat().st_mtime),) * 2
    assert archive().counts == (1, 0, 0)
    path.write_bytes(old[::-1])
    os.utime(path, times)
    if how == "killed":
        killed = "archive.State.record = lambda _, some, __: some and __import__('os')._exit(9)"
        assert archive.start(before=killed).wait().status == 9
    else:
        s3.on("PutObject", lost_answer, key="f", times=2)
        assert archive(constants=IMPATIENT).status == 3
    path.write_bytes(old)
    os.utime(path, times)
    assert archive().counts == (1, 0, 0)
    archive.assert_invariant()


@pytest.mark.parametrize("how", ["no answer", "killed"])
def test_row_of_a_file_that_is_listed_twice_is_not_believed(archive, box, s3, how):
    """It is replaced while its folder is listed: two versions in one run, of which the
    first is recorded."""
    path = box.root / "f"
    write(path, SMALL)
    old, times = path.read_bytes(), (int(path.stat().st_mtime),) * 2
    listed = box.tree.lstat(b"f")
    pages = [(b"f", listed), (b"f", dataclasses.replace(listed, mtime=listed.mtime + 1))]
    for nth, page in enumerate(pages, 1):
        box.on("READDIR", b"", faulty_sftp.names(page), nth=nth)
    box.on("READDIR", b"", faulty_sftp.status(EOF), nth=3, times=9)

    def kill():
        archive.running[-1].kill()

    def replaced():
        time.sleep(1)  # until both are listed
        path.write_bytes(old[::-1])
        os.utime(path, (times[0] + 1,) * 2)

    s3.on("PutObject", first(replaced), key="f")
    if how == "killed":
        s3.on("PutObject", first(kill, lost_answer), key="f", nth=2)
    else:
        s3.on("PutObject", lost_answer, key="f", nth=2, times=2)
    pages_of_one = {"PAGE": 1, "READDIRS_PER_FLIGHT": 1}
    result = archive(constants={"S3_ATTEMPTS": 2, **pages_of_one})
    assert result.status == (3 if how == "no answer" else -9), result.stderr
    assert_rows_are_true(archive)
    box.rules.clear()
    path.write_bytes(old)
    os.utime(path, times)

    assert archive().counts == (1, 0, 0)
    archive.assert_invariant()


def test_large_file_that_is_only_looked_at_leaves_nothing_to_ask_about(archive, box, s3):
    write(box.root / "large", LARGE, mtime=int(time.time()))
    assert archive(constants=SIZES).counts == (1, 0, 0)
    s3.requests.clear()
    assert archive(constants=SIZES).counts == (0, 1, 0)
    assert archive(constants=SIZES).counts == (0, 1, 0)
    assert s3.requests.total() == 0


def test_upload_in_doubt_is_known_though_the_run_is_killed_at_the_commit(
    archive, box, s3, bucket
):
    """Its second upload was recorded; the first one's parts would be billed for ever."""
    write(box.root / "large", LARGE)
    s3.on("CreateMultipartUpload", lost_answer)
    s3.always("ListMultipartUploads", error(500, "InternalError"))
    killed = (
        "record = archive.State.record\n"
        "def record_and_die(state, stored, kind):\n"
        "    record(state, stored, kind)\n"
        "    stored and __import__('os')._exit(9)\n"
        "archive.State.record = record_and_die\n"
    )
    constants = {**SIZES, **IMPATIENT}
    assert archive.start(constants=constants, before=killed).wait().status == 9
    assert len(archive.rows()) == len(bucket.uploads()) == 1
    s3.rules.clear()

    assert archive(constants=SIZES).counts == (0, 1, 0)
    assert bucket.uploads() == []


def test_file_that_is_looked_at_again_in_vain_is_not_paid_twice(archive, box):
    """Only what is sent may have replaced its object."""
    write(box.root / "f", SMALL, mtime=int(time.time()))
    assert archive().counts == (1, 0, 0)
    box.on("OPEN", b"f", faulty_sftp.status(PERMISSION_DENIED))
    assert archive().counts == (0, 0, 1)
    assert archive().counts == (0, 1, 0)


def test_large_file_may_grow_after_it_was_listed(archive, box):
    """Parts take the same memory, whatever their number."""
    path = box.root / "large"
    write(path, 4 * LARGE)

    def grown():
        with path.open("ab") as file:
            file.write(b"!" * 100_000)

    box.on("OPEN", b"large", faulty_sftp.first(grown))
    assert archive(constants=SIZES).status == 0
    archive.assert_invariant()
    assert archive.objects()["large"][0] == 4 * LARGE + 100_000


def test_server_that_tells_no_time_is_no_obstacle(archive, box, s3):
    write(box.root / "large", LARGE)

    def timeless(exchange):
        answer = exchange.forward()
        del answer.headers["last-modified"]
        return answer

    s3.always("HeadObject", timeless)
    assert archive(constants=SIZES).status == 0


def test_composite_checksum_is_none_of_the_whole(archive, box, s3):
    write(box.root / "large", LARGE)
    composite = headers(x_amz_checksum_crc32="nvQJ1w==-2", x_amz_checksum_type="COMPOSITE")
    s3.always("HeadObject", composite)
    result = archive(constants=SIZES)
    assert result.status == 0, result.stderr
    assert "only sizes are compared" in result.stderr


@pytest.mark.parametrize(
    ("fault", "status"),
    [(hang, 3), (error(503, "ServiceUnavailable"), 3), (error(403, "ExpiredToken"), 1)],
    ids=["hang", "503", "expired"],
)
def test_uploads_that_were_left_are_not_asked_about_in_vain(archive, box, s3, fault, status):
    """By a killed run: each request may take as long as S3 has time."""
    write(box.root / "f", SMALL)
    assert archive().status == 0
    write(box.root / "g", SMALL)
    for number in range(20):
        archive.execute(f"INSERT INTO uploads VALUES ('k{number}')")
    s3.requests.clear()
    s3.always(None, fault)
    result = archive(constants=IMPATIENT)
    assert result.status == status
    assert s3.requests["ListMultipartUploads"] <= 2
    assert result.stderr.count("ExpiredToken") == (status == 1)


def stop_during(running, archive, then):
    """End the run by a signal while S3 is at work, and answer with `then`."""

    def fault(exchange):
        exchange.body()
        running[0].process.terminate()
        wait_for(lambda: "ending" in archive.log_file.read_text())
        return then(exchange)

    return fault


@pytest.mark.parametrize("key", ["f", SNAPSHOT])
def test_run_that_was_complete_is_not_called_ended_early(archive, box, s3, key):
    write(box.root / "f", SMALL)
    running = []
    s3.on("PutObject", stop_during(running, archive, lambda asked: asked.forward()), key=key)
    running.append(archive.start())
    result = running[0].wait(30)
    assert (result.status == 143) == ("Ended early" in result.stdout)
    assert result.status == archive.query("SELECT status FROM runs")[0][0]


def test_snapshot_that_a_signal_stopped_is_no_other_failure(archive, box, s3):
    write(box.root / "f", SMALL)
    running = []
    stop = stop_during(running, archive, error(500, "InternalError"))
    s3.on("PutObject", stop, key=SNAPSHOT)
    running.append(archive.start())
    assert running[0].wait(30).status == 143


def test_refusal_is_told_though_a_signal_came(archive, box, s3):
    write(box.root / "f", SMALL)
    running = []
    stop = stop_during(running, archive, error(403, "ExpiredToken"))
    s3.on("PutObject", stop, key="f")
    running.append(archive.start())
    result = running[0].wait(30)
    assert result.status == 143
    assert "ExpiredToken" in result.stderr


def test_uploads_that_a_signal_leaves_are_named(archive, box, s3, bucket):
    for number in range(8):
        write(box.root / f"large{number}", LARGE)
    s3.always("UploadPart", hang)
    s3.always("AbortMultipartUpload", hang)
    running = archive.start(constants=SIZES, MEMORY_LIMIT="1G")
    wait_for(lambda: s3.requests["UploadPart"] >= 16)
    running.process.terminate()
    result = running.wait(30)
    assert result.status == 143
    left = bucket.uploads()
    assert len(left) == 8
    assert all(f" of {key} is unfinished" in result.stderr for key in left)


def test_file_that_s3_takes_while_it_fails_the_others_is_recorded(archive, box, s3):
    write(box.root / "0slow", SMALL)
    for n in range(12):
        write(box.root / f"f{n}", SMALL)
    s3.always("PutObject", first(lambda: time.sleep(4)), key="0slow")
    s3.always("PutObject", reset)
    result = archive(constants={**SIZES, "S3_ATTEMPTS": 1}, TRANSFERS="4")
    assert result.status == 1
    assert archive.rows().keys() == {"./0slow"}


def test_upload_that_could_not_begin_costs_nothing_and_so_is_not_told(archive, box):
    write(box.root / "small", SMALL)
    assert archive(constants=SIZES).status == 0
    write(box.root / "large", LARGE)
    nobody = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    result = archive(constants=SIZES, **nobody)
    assert result.status == 1
    assert "no AWS credentials" in result.stderr
    assert "could not be aborted" not in result.stderr
