"""What class Prices computes, held against numbers worked out by hand.

Those without a region in their name are of us-east-1: Deep Archive $0.00099 a GB and month,
$0.05 per 1,000 PUT or Complete, $0.005 per 1,000 Create or UploadPart; HEAD and GET $0.0004
per 1,000; STANDARD $0.023 a GB and month; Bulk $0.0025 a GB and $0.025 per 1,000, Standard
$0.02 and $0.10; egress $0.09 a GB. A GB has 2**30 bytes, a month 30 days.
"""

import importlib.util
import math
import sys

import boto3
import pytest
from conftest import PROGRAM

GB = 2**30
COLD = "DEEP_ARCHIVE"

# What Amazon has published, typed in apart from the program; per GB and month, per GB, and
# per 1,000 requests.
PUBLISHED = """
              D.month D.put D.part S.month S.put  get     G.month  G.put  \
 D.bulk D.bulk.r D.std D.std.r G.std  G.std.r egress
eu-central-1  .0018   .06   .0054  .0245   .0054  .00043  .00405   .036   \
 .005   .03      .024  .12     .012   .06     .09
eu-north-1    .00099  .055  .005   .023    .005   .0004   .0036    .033   \
 .003   .025     .02   .11     .01    .055    .09
eu-west-1     .00099  .055  .005   .023    .005   .0004   .0036    .033   \
 .003   .025     .02   .11     .01    .055    .09
eu-west-2     .0018   .06   .0053  .024    .0053  .00042  .00405   .0318  \
 .005   .026     .021  .106    .0105  .053    .09
eu-west-3     .0018   .06   .0053  .024    .0053  .00042  .00405   .0318  \
 .005   .02625   .021  .106    .0105  .053    .09
eu-south-1    .0018   .06   .0054  .024    .0053  .0004   .00405   .036   \
 .005   .03      .024  .12     .012   .06     .09
eu-south-2    .0018   .06   .0054  .023    .0053  .0004   .00405   .036   \
 .005   .03      .024  .12     .012   .06     .09
eu-central-2  .00198  .06   .0054  .02695  .0054  .00043  .004455  .036   \
 .005   .03      .024  .12     .012   .06     .09
us-east-1     .00099  .05   .005   .023    .005   .0004   .0036    .03    \
 .0025  .025     .02   .1      .01    .05     .09
us-west-2     .00099  .05   .005   .023    .005   .0004   .0036    .03    \
 .0025  .025     .02   .1      .01    .05     .09
"""
COLUMNS, *ROWS = [line.split() for line in PUBLISHED.strip().splitlines()]
PUBLISHED = {region: dict(zip(COLUMNS, map(float, row), strict=True)) for region, *row in ROWS}


REQUESTS = ("put", "create", "part", "complete", "head", "list")


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
def prices(program):
    return program.Prices("us-east-1", {})


def near(usd):
    return pytest.approx(usd, rel=1e-9, abs=1e-12)


# --- The table ---


@pytest.mark.parametrize("region", PUBLISHED)
def test_every_figure_of_the_table_is_the_published_one(program, region):
    """Each is found in what the smallest thing costs that has it as its price."""
    prices, published = program.Prices(region, {}), PUBLISHED[region]

    def requests(storage_class, **numbers):
        return prices.requests(storage_class, numbers)

    def restore(storage_class, tier, files, size):
        return prices.restore(storage_class, files, size, tier, 0)

    found = {
        "D.month": prices.month(COLD, 0, GB),
        "D.put": requests(COLD, put=1_000),
        "D.part": requests(COLD, part=1_000),
        "S.month": prices.month("STANDARD", 0, GB),
        "S.put": requests("STANDARD", put=1_000),
        "get": prices.download(1_000, 0),
        "G.month": prices.month("GLACIER", 0, GB),
        "G.put": requests("GLACIER", put=1_000),
        "D.bulk": restore(COLD, "bulk", 0, GB),
        "D.bulk.r": restore(COLD, "bulk", 1_000, 0),
        "D.std": restore(COLD, "standard", 0, GB),
        "D.std.r": restore(COLD, "standard", 1_000, 0),
        "G.std": restore("GLACIER", "standard", 0, GB),
        "G.std.r": restore("GLACIER", "standard", 1_000, 0),
        "egress": prices.download(0, 101 * GB),
    }
    assert found == {name: near(usd) for name, usd in published.items()}
    # What the table leaves to a rule.
    assert requests(COLD, create=1_000) == near(published["D.part"])
    assert requests(COLD, complete=1_000) == near(published["D.put"])
    assert requests("GLACIER", part=1_000) == near(published["D.part"])
    assert requests("STANDARD", part=1_000) == near(published["S.put"])
    assert restore("GLACIER", "bulk", 1_000, GB) == 0


def test_no_region_has_prices_that_were_not_published(program):
    """All others are told that they get those of another one. us-east-2 costs what
    us-east-1 does."""
    regions = boto3.Session().get_available_regions("s3")
    built_in = [r for r in regions if "may differ" not in program.Prices(r, {}).note]
    assert sorted(built_in) == sorted([*PUBLISHED, "us-east-2"])
    virginia, ohio = (program.Prices(r, {}) for r in ("us-east-1", "us-east-2"))
    assert ohio.month(COLD, 1_000, GB) == virginia.month(COLD, 1_000, GB)


def test_ohio_costs_what_virginia_does(program):
    def everything(region):
        prices, kinds = program.Prices(region, {}), (COLD, "GLACIER", "STANDARD")
        yield prices.download(1_000, 200 * GB)
        for kind in kinds:
            yield from (prices.month(kind, 1_000, GB), prices.early(kind, GB, 0))
            yield from (prices.requests(kind, {name: 1}) for name in REQUESTS)
            tiers = ("bulk", "standard")
            yield from (prices.restore(kind, 1_000, GB, tier, 7) for tier in tiers)

    assert list(everything("us-east-2")) == list(everything("us-east-1"))


def test_frankfurt_costs_what_was_worked_out_by_hand(program):
    prices = program.Prices("eu-central-1", {})

    # 2,048 GB x 0.0018 = 3.6864. A million objects: 8,000,000 KB of STANDARD are
    # 7.62939453125 GB, x 0.0245 = 0.186920166015625; 32,000,000 KB are 30.517578125 GB,
    # x 0.0018 = 0.054931640625. Together 3.928251806640625.
    assert prices.month(COLD, 1_000_000, 2048 * GB) == near(3.928251806640625)
    # 200 PUTs 0.012, 1 Create and 64 parts 65 x 0.0000054 = 0.000351, 1 Complete 0.00006,
    # 10 HEADs 0.0000043: together 0.0124153.
    requests = {"put": 200, "create": 1, "part": 64, "complete": 1, "head": 10}
    assert prices.requests(COLD, requests) == near(0.0124153)
    # Of 100 GB after 120 days, 60 are left, two months: 2 x 100 x 0.0018 = 0.36, and the
    # index 2 x (0.000000186920166015625 + 0.000000054931640625) = 0.00000048370361328125.
    assert prices.early(COLD, 100 * GB, 120) == near(0.36000048370361328125)
    # 4,000 files of 200 GB, copies for 15 days: 200 x 0.0245 / 2 = 2.45.
    # Bulk: 4 x 0.03 = 0.12, 200 x 0.005 = 1; Standard: 4 x 0.12 = 0.48, 200 x 0.024 = 4.8.
    assert prices.restore(COLD, 4_000, 200 * GB, "bulk", 15) == near(3.57)
    assert prices.restore(COLD, 4_000, 200 * GB, "standard", 15) == near(7.73)
    # 4,000 GETs 4 x 0.00043 = 0.00172; 100 GB beyond the free ones 9.
    assert prices.download(4_000, 200 * GB) == near(9.00172)


def test_stockholm_costs_what_was_worked_out_by_hand(program):
    prices = program.Prices("eu-north-1", {})

    # 2,048 GB x 0.00099 = 2.02752; the index of a million objects 7.62939453125 x 0.023 =
    # 0.17547607421875 and 30.517578125 x 0.00099 = 0.03021240234375. Together:
    assert prices.month(COLD, 1_000_000, 2048 * GB) == near(2.2332084765625)
    # 200 PUTs 0.011, 65 x 0.000005 = 0.000325, 1 Complete 0.000055, 10 HEADs 0.000004.
    requests = {"put": 200, "create": 1, "part": 64, "complete": 1, "head": 10}
    assert prices.requests(COLD, requests) == near(0.011384)
    # 2 x 100 x 0.00099 = 0.198, the index 2 x 0.0000002056884765625.
    assert prices.early(COLD, 100 * GB, 120) == near(0.198000411376953125)
    # Copies 200 x 0.023 / 2 = 2.30. Bulk: 4 x 0.025 = 0.10, 200 x 0.003 = 0.60; Standard:
    # 4 x 0.11 = 0.44, 200 x 0.02 = 4.
    assert prices.restore(COLD, 4_000, 200 * GB, "bulk", 15) == near(3.00)
    assert prices.restore(COLD, 4_000, 200 * GB, "standard", 15) == near(6.74)
    # 4,000 GETs 0.0016; 100 GB beyond the free ones 9.
    assert prices.download(4_000, 200 * GB) == near(9.0016)


# --- What things cost ---


def test_storage_of_a_month_is_the_bytes_and_what_each_object_adds(prices):
    # 1,024 GB x 0.00099 = 1.01376, and no object is as good as free.
    assert prices.month(COLD, 0, 1024 * GB) == near(1.01376)
    # A million objects: 8,000,000 KB of STANDARD are 7.62939453125 GB, x 0.023 =
    # 0.17547607421875; 32,000,000 KB are 30.517578125 GB, x 0.00099 = 0.03021240234375.
    assert prices.month(COLD, 1_000_000, 0) == near(0.2056884765625)
    # Both together: 1.01376 + 0.2056884765625.
    assert prices.month(COLD, 1_000_000, 1024 * GB) == near(1.2194484765625)


def test_an_object_that_is_not_cold_costs_its_bytes_alone(prices):
    # 10 GB x 0.023 = 0.23, however many objects they are.
    assert prices.month("STANDARD", 1_000_000, 10 * GB) == near(0.23)
    assert prices.early("STANDARD", 100 * GB, 0) == 0
    assert prices.restore("STANDARD", 4_000, 200 * GB, "bulk", 15) == 0


def test_upload_costs_each_kind_of_request_at_its_own_price(prices):
    # 3 PUTs 0.00015, 2 Creates 0.00001, 131 parts 0.000655, 2 Completes 0.0001,
    # 2 HEADs 0.0000008: together 0.0009158.
    requests = {"put": 3, "create": 2, "part": 131, "complete": 2, "head": 2}
    assert prices.requests(COLD, requests) == near(0.0009158)


def test_listing_costs_a_put_into_standard_whatever_the_class(program):
    frankfurt, virginia = (program.Prices(r, {}) for r in ("eu-central-1", "us-east-1"))
    for kind in (COLD, "STANDARD", "ONEZONE_IA"):
        assert virginia.requests(kind, {"list": 1_000}) == near(0.005)
        assert frankfurt.requests(kind, {"list": 1_000}) == near(0.0054)


@pytest.mark.parametrize(
    ("age", "usd"),
    [
        # What a month of it costs: 100 GB x 0.00099 = 0.099, and what the object
        # adds, a millionth of 0.2056884765625: together 0.0990002056884765625.
        (-1_000, 6 * 0.0990002056884765625),  # of the future: as new
        (0, 6 * 0.0990002056884765625),  # 180 days are left: six months
        (30, 5 * 0.0990002056884765625),  # 150: five
        (165, 0.5 * 0.0990002056884765625),  # 15: half a one
        (180, 0),
        (10_000, 0),
    ],
)
def test_overwriting_early_costs_what_is_left_of_180_days(prices, age, usd):
    assert prices.early(COLD, 100 * GB, age) == near(usd)


def test_overwriting_early_costs_what_is_left_of_90_days_in_glacier(prices):
    # 100 GB x 0.0036 = 0.36; the index 8 KB x 0.023 + 32 KB x 0.0036 a GB: 0.000000175476...
    # + 0.00000010986328125. After 60 days one month is left.
    index = 0.00000017547607421875 + 0.000000109863281250
    assert prices.early("GLACIER", 100 * GB, 60) == near(0.36 + index)
    assert prices.early("GLACIER", 100 * GB, 90) == 0


@pytest.mark.parametrize(
    ("tier", "usd"),
    [
        # 200 GB of 4,000 files, copies for 15 days: copies 200 x 0.023 / 2 = 2.30.
        ("bulk", 2.90),  # 4 x 0.025 = 0.10, 200 x 0.0025 = 0.50
        ("standard", 6.70),  # 4 x 0.10 = 0.40, 200 x 0.02 = 4.00
    ],
)
def test_restore_costs_requests_bytes_and_the_copies(prices, tier, usd):
    assert prices.restore(COLD, 4_000, 200 * GB, tier, 15) == near(usd)


def test_download_costs_its_requests_and_what_is_beyond_100_gb(prices):
    assert prices.download(0, 100 * GB) == 0
    # 924 GB beyond x 0.09 = 83.16; 5,000 GETs 0.002.
    assert prices.download(5_000, 1024 * GB) == near(83.162)


def test_what_has_no_price_is_unknown_and_not_free(prices):
    assert math.isnan(prices.month("ONEZONE_IA", 1, GB))
    assert math.isnan(prices.requests("ONEZONE_IA", {"put": 1}))
    assert math.isnan(prices.early("ONEZONE_IA", GB, 0))
    assert math.isnan(prices.restore("ONEZONE_IA", 1, GB, "bulk", 7))


def test_nothing_of_a_class_without_prices_costs_nothing(prices):
    assert prices.month("STANDARD_IA", 0, 0) == 0
    assert prices.requests("STANDARD_IA", {}) == 0
    assert prices.restore("STANDARD_IA", 0, 0, "bulk", 7) == 0


# --- Whose prices ---


def test_prices_that_are_set_replace_the_built_in_ones_and_no_others(program):
    prices = program.Prices("us-east-1", {"DEEP_ARCHIVE.month": 0.0018, "egress": 0.05})

    # 10 GB x 0.0018 = 0.018; 10 GB beyond the free 100 x 0.05 = 0.5.
    assert prices.month(COLD, 0, 10 * GB) == near(0.018)
    assert prices.download(0, 110 * GB) == near(0.5)
    assert prices.requests(COLD, {"put": 1_000}) == near(0.05)
    assert "PRICES" in prices.note


def test_class_without_built_in_prices_takes_those_that_are_set(program):
    prices = program.Prices(
        "us-east-1",
        {"GLACIER_IR.month": 0.004, "GLACIER_IR.put": 0.02, "STANDARD_IA.month": 0.0125},
    )

    # 10 GB x 0.004, and nothing for each object, as it is not cold.
    assert prices.month("GLACIER_IR", 1_000, 10 * GB) == near(0.04)
    assert prices.requests("GLACIER_IR", {"put": 1_000}) == near(0.02)
    # Of its 90 days 60 are left, of 30 days 15.
    assert prices.early("GLACIER_IR", 10 * GB, 30) == near(0.08)
    assert prices.early("STANDARD_IA", 10 * GB, 15) == near(0.0625)
    assert prices.early("STANDARD_IA", 10 * GB, 31) == 0


def test_class_without_a_minimum_of_days_is_overwritten_for_nothing(prices):
    assert prices.early("INTELLIGENT_TIERING", GB, 0) == 0
    assert prices.early("ONEZONE_IA", GB, 30) == 0


@pytest.mark.parametrize("region", ["mars-north-1", None])
def test_a_region_without_prices_is_told_whose_it_gets(program, region):
    known, unknown = program.Prices("eu-north-1", {}), program.Prices(region, {})

    assert "eu-north-1" in known.note
    assert "PRICES" not in known.note
    assert unknown.requests(COLD, {"put": 1_000}) == near(0.05)
    assert "us-east-1" in unknown.note
    assert "PRICES" in unknown.note
    assert (region or "your region") in unknown.note
