"""What users of other tools met: kinds of fault that must not come back."""

import json
import os

import asyncssh
import paramiko
import pytest
from conftest import OLD, fill
from scripted_s3 import error


@pytest.fixture
def box(asyncssh_box):
    return asyncssh_box


# --- Secrets ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HETZNER_PASSWORD"]
)
def test_credential_with_a_line_break_is_a_fault_that_does_not_show_it(archive, name):
    result = archive(**{name: "canary-of-two\r\nlines"})
    assert result.status == 2
    assert f"{name}: contains a line break" in result.stderr
    assert "canary-of-two" not in result.output


def test_secret_is_hidden_in_each_form_in_which_a_server_may_send_it_back(archive, box, s3):
    fill(box.root, {"file": b"x"})
    secret = "canary/+\\'é%"
    forms = [secret, repr(secret), "canary/%2B%5C%27%C3%A9%25", "canary%2F%2B%5C%27%C3%A9%25"]
    s3.always("PutObject", error(400, "Odd", " ".join(forms)))
    result = archive(AWS_ENDPOINT_URL=s3.url, AWS_SECRET_ACCESS_KEY=secret)
    assert result.status == 3
    assert "***" in result.stderr
    assert "canary" not in result.output + result.log


def test_secret_that_boto3_finds_by_itself_is_hidden_as_well(archive, box, s3):
    fill(box.root, {"file": b"x"})
    found = {"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": "canary-found"}
    script = archive.folder / "credentials.sh"
    script.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
    script.chmod(0o755)
    config = archive.folder / "config"
    config.write_text(f"[default]\ncredential_process = {script}\n")
    s3.always("PutObject", error(400, "Odd", "canary-found"))
    result = archive(
        AWS_ENDPOINT_URL=s3.url,
        AWS_CONFIG_FILE=config,
        AWS_ACCESS_KEY_ID=None,
        AWS_SECRET_ACCESS_KEY=None,
    )
    assert result.status == 3
    assert "***" in result.stderr
    assert "canary-found" not in result.output + result.log


# --- Exclusions -------------------------------------------------------------


def test_item_that_is_a_path_as_it_stands_is_no_glob(archive, box):
    fill(box.root, {"Photos [2019]/a": b"a", "Photos 2/b": b"b", "Photos 1/c": b"c"})
    assert archive(EXCLUDE_PATHS="Photos [2019]").status == 0
    assert set(archive.objects()) == {"Photos 2/b", "Photos 1/c"}


def test_leading_slash_means_the_top_of_remote_path(archive, box):
    fill(box.root, {"cache/a": b"a", "d/cache/b": b"b"})
    assert archive(EXCLUDE_PATHS="/cache").status == 0
    assert set(archive.objects()) == {"d/cache/b"}


def test_names_are_excluded_in_any_unicode_form(archive, box):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    fill(box.root, {f"{decomposed}/a": b"a", "b": b"b"})
    assert archive(EXCLUDE_PATHS=composed).status == 0
    assert set(archive.objects()) == {"b"}


@pytest.mark.parametrize("command", ["run", "plan"])
def test_item_that_matched_nothing_is_told(archive, box, command):
    fill(box.root, {"cache/a": b"a", "b": b"b"})
    result = archive(command, EXCLUDE_PATHS="cache,cahce,~/cache")
    assert result.status == 0
    warned = [line for line in result.stderr.splitlines() if "EXCLUDE_PATHS" in line]
    assert len(warned) == 2
    assert "cahce" in warned[0] and "~/cache" in warned[1]


# --- Settings ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("EXCLUDE", "EXCLUDE_"), ("HETZNER_KEY", "HETZNER_KEY_FILE"), ("DRY_RUN", "")],
)
def test_name_in_the_env_file_that_nothing_reads_is_a_fault(archive, name, near):
    archive.env_file.write_text(f"{name}=value\n")
    result = archive()
    assert result.status == 2
    assert f"{name}: unknown setting" in result.stderr
    assert near in result.stderr


def test_proxy_of_the_env_file_reaches_boto3(archive, box):
    fill(box.root, {"file": b"x"})
    archive.env_file.write_text("HTTP_PROXY=http://127.0.0.1:1\n")
    result = archive(constants={"S3_ATTEMPTS": 1})
    assert result.status in (1, 3)
    assert "127.0.0.1:1" in result.stderr


def test_files_in_aws_settings_are_relative_to_the_env_file(archive, box):
    fill(box.root, {"file": b"x"})
    folder = archive.folder / "elsewhere"
    folder.mkdir()
    (folder / "keys").write_text(
        "[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\n"
        f"aws_secret_access_key = {archive.settings['AWS_SECRET_ACCESS_KEY']}\n"
    )
    (folder / "box.env").write_text("AWS_SHARED_CREDENTIALS_FILE=keys\n")
    (folder / "box.env").chmod(0o600)
    nothing = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    result = archive("--env-file", folder / "box.env", **nothing)
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr


def test_path_of_the_environment_is_taken_byte_for_byte_in_any_locale(archive, box):
    fill(box.root, {"Büro/file": b"x"})
    result = archive(REMOTE_PATH="Büro", LC_ALL="de_DE.ISO-8859-1", PYTHONUTF8="0")
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr


def test_home_folder_is_not_needed_where_no_setting_is_below_it(archive, box):
    fill(box.root, {"file": b"x"})
    missing = "import os\nos.path.expanduser = lambda path: path\n"
    result = archive.start(before=missing, HOME=None).wait()
    assert result.status == 0, result.stderr
    assert os.stat(box.root / "file").st_mtime == OLD


# --- Login ------------------------------------------------------------------


def known(box, names):
    """Enter the box's host key under these names."""
    key = box.host_key.export_public_key("openssh").decode().strip()
    box.known_hosts.write_text(f"{names} {key}\n")


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        ("[127.0.0.*]:*", True),
        ("other,127.0.0.1", True),
        ("[LOCALHOST]:{port}", True),
        ("HASHED", True),
        ("[127.0.0.*]:*,![127.0.0.1]:{port}", False),
        ("127.0.0.2", False),
    ],
)
def test_names_in_known_hosts_count_as_for_openssh(archive, box, names, counts):
    host = "localhost" if "LOCALHOST" in names else "127.0.0.1"
    if names == "HASHED":
        names = paramiko.HostKeys.hash_host(f"[{host}]:{box.port}")
    known(box, names.format(port=box.port))
    assert archive(HETZNER_HOST=host).status == (0 if counts else 1)


@pytest.mark.parametrize("passphrase", [None, "canary-pass"])
def test_key_in_pkcs8_form_is_enough(archive, box, passphrase):
    key = archive.folder / "pkcs8"
    box.user_key.write_private_key(key, "pkcs8-pem", passphrase)
    key.chmod(0o600)
    login = {"HETZNER_PASSWORD": None, "HETZNER_KEY_FILE": key}
    assert archive(**login, HETZNER_KEY_PASSPHRASE=passphrase).status == 0


def test_certificate_beside_the_key_does_not_spoil_the_login(archive, box):
    key = archive.folder / "key"
    box.user_key.write_private_key(key)
    authority = asyncssh.generate_private_key("ssh-ed25519")
    expired = authority.generate_user_certificate(
        box.user_key, "expired", valid_before="20200101", principals=[box.user]
    )
    expired.write_certificate(archive.folder / "key-cert.pub")
    result = archive(HETZNER_PASSWORD=None, HETZNER_KEY_FILE=key)
    assert result.status == 0, result.stderr


# --- The lock ---------------------------------------------------------------

NO_LOCKS = """
import sqlite3
real = sqlite3.connect
class NoLocks(sqlite3.Connection):
    def execute(self, sql, *rest):
        if "EXCLUSIVE" in sql:
            raise sqlite3.OperationalError("database is locked")
        return super().execute(sql, *rest)
sqlite3.connect = lambda *args, **more: real(*args, **{**more, "factory": NoLocks})
"""


@pytest.mark.parametrize("command", ["run", "check"])
def test_file_system_without_locks_is_not_taken_for_another_run(archive, command):
    result = archive.start(command, before=NO_LOCKS).wait()
    assert result.status == 1
    assert "STATE_DB" in result.output and "local disk" in result.output


# --- Refusals that pass ------------------------------------------------------

SIZES = {"SMALL_FILE": 1 << 20, "PART_SIZE": 5 << 20}
PASSING = {
    "cut": error(400, "IncompleteBody"),
    "damaged": error(400, "BadDigest"),
    "damaged over http": error(400, "XAmzContentSHA256Mismatch"),
    "in conflict": error(409, "OperationAborted"),
    "too slow": error(408, "Odd"),
    "of a proxy": error(520, "Odd"),
}


@pytest.mark.parametrize(("operation", "size"), [("PutObject", 100), ("UploadPart", 12 << 20)])
def test_refusal_that_passes_is_tried_again(archive, box, s3, operation, size):
    fill(box.root, dict.fromkeys(PASSING, b"x" * size))
    met = [s3.on(operation, fault, key=name, times=2) for name, fault in PASSING.items()]
    result = archive(constants=SIZES, AWS_ENDPOINT_URL=s3.url)
    assert (result.status, [rule.fired for rule in met]) == (0, [2] * 6), result.stderr
    assert set(archive.objects()) == set(PASSING)
    archive.assert_invariant()


def test_parts_that_are_damaged_at_s3_are_not_completed_again(archive, box, s3):
    """Asking again would change nothing: the parts stay as they are."""
    fill(box.root, {"file": b"x" * (12 << 20)})
    met = s3.always("CompleteMultipartUpload", error(400, "BadDigest"))
    result = archive(constants=SIZES, AWS_ENDPOINT_URL=s3.url)
    assert (result.status, met.fired) == (3, 1), result.stderr
    assert archive.rows() == {}
