"""Who is on the other end, and who are we: host keys and logins."""

import base64
import hashlib
import os
import socket
import struct
import subprocess
import threading

import asyncssh
import pytest
from conftest import fill, real
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from relay import Relay
from servers import PASSPHRASE, AsyncSSHBox, OpenSSH, ProFTPD

# Makes any host name resolve to this machine, as a forged DNS answer would.
FORGED_DNS = """
import socket
real = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **more: real(
    "127.0.0.1" if "storagebox" in str(host) else host, *rest, **more
)
"""


def fingerprint(key):
    """As ssh shows it: SHA256:..."""
    digest = hashlib.sha256(key.public_data).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def one_line(result):
    """The error of a run that must have said what is wrong in a single line."""
    [line] = result.stderr.splitlines()
    return line


class Agent:
    """A running SSH agent that holds one key (draft-miller-ssh-agent)."""

    def __init__(self, key, folder):
        self.key = key
        self.path = str(folder / "agent")
        self.signatures = 0
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as stream:
                while header := stream.read(4):
                    request = stream.read(*struct.unpack(">I", header))
                    stream.write(string(self.answer(request)))
                    stream.flush()

    def answer(self, request):
        if request[0] == 11:  # SSH_AGENTC_REQUEST_IDENTITIES
            key = string(self.key.public_data) + string(b"comment")
            return b"\x0c" + struct.pack(">I", 1) + key
        assert request[0] == 13  # SSH_AGENTC_SIGN_REQUEST
        self.signatures += 1
        length = struct.unpack_from(">I", request, 1)[0]
        data = request[9 + length :]
        data = data[: struct.unpack_from(">I", request, 5 + length)[0]]
        return b"\x0e" + string(self.key.sign(data, b"ssh-ed25519"))


def string(data):
    return struct.pack(">I", len(data)) + data


@pytest.fixture
def archive(archive_of, asyncssh_box):
    fill(asyncssh_box.root, {"file": b"x"})
    return archive_of(asyncssh_box)


# --- Ways to log in ---


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
def test_a_password_is_enough_however_the_server_asks_for_it(archive_of, method):
    with AsyncSSHBox(methods=[method]) as box:
        fill(box.root, {"file": b"x"})

        assert archive_of(box)().counts == (1, 0, 0)

        assert box.attempts[-1] == (box.user, method)


def test_a_password_is_enough_for_proftpd(archive_of):
    with real(ProFTPD) as box:
        fill(box.root, {"file": b"x"})

        result = archive_of(box)(HETZNER_KEY_FILE=None, HETZNER_PASSWORD=box.password)

        assert result.counts == (1, 0, 0)


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256"])
def test_a_key_file_of_any_usual_kind_is_enough(archive_of, kind):
    with AsyncSSHBox(methods=["publickey"]) as box:
        fill(box.root, {"file": b"x"})
        # With a comment, as always: paramiko trips over some keys without one.
        box.user_key = asyncssh.generate_private_key(kind, comment="me@home")
        box.user_key.write_private_key(box.key_file)

        result = archive_of(box)(HETZNER_PASSWORD=None, HETZNER_KEY_FILE=box.key_file)

        assert result.counts == (1, 0, 0)


def test_a_password_helps_where_the_key_is_refused(archive_of):
    with real(ProFTPD) as box:
        fill(box.root, {"file": b"x"})
        archive = archive_of(box, HETZNER_PASSWORD=box.password)
        other = archive.folder / "other_key"
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(other)

        assert archive(HETZNER_KEY_FILE=other).counts == (1, 0, 0)


@pytest.fixture
def locked_box():
    """A box whose user's key file has a passphrase."""
    with AsyncSSHBox(methods=["publickey"]) as box:
        fill(box.root, {"file": b"x"})
        box.user_key.write_private_key(box.key_file, passphrase=PASSPHRASE)
        box.secrets.append(PASSPHRASE)
        yield box


def test_a_key_file_with_its_passphrase_is_enough(archive_of, locked_box):
    result = archive_of(locked_box)(
        HETZNER_PASSWORD=None,
        HETZNER_KEY_FILE=locked_box.key_file,
        HETZNER_KEY_PASSPHRASE=PASSPHRASE,
    )

    assert result.counts == (1, 0, 0)


def test_the_agent_is_asked_where_neither_password_nor_key_file_is_set(
    archive, asyncssh_box, tmp_path
):
    agent = Agent(asyncssh_box.user_key, tmp_path)

    result = archive(HETZNER_PASSWORD=None, SSH_AUTH_SOCK=agent.path)

    assert result.counts == (1, 0, 0)
    assert agent.signatures == 1


def test_an_agent_that_is_silent_is_waited_for_only_so_long(archive, tmp_path):
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(tmp_path / "silent"))
        agent.listen()
        result = archive(
            constants={"CONNECT_LIMIT": 2},
            HETZNER_PASSWORD=None,
            SSH_AUTH_SOCK=str(tmp_path / "silent"),
        )
    assert result.status == 1
    assert "SSH agent does not answer" in result.stderr
    assert "connecting again" not in result.stderr


def test_the_agent_is_left_alone_where_a_password_is_set(archive, asyncssh_box, tmp_path):
    agent = Agent(asyncssh_box.user_key, tmp_path)

    result = archive(HETZNER_PASSWORD="wrong", SSH_AUTH_SOCK=agent.path)

    assert result.status == 1
    assert agent.signatures == 0


def test_keys_that_lie_in_the_home_folder_are_not_tried(archive, asyncssh_box):
    folder = archive.folder / "home" / ".ssh"
    folder.mkdir()
    asyncssh_box.user_key.write_private_key(folder / "id_ed25519")

    assert archive(HETZNER_PASSWORD="wrong").status == 1

    assert (asyncssh_box.user, "publickey") not in asyncssh_box.attempts


def test_a_box_is_reached_over_ipv6(archive_of):
    with AsyncSSHBox(host="::1") as box:
        fill(box.root, {"file": b"x"})

        assert archive_of(box)().counts == (1, 0, 0)


# --- Logins that fail ---


def assert_login_fails(result, *words):
    """Status 1, one line that has all the words, nothing done."""
    assert result.status == 1
    line = one_line(result)
    assert [word for word in words if word not in line] == []


def test_a_wrong_password_ends_the_run_with_the_setting_to_correct(archive, asyncssh_box):
    assert_login_fails(archive(HETZNER_PASSWORD="wrong"), "HETZNER_PASSWORD")

    assert archive.bucket.list() == []
    # It is not tried again and again: once as a password, once in answer to the question.
    assert len(asyncssh_box.attempts) <= 2
    assert asyncssh_box.connections == 1


def test_a_refused_key_ends_the_run_with_the_setting_to_correct(archive_of, box):
    """On the real servers."""
    archive = archive_of(box)
    other = archive.folder / "other_key"
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(other)

    assert_login_fails(archive(HETZNER_KEY_FILE=other), "key", "HETZNER_KEY_FILE")


@pytest.mark.parametrize("password", [None, "canary-password"])
def test_a_login_at_which_the_box_hangs_up_is_tried_once_more_only(archive_of, password):
    """As OpenSSH does when it has had enough; more tries, and it may ban this machine."""

    class Impatient(OpenSSH):
        def prepare(self):
            super().prepare()
            with open(self.config, "a") as config:
                config.write("MaxAuthTries 1\n")

    with real(Impatient) as box, Relay(box.host, box.port) as relay:
        archive = archive_of(box)
        other = archive.folder / "other_key"
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(other)

        settings = box.settings(port=relay.port) | {"HETZNER_KEY_FILE": other}
        result = archive(**settings, HETZNER_PASSWORD=password)

    assert result.status == 1
    assert "correct HETZNER_USER" in result.stderr.splitlines()[-1]
    assert f"HETZNER_KEY_FILE {other}" in result.stderr.splitlines()[-1]
    assert relay.connections <= 2


@pytest.mark.parametrize("passphrase", [None, "canary-wrong-passphrase"])
def test_a_missing_or_wrong_passphrase_ends_the_run_with_the_setting_to_correct(
    archive_of, locked_box, passphrase
):
    archive = archive_of(locked_box)
    archive.secrets.append("canary-wrong")

    result = archive(
        HETZNER_PASSWORD=None,
        HETZNER_KEY_FILE=locked_box.key_file,
        HETZNER_KEY_PASSPHRASE=passphrase,
    )

    assert_login_fails(result, "HETZNER_KEY_PASSPHRASE")
    assert locked_box.attempts == []


def pem(key):
    """A private key as PKCS#8."""
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(*form, serialization.NoEncryption())


@pytest.mark.parametrize("kind", ["missing", "not a key", "a public key", "X25519"])
def test_a_key_file_that_is_none_ends_the_run_with_its_path(archive, asyncssh_box, kind):
    path = archive.folder / "key"
    if kind == "not a key":
        path.write_bytes(os.urandom(300))
    elif kind == "a public key":
        path.write_bytes(asyncssh_box.user_key.export_public_key())
    elif kind == "X25519":
        path.write_bytes(pem(X25519PrivateKey.generate()))

    result = archive(HETZNER_PASSWORD=None, HETZNER_KEY_FILE=path)

    assert_login_fails(result, str(path))
    assert asyncssh_box.attempts == []


def test_no_credential_at_all_is_a_fault_of_the_settings(archive, asyncssh_box):
    result = archive(HETZNER_PASSWORD=None)

    assert result.status == 2
    for setting in ("HETZNER_PASSWORD", "HETZNER_KEY_FILE"):
        assert setting in result.stderr
    assert asyncssh_box.connections == 0


@pytest.mark.parametrize("where", ["port", "host"])
def test_a_box_that_cannot_be_reached_ends_the_run_with_its_name(archive, where):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        host, port = {
            "port": ("127.0.0.1", closed.getsockname()[1]),
            "host": ("no-such-box.invalid", 23),
        }[where]

        result = archive(
            constants={"RECONNECT_PAUSES": (0, 0.1)}, HETZNER_HOST=host, HETZNER_PORT=port
        )

    assert result.status == 1
    assert host in result.stderr.splitlines()[-1]


# --- Host keys ---


def test_an_unknown_host_key_ends_the_run_before_any_credential_is_sent(archive, asyncssh_box):
    asyncssh_box.known_hosts.write_text("")

    result = archive()

    assert result.status == 1
    assert fingerprint(asyncssh_box.host_key) in result.stderr
    assert "HETZNER_KNOWN_HOSTS" in result.stderr
    assert str(asyncssh_box.known_hosts) in result.stderr
    assert asyncssh_box.connections == 1
    assert asyncssh_box.attempts == []
    assert archive.bucket.list() == []


@pytest.mark.parametrize("before", ["", "other ssh-rsa AAAA"], ids=["none", "no line break"])
def test_host_key_is_accepted_with_the_command_that_the_message_names(
    archive, asyncssh_box, before
):
    """Also behind a last line without its line break, which it leaves as it is."""
    asyncssh_box.known_hosts.write_text(before)
    command = archive().stderr.partition("accept it with: ")[2]
    assert command.startswith("mkdir -p ")

    subprocess.run(command, shell=True, check=True)

    assert archive().status == 0
    assert before in asyncssh_box.known_hosts.read_text().split("\n")


def test_a_changed_host_key_ends_the_run_before_any_credential_is_sent(archive, asyncssh_box):
    real_key = asyncssh_box.host_key
    asyncssh_box.known_hosts.write_text("")
    asyncssh_box.host_key = asyncssh.generate_private_key("ssh-ed25519")
    asyncssh_box.know(asyncssh_box.port)

    result = archive()

    assert result.status == 1
    assert fingerprint(real_key) in result.stderr
    assert f", not {fingerprint(asyncssh_box.host_key)} as in" in result.stderr
    assert "has changed" in result.stderr and "ssh-keygen -R" in result.stderr
    assert asyncssh_box.attempts == []


def test_host_keys_are_known_from_the_home_folder_unless_told_otherwise(archive, asyncssh_box):
    folder = archive.folder / "home" / ".ssh"
    folder.mkdir()
    asyncssh_box.known_hosts.rename(folder / "known_hosts")

    assert archive(HETZNER_KNOWN_HOSTS=None).status == 0


def test_of_several_host_keys_the_one_that_is_known_is_asked_for(archive_of):
    rsa = asyncssh.generate_private_key("ssh-rsa")
    with AsyncSSHBox(more_host_keys=[rsa]) as box:
        fill(box.root, {"file": b"x"})
        key = rsa.export_public_key().decode()
        box.known_hosts.write_text(f"[{box.host}]:{box.port} {key}")

        assert archive_of(box)().status == 0


@pytest.mark.parametrize("known", ["ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"])
def test_of_two_ecdsa_host_keys_the_one_that_is_known_is_asked_for(archive_of, known):
    key = asyncssh.generate_private_key(known)
    other = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
    with AsyncSSHBox(more_host_keys=[key, other]) as box:
        fill(box.root, {"file": b"x"})
        public = key.export_public_key().decode()
        box.known_hosts.write_text(f"[{box.host}]:{box.port} {public}")

        assert archive_of(box)().status == 0


def test_an_impostor_of_a_storage_box_is_refused_before_any_credential_is_sent(
    archive, asyncssh_box
):
    host = "u123456.your-storagebox.de"

    result = archive(before=FORGED_DNS, HETZNER_HOST=host, HETZNER_USER="u123456")

    assert result.status == 1
    assert fingerprint(asyncssh_box.host_key) in result.stderr
    assert asyncssh_box.attempts == []


def test_a_name_that_only_looks_like_a_storage_box_is_pinned_to_nothing(archive, asyncssh_box):
    """Built-in keys hold for *.your-storagebox.de, known_hosts for all the others."""
    host = "evil-your-storagebox.de"
    line = asyncssh_box.known_hosts.read_text().replace("127.0.0.1", host)
    asyncssh_box.known_hosts.write_text(line)

    assert archive(before=FORGED_DNS, HETZNER_HOST=host).status == 0


def test_a_damaged_known_hosts_file_does_not_make_every_key_known(archive, asyncssh_box):
    asyncssh_box.known_hosts.write_bytes(b"\x00\xff garbage\n[127.0.0.1 ssh-rsa\n")

    result = archive()

    assert result.status == 1
    assert asyncssh_box.attempts == []


@pytest.mark.parametrize("mark", ["#other,", "  #*,", "@cert-authority "])
def test_line_of_known_hosts_that_is_no_host_key_makes_none_known(archive, asyncssh_box, mark):
    line = asyncssh_box.known_hosts.read_text()
    asyncssh_box.known_hosts.write_text(mark + line)

    result = archive()

    assert result.status == 1
    assert "which is not in HETZNER_KNOWN_HOSTS" in result.stderr
    assert asyncssh_box.attempts == []


@pytest.mark.parametrize("bad", ["A", "\u00e9", " of a type that is not known"])
def test_damaged_line_of_known_hosts_counts_for_nothing(archive, asyncssh_box, bad):
    names, kind, _ = asyncssh_box.known_hosts.read_text().split()[:3]
    good = asyncssh_box.known_hosts.read_text()
    asyncssh_box.known_hosts.write_text(f"{names} {kind} AAAA{bad}\n")

    result = archive()

    assert result.status == 1
    assert "which is not in HETZNER_KNOWN_HOSTS" in result.stderr
    assert asyncssh_box.connections == 1
    asyncssh_box.known_hosts.write_text(f"{names} {kind} AAAA{bad}\n{good}")
    assert archive().status == 0


def test_no_secret_is_in_the_most_talkative_output(archive):
    """The fixture looks for secrets in the output of every run, so also here."""
    assert archive("-v").status == 0
    archive.secrets.append("canary-wrong")
    assert archive("-v", HETZNER_PASSWORD="canary-wrong-password").status == 1
    assert archive("-v", AWS_SESSION_TOKEN="canary-wrong-token").status in (0, 1)
