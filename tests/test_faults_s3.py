"""What S3 may do to a run: refuse, fail, hang, and answer wrongly."""

import os
import re
import signal
import threading
import time

import faulty_sftp
import pytest
from conftest import MIB, tree
from faults import (
    AGAIN_SOON,
    LARGE,
    SIZES,
    SMALL,
    assert_all_archived,
    assert_failed,
    assert_rows_are_true,
    scripted_fixtures,
    wait_for,
    write,
)
from faulty_sftp import PERMISSION_DENIED, FaultyBox, one_file
from scripted_s3 import (
    Exchange,
    cut_headers,
    error,
    first,
    hang,
    headers,
    lost_answer,
    no_checksums,
    proxy_page,
    reset,
    until,
)

IMPATIENT = {**SIZES, "S3_CONNECT_LIMIT": 1, "S3_READ_LIMIT": 1, "S3_ATTEMPTS": 2}

# Each request that an upload consists of, with a file that it is needed for.
OPERATIONS = {
    "PutObject": SMALL,
    "CreateMultipartUpload": LARGE,
    "UploadPart": LARGE,
    "CompleteMultipartUpload": LARGE,
    "HeadObject": LARGE,
}


PART = SIZES["PART_SIZE"]

box, archive = scripted_fixtures()


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
    ],
)
def test_refusal_that_concerns_every_file_ends_the_run_at_the_first(
    archive, box, s3, code, status, remedy
):
    """At a PUT; those of the first request are told by `check` in the same words."""
    for number in range(20):
        write(box.root / f"f{number}", SMALL)
    s3.always("PutObject", error(status, code, x_amz_bucket_region="eu-west-1"))
    result = archive(TRANSFERS=4)
    assert result.status == 1, result.stderr
    told = [line for line in result.stderr.splitlines() if code in line]
    assert len(told) == 1, result.stderr
    assert remedy in told[0]
    assert result.failures == []
    # Those at work at the time: 4 are sent, 3 wait.  boto3 follows each to the other region.
    assert s3.requests["PutObject"] <= (4 + 3) * (2 if status == 301 else 1)
    assert archive.rows() == {}
    archive.assert_invariant()


def test_region_to_which_boto3_was_redirected_is_to_be_set(archive, box, s3):
    """Amazon's answers to listings name it, and nothing fails."""
    write(box.root / "f", SMALL)
    s3.always("ListObjectsV2", headers(x_amz_bucket_region="eu-west-1"))
    for _ in range(2):
        result = archive(AWS_REGION="eu-north-1")
        assert result.status == 0, result.stderr
        archive.state_db.unlink()
        assert result.stderr.count("warning: set AWS_REGION to eu-west-1") == 1
    assert "AWS_REGION" not in archive(AWS_REGION="eu-west-1").stderr


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
    ("fault", "status"), [(error(403, "ExpiredToken"), 1), (error(400, "InvalidTag"), 3)]
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


@pytest.mark.parametrize("fault", [error(503, "SlowDown"), reset], ids=["503", "reset"])
def test_trouble_that_passes_costs_nothing_and_is_counted_once(archive, box, s3, fault):
    troubles = []
    for operation, size in OPERATIONS.items():
        write(box.root / operation, size)
        troubles.append(s3.on(operation, fault, key=operation, times=2))
    result = archive(constants=SIZES, before=AGAIN_SOON)
    assert [trouble.fired for trouble in troubles] == [2] * 5
    assert (result.status, result.counts) == (0, (5, 0, 0)), result.stderr
    assert result.summary["Bytes uploaded"] == sum(OPERATIONS.values())
    assert_all_archived(archive, box)


def test_half_a_minute_without_s3_ends_no_run(archive, box, s3):
    """The pauses are added up, not waited for."""
    write(box.root / "f", SMALL)
    s3.on("PutObject", reset, times=5)
    before = "import sys, time\ntime.sleep = lambda s: print('pause', s, file=sys.stderr)\n"
    result = archive.start(before=before).wait()
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert sum(map(float, re.findall("^pause (.+)$", result.stderr, re.MULTILINE))) >= 30


@pytest.mark.parametrize("status", [302, 400, 404])
def test_page_of_a_proxy_is_no_refusal_by_s3(archive, box, s3, status):
    pages = []
    for operation in OPERATIONS.keys() - {"HeadObject"}:  # S3's own has no code, either
        write(box.root / operation, OPERATIONS[operation])
        pages.append(s3.on(operation, proxy_page(status), key=operation))
    result = archive(constants=SIZES, before=AGAIN_SOON)
    assert [rule.fired for rule in pages] == [1] * 4
    assert (result.status, result.counts) == (0, (4, 0, 0)), result.stderr
    assert s3.requests["AbortMultipartUpload"] == 0
    assert_all_archived(archive, box)


def test_endpoint_that_redirects_every_request_is_told_of_in_one_line(archive, s3):
    s3.always(None, proxy_page(302))
    result = archive("status")
    assert result.status == 0
    assert "warning: S3 does not answer: maximum recursion" in result.stderr
    assert "AWS_ENDPOINT_URL" in result.stderr


@pytest.mark.parametrize("fault", [lost_answer, cut_headers])
def test_answer_that_is_lost_is_asked_for_again(archive, box, s3, fault):
    lost = []
    for operation in ("PutObject", "CreateMultipartUpload", "UploadPart", "HeadObject"):
        write(box.root / operation, OPERATIONS[operation])
        lost.append(s3.on(operation, fault, key=operation))
    result = archive(constants=SIZES, before=AGAIN_SOON)
    assert [rule.fired for rule in lost] == [1] * 4
    assert (result.status, result.counts) == (0, (4, 0, 0)), result.stderr
    assert_all_archived(archive, box)
    archive.state_db.unlink()
    listing = s3.on("ListObjectsV2", fault)
    result = archive(constants=SIZES, before=AGAIN_SOON)
    assert (listing.fired, result.status, result.counts[0]) == (1, 0, 0), result.stderr
    assert_all_archived(archive, box)


@pytest.mark.parametrize("fault", [error(500, "InternalError"), hang], ids=["500", "hang"])
def test_trouble_that_stays_with_one_file_costs_only_that_file(archive, box, s3, fault):
    write(box.root / "other", SMALL)
    troubles = []
    for operation, size in OPERATIONS.items():
        write(box.root / operation, size)
        troubles.append(s3.always(operation, fault, key=operation))
    result = archive(constants=IMPATIENT, before=AGAIN_SOON)
    assert all(1 <= rule.fired <= 2 * IMPATIENT["S3_ATTEMPTS"] for rule in troubles)
    assert_failed(result, dict.fromkeys(OPERATIONS, "S3"))
    assert recorded(archive) == {"other"}
    archive.assert_invariant()
    s3.rules.clear()
    # S3 had completed one of them, which HEAD shows now.
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (4, 1, 0)), result.stderr
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


def test_the_same_signal_again_is_no_reason_to_end_without_a_summary(archive, box, s3):
    """A terminal that closes sends SIGHUP, and so does its shell; sudo passes SIGTERM on."""
    write(box.root / "f", SMALL)
    puts = s3.always("PutObject", hang)
    running = archive.start(constants={"STOP_LIMIT": 1})
    wait_for(lambda: puts.fired)
    running.process.send_signal(signal.SIGHUP)
    running.process.send_signal(signal.SIGTERM)
    running.process.send_signal(signal.SIGHUP)
    result = running.wait(timeout=10)
    assert result.status in (128 + signal.SIGHUP, 128 + signal.SIGTERM)
    assert result.summary
    assert archive.query("SELECT status FROM runs") == [(result.status,)]


def test_part_of_an_upload_that_has_ended_is_not_tried_again(archive, box, s3):
    """While its body is still under way, another part is refused."""
    s3.take_little_ahead()
    write(box.root / "big", 2 * PART)
    refused = threading.Event()
    soon = threading.Timer(1, refused.set)
    s3.on("UploadPart", until(refused))
    s3.on("UploadPart", first(soon.start, then=error(400, "Odd")), nth=2)
    assert_failed(archive(constants=SIZES), {"big": "Odd"})
    assert s3.requests["UploadPart"] == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_signal_while_s3_does_what_was_asked_leaves_nothing_half_done(
    archive, box, s3, operation
):
    write(box.root / "f", OPERATIONS[operation])

    def stop():
        running.process.terminate()
        wait_for(lambda: not box.transports[-1].is_active())  # it has begun to end

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
    # HEAD says something else now, and so nothing is sent again.
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (0, 1, 0)), result.stderr
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


@pytest.mark.parametrize("size", [0, SMALL])
def test_object_that_a_server_without_checksums_does_not_have_is_not_recorded(
    archive, box, s3, size
):
    write(box.root / "file", size)
    s3.always("HeadObject", error(404, "NoSuchKey"))
    s3.always(None, no_checksums)
    assert_failed(archive(), {"file": f"S3 holds no object read {size}"})
    assert archive.rows() == {}


def test_small_file_that_was_damaged_on_its_way_is_not_recorded(archive, box, s3):
    for name in ("well", "damaged"):
        write(box.root / name, SMALL)
    s3.always("PutObject", error(400, "BadDigest"), key="damaged")
    assert_failed(archive(constants={"S3_ATTEMPTS": 2}), {"damaged": "BadDigest"})
    assert s3.about["PutObject", "damaged"] == 2
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


# --- The same refusal for every file ----------------------------------------

LIMIT = 20  # files of which each is refused alike, until the run ends


@pytest.mark.parametrize(
    ("operation", "status", "code"),
    [
        ("PutObject", 403, "QuotaExceeded"),
        ("CreateMultipartUpload", 501, "NotImplemented"),
        ("UploadPart", 400, "InvalidStorageClass"),
    ],
)
def test_refusal_that_repeats_for_every_file_ends_the_run(
    archive, box, s3, operation, status, code
):
    sizes = {"SMALL_FILE": 1_000, "PART_SIZE": 5 * MIB}
    for number in range(LIMIT + 20):
        write(box.root / f"f{number:02}", 500 if operation == "PutObject" else SMALL)
    s3.always(operation, error(status, code))
    result = archive(constants=sizes, TRANSFERS=4)
    assert result.status == 1, result.stderr
    assert LIMIT <= len(result.failures) < LIMIT + 20
    (last,) = [line for line in result.stderr.splitlines() if "in a row" in line]
    assert code in last
    assert sum(1 for (name, _) in s3.about if name == operation) < LIMIT + 20
    archive.assert_invariant()


def test_refusal_of_some_files_does_not_end_the_run(archive, box, s3):
    """Whatever their number, as long as others are taken between them."""
    for number in range(50):
        write(box.root / f"f{number:02}", SMALL)
        if number % 10:
            s3.always("PutObject", error(400, "Odd"), key=f"f{number:02}")
    result = archive(TRANSFERS=1)
    assert (result.status, result.counts) == (3, (5, 0, 45))


CREDENTIALS = {
    "fail": "echo no token for you >&2; exit 1",
    "are no JSON": "echo hello",
    "have expired": """echo '{"Version": 1, "AccessKeyId": "AKIAIOSFODNN7EXAMPLE",
        "SecretAccessKey": "canary-secret-key-8a7e", "SessionToken": "t",
        "Expiration": "2020-01-01T00:00:00Z"}'""",
}


@pytest.mark.parametrize("what", [*CREDENTIALS, "need a code from a person"])
def test_credentials_that_cannot_be_had_end_the_run_with_one_line(archive, box, s3, what):
    write(box.root / "a", SMALL)
    assert archive().status == 0
    for number in range(LIMIT + 20):
        write(box.root / f"f{number:02}", SMALL)
    folder = archive.folder / "home" / ".aws"
    folder.mkdir()
    if what in CREDENTIALS:
        script = folder / "credentials.sh"
        script.write_text(CREDENTIALS[what])
        profile = f"credential_process = /bin/sh {script}\n"
    else:
        profile = (
            "role_arn = arn:aws:iam::123456789012:role/x\nsource_profile = other\n"
            "mfa_serial = arn:aws:iam::123456789012:mfa/x\n[profile other]\n"
            "aws_access_key_id = x\naws_secret_access_key = x\n"
        )
    (folder / "config").write_text(f"[profile box]\n{profile}")
    nobody = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    s3.requests.clear()
    result = archive(**nobody, AWS_PROFILE="box", TRANSFERS=4)
    assert result.status == 1, result.stderr
    assert len(result.failures) < LIMIT + 20, result.stderr
    (last,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert "credentials" in last.lower()
    assert s3.requests.total() == 0
    assert recorded(archive) == {"a"}


# --- Secrets ----------------------------------------------------------------


def test_no_secret_is_shown_however_much_is_told(archive, box, s3):
    """Every run of the tests is searched for secrets; this one tells the most."""
    token = "canary-token-90ab"
    archive.secrets.append(token)
    for name in ("a", "b", "c", "large"):
        write(box.root / name, LARGE if name == "large" else SMALL)
    s3.on("PutObject", error(503, "SlowDown"), key="a")
    s3.on("PutObject", error(400, "InvalidTag"), key="b")
    s3.on("UploadPart", reset)
    leak = error(403, "SignatureDoesNotMatch", " ".join(archive.secrets))
    s3.always("PutObject", leak, key="c")
    result = archive("-v", constants=SIZES, AWS_SESSION_TOKEN=token)
    assert result.status == 1
    assert "SignatureDoesNotMatch" in result.log


@pytest.mark.as_users_do
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


# --- Answers that are lost while an object is replaced ----------------------


@pytest.mark.parametrize("how", ["no answer", "killed"])
@pytest.mark.parametrize(
    ("size", "recent"),
    [(SMALL, True), (LARGE, False)],
    ids=["small, modified just now", "large"],
)
def test_old_content_that_is_put_back_after_a_lost_answer_is_archived_again(
    archive, box, s3, how, size, recent
):
    """With its size and time: the row of the old version says nothing any more."""
    path = box.root / "f"
    write(path, size, mtime=int(time.time()) if recent else 1_700_000_000)
    old, times = path.read_bytes(), (int(path.stat().st_mtime),) * 2
    sizes = {**SIZES, "RECENT": 60 if recent else 0}
    assert archive(constants=sizes).counts == (1, 0, 0)
    path.write_bytes(old[::-1])
    os.utime(path, times if recent else None)
    operation = "PutObject" if size == SMALL else "CompleteMultipartUpload"
    if how == "killed":
        s3.on(operation, first(archive.kill, lost_answer), key="f")
    else:
        s3.on(operation, lost_answer, key="f", times=2)
    result = archive(constants={**IMPATIENT, **sizes})
    assert result.status == (-9 if how == "killed" else 3), result.stderr
    wait_for(lambda: not s3.under_way)
    assert_rows_are_true(archive)
    s3.rules.clear()
    path.write_bytes(old)
    os.utime(path, times)
    assert archive(constants=SIZES).counts == (1, 0, 0)
    archive.assert_invariant()
    assert archive.contents() == {"f": old}


def test_file_that_is_looked_at_again_in_vain_is_not_paid_twice(archive, box, s3):
    """Only what is sent may have replaced its object."""
    write(box.root / "f", SMALL, mtime=int(time.time()))
    assert archive(constants={"RECENT": 60}).counts == (1, 0, 0)
    box.on("OPEN", b"f", faulty_sftp.status(PERMISSION_DENIED))
    assert archive().counts == (0, 0, 1)
    assert archive().counts[::2] == (0, 0)
    assert s3.requests["PutObject"] == 1


def test_large_file_that_grew_after_it_was_listed_is_left_to_the_next_run(archive, box):
    """No memory was set aside for the rest of it."""
    path = box.root / "large"
    write(path, LARGE)

    def grown():
        with path.open("ab") as file:
            file.write(b"!" * 100_000)
        os.utime(path, (1_700_000_005,) * 2)

    box.on("OPEN", b"large", faulty_sftp.first(grown))
    assert_failed(archive(constants=SIZES), {"large": "changed"})
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert_all_archived(archive, box)


def test_composite_checksum_is_none_of_the_whole(archive, box, s3):
    write(box.root / "large", LARGE)
    composite = headers(x_amz_checksum_crc32="nvQJ1w==-2", x_amz_checksum_type="COMPOSITE")
    s3.always("HeadObject", composite)
    result = archive(constants=SIZES)
    assert result.status == 0, result.stderr
    assert "only sizes are compared" in result.stderr


@pytest.mark.parametrize("then", [error(403, "ExpiredToken"), Exchange.forward])
def test_run_that_is_stopped_while_s3_answers_says_how_it_ended(archive, box, s3, then):
    """A refusal is told though a signal came; a run that was complete is no early end."""
    write(box.root / "f", SMALL)
    running = []

    def stop():
        running[0].process.terminate()
        time.sleep(0.3)

    s3.on("PutObject", first(stop, then), key="f")
    running.append(archive.start())
    result = running[0].wait(30)
    assert result.status in (0, 143)
    assert (result.status == 143) == ("Ended early" in result.stdout)
    assert len(archive.rows()) == len(archive.objects()) == result.summary["Uploaded files"]
    if not archive.objects():
        assert "ExpiredToken" in result.stderr


def test_refusal_is_told_though_a_signal_comes_while_the_others_end(archive, box, s3):
    for name in ("a", "b"):
        write(box.root / name, SMALL)

    def stop():
        time.sleep(1)
        archive.terminate()
        time.sleep(0.5)

    other = s3.on("PutObject", first(stop), key="b")
    both = first(lambda: wait_for(lambda: other.fired), error(403, "ExpiredToken"))
    s3.on("PutObject", both, key="a")
    result = archive()
    assert result.status == 143
    assert "ExpiredToken" in result.stderr
    assert set(archive.objects()) == {"b"}
    assert archive.rows().keys() == {"./b"}


def test_file_that_s3_takes_while_it_fails_the_others_is_recorded(archive, box, s3):
    def has_ended():
        return not box.transports[-1].is_active()

    write(box.root / "0slow", SMALL)
    for n in range(LIMIT + 10):
        write(box.root / f"f{n}", SMALL)
    s3.always("PutObject", first(lambda: wait_for(has_ended)), key="0slow")
    s3.always("PutObject", reset)
    result = archive(constants={**SIZES, "S3_ATTEMPTS": 1}, TRANSFERS="4")
    assert result.status == 1, result.stderr
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
