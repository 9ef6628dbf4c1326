"""`verify`: the state held against what the bucket has, and against its checksums."""

import contextlib
import os
import re
import sqlite3
import time
from zlib import crc32

import pytest
from conftest import MIB, OLD, SNAPSHOT, earlier_database, fill
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from scripted_s3 import error, lost_answer, no_checksums

COLD = "DEEP_ARCHIVE"
SMALL_PARTS = {"SMALL_FILE": 5 * MIB, "PART_SIZE": 5 * MIB}

# Those of each length in UTF-8, of which some come in another order in UTF-16, in
# lower case, or with the folder's slash before or after its neighbours.
ALL_SCRIPTS = [
    *("Z", "a", "A b", "a+b", "a%20b", "a%2Fb", "a&b=c", "a'b", 'a"b', "a<b>", "~", "a-b"),
    *("a/b", "a.b", "a/-", "a0", "é", "e\u0301", "Ω", "щ", "ß", "א", "中文", "日本/語"),
    *("\uff5e", "\ue000", "\U0001f4f7", "\U0001f4f7/x", "\U00010348", "\u201b", "\ufb01"),
    *(
        "line\nfeed",
        "lines",
        "tab\t",
        "del\x7f",
        " x ",
        "x?y#z",
        "\\",
        "a\\b",
        "*",
        "\u202edda",
    ),
]


@pytest.fixture
def box(faulty_box):
    return faulty_box


@pytest.fixture
def archive(archive_of, box, s3):
    return archive_of(box, AWS_ENDPOINT_URL=s3.url)


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


def failed_keys(result):
    return sorted(failure.partition(": ")[0] for failure in result.failures)


def spoil(archive, how):
    """Archive the files a, bad and z, and make a difference in what becomes of bad."""
    fill(archive.box.root, {name: name.encode() * 10 for name in ("a", "bad", "z")})
    assert archive().status == 0
    client, at = archive.bucket.client, {"Bucket": archive.bucket.name, "Key": "bad"}
    match how:
        case "missing":
            client.delete_object(**at)
        case "wrong size":
            client.put_object(**at, Body=b"longer than it was before" * 2, StorageClass=COLD)
        case "wrong class":
            client.put_object(**at, Body=b"bad" * 10, StorageClass="STANDARD")
        case "wrong checksum":
            changed = {"Body": b"BAD" * 10, "StorageClass": COLD}
            client.put_object(**at, **changed, ChecksumAlgorithm="CRC32")
        case "not recorded":
            archive.execute("DELETE FROM files WHERE path = './bad'")
            archive.execute("DELETE FROM objects WHERE path = './bad'")


# --- Against the listing ---


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


@pytest.mark.parametrize("how", ["missing", "wrong size", "wrong class", "not recorded"])
def test_each_disagreement_is_told_with_status_3(archive, s3, how):
    spoil(archive, how)
    state = archive.state_db.read_bytes()
    s3.requests.clear()

    result = archive("verify")

    assert result.status == 3
    assert failed_keys(result) == ["bad"]
    assert counts(result) == {"agree": 2, how: 1}
    assert s3.requests == {"ListObjectsV2": 1}
    assert archive.state_db.read_bytes() == state, "nothing is forgotten unasked"


def test_object_that_is_newer_than_the_snapshot_is_in_doubt(archive, box, bucket):
    fill(box.root, {"a": b"ours", "b": b"ours"}, OLD)
    archive()
    archive.state_db.unlink()
    time.sleep(1.1)  # S3 tells whole seconds
    bucket.client.put_object(
        Bucket=bucket.name, Key="a", Body=b"evil", StorageClass=COLD, ChecksumAlgorithm="CRC32"
    )
    result = archive("verify")
    assert (result.status, counts(result)) == (0, {"agree": 1, "in doubt": 1})
    summed = archive("verify", "--checksums")
    assert (summed.status, counts(summed)) == (3, {"agree": 1, "wrong checksum": 1})


def test_row_that_is_in_doubt_is_told_of_and_its_checksum_looked_at(archive, box, s3):
    fill(box.root, {"replaced": b"old", "kept": b"old"})
    assert archive().status == 0
    fill(box.root, {"replaced": b"new", "kept": b"new"}, OLD + 1)
    s3.always("PutObject", lost_answer, key="replaced")
    s3.always("PutObject", error(400, "BadDigest"), key="kept")
    assert archive().status == 3
    s3.rules.clear()

    result = archive("verify")
    assert (result.status, failed_keys(result)) == (0, []), "the next run sees to it"
    assert counts(result) == {"in doubt": 2}

    result = archive("verify", "--checksums")
    assert (result.status, failed_keys(result)) == (3, ["replaced"])
    assert counts(result) == {"agree": 1, "wrong checksum": 1}

    assert archive().counts == (2, 0, 0)
    assert archive("verify").status == 0


def test_what_was_forgotten_is_archived_though_a_snapshot_has_it_still(archive, box, bucket):
    fill(box.root, {"a": 10, "b": 10})
    assert archive().status == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="a")
    assert archive("verify", "--repair").status == 3
    archive.state_db.unlink()

    assert archive().counts == (1, 1, 0)
    archive.assert_invariant()


def test_many_objects_are_listed_a_thousand_at_a_time(archive, s3, store):
    """Also rows that an earlier script has left, with neither key nor checksum."""
    names = [f"d{n % 7}/f{n}" for n in range(2_005)]
    earlier_database(archive, [(f"./{name}", 4, OLD) for name in names])
    for name in names[1:]:
        store(name, b"1234")
    store("more", b"1234")

    result = archive("verify")

    assert result.status == 3
    assert failed_keys(result) == sorted(["more", names[0]])
    assert counts(result) == {"agree": 2_004, "missing": 1, "not recorded": 1}
    assert s3.requests == {"ListObjectsV2": 3}


@pytest.mark.parametrize("prefix", ["", "my box/日本/"])
def test_names_in_all_scripts_are_matched_in_the_order_of_the_listing(archive, box, prefix):
    fill(box.root, {f"{number}/{name}": 1 for number, name in enumerate(ALL_SCRIPTS)})
    fill(box.root, {b"not UTF-8 \xff\xfe": 1, b"\xff": 1, b"\xf0\x90\x28": 1})
    fill(box.root, {name: 1 for name in ALL_SCRIPTS if "/" not in name})
    assert archive(S3_PREFIX=prefix).status == 0
    expected = len(archive.rows())

    result = archive("verify", S3_PREFIX=prefix)

    assert (result.status, result.failures) == (0, [])
    assert counts(result) == {"agree": expected}


def test_only_what_is_below_the_prefix_is_looked_at(archive, box, store):
    fill(box.root, {"a": b"1"})
    assert archive(S3_PREFIX="mine/").status == 0
    for key in ("a", "mine", "mine-too/a", "other/a"):
        store(key, b"somebody else's")

    result = archive("verify", S3_PREFIX="mine/")

    assert (result.status, counts(result)) == (0, {"agree": 1})


def test_lost_state_is_verified_by_its_snapshot(archive):
    spoil(archive, "missing")
    archive.state_db.unlink()

    result = archive("verify")

    assert result.status == 3
    assert failed_keys(result) == ["bad"]
    assert str(archive.state_db) in result.stderr
    assert not archive.state_db.exists()


def test_names_cannot_forge_a_failure(archive, store):
    store("a\nFAIL everything: is lost\x1b[31m", b"x")

    result = archive("verify")

    assert result.status == 3
    assert len(result.failures) == 1
    assert "FAIL everything: is lost" not in result.output.splitlines()


def test_bucket_of_another_state_is_refused(archive, box):
    fill(box.root, {"a": b"1"})
    archive()

    result = archive("verify", "--repair", S3_PREFIX="other/")

    assert result.status == 1
    assert "S3_PREFIX" in result.stderr
    assert len(archive.rows()) == 1


# --- Against the checksums ---


def test_checksums_take_one_head_for_each_object(archive, box, s3):
    fill(box.root, {"a": 10, "empty": 0, "d/b": 1_000, "large": 11 * MIB})
    assert archive(constants=SMALL_PARTS).status == 0
    s3.requests.clear()
    s3.about.clear()

    result = archive("verify", "--checksums")

    assert (result.status, counts(result)) == (0, {"agree": 4})
    assert s3.requests == {"ListObjectsV2": 1, "HeadObject": 4}
    assert all(s3.about["HeadObject", key] == 1 for key in archive.objects())


def test_object_with_other_bytes_is_found_by_its_checksum_only(archive):
    spoil(archive, "wrong checksum")

    assert archive("verify").status == 0
    result = archive("verify", "--checksums")

    assert result.status == 3
    assert failed_keys(result) == ["bad"]
    assert counts(result) == {"agree": 2, "wrong checksum": 1}


def test_objects_without_a_checksum_are_counted_and_no_failure(archive, s3, store):
    earlier_database(archive, [("./a", 1, OLD), ("./b", 1, OLD)])
    for name in ("a", "b"):
        store(name, b"1")
    s3.always("HeadObject", no_checksums)

    result = archive("verify", "--checksums")

    assert (result.status, counts(result)) == (0, {"no checksum": 2})


def test_object_that_s3_does_not_tell_of_is_a_failure_and_is_not_forgotten(archive, s3):
    spoil(archive, "nothing")
    s3.always("HeadObject", error(400, "BadRequest"), key="bad")

    result = archive("verify", "--checksums", "--repair")

    assert result.status == 3
    assert failed_keys(result) == ["bad"]
    assert set(archive.rows()) == {"./a", "./bad", "./z"}


def test_missing_permission_for_head_ends_verify_with_the_remedy(archive, s3):
    spoil(archive, "nothing")
    s3.always("HeadObject", error(403, "AccessDenied"))

    result = archive("verify", "--checksums", TRANSFERS=1)

    assert result.status == 1
    assert "policy" in result.stderr
    assert s3.requests["HeadObject"] <= 4, "not one for each of them"


# --- Repair ---


@pytest.mark.parametrize("how", ["missing", "wrong size", "wrong class", "wrong checksum"])
def test_repair_lets_the_next_run_archive_what_was_wrong(archive, how):
    spoil(archive, how)

    repaired = archive("verify", "--checksums", "--repair")
    assert (repaired.status, failed_keys(repaired)) == (3, ["bad"])
    assert set(archive.rows()) == {"./a", "./z"}

    assert archive().counts == (1, 2, 0)
    assert archive.objects()["bad"] == (30, crc32(b"bad" * 10), COLD)
    assert archive("verify", "--checksums").status == 0
    archive.assert_invariant()


def test_repair_forgets_rows_of_an_earlier_script_as_well(archive, box, store):
    fill(box.root, {"a": b"1", "gone": b"1"})
    earlier_database(archive, [("./a", 1, OLD), ("./gone", 1, OLD)])
    store("a", b"1")
    assert archive().counts == (0, 2, 0)  # takes it over

    assert archive("verify", "--repair").status == 3

    assert archive().counts == (1, 1, 0)
    assert set(archive.objects()) == {"a", "gone"}


def test_repair_deletes_nothing_from_the_bucket(archive):
    spoil(archive, "not recorded")
    objects, rows = archive.objects(), archive.rows()
    before = len(archive.bucket.writes())

    assert archive("verify", "--repair").status == 3

    assert archive.objects() == objects
    assert archive.rows() == rows
    assert archive.bucket.writes()[before:] == []


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


def test_repair_beside_a_run_ends_with_11_and_verify_alone_may_look(archive):
    spoil(archive, "missing")
    state = archive.state_db.read_bytes()

    lock = f"{archive.state_db}.lock"
    with contextlib.closing(sqlite3.connect(lock, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        assert archive("verify", "--repair").status == 11
        assert archive("verify").status == 3

    assert archive.state_db.read_bytes() == state


def test_repair_without_a_state_is_refused(archive):
    spoil(archive, "missing")
    archive.state_db.unlink()

    result = archive("verify", "--repair")

    assert result.status == 1
    assert os.fspath(archive.state_db) in result.stderr
    assert SNAPSHOT in [entry["Key"] for entry in archive.bucket.list()]


# --- Rows that these settings cannot have made ---


def test_archive_that_holds_nothing_does_not_agree(archive):
    result = archive("verify", S3_PREFIX="typo/")
    assert result.status == 1
    assert "nothing is archived in s3://" in result.stderr


def test_rows_of_another_root_are_told_and_not_taken_for_others(archive, store):
    """Cut by position, "xyz.txt" would be the row of the object "z.txt"."""
    earlier_database(archive, [("xyz.txt", 3, OLD), ("./z.txt", 1, OLD), ("./a//b", 1, OLD)])
    store("z.txt", b"z")
    result = archive("verify")
    assert (result.status, counts(result)) == (3, {"agree": 1, "no key": 2})
    assert "2 rows" in result.stderr
    assert archive().status == 0
    assert archive("verify", "--repair").status == 3
    assert len(archive.rows()) == 3


@pytest.mark.parametrize(
    "row",
    [("./a", None, OLD), ("./a", 1, OLD + 0.5), (None, 1, OLD), (b"./a", 1, OLD)],
    ids=["no size", "half a second", "no path", "a blob"],
)
def test_row_in_another_form_is_none(archive, store, row):
    earlier_database(archive, [row, ("./b", 1, OLD)])
    for key in "ab":
        store(key, b"x")
    result = archive("verify")
    assert result.status == 3, result.stderr
    assert counts(result) == {"agree": 1, "not recorded": 1, "no key": 1}


def test_row_of_an_earlier_script_has_the_key_that_it_used(archive, box, bucket):
    """Which escaped nothing: macOS's `Icon\r` was not found, and then forgotten."""
    fill(box.root, {"Icon\r": b"same"})
    earlier_database(archive, [("./Icon\r", 4, OLD)])
    bucket.client.put_object(Bucket=bucket.name, Key="Icon\r", Body=b"same")
    assert archive().counts == (0, 1, 0)
    result = archive("verify", "--repair")
    assert (result.status, counts(result)) == (0, {"agree": 1})
    assert len(archive.rows()) == 1
