"""Bringing files back: what is cold is asked for, what is ready comes back bit for bit.

`archive` has a fast box that is only read, `boxed` each real server in turn; both reach
S3 through `s3`, which counts and lies. Files are archived cold, or warm where it does
not matter, so that one pass brings them back.
"""

import contextlib
import csv
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from urllib.parse import unquote

import pytest
from conftest import CHANGED, MIB, OLD, PROGRAM, SNAPSHOT, earlier_database, fill, tree
from faults import LARGE, SIZES, SMALL, wait_for
from faulty_sftp import FAILURE, Dropped, answer_then_drop, drop, status
from relay import Relay
from scripted_s3 import error, halfway, lost_answer, no_checksums, rewritten
from servers import OpenSSH
from test_names import HOSTILE

WARM = {"STORAGE_CLASS": "STANDARD"}
BODY = 3 * MIB + 7  # bytes of a file that is cut in the middle
BUSY = "<IsRestoreInProgress>true</IsRestoreInProgress>"
READY = (
    "<IsRestoreInProgress>false</IsRestoreInProgress>"
    "<RestoreExpiryDate>2126-11-21T00:00:00.000Z</RestoreExpiryDate>"
)
SOON = {"RECONNECT_PAUSES": (0, 0.1, 0.2)}


@pytest.fixture
def archive(archive_of, faulty_box, s3):
    return archive_of(faulty_box, AWS_ENDPOINT_URL=s3.url)


@pytest.fixture
def boxed(archive_of, box, s3):
    os.chmod(box.root, 0o777)  # the server's user is to write here
    return archive_of(box, AWS_ENDPOINT_URL=s3.url)


@pytest.fixture
def to(tmp_path):
    return tmp_path / "restored"


def archived(archive, files, mtime=OLD, **settings):
    """Archive these files, the hidden ones too; `whole` of the box."""
    fill(archive.box.root, files, mtime)
    result = archive(INCLUDE_HIDDEN="true", constants=SIZES, **settings)
    assert result.status == 0, result.stderr
    return whole(archive.box.root)


def whole(root):
    """{path: (size, crc32, mtime)} of all files below a folder, the hidden ones too."""
    found = {}
    for path, what in tree(root).items():
        at = os.stat(os.path.join(os.fsencode(root), path))
        found[path] = (*what, int(at.st_mtime))
    return found


def restored_in(box, folder):
    """`whole` of a folder on a box, once no temporary file is left there, or for good."""
    limit = time.monotonic() + 2  # what was sent last may still be under way
    while time.monotonic() < limit:
        found = whole(box.root / folder)
        if not any(b"partial" in path for path in found):
            break
        time.sleep(0.05)
    return found


def lose_state(archive, bucket=None):
    """As if the machine had died; with `bucket`, the snapshot is gone as well."""
    archive.state_db.unlink()
    if bucket:
        bucket.client.delete_object(Bucket=bucket.name, Key=SNAPSHOT)


def listed(**status):
    """S3 tells in its listing of {key: how the restore stands}."""

    def told(body):
        for key, said in status.items():
            tag = f"<Key>{key}</Key>".encode()
            more = f"<RestoreStatus>{said}</RestoreStatus>".encode()
            body = body.replace(tag, tag + more)
        return body

    return rewritten(told)


def relisted(tag, values):
    """S3 lists {value: other one} in these tags."""

    def told(body):
        for value, other in values.items():
            body = body.replace(*(f"<{tag}>{text}</{tag}>".encode() for text in (value, other)))
        return body

    return rewritten(told)


def damaged(exchange):
    """The object with one bit turned over on its way."""
    answer = exchange.forward()
    middle = len(answer.body) // 2
    turned = bytes([answer.body[middle] ^ 1])
    answer.body = answer.body[:middle] + turned + answer.body[middle + 1 :]
    return answer


def note(seen, what):
    """Put `what(exchange)` into the list `seen` and answer truly."""

    def look(exchange):
        seen.append(what(exchange))
        return exchange.forward()

    return look


def stop(archive):
    """Send SIGTERM, and wait until it was heard."""
    archive.running[-1].terminate()
    wait_for(lambda: "ending" in archive.log_file.read_text())


def kill(archive):
    archive.running[-1].kill()
    archive.running[-1].wait()


def wait_for_partial(folder):
    """Wait until a file is being written there under its temporary name."""
    wait_for(lambda: folder.exists() and any("partial" in name for name in os.listdir(folder)))


def failed(result):
    """{name: reason} of the files that failed."""
    return dict(failure.split(": ", 1) for failure in result.failures)


# --- The whole circle -------------------------------------------------------

TREE = {
    "empty": b"",
    "one byte": b"1",
    "photos/2024/a.jpg": 300_000,
    "photos/2024/b.jpg": MIB - 1,
    "photos/large.mp4": LARGE,
    ".hidden/file": 10,
}


@pytest.mark.parametrize(
    ("options", "tier", "days"),
    [((), "Bulk", 7), (("--tier", "standard", "--days", "3"), "Standard", 3)],
    ids=["bulk", "standard"],
)
def test_all_comes_back_bit_for_bit_with_its_times_when_the_state_is_lost(
    archive, s3, to, options, tier, days
):
    expected = archived(archive, TREE, mtime=1_234_567_890)
    lose_state(archive)
    asked = []
    rule = s3.always("RestoreObject", note(asked, lambda exchange: exchange.body().decode()))

    first = archive("restore", "--to", to, "--yes", *options)

    assert first.status == 75, first.stderr
    assert tree(to) == {} if to.exists() else True
    assert len(asked) == len(TREE)
    for body in asked:
        assert re.search(r"<Days>(\d+)</Days>", body)[1] == str(days)
        assert re.search(r"<Tier>(\w+)</Tier>", body)[1] == tier
    assert rule.fired == len(TREE)

    second = archive("restore", "--to", to, "--yes", *options)

    assert second.status == 0, second.stderr
    assert whole(to) == expected
    assert not archive.state_db.exists()  # nothing was archived by it


def test_all_comes_back_to_the_box_bit_for_bit_with_its_times(boxed, box):
    expected = archived(boxed, TREE, mtime=1_234_567_890)
    lose_state(boxed)

    assert boxed("restore", "--to-box", "back/here", "--yes").status == 75
    result = boxed("restore", "--to-box", "back/here", "--yes")

    assert result.status == 0, result.stderr
    assert whole(box.root / "back/here") == expected
    again = boxed("restore", "--to-box", "back/here")
    assert (again.status, again.failures) == (0, [])


def test_all_comes_back_from_the_bucket_alone_when_the_snapshot_is_gone_too(
    archive, bucket, s3, to
):
    expected = archived(archive, TREE, mtime=1_234_567_890, **WARM)
    lose_state(archive, bucket)
    s3.on("GetObject", damaged, key="photos/large.mp4")

    result = archive("restore", "--to", to)

    assert result.status == 3, result.stderr
    assert list(failed(result)) == ["photos/large.mp4"]  # by the CRC-32 that S3 keeps
    assert archive("restore", "--to", to).status == 0
    assert whole(to) == expected


def test_object_that_somebody_else_stored_gets_the_time_when_it_was_stored(archive, bucket, to):
    bucket.client.put_object(Bucket=bucket.name, Key="foreign", Body=b"content")
    stored = bucket.client.head_object(Bucket=bucket.name, Key="foreign")["LastModified"]

    result = archive("restore", "--to", to)

    assert result.status == 0, result.stderr
    assert (to / "foreign").read_bytes() == b"content"
    assert int((to / "foreign").stat().st_mtime) == int(stored.timestamp())


def test_prefix_and_remote_path_are_not_part_of_what_comes_back(archive, faulty_box, to):
    settings = {**WARM, "S3_PREFIX": "my-box/", "REMOTE_PATH": "base"}
    fill(faulty_box.root, {"base/a/file": b"content", "other": b"x"})
    assert archive(**settings).status == 0

    result = archive("restore", "base/a", "--to", to, **settings)

    assert result.status == 0, result.stderr
    assert set(tree(to)) == {b"a/file"}
    assert archive("restore", "a/file", "--to", to / "2", **settings).status == 0
    assert set(tree(to / "2")) == {b"a/file"}


def test_every_name_comes_back_byte_for_byte(archive, to):
    files = {name: b"content of " + name for name in HOSTILE}
    files.update({b"folder " + name[:200] + b"/file": name for name in HOSTILE})
    expected = archived(archive, files, **WARM)
    lose_state(archive)

    result = archive("restore", "--to", to)

    assert result.status == 0, result.stderr
    assert whole(to) == expected


def test_every_name_comes_back_to_the_box_byte_for_byte(boxed, box):
    files = {name: b"content of " + name for name in HOSTILE}
    files.update({b"folder " + name[:200] + b"/file": name for name in HOSTILE})
    expected = archived(boxed, files, **WARM)

    result = boxed("restore", "--to-box", "back")

    assert result.status == 0, result.stderr
    assert whole(box.root / "back") == expected


# --- Which files ------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a"], {b"a/x", b"a/deep/y"}),
        (["./a/", "a/x", "a/deep"], {b"a/x", b"a/deep/y"}),
        (["a/x"], {b"a/x"}),
        (["ab", "a.txt"], {b"ab/x", b"a.txt"}),
        (["new\nline"], {b"new\nline"}),
        (["latin-\udce9"], {b"latin-\xe9"}),
        ([], {b"a/x", b"a/deep/y", b"ab/x", b"a.txt", b"new\nline", b"latin-\xe9"}),
    ],
)
def test_only_the_files_and_folders_that_were_named_come_back(archive, s3, to, paths, expected):
    names = ["a/x", "a/deep/y", "ab/x", "a.txt", "new\nline", b"latin-\xe9"]
    archived(archive, dict.fromkeys(names, b"content"), **WARM)
    s3.requests.clear()

    result = archive("restore", *paths, "--to", to)

    assert result.status == 0, result.stderr
    assert set(tree(to)) == expected
    assert s3.requests["GetObject"] == len(expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("backup", {b"one", b"backup/two", b"two"}),
        ("./backup/", {b"one", b"backup/two", b"two"}),
        ("backup/backup", {b"backup/two"}),
        ("backup/two", {b"two"}),
    ],
)
def test_folder_with_the_name_of_remote_path_may_be_named(archive, to, path, expected):
    """As on the box; it is in a folder of the same name."""
    names = ["backup/one", "backup/backup/two", "backup/two"]
    archived(archive, dict.fromkeys(names, b"content"), REMOTE_PATH="backup", **WARM)
    result = archive("restore", path, "--to", to, REMOTE_PATH="backup")
    assert result.status == 0, result.stderr
    assert set(tree(to)) == expected


@pytest.mark.parametrize("state", ["with state", "without state"])
def test_path_under_which_nothing_is_archived_is_a_failure(archive, bucket, to, state):
    archived(archive, {"a/x": b"content", "ab": b"content"}, **WARM)
    if state == "without state":
        lose_state(archive, bucket)

    result = archive("restore", "ab", "b", "a/x/y", "../a", "--to", to)

    assert result.status == 3
    assert set(failed(result)) == {"b", "a/x/y", "../a"}
    assert set(tree(to)) == {b"ab"}


# --- Cold, under way, ready -------------------------------------------------


def test_nothing_is_asked_for_or_fetched_before_the_cost_is_agreed_to(archive, s3, to):
    archived(archive, {"cold": b"content"})
    archived(archive, {"warm": b"content"}, **WARM)
    s3.requests.clear()

    result = archive("restore", "--to", to)

    assert result.status == 2, result.stderr
    assert "--yes" in result.stderr
    assert "ESTIMATE" in result.stdout
    assert set(s3.requests) == {"ListObjectsV2"}
    assert not to.exists()


@pytest.mark.parametrize(("answer", "ending", "asked"), [("n", 2, 0), ("", 2, 0), ("y", 75, 1)])
def test_at_a_terminal_the_cost_is_asked_about(archive, s3, to, answer, ending, asked):
    archived(archive, {"cold": b"content"})
    terminal, theirs = pty.openpty()
    os.write(terminal, f"{answer}\n".encode())
    command = [sys.executable, PROGRAM, "--env-file", archive.env_file, "restore", "--to", to]

    done = subprocess.run(
        command,
        check=False,
        env=archive.environment(),
        stdin=theirs,
        capture_output=True,
        timeout=60,
    )

    os.close(terminal)
    os.close(theirs)
    assert done.returncode == ending, done.stderr
    assert b"ESTIMATE" in done.stdout
    assert s3.requests["RestoreObject"] == asked


def test_what_is_cold_is_asked_for_what_is_under_way_waited_for_what_is_ready_fetched(
    archive, bucket, s3, to
):
    archived(archive, {name: name.encode() for name in ("cold", "busy", "ready")})
    archived(archive, {"warm": b"warm"}, **WARM)
    days = {"Days": 1, "GlacierJobParameters": {"Tier": "Bulk"}}
    bucket.client.restore_object(Bucket=bucket.name, Key="ready", RestoreRequest=days)
    s3.always("ListObjectsV2", listed(busy=BUSY, ready=READY))
    s3.about.clear()

    result = archive("restore", "--to", to, "--yes")

    assert result.status == 75, result.stderr
    assert result.failures == []
    assert {path.name: path.read_bytes() for path in to.iterdir()} == {
        "ready": b"ready",
        "warm": b"warm",
    }
    touched = {about for about in s3.about if about[1]}
    assert touched == {("RestoreObject", "cold"), ("GetObject", "ready"), ("GetObject", "warm")}


def test_nothing_has_to_be_agreed_to_while_all_is_under_way(archive, s3, to):
    archived(archive, {"busy": b"content"})
    s3.always("ListObjectsV2", listed(busy=BUSY))
    s3.requests.clear()

    assert archive("restore", "--to", to).status == 75
    assert set(s3.requests) == {"ListObjectsV2"}


def test_copy_whose_time_is_over_though_it_is_listed_is_asked_for_anew(archive, s3, to):
    archived(archive, {"old": b"content"})
    s3.always("ListObjectsV2", listed(old=READY.replace("2126", "2020")))

    assert archive("restore", "--to", to).status == 2
    assert archive("restore", "--to", to, "--yes").status == 75
    assert s3.requests["RestoreObject"] == 1


def test_copy_that_has_expired_since_it_was_listed_is_asked_for_by_a_later_pass(
    archive, s3, to
):
    expected = archived(archive, {"late": b"content"})
    s3.on("ListObjectsV2", listed(late=READY), times=2)

    first = archive("restore", "--to", to)

    assert (first.status, first.failures) == (75, []), first.stderr
    assert s3.requests["RestoreObject"] == 0
    assert whole(to) == {} if to.exists() else True
    s3.rules.clear()
    assert archive("restore", "--to", to, "--yes").status == 75
    assert s3.requests["RestoreObject"] == 1
    assert archive("restore", "--to", to, "--yes").status == 0
    assert whole(to) == expected


@pytest.mark.parametrize(
    ("answer", "code", "ending"),
    [
        (409, "RestoreAlreadyInProgress", 75),
        (403, "ObjectAlreadyInActiveTierError", 0),
        (403, "AccessDenied", 1),
        (400, "MalformedXML", 3),
    ],
)
def test_what_s3_says_to_a_request_for_a_copy(archive, bucket, s3, to, answer, code, ending):
    archived(archive, {"file": b"content"})
    days = {"Days": 1, "GlacierJobParameters": {"Tier": "Bulk"}}
    bucket.client.restore_object(Bucket=bucket.name, Key="file", RestoreRequest=days)
    s3.always("RestoreObject", error(answer, code))

    result = archive("restore", "--to", to, "--yes")

    assert result.status == ending, result.stderr
    assert bool(result.failures) == (ending == 3)
    assert (to / "file").exists() == (ending == 0)
    assert s3.requests["RestoreObject"] == 1


def test_manifest_lists_what_is_cold_and_nothing_is_asked_for(archive, bucket, s3, to):
    names = ["a b", "comma,quote\"'", "new\nline", "per%cent+", b"latin-\xe9", "photos/é"]
    archived(archive, dict.fromkeys(names, b"content"))
    archived(archive, {"warm": b"warm"}, **WARM)
    cold = set(archive.objects()) - {"warm"}
    manifest = archive.folder / "manifest.csv"

    result = archive("restore", "--to", to, "--manifest", manifest)

    assert result.status == 75, result.stderr
    assert s3.requests["RestoreObject"] == 0
    assert set(tree(to)) == {b"warm"}
    assert manifest.read_bytes().isascii()
    rows = list(csv.reader(manifest.read_text().splitlines()))
    assert {(name, unquote(key)) for name, key in rows} == {(bucket.name, k) for k in cold}
    assert len(rows) == len(cold)


def test_manifest_that_cannot_be_written_is_told_of(archive, to):
    archived(archive, {"cold": b"content"})
    result = archive("restore", "--to", to, "--manifest", "/dev/full")
    assert (result.status, result.stdout.count("RESTORE")) == (2, 0)
    assert "--manifest" in result.stderr


def test_manifest_is_not_named_where_none_was_written(archive, s3, to):
    """The copy has expired since it was listed."""
    archived(archive, {"late": b"content"})
    s3.on("ListObjectsV2", listed(late=READY), times=2)
    manifest = archive.folder / "manifest.csv"
    result = archive("restore", "--to", to, "--manifest", manifest)
    assert result.status == 75
    assert not manifest.exists()
    assert str(manifest) not in result.stderr
    assert "run the same command again" in result.stderr


def test_requests_are_as_few_as_can_be(archive, s3, to):
    names = [f"f{number}" for number in range(30)]
    archived(archive, dict.fromkeys(names, b"content"))
    s3.requests.clear()
    assert archive("restore", "--to", to, "--yes").status == 75
    assert s3.requests == {"RestoreObject": 30, "ListObjectsV2": s3.requests["ListObjectsV2"]}
    assert s3.requests["ListObjectsV2"] <= 2

    s3.always("ListObjectsV2", listed(**dict.fromkeys(names, READY)))
    s3.requests.clear()
    assert archive("restore", "--to", to).status == 0
    assert s3.requests == {"GetObject": 30, "ListObjectsV2": s3.requests["ListObjectsV2"]}
    assert s3.requests["ListObjectsV2"] <= 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--to", "x", "--to-box", "y"],
        ["--to", "x", "--tier", "expedited"],
        ["--to", "x", "--days", "0"],
        ["--to-box", ""],
        ["--to", ""],
    ],
    ids=" ".join,
)
def test_wrong_use_is_told_with_status_2(archive, s3, arguments):
    result = archive("restore", *arguments)

    assert result.status == 2, result.stderr
    assert s3.requests.total() == 0


# --- What is there already --------------------------------------------------


def put_in_the_way(root):
    """Files that differ from the archived ones, a link, a folder, and one that agrees."""
    fill(root, {"other size": b"my own", "folder/inside": b"my own"})
    fill(root, {"other time": b"CONTENT"}, mtime=OLD + 1)
    fill(root, {"same": b"content"})
    os.symlink("other size", root / "link")
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o777)


OTHERS = ["link", "folder", "other size", "other time"]
NAMES = ["other size", "other time", "same", "new"]


def test_other_files_are_kept_until_told_to_overwrite_them(archive, s3, to):
    archived(archive, dict.fromkeys([*OTHERS, "same", "new"], b"content"), **WARM)
    put_in_the_way(to)
    before = whole(to)
    s3.requests.clear()

    kept = archive("restore", "--to", to)

    assert kept.status == 3
    assert set(failed(kept)) == set(OTHERS)
    assert whole(to).pop(b"new")
    assert whole(to).items() > before.items()
    assert os.readlink(to / "link") == "other size"
    assert s3.requests["GetObject"] == 1  # only what was missing

    replaced = archive("restore", "--to", to, "--overwrite")

    assert set(failed(replaced)) == {"link", "folder"}  # never anything but a file
    assert os.readlink(to / "link") == "other size"
    for name in NAMES:
        assert (to / name).read_bytes() == b"content"
        assert (to / name).stat().st_mtime == OLD
    assert set(tree(to)) == {b"other size", b"other time", b"same", b"new", b"folder/inside"}


def test_other_files_on_the_box_are_kept_until_told_to_overwrite_them(boxed, box, s3):
    archived(boxed, dict.fromkeys([*OTHERS, "same", "new"], b"content"), **WARM)
    back = box.root / "back"
    put_in_the_way(back)
    for path in (back / "other size", back / "other time"):
        os.chown(path, back.stat().st_uid, back.stat().st_gid)
    before = whole(back)
    s3.requests.clear()

    kept = boxed("restore", "--to-box", "back")

    assert kept.status == 3
    assert set(failed(kept)) == set(OTHERS)
    assert whole(back).items() > before.items()
    assert os.readlink(back / "link") == "other size"
    assert s3.requests["GetObject"] == 1

    os.unlink(back / "link")  # ProFTPD takes a link for what it points to
    replaced = boxed("restore", "folder", *NAMES, "--to-box", "back", "--overwrite")

    assert set(failed(replaced)) == {"folder"}
    for name in NAMES:
        assert (back / name).read_bytes() == b"content"
        assert (back / name).stat().st_mtime == OLD
    assert set(tree(back)) == {b"other size", b"other time", b"same", b"new", b"folder/inside"}


@pytest.mark.parametrize("place", ["--to", "--to-box"])
def test_file_that_appears_while_its_object_is_fetched_is_kept(boxed, box, s3, to, place):
    archived(boxed, {"file": BODY}, **WARM)
    target = to if place == "--to" else box.root / "back"

    def appear():
        wait_for_partial(target)
        fill(target, {"file": b"my own"})

    s3.on("GetObject", halfway(appear), key="file")

    result = boxed("restore", place, to if place == "--to" else "back")

    assert result.status == 3
    assert set(failed(result)) == {"file"}
    found = whole(to) if place == "--to" else restored_in(box, "back")
    assert (target / "file").read_bytes() == b"my own"
    assert set(found) == {b"file"}


# --- What S3 may do to it ---------------------------------------------------


@pytest.mark.parametrize("name", ["small", "large"])
def test_body_that_is_cut_goes_on_where_it_was_cut(archive, s3, to, name):
    expected = archived(archive, {"small": MIB - 1, "large": LARGE}, **WARM)
    ranges = []
    s3.on("GetObject", halfway(then_all=False), key=name)
    s3.always("GetObject", note(ranges, lambda exchange: exchange.headers.get("range")), name)

    result = archive("restore", name, "--to", to)

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(to).items() <= expected.items()
    assert s3.about["GetObject", name] == 2
    (asked,) = ranges
    assert 0 < int(re.fullmatch(r"bytes=(\d+)-\d*", asked)[1]) <= expected[name.encode()][0]


def test_trouble_of_s3_that_passes_costs_nothing(archive, s3, to):
    expected = archived(archive, {"file": b"content"})
    rules = [
        s3.on("ListObjectsV2", error(500, "InternalError")),
        s3.on("RestoreObject", error(503, "SlowDown")),
        s3.on("GetObject", error(503, "SlowDown")),
    ]

    assert archive("restore", "--to", to, "--yes").status == 75
    result = archive("restore", "--to", to, "--yes")

    assert (result.status, result.failures) == (0, []), result.stderr
    assert [rule.fired for rule in rules] == [1, 1, 1]
    assert whole(to) == expected


@pytest.mark.parametrize("operation", ["ListObjectsV2", "RestoreObject", "GetObject"])
def test_refusal_that_concerns_every_file_ends_the_pass_soon(archive, s3, to, operation):
    kind = {"RestoreObject": "DEEP_ARCHIVE"}.get(operation, "STANDARD")
    archived(archive, {f"f{number:02}": b"" for number in range(20)}, STORAGE_CLASS=kind)
    s3.requests.clear()
    s3.always(operation, error(403, "AccessDenied"))

    result = archive("restore", "--to", to, "--yes", TRANSFERS=1)

    assert result.status == 1, result.stderr
    # A single object may be denied, too; the fourth in a row is taken for all.
    assert len(result.failures) == (3 if operation == "GetObject" else 0)
    assert f"{operation}: AccessDenied" in result.stderr
    assert s3.requests[operation] <= 5


def test_state_of_another_bucket_is_refused(archive, moto, s3, to):
    archived(archive, {"file": b"content"}, **WARM)
    moto.client().create_bucket(Bucket="quite-another")

    result = archive("restore", "--to", to, S3_BUCKET="quite-another")

    assert result.status == 1, result.stderr
    assert not to.exists()


def test_body_that_is_always_cut_fails_alone_and_leaves_nothing(archive, s3, to):
    """Nothing comes of any request, or else it would get on."""
    archived(archive, {"cut": BODY, "well": b"content"}, **WARM)

    def nothing_of_it(exchange):
        exchange.handler.send_response_only(200)
        for name, value in exchange.forward().headers.items():
            exchange.handler.send_header(name, value)
        exchange.handler.end_headers()

    rule = s3.always("GetObject", nothing_of_it, key="cut")

    result = archive("restore", "--to", to, constants={"S3_ATTEMPTS": 3})

    assert result.status == 3
    assert list(failed(result)) == ["cut"]
    assert 2 <= rule.fired <= 3
    assert set(whole(to)) == {b"well"}
    s3.rules.clear()
    assert archive("restore", "--to", to).status == 0


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("state", ["with state", "without state"])
def test_body_that_is_damaged_on_its_way_is_not_kept(archive, bucket, s3, to, state, name):
    expected = archived(archive, {"small": 3000, "large": LARGE}, **WARM)
    if state == "without state":
        lose_state(archive, bucket)
    s3.always("GetObject", damaged, key=name)

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert set(failed(result)) == {name}
    kept = {path: what for path, what in expected.items() if path != name.encode()}
    assert whole(to) == kept


def test_object_that_is_not_what_was_recorded_is_not_kept(archive, bucket, to):
    names = ["other bytes", "other size", "gone", "well"]
    archived(archive, dict.fromkeys(names, b"content"), **WARM)
    for name, body in (("other bytes", b"CONTENT"), ("other size", b"content and more")):
        bucket.client.put_object(Bucket=bucket.name, Key=name, Body=body)
    bucket.client.delete_object(Bucket=bucket.name, Key="gone")

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert set(failed(result)) == {"other bytes", "other size", "gone"}
    assert set(whole(to)) == {b"well"}


@pytest.mark.parametrize("ignored", ["range", "if-match"])
def test_server_that_ignores_what_was_asked_for_is_not_believed(
    archive, bucket, s3, to, ignored
):
    """Where no checksum tells: an earlier script's object, on a server without them."""
    size = 4 * MIB
    one, two = os.urandom(size), os.urandom(size)
    bucket.client.put_object(Bucket=bucket.name, Key="f", Body=one)
    earlier_database(archive, [("./f", size, OLD)], int(time.time()))
    s3.on("GetObject", halfway(then_all=False), key="f")

    def other(exchange):
        at = int(exchange.headers["range"][6:-1])
        if ignored == "if-match":
            bucket.client.put_object(Bucket=bucket.name, Key="f", Body=two)
            del exchange.headers["if-match"]
            return no_checksums(exchange)
        answer = no_checksums(exchange)
        answer.body = one[: size - at]
        answer.headers["content-range"] = f"bytes 0-{size - at - 1}/{size}"
        return answer

    s3.on("GetObject", other, key="f", nth=2)
    result = archive("restore", "f", "--to", to)
    assert result.status == 3
    assert "than was asked for" in failed(result)["f"]
    assert not (to / "f").exists()


def test_object_that_was_replaced_while_it_was_fetched_is_not_mixed(archive, bucket, s3, to):
    """Not even where no checksum would tell."""
    archived(archive, {"file": b"1" * BODY}, **WARM)
    lose_state(archive, bucket)

    def replace():
        bucket.client.put_object(Bucket=bucket.name, Key="file", Body=b"2" * BODY)

    def half_and_unsummed(exchange):
        del exchange.headers["x-amz-checksum-mode"]
        return halfway(replace, then_all=False)(exchange)

    s3.on("GetObject", half_and_unsummed, key="file")

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert whole(to) == {}


ESCAPE = "\u201b"


def test_keys_that_lead_out_of_the_folder_are_refused_one_by_one(archive, bucket, s3, to):
    keys = {
        "k0": "../x",
        "k1": "/x",
        "k2": "a/../../x",
        "k3": "a//x",
        "k4": f"..{ESCAPE}2Fx",
        "k5": f"{ESCAPE}2Fx",
        "k6": f"{ESCAPE}2E{ESCAPE}2E/x",
        "k7": f"a{ESCAPE}00x",
        "k8": "./x",
        "k9": "a/..",
        "l0": "folder/",
    }
    archived(archive, dict.fromkeys([*keys, "well"], b"content"), **WARM)
    lose_state(archive, bucket)
    s3.always("ListObjectsV2", relisted("Key", keys))
    s3.requests.clear()

    result = archive("restore", "--to", to / "1/2")

    assert result.status == 3
    assert len(result.failures) == len(keys)
    assert set(tree(to)) == {b"1/2/well"}
    assert s3.requests["GetObject"] == 2  # the snapshot, and the one that is well
    assert not os.path.lexists("/x")


def test_two_keys_of_one_name_do_not_mix(archive, bucket, s3, to):
    """The second is none that archive.py would make: some other program has stored it.

    It breaks off in the middle of its object when the first is whole.
    """
    first, second = "ab", f"a{ESCAPE}62"
    for key, byte in ((first, b"1"), (second, b"2")):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=byte * BODY)
    both = threading.Barrier(2)

    def meet():
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # in vain, if only one is fetched

    def meet_and_fall_behind():
        meet()
        limit = time.monotonic() + 0.5
        while not (to / "ab").exists() and time.monotonic() < limit:
            time.sleep(0.01)

    s3.on("GetObject", halfway(meet), key=first)
    s3.on("GetObject", halfway(meet_and_fall_behind, then_all=False), key=second)
    s3.always("GetObject", error(404, "NoSuchKey"), key=second)

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert result.failures
    for path in to.iterdir():
        assert path.name == "ab"
        assert path.read_bytes() == b"1" * BODY


# --- It is stopped, killed, or started twice --------------------------------


@pytest.mark.parametrize("place", ["--to", "--to-box"])
@pytest.mark.parametrize(("end", "ending"), [(stop, 143), (kill, -9)])
def test_pass_that_is_ended_in_the_middle_of_a_file_is_completed_by_the_next(
    boxed, box, s3, to, place, end, ending
):
    expected = archived(boxed, {"a": 1000, "b": BODY, "c": 1000}, **WARM)
    folder = to if place == "--to" else "back"
    target = to if place == "--to" else box.root / "back"
    seen = []

    def ended():
        wait_for_partial(target)
        seen.extend(os.listdir(target))
        end(boxed)

    s3.on("GetObject", halfway(ended), key="b")

    running = boxed.start("restore", place, folder, TRANSFERS=1)
    result = running.wait()

    assert result.status == ending, result.stderr
    assert "Restored files  : 1\n" in result.stdout or end is kill
    assert "b" not in seen
    assert not (target / "b").exists()
    again = boxed("restore", place, folder)
    assert again.status == 0, again.stderr
    assert whole(target) == expected


def test_pass_that_is_killed_between_two_names_leaves_no_temporary_file(archive, to):
    """The whole file may have its name already, and its temporary one still."""
    expected = archived(archive, {"file": b"content"}, **WARM)
    killed = (
        "import os\n"
        "for name in ('link', 'rename', 'replace'):\n"
        "    def act(*args, real=getattr(os, name), **more):\n"
        "        real(*args, **more)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    setattr(os, name, act)\n"
    )
    assert archive.start("restore", "--to", to, before=killed).wait().status == -9
    assert (to / "file").exists()

    assert archive("restore", "--to", to).status == 0

    assert whole(to) == expected


def test_signal_ends_the_asking(archive, s3, to):
    """Every request is paid for."""
    archived(archive, {f"f{number:02}": b"" for number in range(40)})

    def stop_then_answer(exchange):
        stop(archive)
        return exchange.forward()

    s3.on("RestoreObject", stop_then_answer, nth=3)

    running = archive.start("restore", "--to", to, "--yes", TRANSFERS=1)
    result = running.wait()

    assert result.status == 143, result.stderr
    assert s3.requests["RestoreObject"] <= 5


def test_second_restore_at_once_ends_with_11(archive, s3, to):
    expected = archived(archive, {"file": BODY}, **WARM)
    results = []

    def second():
        results.append(archive("restore", "--to", to))

    s3.on("GetObject", halfway(second), key="file")

    first = archive("restore", "--to", to)

    assert [result.status for result in results] == [11]
    assert first.status == 0, first.stderr
    assert whole(to) == expected


# --- The place to restore to ------------------------------------------------


def test_file_that_cannot_be_stored_fails_alone(archive, to):
    archived(archive, {"a/file": b"content", "b": b"content"}, **WARM)
    fill(to, {"a": b"no folder"})

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert set(failed(result)) == {"a/file"}
    assert set(tree(to)) == {b"a", b"b"}


def test_folder_that_cannot_be_made_is_told_of(archive, tmp_path):
    archived(archive, {"file": b"content"}, **WARM)
    (tmp_path / "no folder").write_bytes(b"")

    result = archive("restore", "--to", tmp_path / "no folder" / "in it")

    assert result.status in (1, 3)
    assert "no folder" in result.stderr or "Not a directory" in result.stderr
    assert "unexpected" not in result.stderr


def test_disk_that_is_full_ends_the_pass_and_leaves_nothing_half_done(archive, to):
    expected = archived(archive, {"a": b"content", "b": BODY}, **WARM)
    full = (
        "import os\n"
        "def full(_):\n"
        "    raise OSError(28, 'No space left on device')\n"
        "os.fsync = full\n"
    )

    result = archive.start("restore", "--to", to, before=full).wait()

    assert result.status == 1
    assert "No space left" in result.stderr
    assert whole(to) == {}
    assert archive("restore", "--to", to).status == 0
    assert whole(to) == expected


def test_box_that_is_full_ends_the_pass(archive, faulty_box, s3):
    """Each further file would be paid for, and fail: also while there is room again, for
    what was written of the last one is removed."""
    archived(archive, {f"f{number}": 3 * MIB for number in range(8)}, **WARM)

    def room():
        back = faulty_box.root / "back"
        used = sum(path.stat().st_size for path in back.iterdir()) if back.exists() else 0
        return 2 * MIB - used

    def told(request):
        if request.name != b"statvfs@openssh.com":
            return request.reply()
        free = max(0, room()) // 4096
        return request.packet(201, struct.pack(">11Q", 4096, 4096, 9_999, free, free, *[0] * 6))

    def within(request):
        return request.reply() if len(request.data) <= room() else request.status(FAILURE)

    faulty_box.always("EXTENDED", None, told)
    faulty_box.always("WRITE", None, within)
    s3.requests.clear()

    result = archive("restore", "--to-box", "back", TRANSFERS="1")

    assert result.status == 1, result.stderr
    assert "the box cannot store it" in result.stderr
    assert s3.requests["GetObject"] < 4
    assert restored_in(faulty_box, "back") == {}


def test_box_that_may_not_be_written_to_is_told_of(boxed, box):
    archived(boxed, {"file": b"content"}, **WARM)
    os.chmod(box.root, 0o755)

    result = boxed("restore", "--to-box", "back")

    # A box of our own user can be written to, and there is nothing to see.
    assert (result.status, list(failed(result))) == (3, ["file"]) or os.getuid()
    assert not (box.root / "back").exists() or os.getuid()


def test_connection_that_is_lost_in_the_middle_of_a_write_costs_nothing(boxed, box, s3):
    expected = archived(boxed, {"file": BODY, "other": 1000}, **WARM)

    def cut():
        wait_for_partial(box.root / "back")
        relay.cut()

    with Relay(box.host, box.port) as relay:
        s3.on("GetObject", halfway(cut), key="file")

        settings = box.settings(port=relay.port)
        result = boxed("restore", "--to-box", "back", constants=SOON, **settings)

        assert relay.connections == 2
    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(box.root / "back") == expected


def test_box_that_is_gone_ends_the_pass_and_the_next_completes_it(boxed, box, s3):
    expected = archived(boxed, {"file": BODY, "other": 1000}, **WARM)

    def vanish():
        wait_for_partial(box.root / "back")
        relay.stop()

    with Relay(box.host, box.port) as relay:
        settings = box.settings(port=relay.port)
        s3.on("GetObject", halfway(vanish), key="file")

        result = boxed("restore", "--to-box", "back", constants=SOON, **settings)

        assert result.status == 1, result.stderr
        assert not (box.root / "back/file").exists()
        relay.start()
        assert boxed("restore", "--to-box", "back", **settings).status == 0
    assert whole(box.root / "back") == expected


def done_then_drop(request):
    """Do what is asked, and cut the connection before the answer."""
    request.reply()
    raise Dropped


@pytest.mark.parametrize("fault", [drop, done_then_drop, answer_then_drop])
@pytest.mark.parametrize("kind", ["MKDIR", "OPEN", "WRITE", "FSETSTAT", "CLOSE", "RENAME"])
def test_connection_that_is_cut_at_any_request_costs_nothing(archive, faulty_box, kind, fault):
    expected = archived(archive, {"folder/file": 100_000}, **WARM)
    cut = faulty_box.on(kind, None, fault)

    result = archive("restore", "--to-box", "back", constants=SOON)

    assert cut.fired == 1
    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(faulty_box.root / "back") == expected


@pytest.mark.parametrize("kind", ["OPEN", "WRITE", "FSETSTAT", "CLOSE", "RENAME"])
def test_file_that_the_box_refuses_fails_and_leaves_nothing(archive, faulty_box, kind):
    archived(archive, {"file": 100_000}, **WARM)
    refused = faulty_box.on(kind, None, status(FAILURE))  # of the WRITEs one: a hole

    result = archive("restore", "--to-box", "back")

    assert refused.fired
    assert result.status == 3, result.stderr
    assert list(failed(result)) == ["file"]
    assert restored_in(faulty_box, "back") == {}


def test_file_that_fails_leaves_nothing_on_the_box_and_nothing_open(archive, faulty_box, s3):
    archived(archive, dict.fromkeys("abc", b"content"), **WARM)
    s3.always("GetObject", damaged)
    faulty_box.requests.clear()

    result = archive("restore", "--to-box", "back")

    assert result.status == 3
    assert set(failed(result)) == set("abc")
    assert restored_in(faulty_box, "back") == {}
    assert faulty_box.requests["OPEN"] == faulty_box.requests["CLOSE"] == 3


@pytest.mark.parametrize(
    ("folder", "place"), [("/back//", "back"), ("./back", "back"), ("/", ""), (".", "")]
)
def test_folder_on_the_box_may_be_written_in_any_way(archive, faulty_box, folder, place):
    expected = archived(archive, {"a/b": b"content", "c": b"content"}, **WARM)
    for name in ("a/b", "c"):
        os.unlink(faulty_box.root / name)

    result = archive("restore", "--to-box", folder)

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(faulty_box.root / place) == expected


def test_box_without_posix_rename_has_files_replaced_too(archive, faulty_box):
    expected = archived(archive, {"file": b"content"}, **WARM)
    fill(faulty_box.root, {"back/file": b"my own"})

    result = archive("restore", "--to-box", "back", "--overwrite")

    assert faulty_box.requests["EXTENDED"]
    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(faulty_box.root / "back") == expected


def test_open_that_a_lost_session_carries_out_late_is_noticed(archive, faulty_box):
    """It empties what the next session has written."""
    archived(archive, {"f": b"content"}, **WARM)
    expired, emptied = threading.Event(), threading.Event()

    def late(request):
        expired.wait(30)
        reply = request.reply()
        emptied.set()
        return reply

    def meanwhile(request):
        expired.set()
        emptied.wait(30)
        return request.reply()

    faulty_box.on("OPEN", None, late)
    faulty_box.on("RENAME", None, meanwhile)
    constants = {**SOON, "SILENCE_LIMIT": 2}
    result = archive("restore", "--to-box", "back", constants=constants)
    assert emptied.is_set()
    assert result.status == 3
    assert "something else" in failed(result)["f"]


def test_write_that_the_box_cuts_short_is_noticed(archive, faulty_box):
    archived(archive, {"file": 100_000}, **WARM)

    def less(request):
        request.data = request.data[:-1]
        return request.reply()

    faulty_box.on("WRITE", None, less, at=99_999)

    result = archive("restore", "--to-box", "back")

    assert result.status == 3
    assert list(failed(result)) == ["file"]
    assert restored_in(faulty_box, "back") == {}


# --- What only the state or only S3 knows -----------------------------------


def test_object_that_is_newer_than_its_record_comes_back_by_what_s3_knows(archive, bucket, to):
    """The run that replaced it was lost, and its snapshot with it."""
    archived(archive, {"file": b"old"})
    newer = b"newer content"
    bucket.client.put_object(
        Bucket=bucket.name,
        Key="file",
        Body=newer,
        Metadata={"mtime": "1700000000"},
        ChecksumAlgorithm="CRC32",
    )
    archive.execute("UPDATE files SET uploaded_at = uploaded_at - 86400")

    result = archive("restore", "--to", to, "--yes")

    assert result.status == 0, result.stderr
    assert (to / "file").read_bytes() == newer
    assert int((to / "file").stat().st_mtime) == 1_700_000_000


@pytest.mark.parametrize("newer", [b"other words", b"a longer version"])
def test_object_that_is_newer_than_the_snapshot_comes_back_by_what_s3_knows(
    archive, s3, to, newer
):
    """Replaced seconds after it was recorded, by a run that was lost with its state."""
    archived(archive, {"file": b"first words", "other": b"same"}, **WARM)
    time.sleep(1.1)  # S3 tells whole seconds
    fill(archive.box.root, {"file": newer}, OLD + 1)
    s3.always("PutObject", error(403, "AccessDenied"), key=SNAPSHOT)
    assert archive(**WARM).counts == (1, 1, 0)
    archive.state_db.unlink()
    (archive.box.root / "file").unlink()

    for expected in (2, 0):
        result = archive("restore", "--to", to)
        assert result.status == 0, result.stderr
        assert f"Restored files  : {expected}" in result.stdout
        assert (to / "file").read_bytes() == newer
        assert (to / "file").stat().st_mtime == OLD + 1


@pytest.mark.parametrize("metadata", [{}, {"mtime": str(OLD)}], ids=["no time", "time"])
@pytest.mark.parametrize("algorithm", ["SHA256", "CRC32"])
def test_record_holds_where_s3_does_not_tell_of_another_version(
    archive, bucket, to, metadata, algorithm
):
    """As in a copy of the bucket that another tool made, and damaged."""
    contents = {"changed": b"evil", "shorter": b"goo", "same": b"good"}
    archived(archive, dict.fromkeys(contents, b"good"), **WARM)
    for key, body in contents.items():
        bucket.client.put_object(
            Bucket=bucket.name,
            Key=key,
            Body=body,
            ChecksumAlgorithm=algorithm,
            Metadata=metadata,
        )
    archive.execute("UPDATE files SET uploaded_at = uploaded_at - 86400")

    result = archive("restore", "--to", to)

    assert (result.status, set(failed(result))) == (3, {"changed", "shorter"}), result.stderr
    assert set(whole(to)) == {b"same"}
    assert (to / "same").stat().st_mtime == OLD


@pytest.mark.parametrize(("size", "fault"), [(SMALL, "PutObject"), (LARGE, "HeadObject")])
def test_object_whose_answer_was_lost_comes_back_by_what_s3_knows(archive, s3, to, size, fault):
    """Its row is that of the one before it, and there is no file any more."""
    archived(archive, {"file": b"old", "other": b"same"}, **WARM)
    newer = bytes(size)
    fill(archive.box.root, {"file": newer}, OLD + 1)
    s3.always(fault, lost_answer, key="file")
    assert archive(constants=SIZES, **WARM).status == 3
    s3.rules.clear()
    (archive.box.root / "file").unlink()

    result = archive("restore", "--to", to)

    assert result.status == 0, result.stderr
    assert (to / "file").read_bytes() == newer
    assert (to / "file").stat().st_mtime == OLD + 1
    assert result.stderr.count("stored anew") == 1
    assert "file was stored anew after it was recorded" in result.stderr


def test_times_come_back_from_a_server_that_changes_the_case_of_names(archive, bucket, s3, to):
    archived(archive, {"file": b"content"}, **WARM)
    lose_state(archive, bucket)

    def other_case(exchange):
        answer = exchange.forward()
        answer.headers["X-Amz-Meta-Mtime"] = answer.headers.pop("x-amz-meta-mtime")
        return answer

    s3.always("GetObject", other_case, key="file")

    assert archive("restore", "--to", to).status == 0
    assert (to / "file").stat().st_mtime == OLD


def test_folder_that_cannot_be_made_is_told_of_before_anything_is_paid(archive, s3):
    archived(archive, {"file": b"content"})

    result = archive("restore", "--to", "/proc/no such folder", "--yes")  # not even root can

    assert result.status == 1, result.stderr
    assert "/proc/no such folder" in result.stderr
    assert s3.requests["RestoreObject"] == 0


@pytest.mark.parametrize("place", ["--to", "--to-box"])
def test_folder_without_the_room_is_told_of_before_anything_is_paid(
    boxed, bucket, s3, to, place
):
    archived(boxed, {"file": b"content"})
    lose_state(boxed, bucket)
    where = (place, to if place == "--to" else "back")
    # The first listing asks for any object.
    s3.on("ListObjectsV2", relisted("Size", {7: 2 << 60}), nth=2)

    result = boxed("restore", *where)

    assert result.status == 2
    assert "2,097,152.0 TiB are to be restored, but only " in result.stderr
    assert s3.requests["RestoreObject"] == 0
    assert "are to be restored" not in boxed("restore", *where, "--yes").stderr


def test_box_that_is_read_only_is_told_of_before_anything_is_paid(boxed, box, s3):
    archived(boxed, {"file": b"content"})
    os.chmod(box.root, 0o555)

    result = boxed("restore", "--to-box", "back/there", "--yes")

    assert result.status == 1, result.stderr
    assert "denied" in result.stderr
    assert s3.requests["RestoreObject"] == 0


@pytest.mark.parametrize("box", [OpenSSH], indirect=True, ids=["openssh"])
def test_folder_on_the_box_that_is_a_file_is_told_of_before_anything_is_paid(boxed, box, s3):
    """Others refuse to look below it, which is told file by file."""
    archived(boxed, {"file": b"content"})

    result = boxed("restore", "--to-box", "file", "--yes")

    assert result.status == 1, result.stderr
    assert "file is a file on the box, not a folder" in result.stderr
    assert s3.requests["RestoreObject"] == 0


# --- Where it may not go, and what must not stop it ---


def test_prefix_with_nothing_below_it_is_no_success(archive, to):
    archived(archive, {"a": 10})
    lose_state(archive)
    result = archive("restore", "--to", to, "--yes", S3_PREFIX="typo/")
    assert result.status == 1
    assert "nothing is archived in s3://" in result.stderr
    result = archive("restore", "--to", to, "/")  # "$unset/"
    assert result.status == 2
    assert "REMOTE_PATH" in result.stderr


def test_nothing_is_written_through_a_link(archive, to, tmp_path):
    archived(archive, {"d/x": 10, "d/e/f": 10, "y": 10}, **WARM)
    elsewhere = tmp_path / "elsewhere"
    fill(elsewhere, {"x": b"precious"})
    to.mkdir()
    (to / "d").symlink_to(elsewhere)
    result = archive("restore", "--to", to, "--overwrite")
    assert result.status == 3
    assert "link" in failed(result)["d/x"]
    assert "link" in failed(result)["d/e/f"]
    assert (elsewhere / "x").read_bytes() == b"precious"
    assert os.listdir(elsewhere) == ["x"]
    assert tree(to).keys() >= {b"y"}
    linked = tmp_path / "linked"  # the folder itself may be one
    (tmp_path / "real").mkdir()
    linked.symlink_to(tmp_path / "real")
    assert archive("restore", "--to", linked).status == 0


@pytest.mark.parametrize("folder", ["to/sub", "to//sub/", "./to/sub", "//to/sub"])
def test_nothing_is_written_through_a_link_of_the_box(archive, faulty_box, folder):
    archived(archive, {"d/x": 10, "d/e/f": 10, "y": 10}, **WARM)
    fill(faulty_box.root, {"elsewhere/x": b"precious"})
    to = faulty_box.root / "to" / "sub"
    to.mkdir(parents=True)
    (to / "d").symlink_to(faulty_box.root / "elsewhere")
    result = archive("restore", "--to-box", folder, "--overwrite", "d", "y")
    assert result.status == 3
    assert "link" in failed(result)["d/x"]
    assert "link" in failed(result)["d/e/f"]
    assert (faulty_box.root / "elsewhere" / "x").read_bytes() == b"precious"
    assert os.listdir(faulty_box.root / "elsewhere") == ["x"]
    assert (to / "y").exists()


def test_two_boxes_restored_to_one_folder_do_not_mix(archive, s3, to):
    """Each has a lock of its own, but they write under the same temporary name."""
    archived(archive, {"a": BODY}, **WARM)

    def other_restore():
        wait_for_partial(to)
        [partial] = to.glob(".*partial")
        partial.unlink()
        partial.write_bytes(b"the other's")

    s3.on("GetObject", halfway(other_restore), key="a")
    result = archive("restore", "--to", to)
    assert result.status == 3
    assert "another restore" in failed(result)["a"]
    assert not (to / "a").exists()
    assert archive("restore", "--to", to).status == 0


def test_object_that_may_not_be_read_does_not_stop_the_others(archive, s3, to):
    archived(archive, dict.fromkeys("abcdef", 10), **WARM)
    s3.always("GetObject", error(403, "AccessDenied"), key="c")
    result = archive("restore", "--to", to, TRANSFERS="4")
    assert result.status == 3
    assert failed(result).keys() == {"c"}
    assert len(tree(to)) == 5
    s3.always("GetObject", error(403, "AccessDenied"))
    assert archive("restore", "--to", to, "--overwrite", TRANSFERS="4").status == 3
    for path in to.iterdir():
        path.unlink()
    assert archive("restore", "--to", to, TRANSFERS="4").status == 1  # all are denied


def test_key_that_this_program_would_not_make_is_not_taken_for_another(archive, bucket, to):
    expected = archived(archive, {"ab": 10}, **WARM)
    bucket.client.put_object(Bucket=bucket.name, Key="a\u201b62", Body=b"not ab")
    bucket.client.put_object(Bucket=bucket.name, Key="raw\tname", Body=b"an earlier script's")
    result = archive("restore", "--to", to, "--overwrite", TRANSFERS="1")
    assert result.status == 3
    assert list(failed(result)) == ["ab"]
    assert "another program's" in failed(result)["ab"]
    assert (to / "raw\tname").read_bytes() == b"an earlier script's"
    assert whole(to).items() >= expected.items()


def test_row_in_another_form_does_not_stop_the_others(archive, to):
    archived(archive, {"a": 10, "b": 10}, **WARM)
    archive.execute("UPDATE files SET size = NULL WHERE path = './a'")
    archive.execute("UPDATE files SET uploaded_at = '2024-05-05' WHERE path = './b'")
    result = archive("restore", "--to", to)
    assert result.status == 0, result.stderr
    assert len(tree(to)) == 2


def test_copy_of_the_bucket_is_restored_from(archive, bucket, to):
    """Its snapshot tells the name of the bucket that it was copied from."""
    expected = archived(archive, {"a": 10, "d/b": 10}, **WARM)
    copy = f"{bucket.name}-copy"
    bucket.client.create_bucket(Bucket=copy)
    for entry in bucket.list():
        bucket.client.copy_object(
            Bucket=copy, Key=entry["Key"], CopySource=f"{bucket.name}/{entry['Key']}"
        )
    lose_state(archive)
    result = archive("restore", "--to", to, S3_BUCKET=copy)
    assert result.status == 0, result.stderr
    assert whole(to) == expected
    for command in ("check", "plan", "run"):  # but no run goes on there
        refused = archive(command, S3_BUCKET=copy)
        assert refused.status == 1
        assert f"the state belongs to S3_BUCKET={bucket.name}" in refused.output


@pytest.mark.parametrize("damage", ["a row", "the structure"])
def test_damaged_snapshot_is_not_believed(archive, s3, to, damage):
    """The bucket alone will do."""
    expected = archived(archive, {f"file{n}": b"content" for n in range(50)}, **WARM)
    lose_state(archive)
    other = (OLD + 12345).to_bytes(4, "big")

    def told(body):
        spoilt = body[:100] + bytes(40) + body[140:]
        if damage == "a row":
            spoilt = body.replace(OLD.to_bytes(4, "big"), other)
        assert spoilt != body
        return spoilt

    s3.always("GetObject", rewritten(told), key=SNAPSHOT)
    for command in (["verify"], ["restore", "--to", to]):
        result = archive(*command)
        assert "damaged" in result.stderr, result.stderr
    assert result.status == 0, result.stderr
    assert whole(to) == expected


def test_records_of_another_prefix_are_told_of(archive, bucket, to):
    """A copy of the bucket below another one: nothing of them is of use there."""
    archived(archive, {"a": b"content"}, **WARM)
    for entry in bucket.list():
        source = f"{bucket.name}/{entry['Key']}"
        bucket.client.copy_object(
            Bucket=bucket.name, Key=f"copy/{entry['Key']}", CopySource=source
        )
    lose_state(archive)
    result = archive("restore", "--to", to, S3_PREFIX="copy/")
    assert result.status == 0, result.stderr
    assert "1 rows cannot have been made with these settings" in result.stderr


def test_object_of_an_earlier_script_gives_way_to_the_one_that_replaced_it(archive, bucket, to):
    """Both have the same name, the earlier one's key without escapes."""
    old, new, content = "Icon\r", "Icon\u201b0D", {"Icon\r": b"of an earlier script"}
    fill(archive.box.root, content)
    earlier_database(archive, [(f"./{old}", len(content[old]), OLD)], int(time.time()))
    bucket.client.put_object(Bucket=bucket.name, Key=old, Body=content[old])
    assert archive(**WARM).counts == (0, 1, 0)
    assert archive("restore", old, "--to", to).status == 0
    assert (to / old).stat().st_mtime == OLD
    fill(archive.box.root, {old: b"new content"}, mtime=OLD + 100)
    assert archive(**WARM).counts == (1, 0, 0)
    assert set(archive.objects()) == {old, new}

    for _ in range(3):
        result = archive("restore", "--to", to, "--overwrite")
        assert result.status == 3
        assert f"{new} has replaced it" in failed(result)["Icon\\r"]
        assert whole(to) == whole(archive.box.root)


def test_a_signal_at_the_question_ends_at_once(archive, to):
    archived(archive, {"a": 10})
    here, there = pty.openpty()
    patient = CHANGED.format(
        folder=str(PROGRAM.parent), constants={"STOP_LIMIT": 90}, before=""
    )
    with subprocess.Popen(
        [sys.executable, "-c", patient, "--env-file", archive.env_file, "restore", "--to", to],
        env=archive.environment(),
        stdin=there,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as process:
        said = b""
        while b"[y/N]" not in said:
            said += process.stderr.read1()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    os.close(here)
    os.close(there)
