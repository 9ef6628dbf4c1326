"""More of what users of other tools met; each test names the report that it comes from."""

import gzip
import os
import re
import signal
import subprocess
import sys
import time

import faulty_sftp
import paramiko
import pytest
from conftest import MIB, PROGRAM, fill, tree
from faulty_sftp import EOF, a_file, at_most, attributes, names, status
from scripted_s3 import Answer, Exchange, error, reset, rewritten
from servers import PASSWORD, OpenSSH
from test_ls import page


@pytest.fixture
def box(asyncssh_box):
    return asyncssh_box


# --- The box ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "most"), [(0, MIB), (5, MIB), (20 * MIB, MIB), (2 << 16, 1 << 16)]
)
def test_file_that_is_longer_than_the_box_says_fails(archive_of, faulty_box, told, most):
    """rclone#7330, rclone#6533: a server tells size 0, or too small a one, be it a multiple of
    the bytes that it sends at most in a reply."""
    faulty_box.always("READ", b"file", at_most(most))
    fill(faulty_box.root, {"file": told + 9, "other": b"x"})
    for kind in ("LSTAT", "FSTAT"):
        faulty_box.always(kind, b"file", attributes(size=told))
    listing = names((b"file", a_file(told)), (b"other", a_file(1)))
    faulty_box.on("READDIR", None, listing)
    faulty_box.on("READDIR", None, status(EOF), nth=2, times=1_000)
    archive = archive_of(faulty_box)
    result = archive()
    assert result.status == 3
    assert result.failures == [f"./file: has more than {told:,} bytes, its size on the box"]
    assert set(archive.rows()) == {"./other"}


class Rekeying(OpenSSH):
    """Wants new session keys after each MiB."""

    def command(self):
        return [*super().command(), "-o", "RekeyLimit=1M"]


@pytest.mark.skipif(OpenSSH.program is None, reason="sshd is not installed")
def test_new_session_keys_in_the_middle_of_a_file_cost_nothing(archive_of):
    """paramiko#49, phpseclib#2050 (of Storage Boxes): hangs or breaks after a GB or two."""
    with Rekeying() as box:
        fill(box.root, {"large": 20 * MIB, **{f"f{n}": 50_000 for n in range(50)}})
        archive = archive_of(box)
        both = "import paramiko\nparamiko.packet.Packetizer.REKEY_BYTES = 1 << 20\n"
        result = archive.start(before=both).wait()
        assert (result.status, result.counts) == (0, (51, 0, 0)), result.stderr
        assert "connecting again" not in result.stderr
        sent = {key: found[:2] for key, found in archive.objects().items()}
        assert sent == {os.fsdecode(path): found for path, found in tree(box.root).items()}


def wanting(second):
    """A login that takes the key, and then wants `second` as well."""

    class Login(faulty_sftp._Login):
        is_first = True

        def get_allowed_auths(self, username):
            return "publickey" if self.is_first else second

        def check_auth_publickey(self, username, key):
            self.is_first = False
            return paramiko.AUTH_PARTIALLY_SUCCESSFUL

        def check_auth_password(self, username, password):
            return paramiko.AUTH_FAILED if self.is_first else self.answer([password])

        def check_auth_interactive(self, username, submethods):
            if self.is_first or second == "password":
                return paramiko.AUTH_FAILED
            return paramiko.InteractiveQuery("", "", ("Code: ", False))

        def check_auth_interactive_response(self, responses):
            return self.answer(responses)

        def answer(self, given):
            right = given == [PASSWORD]
            return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    return Login


@pytest.mark.parametrize("second", ["password", "keyboard-interactive"])
def test_server_that_wants_key_and_password_gets_both(
    archive_of, faulty_box, second, monkeypatch
):
    """paramiko#841, paramiko#1978: a key that was accepted is called refused."""
    monkeypatch.setattr(faulty_sftp, "_Login", wanting(second))
    archive = archive_of(faulty_box, HETZNER_KEY_FILE=faulty_box.key_file)
    assert archive().status == 0
    result = archive(HETZNER_PASSWORD=None)
    assert result.status == 1
    assert f"was right, but {second} is wanted as well" in result.stderr


# --- S3 ---------------------------------------------------------------------


@pytest.mark.parametrize("fault", [reset, error(503, "SlowDown")], ids=["reset", "503"])
def test_s3_may_be_away_for_some_seconds(archive, box, s3, fault):
    """rclone#4313, harbor#23005: a second without a network, and the night is over."""
    fill(box.root, {f"f{n:03}": b"%d" % n for n in range(100)})
    ends = []

    def away(exchange):
        ends.append(time.time() + 3)
        exchange.body()
        return (fault if time.time() < ends[0] else Exchange.forward)(exchange)

    s3.always("PutObject", away)
    result = archive(AWS_ENDPOINT_URL=s3.url)
    assert (result.status, result.counts) == (0, (100, 0, 0)), result.stderr


def test_head_that_is_refused_without_a_reason_names_the_likely_ones(archive, box, s3):
    """botocore#1400: an expired token is "400 Bad Request" to a HEAD, and nothing more. So is
    an object of SSE-C to a HEAD without its key."""
    fill(box.root, {f"f{n:02}": b"x" for n in range(40)})
    assert archive(AWS_ENDPOINT_URL=s3.url).status == 0
    archive.state_db.unlink()
    s3.always("HeadObject", lambda _: Answer(400, {"content-type": "application/xml"}))
    result = archive(AWS_ENDPOINT_URL=s3.url)
    assert result.status == 1
    for likely in ("credentials have expired", "SSE-C key"):
        assert likely in result.stderr.splitlines()[-1]


def without_the_last(body):
    """A listing that says that it goes on, but not where."""
    last = re.findall(rb"<Contents>.*?</Contents>", body, re.DOTALL)[-1]
    body = body.replace(last, b"")
    return body.replace(b"<IsTruncated>false", b"<IsTruncated>true")


@pytest.mark.parametrize("command", [["run"], ["verify", "--repair"]])
def test_listing_that_does_not_say_how_it_goes_on_is_not_taken_for_whole(
    archive, box, s3, command
):
    """s3mock#144, angos#293: what is not listed would be paid for again."""
    fill(box.root, {"a": b"1", "b": b"2"})
    assert archive(AWS_ENDPOINT_URL=s3.url).status == 0
    rows = archive.rows()
    if command == ["run"]:
        archive.state_db.unlink()
    s3.always("ListObjectsV2", rewritten(without_the_last))
    result = archive(*command, AWS_ENDPOINT_URL=s3.url)
    assert result.status == 1
    assert "breaks off" in result.stderr
    s3.rules.clear()
    result = archive(AWS_ENDPOINT_URL=s3.url)
    assert (result.status, s3.requests["PutObject"]) == (0, 2)
    assert archive.rows() == rows


@pytest.mark.parametrize("later", ["without a token", "with the same token"])
def test_listing_that_breaks_off_at_a_later_page_ends(archive, s3, later):
    """Else its pages would come for ever."""

    def answer(exchange):
        found = page(0, 10, is_last=False)
        if later == "without a token" and "continuation-token" in exchange.handler.path:
            found.body = re.sub(rb"<Next\w+>\w+</Next\w+>", b"", found.body)
        return found

    s3.always("ListObjectsV2", answer)
    result = archive("ls", AWS_ENDPOINT_URL=s3.url)
    assert (result.status, s3.requests["ListObjectsV2"]) == (1, 2)
    assert "breaks off" in result.stderr


def test_error_in_an_answer_of_status_200_is_one(archive, box, s3):
    """s3cmd#577, aws-sdk-js#946: CompleteMultipartUpload fails with 200 and an <Error>."""
    fill(box.root, {"once": 16 * MIB, "always": 16 * MIB + 1})
    refusal = error(200, "InternalError")
    s3.on("CompleteMultipartUpload", refusal, key="once")
    s3.always("CompleteMultipartUpload", refusal, key="always")
    result = archive(AWS_ENDPOINT_URL=s3.url, constants={"S3_ATTEMPTS": 2})
    assert (result.status, result.counts) == (3, (1, 0, 1)), result.stderr
    assert set(archive.objects()) == set(archive.contents()) == {"once"}
    archive.assert_invariant()


@pytest.mark.parametrize("prefix", ["/", "/box/", "a//b/", "p q+%2B&=/"])
def test_odd_prefix_comes_back_from_every_listing(archive, box, tmp_path, prefix):
    """rclone#9383, s5cmd#352, aws-cli#3370: keys with `//` in them are skipped or joined."""
    fill(box.root, {"d e+f/g%2B": b"1", "h": b"2"})
    odd = {"S3_PREFIX": prefix, "STORAGE_CLASS": "STANDARD"}
    assert archive(**odd).counts == (2, 0, 0)
    assert set(archive.objects()) == {f"{prefix}d e+f/g%2B", f"{prefix}h"}
    assert archive("verify", **odd).status == 0
    archive.state_db.unlink()
    assert archive(**odd).counts == (0, 0, 0)
    assert archive("restore", "--to", tmp_path / "to", **odd).status == 0
    assert tree(tmp_path / "to") == tree(box.root)


def test_object_that_says_it_is_compressed_comes_back_as_it_is(archive, bucket, tmp_path):
    """rclone#2658, rclone#8137: it is unpacked on its way, and its size then wrong."""
    packed = gzip.compress(b"content" * 1_000)
    bucket.client.put_object(
        Bucket=bucket.name, Key="file.gz", Body=packed, ContentEncoding="gzip"
    )
    assert archive("restore", "--to", tmp_path / "to").status == 0
    assert (tmp_path / "to" / "file.gz").read_bytes() == packed


# --- Whoever starts it ------------------------------------------------------


def test_tilde_before_the_folder_to_restore_to_is_the_home_folder(archive, bucket):
    """restic#801, duplicati#928: no shell expands it in --to=~/x, and a folder ~ is made."""
    bucket.client.put_object(Bucket=bucket.name, Key="file", Body=b"1")
    assert archive("restore", "--to=~/back").status == 0
    assert (archive.folder / "home" / "back" / "file").read_bytes() == b"1"
    assert not (archive.folder / "~").exists()


def test_run_without_any_standard_stream_harms_nothing(archive, box):
    """The state is opened as descriptor 1 or 2 then, and somebody's output goes there."""
    fill(box.root, {"file": b"x"})
    command = 'exec "$0" "$1" --env-file "$2" <&- >&- 2>&-'
    arguments = ["sh", "-c", command, sys.executable, PROGRAM, archive.env_file]
    ended = subprocess.run(arguments, env=archive.environment(), timeout=60, check=False)
    assert ended.returncode == 0
    assert set(archive.rows()) == {"./file"}
    archive.assert_invariant()


def test_run_that_was_suspended_for_a_while_goes_on(archive, box):
    """A laptop that sleeps: restic#3265 and others lose their connections and give up."""
    fill(box.root, {"large": 20 * MIB, "small": b"x"})
    running = archive.start(BANDWIDTH_LIMIT="10M")
    time.sleep(1.5)
    os.kill(running.process.pid, signal.SIGSTOP)
    time.sleep(2)
    os.kill(running.process.pid, signal.SIGCONT)
    result = running.wait()
    assert (result.status, result.counts) == (0, (2, 0, 0)), result.stderr
