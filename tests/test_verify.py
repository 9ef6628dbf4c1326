"""`verify`: the state against what the bucket's listing says, and brought in line with it."""

import contextlib
import os
import re
import sqlite3
from zlib import crc32

import pytest
from boto3.s3.transfer import TransferConfig
from conftest import MIB, OLD, earlier_database, fill
from faults import assert_all_archived, scripted_fixtures
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from scripted_s3 import error, lost_answer, rewritten

COLD = "DEEP_ARCHIVE"
SMALL_PARTS = {"SMALL_FILE": 5 * MIB, "PART_SIZE": 5 * MIB}

# Those of each length in UTF-8, of which some come in another order in UTF-16, in
# lower case, or with the folder's slash before or after its neighbours.
ALL_SCRIPTS = [
    *("Z", "a", "A b", "a+b", "a%20b", "a%2Fb", "a&b=c", "a'b", 'a"b', "a<b>", "~", "a-b"),
    *("a/b", "a.b", "a/-", "a0", "é", "e\u0301", "Ω", "щ", "ß", "א", "中文", "日本/語"),
    *("\uff5e", "\ue000", "\U0001f4f7", "\U0001f4f7/x", "\U00010348", "\u201b", "\ufb01"),
    *("line\nfeed", "lines", "tab\t", "del\x7f", " x ", "x?y#z", "\\", "a\\b", "*"),
    "\u202edda",
]


box, archive = scripted_fixtures()


@pytest.fixture
def store(bucket):
    """Puts an object into the bucket past the program, and fast."""

    def put(key, content, storage_class=COLD):
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        backend.put_object(bucket.name, key, content, storage=storage_class)

    return put


def counts(result):
    """The numbers of the summary by label, zeros left out."""
    found = re.findall(r"^(\w[^:\n]*?) *: ([\d,]+)$", result.stdout, re.MULTILINE)
    numbers = {label.lower(): int(number.replace(",", "")) for label, number in found}
    return {label: number for label, number in numbers.items() if number}


def failed(result):
    """The files that failed, by their paths below REMOTE_PATH."""
    return sorted(line.partition(": ")[0].removeprefix("./") for line in result.failures)


FAULTS = ["missing", "wrong size", "wrong checksum", "not recorded"]


def make_difference(archive, name, how):
    """Let what is archived of that file differ from what is recorded of it."""
    client, at = archive.bucket.client, {"Bucket": archive.bucket.name, "Key": name}
    content = archive.bucket.content(name)
    match how:
        case "missing":
            client.delete_object(**at)
        case "wrong size":
            client.put_object(**at, Body=content + b"more", StorageClass=COLD)
        case "wrong checksum":
            client.put_object(**at, Body=content[::-1], StorageClass=COLD)
        case "wrong class":
            client.put_object(**at, Body=content, StorageClass="STANDARD")
        case "not recorded":
            for table in ("files", "objects"):
                archive.execute(f"DELETE FROM {table} WHERE path = ?", f"./{name}")


def spoil(archive, how):
    """Archive the files a, bad and z, and make a difference in what becomes of bad."""
    fill(archive.box.root, {name: name.encode() * 10 for name in ("a", "bad", "z")})
    assert archive().status == 0
    make_difference(archive, "bad", how)


# --- What is found ---


def test_state_that_agrees_is_found_so_by_listing_alone(archive, box, s3):
    fill(box.root, {"a": 10, "d/b": 0, "large": 11 * MIB})
    assert archive(constants=SMALL_PARTS).status == 0
    s3.requests.clear()
    box.requests.clear()
    state = archive.state_db.read_bytes()

    result = archive("verify")

    assert (result.status, result.failures) == (0, [])
    assert counts(result) == {"agree": 3}
    assert s3.requests == {"ListObjectsV2": 1}
    assert box.connections == 1, "that of the run"
    assert archive.state_db.read_bytes() == state


def test_each_disagreement_is_told_with_status_3(archive, box, s3):
    fill(box.root, {name: name.encode() * 10 for name in ("a", *FAULTS, "z")})
    assert archive().status == 0
    for how in FAULTS:
        make_difference(archive, how, how)
    state = archive.state_db.read_bytes()
    s3.requests.clear()

    result = archive("verify")

    assert result.status == 3
    assert failed(result) == sorted(FAULTS)
    assert counts(result) == {"agree": 2, **dict.fromkeys(FAULTS, 1)}
    assert s3.requests == {"ListObjectsV2": 1}
    assert archive.state_db.read_bytes() == state, "nothing is forgotten unasked"
    assert "the state is repaired" not in result.stderr
    assert "the state is repaired" in archive("verify", "--repair").stderr


def test_large_object_with_other_bytes_is_found_by_its_etag(archive, box):
    """Also if it was stored in the same way: in parts, of the same size."""
    fill(box.root, {"large": 11 * MIB, "other": 11 * MIB})
    assert archive(constants=SMALL_PARTS).status == 0
    client, name = archive.bucket.client, archive.bucket.name
    large, other = (entry["ETag"] for entry in archive.bucket.list())
    config = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB)
    client.upload_file(str(box.root / "other"), name, "large", Config=config)

    result = archive("verify")

    assert (result.status, failed(result)) == (3, ["large"])
    assert counts(result) == {"agree": 1, "wrong checksum": 1}
    assert large.strip('"') in result.failures[0], "both values"
    assert other.strip('"') in result.failures[0]


def test_another_object_is_noticed_though_its_file_has_to_be_compared(archive, box, bucket):
    """The rows are those of a state that was made from the listing."""
    fill(box.root, {"a": b"content", "b": b"content"})
    archive()
    archive.execute("UPDATE files SET mtime = NULL")
    bucket.client.put_object(Bucket=bucket.name, Key="a", Body=b"CONTENT")
    bucket.client.put_object(Bucket=bucket.name, Key="b", Body=b"cont")
    result = archive("verify")
    assert result.status == 3
    assert counts(result) == {"wrong checksum": 1, "wrong size": 1}


def test_another_storage_class_is_a_note_and_no_reason_to_upload(archive, box, s3):
    """A lifecycle rule may have moved the object. What is known of its content still holds:
    if the file is touched, S3 need not be asked."""
    spoil(archive, "wrong class")
    assert archive.objects()["bad"][2] == "STANDARD"
    before = len(archive.bucket.writes())

    for command in (["verify"], ["verify", "--repair"]):
        result = archive(*command)
        assert (result.status, result.failures) == (0, [])
        assert counts(result) == {"agree": 2, "other class": 1}

    assert re.search("^STANDARD +: 1 ", archive("status").stdout, re.MULTILINE)
    assert archive().counts == (0, 3, 0)
    assert archive.bucket.writes()[before:] == []
    assert counts(archive("verify")) == {"agree": 3}
    os.utime(box.root / "bad", (OLD + 5, OLD + 5))
    s3.requests.clear()
    assert archive().compared == 1
    assert s3.requests.total() == 0


@pytest.mark.parametrize("new", [b"new", b"longer"], ids=["same size", "another size"])
def test_version_whose_answer_was_lost_is_left_to_the_next_run(archive, box, s3, new):
    """Whether S3 has stored it or not, that is no fault of the archive."""
    fill(box.root, {"replaced": b"old", "kept": b"old"})
    assert archive().status == 0
    fill(box.root, {"replaced": new, "kept": new}, OLD + 1)
    s3.always("PutObject", lost_answer, key="replaced")
    s3.always("PutObject", error(400, "EntityTooLarge"), key="kept")
    assert archive(constants={"S3_ATTEMPTS": 1}).status == 3
    s3.rules.clear()

    result = archive("verify")
    assert (result.status, failed(result)) == (0, [])
    assert counts(result) == {"to compare": 2}
    known = archive.query("SELECT DISTINCT etag, crc32 FROM objects")
    assert known == [(None, None)], "nothing is said of the content"

    uploads = 1 if len(new) == len(b"old") else 2  # one of the known size is compared first
    assert archive().counts == (uploads, 0, 0)
    assert archive.contents() == {"replaced": new, "kept": new}
    assert_all_archived(archive, box)


def test_many_objects_are_listed_a_thousand_at_a_time(archive, s3, store):
    names = [f"d{n % 7}/f{n}" for n in range(2_005)]
    earlier_database(archive, [(f"./{name}", 4, OLD) for name in names])
    for name in names:
        store(name, b"1234")
    assert archive().status == 0
    make_difference(archive, names[1_000], "missing")
    store("more", b"1234")
    s3.requests.clear()

    result = archive("verify")

    assert result.status == 3
    assert failed(result) == sorted(["more", names[1_000]])
    assert counts(result) == {"agree": 2_004, "missing": 1, "not recorded": 1}
    assert s3.requests == {"ListObjectsV2": 3}


def test_names_in_all_scripts_are_matched_in_the_order_of_the_listing(archive, box):
    prefix = "my box/日本/"
    fill(box.root, {f"{number}/{name}": 1 for number, name in enumerate(ALL_SCRIPTS)})
    fill(box.root, {b"not UTF-8 \xff\xfe": 1, b"\xff": 1, b"\xf0\x90\x28": 1})
    fill(box.root, {name: 1 for name in ALL_SCRIPTS if "/" not in name})
    assert archive(S3_PREFIX=prefix).status == 0
    expected = len(archive.rows())

    result = archive("verify", S3_PREFIX=prefix)

    assert (result.status, result.failures) == (0, [])
    assert counts(result) == {"agree": expected}


def test_listing_that_is_not_sorted_is_compared_like_any_other(archive, box, s3):
    fill(box.root, dict.fromkeys("abcdefg", b"x"))
    archive()

    def backwards(body):
        entries = re.findall(rb"<Contents>.*?</Contents>", body, re.DOTALL)
        return body.replace(b"".join(entries), b"".join(entries[::-1]))

    s3.on("ListObjectsV2", rewritten(backwards))
    assert archive("verify", "--repair").status == 0
    sent = s3.requests["PutObject"]
    assert archive().counts[0] == 0
    assert s3.requests["PutObject"] == sent
    assert_all_archived(archive, box)


def test_only_what_is_below_the_prefix_is_looked_at(archive, box, store):
    fill(box.root, {"a": b"1"})
    assert archive(S3_PREFIX="mine/").status == 0
    for key in ("a", "mine", "mine-too/a", "other/a"):
        store(key, b"somebody else's")

    result = archive("verify", S3_PREFIX="mine/")

    assert (result.status, counts(result)) == (0, {"agree": 1})


def test_names_cannot_forge_a_failure(archive, box, store):
    fill(box.root, {"a\nFAIL everything: is lost\x1b[31m": b"x"})
    assert archive().status == 0
    archive.execute("DELETE FROM files")
    archive.execute("DELETE FROM objects")

    result = archive("verify")

    assert result.status == 3
    assert len(result.failures) == 1
    assert "FAIL everything: is lost" not in result.output.splitlines()


# --- What cannot be compared ---


def test_lost_state_is_no_reason_to_call_anything_missing(archive):
    """A run makes a new one; verify makes none, and says so."""
    fill(archive.box.root, {"a": b"1"})
    assert archive().status == 0
    archive.state_db.unlink()

    for command in (["verify"], ["verify", "--repair"], ["verify"]):
        result = archive(*command)
        assert (result.status, result.failures) == (1, [])
        assert os.fspath(archive.state_db) in result.stderr
        assert "archive.py run" in result.stderr
        assert not archive.state_db.exists() or not archive.state_db.stat().st_size

    assert archive().compared == 1
    assert archive("verify").status == 0


def test_state_of_an_earlier_script_is_left_as_it_is(archive, store):
    earlier_database(archive, [("./a", 1, OLD)])
    store("a", b"1")
    rows = archive.rows()

    result = archive("verify", "--repair")

    assert result.status == 1
    assert "archive.py run" in result.stderr
    assert archive.rows() == rows


@pytest.mark.parametrize(("prefix", "other"), [("", "other/"), ("mine/", "")])
def test_bucket_of_another_state_is_refused(archive, box, prefix, other):
    fill(box.root, {"a": b"1"})
    archive(S3_PREFIX=prefix)

    for command in (["verify", "--repair"], ["plan"], ["status"]):
        result = archive(*command, S3_PREFIX=other)
        assert result.status == (0 if command == ["status"] else 1)
        pinned, wanted = prefix or "(empty)", other or "(empty)"
        told = f"the state belongs to S3_PREFIX={pinned}, but the setting is {wanted}: "
        assert told in result.stderr
    assert len(archive.rows()) == 1


def test_archive_that_holds_nothing_does_not_agree(archive):
    archive(S3_PREFIX="typo/")
    result = archive("verify", S3_PREFIX="typo/")
    assert result.status == 1
    assert "nothing is archived in s3://" in result.stderr


# --- Repair ---


def test_repair_lets_the_next_run_send_what_is_missing_and_compare_what_differs(archive, box):
    """And nothing else; of the bucket itself it changes nothing."""
    names = [*FAULTS, "fine", "fine too"]
    fill(box.root, {name: name.encode() * 10 for name in names})
    fill(box.root, {"large": 11 * MIB})
    assert archive(constants=SMALL_PARTS).status == 0
    for how in FAULTS:
        make_difference(archive, how, how)
    client, name = archive.bucket.client, archive.bucket.name
    # Stored again with the same bytes, in one piece, as a change of the class does it.
    content = (box.root / "large").read_bytes()
    client.put_object(Bucket=name, Key="large", Body=content, StorageClass=COLD)
    objects, before = archive.objects(), len(archive.bucket.writes())

    repaired = archive("verify", "--repair")

    assert (repaired.status, failed(repaired)) == (3, sorted([*FAULTS, "large"]))
    assert "the next run" in repaired.stderr
    assert archive.bucket.writes()[before:] == []
    assert archive.objects() == objects
    rows = {path: mtime for path, (_, mtime) in archive.rows().items()}
    to_compare = ("./wrong checksum", "./wrong size", "./not recorded", "./large")
    assert rows == {"./fine": OLD, "./fine too": OLD, **dict.fromkeys(to_compare)}
    again = archive("verify")
    assert (again.status, counts(again)) == (0, {"agree": 2, "to compare": 4})

    result = archive(constants=SMALL_PARTS)

    assert (result.status, result.counts, result.compared) == (0, (3, 2, 0), 2), result.stderr
    for name in ("missing", "wrong size", "wrong checksum"):
        assert archive.objects()[name] == (len(name) * 10, crc32(name.encode() * 10), COLD)
    assert counts(archive("verify")) == {"agree": 7}
    assert_all_archived(archive, box)


def test_repair_deletes_nothing_from_the_bucket(archive, box):
    """Not even objects of files that are on the box no more."""
    spoil(archive, "not recorded")
    (box.root / "bad").unlink()
    objects = archive.objects()
    before = len(archive.bucket.writes())

    assert archive("verify", "--repair").status == 3
    assert archive().counts == (0, 2, 0)

    assert archive.objects() == objects
    assert archive.bucket.writes()[before:] == []
    assert counts(archive("verify")) == {"agree": 2, "to compare": 1}


def test_listing_that_breaks_off_makes_no_row_forgotten(archive, s3, store):
    names = [f"f{number:04}" for number in range(1_500)]
    earlier_database(archive, [(f"./{name}", 4, OLD) for name in names])
    for name in names:
        store(name, b"1234")
    assert archive().status == 0
    s3.on("ListObjectsV2", error(403, "AccessDenied"), nth=2)

    result = archive("verify", "--repair")

    assert result.status == 1
    assert len(archive.rows()) == 1_500


def test_listing_without_etags_finds_no_other_fault(archive, box, s3):
    """Some servers leave them out, or give others at each time."""
    spoil(archive, "nothing")
    s3.always("ListObjectsV2", rewritten(lambda body: re.sub(rb"<ETag>.*?</ETag>", b"", body)))
    before = len(archive.bucket.writes())

    archive("verify", "--repair")
    s3.rules.clear()

    result = archive()
    assert (result.status, result.counts[0], result.failures) == (0, 0, [])
    assert archive.bucket.writes()[before:] == []


def test_repair_beside_a_run_ends_with_11_and_verify_alone_may_look(archive):
    spoil(archive, "missing")
    state = archive.state_db.read_bytes()

    lock = f"{archive.state_db}.lock"
    with contextlib.closing(sqlite3.connect(lock, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        assert archive("verify", "--repair").status == 11
        assert archive("verify").status == 3

    assert archive.state_db.read_bytes() == state
