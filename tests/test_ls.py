"""`ls`: what is archived, from the bucket's listing alone, a line for each object."""

import json
import re
import threading
from datetime import datetime

import pytest
from conftest import MIB, OLD, TIMEOUT, fill
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from scripted_s3 import Answer, error
from test_counts import MEASURED, peak
from test_names import HOSTILE, bytes_of
from test_restore import BUSY, ESCAPE, READY, failed, listed, relisted, stored

# A time zone that no machine has: five hours and a half east of Greenwich.
EAST = {"TZ": "XYZ-5:30"}
FIELDS = [
    *("path", "size", "uploaded_at", "storage_class", "state", "key", "etag", "version_id")
]


@pytest.fixture
def archive(archive_of, faulty_box, s3):
    return archive_of(faulty_box, AWS_ENDPOINT_URL=s3.url)


def uploaded(archive, key, when):
    """Let the object have been uploaded at that time, as 2026-01-31T23:59:58 in UTC."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.get_object(archive.bucket.name, key).last_modified = datetime.fromisoformat(when)


def names(result):
    """The names in a listing of names without spaces, in its order."""
    *lines, _ = result.stdout.splitlines()
    return [line.split()[-1] for line in lines]


def objects(result):
    """The objects of `ls --json`, in its order."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def page(first, number, is_last, name="folder/file-{:07}"):
    """A page of a listing of `number` objects, which need not exist."""
    entries = "".join(
        f"<Contents><Key>{name.format(n)}</Key><LastModified>2026-01-31T23:59:58.000Z"
        f'</LastModified><ETag>"{n:032x}"</ETag><Size>{n}</Size>'
        f"<StorageClass>DEEP_ARCHIVE</StorageClass></Contents>"
        for n in range(first, first + number)
    )
    more = "" if is_last else f"<NextContinuationToken>{first + number}</NextContinuationToken>"
    body = f"<ListBucketResult><IsTruncated>{str(not is_last).lower()}</IsTruncated>"
    text = f'<?xml version="1.0"?>{body}{more}{entries}</ListBucketResult>'
    return Answer(200, {"content-type": "application/xml"}, text.encode())


def pages(number):
    """A bucket of that many pages of 1,000 objects each."""

    def answer(exchange):
        token = re.search(r"continuation-token=(\d+)", exchange.handler.path)
        first = int(token[1]) if token else 0
        return page(first, 1000, first + 1000 >= number * 1000)

    return answer


def if_asked(fault):
    """S3 lists how restores stand only where it is asked to."""

    def answer(exchange):
        asked = exchange.headers.get("x-amz-optional-object-attributes")
        return fault(exchange) if asked == "RestoreStatus" else exchange.forward()

    return answer


# --- What is shown ----------------------------------------------------------


def test_each_object_has_a_line_with_size_time_class_state_and_path(archive):
    stored(archive, {"photos/a b.jpg": 1536}, "DEEP_ARCHIVE")
    stored(archive, {"notes.txt": 7, "zero": 0})
    stored(archive, {"flexible": 3 * MIB}, "GLACIER")
    for key in ("photos/a b.jpg", "notes.txt", "zero", "flexible"):
        uploaded(archive, key, "2026-01-31T20:15:58")

    result = archive("ls", **EAST)

    assert (result.status, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "    3.0 MiB  2026-02-01 01:45  GLACIER                 flexible",
        "    7 bytes  2026-02-01 01:45  STANDARD                notes.txt",
        "    1.5 KiB  2026-02-01 01:45  DEEP_ARCHIVE            photos/a b.jpg",
        "    0 bytes  2026-02-01 01:45  STANDARD                zero",
        "4 files, 3.0 MiB",
    ]


def test_lines_of_short_paths_fit_80_columns(archive, s3):
    stored(archive, {"n" * 25: 1023, "busy": 1023, "ready": 1023}, "DEEP_ARCHIVE")
    s3.always("ListObjectsV2", listed(busy=BUSY, ready=READY))
    result = archive("ls")
    assert result.status == 0
    assert max(map(len, result.stdout.splitlines())) == 80


def test_state_of_a_thaw_is_shown(archive, s3):
    stored(archive, dict.fromkeys(("busy", "cold", "over", "ready"), b""), "DEEP_ARCHIVE")
    stored(archive, {"warm": b""})
    over = READY.replace("2126", "2020")
    s3.always("ListObjectsV2", if_asked(listed(busy=BUSY, ready=READY, over=over)))

    result = archive("ls", "--json")

    assert {found["path"]: found["state"] for found in objects(result)} == {
        "busy": "restoring",
        "cold": "cold",
        "over": "cold",  # the copy has expired since S3 has listed it
        "ready": "restored",
        "warm": "readable",
    }
    shown = archive("ls").stdout.splitlines()
    assert [line[44:54].strip() for line in shown[:-1]] == ["restoring", "", "", "restored", ""]


def test_json_has_all_that_the_listing_tells(archive, bucket, s3):
    stored(archive, {"pre/photos/é.jpg": b"content"}, "DEEP_ARCHIVE")
    uploaded(archive, "pre/photos/é.jpg", "2026-01-31T23:59:58")
    head = bucket.client.head_object(Bucket=bucket.name, Key="pre/photos/é.jpg")

    result = archive("ls", "--json", S3_PREFIX="pre/", **EAST)

    assert (result.status, result.stderr) == (0, "")
    (found,) = objects(result)
    assert list(found) == FIELDS
    assert found == {
        "path": "photos/é.jpg",
        "size": 7,
        "uploaded_at": "2026-01-31T23:59:58Z",
        "storage_class": "DEEP_ARCHIVE",
        "state": "cold",
        "key": "pre/photos/é.jpg",
        "etag": head["ETag"].strip('"'),
        "version_id": None,
    }
    assert set(s3.requests) == {"ListObjectsV2"}


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_hostile_names_are_one_safe_line_each(archive, faulty_box, form):
    """`archive` itself looks for control characters in what is printed."""
    kept = [name for name in HOSTILE if name not in (b"...", b"..leading")]
    fill(faulty_box.root, dict.fromkeys(kept, b""), mtime=OLD)
    assert archive(STORAGE_CLASS="STANDARD").status == 0

    result = archive("ls", *form)

    assert (result.status, result.stderr) == (0, "")
    lines = result.stdout.split("\n")
    assert lines.pop() == ""
    if form:
        assert result.stdout.isascii()
        found = [json.loads(line) for line in lines]
        assert sorted(bytes_of(one["path"]) for one in found) == sorted(kept)
        assert all(bytes_of(one["key"]) == bytes_of(one["path"]) for one in found)
    else:
        assert lines.pop() == f"{len(kept)} files, 0 bytes"
        assert len(set(lines)) == len(lines) == len(kept)
        assert all(line.isprintable() for line in lines)


# --- Where it looks ---------------------------------------------------------


def test_the_listing_is_all_that_is_asked(archive, faulty_box, s3):
    """No state, no Storage Box, and none is made."""
    stored(archive, {"a": b"", "b/c": b""}, "DEEP_ARCHIVE")
    assert archive("ls").status == 0
    assert s3.requests == {"ListObjectsV2": 1}
    assert faulty_box.connections == 0
    assert not archive.state_db.exists()

    archive.state_db.write_bytes(b"no database")
    assert names(archive("ls", HETZNER_PORT="1")) == ["a", "b/c"]
    assert archive.state_db.read_bytes() == b"no database"


KEYS = ["a", "a-b", "a.txt", "a/deep/y", "a/x", "ab/x", f"latin-{ESCAPE}E9"]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], KEYS),
        (["a"], ["a", "a/deep/y", "a/x"]),
        (["./a/"], ["a", "a/deep/y", "a/x"]),
        (["backup/a/deep/"], ["a/deep/y"]),
        (["a.txt/"], ["a.txt"]),
        (["latin-\udce9", "ab", "a/x"], ["a/x", "ab/x", f"latin-{ESCAPE}E9"]),
        (["a/x", "a/deep", "a"], ["a", "a/deep/y", "a/x"]),
        (["backup"], KEYS),
        (["."], KEYS),
    ],
    ids=str,
)
def test_paths_choose_as_restore_does_and_keys_come_in_their_order(archive, paths, expected):
    stored(archive, {f"pre/{key}": b"" for key in reversed(KEYS)})
    result = archive("ls", "--json", *paths, S3_PREFIX="pre/", REMOTE_PATH="backup")
    assert (result.status, result.stderr) == (0, "")
    assert [found["key"].removeprefix("pre/") for found in objects(result)] == expected


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_path_that_has_nothing_is_a_failure_beside_the_others(archive, form):
    stored(archive, {"a/x": b"content", "ab": b"content", "z": b""})

    result = archive("ls", *form, "ab", "b", "a/x/y", "new\nline")

    assert result.status == 3
    reason = "nothing is archived under this path; give it exactly, patterns do not work"
    assert failed(result) == dict.fromkeys(("a/x/y", "b", "new\\nline"), reason)
    shown = [one["path"] for one in objects(result)] if form else names(result)
    assert shown == ["ab"]
    assert form or result.stdout.endswith("\n1 files, 7 bytes\n")


def test_prefix_with_nothing_below_it_is_an_error(archive):
    stored(archive, {"a": b""})
    result = archive("ls", S3_PREFIX="typo/")
    assert (result.status, result.stdout) == (1, "")
    assert "nothing is archived in s3://" in result.stderr


def test_root_is_not_taken_for_all(archive, s3):
    """`$unset/`, perhaps; and an unset variable is no path."""
    stored(archive, {"a": b""})
    for path in ("/", ""):
        result = archive("ls", path)
        assert (result.status, result.stdout) == (2, ""), path
    assert s3.requests.total() == 0


def test_refusal_is_told_in_one_line(archive, s3):
    s3.always("ListObjectsV2", error(403, "AccessDenied"))
    result = archive("ls")
    assert (result.status, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "error: S3 refused ListObjectsV2: AccessDenied" in result.stderr
    assert "IAM policy" in result.stderr


def test_sizes_of_other_programs_are_listed_too(archive, s3):
    """5 TB, and the folders that S3's console makes, which are no files."""
    stored(archive, {"huge": b"content", "photos/": b""})
    s3.always("ListObjectsV2", relisted("Size", {7: 5 * 2**40}))
    result = archive("ls")
    assert result.stdout.splitlines()[0].startswith("    5.0 TiB  ")
    assert result.stdout.endswith("\n1 files, 5.0 TiB\n")


# --- Large buckets ----------------------------------------------------------


def test_lines_are_shown_before_the_listing_has_ended(archive, s3):
    """The second page is answered only when the first has been read."""
    go_on = threading.Event()
    s3.on("ListObjectsV2", pages(2))
    held = s3.on("ListObjectsV2", lambda e: pages(2)(e) if go_on.wait(20) else None, nth=2)

    running = archive.start("ls", "--json")

    first = json.loads(running.process.stdout.readline())
    assert first["path"] == "folder/file-0000000"
    go_on.set()
    result = running.wait()
    assert result.status == 0
    assert (held.fired, s3.requests["ListObjectsV2"]) == (1, 2), "nobody waited in vain"
    assert len(result.stdout.splitlines()) > 1000


@pytest.mark.as_users_do
@pytest.mark.timeout(3 * TIMEOUT)
def test_listing_of_many_pages_does_not_pile_up(archive, s3):
    peaks = []
    for number in (2, 25):
        s3.rules.clear()
        s3.requests.clear()
        s3.always("ListObjectsV2", pages(number))

        result = archive.start("ls", before=MEASURED).wait()

        assert result.status == 0, result.stderr
        assert s3.requests == {"ListObjectsV2": number}
        assert len(result.stdout.splitlines()) == number * 1000 + 1
        assert f"\n{number * 1000:,} files, " in result.stdout
        peaks.append(peak(result))
    assert peaks[1] - peaks[0] < 8, peaks  # MiB; 23,000 objects would take 12


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_reader_that_has_seen_enough_ends_it_in_silence(archive, s3, form):
    """As `| head` does."""
    s3.always("ListObjectsV2", pages(50))

    running = archive.start("ls", *form)
    running.process.stdout.readline()
    running.process.stdout.close()
    stderr = running.process.stderr.read()
    running.process.wait(30)

    assert stderr == ""
    assert s3.requests["ListObjectsV2"] < 10


@pytest.mark.parametrize("command", ["ls", "status --json", "plan --list", "run --json"])
def test_output_that_cannot_be_written_is_an_error(archive, command):
    stored(archive, {"a": b"a"})
    redirected = "import sys\nsys.stdout = open('/dev/full', 'w')\n"

    result = archive(*command.split(), before=redirected)

    assert result.status == 1
    assert "error: stdout cannot be written: [Errno 28]" in result.stderr
