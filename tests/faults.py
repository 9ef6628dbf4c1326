"""What the tests with faulty servers share."""

import contextlib
import os
import random
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest
from conftest import MIB, noise, tree
from hypothesis import HealthCheck, Phase, given, seed, settings

# Files of 1 MiB and more are large here, so that large ones are cheap.
SIZES = {"SMALL_FILE": MIB, "PART_SIZE": 5 * MIB}
SMALL, LARGE = 3_000, 6 * MIB + 1  # bytes; a large one has two parts

# How much the tests that draw lots try: 1 in CI; 100 is a night.
EFFORT = int(os.environ.get("TEST_EFFORT", "1"))
SEED = int(os.environ.get("TEST_SEED", "0")) or random.SystemRandom().getrandbits(32)


def drawn_by_lot(*strategies):
    """A test with random arguments: 4 examples of them in CI, and as many times as EFFORT."""
    examples = 4 * EFFORT
    of_lots = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Each step of shrinking would be several runs of the program.
        phases=[Phase.generate],
    )

    def decorate(test):
        drawn = seed(SEED)(of_lots(given(*strategies)(test)))
        return pytest.mark.timeout(60 + 30 * examples)(drawn)

    return decorate


def scripted_fixtures():
    """The fixtures `box` and `archive` of a module: a FaultyBox, and S3 behind `s3`.

    box, archive = scripted_fixtures()
    """

    @pytest.fixture
    def box(faulty_box):
        return faulty_box

    @pytest.fixture
    def archive(archive_of, box, s3):
        return archive_of(box, AWS_ENDPOINT_URL=s3.url)

    return box, archive


def strict_fixtures():
    """The same with `s3` that has checksums as S3 answers them, so that there is no HEAD but
    those of comparisons.

        box, s3, archive = strict_fixtures()
    """

    @pytest.fixture
    def s3(strict_s3):
        return strict_s3

    box, archive = scripted_fixtures()
    return box, s3, archive


MAX_RUNTIME_AT_A_SIGN = """
import pathlib, threading, time
timer = threading.Timer
def timer_at_a_sign(limit, act):
    if getattr(act, "__func__", None) is not archive.StorageBox.close:
        return timer(limit, act)
    def wait():
        while not pathlib.Path({sign!r}).exists():
            time.sleep(0.01)
        act()
    return timer(limit, wait)
threading.Timer = timer_at_a_sign
"""


def max_runtime_at(sign):
    """What to start a run with: its MAX_RUNTIME is not over before the file `sign` exists, so
    that a slow machine has come as far by then as the test wants it."""
    return {"MAX_RUNTIME": "1s", "before": MAX_RUNTIME_AT_A_SIGN.format(sign=str(sign))}


# What to start a run with so that it asks S3 again after a tenth of its pauses.
AGAIN_SOON = """
import random
random.uniform = lambda low, high: low / 10
"""


def write(path, size, mtime=1_700_000_000):
    """A file of that many bytes, which depend on its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(noise(path.name, size))
    os.utime(path, (mtime, mtime))


def wait_for(condition):
    """Wait until something has happened; the test's own time limit ends it."""
    while not condition():
        time.sleep(0.01)


def assert_all_archived(archive, box):
    """The bucket holds the tree, the state says so, and nothing is left to be done."""
    objects = archive.objects()
    held = {os.fsencode(key): found[:2] for key, found in objects.items()}
    there = tree(box.root)
    assert held == there, set(held.items()) ^ set(there.items())
    assert len(archive.rows()) == len(held)
    assert archive.query("SELECT path FROM files WHERE mtime IS NULL") == []
    assert archive.query("SELECT key FROM uploads") == []
    archive.assert_invariant()


def assert_failed(result, reasons):
    """Just these files failed, {name: part of the reason}; numbers without commas."""
    assert result.status == 3, result.stderr
    said = dict(failure.split(": ", 1) for failure in result.failures)
    said = {path.split("/")[-1]: text.replace(",", "") for path, text in said.items()}
    assert said.keys() == reasons.keys(), result.stderr
    assert len(result.failures) == len(said) == result.summary["Failed files"]
    for name, reason in reasons.items():
        assert reason in said[name], (name, said[name])


def recorded(archive):
    """The rows of a state whose program may have been killed at any instant:
    {path: (size, mtime, key, crc32)}, with an mtime of None where the object has to be
    compared. The database itself stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(f"{archive.state_db}{suffix}", Path(folder, f"db{suffix}"))
        with contextlib.closing(sqlite3.connect(Path(folder, "db"))) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if not db.execute("SELECT * FROM sqlite_master").fetchall():
                return {}
            rows = db.execute(
                "SELECT path, size, mtime, key, crc32 FROM files LEFT JOIN objects USING (path)"
            )
            return {path: row for path, *row in rows}


def assert_rows_are_true(archive):
    """Each row has its object; with an mtime it is of that size and CRC-32. Uploads may be
    under way.

    A changed file may have its new object and still its old row, if S3's answer was lost or
    the run was killed: then the row has no mtime, so that the next run compares the file.
    """
    objects = archive.objects()
    for path, (size, mtime, key, crc) in recorded(archive).items():
        assert key in objects, f"{path} is recorded, but S3 has no {key}"
        assert mtime is None or objects[key][:2] == (size, crc), path
