"""`plan`: what `run` would do and what that would cost, told without doing any of it."""

import contextlib
import json
import os
import sqlite3
import time

import pytest
from conftest import MIB, OLD, earlier_database, fill, tree
from faults import SMALL, write
from faulty_sftp import PERMISSION_DENIED, FaultyBox, many_files, one_file, status

GB = 2**30
LIMIT = 5 * MIB
SMALL_PARTS = {"SMALL_FILE": LIMIT, "PART_SIZE": LIMIT}
LARGE = LIMIT + 1
DAY = 86_400

# The operations that the plan counts, by what it calls them.
OPERATIONS = {
    "put": "PutObject",
    "create": "CreateMultipartUpload",
    "part": "UploadPart",
    "complete": "CompleteMultipartUpload",
    "head": "HeadObject",
}


@pytest.fixture
def box(faulty_box):
    return faulty_box


@pytest.fixture
def s3(strict_s3):
    """As S3 answers: the answer to Complete has the checksum."""
    return strict_s3


@pytest.fixture
def archive(archive_of, box, s3):
    return archive_of(box, AWS_ENDPOINT_URL=s3.url)


def planned(archive, status=0, **settings):
    """The plan as JSON."""
    result = archive("plan", "--json", **settings)
    assert result.status == status, result.output
    return json.loads(result.stdout)


def sent(s3):
    """The requests about objects, by the plan's names for them."""
    return {name: s3.requests[operation] for name, operation in OPERATIONS.items()}


def files_and_bytes(*sizes):
    return {"files": len(sizes), "bytes": sum(sizes)}


# --- What is foretold ---


def test_plan_tells_what_is_new_changed_to_compare_and_unchanged(archive, box):
    fill(box.root, {"same": 100, "d/same": 20, "grown": b"12345", "touched": b"12", "gone": 9})
    assert archive().status == 0
    os.unlink(box.root / "gone")
    fill(box.root, {"grown": b"1234567", "new": 1_000, "d/new": 500})
    fill(box.root, {"touched": b"12"}, mtime=1_650_000_000)

    plan = planned(archive)

    assert plan["new"] == files_and_bytes(1_000, 500)
    assert plan["changed"] == files_and_bytes(7)
    assert plan["to_compare"] == files_and_bytes(2)
    assert plan["unchanged"] == files_and_bytes(100, 20)
    assert plan["unreadable"] == 0
    # Nothing is deleted from the bucket.
    assert plan["afterwards"] == files_and_bytes(100, 20, 7, 2, 1_000, 500, 9)


def test_plan_counts_what_a_run_would_leave_out(archive, box):
    fill(box.root, {"good": 10, ".hidden": 1, ".folder/f": 1, "a.tmp": 1, "cache/f": 1})
    (box.root / "link").symlink_to("good")
    os.mkfifo(box.root / "pipe")

    plan = planned(archive, EXCLUDE_PATHS="*.tmp,cache")

    assert plan["new"] == files_and_bytes(10)
    counted = {name: plan[name] for name in ("hidden", "excluded", "links", "special")}
    assert counted == {"hidden": 2, "excluded": 2, "links": 1, "special": 1}


def test_folder_that_cannot_be_listed_is_told_with_status_3(archive, box):
    fill(box.root, {"good": 10, "closed/f": 10})
    box.always("OPENDIR", b"closed", status(PERMISSION_DENIED))

    result = archive("plan", "--json")

    assert result.status == 3
    assert [failure.split(":")[0] for failure in result.failures] == ["./closed"]
    plan = json.loads(result.stdout)
    assert (plan["unreadable"], plan["new"]) == (1, files_and_bytes(10))


def test_requests_foretold_are_those_that_the_run_sends(archive, box, s3):
    """Small, large, changed and unchanged ones, one that was touched, and one that another
    program has stored."""
    write(box.root / "unchanged", SMALL)
    write(box.root / "changed", SMALL)
    write(box.root / "changed and large", LARGE)
    write(box.root / "touched", SMALL)
    write(box.root / "another program's", SMALL)
    assert archive(constants=SMALL_PARTS).status == 0
    write(box.root / "touched", SMALL, OLD)
    archive.execute("UPDATE files SET mtime = NULL WHERE path LIKE '%another%'")
    archive.execute("UPDATE objects SET crc32 = NULL WHERE path LIKE '%another%'")
    write(box.root / "changed", SMALL + 1)
    write(box.root / "changed and large", 2 * LARGE)
    write(box.root / "new", LIMIT - 1)
    write(box.root / "empty", 0)
    write(box.root / "at the limit", LIMIT)
    write(box.root / "two parts", 2 * LIMIT)
    s3.requests.clear()

    plan = planned(archive, constants=SMALL_PARTS)
    assert s3.requests.total() == 0
    run = archive(constants=SMALL_PARTS)

    assert run.status == 0
    # Of those from the limit on, one has three parts, one two, one a single one.
    assert plan["requests"] == {"put": 3, "create": 3, "part": 6, "complete": 3, "head": 1}
    assert sent(s3) == plan["requests"]
    assert plan["to_compare"] == files_and_bytes(SMALL, SMALL)
    assert run.compared == 2
    uploads = plan["new"]["files"] + plan["changed"]["files"]
    assert run.counts == (uploads, plan["unchanged"]["files"], 0)
    assert run.summary["Bytes uploaded"] == plan["new"]["bytes"] + plan["changed"]["bytes"]


def test_file_that_the_run_would_refuse_is_not_foretold(archive, box, s3):
    fill(box.root, {"/".join(["d" * 200] * 6): b"its key is too long"})

    plan = planned(archive, status=3)
    run = archive()

    assert run.status == 3
    assert plan["requests"] == sent(s3) == dict.fromkeys(OPERATIONS, 0)
    assert plan["unreadable"] == run.counts[2] == 1


def test_rows_of_an_earlier_script_are_foretold_as_the_run_takes_them(archive, box, s3):
    """One is right, one has no object, and one has no size."""
    fill(box.root, {"right": 10, "no object": 20, "no size": 30})
    archive.bucket.client.put_object(
        Bucket=archive.bucket.name, Key="right", Body=(box.root / "right").read_bytes()
    )
    rows = [("./right", 10, OLD), ("./no object", 20, OLD), ("./no size", None, OLD)]
    earlier_database(archive, rows)
    earlier = archive.state_db.read_bytes()

    plan = planned(archive)

    assert (plan["new"], plan["unchanged"]) == (files_and_bytes(20, 30), files_and_bytes(10))
    assert plan["afterwards"] == files_and_bytes(10, 20, 30)
    assert archive.state_db.read_bytes() == earlier
    assert archive().counts == (2, 1, 0)


# --- What is left alone ---


def test_plan_changes_neither_bucket_nor_box_nor_state(archive, box, s3):
    fill(box.root, {"same": 100, "changed": 20})
    archive()
    fill(box.root, {"changed": 30, "new": 1_000})
    state, on_box, objects = archive.state_db.read_bytes(), tree(box.root), archive.objects()
    others = {path.name for path in archive.folder.iterdir()}
    s3.requests.clear()
    box.requests.clear()

    assert archive("plan").status == 0

    assert archive.state_db.read_bytes() == state
    assert {path.name for path in archive.folder.iterdir()} == others
    assert tree(box.root) == on_box
    assert archive.objects() == objects
    assert s3.requests.total() == 0, "the state is here: S3 need not be asked"
    assert set(box.requests) <= {"INIT", "REALPATH", "OPENDIR", "READDIR", "LSTAT", "CLOSE"}


def test_plan_without_a_state_goes_by_the_listing_and_makes_no_state(archive, box, s3):
    fill(box.root, {"same": 100, "grown": 10})
    archive()
    fill(box.root, {"new": 20, "grown": 30})
    archive.state_db.unlink()
    before = {path.name for path in archive.folder.iterdir()}
    s3.requests.clear()

    result = archive("plan", "--json")

    plan = json.loads(result.stdout)
    assert (plan["new"], plan["changed"]) == (files_and_bytes(20), files_and_bytes(30))
    assert (plan["to_compare"], plan["unchanged"]) == (files_and_bytes(100), files_and_bytes())
    assert s3.requests == {"ListObjectsV2": 1}
    assert {path.name for path in archive.folder.iterdir()} == before
    assert str(archive.state_db) in result.stderr


def test_plan_of_a_first_run_makes_no_state(archive, box, s3):
    fill(box.root, {"new": 20})

    assert planned(archive)["new"] == files_and_bytes(20)

    assert not archive.state_db.exists()
    assert s3.requests == {"ListObjectsV2": 1}
    assert archive.bucket.list() == []


def test_plan_is_told_while_a_run_is_at_work(archive, box):
    fill(box.root, {"f": 20})
    archive()
    lock = f"{archive.state_db}.lock"

    with contextlib.closing(sqlite3.connect(lock, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        assert archive().status == 11
        assert planned(archive)["unchanged"] == files_and_bytes(20)


# --- What it costs ---


def test_costs_are_those_of_what_is_foretold(archive_of, s3):
    """3 files of 10 GB each, 640 parts in each of them."""
    with FaultyBox(many_files(3, 1, 10 * GB)) as box:
        plan = planned(archive_of(box, AWS_ENDPOINT_URL=s3.url))

    assert plan["requests"] == {"put": 0, "create": 3, "part": 1_920, "complete": 3, "head": 0}
    # 1,923 x 0.005 / 1,000 = 0.009615; 3 x 0.05 / 1,000 = 0.00015.
    assert plan["usd"]["upload"] == pytest.approx(0.009765, abs=1e-6)
    # 30 GB x 0.00099 = 0.0297; the objects add 3 x 0.0000002.
    assert plan["usd"]["storage_a_month"] == pytest.approx(0.0297006, abs=1e-6)
    # The copies for 7 days: 30 x 0.023 x 7 / 30 = 0.161. Bulk: 30 x 0.0025 = 0.075 and
    # 3 x 0.025 / 1,000 = 0.000075. Standard: 30 x 0.02 = 0.60 and 3 x 0.10 / 1,000.
    assert plan["usd"]["full_restore_bulk"] == pytest.approx(0.236075, abs=1e-6)
    assert plan["usd"]["full_restore_standard"] == pytest.approx(0.7613, abs=1e-6)
    # Below the free 100 GB: only the GETs, 3 x 0.0004 / 1,000.
    assert plan["usd"]["full_download"] == pytest.approx(0.0000012, abs=1e-6)
    assert plan["usd"]["overwritten_early"] == 0


def test_charge_for_objects_overwritten_early_goes_by_the_age_of_each(archive_of, s3):
    """Of three changed objects of 100 GB one is new, one 90 days old, one 200; a fourth
    is unchanged, and one has gone from the box: these two cost nothing."""
    ages = {"./d0/f0": 0, "./d1/f0": 90, "./d2/f0": 200, "./d3/f0": 0, "./gone": 0}
    with FaultyBox(many_files(4, 1, 5)) as box:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        archive()
        archive.execute("INSERT INTO objects (path, key) VALUES ('./gone', 'gone')")
        for path, days in ages.items():
            archive.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, 1600000000, ?)",
                *(path, 5 if path == "./d3/f0" else 100 * GB, int(time.time()) - days * DAY),
            )
        plan = planned(archive)

    assert (plan["changed"]["files"], plan["unchanged"]["files"]) == (3, 1)
    # 100 GB x 0.00099 = 0.099 a month: six months for the first, three for the second.
    assert plan["usd"]["overwritten_early"] == pytest.approx(9 * 0.099, abs=1e-4)


@pytest.mark.parametrize(("size", "told"), [(216, True), (220, False)])
def test_files_so_small_that_objects_outweigh_them_are_warned_of(archive_of, size, told):
    """An object adds 8 KB x 0.023 + 32 KB x 0.00099 = 0.21568; data costs as much at
    0.21568 / 0.00099 = 217.86 KB."""
    with FaultyBox(many_files(20, 100, size * 1024)) as box:
        result = archive_of(box)("plan")

    assert result.status == 0
    assert ("on average" in result.stderr) is told


def test_empty_box_costs_nothing_and_is_no_mistake(archive, box):
    assert archive("plan").status == 0

    plan = planned(archive)

    assert set(plan["usd"].values()) == {0}
    assert plan["afterwards"] == files_and_bytes()


def test_plan_says_that_it_is_an_estimate_of_which_date_and_region(archive, box):
    fill(box.root, {"f": 20})

    text, plan = archive("plan").stdout, planned(archive)

    for told in (text, plan["prices"]["note"]):
        assert "estimate" in told
        assert plan["prices"]["of"] in told
        assert "us-east-1" in told
    assert plan["prices"]["of"].split()[-1].isdecimal()
    elsewhere = archive("plan", AWS_REGION="sa-east-1").stdout
    for word in ("us-east-1", "sa-east-1", "PRICES"):
        assert word in elsewhere


def test_prices_that_are_set_are_those_of_the_plan(archive_of, s3):
    with FaultyBox(one_file(b"big", 10 * GB)) as box:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        plan = planned(archive, PRICES="DEEP_ARCHIVE.month=2, STANDARD.month = 0")

    # 10 GB x 2, and 32 KB x 2 / 2**20.
    assert plan["usd"]["storage_a_month"] == pytest.approx(20.000061, abs=1e-5)
    assert "PRICES" in plan["prices"]["note"]


@pytest.mark.parametrize("prices", ["DEEP_ARCHIVE.month", "DEEP_ARCHIVE.month=-1", "no=1"])
def test_prices_that_are_none_are_a_fault_of_the_settings(archive, prices):
    result = archive("plan", PRICES=prices)

    assert result.status == 2
    assert "PRICES" in result.stderr


def test_class_without_prices_is_told_as_unknown(archive, box):
    fill(box.root, {"f": 20})

    plan = planned(archive, STORAGE_CLASS="ONEZONE_IA")

    assert plan["usd"]["storage_a_month"] is None
    assert plan["usd"]["upload"] is None
    assert "unknown" in archive("plan", STORAGE_CLASS="ONEZONE_IA").stdout
