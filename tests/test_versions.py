"""Versioned buckets: `ls --at` and `restore --at` see each key as it was at a time.

`versions` puts versions and delete markers at times that the test chooses. moto tells whole
seconds, as S3 does. It dates an upload in parts by its end, never lists two versions of a
second in order, and keeps delete markers apart: where that matters, the test has a listing
of its own answered.
"""

import csv
import os
import re
import time
from datetime import datetime, timezone
from urllib.parse import parse_qs, unquote, urlsplit
from zlib import crc32

import pytest
from conftest import OLD, fill
from faults import AGAIN_SOON, LARGE, SIZES
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from scripted_s3 import Answer, cut_headers, rewritten
from test_ls import EAST, if_asked, names, objects
from test_names import HOSTILE
from test_restore import BUSY, ESCAPE, READY, failed, note, whole

DAY = 86400


@pytest.fixture
def archive(archive_of, faulty_box, s3):
    return archive_of(faulty_box, AWS_ENDPOINT_URL=s3.url, STORAGE_CLASS="STANDARD")


@pytest.fixture
def to(tmp_path):
    return tmp_path / "restored"


class Versions:
    """A bucket that keeps versions, and the times at which they came into it."""

    def __init__(self, bucket):
        self.client, self.name = bucket.client, bucket.name
        self.switch("Enabled")

    def switch(self, status):
        configuration = {"Status": status}
        self.client.put_bucket_versioning(
            Bucket=self.name, VersioningConfiguration=configuration
        )

    def put(self, key, content, when, mtime=OLD, storage_class="STANDARD"):
        """Put a version as archive.py does; returns its id."""
        answer = self.client.put_object(
            Bucket=self.name,
            Key=key,
            Body=content,
            StorageClass=storage_class,
            Metadata={"mtime": str(mtime)},
            ChecksumAlgorithm="CRC32",
        )
        self._date(key, when)
        return answer.get("VersionId")

    def delete(self, key, when):
        """Put a delete marker."""
        self.client.delete_object(Bucket=self.name, Key=key)
        self._date(key, when)

    def _date(self, key, when):
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].get_bucket(self.name).keys
        keys.getlist(key)[-1].last_modified = utc(when).replace(tzinfo=None)


@pytest.fixture
def versions(bucket):
    return Versions(bucket)


def utc(when):
    """`when` as a datetime: seconds since the epoch, or ISO 8601 in UTC."""
    if isinstance(when, str):
        return datetime.fromisoformat(when).replace(tzinfo=timezone.utc)
    return datetime.fromtimestamp(when, timezone.utc)


def june(day):
    """A time of 2021 on the command line and for `versions`."""
    return f"2021-06-{day:02}T12:00:00"


def version_asked_for(exchange):
    query = parse_qs(urlsplit(exchange.handler.path).query)
    return exchange.key, query.get("versionId", [None])[0]


def what(content, mtime=OLD):
    """A file as `whole` gives it."""
    return len(content), crc32(content), mtime


# --- Which version ----------------------------------------------------------


@pytest.fixture
def history(versions):
    """The history of some keys in June 2021; contents and times differ in each version."""
    for name, days in {
        "kept": (1,),
        "overwritten": (1, 10),
        "again": (1, -5, 10),
        "deleted": (1, -10),
        "deleted before": (1, -2),
        "new": (10,),
        "often": (1, 2, -4, 6, 8, -9),
    }.items():
        for day in days:
            if day < 0:
                versions.delete(name, june(-day))
            else:
                versions.put(name, f"{name} of {day}".encode() * day, june(day), OLD + day)


CURRENT = {  # on a day: the day that each version is of
    3: {"kept": 1, "overwritten": 1, "again": 1, "deleted": 1, "often": 2},
    7: {"kept": 1, "overwritten": 1, "deleted": 1, "often": 6},
    12: {"kept": 1, "overwritten": 10, "again": 10, "new": 10},
}


def as_of(day):
    """{path: what} that has to be there on that day."""
    return {
        name.encode(): what(f"{name} of {of}".encode() * of, OLD + of)
        for name, of in CURRENT[day].items()
    }


@pytest.mark.parametrize("day", CURRENT)
def test_each_file_comes_back_as_it_was_then_bit_for_bit_with_its_time(
    archive, history, s3, to, day
):
    at = f"{june(day)}Z"

    cut = s3.on("ListObjectVersions", cut_headers)
    result = archive("restore", "--to", to, "--at", at, before=AGAIN_SOON)

    assert (result.status, result.failures, cut.fired) == (0, [], 1), result.stderr
    assert whole(to) == as_of(day)
    assert set(s3.requests) == {"ListObjectVersions", "GetObject", "GET"}
    again = archive("restore", "--to", to, "--at", at)
    assert again.status == 0, again.stderr
    assert f"Already there  : {len(CURRENT[day])}\n" in again.stdout


@pytest.mark.parametrize("most", [1, 3])
def test_versions_of_a_key_may_span_pages(archive, history, s3, to, monkeypatch, most):
    """moto lists that many at once."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", str(most))
    for day, current in CURRENT.items():
        s3.requests.clear()
        result = archive("ls", "--at", f"{june(day)}Z", "--json")
        assert (result.status, result.stderr) == (0, "")
        assert [found["path"] for found in objects(result)] == sorted(current)
        days = {one["path"]: int(one["uploaded_at"][8:10]) for one in objects(result)}
        assert days == current
        assert s3.requests["ListObjectVersions"] == -(-17 // most)


def test_ls_tells_of_the_version_that_was_current_then(archive, versions, s3):
    first = versions.put("file", b"first", june(1))
    versions.put("file", b"the second", june(10))

    result = archive("ls", "--at", "2021-06-05", "--json")

    (found,) = objects(result)
    assert found["version_id"] == first
    assert (found["size"], found["uploaded_at"]) == (5, f"{june(1)}Z")
    shown = archive("ls", "--at", "2021-06-05", TZ="UTC")
    assert shown.stdout.splitlines()[0].startswith("    5 bytes  2021-06-01 ")
    assert shown.stdout.endswith("1 files, 5 bytes\n")
    (now,) = objects(archive("ls", "--json"))
    assert (now["size"], now["version_id"]) == (10, None)


def entries(key, history):
    """How S3 lists the versions of `key`, with the latest first, as (name, second); a name
    with `deleted` in it is a delete marker's."""
    for number, (name, second) in enumerate(history):
        tag, more = "DeleteMarker", ""
        if "deleted" not in name:
            tag, more = "Version", f'<ETag>"{name}"</ETag><Size>{number}</Size>'
        yield (
            f"<{tag}><Key>{key}</Key><VersionId>{name}</VersionId>"
            f"<IsLatest>{str(not number).lower()}</IsLatest>"
            f"<LastModified>2021-06-01T12:00:{second:02}.000Z</LastModified>{more}</{tag}>"
        )


def in_pages(entries, most):
    """S3 lists these, so many at once."""

    def answer(exchange):
        query = parse_qs(urlsplit(exchange.handler.path).query)
        first = int(query.get("version-id-marker", [0])[0])
        last = first + most
        more = "<IsTruncated>false</IsTruncated>"
        if last < len(entries):
            more = "<IsTruncated>true</IsTruncated><NextKeyMarker>key</NextKeyMarker>"
            more += f"<NextVersionIdMarker>{last}</NextVersionIdMarker>"
        body = f"<ListVersionsResult>{more}{''.join(entries[first:last])}</ListVersionsResult>"
        return Answer(200, {"content-type": "application/xml"}, body.encode())

    return answer


@pytest.mark.parametrize("empty", ["", "<NextVersionIdMarker></NextVersionIdMarker>"])
def test_page_that_begins_with_a_key_is_asked_for_without_version(archive, versions, s3, empty):
    pages = {  # by the markers in the query: what follows them, and the versions
        (None, None): ("b", "<NextVersionIdMarker>b1</NextVersionIdMarker>"),
        ("b", "b1"): ("c", empty),
        ("c", None): ("d", None),
    }

    def answer(exchange):
        query = parse_qs(urlsplit(exchange.handler.path).query, keep_blank_values=True)
        names = "key-marker", "version-id-marker"
        key, more = pages[tuple(query.get(name, [None])[0] for name in names)]
        body = f"<IsTruncated>{str(more is not None).lower()}</IsTruncated>"
        body += f"<NextKeyMarker>{key}</NextKeyMarker>{more or ''}" if more is not None else ""
        body += "".join(entries(key, [(f"{key}1", 10)]))
        body = f"<ListVersionsResult>{body}</ListVersionsResult>"
        return Answer(200, {"content-type": "application/xml"}, body.encode())

    s3.always("ListObjectVersions", answer)
    result = archive("ls", "--at", "2021-06-02", "--json")
    assert [found["path"] for found in objects(result)] == ["b", "c", "d"], result.output


IN_ORDER = {  # the versions of a key as S3 lists them, and which is current at a second
    "in one second": ([("c", 10), ("b", 10), ("a", 10)], {9: None, 10: "c", 30: "c"}),
    "overwritten later": ([("c", 20), ("b", 10), ("a", 10)], {10: "b", 20: "c"}),
    "deleted in it": ([("deleted", 10), ("a", 10)], {9: None, 10: None}),
    "put again in it": ([("b", 10), ("deleted", 10), ("a", 5)], {4: None, 9: "a", 10: "b"}),
    "and deleted": (
        [("deleted 2", 20), ("b", 10), ("deleted 1", 10), ("a", 5)],
        {9: "a", 10: "b", 20: None},
    ),
    # boto3 does not tell which came first: a file too many is better than one too few.
    "put and deleted in it": ([("b", 20), ("deleted", 10), ("a", 10)], {10: "a", 20: "b"}),
    # An upload in parts is dated by its beginning.
    "in parts": ([("parts", 5), ("small", 10)], {4: None, 9: None, 10: "parts"}),
    "parts before": ([("c", 20), ("parts", 5)], {4: None, 9: "parts", 20: "c"}),
}


@pytest.mark.parametrize("most", [1, 3, 100])
def test_order_of_the_listing_counts_within_a_second(archive, versions, s3, most):
    """On whichever pages the versions come."""
    listing = [entry for key in sorted(IN_ORDER) for entry in entries(key, IN_ORDER[key][0])]
    s3.always("ListObjectVersions", in_pages(listing, most))
    current = {}
    for second in (4, 9, 10, 20, 30):
        result = archive("ls", "--at", f"2021-06-01T12:00:{second:02}Z", "--json")
        assert result.status == (0 if result.stdout else 1), result.stderr
        current[second] = {one["path"]: one["version_id"] for one in objects(result)}
    for key, (_, expected) in IN_ORDER.items():
        assert {second: current[second].get(key) for second in expected} == expected, key


def test_paths_choose_among_the_versions_too(archive, versions, to):
    old = {key: versions.put(key, b"old", june(1)) for key in ("a/x", "a/y", "ab", "b")}
    for key in ("a/x", "ab", "b"):
        versions.put(key, b"other", june(10))
    versions.put("a/new", b"new", june(10))
    versions.put("new", b"new", june(10))

    result = archive("ls", "a/", "b", "new", "--at", "2021-06-05")
    assert (result.status, set(failed(result))) == (3, {"new"})
    assert names(result) == ["a/x", "a/y", "b"]
    result = archive("restore", "a/", "b", "new", "--at", "2021-06-05", "--to", to)
    assert (result.status, set(failed(result))) == (3, {"new"})
    assert whole(to) == {os.fsencode(key): what(b"old") for key in old if key != "ab"}


def test_names_that_two_keys_stand_for_are_told_apart_as_of_then(archive, versions, to):
    """Only what was there then has a part in it: this program's spelling of a key, and a
    file beside a folder of its name."""
    versions.put("raw\tname", b"an earlier script's", june(1))
    versions.put(f"raw{ESCAPE}09name", b"this program's", june(10))
    versions.put("x", b"file", june(1))
    versions.put("x/y", b"below", june(1))
    versions.put("x.file", b"another", june(1))
    versions.delete("x.file", june(10))

    result = archive("restore", "--to", to, "--at", "2021-06-05")

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(to) == {
        b"raw\tname": what(b"an earlier script's"),
        b"x.file": what(b"another"),
        b"x.file.file": what(b"file"),
        b"x/y": what(b"below"),
    }


# --- Cold versions ----------------------------------------------------------


def cold(**thaws):
    """S3 lists all versions as DEEP_ARCHIVE, and how the restore of {key: ...} stands."""

    def edited(body):
        for key, text in thaws.items():
            tag = f"<Key>{key}</Key>".encode()
            body = body.replace(tag, tag + f"<RestoreStatus>{text}</RestoreStatus>".encode())
        return body.replace(b">STANDARD<", b">DEEP_ARCHIVE<")

    return rewritten(edited)


def test_version_is_named_in_each_request(archive, versions, s3, to):
    """moto takes the latest one of those that it is to restore, and S3 does not."""
    wanted = {key: versions.put(key, b"old", june(1)) for key in ("busy", "cold", "ready")}
    for key in wanted:
        versions.put(key, b"other", june(10))
    s3.always("ListObjectVersions", cold(busy=BUSY, ready=READY))
    asked = {"RestoreObject": [], "GetObject": [], "HeadObject": []}
    accepted = Answer(202, {})
    s3.always(
        "RestoreObject",
        lambda exchange: asked["RestoreObject"].append(version_asked_for(exchange)) or accepted,
    )
    for operation in ("GetObject", "HeadObject"):
        s3.always(operation, note(asked[operation], version_asked_for))

    result = archive("restore", "--to", to, "--at", "2021-06-05", "--yes")

    assert result.status == 75, result.stderr
    assert whole(to) == {b"ready": what(b"old")}
    assert asked["RestoreObject"] == [("cold", wanted["cold"])]
    assert asked["GetObject"] == [("ready", wanted["ready"])]
    archive("restore", "ready", "--to", to, "--at", "2021-06-05")
    assert set(asked["HeadObject"]) == {("ready", wanted["ready"])}
    assert len(asked["GetObject"]) == 1, "it is there already"


def test_body_that_is_cut_goes_on_within_its_version(archive, versions, s3, to):
    body = os.urandom(3_000_000)
    wanted = versions.put("file", body, june(1))
    versions.put("file", os.urandom(3_000_000), june(10))
    asked = []

    def cut(exchange):
        asked.append(version_asked_for(exchange))
        answer = exchange.forward()
        if len(asked) == 1:
            answer.headers["content-length"] = str(len(answer.body))
            answer.body = answer.body[:1_000_000]
            exchange.handler.close_connection = True
        return answer

    s3.always("GetObject", cut)

    result = archive("restore", "--to", to, "--at", "2021-06-05")

    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(to) == {b"file": what(body)}
    assert asked == [("file", wanted)] * 2


def test_state_of_a_thaw_is_that_of_the_version(archive, versions, s3):
    for key in ("busy", "cold", "ready"):
        versions.put(key, b"", june(1))
    s3.always("ListObjectVersions", if_asked(cold(busy=BUSY, ready=READY)))
    result = archive("ls", "--at", "2021-06-05", "--json")
    states = {one["path"]: one["state"] for one in objects(result)}
    assert states == {"busy": "restoring", "cold": "cold", "ready": "restored"}


def test_manifest_names_the_versions(archive, bucket, versions, s3, to):
    keys = ["a b", "comma,quote\"'", f"new{ESCAPE}0Aline", "per%cent+"]
    wanted = {key: versions.put(key, b"old", june(1), storage_class="GLACIER") for key in keys}
    for key in keys:
        versions.put(key, b"other", june(10), storage_class="GLACIER")
    manifest = archive.folder / "manifest.csv"

    result = archive("restore", "--to", to, "--at", "2021-06-05", "--manifest", manifest)

    assert result.status == 75, result.stderr
    rows = list(csv.reader(manifest.read_text("ascii").splitlines()))
    assert sorted((name, unquote(key), version) for name, key, version in rows) == sorted(
        (bucket.name, key, version) for key, version in wanted.items()
    )
    assert s3.requests["RestoreObject"] == 0


def test_cold_version_is_asked_for_and_fetched_by_a_later_pass(archive, versions, bucket, to):
    """moto restores the latest version, which this one is then."""
    versions.put("other", b"other", june(10))
    versions.put("file", b"old", june(1), storage_class="DEEP_ARCHIVE")
    arguments = ("restore", "--to", to, "--at", "2021-06-05", "--yes")
    assert archive(*arguments).status == 75
    result = archive(*arguments)
    assert (result.status, result.failures) == (0, []), result.stderr
    assert whole(to) == {b"file": what(b"old")}


def test_age_is_told_as_a_time_for_the_later_pass(archive, versions, s3, to):
    """By then, a day ago is after the files were spoilt."""
    now = time.time()
    wanted = versions.put("file", b"old", now - 5000)
    versions.put("file", b"spoilt", now - 3500)
    s3.always("ListObjectVersions", cold())
    asked = []
    s3.always("RestoreObject", lambda e: asked.append(version_asked_for(e)) or Answer(202, {}))
    arguments = ("restore", "--to", to, "--yes")

    first = archive(*arguments, "--at", "1h", **EAST)

    assert first.status == 75, first.stderr
    when = re.search(r"Run the same command again later with --at (\S+)\.$", first.stderr, re.M)
    assert abs(datetime.fromisoformat(when[1]).timestamp() - (now - 3600)) < 60
    assert when[1].endswith("+05:30")
    listed = ("--manifest", archive.folder / "manifest.csv")
    again = archive(*arguments, "--at", when[1], *listed, **EAST)
    assert f"run restore again with --at {when[1]} without --manifest" in again.stderr
    archive(*arguments, "--at", when[1])
    assert asked == [("file", wanted)] * 2


# --- Which time -------------------------------------------------------------


@pytest.mark.parametrize(
    "when",
    [
        *("2021-06-02", " 2021-06-02 ", "2021-06-02T00:00", "2021-06-02 00:00:00"),
        *("2021-06-01T18:30Z", "2021-06-01T18:30:00z", "2021-06-01 19:30+01:00"),
    ],
)
def test_time_is_of_the_local_zone_unless_it_has_its_own(archive, versions, when):
    """A date is its beginning."""
    wanted = versions.put("file", b"old", "2021-06-01T18:29:59")
    versions.put("file", b"other", "2021-06-01T18:30:01")
    (found,) = objects(archive("ls", "--json", "--at", when, **EAST))
    assert found["version_id"] == wanted


@pytest.mark.parametrize(
    ("age", "seconds"), [("30d", 30 * DAY), ("36h", 36 * 3600), ("1h30m", 5400), ("300s", 300)]
)
def test_age_counts_back_from_now(archive, versions, age, seconds):
    then = time.time() - seconds
    wanted = versions.put("file", b"old", then - 60)
    versions.put("file", b"other", then + 60)
    (found,) = objects(archive("ls", "--json", "--at", age))
    assert found["version_id"] == wanted


@pytest.mark.parametrize(
    "when",
    [
        *("", " ", "yesterday", "20261301", "2021-02-29", "2021-06-05T25:00", "30", "30y"),
        *("d", "9999999d", "1e3d", "\u0663d", "0001-01-01", "9999-12-31"),
        *("2021-06-05; ls", "\udcff", "2126-01-01", "1969-12-31", "99999999999999999999s"),
    ],
    ids=repr,
)
def test_what_is_no_time_of_the_past_is_told_in_one_line(archive, s3, when):
    for command in (["ls"], ["restore", "--to", "x"]):
        result = archive(*command, f"--at={when}")
        assert (result.status, result.stdout) == (2, ""), result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: argument --at: expected a time in the past")
    assert s3.requests.total() == 0


def test_time_before_all_versions_is_an_error(archive, versions, to):
    versions.put("file", b"content", june(10))
    for command in (["ls"], ["restore", "--to", to]):
        result = archive(*command, "--at", "2021-06-05T12:00:00Z", TZ="UTC")
        assert (result.status, result.stdout) == (1, "")
        assert len(result.stderr.splitlines()) == 1
        assert "nothing is archived in s3://" in result.stderr
        assert "at 2021-06-05 12:00:00 +0000: correct --at" in result.stderr


def test_bucket_that_never_kept_versions_is_told_of_in_one_line(archive, bucket, s3, to):
    bucket.client.put_object(Bucket=bucket.name, Key="file", Body=b"content")
    for command in (["ls"], ["restore", "--to", to]):
        result = archive(*command, "--at", "2021-06-05")
        assert (result.status, result.stdout) == (1, "")
        assert len(result.stderr.splitlines()) == 1
        assert "is not versioned" in result.stderr
    assert set(s3.requests) == {"GET"}
    assert not to.exists() or os.listdir(to) == []


def test_bucket_that_has_stopped_keeping_versions_still_has_the_earlier_ones(
    archive, versions, to
):
    versions.put("file", b"old", june(1))
    versions.put("file", b"other", june(10))
    versions.switch("Suspended")
    assert versions.put("later", b"later", june(10)) in (None, "null")
    for day, expected in (
        (5, {b"file": what(b"old")}),
        (12, {b"file": what(b"other"), b"later": what(b"later")}),
    ):
        result = archive("restore", "--to", to / str(day), "--at", june(day), TZ="UTC")
        assert (result.status, result.failures) == (0, []), result.stderr
        assert whole(to / str(day)) == expected


# --- What it is for ---------------------------------------------------------


def test_files_that_somebody_has_encrypted_come_back_as_they_were_before(
    archive, faulty_box, versions, to
):
    """All of them were archived again since, under the same names."""
    kept = [name for name in HOSTILE if name not in (b"...", b"..leading")]
    files = {"photos/large": LARGE, "empty": b"", **dict.fromkeys(kept, 1_000)}
    fill(faulty_box.root, files)
    assert archive(constants=SIZES).status == 0
    before = whole(faulty_box.root)
    time.sleep(1.1)
    then = datetime.now(timezone.utc).isoformat(timespec="seconds")
    time.sleep(1.1)
    for path in before:
        with open(os.path.join(os.fsencode(faulty_box.root), path), "r+b") as file:
            content = file.read()
            file.seek(0)
            file.write(bytes(byte ^ 1 for byte in content) + b"pay")
    fill(faulty_box.root, {"READ ME": b"pay"})
    assert archive(constants=SIZES).counts == (len(before) + 1, 0, 0)
    after = whole(faulty_box.root)
    archive.state_db.unlink()

    result = archive("restore", "--to", to / "then", "--at", then)
    now = archive("restore", "--to", to / "now")

    assert result.status == 0, result.stderr
    assert whole(to / "then") == before
    assert now.status == 0, now.stderr
    assert whole(to / "now") == after
