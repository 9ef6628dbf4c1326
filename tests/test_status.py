"""`status`: what is archived and how both ends are, also when they cannot be reached."""

import json
import os
import re
import signal
import socket

import pytest
from conftest import OLD, earlier_database, fill, real
from faults import scripted_fixtures, wait_for
from faulty_sftp import drop, unanswered
from scripted_s3 import error, hang
from servers import OpenSSH, ProFTPD

GB = 2**30
EMPTY = {
    "archived": {"files": 0, "bytes": 0},
    "storage_a_month": 0,
    "runs": [],
    "unfinished_uploads": 0,
    "lifecycle_rule": False,
    "versioning": False,
}


box, archive = scripted_fixtures()


def told(archive, **settings):
    """The status as JSON."""
    result = archive("status", "--json", **settings)
    assert result.status == 0, result.output
    return json.loads(result.stdout)


# --- What is archived ---


def test_files_and_bytes_are_told_by_class_with_their_price(archive, box):
    fill(box.root, {"a": 1, "b": 1, "c": 1})
    archive()
    archive.execute("UPDATE files SET size = ?", 50 * GB)
    archive.execute("UPDATE objects SET storage_class = 'STANDARD' WHERE path = './c'")

    status = told(archive)

    assert status["archived"] == {"files": 3, "bytes": 150 * GB}
    assert status["deep_archive"] == {"files": 2, "bytes": 100 * GB}
    assert status["standard"] == {"files": 1, "bytes": 50 * GB}
    # 100 GB x 0.00099 = 0.099, two objects add 0.0000004; 50 GB x 0.023 = 1.15.
    assert status["storage_a_month"] == pytest.approx(1.2490004, abs=1e-6)
    assert told(archive, PRICES="STANDARD.month=0")["storage_a_month"] == pytest.approx(
        0.099, 1e-4
    )
    warning = "warning: some files are not in STORAGE_CLASS, but in STANDARD"
    assert warning in archive("status").stderr
    assert (
        "not the"
        not in archive(
            "status",
            STORAGE_CLASS="STANDARD",
            SMALL_FILES_BELOW="1",
            SMALL_FILES_CLASS="DEEP_ARCHIVE",
        ).stderr
    )
    text = archive("status").stdout
    for note in (text, status["prices"]):
        assert re.search(r"estimates, prices of \w+ \d{4} for ", note)


def test_rows_of_an_earlier_script_count_as_the_class_that_is_set(archive):
    earlier_database(archive, [("./a", 5, OLD), ("./b", 6, OLD)])

    assert told(archive)["deep_archive"] == {"files": 2, "bytes": 11}


def test_status_changes_nothing(archive, box, s3):
    fill(box.root, {"a": 1})
    archive()
    state, objects = archive.state_db.read_bytes(), archive.objects()
    others = {path.name for path in archive.folder.iterdir()}
    before = len(archive.bucket.writes())

    assert archive("status").status == 0

    assert archive.state_db.read_bytes() == state
    assert {path.name for path in archive.folder.iterdir()} == others
    assert archive.objects() == objects
    assert archive.bucket.writes()[before:] == []


def test_status_before_the_first_run_tells_that_there_is_nothing(archive):
    status = told(archive)

    assert {name: status[name] for name in EMPTY} == EMPTY
    assert not archive.state_db.exists()
    text = archive("status").stdout
    assert "no run" in text
    for row in ("Lifecycle rule", "Versioning"):
        assert re.search(f"^{row} *: no$", text, re.MULTILINE)


def test_lost_state_is_said_to_be_missing_for_nothing_is_told_of_the_archive(archive, box):
    fill(box.root, {"a": 1})
    archive()
    missing = f"warning: {archive.state_db} is missing"
    assert missing not in archive("status").stderr
    archive.state_db.unlink()

    assert missing in archive("status").stderr


# --- The runs ---


def test_each_run_is_told_with_its_result(archive, box):
    fill(box.root, {"good": 1_000, "bad": 1})
    box.always("OPEN", b"bad", lambda request: request.status(3))
    assert archive().status == 3
    archive.execute("UPDATE runs SET started_at = 1000, ended_at = 1010")
    archive.execute("INSERT INTO runs (started_at) VALUES (2000)")  # killed
    archive.execute("INSERT INTO runs VALUES (3000, 3005, 143, 7, 8, 9, 10, 0.5)")

    status = told(archive)
    text = archive("status").stdout
    lines = re.findall(r"^(?:19|20)\d\d-.*", text, re.MULTILINE)
    assert re.search("^Run  .* uploaded  failed       bytes      took$", text, re.MULTILINE)

    names = ("started_at", "ended_at", "status", "uploaded", "failed", "bytes")
    assert [tuple(run[name] for name in names) for run in status["runs"]] == [
        (3000, 3005, 143, 7, 9, 10),
        (2000, None, None, None, None, None),
        (1000, 1010, 3, 1, 1, 1_000),
    ]
    assert [" ".join(line.split()[3:]) for line in lines] == [
        "143 7 9 10 bytes 5 s",
        "no end 0 0 0 bytes",
        "3 1 1 1,000 bytes 10 s",
    ]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, None)], ids=["TERM", "KILL"]
)
def test_run_that_was_ended_by_a_signal_is_told_as_such(archive, box, number, status):
    fill(box.root, {"good": 1_000, "stuck": 1})
    stuck = box.always("OPEN", b"stuck", unanswered)
    running = archive.start()
    wait_for(lambda: stuck.fired and archive.rows())
    os.kill(running.process.pid, number)
    running.wait()

    [run] = told(archive)["runs"]

    assert run["status"] == status
    assert (run["ended_at"] is None) is (status is None)
    assert run["uploaded"] == (None if status is None else 1)


# --- The box ---


@pytest.mark.parametrize("server", [OpenSSH, ProFTPD])
def test_room_on_the_box_is_what_the_server_tells(archive_of, server):
    with real(server) as box:
        fill(box.root, {"f": 1})
        room = told(archive_of(box))
        disk = os.statvfs(box.root)

    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    # Others write on this disk, too.
    assert room["box_used"] == pytest.approx(used, rel=0.1)
    assert room["box_free"] == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.1)


def test_server_that_does_not_tell_the_room_is_said_to(archive):
    result = archive("status")

    assert result.status == 0
    assert re.search("^Box free *: not known", result.stdout, re.MULTILINE)
    assert told(archive)["box_used"] is told(archive)["box_free"] is None


@pytest.mark.parametrize("trouble", ["refuses", "drops", "refuses the login"])
def test_box_that_cannot_be_asked_leaves_the_rest(archive, box, trouble):
    fill(box.root, {"a": 10})
    archive()
    before = box.connections
    box.always("INIT", None, drop)

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        settings = {
            "refuses": {"HETZNER_PORT": closed.getsockname()[1]},
            "drops": {},
            "refuses the login": {"HETZNER_PASSWORD": "wrong"},
        }[trouble]
        status = told(archive, **settings)

    assert status["box_used"] is status["box_free"] is None
    assert status["archived"] == status["deep_archive"] == {"files": 1, "bytes": 10}
    assert (status["unfinished_uploads"], status["versioning"]) == (0, False)
    assert box.connections - before <= 1, "it is not tried again and again"


# --- The bucket ---


def test_what_the_bucket_has_set_is_told(archive):
    client, at = archive.bucket.client, {"Bucket": archive.bucket.name}
    for key in ("mine/a", "mine/b", "other"):
        client.create_multipart_upload(**at, Key=key)
    abort = {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}
    rule = {"ID": "r", "Status": "Enabled", "Filter": {"Prefix": "mine/"}, **abort}
    archive.bucket.set_lifecycle(rule)
    client.put_bucket_versioning(**at, VersioningConfiguration={"Status": "Enabled"})

    mine, all_of_it = told(archive, S3_PREFIX="mine/"), told(archive)

    names = ("unfinished_uploads", "lifecycle_rule", "versioning")
    assert [mine[name] for name in names] == [2, True, True]
    assert [all_of_it[name] for name in names] == [3, False, True]


def test_lifecycle_rule_that_aborts_nothing_is_none(archive):
    abort = {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}
    rules = [
        {"ID": "off", "Status": "Disabled", "Filter": {"Prefix": ""}, **abort},
        {
            "ID": "other",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "Expiration": {"Days": 9},
        },
        {
            "ID": "of another prefix",
            "Status": "Enabled",
            "Filter": {"And": {"Prefix": "other/", "ObjectSizeGreaterThan": 1}},
            **abort,
        },
    ]
    archive.bucket.set_lifecycle(*rules)

    assert told(archive)["lifecycle_rule"] is False


def test_lifecycle_rule_that_deletes_objects_is_warned_of(archive):
    """By check as well. One that ends earlier versions or delete markers, is switched off, or
    is for other keys, does no harm."""
    expires = {"Status": "Enabled", "Expiration": {"Days": 9}}
    rules = [
        {**expires, "ID": "all", "Filter": {"Prefix": ""}},
        {
            **expires,
            "ID": "mine",
            "Filter": {"And": {"Prefix": "mine/", "ObjectSizeGreaterThan": 1}},
        },
        {**expires, "ID": "a folder of mine", "Filter": {"Prefix": "mine/photos/"}},
        {**expires, "ID": "other keys", "Filter": {"Prefix": "other/"}},
        {**expires, "ID": "off", "Filter": {"Prefix": ""}, "Status": "Disabled"},
        {
            "ID": "earlier versions",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "NoncurrentVersionExpiration": {"NoncurrentDays": 180},
            "Expiration": {"ExpiredObjectDeleteMarker": True},
        },
    ]
    archive.bucket.set_lifecycle(*rules)

    for command in ("status", "check"):
        result = archive(command, S3_PREFIX="mine/")

        warned = [line for line in result.stderr.splitlines() if "deletes objects" in line]
        assert result.status == 0
        assert warned == [
            f"warning: the lifecycle rule '{name}' deletes objects"
            for name in ("all", "mine", "a folder of mine")
        ]


def test_what_the_credentials_may_not_ask_is_said_to_be_so(archive, box, s3):
    fill(box.root, {"a": 10})
    archive()
    s3.always("GET", error(403, "AccessDenied"))
    s3.always("ListMultipartUploads", error(403, "AccessDenied"))

    result, status = archive("status"), told(archive)

    assert result.status == 0
    asked = ("Unfinished uploads", "Lifecycle rule", "Versioning")
    for label in asked:
        assert re.search(f"^{label} *: not known", result.stdout, re.MULTILINE)
    assert "the credentials may not do this: see the README's IAM policy" in result.stderr
    names = ("unfinished_uploads", "lifecycle_rule", "versioning")
    assert [status[name] for name in names] == [None] * 3
    assert status["archived"] == status["deep_archive"] == {"files": 1, "bytes": 10}


def test_what_the_credentials_may_ask_is_asked_though_they_may_not_ask_all(archive, s3):
    s3.always("ListMultipartUploads", error(403, "AccessDenied"))
    status = told(archive)
    assert status["unfinished_uploads"] is None
    assert (status["lifecycle_rule"], status["versioning"]) == (False, False)


def test_server_without_lifecycle_rules_is_asked_for_versioning(archive, s3):
    at = {"Bucket": archive.bucket.name, "VersioningConfiguration": {"Status": "Enabled"}}
    archive.bucket.client.put_bucket_versioning(**at)

    s3.on("GET", error(501, "NotImplemented"))  # the first is about lifecycle rules
    result = archive("check")
    assert ("ok     versioning" in result.stdout, result.status) == (True, 0)
    s3.on("GET", error(501, "NotImplemented"))
    assert told(archive)["versioning"] is True


@pytest.mark.parametrize("trouble", ["unreachable", "hangs", "no such bucket"])
def test_bucket_that_cannot_be_asked_leaves_the_rest(archive, box, s3, trouble):
    fill(box.root, {"a": 10})
    archive()
    faults = {"hangs": hang, "no such bucket": error(404, "NoSuchBucket")}
    if trouble in faults:
        s3.always(None, faults[trouble])
    settings = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"} if trouble == "unreachable" else {}
    before = box.connections
    s3.requests.clear()

    impatient = {"S3_READ_LIMIT": 0.3} if trouble == "hangs" else {}
    status = told(archive, constants=impatient, **settings)

    assert status["archived"] == status["deep_archive"] == {"files": 1, "bytes": 10}
    assert status["storage_a_month"] is not None
    names = ("unfinished_uploads", "lifecycle_rule", "versioning")
    assert [status[name] for name in names] == [None] * 3
    assert box.connections == before + 1, "the box is asked all the same"
    assert s3.requests.total() <= 3, "who does not answer is not asked again and again"


def test_damaged_state_leaves_the_rest(archive):
    archive()
    archive.state_db.write_bytes(b"SQLite format 3\0" + b"x" * 5_000)

    status = told(archive)

    assert status["archived"] is status["storage_a_month"] is status["runs"] is None
    assert status["unfinished_uploads"] == 0
