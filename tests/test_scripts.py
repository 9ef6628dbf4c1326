"""What scripts call: summaries as JSON, `restore --wait`, and the version."""

import json
import re
import signal
import threading
import time
from datetime import datetime, timedelta

import pytest
from conftest import LABELS, OLD, fill
from faults import wait_for
from scripted_s3 import Answer, error, first, hang
from test_restore import BUSY, READY, damaged, failed, listed, stored, whole

SUMMARY = {"uploaded_files", "skipped_files", "failed_files", "bytes_uploaded", "duration_sec"}
OUTCOMES = ("already_there", "restored_files", "asked_of_s3", "under_way_at_s3")
OUTCOMES += ("not_asked_for", "failed_files")


@pytest.fixture
def archive(archive_of, faulty_box, s3):
    return archive_of(faulty_box, AWS_ENDPOINT_URL=s3.url)


@pytest.fixture
def to(tmp_path):
    return tmp_path / "restored"


def summary(result):
    """The one JSON object that stdout is; it tells the true exit status."""
    found = json.loads(result.stdout)
    assert found["exit_status"] == result.status, result.stderr
    return found


def outcomes(found):
    """The numbers of a restore's summary that are not zero."""
    return {name: found[name] for name in OUTCOMES if found[name]}


# --- run --json -------------------------------------------------------------


def test_summary_of_a_run_is_one_json_object(archive, faulty_box):
    fill(faulty_box.root, {"a": 1000, "b": 24, ".hidden": 1})

    result = archive("run", "--json")

    found = summary(result)
    assert found.keys() == {*SUMMARY, "hidden_entries", "spent", "exit_status"}
    assert {re.sub(r"\W+", "_", label.lower()).strip("_") for label in LABELS} == SUMMARY
    assert found["uploaded_files"] == 2
    assert found["bytes_uploaded"] == 1024
    assert found["hidden_entries"] == 1
    assert (found["skipped_files"], found["failed_files"], found["exit_status"]) == (0, 0, 0)
    # Two PUTs into DEEP_ARCHIVE in us-east-1, and perhaps a listing of the empty bucket.
    assert found["spent"] in (0.0001, 0.000105, 0.00011)
    again = summary(archive("run", "--json"))
    assert (again["uploaded_files"], again["skipped_files"], again["spent"]) == (0, 2, 0)


def test_table_is_on_stderr_and_in_the_log_instead(archive, faulty_box):
    fill(faulty_box.root, {"a": 10})
    result = archive("run", "--json")
    for text in (result.stderr, result.log):
        assert "==== SUMMARY ====" in text
        assert "Uploaded files : 1\n" in text
    assert "==== SUMMARY ====" not in result.stdout
    plain = archive("run")
    assert "==== SUMMARY ====" in plain.stdout
    assert "==== SUMMARY ====" not in plain.stderr


def test_summary_tells_of_a_file_that_failed(archive, faulty_box, s3):
    fill(faulty_box.root, {"a": 10, "bad": 10})
    s3.always("PutObject", error(400, "InvalidTag"), key="bad")
    result = archive("run", "--json")
    found = summary(result)
    assert (found["exit_status"], found["uploaded_files"], found["failed_files"]) == (3, 1, 1)
    assert set(failed(result)) == {"./bad"}


def test_amount_that_is_not_known_is_null(archive, faulty_box):
    """JSON has no NaN."""
    fill(faulty_box.root, {"a": 10})
    result = archive("run", "--json", STORAGE_CLASS="GLACIER_IR")
    assert summary(result)["spent"] is None
    assert "NaN" not in result.stdout


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"S3_BUCKET": "no-such-bucket-anywhere"}, "NoSuchBucket"),
        ({"HETZNER_PASSWORD": "wrong"}, "login"),
    ],
    ids=["bucket", "login"],
)
def test_fatal_error_ends_with_a_json_object_too(archive, faulty_box, settings, reason):
    fill(faulty_box.root, {"a": 10})
    result = archive("run", "--json", **settings)
    found = summary(result)
    assert (found["exit_status"], found["uploaded_files"]) == (1, 0)
    assert found["ended_early"] == "by an error"
    assert reason in result.stderr


def test_error_before_anything_is_counted_leaves_the_exit_status(archive, faulty_box, s3):
    """Another run holds the lock."""
    fill(faulty_box.root, {"a": 10})
    held = s3.on("PutObject", hang)
    archive.start()
    wait_for(lambda: held.fired)
    assert summary(archive("run", "--json")) == {"exit_status": 11}


def test_json_that_nobody_reads_leaves_the_exit_status_of_what_failed(archive, faulty_box):
    fill(faulty_box.root, {"a" * 255: 1})
    running = archive.start("run", "--json", S3_PREFIX="p" * 800 + "/")
    running.process.stdout.close()
    assert running.process.wait(60) == 3, running.process.stderr.read()


def test_run_leaves_cron_nothing_to_mail_where_python_shares_locks_by_a_process(
    archive, faulty_box
):
    """As Python 3.14 does by default. That process complains of a lock that is left behind."""
    fill(faulty_box.root, {"f": 1000})
    method = "import multiprocessing; multiprocessing.set_start_method('forkserver')"
    result = archive.start("-q", before=method).wait()
    assert (result.status, result.stderr) == (0, "")


def test_run_that_a_signal_ends_prints_its_summary(archive, faulty_box, s3):
    fill(faulty_box.root, {"a": 10})
    held = s3.on("PutObject", hang)
    running = archive.start("run", "--json", constants={"STOP_LIMIT": 1})
    wait_for(lambda: held.fired)

    running.process.terminate()
    result = running.wait(15)

    found = summary(result)
    assert (found["exit_status"], found["ended_early"]) == (143, "by SIGTERM")
    assert found["uploaded_files"] == 0


@pytest.mark.parametrize(
    ("second", "ends"), [(signal.SIGINT, "at once"), (signal.SIGTERM, "in order")]
)
def test_second_ctrl_c_ends_the_run_at_once(archive, faulty_box, s3, second, ends):
    """A second SIGTERM may be the first one again: sudo and a shell both pass it on."""
    fill(faulty_box.root, {"a": 10})
    held = s3.on("PutObject", hang)
    running = archive.start("run", constants={"STOP_LIMIT": 3, "EXIT_GRACE": 9})
    wait_for(lambda: held.fired)

    running.process.terminate()
    time.sleep(0.5)
    running.process.send_signal(second)
    result = running.wait(15)

    assert result.status == 128 + (second if ends == "at once" else signal.SIGTERM)
    assert bool(result.summary) == (ends == "in order")


@pytest.mark.parametrize("name", ["Progress.close", "print_line"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_at_the_very_end_does_not_cut_off_the_summary(archive, name, number):
    """There is no traceback, either: see Archive.result."""
    at_the_end = f"""
act = archive.{name}
def act_and_signal(*values):
    os.kill(os.getpid(), {int(number)})
    act(*values)
archive.{name} = act_and_signal
"""
    result = archive.start("run", "--json", before=at_the_end).wait()
    assert result.status in (0, 128 + number)
    summary(result)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_at_the_very_end_does_not_hide_a_fatal_error(archive, number):
    at_the_end = f"""
close = archive.Progress.close
def close_and_signal(progress):
    os.kill(os.getpid(), {int(number)})
    close(progress)
archive.Progress.close = close_and_signal
"""
    result = archive.start(before=at_the_end, REMOTE_PATH="/nowhere").wait()
    assert result.status == 128 + number
    assert "/nowhere cannot be listed" in result.stderr


@pytest.mark.parametrize("broken", ["Exclusions", "FileReader"])
def test_defect_is_one_line_and_verbose_shows_where(archive, faulty_box, broken):
    fill(faulty_box.root, {"a": 10})
    result = archive.start(before=f"archive.{broken} = None").wait()
    assert result.status == (1 if broken == "Exclusions" else 3)
    assert "unexpected TypeError: 'NoneType' object is not callable" in result.stderr

    running = archive.start("-v", before=f"archive.{broken} = None")
    _, stderr = running.process.communicate(timeout=60)
    assert re.search(r"^traceback\\nTraceback .* in ", stderr, re.MULTILINE)


# --- restore --json ---------------------------------------------------------


def test_summary_of_a_restore_is_one_json_object(archive, s3, to):
    """Of each pass; the estimate is no part of it."""
    stored(archive, {"cold": b"content"}, "DEEP_ARCHIVE")
    stored(archive, {"warm": b"warm"})

    first = archive("restore", "--to", to, "--yes", "--json")

    found = summary(first)
    assert found.keys() == {
        *(*OUTCOMES, "restored_bytes", "asked_at", "promised_by", "exit_status")
    }
    assert outcomes(found) == {"restored_files": 1, "asked_of_s3": 1}
    assert (found["exit_status"], found["restored_bytes"]) == (75, 4)
    for title in ("ESTIMATE", "RESTORE"):
        assert f"==== {title} ====" in first.stderr
    second = summary(archive("restore", "--to", to, "--yes", "--json"))
    assert outcomes(second) == {"already_there": 1, "restored_files": 1}
    assert second["exit_status"] == 0
    assert "asked_at" not in second


def test_summary_tells_of_an_object_that_failed(archive, s3, to):
    stored(archive, {"good": b"content", "bad": b"content"})
    s3.always("GetObject", error(403, "AccessDenied"), key="bad")
    result = archive("restore", "--to", to, "--json")
    found = summary(result)
    assert outcomes(found) == {"restored_files": 1, "failed_files": 1}
    assert found["exit_status"] == 3
    assert set(failed(result)) == {"bad"}


def test_restore_that_cannot_begin_leaves_the_exit_status(archive, to):
    result = archive("restore", "--to", to, "--json")
    assert summary(result) == {"exit_status": 1}
    assert "nothing is archived" in result.stderr
    stored(archive, {"cold": b"content"}, "DEEP_ARCHIVE")
    result = archive("restore", "--to", to, "--json")
    assert summary(result) == {"exit_status": 2}
    assert "--yes" in result.stderr


def test_restore_that_a_signal_ends_prints_its_summary(archive, s3, to):
    stored(archive, {"file": b"content"})
    held = s3.on("GetObject", hang)
    running = archive.start("restore", "--to", to, "--json", constants={"STOP_LIMIT": 1})
    wait_for(lambda: held.fired)

    running.process.terminate()
    result = running.wait(15)

    found = summary(result)
    assert (found["exit_status"], found["restored_files"]) == (143, 0)


# --- restore --wait ---------------------------------------------------------


def moment(told):
    """The moment of a local time with its offset, which may be another two days later."""
    return datetime.strptime(told.replace("T", " "), "%Y-%m-%d %H:%M:%S %z")


def thaw(s3, *keys):
    """S3 restores these as slowly as it likes: they are under way in the listings of two
    passes after the one that asks for them, and then there."""
    s3.always("RestoreObject", lambda exchange: Answer(202, {}))
    s3.on("ListObjectsV2", listed(**dict.fromkeys(keys, BUSY)), nth=3, times=4)
    s3.on("ListObjectsV2", listed(**dict.fromkeys(keys, READY)), nth=7, times=100)


def cold_and_back(archive, files):
    """Cold objects of which moto has copies, so that a GET is answered."""
    expected = stored(archive, files, "DEEP_ARCHIVE")
    for key in files:
        archive.bucket.client.restore_object(
            Bucket=archive.bucket.name, Key=key, RestoreRequest={"Days": 1}
        )
    return expected


def test_wait_goes_on_until_all_is_there(archive, s3, to):
    """Asking once, and telling until when S3 has promised it."""
    expected = cold_and_back(archive, {"a": b"content of a", "b": b"content of b"})
    expected |= stored(archive, {"warm": b"warm"})
    thaw(s3, "a", "b")

    result = archive("restore", "--to", to, "--yes", "--wait", constants={"WAIT_PAUSE": 0.1})

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(to) == expected
    assert s3.requests["RestoreObject"] == 2
    assert s3.requests["ListObjectsV2"] == 4 * 2
    passes = result.stdout.split("==== RESTORE ====")[1:]
    assert len(passes) == 4
    assert "Run the same command again" not in result.stderr
    assert result.stderr.count("2 files are still being restored by S3") == 3
    times = set()
    for one in passes:
        asked, promised = re.findall(r"^(?:Asked at|Promised by) *: (.*)$", one, re.MULTILINE)
        times.add(asked)
        assert moment(promised) - moment(asked) == timedelta(hours=48)
    assert len(times) == 1
    asked = moment(times.pop()).timestamp()
    assert abs(asked - time.time()) < 60


def test_file_that_is_deleted_while_others_are_waited_for_comes_back(archive, s3, to):
    expected = cold_and_back(archive, {"a": b"content"})
    expected |= stored(archive, {"warm": b"warm"})
    thaw(s3, "a")
    # The second pass sees that it is there.
    later = threading.Timer(0.3, (to / "warm").unlink)
    s3.on("HeadObject", first(later.start), key="warm")
    result = archive("restore", "--to", to, "--yes", "--wait", constants={"WAIT_PAUSE": 1})

    assert result.status == 0, result.stderr
    assert whole(to) == expected
    assert s3.requests["GetObject"] == 3


def test_wait_warns_of_another_name_once(archive, s3, to):
    expected = cold_and_back(archive, {"a": b"content"})
    expected |= stored(archive, {"x": b"file", "x/y": b"in a folder"})
    thaw(s3, "a")
    result = archive("restore", "--to", to, "--yes", "--wait", constants={"WAIT_PAUSE": 0.1})
    assert result.status == 0, result.stderr
    assert len(whole(to)) == len(expected)
    assert result.stderr.count("x is a folder as well") == 1


def test_wait_ends_with_3_if_something_has_failed(archive, s3, to):
    cold_and_back(archive, {"a": b"content"})
    stored(archive, {"no/../file": b""})
    thaw(s3, "a")
    arguments = ("--yes", "--wait", "--json", "--tier", "standard")
    result = archive("restore", "--to", to, *arguments, constants={"WAIT_PAUSE": 0.1})
    found = summary(result)
    assert found["exit_status"] == 3
    assert outcomes(found) == {"restored_files": 1, "failed_files": 1}
    hours = moment(found["promised_by"]) - moment(found["asked_at"])
    assert hours == timedelta(hours=12)


def test_wait_does_not_wait_for_what_is_there(archive, s3, to):
    stored(archive, {"warm": b"warm"})
    result = archive("restore", "--to", to, "--wait")
    assert result.status == 0
    assert "Asked at" not in result.stdout
    assert s3.requests["ListObjectsV2"] == 2


def test_outage_of_s3_while_it_waits_does_not_end_it(archive, s3, to):
    expected = cold_and_back(archive, {"a": b"content"})
    s3.always("RestoreObject", lambda exchange: Answer(202, {}))
    outage = s3.on("ListObjectsV2", error(503, "SlowDown"), nth=3)
    s3.on("ListObjectsV2", listed(a=READY), nth=4, times=100)
    constants = {"WAIT_PAUSE": 0.1, "S3_ATTEMPTS": 1}
    result = archive("restore", "--to", to, "--yes", "--wait", constants=constants)
    assert (result.status, outage.fired) == (0, 1), result.stderr
    assert "SlowDown" in result.stderr
    assert whole(to) == expected


def test_outage_of_s3_ends_a_restore_that_does_not_wait(archive, s3, to):
    stored(archive, {"a": b"content"})
    s3.on("ListObjectsV2", error(503, "SlowDown"))
    result = archive("restore", "--to", to, constants={"S3_ATTEMPTS": 1})
    assert result.status == 1
    assert "SlowDown" in result.stderr


def test_cold_object_that_is_damaged_on_its_way_is_not_waited_for(archive, s3, to):
    cold_and_back(archive, {"a": b"content"})
    s3.always("ListObjectsV2", listed(a=READY))
    s3.always("GetObject", damaged)
    result = archive("restore", "--to", to, "--wait")
    assert result.status == 3
    assert failed(result)["a"].startswith("damaged on its way")


def test_file_whose_object_is_replaced_while_others_are_waited_for_is_restored(archive, s3, to):
    """It was there, and had been compared."""
    expected = cold_and_back(archive, {"a": b"content"})
    stored(archive, {"warm": b"warm"})
    assert archive("restore", "warm", "--to", to).status == 0

    def replace():
        expected.update(stored(archive, {"warm": b"another"}, mtime=OLD + 60))

    s3.on("ListObjectsV2", first(replace, listed(a=BUSY)), nth=5)
    thaw(s3, "a")
    arguments = ("restore", "--to", to, "--yes", "--wait", "--overwrite")
    result = archive(*arguments, constants={"WAIT_PAUSE": 0.1})
    assert result.status == 0, result.stderr
    assert whole(to) == expected


def test_folder_that_is_gone_is_told_of(archive, s3, to):
    stored(archive, {"a": b"content"})
    s3.on("ListObjectsV2", first(to.rmdir))
    result = archive("restore", "--to", to)
    assert result.status == 1
    assert f"{to} cannot be used any more" in result.stderr


def test_listing_that_fails_while_files_are_downloaded_does_not_end_the_waiting(
    archive, s3, to
):
    expected = cold_and_back(archive, {"a": b"content", "b": b"content"})
    s3.always("RestoreObject", lambda exchange: Answer(202, {}))
    s3.on("GetObject", first(lambda: time.sleep(0.5)))

    def breaks_off(exchange):
        """The first entry, and a token that leads to an error."""
        answer = listed(a=READY)(exchange)
        body = re.sub(
            b"<Contents>(?:(?!</Contents>).)*<Key>b</Key>.*?</Contents>", b"", answer.body
        )
        more = (
            b"<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>"
        )
        answer.body = re.sub(b"<IsTruncated>false</IsTruncated>", more, body)
        answer.headers["content-length"] = str(len(answer.body))
        return answer

    s3.on("ListObjectsV2", listed(a=READY))
    s3.on("ListObjectsV2", breaks_off, nth=2)
    outage = s3.on("ListObjectsV2", error(503, "SlowDown"), nth=3)
    s3.on("ListObjectsV2", listed(a=READY, b=READY), nth=4, times=100)
    constants = {"WAIT_PAUSE": 0.1, "S3_ATTEMPTS": 1}
    result = archive("restore", "--to", to, "--yes", "--wait", constants=constants)
    assert (result.status, outage.fired) == (0, 1), result.stderr
    assert whole(to) == expected


def test_refusal_while_it_waits_ends_it(archive, s3, to):
    """As it ends a pass: whoever calls it may call it again."""
    stored(archive, {"a": b"content"}, "DEEP_ARCHIVE")
    s3.always("RestoreObject", lambda exchange: Answer(202, {}))
    s3.on("ListObjectsV2", error(403, "AccessDenied"), nth=3)
    result = archive(
        "restore", "--to", to, "--yes", "--wait", "--json", constants={"WAIT_PAUSE": 0.1}
    )
    assert summary(result)["exit_status"] == 1
    assert "AccessDenied" in result.stderr


def test_without_wait_it_ends_with_75(archive, s3, to):
    stored(archive, {"cold": b"content"}, "DEEP_ARCHIVE")
    result = archive("restore", "--to", to, "--yes")
    assert result.status == 75
    assert "Run the same command again later" in result.stderr
    assert re.search(r"^Asked at *: 2", result.stdout, re.MULTILINE)
    assert re.search(r"^Promised by *: 2", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_signal_ends_the_waiting_at_once(archive, s3, to, form):
    """Nothing is asked for twice by whoever goes on."""
    expected = cold_and_back(archive, {"a": b"content"})
    thaw(s3, "a")
    running = archive.start("restore", "--to", to, "--yes", "--wait", *form)
    log = archive.log_file
    wait_for(lambda: log.exists() and "looking again" in log.read_text())

    began = time.monotonic()
    running.process.terminate()
    result = running.wait(15)

    assert result.status == 143, result.stderr
    assert time.monotonic() - began < 5
    if form:
        found = summary(result)
        assert outcomes(found) == {"asked_of_s3": 1}
        assert found["promised_by"] > found["asked_at"]
    else:
        assert result.stdout.count("==== RESTORE ====") == 1
    arguments = ("restore", "--to", to, "--wait")
    assert archive(*arguments, constants={"WAIT_PAUSE": 0.1}).status == 0
    assert whole(to) == expected
    assert s3.requests["RestoreObject"] == 1


# --- The version ------------------------------------------------------------


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version_is_told_without_any_setting(archive, s3, option):
    result = archive(option, S3_BUCKET=None, HETZNER_HOST=None)
    assert (result.status, result.stderr) == (0, "")
    assert re.fullmatch(r"archive\.py \d+\.\d+\n", result.stdout)
    assert s3.requests.total() == 0


def test_requests_carry_the_version(archive, faulty_box, s3):
    fill(faulty_box.root, {"a": 10})
    agents = set()

    def look(exchange):
        agents.add(exchange.headers["user-agent"])
        return exchange.forward()

    s3.always(None, look)
    assert archive().status == 0
    version = archive("--version").stdout.split()[1]
    assert agents
    assert all(re.match(rf"archive\.py/{re.escape(version)}(\s|$)", one) for one in agents)
