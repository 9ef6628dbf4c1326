"""S3_EXTRA_ARGS: what is set there reaches each request of S3 that can have it."""

import base64
import hashlib
import json
import re

import pytest
from conftest import MIB, OLD, fill
from faults import SMALL, strict_fixtures
from scripted_s3 import error

LIMIT = 5 * MIB
SMALL_PARTS = {"SMALL_FILE": LIMIT, "PART_SIZE": LIMIT}
LARGE = LIMIT + 1  # two parts
OWNER = "123456789012"  # moto's own account
KEY = "canary-customer-key-of-32-bytes!"


box, s3, archive = strict_fixtures()


@pytest.fixture
def sent(s3):
    """(operation, headers) of each request."""
    requests = []

    def keep(exchange):
        requests.append((exchange.operation, exchange.headers))
        return exchange.forward()

    s3.always(None, keep)
    return requests


def values(sent, header):
    """The values of a header by operation, None for a request without it."""
    found = {}
    for operation, headers in sent:
        found.setdefault(operation, set()).add(headers.get(header))
    return found


def assert_refused(result, *words):
    """One line, status 2; nothing is begun, and no value is shown."""
    assert result.status == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert "S3_EXTRA_ARGS" in result.stderr
    assert [word for word in words if word not in result.stderr] == []
    assert "hush" not in result.output + result.log


# --- What reaches S3 ---

PAIRS = "ServerSideEncryption=aws:kms, SSEKMSKeyId = my-key,Tagging=kind=backup&of=box"
JSON = json.dumps({
    "ServerSideEncryption": "aws:kms",
    "SSEKMSKeyId": "my-key",
    "Tagging": "kind=backup&of=box",
    "ContentDisposition": "attachment, or not",
})  # fmt: skip


@pytest.mark.parametrize("text", [PAIRS, f"  {JSON}"], ids=["pairs", "JSON"])
def test_both_kinds_of_upload_have_the_arguments(archive, box, sent, text):
    fill(box.root, {"small": SMALL, "large": LARGE})

    result = archive(constants=SMALL_PARTS, S3_EXTRA_ARGS=text)

    assert (result.status, result.counts) == (0, (2, 0, 0)), result.output
    expected = {
        "x-amz-server-side-encryption": "aws:kms",
        "x-amz-server-side-encryption-aws-kms-key-id": "my-key",
        "x-amz-tagging": "kind=backup&of=box",
        "x-amz-storage-class": "DEEP_ARCHIVE",  # as ever
        "x-amz-meta-mtime": str(OLD),
    }
    if text is not PAIRS:
        expected["content-disposition"] = "attachment, or not"
    for header, value in expected.items():
        found = values(sent, header)
        assert found["PutObject"] == found["CreateMultipartUpload"] == {value}, header
        # Which neither parts nor listings can have.
        assert found["UploadPart"] == found["ListObjectsV2"] == {None}, header
    archive.assert_invariant()


def test_objects_can_be_locked(archive, box, sent):
    at = {"Bucket": f"{archive.bucket.name}-locked"}
    archive.bucket.client.create_bucket(**at, ObjectLockEnabledForBucket=True)
    fill(box.root, {"small": SMALL, "large": LARGE})
    lock = "ObjectLockMode=COMPLIANCE, ObjectLockRetainUntilDate=2099-12-31T00:00:00Z"

    result = archive(constants=SMALL_PARTS, S3_EXTRA_ARGS=lock, S3_BUCKET=at["Bucket"])

    assert (result.status, result.counts) == (0, (2, 0, 0)), result.output
    for operation in ("PutObject", "CreateMultipartUpload"):
        assert values(sent, "x-amz-object-lock-mode")[operation] == {"COMPLIANCE"}
        [until] = values(sent, "x-amz-object-lock-retain-until-date")[operation]
        assert until.startswith("2099-12-31T00:00:00")
    kept = archive.bucket.client.head_object(**at, Key="small")
    assert kept["ObjectLockMode"] == "COMPLIANCE"


def test_owner_of_the_bucket_is_in_every_request(archive, box, s3, sent, tmp_path):
    archive.settings |= {
        "S3_EXTRA_ARGS": f"ExpectedBucketOwner={OWNER}",
        "STORAGE_CLASS": "STANDARD",
    }
    fill(box.root, {"small": SMALL, "large": LARGE})
    lost = s3.on("UploadPart", error(400, "Odd"))
    s3.rules.insert(0, s3.rules.pop())  # before the one that keeps
    assert archive(constants=SMALL_PARTS).status == 3
    assert lost.fired == 1, "the next run goes on behind what was sent"
    fill(box.root, {"small": SMALL}, mtime=OLD + 5)
    archive.execute("UPDATE objects SET crc32 = NULL")

    again = archive(constants=SMALL_PARTS)
    restored = archive("restore", "--to", tmp_path / "restored", "--yes")

    assert (again.status, again.compared, again.counts[0]) == (0, 1, 1), again.output
    assert restored.status == 0, restored.output
    found = values(sent, "x-amz-expected-bucket-owner")
    operations = {
        *("ListObjectsV2", "PutObject", "CreateMultipartUpload", "UploadPart"),
        *("CompleteMultipartUpload", "ListParts", "HeadObject", "GetObject"),
    }
    assert operations <= found.keys()
    assert found == {operation: {OWNER} for operation in found}


def test_customer_key_is_in_each_request_about_content_and_in_no_output(
    archive, box, s3, sent, tmp_path
):
    text = base64.b64encode(KEY.encode()).decode()
    archive.secrets += [KEY, text]
    archive.settings |= {
        "S3_EXTRA_ARGS": f"SSECustomerAlgorithm=AES256, SSECustomerKey={KEY}",
        "STORAGE_CLASS": "STANDARD",
    }
    fill(box.root, {"small": SMALL, "large": LARGE})
    assert archive("-v", constants=SMALL_PARTS).counts == (2, 0, 0)
    fill(box.root, {"small": SMALL}, mtime=OLD + 5)
    archive.execute("UPDATE objects SET crc32 = NULL")

    assert archive("-v").compared == 1
    restored = archive("-v", "restore", "--to", tmp_path / "restored", "--yes")

    assert restored.status == 0, restored.output
    assert archive("-v", "check").status == 0
    uploads = "CreateMultipartUpload", "UploadPart", "ListParts"
    for operation in ("PutObject", *uploads, "HeadObject"):
        header = "x-amz-server-side-encryption-customer-key"
        assert values(sent, header)[operation] == {text}, operation
    header = "x-amz-server-side-encryption-customer-key-md5"
    md5 = base64.b64encode(hashlib.md5(KEY.encode()).digest()).decode()
    assert values(sent, header)["GetObject"] == values(sent, header)["ListParts"] == {md5}
    assert values(sent, header)["ListObjectsV2"] == {None}


@pytest.mark.parametrize("echo", [KEY, base64.b64encode(KEY.encode()).decode()])
def test_customer_key_that_s3_echoes_is_not_shown(archive, box, s3, echo):
    archive.secrets.append(echo)
    fill(box.root, {"small": SMALL})
    s3.always("PutObject", error(400, "Odd", f"what is {echo}?"))

    extra = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": KEY}
    result = archive("-v", S3_EXTRA_ARGS=json.dumps(extra))

    assert result.failures == ["./small: S3 refused PutObject: Odd what is ***?"]


def test_check_tries_an_upload_with_the_arguments(archive, s3, sent):
    extra = "ServerSideEncryption=aws:kms,SSEKMSKeyId=no-such-key"

    assert archive("check", S3_EXTRA_ARGS=extra).status == 0
    header = "x-amz-server-side-encryption-aws-kms-key-id"
    assert values(sent, header)["CreateMultipartUpload"] == {"no-such-key"}

    s3.rules.clear()
    s3.always("CreateMultipartUpload", error(400, "KMS.NotFoundException", "no such key"))
    result = archive("check", S3_EXTRA_ARGS=extra)
    assert result.status == 1
    assert re.search("^WRONG  s3:PutObject: .*no such key", result.stdout, re.MULTILINE)
    assert archive.bucket.uploads() == archive.bucket.list() == []


# --- What is refused ---

BAD = [
    # What the program sets itself.
    *("StorageClass=STANDARD", "Metadata=hush", "ChecksumAlgorithm=SHA256"),
    *("ChecksumCRC32=hush==", "ChecksumType=COMPOSITE", "MpuObjectSize=1"),
    *("NoSuchName=hush", "tagging=hush", "Body=hush", "Key=hush"),
    *("hush", "Tagging", "Tagging=", "=hush", "SSECustomerKey", "="),
    # A comma within a value: what is behind it is no name, and perhaps a secret.
    *("SSECustomerKey=ab,hush", "SSECustomerKey=ab,hush=", "SSECustomerKey=hush\nhush"),
    *("{", "{hush}", '{"Tagging": 1}', '{"Tagging": ""}', '{"Tagging": null}'),
    *('{"NoSuch": "hush"}', '{"Tagging": ["hush"]}', '{"SSECustomerKey": "hush" "x"}', "[]"),
    *('{"Tagging": "hush\\nhush"}', '{"Tagging": "hush\\u0000"}', '{"Tagging": "h\\u00fcsh"}'),
    *("Tagging=hush\r\nX: hush", "Tagging=hüsh"),
]


@pytest.mark.parametrize("text", BAD)
def test_arguments_that_are_none_are_refused_without_their_values(archive, s3, text):
    assert_refused(archive(S3_EXTRA_ARGS=text))

    assert s3.requests.total() == archive.box.connections == 0


def test_refusal_names_what_can_be_set(archive):
    for text in ("NoSuchName=hush", '{"NoSuchName": "hush"}'):
        named = ("expected name=value", "SSEKMSKeyId", "Tagging", "ObjectLockMode")
        assert_refused(archive(S3_EXTRA_ARGS=text), *named)
    result = archive(S3_EXTRA_ARGS="NoSuchName=hush")
    for name in ("StorageClass", "Metadata", "Checksum"):
        assert name not in result.stderr
