"""What a hostile box, S3, file or neighbour may try; found in reviews."""

import base64
import os
import stat
import subprocess
import sys
import time
from zlib import crc32

import pytest
from conftest import MIB
from faults import SIZES, SMALL, assert_all_archived, assert_failed, write
from faulty_sftp import PERMISSION_DENIED, Attributes, drop, names, status
from scripted_s3 import ScriptedS3, error

FOLDER = Attributes(mode=stat.S_IFDIR | 0o755, size=0, mtime=1)


@pytest.fixture
def box(faulty_box):
    return faulty_box


@pytest.fixture
def archive(archive_of, box):
    write(box.root / "f", SMALL)
    return archive_of(box)


# --- known_hosts ------------------------------------------------------------

ODD_LINES = (
    "@cert-authority *.example.com ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA==",
    "@revoked other.example.com ssh-ed25519 not-base64",
    "other.example.com ssh-ed25519 AAAA=bad",
    "|1|broken ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAB",
    "|1|odd ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop",
    "other.example.com ssh-dss AAAA",
    "other.example.com ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAMkAgYDmGbrv6SgzzgDmGbrv6SgzgA==",
    "one-field",
    "\x00\xff",
)


def test_known_hosts_lines_of_others_do_no_harm_however_odd(archive, box, tmp_path):
    known_hosts = tmp_path / "known_hosts"
    lines = [*ODD_LINES, box.known_hosts.read_text().strip(), *ODD_LINES]
    known_hosts.write_text("\n".join(lines))
    assert archive(HETZNER_KNOWN_HOSTS=str(known_hosts)).status == 0


@pytest.mark.parametrize(
    "form", ["@revoked {} {}", "@revoked\t{}  {}", "@revoked other.example.com {1}"]
)
def test_revoked_host_key_is_refused_though_it_is_also_known(archive, box, tmp_path, form):
    known_hosts = tmp_path / "known_hosts"
    line = box.known_hosts.read_text().strip()
    revoked = form.format(*line.split(" ", 1))
    known_hosts.write_text(f"{line}\n{revoked}\n")
    result = archive(HETZNER_KNOWN_HOSTS=str(known_hosts))
    assert result.status == 1
    assert "revoked" in result.stderr
    assert archive.objects() == {}


# --- Listings without end ---------------------------------------------------


def test_listing_that_never_ends_fails_its_folder_alone(archive, box):
    write(box.root / "endless" / "f", SMALL)
    box.always("READDIR", b"endless", names((b".", FOLDER), (b"..", FOLDER)))
    result = archive()
    assert_failed(result, {"endless": "a listing that does not end"})
    assert set(archive.objects()) == {"f"}


def test_max_runtime_ends_a_walk_that_finds_nothing_new(archive, box):
    for number in range(100):
        (box.root / f"empty{number}").mkdir()
    result = archive(constants={"LISTINGS_AT_ONCE": 1}, MAX_RUNTIME="0s")
    assert result.status == 3
    assert "MAX_RUNTIME" in result.stderr
    assert box.requests["OPENDIR"] < 100


def test_folders_are_followed_only_to_a_depth_that_a_system_can_open(archive, box):
    write(box.root / "a" / "b" / "f", SMALL)
    write(box.root / ("deep" * 10) / "f", SMALL)
    result = archive(constants={"MAX_PATH_BYTES": 20})
    assert result.status == 3
    assert "no file can have this name" in result.stderr
    assert set(archive.objects()) == {"f", "a/b/f"}


def test_name_that_is_listed_twice_is_one_object(archive, box):
    found = Attributes(mode=stat.S_IFREG | 0o644, size=SMALL, mtime=1_700_000_000)
    twice = box.on("READDIR", b"", names((b"f", found), (b"f", found)))
    result = archive(constants={"PAGE": 1})
    assert result.status == 0, result.stderr
    assert twice.fired == 1
    assert_all_archived(archive, box)


def test_handle_of_a_lost_connection_is_never_closed_on_the_next(archive, box):
    """There it may be another file's, which would be read in its place."""
    write(box.root / "large", 6 * MIB)
    lost = box.on("READ", b"large", drop)
    refused = box.on("OPEN", b"large", status(PERMISSION_DENIED), nth=2)
    result = archive(constants=SIZES)
    assert_failed(result, {"large": "the box answered: told to"})
    assert (lost.fired, refused.fired) == (1, 1)
    assert box.requests["STALE"] == 0


# --- S3 ---------------------------------------------------------------------


def test_endpoint_that_boto3_finds_elsewhere_must_be_as_safe(archive, bucket):
    result = archive(AWS_ENDPOINT_URL=None, AWS_ENDPOINT_URL_S3="http://192.0.2.1:9")
    assert result.status == 1
    assert "expected an https:// URL" in result.stderr


def test_text_of_s3_cannot_turn_a_line_around(archive_of, box, moto):
    write(box.root / "f", SMALL)
    with ScriptedS3(moto.url) as s3:
        s3.always("PutObject", error(400, "Odd", "a&#x202e;b"))
        result = archive_of(box, AWS_ENDPOINT_URL=s3.url)()
    assert_failed(result, {"f": r"Odd a\u202eb"})
    assert "\u202e" not in result.output + result.log


# --- The state --------------------------------------------------------------


HOT_JOURNAL = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_spill = 1")
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN IMMEDIATE")
db.execute("CREATE TABLE x AS SELECT zeroblob(1000000) AS b")
db.execute("INSERT INTO x SELECT zeroblob(1000000)")
os._exit(9)
"""


def test_journal_of_a_killed_run_is_not_rolled_back_into_a_new_state(archive, box):
    assert archive().status == 0
    subprocess.run([sys.executable, "-c", HOT_JOURNAL, archive.state_db], check=False)
    assert archive.state_db.with_name(archive.state_db.name + "-journal").exists()
    archive.state_db.unlink()
    write(box.root / "g", SMALL)
    result = archive()
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_what_the_program_writes_is_for_its_user_alone(archive, tmp_path):
    assert archive().status == 0
    written = [archive.state_db, archive.state_db.with_name(archive.state_db.name + ".lock")]
    for path in written:
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0, path


def test_each_part_carries_the_sum_of_what_was_read(archive_of, box, moto):
    """In a header, by which S3 refuses a part whose bytes are others."""
    sums = []

    def keep(exchange):
        sums.append((crc32(exchange.body()), exchange.headers["x-amz-checksum-crc32"]))
        return exchange.forward()

    write(box.root / "large", 6 * MIB)
    with ScriptedS3(moto.url) as s3:
        s3.always("UploadPart", keep)
        assert archive_of(box, AWS_ENDPOINT_URL=s3.url)(constants=SIZES).status == 0
    assert len(sums) == 2
    for summed, header in sums:
        assert int.from_bytes(base64.b64decode(header), "big") == summed


# --- The same second --------------------------------------------------------


def test_file_rewritten_while_s3_takes_its_time_is_archived_by_the_next_run(
    archive_of, box, moto
):
    """In the same second and with the same size, long before S3 acknowledges."""
    path = box.root / "f"
    now, recent = int(time.time()), 4  # s, so that a slow machine has begun to read by then
    write(path, SMALL, mtime=now)

    def rewrite(exchange):
        path.write_bytes(b"!" * SMALL)
        os.utime(path, (now, now))
        # By then the time of the file is no longer recent.
        time.sleep(max(0, now + recent + 1 - time.time()))
        return exchange.forward()

    with ScriptedS3(moto.url) as s3:
        s3.on("PutObject", rewrite, key="f")
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        assert archive(constants={"RECENT": recent}).counts == (1, 0, 0)
        assert archive().counts == (1, 0, 0)
        assert_all_archived(archive, box)
