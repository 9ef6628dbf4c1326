"""`check`: everything that a run needs, tried one by one, with the remedy for what is wrong."""

import contextlib
import os
import re
import socket
import sqlite3
import threading
from urllib.parse import unquote

import asyncssh
import pytest
from conftest import fill, tree
from scripted_s3 import error
from servers import SECRET_KEY

# The request that each permission is tried with.
PERMISSIONS = {
    "s3:ListBucket": "ListObjectsV2",
    "s3:GetObject": "HeadObject",
    "s3:ListBucketMultipartUploads": "ListMultipartUploads",
    "s3:ListMultipartUploadParts": "ListParts",
    "s3:AbortMultipartUpload": "AbortMultipartUpload",
    "s3:PutObject": "CreateMultipartUpload",
}
FEW_TRIES = {"RECONNECT_PAUSES": (0,)}  # for a run; check tries once

# Lets the box be reached under a port that a test may not listen on.
OTHER_PORT = """
import socket
real = socket.create_connection
socket.create_connection = lambda address, *rest: real(("127.0.0.1", {}), *rest)
"""


@pytest.fixture
def archive(archive_of, asyncssh_box, s3):
    fill(asyncssh_box.root, {"file": b"x"})
    return archive_of(asyncssh_box, AWS_ENDPOINT_URL=s3.url)


def lines(result):
    """[(verdict, text)] of what was printed, one for each thing that was tried."""
    return re.findall(r"^(ok|note|WRONG) +(.*)$", result.stdout, re.MULTILINE)


def wrong(result):
    """What is wrong, as text; the status must agree."""
    found = [text for verdict, text in lines(result) if verdict == "WRONG"]
    assert result.status == (1 if found else 0), result.output
    return found


def only_fault(result):
    [fault] = wrong(result)
    return fault


def assert_run_says_the_same(archive, fault, **settings):
    """A run fails at its start, in the words that followed the label in `check`."""
    run = archive(constants=FEW_TRIES, **settings)
    assert run.status == 1
    assert fault.partition(": ")[2] in run.stderr
    assert archive.objects() == {}


def refuses_class(exchange):
    """Some S3-compatible servers have no cold classes."""
    if exchange.headers.get("x-amz-storage-class") == "DEEP_ARCHIVE":
        return error(400, "InvalidStorageClass")(exchange)
    return exchange.forward()


# --- Nothing is wrong ---


def test_each_thing_that_a_run_needs_gets_a_line_and_nothing_is_left(archive_of, box):
    fill(box.root, {"file": b"x", "d/file": b"y"})
    archive = archive_of(box, S3_PREFIX="mine/")
    before = tree(box.root), os.stat(box.root).st_mtime_ns

    result = archive("check")

    assert wrong(result) == []
    tried = [text for verdict, text in lines(result) if verdict == "ok"]
    for word in (
        *("settings", "state", "host key", "login", "SFTP", "REMOTE_PATH"),
        *PERMISSIONS,
    ):
        assert [text for text in tried if word in text], word
    assert archive.bucket.list() == archive.bucket.uploads() == []
    assert (tree(box.root), os.stat(box.root).st_mtime_ns) == before
    assert not archive.state_db.exists()
    assert archive().status == 0


def test_check_beside_an_archive_changes_nothing(archive):
    archive()
    state, objects = archive.state_db.read_bytes(), archive.bucket.list()

    assert wrong(archive("check")) == []

    assert archive.state_db.read_bytes() == state
    assert archive.bucket.list() == objects
    assert archive.bucket.uploads() == []


def test_rule_and_versioning_are_noted_and_no_failure(archive):
    client, at = archive.bucket.client, {"Bucket": archive.bucket.name}
    abort = {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}
    rule = {"ID": "r", "Status": "Enabled", "Filter": {"Prefix": ""}, **abort}

    without = archive("check")
    archive.bucket.set_lifecycle(rule)
    client.put_bucket_versioning(**at, VersioningConfiguration={"Status": "Enabled"})
    with_both = archive("check")

    def verdicts(result):
        words = ("lifecycle", "versioning")
        return [verdict for verdict, text in lines(result) if text.startswith(words)]

    assert wrong(without) == wrong(with_both) == []
    assert verdicts(without) == ["note", "note"]
    assert verdicts(with_both) == ["ok", "ok"]


@pytest.mark.parametrize("refusal", [error(403, "AccessDenied"), error(501, "NotImplemented")])
def test_what_a_run_does_not_need_may_be_refused(archive, s3, refusal):
    s3.always("GET", refusal)  # lifecycle, versioning
    s3.always("RestoreObject", refusal)

    result = archive("check")

    assert wrong(result) == []
    assert sum(verdict == "note" for verdict, _ in lines(result)) == 3


# --- Settings and state ---


@pytest.mark.parametrize("name", ["s3://my-bucket", "my-bucket/x"])
def test_bucket_that_is_no_bare_name_is_a_fault_of_the_settings(archive, s3, name):
    result = archive("check", S3_BUCKET=name)

    assert result.status == 2
    assert "S3_BUCKET" in result.stderr
    assert s3.requests.total() == archive.box.connections == 0


@pytest.mark.parametrize("how", ["damaged", "of another prefix"])
def test_state_that_cannot_be_used_is_told_and_the_rest_is_tried(archive, how):
    archive()
    settings = {}
    if how == "damaged":
        archive.state_db.write_bytes(b"SQLite format 3\0" + b"x" * 5_000)
    else:
        settings["S3_PREFIX"] = "other/"

    result = archive("check", **settings)

    fault = only_fault(result)
    assert fault.startswith("state")
    assert "s3:PutObject" in result.stdout
    run = archive(**settings)
    assert run.status == 1
    assert fault.partition(": ")[2] in run.stderr


def test_run_that_is_at_work_is_no_fault(archive):
    archive()

    lock = f"{archive.state_db}.lock"
    with contextlib.closing(sqlite3.connect(lock, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        result = archive("check")

    assert wrong(result) == []
    assert [text for verdict, text in lines(result) if verdict == "note" and lock in text]


# --- The box ---


@contextlib.contextmanager
def no_ssh(answer):
    """The port of a server that sends this and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1_000)  # or the end would be a reset
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_host_that_does_not_exist_is_told_with_the_setting_to_correct(archive):
    settings = {"HETZNER_HOST": "no-such-box.invalid"}

    result = archive("check", **settings)

    fault = only_fault(result)
    assert "HETZNER_HOST" in fault
    assert "s3:PutObject" in result.stdout, "the bucket is tried all the same"
    assert_run_says_the_same(archive, fault, **settings)


def test_port_where_nothing_listens_is_told_with_what_to_switch_on(archive):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        settings = {"HETZNER_PORT": closed.getsockname()[1]}

        fault = only_fault(archive("check", **settings))

        words = ("HETZNER_PORT", "SSH support", "external reachability", "console")
        assert [word for word in words if word not in fault] == []
        assert_run_says_the_same(archive, fault, **settings)


@pytest.mark.parametrize("lines", [0, 200])
def test_port_where_ssh_does_not_answer_is_told_with_what_to_switch_on(archive, lines):
    with no_ssh(b"HTTP/1.1 400 Bad Request\r\n" * lines) as port:
        fault = only_fault(archive("check", HETZNER_PORT=port))

        words = ("HETZNER_PORT", "SSH support", "console")
        assert [word for word in words if word not in fault] == []
        assert_run_says_the_same(archive, fault, HETZNER_PORT=port)


def test_unknown_host_key_is_told_before_any_login(archive, asyncssh_box):
    asyncssh_box.known_hosts.write_text("")

    fault = only_fault(archive("check"))

    assert "HETZNER_KNOWN_HOSTS" in fault
    assert asyncssh_box.attempts == []
    assert_run_says_the_same(archive, fault)


def test_refused_password_is_told_with_the_setting_to_correct(archive):
    fault = only_fault(archive("check", HETZNER_PASSWORD="wrong"))

    assert "HETZNER_PASSWORD" in fault
    assert "HETZNER_USER" in fault
    assert "public key" not in fault
    assert_run_says_the_same(archive, fault, HETZNER_PASSWORD="wrong")


@pytest.mark.parametrize(("port", "form"), [(22, "RFC 4716"), (23, "OpenSSH")])
def test_refused_key_is_told_with_the_form_that_the_port_takes(
    archive, asyncssh_box, port, form
):
    key = archive.folder / "other_key"
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(key)
    known = asyncssh_box.known_hosts.read_text().split(" ", 1)[1]
    host = "127.0.0.1" if port == 22 else f"[127.0.0.1]:{port}"
    asyncssh_box.known_hosts.write_text(f"{host} {known}")
    settings = {"HETZNER_PORT": port, "HETZNER_PASSWORD": None, "HETZNER_KEY_FILE": key}

    running = archive.start("check", before=OTHER_PORT.format(asyncssh_box.port), **settings)
    fault = only_fault(running.wait())

    assert form in fault
    assert str(key) in fault
    assert f"HETZNER_PORT is {port}" in fault


@pytest.mark.parametrize("path", ["no/such/folder", "file", "closed"])
def test_remote_path_that_cannot_be_listed_is_told(archive, asyncssh_box, path):
    (asyncssh_box.root / "closed").mkdir(mode=0)

    fault = only_fault(archive("check", REMOTE_PATH=path))

    assert "REMOTE_PATH" in fault
    assert path in fault
    assert_run_says_the_same(archive, fault, REMOTE_PATH=path)


# --- The bucket ---


@pytest.mark.parametrize("permission", PERMISSIONS)
def test_permission_that_is_missing_is_named_and_nothing_is_left(archive, s3, permission):
    s3.always(PERMISSIONS[permission], error(403, "AccessDenied"))

    result = archive("check")

    fault = only_fault(result)
    assert fault.startswith(f"{permission}: ")
    assert "policy" in fault
    rest = [name for name in PERMISSIONS if ("ok", name) not in lines(result)]
    # Without the permission to abort an upload none is begun.
    untried = ["s3:PutObject"] if "Abort" in permission else []
    assert rest == [permission, *untried]
    assert archive.bucket.list() == archive.bucket.uploads() == []


def test_policy_for_the_prefix_alone_is_enough(archive, s3):
    """Each request is about the prefix: a HEAD of the bucket would be denied."""

    def within(exchange):
        path = unquote(exchange.handler.path)
        allowed = exchange.key.startswith("box/") or "prefix=box/" in path
        return exchange.forward() if allowed else error(403, "AccessDenied")(exchange)

    for operation in {*PERMISSIONS.values(), "RestoreObject", "PutObject"}:
        s3.always(operation, within)
    assert wrong(archive("check", S3_PREFIX="box/")) == []
    assert archive(S3_PREFIX="box/").counts == (1, 0, 0)


def test_key_that_may_not_list_at_all_is_told_so(archive, s3):
    """Then S3 does not tell of a bucket either, nor of an object whether it is there."""
    for operation in ("ListObjectsV2", "HeadObject"):
        s3.always(operation, error(403, "AccessDenied"))

    faults = wrong(archive("check"))

    assert re.search("ListBucket|ListObjectsV2", faults[0])
    assert "policy" in faults[0]
    assert archive.bucket.uploads() == []


def test_bucket_that_does_not_exist_is_told_with_the_setting_to_correct(archive):
    fault = only_fault(archive("check", S3_BUCKET="no-such-bucket-anywhere"))

    assert "NoSuchBucket no-such-bucket-anywhere" in fault
    assert "S3_BUCKET" in fault
    assert_run_says_the_same(
        archive, fault.partition("NoSuchBucket")[2], S3_BUCKET="no-such-bucket-anywhere"
    )


@pytest.mark.parametrize(
    ("code", "status", "remedy"),
    [
        ("PermanentRedirect", 301, "AWS_REGION"),
        ("AuthorizationHeaderMalformed", 400, "AWS_REGION"),
        ("RequestTimeTooSkewed", 403, "clock"),
        ("ExpiredToken", 400, "renew"),
        ("InvalidAccessKeyId", 403, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_refusal_of_all_requests_is_told_with_its_remedy(archive, s3, code, status, remedy):
    """An answer to HEAD does not tell the code."""
    s3.always(None, error(status, code, x_amz_bucket_region="eu-west-1"))

    fault = wrong(archive("check"))[0]

    assert code in fault
    assert remedy in fault
    assert s3.requests["CreateMultipartUpload"] == 0
    assert_run_says_the_same(archive, ": " + fault.rpartition("; ")[2])


def test_s3_that_cannot_be_reached_is_told(archive):
    fault = only_fault(archive("check", AWS_ENDPOINT_URL="http://127.0.0.1:1"))

    assert fault.startswith("s3:ListBucket")
    assert "S3 does not answer" in fault
    assert "127.0.0.1:1" in fault


def test_neither_secrets_nor_lines_of_others_are_shown(archive, s3):
    """Every output of the tests is searched for secrets; this one is told one."""
    message = f"{SECRET_KEY}\nok     all is well"
    s3.always("ListObjectsV2", error(403, "SignatureDoesNotMatch", message))

    result = archive("check")

    assert "SignatureDoesNotMatch" in only_fault(result)
    assert ("ok", "all is well") not in lines(result)


def test_server_without_the_storage_class_is_found_out_before_a_run(archive, s3):
    s3.always("CreateMultipartUpload", refuses_class)
    assert "InvalidStorageClass" in only_fault(archive("check"))
    assert wrong(archive("check", STORAGE_CLASS="STANDARD")) == []
