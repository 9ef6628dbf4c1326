"""What class Money computes, held against numbers worked out by hand.

The prices are those of us-east-1: Deep Archive $0.00099 a GB and month, $0.05 per 1,000
PUT or Complete, $0.005 per 1,000 Create or UploadPart; HEAD and GET $0.0004 per 1,000;
STANDARD $0.023 a GB and month; Bulk $0.0025 a GB and $0.025 per 1,000, Standard $0.02 and
$0.10; egress $0.09 a GB. A GB has 2**30 bytes, a month 30 days.
"""

import importlib.util
import math
import sys

import pytest
from conftest import PROGRAM

GB = 2**30
COLD = "DEEP_ARCHIVE"


@pytest.fixture(scope="module")
def program():
    """archive.py as a module, nothing of it run."""
    spec = importlib.util.spec_from_file_location("program_with_prices", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # for its dataclasses
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def money(program):
    return program.Money("us-east-1", {})


def near(usd):
    return pytest.approx(usd, rel=1e-9, abs=1e-12)


def test_storage_of_a_month_is_the_bytes_and_what_each_object_adds(money):
    # 1,024 GB x 0.00099 = 1.01376, and no object is as good as free.
    assert money.month(COLD, 0, 1024 * GB) == near(1.01376)
    # A million objects: 8,000,000 KB of STANDARD are 7.62939453125 GB, x 0.023 =
    # 0.17547607421875; 32,000,000 KB are 30.517578125 GB, x 0.00099 = 0.03021240234375.
    assert money.index(COLD, 1_000_000) == near(0.2056884765625)
    # Both together: 1.01376 + 0.2056884765625.
    assert money.month(COLD, 1_000_000, 1024 * GB) == near(1.2194484765625)


def test_an_object_that_is_not_cold_costs_its_bytes_alone(money):
    # 10 GB x 0.023 = 0.23, however many objects they are.
    assert money.month("STANDARD", 1_000_000, 10 * GB) == near(0.23)
    assert money.index("STANDARD", 1_000_000) == 0
    assert money.early("STANDARD", 100 * GB, 0) == 0
    assert money.restore("STANDARD", "bulk", 4_000, 200 * GB, 15) == 0


def test_upload_costs_each_kind_of_request_at_its_own_price(program, money):
    def upload(**requests):
        return money.upload(COLD, program.Requests(**requests))

    assert upload(put=1_000) == near(0.05)
    assert upload(complete=1_000) == near(0.05)
    assert upload(create=1_000) == near(0.005)
    assert upload(part=1_000) == near(0.005)
    assert upload(head=1_000) == near(0.0004)
    # 3 PUTs 0.00015, 2 Creates 0.00001, 131 parts 0.000655, 2 Completes 0.0001,
    # 2 HEADs 0.0000008: together 0.0009158.
    assert upload(put=3, create=2, part=131, complete=2, head=2) == near(0.0009158)
    # To STANDARD 1,000 PUTs are 0.005.
    assert money.upload("STANDARD", program.Requests(put=1_000)) == near(0.005)


def test_a_file_takes_one_request_or_its_parts_and_three(program):
    def requests(size):
        return program.requests_of(size, program.upload_plan(size, 128 * 2**20))

    part = program.PART_SIZE
    assert requests(0) == program.Requests(put=1)
    assert requests(program.SMALL_FILE - 1) == program.Requests(put=1)
    assert requests(2 * part) == program.Requests(create=1, part=2, complete=1, head=1)
    assert requests(2 * part + 1) == program.Requests(create=1, part=3, complete=1, head=1)


@pytest.mark.parametrize(
    ("age", "usd"),
    [
        # What a month of it costs: 100 GB x 0.00099 = 0.099, and what the object
        # adds, a millionth of 0.2056884765625: together 0.0990002056884765625.
        (0, 6 * 0.0990002056884765625),  # 180 days are left: six months
        (30, 5 * 0.0990002056884765625),  # 150: five
        (165, 0.5 * 0.0990002056884765625),  # 15: half a one
        (180, 0),
        (10_000, 0),
    ],
)
def test_overwriting_early_costs_what_is_left_of_180_days(money, age, usd):
    assert money.early(COLD, 100 * GB, age) == near(usd)


@pytest.mark.parametrize(
    ("tier", "usd"),
    [
        # 200 GB of 4,000 files, copies for 15 days: copies 200 x 0.023 / 2 = 2.30.
        ("bulk", 2.90),  # 4 x 0.025 = 0.10, 200 x 0.0025 = 0.50
        ("standard", 6.70),  # 4 x 0.10 = 0.40, 200 x 0.02 = 4.00
    ],
)
def test_restore_costs_requests_bytes_and_the_copies(money, tier, usd):
    assert money.restore(COLD, tier, 4_000, 200 * GB, 15) == near(usd)


def test_download_costs_its_requests_and_what_is_beyond_100_gb(money):
    assert money.download(0, 100 * GB) == 0
    # 924 GB beyond x 0.09 = 83.16; 5,000 GETs 0.002.
    assert money.download(5_000, 1024 * GB) == near(83.162)


def test_what_has_no_price_is_unknown_and_not_free(program, money):
    assert math.isnan(money.month("ONEZONE_IA", 1, GB))
    assert program.usd_text(money.month("ONEZONE_IA", 1, GB)) == "unknown"
    assert program.json_number(math.nan) is None


def test_nothing_of_a_class_without_prices_costs_nothing(program, money):
    assert money.month("STANDARD_IA", 0, 0) == 0
    assert money.upload("STANDARD_IA", program.Requests()) == 0
    assert money.restore("STANDARD_IA", "bulk", 0, 0, 7) == 0


def test_object_of_the_future_is_as_new(money):
    assert money.early(COLD, GB, -1_000_000) == money.early(COLD, GB, 0)


def test_prices_that_are_set_replace_the_built_in_ones_and_no_others(program):
    changed = program.parse_prices("DEEP_ARCHIVE.month=0.0018, egress = 0.05")
    money = program.Money("us-east-1", changed)

    # 10 GB x 0.0018 = 0.018; 10 GB beyond the free 100 x 0.05 = 0.5.
    assert money.month(COLD, 0, 10 * GB) == near(0.018)
    assert money.download(0, 110 * GB) == near(0.5)
    assert money.upload(COLD, program.Requests(put=1_000)) == near(0.05)
    assert "PRICES" in money.note


@pytest.mark.parametrize("region", ["mars-north-1", None])
def test_a_region_without_prices_is_told_whose_it_gets(program, region):
    known, unknown = program.Money("us-west-2", {}), program.Money(region, {})

    assert unknown.month(COLD, 7, GB) == known.month(COLD, 7, GB)
    assert "us-west-2" in known.note
    assert "PRICES" not in known.note
    assert "us-east-1" in unknown.note
    assert "PRICES" in unknown.note
    assert (region or "your region") in unknown.note
