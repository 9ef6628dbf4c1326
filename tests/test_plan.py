"""`plan`: what `run` would do and what that would cost, told without doing any of it."""

import contextlib
import json
import os
import re
import sqlite3
import stat
import time
from dataclasses import replace

import pytest
from conftest import MIB, OLD, earlier_database, fill, tree
from faults import SMALL, strict_fixtures, write
from faulty_sftp import (
    A_FOLDER,
    EOF,
    PERMISSION_DENIED,
    Attributes,
    FaultyBox,
    Generated,
    a_file,
    many_files,
    names,
    one_file,
    status,
)
from scripted_s3 import error

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


box, s3, archive = strict_fixtures()


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

    assert plan["new_files"] == files_and_bytes(1_000, 500)
    assert plan["changed_files"] == files_and_bytes(7)
    assert plan["to_compare"] == files_and_bytes(2)
    assert plan["to_upload"] == files_and_bytes(1_000, 500, 7)
    assert plan["unchanged_files"] == files_and_bytes(100, 20)
    assert plan["unreadable"] == 0
    # Nothing is deleted from the bucket.
    assert plan["archive_afterwards"] == files_and_bytes(100, 20, 7, 2, 1_000, 500, 9)


def test_plan_counts_what_a_run_would_leave_out(archive, box):
    fill(box.root, {"good": 10, ".hidden": 1, ".folder/f": 1, "a.tmp": 1, "cache/f": 1})
    (box.root / "link").symlink_to("good")
    os.mkfifo(box.root / "pipe")

    plan = planned(archive, EXCLUDE_PATHS="*.tmp,cache")

    assert plan["new_files"] == files_and_bytes(10)
    counted = [plan[name] for name in ("hidden_entries", "excluded", "links", "special_files")]
    assert counted == [2, 2, 1, 1]


def test_folder_that_cannot_be_listed_is_told_with_status_3(archive, box):
    fill(box.root, {"good": 10, "closed/f": 10})
    box.always("OPENDIR", b"closed", status(PERMISSION_DENIED))

    result = archive("plan", "--json")

    assert result.status == 3
    assert [failure.split(":")[0] for failure in result.failures] == ["./closed"]
    plan = json.loads(result.stdout)
    assert (plan["unreadable"], plan["new_files"]) == (1, files_and_bytes(10))


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

    plan = planned(archive, constants=SMALL_PARTS, PRICES="get=100")
    assert s3.requests.total() == 0
    run = archive(constants=SMALL_PARTS)

    assert run.status == 0
    # Of those from the limit on, one has three parts, one two, one a single one.
    assert plan["requests"] == {"put": 3, "create": 3, "part": 6, "complete": 3, "head": 1}
    assert sent(s3) == plan["requests"]
    # 3 PUTs and 3 Completes 6 x 0.00005, 3 Creates and 6 parts 9 x 0.000005, the HEAD 0.1.
    assert plan["upload"] == pytest.approx(0.100345, abs=1e-6)
    assert plan["to_compare"] == files_and_bytes(SMALL, SMALL)
    assert run.compared == 2
    uploads = plan["new_files"]["files"] + plan["changed_files"]["files"]
    assert run.counts == (uploads, plan["unchanged_files"]["files"], 0)
    assert (
        run.summary["Bytes uploaded"]
        == plan["new_files"]["bytes"] + plan["changed_files"]["bytes"]
    )


def test_upload_that_cannot_be_continued_costs_no_look_up(archive, box, s3):
    """Its id is known, so it is aborted, which costs nothing; then another file is uploaded."""
    write(box.root / "large", 3 * LIMIT)
    s3.always("UploadPart", error(503, "SlowDown"))
    assert archive(constants={**SMALL_PARTS, "S3_ATTEMPTS": 1}).status == 3
    s3.rules.clear()
    write(box.root / "large", 2 * LIMIT)
    s3.requests.clear()
    plan = planned(archive, constants=SMALL_PARTS)
    assert archive(constants=SMALL_PARTS).status == 0
    expected = {"put": 0, "create": 1, "part": 2, "complete": 1, "head": 0}
    assert plan["requests"] == expected == sent(s3)
    assert s3.requests["AbortMultipartUpload"] == 1


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

    assert (plan["new_files"], plan["unchanged_files"]) == (
        files_and_bytes(20, 30),
        files_and_bytes(10),
    )
    assert plan["archive_afterwards"] == files_and_bytes(10, 20, 30)
    assert archive.state_db.read_bytes() == earlier
    assert archive().counts == (2, 1, 0)


# --- Each file ---


def listed(result):
    """The lines before the table."""
    lines, table, _ = result.stdout.partition("==== PLAN ====\n")
    assert table, "the table comes after them"
    return sorted(lines.splitlines())


LIST = [("plan", "--list"), ("run", "--dry-run"), ("run", "-n")]


@pytest.mark.parametrize("arguments", LIST, ids=" ".join)
def test_list_has_a_line_for_each_file_that_is_not_as_it_was_archived(
    archive, box, s3, arguments
):
    long = "/".join(["d" * 200] * 6)
    files = {"same": 100, "d/same": 1, "grown": b"12345", "touched": b"12", "gone": 9}
    fill(box.root, {**files, "closed/f": 1})
    assert archive().status == 0
    os.unlink(box.root / "gone")
    fill(box.root, {"grown": b"1234567", "new": 1_000, "d/new": 500, long: 1})
    fill(box.root, {"touched": b"12"}, mtime=1_650_000_000)
    box.always("OPENDIR", b"closed", status(PERMISSION_DENIED))
    state, objects = archive.state_db.read_bytes(), archive.objects()
    others = {path.name for path in archive.folder.iterdir()}
    s3.requests.clear()
    box.requests.clear()

    result = archive(*arguments)

    assert result.status == 3, "of the two that fail"
    assert listed(result) == sorted([
        *("+ ./new", "+ ./d/new", "* ./grown", "? ./touched", "- ./gone"),
        *(f"! ./{long}", "! ./closed"),
    ])  # fmt: skip
    failures = sorted(failure.split(": ")[0] for failure in result.failures)
    assert failures == ["./closed", f"./{long}"]
    assert re.search(r"^New files *: 2 \(1.5 KiB\)$", result.stdout, re.MULTILINE)
    assert re.search(r"^Gone from the box *: 1 \(9 bytes\)$", result.stdout, re.MULTILINE)
    # As `plan` leaves everything alone.
    assert archive.state_db.read_bytes() == state
    assert {path.name for path in archive.folder.iterdir()} == others
    assert archive.objects() == objects
    assert s3.requests.total() == 0
    assert set(box.requests) <= {"INIT", "REALPATH", "OPENDIR", "READDIR", "LSTAT", "CLOSE"}


@pytest.mark.parametrize("arguments", LIST, ids=" ".join)
def test_list_of_a_first_run_makes_no_state(archive, box, s3, arguments):
    fill(box.root, {"new": 20})

    result = archive(*arguments)

    assert (result.status, listed(result)) == (0, ["+ ./new"])
    assert not archive.state_db.exists()
    assert s3.requests == {"ListObjectsV2": 1}


@pytest.mark.parametrize("arguments", [("plan", "--list", "--json"), ("plan", "--dry-run")])
def test_list_and_json_exclude_each_other(archive, box, s3, arguments):
    result = archive(*arguments)

    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert s3.requests.total() == box.connections == 0


def test_dry_run_as_json_is_the_plan_as_json(archive, box):
    fill(box.root, {"new": 20})

    result = archive("run", "--dry-run", "--json")

    assert json.loads(result.stdout) == planned(archive)
    assert listed(archive("plan")) == []


@pytest.mark.parametrize("root", [".", "sub", "sub/"])
def test_what_the_walk_does_not_reach_is_not_gone(archive, box, root):
    """Excluded or hidden now, or below a folder that cannot be listed."""
    places = ("cache/f", "cache/d/f", "a.tmp", "d/a.tmp", ".hidden", ".d/f", "d/.d/f")
    places += ("closed/f", "closed/d/f", "gone", "d/gone")
    fill(box.root / root, dict.fromkeys((*places, "d/same"), 1))
    archive.settings["REMOTE_PATH"] = root
    assert archive(INCLUDE_HIDDEN="true").counts == (len(places) + 1, 0, 0)
    for name in places:
        if "closed" not in name:
            os.unlink(box.root / root / name)
    box.always("OPENDIR", os.path.normpath(f"{root}/closed").encode(), status(3))

    result = archive("plan", "--list", EXCLUDE_PATHS="cache,*.tmp,/")

    path = root.rstrip("/")
    assert listed(result) == sorted([f"- {path}/gone", f"- {path}/d/gone", f"! {path}/closed"])
    assert planned(archive, 3, EXCLUDE_PATHS="cache,*.tmp")[
        "gone_from_the_box"
    ] == files_and_bytes(1, 1)


def test_file_whose_attributes_the_box_does_not_tell_is_failing_and_not_gone(archive, box):
    fill(box.root, {"f": 1, "d/f": 1, "same": 1})
    archive()
    unknown = Attributes(mode=None, size=None, mtime=None)
    same = Attributes(mode=stat.S_IFREG | 0o644, size=1, mtime=OLD)
    no_size, no_time = replace(same, size=None), replace(same, mtime=None)
    told = {b"f": unknown, b"d": unknown, b"same": same, b"x": no_size, b"y": no_time}
    box.on("READDIR", b"", names(*told.items()))
    box.always("READDIR", b"", status(EOF))

    result = archive("plan", "--list")

    assert (result.status, listed(result)) == (3, ["! ./d", "! ./f", "! ./x", "! ./y"])


def test_file_whose_folder_is_gone_or_that_is_a_link_now_is_gone(archive, box):
    fill(box.root, {"d/f": 1, "f": 1, "same": 1})
    archive()
    os.unlink(box.root / "d" / "f")
    os.rmdir(box.root / "d")
    os.unlink(box.root / "f")
    (box.root / "f").symlink_to("same")

    assert listed(archive("plan", "--list")) == ["- ./d/f", "- ./f"]


def test_hostile_name_is_one_safe_line(archive, box):
    shown = {
        b"two\nlines": "./two\\nlines",
        b"\x1b[2J": "./\\x1b[2J",
        b"not \xff utf-8": "./not \\xff utf-8",
        b"back\\slash": "./back\\\\slash",
        "right \u202e left".encode(): "./right \\u202e left",
        b"- .": "./- .",
    }
    fill(box.root, dict.fromkeys(shown, 1))

    assert listed(archive("plan", "--list")) == sorted(f"+ {name}" for name in shown.values())

    archive()
    for name in shown:
        os.unlink(os.path.join(os.fsencode(box.root), name))
    fill(box.root, {"f": 1})
    gone = [f"- {name}" for name in shown.values()]
    assert listed(archive("plan", "--list")) == sorted([*gone, "+ ./f"])


def test_what_is_gone_is_told_with_what_it_costs_a_month(archive, box):
    fill(box.root, {"cold": 1, "warm": 1, "there": 1, "cache/f": 1})
    archive()
    archive.settings["EXCLUDE_PATHS"] = "cache"
    archive.execute("UPDATE files SET size = ?", 100 * GB)
    warm = "path IN ('./warm', './there')"
    archive.execute(f"UPDATE objects SET storage_class = 'STANDARD' WHERE {warm}")
    os.unlink(box.root / "cold")
    os.unlink(box.root / "warm")

    plan = planned(archive)

    assert plan["gone_from_the_box"] == files_and_bytes(100 * GB, 100 * GB)
    # 100 x 0.00099 and the index 0.0000002; 100 x 0.023.
    assert plan["gone_a_month"] == pytest.approx(2.3990002, abs=1e-6)
    # With another 0.099 for what is excluded; what is there is overwritten in STANDARD.
    assert plan["storage_a_month"] == pytest.approx(2.4980006, abs=1e-6)
    # Of 300 GB 100 are free: 200 x 0.09, and a few GETs.
    assert plan["download_of_all"] == pytest.approx(18, abs=1e-5)
    text = archive("plan").stdout
    told = r"^Gone from the box *: 2 \(200.0 GiB\)\nGone, a month *: \$2.40$"
    assert re.search(told, text, re.MULTILINE)


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
    assert (plan["new_files"], plan["changed_files"]) == (
        files_and_bytes(20),
        files_and_bytes(30),
    )
    assert (plan["to_compare"], plan["unchanged_files"]) == (
        files_and_bytes(100),
        files_and_bytes(),
    )
    assert s3.requests == {"ListObjectsV2": 1}
    assert {path.name for path in archive.folder.iterdir()} == before
    assert str(archive.state_db) in result.stderr


def test_plan_of_a_first_run_makes_no_state(archive, box, s3):
    fill(box.root, {"new": 20})

    assert planned(archive)["new_files"] == files_and_bytes(20)

    assert not archive.state_db.exists()
    assert s3.requests == {"ListObjectsV2": 1}
    assert archive.bucket.list() == []


def test_plan_is_told_while_a_run_is_at_work(archive, box):
    fill(box.root, {"f": 20})
    archive()
    lock = f"{archive.state_db}.lock"

    with contextlib.closing(sqlite3.connect(lock, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        assert archive().status == 11
        assert planned(archive)["unchanged_files"] == files_and_bytes(20)


# --- What it costs ---


def test_costs_are_those_of_what_is_foretold(archive_of, s3):
    """3 files of 10 GB each, 640 parts in each of them."""
    with FaultyBox(many_files(3, 1, 10 * GB)) as box:
        plan = planned(archive_of(box, AWS_ENDPOINT_URL=s3.url))

    assert plan["requests"] == {"put": 0, "create": 3, "part": 1_920, "complete": 3, "head": 0}
    # 1,923 x 0.005 / 1,000 = 0.009615; 3 x 0.05 / 1,000 = 0.00015.
    assert plan["upload"] == pytest.approx(0.009765, abs=1e-6)
    # 30 GB x 0.00099 = 0.0297; the objects add 3 x 0.0000002.
    assert plan["storage_a_month"] == pytest.approx(0.0297006, abs=1e-6)
    # The copies for 7 days: 30 x 0.023 x 7 / 30 = 0.161. Bulk: 30 x 0.0025 = 0.075 and
    # 3 x 0.025 / 1,000 = 0.000075. Standard: 30 x 0.02 = 0.60 and 3 x 0.10 / 1,000.
    assert plan["restore_bulk_48_hours"] == pytest.approx(0.236075, abs=1e-6)
    assert plan["restore_standard_12_hours"] == pytest.approx(0.7613, abs=1e-6)
    # Below the free 100 GB: only the GETs, 3 x 0.0004 / 1,000.
    assert plan["download_of_all"] == pytest.approx(0.0000012, abs=1e-6)
    assert plan["overwritten_early"] == 0


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

    assert (plan["changed_files"]["files"], plan["unchanged_files"]["files"]) == (3, 1)
    # 100 GB x 0.00099 = 0.099 a month: six months for the first, three for the second.
    assert plan["overwritten_early"] == pytest.approx(9 * 0.099, abs=1e-4)


def beside_10_gb(tiny, size=0):
    """One file of 10 GB and `tiny` ones."""
    files = {b"large": 10 * GB, **{b"t%d" % number: size for number in range(tiny)}}
    entries = [(name, a_file(size)) for name, size in files.items()]
    return Generated(lambda _: entries, lambda path: dict(entries).get(path, A_FOLDER))


@pytest.mark.parametrize(
    ("tree", "saved"),
    [
        # 10 GB are 640 parts, Create and Complete: 641 x 0.000005 + 0.00005 = 0.003255. Each
        # tiny file would save 0.00005 - 0.000005: nine of them 0.000405, and a tenth of
        # 0.003255 + 9 x 0.00005 is 0.0003705; eight 0.00036 of 0.0003655.
        (beside_10_gb(9), "under $0.01"),
        (beside_10_gb(8), None),
        # None of them is tiny: 8 KiB are not below 8 KiB.
        (beside_10_gb(1_000, 8 * 1024), None),
        (beside_10_gb(2_000, 8 * 1024 - 1), "$0.09"),
    ],
)
def test_tiny_files_that_would_save_a_tenth_in_another_class_are_warned_of(
    archive_of, tree, saved
):
    with FaultyBox(tree) as box:
        archive = archive_of(box)
        result = archive("plan")
        settings = {"SMALL_FILES_BELOW": "8K", "SMALL_FILES_CLASS": "STANDARD"}
        assert "SMALL_FILES" not in archive("plan", **settings).stderr, "they are there already"

    assert result.status == 0
    warned = [line for line in result.stderr.splitlines() if "SMALL_FILES" in line]
    assert len(warned) == (saved is not None)
    if saved:
        settings = "SMALL_FILES_BELOW=8K and SMALL_FILES_CLASS=STANDARD"
        assert f"{settings} would save {saved} of the upload" in warned[0]


def test_empty_box_costs_nothing_and_is_no_mistake(archive, box):
    assert archive("plan").status == 0

    plan = planned(archive)

    usd = ("upload", "overwritten_early", "storage_a_month", "gone_a_month", "download_of_all")
    assert [plan[name] for name in (*usd, "restore_bulk_48_hours")] == [0] * 6
    assert plan["archive_afterwards"] == files_and_bytes()


def test_plan_says_that_it_is_an_estimate_of_which_date_and_region(archive, box):
    fill(box.root, {"f": 20})

    text, plan = archive("plan").stdout, planned(archive)

    for told in (text, plan["prices"]):
        assert re.search(r"estimates, prices of \w+ \d{4} for us-east-1$", told, re.MULTILINE)
    elsewhere = archive("plan", AWS_REGION="sa-east-1").stdout
    for word in ("us-east-1", "sa-east-1", "PRICES"):
        assert word in elsewhere


@pytest.mark.parametrize(
    ("region", "whose", "other"),
    [
        ("eu-north-1", "eu-north-1", False),
        ("us-east-2", "us-east-2", False),
        ("eu-central-1", "eu-central-1", False),
        ("ap-south-1", "us-east-1", True),
    ],
)
def test_plan_and_status_say_whose_prices_they_show(archive, region, whose, other):
    for command in ("plan", "status"):
        result = archive(command, AWS_REGION=region)
        [note] = re.findall(r"^Prices +: (.*prices of.*)$", result.stdout, re.MULTILINE)
        assert f"for {whose}" in note
        assert ("PRICES" in note) == other, "that is the remedy"
        assert (f"those of {region} may differ" in note) == other
        told = json.loads(archive(command, "--json", AWS_REGION=region).stdout)
        assert told["prices"] == note
        already = archive(command, AWS_REGION=region, PRICES="egress=1").stdout
        assert f"for {whose} with PRICES\n" in already


def test_prices_that_are_set_are_those_of_the_plan(archive_of, s3):
    with FaultyBox(one_file(b"big", 10 * GB)) as box:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        plan = planned(archive, PRICES="DEEP_ARCHIVE.month=2, STANDARD.month = 0")

    # 10 GB x 2, and 32 KB x 2 / 2**20.
    assert plan["storage_a_month"] == pytest.approx(20.000061, abs=1e-5)
    assert "PRICES" in plan["prices"]


@pytest.mark.parametrize("prices", ["DEEP_ARCHIVE.month", "DEEP_ARCHIVE.month=-1", "no=1"])
def test_prices_that_are_none_are_a_fault_of_the_settings(archive, prices):
    result = archive("plan", PRICES=prices)

    assert result.status == 2
    assert "PRICES" in result.stderr


def test_class_without_prices_is_told_as_unknown(archive, box):
    fill(box.root, {"f": 20})

    plan = planned(archive, STORAGE_CLASS="ONEZONE_IA")

    assert plan["storage_a_month"] is None
    assert plan["upload"] is None
    assert "unknown" in archive("plan", STORAGE_CLASS="ONEZONE_IA").stdout
