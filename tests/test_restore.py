"""Bringing files back: what is cold is asked for, what is ready comes back bit for bit.

`restore` works from the bucket alone, so most tests put objects there themselves, as the
program does, and never archive anything. `place` is each kind of folder to restore to in
turn: one of this machine, and one on each real server; `archive` has a box that misbehaves
where it is told to. All reach S3 through `s3`, which counts and lies.
"""

import csv
import itertools
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote
from zlib import crc32

import pytest
import relay
from conftest import CHANGED, MIB, OLD, PROGRAM, Archive, Bucket, fill, real, tree
from faults import AGAIN_SOON, LARGE, SIZES, wait_for, write
from faulty_sftp import (
    FAILURE,
    OK,
    PERMISSION_DENIED,
    UNSUPPORTED,
    Dropped,
    FaultyBox,
    drop,
    status,
    unanswered,
)
from relay import Relay
from scripted_s3 import Answer, cut_headers, error, first, halfway, headers, rewritten
from servers import OpenSSH, ProFTPD
from test_names import HOSTILE

BODY = 3 * MIB + 7  # bytes of a file that is cut in the middle
BUSY = "<IsRestoreInProgress>true</IsRestoreInProgress>"
READY = (
    "<IsRestoreInProgress>false</IsRestoreInProgress>"
    "<RestoreExpiryDate>2126-11-21T00:00:00.000Z</RestoreExpiryDate>"
)
COPY = {"Days": 1, "GlacierJobParameters": {"Tier": "Bulk"}}
SOON = {"RECONNECT_PAUSES": (0, 0.1, 0.2)}
ESCAPE = "\u201b"


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


class Place(NamedTuple):
    """A folder to restore to: how it is named on the command line, and where it is."""

    archive: Archive
    arguments: tuple
    root: Path
    kind: str


# Where one server stands for the others.
HERE_AND_THERE = pytest.mark.parametrize("place", ["folder", "openssh"], indirect=True)


@pytest.fixture(params=["folder", "openssh", "proftpd"])
def place(request, archive_of, s3, to):
    servers = {"openssh": OpenSSH, "proftpd": ProFTPD}
    kind = request.param
    with real(servers[kind]) if kind in servers else FaultyBox() as box:
        os.chmod(box.root, 0o777)
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        if kind in servers:
            yield Place(archive, ("--to-box", "back/here"), box.root / "back/here", kind)
        else:
            yield Place(archive, ("--to", to), to, kind)


def stored(archive, files, storage_class="STANDARD", mtime=OLD):
    """Put {key: content} into the bucket as archive.py does; an int stands for that many
    random bytes. Returns what has to come back, as `whole` gives it."""
    expected = {}
    for key, content in files.items():
        body = os.urandom(content) if isinstance(content, int) else content
        archive.bucket.client.put_object(
            Bucket=archive.bucket.name,
            Key=key,
            Body=body,
            StorageClass=storage_class,
            Metadata={"mtime": str(mtime)},
            ChecksumAlgorithm="CRC32",
        )
        expected[key.encode()] = (len(body), crc32(body), mtime)
    return expected


def whole(root):
    """{path: (size, crc32, mtime)} of all files below a folder, the hidden ones too."""
    found = {}
    for path, what in tree(root).items():
        at = os.stat(os.path.join(os.fsencode(root), path))
        found[path] = (*what, int(at.st_mtime))
    return found


def settled(folder):
    """`whole` of a folder on a box, once no temporary file is left there, or for good."""
    limit = time.monotonic() + 2  # what was sent last may still be under way
    while time.monotonic() < limit:
        found = whole(folder)
        if not any(b"partial" in path for path in found):
            break
        time.sleep(0.05)
    return found


def listed(**status):
    """S3 says in its listing of {key: how the restore stands}."""

    def edited(body):
        for key, text in status.items():
            tag = f"<Key>{key}</Key>".encode()
            more = f"<RestoreStatus>{text}</RestoreStatus>".encode()
            body = body.replace(tag, tag + more)
        return body

    return rewritten(edited)


def relisted(tag, values):
    """S3 lists {value: other one} in these tags."""

    def edited(body):
        for value, other in values.items():
            body = body.replace(*(f"<{tag}>{text}</{tag}>".encode() for text in (value, other)))
        return body

    return rewritten(edited)


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
    """Send SIGTERM and wait for the end."""
    archive.terminate()
    archive.running[-1].wait(30)


def wait_for_partial(folder):
    """Wait until a file is being written there under its temporary name."""
    wait_for(lambda: folder.exists() and any("partial" in name for name in os.listdir(folder)))


def failed(result):
    """{name: reason} of the files that failed."""
    return dict(failure.split(": ", 1) for failure in result.failures)


# --- The whole circle -------------------------------------------------------


def test_all_comes_back_bit_for_bit_with_its_times_when_the_state_is_lost(place, s3):
    """Every name too, byte for byte."""
    archive, box = place.archive, place.archive.box
    files = {
        "empty": b"",
        "photos/2024/a.jpg": 300_000,
        "photos/2024/b.jpg": MIB - 1,
        "photos/large.mp4": LARGE,
        ".hidden/file": 10,
        **{name[:200] + b" folder/" + name: b"content of " + name for name in HOSTILE},
    }
    fill(box.root, files, mtime=1_234_567_890)
    result = archive(INCLUDE_HIDDEN="true", constants=SIZES)
    assert result.status == 0, result.stderr
    expected = whole(box.root)
    archive.state_db.unlink()
    connections = getattr(box, "connections", None)

    first = archive("restore", *place.arguments, "--yes")

    assert first.status == 75, first.stderr
    assert not place.root.exists() or whole(place.root) == {}
    assert s3.requests["RestoreObject"] == len(expected)

    second = archive("restore", *place.arguments, "--yes")

    assert second.status == 0, second.stderr
    assert whole(place.root) == expected
    assert not archive.state_db.exists()
    if place.kind == "folder":
        assert box.connections == connections  # the bucket is all that is needed
    s3.requests.clear()
    third = archive("restore", *place.arguments)
    assert third.status == 0, third.stderr
    assert s3.requests["HeadObject"] == len(expected)  # the mtime of each, once
    assert f"Already there  : {len(expected)}\n" in third.stdout


def test_state_has_no_part_in_it(archive, to):
    """Not even one that is damaged, or that says something else."""
    expected = stored(archive, {"file": b"content"})
    archive.state_db.write_bytes(b"no database")

    result = archive("restore", "--to", to)

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(to) == expected
    assert archive.state_db.read_bytes() == b"no database"


def test_objects_that_somebody_else_stored_come_back(archive, bucket, s3, to):
    """With the time that rclone keeps, or else the time of the upload."""

    def put(key, **more):
        request = {"Bucket": bucket.name, "Key": key, "Body": b"content", **more}
        bucket.client.put_object(**request)

    put("plain")
    put("rclone", Metadata={"mtime": "1234567890.987654321"})
    put("capitals", Metadata={"mtime": "1234567890"})
    put("nonsense", Metadata={"mtime": "yesterday"})
    put("parts")
    put("photos/", Body=b"")  # a folder, as S3's console makes it
    at = bucket.client.head_object(Bucket=bucket.name, Key="plain")["LastModified"].timestamp()
    # boto3's own checksum of an upload in parts is one of their checksums.
    composite = {"x_amz_checksum_crc32": "AAAAAA==-2", "x_amz_checksum_type": "COMPOSITE"}
    s3.always("GetObject", headers(**composite), key="parts")

    def other_case(exchange):
        answer = exchange.forward()
        answer.headers["X-Amz-Meta-Mtime"] = answer.headers.pop("x-amz-meta-mtime")
        return answer

    s3.always("GetObject", other_case, key="capitals")

    result = archive("restore", "--to", to)

    assert (result.status, result.failures) == (0, []), result.stderr
    assert set(tree(to).values()) == {(7, crc32(b"content"))}
    times = {path.decode(): mtime for path, (_, _, mtime) in whole(to).items()}
    assert (times.pop("rclone"), times.pop("capitals")) == (1_234_567_890, 1_234_567_890)
    assert times.keys() == {"plain", "nonsense", "parts"}
    assert all(abs(mtime - at) <= 2 for mtime in times.values())
    again = archive("restore", "--to", to)
    assert (again.status, again.failures) == (0, []), again.stderr


def test_times_that_not_every_disk_can_keep_are_no_failure(archive, faulty_box, to):
    """ext4 keeps no time after 2446, SFTP none before 1970: the nearest one is kept."""
    before = stored(archive, {"before 1970": b"content"}, mtime=-100)
    stored(archive, {"after 9999": b"content"}, mtime=999_999_999_999)

    for _ in range(2):
        result = archive("restore", "--to", to)
        assert (result.status, result.failures) == (0, []), result.stderr
        assert whole(to).items() >= before.items()

    for _ in range(2):
        result = archive("restore", "before 1970", "--to-box", "back")
        assert (result.status, result.failures) == (0, []), result.stderr
        ((_, _, mtime),) = whole(faulty_box.root / "back").values()
        assert mtime == 0


EVEN_SECONDS = """
import os
utime = os.utime
def rounded(where, times):
    path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else str(where)
    utime(where, tuple(time // 2 * 2 for time in times) if "/usb/" in path else times)
os.utime = rounded
"""


def test_disk_with_even_seconds_only_is_no_failure(archive, to):
    """As FAT; here it is mounted below the folder."""
    stored(archive, {"usb/odd": b"content", "odd": b"content"}, mtime=OLD + 1)
    for count in ("Restored files", "Already there"):
        result = archive.start("restore", "--to", to, before=EVEN_SECONDS).wait()
        assert (result.status, result.failures) == (0, []), result.stderr
        assert re.search(f"^{count} *: 2$", result.stdout, re.MULTILINE)
        assert os.stat(to / "usb/odd").st_mtime == OLD


@HERE_AND_THERE
def test_file_of_the_second_before_is_not_taken_for_the_right_one(place):
    stored(place.archive, {"file": b"earlier"}, mtime=OLD)
    assert place.archive("restore", *place.arguments).status == 0
    expected = stored(place.archive, {"file": b"content"}, mtime=OLD + 1)
    assert place.archive("restore", *place.arguments).status == 3
    assert place.archive("restore", "--overwrite", *place.arguments).status == 0
    assert whole(place.root) == expected


@HERE_AND_THERE
def test_other_file_with_a_late_or_early_time_is_not_taken_for_the_right_one(place):
    late, early = 2_208_988_800, -315_619_200  # 2040 and 1960
    expected = stored(place.archive, {"late": b"content"}, mtime=late)
    if place.kind == "folder":
        expected |= stored(place.archive, {"early": b"content"}, mtime=early)
    assert place.archive("restore", *place.arguments).status == 0
    for name in expected:
        (place.root / name.decode()).write_bytes(b"another")
        os.utime(place.root / name.decode(), (OLD, OLD))

    assert place.archive("restore", *place.arguments).status == 3
    assert place.archive("restore", "--overwrite", *place.arguments).status == 0
    assert whole(place.root) == expected
    again = place.archive("restore", *place.arguments)
    assert re.search(f"^Already there *: {len(expected)}$", again.stdout, re.MULTILINE)


def test_restored_files_are_as_readable_as_any_new_file(archive, to):
    """Not as private as the state and the log."""
    stored(archive, {"folder/file": b"content"})
    assert archive("restore", "--to", to).status == 0
    assert [path.stat().st_mode & 0o777 for path in (to / "folder", to / "folder/file")] == [
        0o755,
        0o644,
    ]


# --- Which files ------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["./a/", "a/x", "a/deep"], {b"a/x", b"a/deep/y"}),
        (
            ["ab", "a.txt", "new\nline", "latin-\udce9"],
            {b"ab/x", b"a.txt", b"new\nline", b"latin-\xe9"},
        ),
        ([], {b"a/x", b"a/deep/y", b"ab/x", b"a.txt", b"new\nline", b"latin-\xe9"}),
    ],
)
def test_only_the_files_and_folders_that_were_named_come_back(archive, s3, to, paths, expected):
    keys = ["a/x", "a/deep/y", "ab/x", "a.txt", f"new{ESCAPE}0Aline", f"latin-{ESCAPE}E9"]
    stored(archive, dict.fromkeys(keys, b"content"))

    result = archive("restore", *paths, "--to", to)

    assert result.status == 0, result.stderr
    assert set(tree(to)) == expected
    assert s3.requests["GetObject"] == len(expected)


def test_prefix_and_remote_path_are_not_part_of_what_comes_back(archive, faulty_box, to):
    """A path may be named as on the box or as below REMOTE_PATH, which may have a folder of
    its own name, both with ./ or without it."""
    settings = {"STORAGE_CLASS": "STANDARD", "S3_PREFIX": "my-box/", "REMOTE_PATH": "backup"}
    names = ["backup/one", "backup/backup/two", "backup/two", "other"]
    fill(faulty_box.root, dict.fromkeys(names, b"content"))
    assert archive(**settings).counts == (3, 0, 0)

    cases = {
        "./backup/": {b"one", b"backup/two", b"two"},
        "backup/backup": {b"backup/two"},
        "backup/two": {b"two"},
        "./backup/two": {b"two"},
        "backup/./two": {b"two"},
        "one": {b"one"},
    }
    roots = ("backup", "./backup/")
    for number, (root, path) in enumerate(itertools.product(roots, cases)):
        folder, expected = to / str(number), cases[path]
        settings["REMOTE_PATH"] = root
        result = archive("restore", path, "--to", folder, **settings)
        assert result.status == 0, result.stderr
        assert set(tree(folder)) == expected


def test_path_under_which_nothing_is_archived_is_a_failure(archive, to):
    stored(archive, {"a/x": b"content", "ab": b"content"})

    result = archive("restore", "ab", "b", "a/x/y", "../a", "--to", to)

    assert result.status == 3
    assert set(failed(result)) == {"b", "a/x/y", "../a"}
    assert set(tree(to)) == {b"ab"}


def test_prefix_with_nothing_below_it_is_no_success(archive, to):
    stored(archive, {"a": 10})
    result = archive("restore", "--to", to, "--yes", S3_PREFIX="typo/")
    assert result.status == 1
    assert "nothing is archived in s3://" in result.stderr
    result = archive("restore", "--to", to, "/")  # "$unset/"
    assert result.status == 2
    assert "REMOTE_PATH" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--to", "x", "--to-box", "y"],
        ["--to", "x", "--tier", "expedited", "--days", "0"],
        ["--to", ""],
    ],
    ids=" ".join,
)
def test_wrong_use_is_told_with_status_2(archive, s3, arguments):
    result = archive("restore", *arguments)

    assert result.status == 2, result.stderr
    assert s3.requests.total() == 0


# --- Cold, under way, ready -------------------------------------------------


def test_nothing_is_asked_for_or_fetched_before_the_cost_is_agreed_to(archive, s3, to):
    stored(archive, {"cold": b"content"}, "DEEP_ARCHIVE")
    stored(archive, {"warm": b"content"})

    result = archive("restore", "--to", to)

    assert result.status == 2, result.stderr
    assert "--yes" in result.stderr
    assert "ESTIMATE" in result.stdout
    assert set(s3.requests) == {"ListObjectsV2"}
    assert not to.exists() or os.listdir(to) == []


@pytest.mark.parametrize(
    ("options", "usd"),
    [
        # Copies for 7 days 300 x 0.023 x 7 / 30 = 1.61; Bulk 200 x 0.0025 = 0.50, and free.
        ([], "2.11"),
        # For 3 days 300 x 0.023 / 10 = 0.69; Standard 200 x 0.02 = 4.00, and 100 x 0.01.
        (["--tier", "standard", "--days", 3], "5.69"),
    ],
)
def test_estimate_is_of_what_is_asked_for_and_of_all_that_is_downloaded(
    archive, s3, to, options, usd
):
    """200 GB are in DEEP_ARCHIVE and 100 in GLACIER, S3 is restoring 30, and 20 can be read:
    350 GB, of which 250 are not free. 250 x 0.09 = 22.50, and 4 GETs, at a dollar each."""
    stored(archive, {"cold": 200, "busy": 30}, "DEEP_ARCHIVE")
    stored(archive, {"less cold": 100}, "GLACIER")
    stored(archive, {"warm": 20})

    restoring = f"<RestoreStatus>{BUSY}</RestoreStatus><Key>busy<".encode()

    def in_gb(body):
        body = re.sub(rb"<Size>(\d+)<", lambda m: b"<Size>%d<" % (int(m[1]) * 2**30), body)
        return body.replace(b"<Key>busy<", restoring)

    s3.always("ListObjectsV2", rewritten(in_gb))

    result = archive("restore", "--to", to, *options, PRICES="get=1000")

    estimate = result.stdout.partition("==== ESTIMATE ====\n")[2]
    assert re.search(r"^To be asked of S3 *: 2 \(300.0 GiB\)$", estimate, re.MULTILINE)
    assert re.search(rf"^Restore *: \${usd}$", estimate, re.MULTILINE), estimate
    assert re.search(r"^Download *: \$26.50$", estimate, re.MULTILINE), estimate


@pytest.mark.parametrize(
    ("answer", "ending", "asked"), [("", 2, 0), ("y", 75, 1), ("Yes", 75, 1)]
)
def test_at_a_terminal_the_cost_is_asked_about(archive, s3, to, answer, ending, asked):
    stored(archive, {"cold": b"content"}, "DEEP_ARCHIVE")
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
    assert done.stderr.startswith(b"Ask S3 to restore these? [y/N] ")
    assert s3.requests["RestoreObject"] == asked


def test_signal_at_the_question_ends_at_once(archive, to):
    stored(archive, {"a": 10}, "DEEP_ARCHIVE")
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
        try:
            said = b""
            while b"[y/N]" not in said:
                more = process.stderr.read1()
                assert more, said
                said += more
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    os.close(here)
    os.close(there)


@pytest.mark.parametrize(
    ("options", "tier", "days"),
    [((), "Bulk", 7), (("--tier", "standard", "--days", "3"), "Standard", 3)],
    ids=["bulk", "standard"],
)
def test_copies_are_asked_for_as_told(archive, s3, to, options, tier, days):
    stored(archive, {"deep": b"content"}, "DEEP_ARCHIVE")
    stored(archive, {"flexible": b"content"}, "GLACIER")
    asked = []
    s3.always("RestoreObject", note(asked, lambda exchange: exchange.body().decode()))

    result = archive("restore", "--to", to, "--yes", *options)

    assert result.status == 75, result.stderr
    assert f"{tier}, ready within" in result.stdout
    assert len(asked) == 2
    for body in asked:
        assert re.search(r"<Days>(\d+)</Days>", body)[1] == str(days)
        assert re.search(r"<Tier>(\w+)</Tier>", body)[1] == tier


def test_what_is_cold_is_asked_for_what_is_under_way_waited_for_what_is_ready_fetched(
    archive, bucket, s3, to
):
    stored(archive, {name: name.encode() for name in ("cold", "busy", "ready")}, "DEEP_ARCHIVE")
    stored(archive, {"warm": b"warm"})
    bucket.client.restore_object(Bucket=bucket.name, Key="ready", RestoreRequest=COPY)
    s3.always("ListObjectsV2", listed(busy=BUSY, ready=READY))

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
    stored(archive, {"busy": b"content"}, "DEEP_ARCHIVE")
    s3.always("ListObjectsV2", listed(busy=BUSY))

    assert archive("restore", "--to", to).status == 75
    assert set(s3.requests) == {"ListObjectsV2"}


def test_copy_whose_time_is_over_though_it_is_listed_is_asked_for_anew(archive, s3, to):
    stored(archive, {"old": b"content"}, "DEEP_ARCHIVE")
    s3.always("ListObjectsV2", listed(old=READY.replace("2126", "2020")))

    assert archive("restore", "--to", to).status == 2
    assert archive("restore", "--to", to, "--yes").status == 75
    assert s3.requests["RestoreObject"] == 1


@pytest.mark.parametrize("times", [1, 2], ids=["seen", "not seen"])
def test_copy_that_expires_meanwhile_is_asked_for_by_a_later_pass(
    archive, bucket, s3, to, times
):
    """Nobody has agreed to its cost. The second listing shows it, or only the GET does."""
    expected = stored(archive, {"late": b"content"}, "DEEP_ARCHIVE")
    s3.on("ListObjectsV2", listed(late=READY), times=times)

    first = archive("restore", "--to", to)

    assert (first.status, first.failures) == (75, []), first.stderr
    assert s3.requests["RestoreObject"] == 0
    assert not to.exists() or whole(to) == {}
    assert archive("restore", "--to", to, "--yes").status == 75
    assert archive("restore", "--to", to, "--yes").status == 0
    assert whole(to) == expected


def test_no_more_is_asked_for_than_was_agreed_to(archive, s3, to):
    """One copy has expired since the cost was told."""
    stored(archive, {"cold": b"content", "late": b"content"}, "DEEP_ARCHIVE")
    s3.on("ListObjectsV2", listed(late=READY))

    result = archive("restore", "--to", to, "--yes")

    assert result.status == 75, result.stderr
    assert re.search("^To be asked of S3 *: 1 ", result.stdout, re.MULTILINE)
    assert s3.requests["RestoreObject"] == 1
    assert re.search("^Not asked for *: 1$", result.stdout, re.MULTILINE)


def test_archive_tier_that_restore_cannot_ask_for_fails_with_the_reason(archive, s3, to):
    """As INTELLIGENT_TIERING has them. Many in a row do not keep others from coming back."""
    names = [f"a{number}" for number in range(30)]
    stored(archive, dict.fromkeys(names, b"content"), "INTELLIGENT_TIERING")
    stored(archive, {"b": b"content"})
    for name in names:
        s3.always("GetObject", error(403, "InvalidObjectState"), key=name)
    result = archive("restore", "--to", to)
    assert result.status == 3, result.stderr
    assert failed(result).keys() == set(names)
    assert all("InvalidObjectState" in reason for reason in failed(result).values())
    assert tree(to).keys() == {b"b"}


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
    stored(archive, {"file": b"content"}, "DEEP_ARCHIVE")
    bucket.client.restore_object(Bucket=bucket.name, Key="file", RestoreRequest=COPY)
    s3.always("RestoreObject", error(answer, code))

    result = archive("restore", "--to", to, "--yes")

    assert result.status == ending, result.stderr
    assert bool(result.failures) == (ending == 3)
    assert (to / "file").exists() == (ending == 0)
    assert s3.requests["RestoreObject"] == 1


def test_manifest_lists_what_is_cold_and_nothing_is_asked_for(archive, bucket, s3, to):
    cold = ["a b", "comma,quote\"'", f"new{ESCAPE}0Aline", "per%cent+", "photos/é"]
    stored(archive, dict.fromkeys(cold, b"content"), "DEEP_ARCHIVE")
    stored(archive, {"warm": b"warm"})
    manifest = archive.folder / "manifest.csv"

    result = archive("restore", "--to", to, "--manifest", manifest)

    assert result.status == 75, result.stderr
    assert s3.requests["RestoreObject"] == 0
    assert set(tree(to)) == {b"warm"}
    assert manifest.read_bytes().isascii()
    rows = list(csv.reader(manifest.read_text().splitlines()))
    assert sorted((name, unquote(key)) for name, key in rows) == sorted(
        (bucket.name, key) for key in cold
    )
    assert "S3 Batch Operations" in result.stderr


def test_manifest_that_cannot_be_written_is_told_of(archive, to):
    stored(archive, {"cold": b"content"}, "DEEP_ARCHIVE")
    result = archive("restore", "--to", to, "--manifest", "/dev/full")
    assert result.status in (1, 2)
    assert "--manifest" in result.stderr
    assert "unexpected" not in result.stderr


def test_manifest_lists_a_copy_that_has_expired_since_it_was_listed(archive, s3, to):
    stored(archive, {"late": b"content"}, "DEEP_ARCHIVE")
    s3.on("ListObjectsV2", listed(late=READY), times=2)
    manifest = archive.folder / "manifest.csv"
    result = archive("restore", "--to", to, "--manifest", manifest)
    assert result.status == 75
    assert manifest.read_text() == f"{archive.bucket.name},late\n"
    assert f"{manifest} lists 1 objects" in result.stderr


def test_requests_are_as_few_as_can_be(archive, s3, to):
    names = [f"f{number}" for number in range(30)]
    stored(archive, dict.fromkeys(names, b"content"), "DEEP_ARCHIVE")
    assert archive("restore", "--to", to, "--yes").status == 75
    assert s3.requests == {"RestoreObject": 30, "ListObjectsV2": 2}

    for name in names:
        archive.bucket.client.restore_object(
            Bucket=archive.bucket.name, Key=name, RestoreRequest=COPY
        )
    s3.always("ListObjectsV2", listed(**dict.fromkeys(names, READY)))
    s3.requests.clear()
    assert archive("restore", "--to", to).status == 0
    assert s3.requests == {"GetObject": 30, "ListObjectsV2": 2}


# --- What is there already --------------------------------------------------


def test_other_files_are_kept_until_told_to_overwrite_them(place, s3):
    archive, root = place.archive, place.root
    files = ["other size", "other time", "same", "new"]
    stored(archive, dict.fromkeys([*files, "link", "folder"], b"content"))
    fill(root, {"other size": b"my own", "folder/inside": b"my own"})
    fill(root, {"other time": b"CONTENT"}, mtime=OLD + 1)
    fill(root, {"same": b"content"})
    os.symlink("other size", root / "link")
    for folder in (root.parent, root, root / "folder"):
        os.chmod(folder, 0o777)
    before = whole(root)

    kept = archive("restore", *place.arguments)

    assert kept.status == 3
    assert set(failed(kept)) == {"link", "folder", "other size", "other time"}
    assert "--overwrite" in failed(kept)["other time"]
    assert whole(root).pop(b"new")
    assert whole(root).items() > before.items()
    assert os.readlink(root / "link") == "other size"
    assert s3.requests["GetObject"] == 1  # only what was missing

    replaced = archive("restore", "folder", "link", *files, *place.arguments, "--overwrite")

    # Never anything but a file.
    assert set(failed(replaced)) == {"link", "folder"}
    assert os.readlink(root / "link") == "other size"
    for name in files:
        assert (root / name).read_bytes() == b"content"
        assert (root / name).stat().st_mtime == OLD
    assert set(tree(root)) == {*map(os.fsencode, files), b"folder/inside"}


@HERE_AND_THERE
def test_file_that_appears_while_its_object_is_fetched_is_kept(place, s3):
    stored(place.archive, {"file": BODY})

    def appear():
        wait_for_partial(place.root)
        fill(place.root, {"file": b"my own"})

    s3.on("GetObject", halfway(appear), key="file")

    result = place.archive("restore", *place.arguments)

    assert result.status == 3
    assert set(failed(result)) == {"file"}
    assert settled(place.root).keys() == {b"file"}
    assert (place.root / "file").read_bytes() == b"my own"


# --- What S3 may do to it ---------------------------------------------------


def test_body_that_is_cut_goes_on_where_it_was_cut(archive, s3, to):
    expected = stored(archive, {"file": BODY})
    ranges = []
    s3.on("GetObject", halfway(then_all=False), key="file")
    s3.always("GetObject", note(ranges, lambda exchange: exchange.headers.get("range")), "file")

    result = archive("restore", "--to", to)

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(to) == expected
    assert s3.requests["GetObject"] == 2
    (asked,) = ranges
    assert 0 < int(re.fullmatch(r"bytes=(\d+)-\d*", asked)[1]) <= BODY


def test_trouble_of_s3_that_passes_costs_nothing(archive, s3, to):
    expected = stored(archive, {"file": b"content"}, "DEEP_ARCHIVE")
    rules = [
        s3.on("ListObjectsV2", error(500, "InternalError")),
        s3.on("RestoreObject", error(503, "SlowDown")),
        s3.on("GetObject", error(503, "SlowDown")),
        s3.on("GetObject", cut_headers, nth=2),
    ]

    arguments = ("restore", "--to", to, "--yes")
    assert archive(*arguments, before=AGAIN_SOON).status == 75
    result = archive(*arguments, before=AGAIN_SOON)

    assert (result.status, result.failures) == (0, []), result.stderr
    assert [rule.fired for rule in rules] == [1, 1, 1, 1]
    assert whole(to) == expected


@pytest.mark.parametrize(
    ("operation", "tries"), [("ListObjectsV2", 1), ("RestoreObject", 1), ("GetObject", 5)]
)
def test_refusal_that_concerns_every_file_ends_the_pass_soon(archive, s3, to, operation, tries):
    """A single object may be denied, too; many in a row are taken for all."""
    kind = {"RestoreObject": "DEEP_ARCHIVE"}.get(operation, "STANDARD")
    stored(archive, {f"f{number:02}": b"" for number in range(20)}, kind)
    s3.always(operation, error(403, "AccessDenied"))

    many = {"SAME_FAILURES": 5}
    result = archive("restore", "--to", to, "--yes", TRANSFERS=1, constants=many)

    assert result.status == 1, result.stderr
    assert f"{operation}: AccessDenied" in result.stderr
    assert tries <= s3.requests[operation] <= tries + 1


def test_object_that_may_not_be_read_does_not_stop_the_others(archive, s3, to):
    stored(archive, dict.fromkeys("abcdef", 10))
    s3.always("GetObject", error(403, "AccessDenied"), key="c")
    result = archive("restore", "--to", to, TRANSFERS="4")
    assert result.status == 3
    assert failed(result).keys() == {"c"}
    assert len(tree(to)) == 5


def test_body_that_is_always_cut_fails_alone_and_leaves_nothing(archive, s3, to):
    """Nothing comes of any request, or else it would get on; and no checksum would tell."""
    stored(archive, {"cut": BODY, "well": b"content"})

    def nothing_of_it(exchange):
        exchange.handler.send_response_only(200)
        for name, value in exchange.forward().headers.items():
            if "checksum" not in name.lower():
                exchange.handler.send_header(name, value)
        exchange.handler.end_headers()

    rule = s3.always("GetObject", nothing_of_it, key="cut")

    result = archive("restore", "--to", to, constants={"S3_ATTEMPTS": 3})

    assert result.status == 3
    assert list(failed(result)) == ["cut"]
    assert failed(result)["cut"].startswith(f"S3 sent 0 of {BODY:,} bytes: ")
    assert 2 <= rule.fired <= 3
    assert set(whole(to)) == {b"well"}
    s3.rules.clear()
    assert archive("restore", "--to", to).status == 0


@HERE_AND_THERE
def test_body_that_is_damaged_on_its_way_is_not_kept(place, s3):
    expected = stored(place.archive, {"damaged": BODY, "well": b"content"})
    rule = s3.always("GetObject", damaged, key="damaged")

    result = place.archive("restore", *place.arguments)

    assert rule.fired == 1
    assert result.status == 3
    assert set(failed(result)) == {"damaged"}
    assert settled(place.root) == {b"well": expected[b"well"]}


def test_object_that_was_replaced_while_it_was_fetched_is_not_mixed(archive, bucket, s3, to):
    """Not even where no checksum would tell."""
    stored(archive, {"file": b"1" * BODY})

    def replace():
        bucket.client.put_object(Bucket=bucket.name, Key="file", Body=b"2" * BODY)

    def half_and_unsummed(exchange):
        del exchange.headers["x-amz-checksum-mode"]
        return halfway(replace, then_all=False)(exchange)

    s3.on("GetObject", half_and_unsummed, key="file")

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert whole(to) == {}


@HERE_AND_THERE
def test_answer_that_is_not_the_listed_object_is_not_kept(place, s3):
    """Such as the page of a gateway, or the answer to another request."""
    expected = stored(place.archive, {"file": BODY, "well": b"content"})
    page = Answer(200, {"last-modified": "Sun, 29 Nov 2026 10:00:00 GMT"}, b"<p>In service</p>")
    rule = s3.on("GetObject", lambda _: page, key="file")

    result = place.archive("restore", *place.arguments)

    assert rule.fired
    assert result.status == 3
    assert set(failed(result)) == {"file"}
    assert failed(result)["file"].startswith("S3 sent 17 bytes of ETag ")
    assert settled(place.root) == {b"well": expected[b"well"]}
    assert place.archive("restore", *place.arguments).status == 0
    assert settled(place.root) == expected


# --- Keys that are not ours -------------------------------------------------


def test_keys_that_lead_out_of_the_folder_are_refused_one_by_one(archive, s3, to):
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
    stored(archive, dict.fromkeys([*keys, "well"], b"content"))
    s3.always("ListObjectsV2", relisted("Key", keys))

    result = archive("restore", "--to", to / "1/2")

    assert result.status == 3
    assert len(result.failures) == len(keys)
    assert set(tree(to)) == {b"1/2/well"}
    assert s3.requests["GetObject"] == 1
    assert not os.path.lexists("/x")


def test_of_two_keys_of_one_name_the_one_that_we_would_have_made_comes_back(archive, to):
    """The other is left out with a warning: another program's, or an earlier script's whose
    object has been replaced since."""
    names = {"ab": b"ab", f"Icon{ESCAPE}0D": b"Icon\r"}
    ours = stored(archive, dict.fromkeys(names, 10))
    stored(archive, {f"a{ESCAPE}62": b"not ab", "Icon\r": b"the earlier script's"})
    alone = stored(archive, {"raw\tname": b"an earlier script's"})

    for _ in range(2):
        result = archive("restore", "--to", to, "--overwrite")

        assert (result.status, result.failures) == (0, []), result.stderr
        assert result.stderr.count("warning: left out") == 2
        expected = {names[key.decode()]: what for key, what in ours.items()}
        assert whole(to) == {**expected, **alone}


def test_object_of_an_earlier_script_is_found_by_its_name(archive, to):
    """Its key has the characters that ours escape. rclone escapes only the other ones."""
    expected = stored(archive, {"a\tb/file": b"content", "raw\tname": b"content"})
    (rclones,) = stored(archive, {f"caf{ESCAPE}E9\x01": b"content"}).values()
    result = archive("restore", "a\tb", "raw\tname", "caf\udce9\x01", "--to", to)
    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(to) == expected | {b"caf\xe9\x01": rclones}


def test_two_keys_of_one_name_do_not_mix(archive, s3, to):
    """Neither is one that archive.py would make. Both are fetched at once."""
    first, second = f"a{ESCAPE}62", f"{ESCAPE}61b"
    stored(archive, {first: b"1" * BODY, second: b"2" * MIB})
    both = threading.Barrier(2)

    def meet():
        wait_for_partial(to)
        both.wait(30)

    s3.on("GetObject", halfway(meet), key=first)
    s3.on("GetObject", halfway(meet), key=second)

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert result.failures
    for path in to.iterdir():
        assert path.name == "ab"
        assert path.read_bytes() in (b"1" * BODY, b"2" * MIB)
    assert archive("restore", "--to", to).status == 3, "one of them is still missing"


def test_file_and_folder_of_one_name_both_come_back(place):
    """The path was a file once and is a folder now. The file comes beside the folder, under
    another name that the program tells, and a later pass finds both."""
    expected = stored(place.archive, {"x": b"the file", "x/y": b"in the folder"})

    for _ in range(2):
        result = place.archive("restore", *place.arguments)

        assert (result.status, result.failures) == (0, []), result.stderr
        found = whole(place.root)
        assert sorted(found.values()) == sorted(expected.values())
        assert found.pop(b"x/y") == expected[b"x/y"]
        [other] = found
        assert other.decode() in result.output


def test_file_beside_a_folder_comes_back_though_its_old_place_has_one(archive, to):
    expected = stored(archive, {"x": b"the file", "x/y": b"in the folder"})
    write(to / "x", 0)
    (to / "x").write_bytes(b"the file")
    os.utime(to / "x", (OLD, OLD))

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert set(failed(result)) == {"x/y"}
    assert whole(to) == {b"x": expected[b"x"], b"x.file": expected[b"x"]}


# --- It is stopped, killed, or started twice --------------------------------


@HERE_AND_THERE
@pytest.mark.parametrize(("end", "ending"), [(stop, 143), (Archive.kill, -9)])
def test_pass_that_is_ended_in_the_middle_of_a_file_is_completed_by_the_next(
    place, s3, end, ending
):
    expected = stored(place.archive, {"a": 1000, "b": BODY, "c": 1000})
    seen = []

    def ended():
        wait_for_partial(place.root)
        seen.extend(os.listdir(place.root))
        end(place.archive)

    s3.on("GetObject", halfway(ended), key="b")

    result = place.archive(
        "restore", *place.arguments, TRANSFERS=1, constants={"STOP_LIMIT": 1}
    )

    assert result.status == ending, result.stderr
    assert "Restored files : 1\n" in result.stdout or end is Archive.kill
    assert "b" not in seen
    assert not (place.root / "b").exists()
    again = place.archive("restore", *place.arguments)
    assert again.status == 0, again.stderr
    assert whole(place.root) == expected


def test_pass_that_is_killed_between_two_names_leaves_no_temporary_file(archive, to):
    """The whole file may have its name already, and its temporary one still."""
    expected = stored(archive, {"file": b"content"})
    killed = (
        "import os, pathlib\n"
        "for owner in (os, pathlib.Path):\n"  # Python 3.10's Path has its own references
        "    for name in ('rename', 'replace'):\n"
        "        def act(*args, real=getattr(owner, name), **more):\n"
        "            real(*args, **more)\n"
        "            os.kill(os.getpid(), 9)\n"
        "        setattr(owner, name, act)\n"
    )
    assert archive.start("restore", "--to", to, before=killed).wait().status == -9
    assert (to / "file").exists()

    assert archive("restore", "--to", to).status == 0

    assert whole(to) == expected


def test_signal_ends_the_asking(archive, s3, to):
    """Every request is paid for."""
    stored(archive, {f"f{number:02}": b"" for number in range(40)}, "DEEP_ARCHIVE")

    def stop_then_answer(exchange):
        stop(archive)
        return exchange.forward()

    s3.on("RestoreObject", stop_then_answer, nth=3)

    soon = {"STOP_LIMIT": 1}
    result = archive("restore", "--to", to, "--yes", TRANSFERS=1, constants=soon)

    assert result.status == 143, result.stderr
    assert "Asked of S3    : 2\n" in result.stdout
    assert s3.requests["RestoreObject"] == 3


def test_second_restore_at_once_ends_with_11(archive, s3, to):
    """A run does not: a restore that waits for cold objects may take days."""
    expected = stored(archive, {"file": BODY})
    results = []

    def second():
        results.append(archive("restore", "--to", to))
        results.append(archive())

    s3.on("GetObject", halfway(second), key="file")

    first = archive("restore", "--to", to)

    assert [result.status for result in results] == [11, 0]
    assert first.status == 0, first.stderr
    assert whole(to) == expected


def test_two_restores_with_states_of_their_own_do_not_mix_in_one_folder(archive, s3, to):
    """Each has a lock of its own, but they write under the same temporary name."""
    stored(archive, {"a": BODY})

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


@pytest.mark.parametrize("own", ["prefix", "bucket"])
def test_two_boxes_restored_to_one_folder_do_not_mix(archive, moto, s3, to, own):
    """Each has a lock of its own, and they write to one folder at once."""
    stored(archive, {"one/a": BODY})
    bucket = archive.bucket if own == "prefix" else Bucket(moto, "another-bucket")
    prefix = "two/" if own == "prefix" else "one/"
    bucket.client.put_object(Bucket=bucket.name, Key=f"{prefix}a", Body=b"content")
    others = []

    def other_restore():
        wait_for_partial(to)
        settings = {**bucket.settings(), "S3_PREFIX": prefix, "STATE_DB": "two.db"}
        others.append(archive("restore", "--to", to, **settings))

    s3.on("GetObject", halfway(other_restore), key="one/a")
    result = archive("restore", "--to", to, S3_PREFIX="one/")
    assert [other.status for other in others] == [0]
    assert result.status == 3
    assert "another file has appeared" in failed(result)["a"]
    assert {path.name: path.read_bytes() for path in to.iterdir()} == {"a": b"content"}


# --- The place to restore to ------------------------------------------------


def test_file_that_cannot_be_stored_fails_alone(archive, to):
    stored(archive, {"a/file": b"content", "b": b"content"})
    fill(to, {"a": b"no folder"})

    result = archive("restore", "--to", to)

    assert result.status == 3
    assert set(failed(result)) == {"a/file"}
    assert "cannot be looked up" in failed(result)["a/file"]
    assert set(tree(to)) == {b"a", b"b"}


TOO_LARGE = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
"""


def test_file_that_is_too_large_for_the_disk_fails_alone(archive, to):
    """As one of 4 GiB for FAT."""
    stored(archive, {"large": (1 << 20) + 1, "small": b"content"})
    result = archive.start("restore", "--to", to, before=TOO_LARGE).wait()
    assert result.status == 3
    assert failed(result).keys() == {"large"}
    assert "cannot be stored" in failed(result)["large"]
    assert set(tree(to)) == {b"small"}


def test_folder_that_cannot_be_made_is_told_of_before_anything_is_paid(archive, s3):
    stored(archive, {"file": b"content"}, "DEEP_ARCHIVE")

    result = archive("restore", "--to", "/proc/no such folder", "--yes")  # not even root can

    assert result.status == 1, result.stderr
    assert "/proc/no such folder" in result.stderr
    assert s3.requests["RestoreObject"] == 0


@pytest.mark.parametrize("box", [OpenSSH], indirect=True, ids=["openssh"])
@pytest.mark.parametrize("folder", ["new/folder", "."], ids=["new", "there already"])
def test_box_that_is_read_only_is_told_of_before_anything_is_paid(boxed, box, s3, folder):
    stored(boxed, {"file": b"content"}, "DEEP_ARCHIVE")
    os.chmod(box.root, 0o555)

    result = boxed("restore", "--to-box", folder, "--yes")

    assert result.status == 1, result.stderr
    assert "denied" in result.stderr
    assert s3.requests["RestoreObject"] == 0


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("FSETSTAT", status(PERMISSION_DENIED)),
        ("FSETSTAT", status(OK)),
        ("POSIX_RENAME", status(PERMISSION_DENIED)),
        ("POSIX_RENAME", status(UNSUPPORTED)),
    ],
    ids=["times refused", "times ignored", "names refused", "names not replaced"],
)
def test_box_that_cannot_store_a_file_is_told_of_before_anything_is_paid(
    archive, faulty_box, s3, kind, fault
):
    """And before a file is replaced."""
    stored(archive, {"file": b"content"})
    fill(faulty_box.root, {"back/file": b"my own"})
    faulty_box.always(kind, None, fault)

    result = archive("restore", "--to-box", "back", "--overwrite")

    assert result.status == 1, result.stderr
    assert "back cannot be written to" in result.stderr
    assert "may write; --overwrite needs posix-rename" in result.stderr
    assert s3.requests["GetObject"] == 0
    assert os.listdir(faulty_box.root / "back") == ["file"]
    assert (faulty_box.root / "back/file").read_bytes() == b"my own"


def test_box_that_refuses_names_is_told_of_before_anything_is_paid(archive, faulty_box, s3):
    stored(archive, {"file": b"content"})
    faulty_box.always("RENAME", None, status(PERMISSION_DENIED))

    result = archive("restore", "--to-box", "back")

    assert (result.status, s3.requests["GetObject"]) == (1, 0), result.stderr
    assert "back cannot be written to" in result.stderr
    assert os.listdir(faulty_box.root / "back") == []


@pytest.mark.parametrize(("kind", "nth", "ending"), [("LSTAT", 4, 1), ("REMOVE", 2, 0)])
def test_look_at_the_folder_of_the_box_leaves_nothing(archive, faulty_box, kind, nth, ending):
    """The fourth LSTAT is of the complete file, the second REMOVE deletes it."""
    expected = stored(archive, {"file": b"content"})
    rule = faulty_box.on(kind, None, status(FAILURE), nth=nth)

    result = archive("restore", "--to-box", "back")

    assert (result.status, rule.fired) == (ending, 1), result.stderr
    assert settled(faulty_box.root / "back") == ({} if ending else expected)


@pytest.mark.parametrize("fault", [status(FAILURE), drop], ids=["refused", "cut"])
def test_file_on_the_box_that_cannot_be_replaced_stays(archive, faulty_box, fault):
    stored(archive, {"file": b"content"})
    fill(faulty_box.root, {"back/file": b"my own"})
    # The first is about the folder itself.
    faulty_box.on("POSIX_RENAME", None, fault, nth=2, times=math.inf)

    result = archive("restore", "--to-box", "back", "--overwrite", constants=SOON)

    assert result.status == 3, result.stderr
    assert failed(result).keys() == {"file"}
    assert settled(faulty_box.root / "back")[b"file"] == (6, crc32(b"my own"), OLD)


@pytest.mark.parametrize("box", [OpenSSH], indirect=True, ids=["openssh"])
def test_folder_on_the_box_that_is_a_file_is_told_of_before_anything_is_paid(boxed, box, s3):
    """Others refuse to look below it, which is told file by file."""
    stored(boxed, {"file": b"content"}, "DEEP_ARCHIVE")
    fill(box.root, {"file": b"my own"})

    result = boxed("restore", "--to-box", "file", "--yes")

    assert result.status == 1, result.stderr
    assert "file is a file or a link" in result.stderr
    assert s3.requests["RestoreObject"] == 0


@HERE_AND_THERE
def test_folder_without_the_room_is_told_of_before_anything_is_paid(place, s3):
    stored(place.archive, {"file": b"content"}, "DEEP_ARCHIVE")
    s3.on("ListObjectsV2", relisted("Size", {7: 2 << 60}))

    result = place.archive("restore", *place.arguments)

    assert result.status == 2
    assert "2,097,152.0 TiB are to be restored, but only " in result.stderr
    assert s3.requests["RestoreObject"] == 0
    assert "are to be restored" not in place.archive("restore", *place.arguments).stderr


def test_disk_that_is_full_ends_the_pass_and_leaves_nothing_half_done(archive, to):
    expected = stored(archive, {"a": b"content", "b": BODY})
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
    stored(archive, {f"f{number}": 3 * MIB for number in range(8)})

    def room():
        back = faulty_box.root / "back"
        used = sum(path.stat().st_size for path in back.iterdir()) if back.exists() else 0
        return 2 * MIB - used

    def room_told(request):
        if request.name != b"statvfs@openssh.com":
            return request.reply()
        free = max(0, room()) // 4096
        return request.packet(201, struct.pack(">11Q", 4096, 4096, 9_999, free, free, *[0] * 6))

    def within(request):
        return request.reply() if len(request.data) <= room() else request.status(FAILURE)

    faulty_box.always("EXTENDED", None, room_told)
    faulty_box.always("WRITE", None, within)

    result = archive("restore", "--to-box", "back", TRANSFERS="1")

    assert result.status == 1, result.stderr
    assert "the box cannot store it" in result.stderr
    assert s3.requests["GetObject"] < 4
    assert settled(faulty_box.root / "back") == {}


def test_nothing_is_written_through_a_link(archive, to, tmp_path):
    stored(archive, {"d/x": 10, "d/e/f": 10, "y": 10})
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


@pytest.mark.parametrize("folder", ["./to//sub/", "//to/sub"])
def test_nothing_is_written_through_a_link_of_the_box(archive, faulty_box, folder):
    stored(archive, {"d/x": 10, "d/e/f": 10, "y": 10})
    fill(faulty_box.root, {"elsewhere/x": b"precious"})
    to = faulty_box.root / "to" / "sub"
    to.mkdir(parents=True)
    (to / "d").symlink_to(faulty_box.root / "elsewhere")
    result = archive("restore", "--to-box", folder, "--overwrite")
    assert result.status == 3
    assert "link" in failed(result)["d/x"]
    assert "link" in failed(result)["d/e/f"]
    assert (faulty_box.root / "elsewhere" / "x").read_bytes() == b"precious"
    assert os.listdir(faulty_box.root / "elsewhere") == ["x"]
    assert (to / "y").exists()


@pytest.mark.parametrize("box", [OpenSSH, ProFTPD], indirect=True, ids=["openssh", "proftpd"])
def test_nothing_is_written_through_a_link_of_a_real_box(boxed, box):
    """ProFTPD's LSTAT follows links."""
    stored(boxed, {"d/x": 10, "y": b"content"})
    fill(box.root, {"elsewhere/x": b"precious", "to/z": b"own"})
    (box.root / "to/d").symlink_to("../elsewhere")
    for folder in ("to", "elsewhere"):
        os.chmod(box.root / folder, 0o777)
    result = boxed("restore", "--to-box", "to", "--overwrite")
    assert (result.status, failed(result).keys()) == (3, {"d/x"}), result.stderr
    assert "link" in failed(result)["d/x"]
    assert (box.root / "elsewhere/x").read_bytes() == b"precious"
    assert (box.root / "to/y").read_bytes() == b"content"


# --- What the box may do to it ----------------------------------------------


@pytest.mark.parametrize("box", [OpenSSH], indirect=True, ids=["openssh"])
@pytest.mark.parametrize("folder", ["link", "link/back"])
def test_folder_on_the_box_may_be_reached_through_a_link(boxed, box, folder):
    """It is the user's own; only below it may nobody lead elsewhere."""
    expected = stored(boxed, {"a/b": b"content"})
    (box.root / "real").mkdir()
    os.chmod(box.root / "real", 0o777)
    (box.root / "link").symlink_to("real")
    result = boxed("restore", "--to-box", folder)
    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(box.root / folder) == expected


@pytest.mark.parametrize(("folder", "place"), [("/.//back//", "back"), ("/", "")])
def test_folder_on_the_box_may_be_written_in_any_way(archive, faulty_box, folder, place):
    expected = stored(archive, {"a/b": b"content", "c": b"content"})

    result = archive("restore", "--to-box", folder)

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(faulty_box.root / place) == expected


def test_only_so_many_writes_wait_for_their_replies(archive, faulty_box):
    """Each has its bytes in memory."""
    expected = stored(archive, {"large": 4 * MIB})
    held = faulty_box.on("WRITE", None, unanswered)
    running = archive.start("restore", "--to-box", "back", constants={"SILENCE_LIMIT": 6})
    wait_for(lambda: held.fired and faulty_box.requests["WRITE"] > 60)
    time.sleep(1)
    assert faulty_box.requests["WRITE"] < 70
    assert running.wait().status == 0
    assert settled(faulty_box.root / "back") == expected


@pytest.mark.parametrize("box", [OpenSSH], indirect=True, ids=["openssh"])
def test_connection_that_is_lost_in_the_middle_of_a_write_costs_nothing(boxed, box, s3):
    expected = stored(boxed, {"file": BODY, "other": 1000})

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


def test_box_that_is_gone_ends_the_pass_and_the_next_completes_it(archive, faulty_box, s3):
    expected = stored(archive, {"file": BODY, "other": 1000})
    back = faulty_box.root / "back"

    def vanish():
        wait_for_partial(back)
        relay.stop()

    with Relay(faulty_box.host, faulty_box.port) as relay:
        settings = faulty_box.settings(port=relay.port)
        s3.on("GetObject", halfway(vanish), key="file")

        result = archive("restore", "--to-box", "back", constants=SOON, **settings)

        assert result.status == 1, result.stderr
        assert not (back / "file").exists()
        relay.start()
        assert archive("restore", "--to-box", "back", **settings).status == 0
    assert whole(back) == expected


def once_fetching(s3, box, kind, fault, key=None):
    """Let the first request of that kind meet `fault` once an object is being fetched: what
    comes before is about the folder itself. Returns a list of the rule."""
    rules = []
    s3.on("GetObject", first(lambda: rules.append(box.on(kind, None, fault))), key)
    return rules


def done_then_drop(request):
    """Do what is asked, and cut the connection before the answer."""
    request.reply()
    raise Dropped


WRITING = ("OPEN", "WRITE", "FSETSTAT", "CLOSE", "RENAME")


@pytest.mark.parametrize("fault", [drop, done_then_drop])
def test_connection_that_is_cut_at_any_request_costs_nothing(archive, faulty_box, s3, fault):
    """One file after another, each of which meets it at another request."""
    kinds = ("MKDIR", *WRITING)
    expected = stored(archive, {f"of {kind}/file": 100_000 for kind in kinds})
    cuts = [once_fetching(s3, faulty_box, kind, fault, f"of {kind}/file") for kind in kinds]

    result = archive("restore", "--to-box", "back", constants=SOON, TRANSFERS=1)

    assert [rule.fired for cut in cuts for rule in cut] == [1] * len(kinds)
    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(faulty_box.root / "back") == expected


def test_file_that_the_box_refuses_fails_and_leaves_nothing(archive, faulty_box, s3):
    """One file after another, each of which is refused another request."""
    expected = stored(archive, dict.fromkeys([*WRITING, "well"], 100_000))
    # Of the WRITEs one is refused: a hole.
    # A FAILURE of OPEN is tried again: too many files may be open.
    codes = dict.fromkeys(WRITING, FAILURE) | {"OPEN": PERMISSION_DENIED}
    refused = [once_fetching(s3, faulty_box, k, status(codes[k]), k) for k in WRITING]

    result = archive("restore", "--to-box", "back", TRANSFERS=1)

    assert all(rule.fired for rules in refused for rule in rules)
    assert result.status == 3, result.stderr
    assert sorted(failed(result)) == sorted(WRITING)
    assert settled(faulty_box.root / "back") == {b"well": expected[b"well"]}


def test_server_whose_writes_are_overtaken_keeps_the_times(archive, faulty_box):
    """As those that write on other threads, such as `rclone serve sftp`."""
    expected = stored(archive, {"file": 100_000})

    def overtaken(request):
        def write():
            request.session.send(request.reply())

        threading.Timer(0.2, write).start()
        return b""

    faulty_box.always("WRITE", None, overtaken)

    result = archive("restore", "--to-box", "back")

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(faulty_box.root / "back") == expected


def test_folder_on_the_box_that_is_deleted_meanwhile_costs_one_file(archive, faulty_box, s3):
    stored(archive, dict.fromkeys(["a/1", "a/2", "a/3"], b"content"))
    s3.on("GetObject", first(lambda: shutil.rmtree(faulty_box.root / "back/a")), key="a/2")

    result = archive("restore", "--to-box", "back", TRANSFERS=1)

    assert set(failed(result)) == {"a/2"}
    assert set(whole(faulty_box.root / "back")) == {b"a/3"}
    assert archive("restore", "--to-box", "back").status == 0


def test_file_that_fails_leaves_nothing_open_on_the_box(archive, faulty_box, s3):
    stored(archive, dict.fromkeys("abc", b"content"))
    s3.always("GetObject", damaged)

    result = archive("restore", "--to-box", "back")

    assert result.status == 3
    assert set(failed(result)) == set("abc")
    assert settled(faulty_box.root / "back") == {}
    assert faulty_box.requests["OPEN"] == faulty_box.requests["CLOSE"] >= 3


def test_open_that_a_lost_session_carries_out_late_is_noticed(archive, faulty_box, s3):
    """It empties what the next session has written."""
    stored(archive, {"f": b"content"})
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

    once_fetching(s3, faulty_box, "OPEN", late)
    faulty_box.on("RENAME", None, meanwhile, nth=2)  # the first is about the folder itself
    constants = {**SOON, "SILENCE_LIMIT": 1}
    result = archive("restore", "--to-box", "back", constants=constants)
    assert emptied.is_set()
    assert result.status == 3
    assert "not 7 bytes" in failed(result)["f"]
    assert "on the box, but 0 of" in failed(result)["f"]


def test_write_that_the_box_cuts_short_is_noticed(archive, faulty_box):
    stored(archive, {"file": 100_000})

    def less(request):
        request.data = request.data[:-1]
        return request.reply()

    faulty_box.on("WRITE", None, less, at=99_999)

    result = archive("restore", "--to-box", "back")

    assert result.status == 3
    assert list(failed(result)) == ["file"]
    assert settled(faulty_box.root / "back") == {}


# The system keeps 256 KiB at most of what the box does not read.
SMALL_BUFFER = """
import socket
connect = socket.create_connection
def connect_with_a_small_buffer(*where):
    sock = connect(*where)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 * 1024)
    return sock
socket.create_connection = connect_with_a_small_buffer
"""


def test_box_that_stops_reading_while_it_is_written_to_is_noticed(archive_of, s3, monkeypatch):
    monkeypatch.setattr(relay, "QUEUED", 1)
    with ProFTPD() as box, Relay(box.host, box.port) as frozen:
        frozen.limit_buffer(16 * 1024)
        os.chmod(box.root, 0o777)
        settings = {"AWS_ENDPOINT_URL": s3.url, **box.settings(port=frozen.port)}
        archive = archive_of(box, **settings)
        expected = stored(archive, {"file": 24 * MIB})
        frozen.freeze(after=10_000)
        constants = {**SOON, "SILENCE_LIMIT": 2}
        run = archive.start(
            "restore", "--to-box", "back", before=SMALL_BUFFER, constants=constants
        )
        wait_for(archive.log_file.exists)
        wait_for(lambda: "was silent" in archive.log_file.read_text())
        frozen.thaw()
        assert run.wait().status == 0
        assert whole(box.root / "back") == expected


@pytest.mark.parametrize("wait", [(), ("--wait",)])
def test_full_disk_is_told_though_a_listing_fails_meanwhile(archive, s3, to, wait):
    stored(archive, {"a/1": b"1", "a/2": b"2", "b/1": b"3"})
    full = """
import time
def fsync(_):
    time.sleep(2)
    raise OSError(28, "No space left on device")
os.fsync = fsync
"""
    # The survey lists both paths; then the pass lists the first one.
    for nth in (4, 5, 6):
        s3.on("ListObjectsV2", error(503, "SlowDown"), nth=nth)
    constants = {"S3_ATTEMPTS": 1}
    own = ("restore", "a", "b", "--to", to, *wait)
    result = archive.start(*own, before=full, constants=constants).wait()
    assert result.status == 1
    assert "No space left on device" in result.stderr
    assert "looking again" not in result.stderr


def test_probe_of_a_box_that_answers_failure_leaves_nothing_behind(archive):
    """It is a temporary file with a name of its own, which no later pass would delete."""
    stored(archive, {"file": b"content"})
    archive.box.on("CLOSE", None, status(PERMISSION_DENIED))
    archive.box.on("REMOVE", None, status(FAILURE), nth=2)
    assert archive("restore", "--to-box", "back", constants=SOON).status == 1
    assert settled(archive.box.root / "back") == {}


def test_nothing_is_asked_of_s3_after_a_fatal_error(archive, s3, to):
    """Other files are in the way of the others, so that S3 is asked for their times first."""
    names = [f"c{number}" for number in range(8)]
    stored(archive, dict.fromkeys(names, b"content"), "DEEP_ARCHIVE")
    fill(to, dict.fromkeys(names[1:], b"another one"))
    refused = s3.on("RestoreObject", error(403, "InvalidAccessKeyId"), "c0")
    answered = itertools.count(1)

    def answer_late(exchange):  # in the pass, not in the survey
        if next(answered) >= len(names):
            wait_for(lambda: refused.fired)
            time.sleep(0.5)
        return s3.honest(exchange)

    s3.always("HeadObject", answer_late)
    result = archive("restore", "--to", to, "--overwrite", "--yes", TRANSFERS="8")
    assert result.status == 1
    assert s3.requests["RestoreObject"] == 1
