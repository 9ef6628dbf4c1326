"""What users of other tools met: kinds of fault that must not come back."""

import base64
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import asyncssh
import paramiko
import pytest
from conftest import OLD, fill, tree
from faults import AGAIN_SOON
from faulty_sftp import FaultyBox
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


def test_secret_that_is_not_utf8_is_a_fault_that_does_not_show_it(archive):
    result = archive(HETZNER_PASSWORD=os.fsdecode(b"canary\xff"))
    assert result.status == 2
    assert result.stderr == (
        "error: HETZNER_PASSWORD: contains a line break, another control character or "
        "invalid UTF-8\n"
    )
    assert "canary" not in result.output + result.log


def test_secret_that_a_server_sends_back_in_json_or_base64_is_hidden(archive, box, s3):
    fill(box.root, {"file": b"x"})
    secret = 'canary/+"\\%'
    low = "canary%2f%2b%22%5c%25"
    forms = [json.dumps(secret), low, base64.b64encode(secret.encode()).decode()]
    s3.always("PutObject", error(400, "Odd", " ".join(forms)))
    result = archive(AWS_ENDPOINT_URL=s3.url, AWS_SECRET_ACCESS_KEY=secret)
    assert result.failures == ['./file: S3 refused PutObject: Odd "***" *** ***']


class Role(BaseHTTPRequestHandler):
    """The security token service, which gives the keys of any role."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        names = ["AccessKeyId", "SecretAccessKey", "SessionToken"]
        keys = "".join(f"<{name}>canary-{name}</{name}>" for name in names)
        answer = (
            "<AssumeRoleResponse><AssumeRoleResult><Credentials>"
            f"{keys}<Expiration>2100-01-01T00:00:00Z</Expiration>"
            "</Credentials></AssumeRoleResult></AssumeRoleResponse>"
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_):
        pass


def test_secret_of_a_role_that_is_assumed_later_is_hidden_as_well(archive, box, s3):
    fill(box.root, {"file": b"x"})
    config = archive.folder / "config"
    config.write_text(
        "[default]\nrole_arn = arn:aws:iam::1:role/archive\nsource_profile = user\n"
        "[profile user]\naws_access_key_id = AKIA\naws_secret_access_key = x-y-z\n"
    )
    echo = "canary-SecretAccessKey canary-SessionToken"
    s3.always("PutObject", error(400, "Odd", echo))
    with HTTPServer(("127.0.0.1", 0), Role) as sts:
        threading.Thread(target=sts.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{sts.server_port}"
        files = {"AWS_CONFIG_FILE": config, "AWS_ENDPOINT_URL_STS": url}
        result = archive(AWS_ENDPOINT_URL=s3.url, **files, **NO_KEYS)
        sts.shutdown()
    assert result.failures == ["./file: S3 refused PutObject: Odd *** ***"]
    assert "canary" not in result.output + result.log


USER = "[profile user]\naws_access_key_id = AKIA\naws_secret_access_key = x-y-z\n"
NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
CONFIGS = {
    "no token": "role_arn = arn:aws:iam::1:role/x\nweb_identity_token_file = /missing/token",
    "no program": "credential_process = /missing/program",
    "a code": "role_arn = arn:aws:iam::1:role/x\nsource_profile = user\nmfa_serial = 1",
}


@pytest.mark.parametrize("config", CONFIGS)
def test_credentials_that_cannot_be_had_end_the_run_at_once(archive, box, config):
    fill(box.root, {"first": b"x"})
    assert archive().status == 0
    fill(box.root, {f"f{n}": b"x" for n in range(30)})
    file = archive.folder / "config"
    file.write_text(f"[default]\n{CONFIGS[config]}\n{USER}")
    result = archive(AWS_CONFIG_FILE=file, **NO_KEYS)
    assert result.status == 1
    assert "error: no AWS credentials" in result.stderr
    assert result.failures == []


def test_role_that_is_refused_ends_the_run_at_once(archive, box, s3):
    """By an operation that is not S3's: no file can be sent without it."""
    fill(box.root, {f"f{n}": b"x" for n in range(30)})
    answer = error(403, "AccessDenied", "may not assume x")

    def refuse(exchange):
        """As STS does."""
        found = answer(exchange)
        found.body = b"<ErrorResponse>%s</ErrorResponse>" % found.body.partition(b"\n")[2]
        return found

    refused = s3.always(None, refuse)
    file = archive.folder / "config"
    file.write_text(
        f"[default]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = user\n{USER}"
    )
    result = archive(AWS_CONFIG_FILE=file, AWS_ENDPOINT_URL_STS=s3.url, **NO_KEYS)
    assert (result.status, refused.fired) == (1, 1), result.stderr
    assert (
        "error: no AWS credentials: AssumeRole: AccessDenied may not assume x" in result.stderr
    )


# --- A file where a folder is now ---------------------------------------------


@pytest.mark.parametrize("target", ["--to", "--to-box"])
@pytest.mark.parametrize(
    "keys", [("x", "x.file/z", "x/y"), ("x", "x.file", "x/y"), ("x", "x/y", "x/y/z")]
)
def test_file_with_the_name_of_a_folder_gets_a_name_that_is_free(
    archive_of, faulty_box, bucket, tmp_path, keys, target
):
    for key in keys:
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=key.encode())
    archive = archive_of(faulty_box)
    folder = tmp_path / "to" if target == "--to" else "to"
    for _ in range(2):
        result = archive("restore", target, folder)
        assert result.status == 0, result.stderr
    root = folder if target == "--to" else faulty_box.root / "to"
    found = {path.read_bytes().decode() for path in root.rglob("*") if path.is_file()}
    assert found == set(keys)


def test_cold_file_with_the_name_of_a_folder_that_is_there_is_asked_for(
    archive, box, bucket, tmp_path
):
    """It was counted as a failure, so that nobody agreed to its cost: 75 for ever."""
    cold = {"StorageClass": "DEEP_ARCHIVE"}
    bucket.client.put_object(Bucket=bucket.name, Key="x", Body=b"1", **cold)
    bucket.client.put_object(Bucket=bucket.name, Key="x/y", Body=b"2")
    assert archive("restore", "x/y", "--to", tmp_path / "to").status == 0
    result = archive("restore", "--to", tmp_path / "to", "--yes")
    assert result.status == 75
    assert "Asked of S3    : 1" in result.stdout


# --- Few handles --------------------------------------------------------------


def test_restore_to_a_server_with_few_handles_waits_for_one(archive_of, bucket):
    for n in range(40):
        bucket.client.put_object(Bucket=bucket.name, Key=f"d/{n}", Body=b"%d" % n)
    with FaultyBox(max_handles=4) as box:
        result = archive_of(box)("restore", "--to-box", "to")
        assert (result.status, result.failures) == (0, []), result.stderr
        assert box.refused > 0
        assert len(tree(box.root / "to")) == 40


# --- Exclusions -------------------------------------------------------------


def test_brackets_of_a_name_are_no_glob(archive, box):
    fill(box.root, {"Photos [2019]/a": b"a", "Photos 2/b": b"b", "Photos 1/c": b"c"})
    assert archive(EXCLUDE_PATHS="Photos [2019]").status == 0
    assert set(archive.objects()) == {"Photos 2/b", "Photos 1/c"}


@pytest.mark.parametrize("exists", [True, False])
def test_item_means_the_same_whether_it_exists_or_not(archive, box, exists):
    fill(box.root, {"Photos 2/b": b"b", "Photos 1/c": b"c", "tmp/d": b"d"})
    if exists:
        fill(box.root, {"Photos [2019]/a": b"a", "Photos [2019] b/d": b"d", "tmp/*": b"*"})
    assert archive(EXCLUDE_PATHS="Photos [2019],Photos [2019]*,tmp/*").status == 0
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


def test_brackets_of_a_name_in_another_unicode_form_are_no_glob(archive, box):
    fill(box.root, {"e\u0301 [2]/a": b"a", "e\u0301 2/b": b"b"})
    assert archive(EXCLUDE_PATHS="\u00e9 [2]").status == 0
    assert set(archive.objects()) == {"e\u0301 2/b"}


def test_glob_is_understood_in_any_locale(archive, box):
    fill(box.root, {"é1/a": b"a", "é 2/b": b"b"})
    result = archive(EXCLUDE_PATHS="é?", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.status == 0, result.stderr
    assert set(archive.objects()) == {"é 2/b"}


def test_two_stars_and_a_slash_stand_for_the_top_as_well(archive, box):
    fill(box.root, {"cache/a": b"a", "d/cache/b": b"b", "d/e/cache/c": b"c", "f": b"f"})
    assert archive(EXCLUDE_PATHS="**/cache").status == 0
    assert set(archive.objects()) == {"f"}


def test_item_below_what_is_left_out_anyway_is_no_typing_error(archive, box):
    fill(box.root, {".a/cache/x": b"x", "b/c/y": b"y", ".trash-1": b"z", "f": b"f"})
    result = archive(EXCLUDE_PATHS=".a/cache,b,b/c,.trash-*")
    assert set(archive.objects()) == {"f"}
    assert "EXCLUDE_PATHS" not in result.stderr


@pytest.mark.parametrize("command", ["run", "plan"])
def test_item_that_matched_nothing_is_told_once(archive, box, command):
    fill(box.root, {"cache/a": b"a", "b": b"b"})
    result = archive(command, EXCLUDE_PATHS="cache,cahce,~/cache,/", MAX_CHANGED="9")
    assert result.status == 0
    warned = [line for line in result.stderr.splitlines() if "EXCLUDE_PATHS" in line]
    assert [line.split()[2] for line in warned] == ["/", "cahce", "~/cache"]


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


def test_local_paths_are_taken_byte_for_byte_in_any_locale(archive, box):
    fill(box.root, {"file": b"x"})
    folder = archive.folder / "Büro"
    folder.mkdir()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = archive(STATE_DB=folder / "state.db", LOG_FILE=folder / "log", **ascii_only)
    assert result.status == 0, result.stderr
    assert {"state.db", "log"} <= {path.name for path in folder.iterdir()}


def test_file_of_boto3_may_have_a_name_that_is_not_utf8(archive, box):
    fill(box.root, {"file": b"x"})
    config = os.fsdecode(os.fsencode(archive.folder) + b"/B\xfcro")
    with open(config, "w") as file:
        file.write("[default]\nregion = eu-west-1\n")
    result = archive(AWS_CONFIG_FILE=config)
    assert result.status == 0, result.stderr


def test_home_folder_is_not_needed_where_no_setting_is_below_it(archive, box):
    fill(box.root, {"file": b"x"})
    missing = "import os\nos.path.expanduser = lambda path: path\n"
    result = archive.start(before=missing, HOME=None).wait()
    assert result.status == 0, result.stderr
    assert os.stat(box.root / "file").st_mtime == OLD


def test_tilde_of_a_user_without_a_home_makes_no_folder_of_that_name(archive, box):
    fill(box.root, {"file": b"x"})
    shutil.copy(box.known_hosts, archive.folder / "known")
    missing = "import os\nos.path.expanduser = lambda path: path\n"
    settings = {"HETZNER_KNOWN_HOSTS": "~/known", "STATE_DB": "~/state"}
    result = archive.start(before=missing, HOME=None, **settings).wait()
    assert result.status == 0, result.stderr
    assert (archive.folder / "state").exists() and not (archive.folder / "~").exists()


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


# --- Private files ------------------------------------------------------------


def test_log_that_takes_the_place_of_a_full_one_is_private_too(archive, box):
    archive.log_file.write_bytes(b"x" * (10 << 20))
    archive.log_file.chmod(0o600)
    assert archive().status == 0
    logs = archive.folder.glob("archive.log*")
    assert {log.name: log.stat().st_mode & 0o777 for log in logs} == {
        "archive.log": 0o600,
        "archive.log.1": 0o600,
    }


# --- The lock ---------------------------------------------------------------

NO_LOCKS = """
import sqlite3
real = sqlite3.connect
class NoLocks(sqlite3.Connection):
    def execute(self, *_):
        raise sqlite3.OperationalError("database is locked")
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
    "busy kms": error(400, "ThrottlingException"),
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
    result = archive(constants=SIZES, before=AGAIN_SOON, AWS_ENDPOINT_URL=s3.url)
    assert (result.status, {rule.fired for rule in met}) == (0, {2}), result.stderr
    assert set(archive.objects()) == set(PASSING)
    archive.assert_invariant()


def test_parts_that_are_damaged_at_s3_are_not_completed_again(archive, box, s3):
    """Asking again would change nothing: the parts stay as they are."""
    fill(box.root, {"file": b"x" * (12 << 20)})
    met = s3.always("CompleteMultipartUpload", error(400, "BadDigest"))
    result = archive(constants=SIZES, AWS_ENDPOINT_URL=s3.url)
    assert (result.status, met.fired) == (3, 1), result.stderr
    assert archive.rows() == {}
