"""What a hostile box, S3, file or neighbour may try; found in reviews."""

import base64
import os
import stat
import time
from zlib import crc32

import pytest
from conftest import MIB, SNAPSHOT
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
    "form",
    [
        "@revoked {} {}",
        "@revoked\t{}  {}",
        "@revoked * {1}",
        "@revoked *.your-storagebox.de {1}",
        "@revoked other.example.com {1}",
    ],
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


@pytest.mark.parametrize("entries", [(), ((b".", FOLDER), (b"..", FOLDER))])
def test_listing_that_never_ends_fails_its_folder_alone(archive, box, entries):
    write(box.root / "endless" / "f", SMALL)
    box.always("READDIR", b"endless", names(*entries))
    result = archive()
    assert_failed(result, {"endless": "a listing that does not end"})
    assert set(archive.objects()) == {"f"}


def test_max_runtime_ends_a_walk_that_finds_nothing_new(archive, box):
    for number in range(300):
        (box.root / f"empty{number}").mkdir()
    result = archive(constants={"LISTINGS_AT_ONCE": 1}, MAX_RUNTIME="0s")
    assert result.status == 3
    assert "MAX_RUNTIME" in result.stderr
    assert box.requests["OPENDIR"] < 300


def test_folders_are_followed_only_to_a_depth_that_a_system_can_open(archive, box):
    write(box.root / "a" / "b" / "f", SMALL)
    write(box.root / ("deep" * 10) / "f", SMALL)
    result = archive(constants={"MAX_PATH_BYTES": 20})
    assert result.status == 3
    assert "no file can have this name" in result.stderr
    assert set(archive.objects()) == {"f", "a/b/f"}


def test_name_that_is_listed_twice_is_one_object(archive, box):
    found = Attributes(mode=stat.S_IFREG | 0o644, size=SMALL, mtime=1_700_000_000)
    box.on("READDIR", b".", names((b"f", found), (b"f", found)))
    result = archive(constants={"PAGE": 1})
    assert result.status == 0, result.stderr
    assert_all_archived(archive, box)


def test_handle_of_a_lost_connection_is_never_closed_on_the_next(archive, box):
    """There it may be another file's, which would be read in its place."""
    write(box.root / "large", 6 * MIB)
    lost = box.on("READ", b"large", drop)
    refused = box.on("OPEN", b"large", status(PERMISSION_DENIED), nth=2)
    result = archive(constants=SIZES)
    assert_failed(result, {"large": "denies permission"})
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
        s3.always("PutObject", error(400, "Odd", "a&#x202e;b&#x1b;[2J"))
        result = archive_of(box, AWS_ENDPOINT_URL=s3.url)()
    assert result.status == 3
    assert "\u202e" not in result.output + result.log


# --- The state --------------------------------------------------------------


def test_snapshot_of_more_than_one_part_is_stored_and_taken_back(archive, bucket):
    assert archive().status == 0
    archive.execute("CREATE TABLE ballast AS SELECT zeroblob(?) AS bytes", 9 * MIB)
    write(archive.box.root / "g", SMALL)
    assert archive().status == 0
    assert len(bucket.content(SNAPSHOT)) > 9 * MIB
    archive.state_db.unlink()
    result = archive()
    assert (result.status, result.counts) == (0, (0, 2, 0))


def test_journal_of_a_killed_run_is_not_rolled_back_into_the_snapshot(archive, box):
    assert archive().status == 0
    journal = archive.state_db.with_name(archive.state_db.name + "-journal")
    write(box.root / "g", SMALL)
    killed = archive.start(
        before="import os\n"
        "commit = archive.State._commit\n"
        "def die(self, *statements):\n"
        "    if 'INTO files' in statements[0][0]:\n"
        "        self._db.execute('PRAGMA cache_spill = 1')\n"
        "        self._db.execute('PRAGMA cache_size = 1')\n"
        "        self._db.execute('BEGIN IMMEDIATE')\n"
        "        self._db.execute('CREATE TABLE x AS SELECT zeroblob(1000000) AS b')\n"
        "        self._db.execute('INSERT INTO x SELECT zeroblob(1000000)')\n"
        "        os._exit(9)\n"
        "    commit(self, *statements)\n"
        "archive.State._commit = die"
    )
    killed.wait()
    assert journal.exists()
    archive.state_db.unlink()
    result = archive()
    assert result.status == 0, result.stderr
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


def test_snapshot_that_failed_is_stored_by_the_next_run_though_nothing_is_new(
    archive_of, box, moto, bucket
):
    write(box.root / "f", SMALL)
    with ScriptedS3(moto.url) as s3:
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        refusal = s3.on("PutObject", error(400, "Odd"), key=SNAPSHOT)
        assert archive().status == 3
        assert refusal.fired == 1
        result = archive()
    assert (result.status, result.counts) == (0, (0, 1, 0))
    assert bucket.content(SNAPSHOT)


# --- The same second --------------------------------------------------------


def test_file_rewritten_while_s3_takes_its_time_is_archived_by_the_next_run(
    archive_of, box, moto
):
    """In the same second and with the same size, long before S3 acknowledges."""
    path = box.root / "f"
    now = int(time.time())
    write(path, SMALL, mtime=now)

    def rewrite(exchange):
        path.write_bytes(b"!" * SMALL)
        os.utime(path, (now, now))
        time.sleep(8)  # by when the time of the file is no longer recent
        return exchange.forward()

    with ScriptedS3(moto.url) as s3:
        s3.on("PutObject", rewrite, key="f")
        archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
        # Six seconds, so that a slow machine has begun to read by then.
        assert archive(constants={"RECENT": 6}).counts == (1, 0, 0)
        assert archive().counts == (1, 0, 0)
        assert_all_archived(archive, box)
