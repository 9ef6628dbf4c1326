"""Guards on what a run may spend and change, and what it says that it has spent.

USD of us-east-1 for a request: PUT and Complete into Deep Archive 0.00005, Create and
UploadPart 0.000005, HEAD 0.0000004, listing 0.000005. The first run lists the bucket.
"""

import json
import os
import re
import time

import pytest
from conftest import MIB, OLD, fill
from faults import SMALL, strict_fixtures, write
from faulty_sftp import PERMISSION_DENIED, FaultyBox, many_files, status
from scripted_s3 import error, first

GB = 2**30
DAY = 86_400
LIMIT = 5 * MIB
SMALL_PARTS = {"SMALL_FILE": LIMIT, "PART_SIZE": LIMIT}
LARGE = LIMIT + 1  # two parts
TEN = {f"f{number}": 10 for number in range(10)}


box, s3, archive = strict_fixtures()


def spent(archive):
    """USD of the latest run, by the state."""
    return archive.query("SELECT spent FROM runs ORDER BY rowid DESC")[0][0]


def near(usd):
    return pytest.approx(usd, rel=1e-6)


def next_second(archive):
    """Runs are told apart by the second in which they began."""
    archive.execute("UPDATE runs SET started_at = started_at - 10")


def age(archive, days, size=100 * GB):
    """Let all objects be so old, and so large, by the state."""
    uploaded_at = int(time.time()) - days * DAY
    archive.execute("UPDATE files SET size = ?, uploaded_at = ?", size, uploaded_at)


def assert_ended_early(result, uploaded):
    assert result.status == 3, result.output
    assert result.counts[0] == uploaded
    assert re.search("^Ended early *: MAX_COST", result.stdout, re.MULTILINE)
    assert "Failed files   : 0" in result.stdout


def assert_one_fault(result, *words):
    """One line, status 2, and nothing was begun."""
    assert result.status == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert [word for word in words if word not in result.stderr] == []


# --- MAX_COST ---


def test_run_ends_before_it_costs_more_than_max_cost_and_the_next_goes_on(archive, box, s3):
    fill(box.root, {f"f{number}": 10 for number in range(5)})

    # The listing 0.000005 and three PUTs 0.00015 are 0.000155; with a fourth 0.000205.
    first = archive(MAX_COST="0.0002")

    assert_ended_early(first, 3)
    assert s3.requests["PutObject"] == len(archive.rows()) == len(archive.objects()) == 3
    assert spent(archive) == near(0.000155)
    archive.assert_invariant()

    next_second(archive)
    second = archive(MAX_COST=".0001")  # two PUTs, and no listing
    assert (second.status, second.counts) == (0, (2, 3, 0))
    assert "Ended early" not in second.stdout
    assert s3.requests["PutObject"] == 5
    assert spent(archive) == near(0.0001)


@pytest.mark.parametrize(("limit", "sent"), [("0.000064", 0), ("0.000066", 1)])
def test_large_file_is_begun_only_if_all_its_parts_are_within_max_cost(
    archive, box, s3, limit, sent
):
    """Create and two parts 0.000015, Complete 0.00005: 0.000065."""
    archive()
    write(box.root / "large", LARGE)

    result = archive(constants=SMALL_PARTS, MAX_COST=limit)

    assert (result.status, result.counts[0]) == (0 if sent else 3, sent)
    assert s3.requests["CreateMultipartUpload"] == sent
    assert s3.requests["UploadPart"] == 2 * sent
    assert archive.bucket.uploads() == []


@pytest.mark.parametrize(("limit", "sent"), [("0.000069", 0), ("0.000071", 1)])
def test_going_on_with_an_upload_costs_a_listing_of_its_parts_more(
    archive, box, s3, limit, sent
):
    """0.000065 as above, and 0.000005."""
    write(box.root / "large", LARGE)
    s3.on("UploadPart", error(503, "SlowDown"))
    once = {"PARTS_AT_ONCE": 1, "S3_ATTEMPTS": 1}
    assert archive(constants={**SMALL_PARTS, **once}).status == 3
    s3.requests.clear()

    result = archive(constants=SMALL_PARTS, MAX_COST=limit)

    assert (result.status, result.counts[0]) == (0 if sent else 3, sent)
    assert s3.requests["CompleteMultipartUpload"] == sent
    assert s3.requests["ListParts"] == sent
    assert s3.requests["ListMultipartUploads"] == 0
    assert spent(archive) == (near(0.000065) if sent else 0)  # it is not begun once more
    archive.assert_invariant()


def test_max_cost_of_nothing_sends_nothing(archive, box, s3):
    fill(box.root, {"f": 10})

    assert_ended_early(archive(MAX_COST="0"), 0)

    assert s3.requests == {"ListObjectsV2": 1}


def test_touched_tree_is_compared_whole_under_a_max_cost_that_could_not_send_it(
    archive, box, s3
):
    """40 PUTs would be 0.002. Two transfers are three files at once, and one that waits: 4 x
    0.00005 = 0.0002; the HEADs are 40 x 0.0000004 = 0.000016."""
    files = {f"f{number}": 10 for number in range(40)}
    fill(box.root, files)
    archive()
    fill(box.root, files, mtime=OLD + 5)
    archive.execute("UPDATE objects SET crc32 = NULL")
    next_second(archive)
    s3.requests.clear()

    result = archive(MAX_COST="0.0003", TRANSFERS=2)

    assert (result.status, result.compared) == (0, 40), result.output
    assert s3.requests == {"HeadObject": 40}
    assert spent(archive) == near(0.000016)


def test_requests_to_compare_count_against_max_cost(archive, box, s3):
    """One transfer is one file at once and one that waits. The eleventh would bring it to two
    PUTs, 0.0001, and 11 HEADs, 0.0000044."""
    files = {f"f{number}": 10 for number in range(40)}
    fill(box.root, files)
    archive()
    age(archive, days=200, size=10)
    fill(box.root, files, mtime=OLD + 5)
    archive.execute("UPDATE objects SET crc32 = NULL")
    next_second(archive)
    s3.requests.clear()

    result = archive(MAX_COST="0.0001042", TRANSFERS=1)

    assert_ended_early(result, 0)
    assert result.compared == 10
    assert s3.requests == {"HeadObject": 10}
    assert spent(archive) == near(0.000004)


def test_file_that_costs_more_than_max_cost_does_not_keep_back_the_others(archive, box):
    """Six months of 100 GB would be paid for."""
    fill(box.root, {"a": 10, "m": 10})
    archive()
    archive.execute("UPDATE files SET size = ? WHERE path = './m'", 100 * GB)
    fill(box.root, {"m": 11, "z": 10})
    for _ in range(2):
        next_second(archive)
        result = archive(MAX_COST="0.5")
        assert result.status == 3
        assert re.search("^Ended early *: MAX_COST", result.stdout, re.MULTILINE)
        assert "./m may cost $0.59" in result.stderr
    assert set(archive.objects()) == {"a", "m", "z"}
    assert archive.objects()["m"][0] == 10
    # It is not noted as one that has to be compared: MAX_CHANGED still sees its change.
    assert archive.query("SELECT mtime FROM files WHERE path = './m'") != [(None,)]


def test_upload_of_a_file_that_is_gone_is_aborted_though_another_costs_too_much(
    archive, box, s3
):
    write(box.root / "dear", SMALL)
    assert archive(constants=SMALL_PARTS).status == 0
    age(archive, 1)
    write(box.root / "dear", SMALL + 1)
    write(box.root / "gone", 2 * LIMIT)
    s3.on("UploadPart", first(archive.kill), nth=2)
    assert archive(constants=SMALL_PARTS, MAX_COST="0.5").status == -9
    assert len(archive.bucket.uploads()) == 1
    (box.root / "gone").unlink()
    next_second(archive)
    assert_ended_early(archive(constants=SMALL_PARTS, MAX_COST="0.5"), 0)
    assert archive.bucket.uploads() == []


def test_limit_is_reached_to_the_cent(archive, box):
    fill(box.root, {"a": 10, "b": 10, "c": 10})
    archive(EXCLUDE_PATHS="a,b,c")
    next_second(archive)
    assert archive(MAX_COST="0.00015").counts == (3, 0, 0)


def test_young_objects_that_would_be_overwritten_count_against_max_cost(archive, box, s3):
    """Of 100 GB each, and new: 6 x 0.0990002056884765625 = 0.594001234, and a PUT."""
    fill(box.root, {"a": 10, "b": 10, "c": 10})
    archive()
    fill(box.root, {"a": 11, "b": 11, "c": 11})
    age(archive, days=0)
    next_second(archive)

    result = archive(MAX_COST="0.6")

    assert_ended_early(result, 1)
    assert spent(archive) == near(0.594051234)
    assert re.search(r"^Spent *: \$0\.59$", result.stdout, re.MULTILINE)
    warning = r"warning: MAX_COST is \$0\.60, and \./[abc] may cost \$0\.59"
    assert len(re.findall(warning, result.stderr)) == 1


def test_old_objects_that_would_be_overwritten_cost_no_more_than_the_requests(archive, box):
    """Nor do young ones of a class that they may leave at any time."""
    fill(box.root, {"a": 10, "b": 10})
    archive()
    fill(box.root, {"a": 11, "b": 11})
    age(archive, days=200)
    archive.execute("UPDATE files SET uploaded_at = ? WHERE path = './b'", int(time.time()))
    archive.execute("UPDATE objects SET storage_class = 'STANDARD' WHERE path = './b'")

    assert archive(MAX_COST="0.0001").counts == (2, 0, 0)


@pytest.mark.parametrize(
    "value", ["5 USD", "$5", "-1", "1e3", "nan", "inf", "1,5", "0x1", "10000000", "."]
)
def test_max_cost_that_is_no_amount_is_a_fault_of_the_settings(archive, box, value):
    assert_one_fault(archive(MAX_COST=value), "MAX_COST", "USD")

    assert box.connections == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"STORAGE_CLASS": "GLACIER_IR"},
        {"SMALL_FILES_BELOW": "1M", "SMALL_FILES_CLASS": "GLACIER_IR"},
    ],
    ids=["all files", "small files"],
)
def test_file_whose_cost_is_not_known_is_not_sent_with_max_cost(archive, box, s3, settings):
    fill(box.root, {"f": 10})
    prices = ["GLACIER_IR.put=0.02", "GLACIER_IR.month=0.004"]

    for known in ([], prices[1:]):
        result = archive(MAX_COST=5, PRICES=",".join(known), **settings)
        assert_ended_early(result, 0)
        assert re.search("MAX_COST is .* ./f may cost unknown.* in PRICES", result.stderr)
    assert s3.requests["PutObject"] == 0

    # A PUT 0.02 / 1,000, and the listing of the first run.
    result = archive(MAX_COST=5, PRICES=prices[0], **settings)
    assert result.counts == (1, 0, 0), result.output
    assert spent(archive) == near(0.00002)

    fill(box.root, {"f": 11})
    assert_ended_early(archive(MAX_COST=5, PRICES=prices[0], **settings), 0)
    assert archive(MAX_COST=5, PRICES=",".join(prices), **settings).counts == (1, 0, 0)


# --- MAX_CHANGED ---


def change(box, names):
    fill(box.root, dict.fromkeys(names, 11))


def touch(box, names):
    for name in names:
        os.utime(box.root / name, (OLD + 5, OLD + 5))


def remove(box, names):
    for name in names:
        os.unlink(box.root / name)


def rename(box, names):
    for name in names:
        os.rename(box.root / name, box.root / f"{name}.locked")


@pytest.fixture
def ten(archive, box, s3):
    """An archive of ten files, of which three are f0 to f2."""
    fill(box.root, TEN)
    assert archive(MAX_CHANGED=0).status == 0, "a first run is not stopped"
    next_second(archive)
    s3.requests.clear()
    return archive


THREE = ["f0", "f1", "f2"]
CHANGES = [(change, 3, 0), (touch, 3, 0), (remove, 0, 3), (rename, 0, 3)]


@pytest.mark.parametrize(("act", "changed", "gone"), CHANGES)
def test_more_changes_than_max_changed_end_the_run_before_anything_is_sent(
    ten, box, s3, act, changed, gone
):
    act(box, THREE)
    fill(box.root, {"new": 10})
    rows = ten.rows()

    result = ten(MAX_CHANGED=29)

    assert result.status == 1
    [error] = re.findall("^error: (.*)", result.stderr, re.MULTILINE)
    assert "MAX_CHANGED is 29 %" in error
    assert f"of 10 archived files {changed} have changed and {gone} are gone" in error
    assert s3.requests.total() == 0
    assert ten.rows() == rows
    assert ten.query("SELECT status, uploaded FROM runs ORDER BY 1 DESC") == [(1, 0), (0, 10)]


@pytest.mark.parametrize("act", [act for act, _, _ in CHANGES])
def test_as_many_changes_as_max_changed_are_archived_as_usual(ten, box, act):
    act(box, THREE)
    fill(box.root, {"new": 10})

    result = ten(MAX_CHANGED=30)

    uploaded = {change: 4, touch: 1, remove: 1, rename: 4}[act]
    assert (result.status, result.counts) == (0, (uploaded, 7, 0)), result.output
    assert result.compared == (3 if act is touch else 0)


def test_changed_and_vanished_files_count_together(ten, box):
    change(box, ["f0", "f1"])
    remove(box, ["f2", "f3"])

    assert ten(MAX_CHANGED=39).status == 1
    assert ten(MAX_CHANGED=40).counts == (2, 6, 0)


@pytest.mark.parametrize("act", [act for act, _, _ in CHANGES])
def test_max_changed_of_0_stops_at_the_first_change(ten, box, s3, act):
    act(box, ["f5"])

    assert ten(MAX_CHANGED=0).status == 1

    assert s3.requests.total() == 0


def test_max_changed_of_0_lets_new_files_come(ten, box):
    fill(box.root, {"new": 10, "d/new": 10})

    assert ten(MAX_CHANGED=0).counts == (2, 10, 0)


def test_changes_that_were_once_accepted_do_not_stop_the_next_run(ten, box):
    """A file that is gone stays in the archive; it was looked at. On another source it was
    not."""
    rename(box, THREE)
    for _ in range(2):
        assert ten(MAX_CHANGED=0).status == 1, "a run that was stopped has accepted nothing"
    assert ten(MAX_CHANGED=30).counts == (3, 7, 0)

    assert ten(MAX_CHANGED=0).counts == (0, 10, 0)
    remove(box, ["f3"])
    error = ten(MAX_CHANGED=0).stderr
    assert "of 13 archived files 0 have changed and 1 are gone" in error
    box.user = "another"
    error = ten("run", "--new-source", MAX_CHANGED=0, HETZNER_USER=box.user).stderr
    assert "of 13 archived files 0 have changed and 4 are gone" in error


def test_file_that_is_gone_again_counts_again(ten, box):
    remove(box, ["f0"])
    assert ten(MAX_CHANGED=10).status == 0
    fill(box.root, {"f0": 10})
    assert ten(MAX_CHANGED=0).counts == (0, 10, 0)
    remove(box, ["f0"])

    assert ten(MAX_CHANGED=0).status == 1


def test_what_the_walk_does_not_reach_does_not_count_as_gone(archive, box):
    fill(box.root, {"cache/f": 1, ".hidden": 1, "closed/f": 1, "f": 1})
    archive(INCLUDE_HIDDEN="true")
    box.always("OPENDIR", b"closed", status(PERMISSION_DENIED))

    result = archive(MAX_CHANGED=0, EXCLUDE_PATHS="cache")

    assert (result.status, result.counts) == (3, (0, 1, 1)), result.output
    assert len(result.failures) == 1, "the folder is told once"


def test_state_that_was_made_from_the_bucket_is_compared_under_max_changed(ten, box):
    ten.state_db.unlink()

    result = ten(MAX_CHANGED=0)

    assert (result.status, result.compared) == (0, 10), result.output
    ten.state_db.unlink()
    change(box, ["f0"])
    assert "of 10 archived files 1 have changed" in ten(MAX_CHANGED=0).stderr, "by its size"


@pytest.mark.parametrize("value", ["101", "-1", "5%", "1.5", "few"])
def test_max_changed_that_is_no_per_cent_is_a_fault_of_the_settings(archive, value):
    assert_one_fault(archive(MAX_CHANGED=value), "MAX_CHANGED", "0 to 100")


# --- Spent ---

# By region: USD of a first run with two small files and one of two parts; of a HEAD; and of
# a small file that overwrites a new object of 100 GB.
SPENT = {
    # The listing 0.000005, 2 PUTs 0.0001, Create and parts 3 x 0.000005, Complete 0.00005.
    # Six months of 100 x 0.00099 and the index: 0.594001234131; a PUT 0.00005.
    "us-east-1": (0.00017, 0.0000004, 0.594051234131),
    # 0.0000054 + 0.00012 + 0.0000162 + 0.00006. Six months of 100 x 0.0018 = 0.18 and of
    # the index 0.00000024185180664 are 1.080001451111; a PUT 0.00006.
    "eu-central-1": (0.0002016, 0.00000043, 1.080061451111),
    # 0.000005 + 0.00011 + 0.000015 + 0.000055. As us-east-1; a PUT 0.000055.
    "eu-north-1": (0.000185, 0.0000004, 0.594056234131),
}


@pytest.mark.parametrize("region", SPENT)
def test_each_run_tells_what_its_requests_and_overwritten_objects_cost(archive, box, region):
    archive.settings["AWS_REGION"] = region
    fill(box.root, {"a": SMALL, "b": SMALL, "large": LARGE})
    summary = json.loads(archive("run", "--json", constants=SMALL_PARTS).stdout)
    next_second(archive)
    fill(box.root, {"b": SMALL}, mtime=OLD + 5)
    archive.execute("UPDATE objects SET crc32 = NULL")
    assert archive().compared == 1
    next_second(archive)
    fill(box.root, {"a": 10})
    archive.execute("UPDATE files SET size = ? WHERE path = './a'", 100 * GB)
    last = archive()

    first, head, overwritten = SPENT[region]
    assert summary["spent"] == pytest.approx(first, abs=1e-6)
    found = [usd for (usd,) in archive.query("SELECT spent FROM runs ORDER BY started_at")]
    assert found == [near(first), near(head), near(overwritten)]
    shown = r"\$1\.08" if region == "eu-central-1" else r"\$0\.59"
    assert re.search(f"^Spent *: {shown}$", last.stdout, re.MULTILINE)

    told = archive("status", "--json").stdout
    all_in_all = first + head + overwritten
    assert json.loads(told)["spent_in_30_days"] == pytest.approx(all_in_all, abs=1e-6)
    text = archive("status").stdout
    assert re.search(f"^Spent in 30 days *: {shown}$", text, re.MULTILINE)


def test_run_that_sends_nothing_has_spent_nothing(archive):
    archive()
    next_second(archive)

    assert re.search(r"^Spent *: \$0\.00$", archive().stdout, re.MULTILINE)

    assert spent(archive) == 0


def test_runs_of_more_than_30_days_ago_are_not_in_what_was_spent(archive):
    archive()
    now = int(time.time())
    for days, usd in ((1, 0.5), (29, 0.25), (31, 4)):
        values = now - days * DAY, now, usd
        insert = "INSERT INTO runs (started_at, ended_at, spent) VALUES (?, ?, ?)"
        archive.execute(insert, *values)
    archive.execute("INSERT INTO runs (started_at) VALUES (?)", now - 2 * DAY)  # was killed

    told = json.loads(archive("status", "--json").stdout)

    # 0.5 + 0.25, and the first run's listing.
    assert told["spent_in_30_days"] == pytest.approx(0.750005, abs=1e-7)


def test_what_was_spent_is_unknown_if_the_cost_of_one_run_is(archive, box):
    fill(box.root, {"f": b"x"})
    assert archive(STORAGE_CLASS="GLACIER_IR").counts == (1, 0, 0)
    assert spent(archive) is None

    assert re.search(r"^Spent in 30 days *: unknown$", archive("status").stdout, re.MULTILINE)
    assert json.loads(archive("status", "--json").stdout)["spent_in_30_days"] is None


# --- Classes by size ---

BY_SIZE = {"SMALL_FILES_BELOW": "4K", "SMALL_FILES_CLASS": "STANDARD"}


def test_files_below_the_limit_go_into_their_own_class(archive, box):
    fill(box.root, {"below": 4095, "at": 4096})

    assert archive(**BY_SIZE).status == 0

    # The listing and a PUT into STANDARD 0.00001, a PUT 0.00005.
    assert spent(archive) == near(0.00006)
    classes = {key: kind for key, (_, _, kind) in archive.objects().items()}
    assert classes == {"below": "STANDARD", "at": "DEEP_ARCHIVE"}
    assert dict(archive.query("SELECT key, storage_class FROM objects")) == classes
    told = json.loads(archive("status", "--json", **BY_SIZE).stdout)
    assert told["archived"] == {"files": 2, "bytes": 8191}
    assert told["standard"] == {"files": 1, "bytes": 4095}
    assert told["deep_archive"] == {"files": 1, "bytes": 4096}
    text = archive("status", **BY_SIZE).stdout
    assert re.search("^STANDARD *: 1 ", text, re.MULTILINE)
    assert re.search("^DEEP_ARCHIVE *: 1 ", text, re.MULTILINE)
    assert archive("verify", **BY_SIZE).status == 0


def test_plan_counts_each_class_at_its_own_price(archive_of, s3):
    """Four files of 1 GB, 64 parts each: of those at most three are changed ones."""
    settings = {"SMALL_FILES_BELOW": "2G", "SMALL_FILES_CLASS": "STANDARD"}
    with FaultyBox(many_files(4, 1, GB)) as box:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        result = archive("plan", "--json", **settings)
        cold = archive("plan", "--json", SMALL_FILES_BELOW="1G", SMALL_FILES_CLASS="STANDARD")

    usd = json.loads(result.stdout)
    # Into STANDARD 4 x 66 requests at 0.000005; 4 x 0.023; nothing for each object, nor to
    # restore them.
    assert usd["upload"] == near(0.00132)
    assert usd["storage_a_month"] == near(0.092)
    assert usd["restore_bulk_48_hours"] == 0
    usd = json.loads(cold.stdout)
    # A file of exactly the limit: 4 x 65 x 0.000005 and 4 x 0.00005. 4 x 0.00099 and 4 x
    # 0.0000002056884765625, in six digits. Bulk: 4 x (0.0025 + 0.023 x 7 / 30 + 0.000025).
    assert usd["upload"] == near(0.0015)
    assert usd["storage_a_month"] == pytest.approx(0.003961, abs=1e-6)
    assert usd["restore_bulk_48_hours"] == pytest.approx(0.031567, abs=1e-6)


@pytest.mark.parametrize("name", BY_SIZE)
def test_one_of_both_settings_alone_is_a_fault(archive, name):
    result = archive(**{name: BY_SIZE[name]})

    assert_one_fault(result, *BY_SIZE)
