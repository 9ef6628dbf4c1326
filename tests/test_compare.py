"""Files that are compared with what S3 holds, and uploaded only if they differ."""

import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path

import moto.s3.models
import pytest
from conftest import MIB, OLD, PROGRAM, fill, tree
from faults import (
    LARGE,
    SEED,
    SIZES,
    SMALL,
    assert_all_archived,
    assert_failed,
    max_runtime_at,
    recorded,
    strict_fixtures,
    wait_for,
    write,
)
from faulty_sftp import drop, freeze, honest
from faulty_sftp import first as first_on_box
from scripted_s3 import error, first, hang, headers, reset, rewritten, whole_object

KIB = 2**10
WRITES = {"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}

# By the default limits: two that are sent with one PUT here, and one in parts. boto3 and
# the AWS CLI send the last two in parts.
FOREIGN = {"small": SMALL, "folder/8 MiB": 8 * MIB, "17 MiB": 17 * MIB}


box, s3, archive = strict_fixtures()


def forget_counts(box, s3):
    """Count anew from here on."""
    s3.requests.clear()
    s3.about.clear()
    s3.received = box.handed_out = 0
    box.opened.clear()


def touch(root, mtime):
    """Give all files that time of modification."""
    for path in tree(root):
        os.utime(os.path.join(os.fsencode(root), path), (mtime, mtime))


def size_of(root):
    """Bytes of all files."""
    return sum(size for size, _ in tree(root).values())


def flip(path, at=-1, mtime=OLD + 9):
    """Change one byte of a file, the last one if not told, and its time."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, (mtime, mtime))


def assert_nothing_sent(result, s3, compared):
    """The run has compared so many files, and sent not one byte."""
    assert (result.status, result.failures) == (0, []), result.stderr
    assert (result.counts[0], result.compared) == (0, compared), result.stdout
    assert result.summary["Bytes uploaded"] == 0
    assert s3.requests.keys().isdisjoint(WRITES)
    assert s3.received == 0


def assert_settled(archive, box, s3, **settings):
    """The next run skips all files without a request to S3 and without reading a file."""
    forget_counts(box, s3)
    files = tree(box.root)
    result = archive(**settings)
    assert (result.status, result.counts, result.compared) == (0, (0, len(files), 0), 0)
    assert s3.requests.total() == 0
    assert not any(box.opened[path] for path in files)


def assert_rows_name_the_content(archive, box):
    """Each row has the size and mtime of the file, and its CRC-32 or none."""
    rows = archive.query("SELECT path, size, mtime, crc32 FROM files JOIN objects USING (path)")
    there = tree(box.root)
    assert {os.fsencode(path[2:]) for path, *_ in rows} == there.keys()
    for path, size, mtime, crc in rows:
        held_size, held_crc = there[os.fsencode(path[2:])]
        assert size == held_size, path
        assert mtime == int((box.root / path[2:]).stat().st_mtime), path
        assert crc in (None, held_crc), path


def in_parts_of(bucket):
    """How many objects were uploaded in parts."""
    return sum("-" in entry["ETag"] for entry in bucket.list())


# --- Only touched -----------------------------------------------------------


def test_files_that_were_only_touched_are_compared_and_not_sent(archive, box, s3):
    """A new box that was filled by `rsync` without `-t` looks like this."""
    sizes = (0, 1, SMALL, MIB - 1, MIB, 5 * MIB, LARGE, 10 * MIB)
    fill(box.root, {f"d{size % 3}/{size}": size for size in sizes})
    before = archive(constants=SIZES)
    assert before.counts == (len(sizes), 0, 0)
    assert "Compared files" not in before.stdout, "shown only where it is not 0"
    archive.execute("UPDATE files SET uploaded_at = ?", OLD + 1)
    touch(box.root, OLD + 9)

    plan = json.loads(archive("plan", "--json", constants=SIZES).stdout)
    text = archive("plan", constants=SIZES).stdout
    forget_counts(box, s3)
    result = archive(constants=SIZES)

    assert plan["to_compare"] == {"files": len(sizes), "bytes": sum(sizes)}
    assert (plan["new_files"], plan["changed_files"]) == ({"files": 0, "bytes": 0},) * 2
    parts = in_parts_of(archive.bucket)
    assert +Counter(plan["requests"]) == {"head": parts}
    assert re.search(f"^To compare +: {len(sizes)} ", text, re.MULTILINE)
    assert_nothing_sent(result, s3, compared=len(sizes))
    assert s3.requests == {"HeadObject": parts}, "the state knows all but the size of parts"
    assert box.handed_out == sum(sizes), "each is read once"
    assert_all_archived(archive, box)
    assert_rows_name_the_content(archive, box)
    # And still after this: the content, and the age, which an early deletion is charged by.
    assert archive.query("SELECT path FROM objects WHERE crc32 IS NULL") == []
    assert archive.query("SELECT DISTINCT uploaded_at FROM files") == [(OLD + 1,)]
    assert archive.query("SELECT DISTINCT storage_class FROM objects") == [("DEEP_ARCHIVE",)]
    assert_settled(archive, box, s3, constants=SIZES)


def test_progress_bar_counts_files_that_are_compared(archive, box):
    fill(box.root, {"a": 1_000, "b": 3_000})
    assert archive().status == 0
    touch(box.root, OLD + 5)
    terminal, theirs = pty.openpty()
    size = struct.pack("4H", 24, 80, 0, 0)  # or nothing is drawn
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    command = [sys.executable, PROGRAM, "--env-file", archive.env_file]
    environment = archive.environment(TQDM_MININTERVAL="0")
    subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=theirs)
    drawn = os.read(terminal, 100_000).decode()
    os.close(theirs)
    os.close(terminal)
    assert "all files: 100%" in drawn


@pytest.mark.parametrize("state", ["kept", "lost"])
def test_file_that_changed_with_its_size_kept_is_sent(archive, box, s3, state):
    """One byte is another: in a small file, in the first part of a large one, in its last."""
    names = ("small", "first part", "last part")
    for name in (*names, "touched"):
        write(box.root / name, SMALL if name == "small" else LARGE)
    archive(constants=SIZES)
    touch(box.root, OLD + 9)
    flip(box.root / "small")
    flip(box.root / "first part", at=0)
    flip(box.root / "last part")
    if state == "lost":
        archive.state_db.unlink()

    result = archive(constants=SIZES)

    assert (result.status, result.counts, result.compared) == (0, (3, 0, 0), 1)
    assert_all_archived(archive, box)


@pytest.mark.parametrize("touched", [True, False], ids=["touched", "as it was"])
def test_lost_state_costs_a_head_for_each_file_and_no_upload(archive, box, s3, touched):
    for number in range(12):
        write(box.root / f"d{number % 3}" / f"f{number}", LARGE if number % 6 == 0 else SMALL)
    archive(constants=SIZES)
    archive.state_db.unlink()
    if touched:
        touch(box.root, OLD + 9)
    forget_counts(box, s3)

    result = archive(constants=SIZES)

    assert_nothing_sent(result, s3, compared=12)
    heads = 12 + (in_parts_of(archive.bucket) if touched else 0)
    assert s3.requests == {"ListObjectsV2": 1, "HeadObject": heads}
    assert box.handed_out == (size_of(box.root) if touched else 0)
    assert_all_archived(archive, box)
    assert_settled(archive, box, s3, constants=SIZES)


def test_file_written_just_now_is_compared_by_the_next_run(archive, box, s3):
    """It may be rewritten within the same second, as half of them are here. The listing says
    that they were written just now, whenever that is."""
    sizes = {
        "small": SMALL,
        "large": LARGE,
        "small, rewritten": SMALL,
        "large, rewritten": LARGE,
    }
    rewritten_ones = {name for name in sizes if "rewritten" in name}
    times = []

    def change():
        times[:] = [int(time.time())] * 2
        for name in sizes:
            os.utime(box.root / name, tuple(times))

    for name, size in sizes.items():
        write(box.root / name, size)
    box.on("OPENDIR", None, first_on_box(change))
    recent = {**SIZES, "RECENT": 60}  # s, so that a slow machine reads them within that time
    assert archive(constants=recent).counts == (4, 0, 0)
    assert archive.rows() == {f"./{name}": (size, None) for name, size in sizes.items()}
    for name in rewritten_ones:
        flip(box.root / name, mtime=times[0])
    forget_counts(box, s3)

    result = archive(constants=recent)

    assert (result.status, result.counts, result.compared) == (0, (2, 0, 0), 2)
    sent = {key for operation, key in s3.about if operation in WRITES}
    assert sent == rewritten_ones
    assert {mtime for _, mtime in archive.rows().values()} == {None}, "it may happen again"
    wait_for(lambda: time.time() > times[0] + 3)
    assert archive(constants=SIZES).counts[0] == 0
    assert_all_archived(archive, box)


# --- What another program has stored ------------------------------------------


def with_rclone(bucket, root, *flags):
    """Store a folder with rclone."""
    program = Path(sys.executable).with_name("rclone")
    settings = bucket.settings()
    environment = {
        "PATH": os.environ["PATH"],
        "RCLONE_CONFIG": "",  # in memory only
        "RCLONE_S3_PROVIDER": "Other",
        "RCLONE_S3_ENDPOINT": settings["AWS_ENDPOINT_URL"],
        "RCLONE_S3_REGION": settings["AWS_REGION"],
        "RCLONE_S3_ACCESS_KEY_ID": settings["AWS_ACCESS_KEY_ID"],
        "RCLONE_S3_SECRET_ACCESS_KEY": settings["AWS_SECRET_ACCESS_KEY"],
    }
    command = [program, "copy", root, f":s3:{bucket.name}", "--s3-no-check-bucket", *flags]
    subprocess.run(command, env=environment, check=True, timeout=60)


def with_boto3(bucket, root, mtime=None):
    """Store a folder with boto3's upload_file, by its defaults; this is also how the AWS CLI
    sends."""
    extra = {"Metadata": {"mtime": str(mtime)}} if mtime else None
    for path in tree(root):
        name = os.path.join(os.fsdecode(root), os.fsdecode(path))
        bucket.client.upload_file(name, bucket.name, os.fsdecode(path), extra)


STORED_BY = {
    "rclone": with_rclone,
    "rclone in parts of 5 MiB": lambda bucket, root: with_rclone(
        bucket, root, "--s3-upload-cutoff=5M", "--s3-chunk-size=5M"
    ),
    "boto3": with_boto3,
    "boto3 with mtime": lambda bucket, root: with_boto3(bucket, root, OLD),
}


def composite(exchange):
    """Answer to HEAD with the checksum of parts as S3 writes it; moto leaves out their
    number, so that it looks like that of the whole object."""
    answer, checksum = exchange.forward(), "x-amz-checksum-crc32"
    count = answer.headers["etag"].strip('"').partition("-")[2]
    if count and checksum in answer.headers:
        answer.headers[checksum] += f"-{count}"
    return answer


@pytest.mark.parametrize("program", STORED_BY)
def test_objects_of_another_program_are_compared_and_not_paid_for_again(
    archive, box, s3, bucket, program
):
    """Those with the file's mtime in their metadata are not even read, until they are
    touched and the state is lost as well."""
    fill(box.root, FOREIGN, mtime=OLD + 0.75)  # rclone keeps the fraction
    STORED_BY[program](bucket, box.root)
    stored = {entry["Key"]: entry["ETag"] for entry in bucket.list()}
    assert stored.keys() == FOREIGN.keys()
    s3.always("HeadObject", composite)
    has_mtime = program.startswith("rclone") or "mtime" in program

    for touched in (False, True):
        if touched:
            touch(box.root, OLD + 9)
            archive.state_db.unlink()
        forget_counts(box, s3)

        result = archive()

        assert_nothing_sent(result, s3, compared=len(FOREIGN))
        read = touched or not has_mtime
        heads = len(FOREIGN) + (in_parts_of(bucket) if read else 0)
        assert s3.requests == {"ListObjectsV2": 1, "HeadObject": heads}
        assert box.handed_out == (size_of(box.root) if read else 0)
        assert_rows_name_the_content(archive, box)
    assert {entry["Key"]: entry["ETag"] for entry in bucket.list()} == stored
    assert_settled(archive, box, s3)


@pytest.mark.parametrize(
    ("age", "read", "changed"), [(30, True, True), (30, True, False), (120, False, False)]
)
def test_object_stored_within_a_minute_of_its_mtime_is_read_and_compared(
    archive, box, s3, bucket, age, read, changed
):
    """The file may have changed again within the second that the metadata tell."""
    mtime = int(time.time()) - age
    fill(box.root, {"file": SMALL}, mtime)
    with_boto3(bucket, box.root, mtime)
    if changed:
        flip(box.root / "file", mtime=mtime)
    forget_counts(box, s3)

    result = archive()

    if changed:
        assert (result.status, result.counts, result.compared) == (0, (1, 0, 0), 0)
    else:
        assert_nothing_sent(result, s3, compared=1)
    assert box.opened[b"file"] == int(read)
    assert archive.contents() == {"file": (box.root / "file").read_bytes()}


def test_mtime_in_the_metadata_that_is_none_or_another_has_the_file_read(
    archive, box, s3, bucket
):
    for number, told in enumerate(("", "yesterday", "nan", "1e9", "9" * 30, str(OLD + 1))):
        fill(box.root, {str(number): SMALL})
        bucket.client.put_object(
            Bucket=bucket.name,
            Key=str(number),
            Body=(box.root / str(number)).read_bytes(),
            Metadata={"mtime": told},
        )
    forget_counts(box, s3)

    assert_nothing_sent(archive(), s3, compared=6)

    assert box.handed_out == 6 * SMALL


# --- ETags --------------------------------------------------------------------

NO_MD5 = {
    "encrypted": "7f138a09169b250e9dcb378140907378",
    "encrypted, in parts": "7f138a09169b250e9dcb378140907378-2",
    "other text": "CJ-not-hexadecimal",
    "empty": "",
}


def test_files_whose_etag_is_no_md5_are_sent(archive, box, s3):
    """As by HEAD, when the state was lost."""
    for name, etag in NO_MD5.items():
        for size in (SMALL, LARGE):
            fill(box.root, {f"{name} {size}": size})
            s3.always("HeadObject", headers(etag=f'"{etag}"'), key=f"{name} {size}")
    archive(constants=SIZES)
    archive.state_db.unlink()
    touch(box.root, OLD + 9)

    result = archive(constants=SIZES)

    expected = (0, (2 * len(NO_MD5), 0, 0), 0)
    assert (result.status, result.counts, result.compared) == expected, result.stderr
    assert_all_archived(archive, box)


def test_takeover_that_was_ended_goes_on_with_a_head_for_each_file(archive, box, s3):
    """Reading a file would not show that it is there: the ETag is no MD5."""
    fill(box.root, {f"f{number}": SMALL for number in range(10)})
    assert archive().counts == (10, 0, 0)
    archive.state_db.unlink()
    stuck = s3.on("HeadObject", hang, nth=3)
    s3.always("HeadObject", headers(etag=f'"{NO_MD5["encrypted"]}"'))
    running = archive.start(TRANSFERS="1")
    wait_for(lambda: stuck.fired)
    running.process.terminate()
    assert running.wait().status == 143
    forget_counts(box, s3)

    result = archive()

    assert (result.status, result.counts[0]) == (0, 0), result.stderr
    assert result.compared >= 8
    assert not any(box.opened[name] for name in box.opened if name.startswith(b"f"))


def test_file_whose_upload_was_answered_with_no_md5_is_sent_when_it_was_touched(
    archive, box, s3
):
    """As by SSE-KMS: all ETags are others, in answers to uploads and in the listing."""
    other = NO_MD5["encrypted"]
    s3.always("PutObject", headers(etag=f'"{other}"'))
    s3.always(
        "CompleteMultipartUpload",
        rewritten(lambda body: re.sub(rb"[0-9a-f]{32}-\d+", other.encode(), body)),
    )
    fill(box.root, {"small": SMALL, "large": LARGE})
    assert archive(constants=SIZES).status == 0
    assert {etag for (etag,) in archive.query("SELECT etag FROM objects")} == {other}
    assert_settled(archive, box, s3, constants=SIZES)
    touch(box.root, OLD + 9)

    result = archive(constants=SIZES)

    assert (result.status, result.counts, result.compared) == (0, (2, 0, 0), 0)
    assert_all_archived(archive, box)


@pytest.mark.parametrize("part_size", [8 * MIB + 1, 2 * MIB, 10_000_000])
def test_parts_of_an_unusual_size_are_recognised(
    archive, box, s3, bucket, monkeypatch, part_size
):
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    fill(box.root, {"same": 20 * MIB, "other": 20 * MIB})
    in_parts(bucket, "same", (box.root / "same").read_bytes(), part_size)
    in_parts(bucket, "other", (box.root / "other").read_bytes()[::-1], part_size)
    forget_counts(box, s3)

    result = archive()

    assert (result.status, result.counts, result.compared) == (0, (1, 0, 0), 1)
    assert box.handed_out == 60 * MIB
    assert_rows_name_the_content(archive, box)


@pytest.mark.parametrize("part_size", [8 * MIB + 1, 2 * MIB], ids=["may fit", "cannot fit"])
def test_server_that_does_not_tell_the_size_of_parts_gets_unusual_ones_again(
    archive, box, s3, bucket, monkeypatch, part_size
):
    """Of 20 MiB, parts of 8 MiB and a byte are as many as of 8 MiB, so the file is read to
    be compared. Ten are more than there can be of a usual size: it is not read in vain."""
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    fill(box.root, {"file": 20 * MIB, "usual": 20 * MIB})
    in_parts(bucket, "file", (box.root / "file").read_bytes(), part_size)
    in_parts(bucket, "usual", (box.root / "usual").read_bytes(), 8 * MIB)
    s3.always("HeadObject", whole_object)
    forget_counts(box, s3)

    result = archive()

    assert (result.status, result.counts, result.compared) == (0, (1, 0, 0), 1)
    assert box.handed_out == (60 if part_size > 8 * MIB else 40) * MIB
    assert_rows_name_the_content(archive, box)


def test_server_that_refuses_to_tell_the_size_of_parts_does_no_harm(archive, box, s3):
    """Of files that were touched, and of one that has changed: with another key of SSE-C, S3
    refuses a HEAD."""
    codes = {f"touched-{code}": code for code in (400, 403, 404, 405, 412, 416, 501)}
    codes["changed"] = 400
    fill(box.root, dict.fromkeys(codes, LARGE))
    archive(constants=SIZES)
    touch(box.root, OLD + 9)
    flip(box.root / "changed")
    for name, code in codes.items():
        s3.always("HeadObject", error(code, "Refused"), key=name)

    result = archive(constants=SIZES)

    assert (result.status, result.counts, result.compared) == (0, (1, 0, 0), 7), result.stderr
    assert_all_archived(archive, box)


def test_empty_object_that_was_sent_in_parts_is_compared(archive, box, s3, bucket):
    fill(box.root, {"empty": 0})
    at = {"Bucket": bucket.name, "Key": "empty"}
    at["UploadId"] = bucket.client.create_multipart_upload(**at)["UploadId"]
    etag = bucket.client.upload_part(**at, PartNumber=1, Body=b"")["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    bucket.client.complete_multipart_upload(**at, MultipartUpload=parts)
    forget_counts(box, s3)

    assert_nothing_sent(archive(), s3, compared=1)


def test_etags_of_the_usual_part_sizes_are_recognised(archive, box, s3, bucket, monkeypatch):
    """With a server that does not tell them. Everything a thousandth as large, in KiB for MiB:
    8 MiB and its doubles, and of ten parts on 5, 6 and 7 MiB and theirs, which fewer parts
    leave in doubt; for sizes at random and those around whole parts."""
    print(f"TEST_SEED={SEED}")
    lots = random.Random(SEED)
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    sizes = "archive.PART_SIZES = [size // 1024 for size in archive.PART_SIZES]"
    scaled = {"SMALL_FILE": 48 * KIB, "PART_SIZE": 16 * KIB, "COMPARE_BLOCK": KIB}
    for number in range(40):
        part = (5, 6, 7, 8, 10, 12, 14, 16, 20, 32)[number % 10] * KIB
        fewest = 1 if part in (8 * KIB, 16 * KIB, 32 * KIB) else 10
        whole = lots.randrange(fewest, fewest + 8) * part
        drawn = lots.randrange((fewest - 1) * part + 1, (fewest + 8) * part)
        size = lots.choice([drawn, whole, whole - 1, whole + 1])
        fill(box.root, {f"{number} of {part}": size})
        content = (box.root / f"{number} of {part}").read_bytes()
        in_parts(bucket, f"{number} of {part}", content, part)
    s3.always("HeadObject", whole_object)
    forget_counts(box, s3)

    result = archive.start(constants=scaled, before=sizes).wait()

    assert_nothing_sent(result, s3, compared=40)
    assert box.handed_out == size_of(box.root)
    assert_rows_name_the_content(archive, box)


def in_parts(bucket, key, content, *sizes):
    """Store an object in parts of these sizes, the last of them again and again."""
    at = {"Bucket": bucket.name, "Key": key}
    at["UploadId"] = bucket.client.create_multipart_upload(**at)["UploadId"]
    parts, sizes = [], list(sizes)
    while content:
        number, size = len(parts) + 1, sizes.pop(0) if len(sizes) > 1 else sizes[0]
        answer = bucket.client.upload_part(**at, PartNumber=number, Body=content[:size])
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        content = content[size:]
    bucket.client.complete_multipart_upload(**at, MultipartUpload={"Parts": parts})


def test_parts_of_rclones_largest_files_are_recognised(archive, box, s3, bucket):
    """It makes them as small as 10,000 of whole MiB can be. Here two take that place."""
    fill(box.root, {"file": 17 * MIB})
    in_parts(bucket, "file", (box.root / "file").read_bytes(), 9 * MIB)
    forget_counts(box, s3)

    assert_nothing_sent(archive(constants={"MAX_PARTS": 2}), s3, compared=1)


def test_parts_of_different_sizes_lead_to_an_upload(archive, box, s3, bucket):
    """As many as of 5 MiB, but the first is a byte larger."""
    fill(box.root, {"file": 14 * MIB})
    in_parts(bucket, "file", (box.root / "file").read_bytes(), 5 * MIB + 1, 5 * MIB)

    result = archive(constants=SIZES)

    assert (result.status, result.counts, result.compared) == (0, (1, 0, 0), 0)
    assert_all_archived(archive, box)


# --- Faults while files are compared --------------------------------------------


def test_object_that_is_another_since_the_listing_leads_to_an_upload(archive, box, s3, bucket):
    """Half of them are deleted, the others replaced."""
    sizes = {f"{size}, {how}": size for size in (SMALL, LARGE) for how in ("gone", "other")}
    fill(box.root, sizes)
    archive(constants=SIZES)
    archive.execute("UPDATE files SET mtime = NULL")
    archive.execute("UPDATE objects SET crc32 = NULL")
    for key in sizes:
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
        if "other" in key:
            told = {"mtime": str(OLD)}
            bucket.client.put_object(
                Bucket=bucket.name, Key=key, Body=b"another", Metadata=told
            )

    result = archive(constants=SIZES)

    assert (result.status, result.counts, result.compared) == (0, (4, 0, 0), 0)
    assert_all_archived(archive, box)


def test_file_that_changes_while_it_is_compared_is_not_recorded(archive, box, s3):
    sizes = {"small": SMALL, "large": LARGE}
    for name, size in sizes.items():
        write(box.root / name, size)
    archive(constants=SIZES)
    touch(box.root, OLD + 9)

    def change(request):
        reply = honest(request)
        flip(box.root / os.fsdecode(request.path), mtime=OLD + 99)
        return reply

    for name in sizes:
        box.on("READ", name.encode(), change)
    result = archive(constants=SIZES)

    assert_failed(result, dict.fromkeys(sizes, "changed while it was read"))
    assert archive.rows() == {f"./{name}": (size, None) for name, size in sizes.items()}

    again = archive(constants=SIZES)

    assert (again.status, again.counts) == (0, (2, 0, 0))
    assert_all_archived(archive, box)


def test_comparison_goes_on_over_a_new_connection(archive, box, s3):
    write(box.root / "large", LARGE)
    archive(constants=SIZES)
    touch(box.root, OLD + 9)
    forget_counts(box, s3)
    box.on("READ", b"large", drop, nth=5)

    assert_nothing_sent(archive(constants=SIZES), s3, compared=1)

    assert box.connections == 3
    assert_all_archived(archive, box)


def test_small_file_whose_comparison_was_cut_off_is_just_compared_by_the_next_run(
    archive, box, s3
):
    write(box.root / "small", SMALL)
    archive()
    touch(box.root, OLD + 9)
    stuck = box.on("READ", None, freeze)
    running = archive.start()
    wait_for(lambda: stuck.fired)
    running.process.send_signal(signal.SIGTERM)
    assert running.wait(timeout=15).status == 143
    forget_counts(box, s3)

    assert_nothing_sent(archive(), s3, compared=1)

    assert s3.requests == {"HeadObject": 1}


def test_run_that_is_killed_leaves_few_of_the_changed_files_in_doubt(archive, box, s3):
    """Of those, the next run asks S3, MAX_CHANGED sees only the size, and verify no ETag."""
    for n in range(100):
        write(box.root / f"f{n:02}", SMALL)
    assert archive().status == 0
    for n in range(100):
        write(box.root / f"f{n:02}", SMALL + 1)
    s3.on("PutObject", first(archive.kill, reset), nth=5)

    assert archive(TRANSFERS=2).status == -signal.SIGKILL

    assert 0 < [mtime for _, mtime, *_ in recorded(archive).values()].count(None) <= 16


@pytest.mark.parametrize(("how", "state"), [("MAX_RUNTIME", "lost"), ("SIGTERM", "kept")])
def test_comparison_that_was_cut_off_is_not_begun_again(archive, box, s3, tmp_path, how, state):
    """Or perhaps it would be every night. The next run uploads the file; one whose
    comparison was not begun is compared."""
    write(box.root / "a", LARGE)
    write(box.root / "b", LARGE)
    archive(constants=SIZES)
    touch(box.root, OLD + 9)
    if state == "lost":
        archive.state_db.unlink()
    one_by_one = {"constants": SIZES, "TRANSFERS": "1"}

    if how == "SIGTERM":
        stuck = box.on("READ", None, freeze)
        running = archive.start(**one_by_one)
        wait_for(lambda: stuck.fired)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(timeout=15).status == 143
    else:
        sign = tmp_path / "over"
        box.on("READ", None, first_on_box(sign.touch, freeze))
        cut_off = archive.start(**max_runtime_at(sign), **one_by_one).wait()
        assert (cut_off.status, cut_off.counts) == (3, (0, 0, 0)), cut_off.stderr
    assert {mtime for _, mtime in archive.rows().values()} == {None}

    forget_counts(box, s3)
    result = archive(**one_by_one)

    assert (result.status, result.counts, result.compared) == (0, (1, 0, 0), 1)
    assert (s3.requests["CreateMultipartUpload"], s3.requests["UploadPart"]) == (1, 2)
    assert box.handed_out == 2 * LARGE, "each is read once"
    assert_all_archived(archive, box)
