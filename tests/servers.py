"""Real servers for tests, on loopback and free ports, with nothing of the system's.

Each is a context manager with its own temporary folder, configuration and keys.
The SFTP servers have one interface, `Box`; as root they serve as the user daemon,
so that a file without permissions is unreadable in every environment.

    with OpenSSH() as box, Moto() as moto:
        (box.root / "file").write_bytes(b"content")
        environment = {**box.settings(), **moto.settings("my-bucket")}
"""

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import asyncssh
import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

IS_ROOT = hasattr(os, "getuid") and os.getuid() == 0

START_LIMIT = 20  # s until a server must answer
START_TRIES = 5  # another process may take the free port before the server does

PASSWORD = "canary-password-5c1d"
PASSWORD_CRYPT = (  # of `openssl passwd -6 -salt canarysalt`
    "$6$canarysalt$GVxyhLkLXS8eBJ58NsUNVQ3kgPLNg/8Xln6/JysC19q27pqF2prO1X92"
    "pDkIBU1TGuQ0jhbd.C0RctkvWQC980"
)
PASSPHRASE = "canary-passphrase-e21b"
SECRET_KEY = "canary-secret-key-8a7e"


class Box:
    """What the SFTP servers have in common; an empty folder `root` is served.

    `settings()` has what archive.py needs to log in. Secrets that must appear in
    no output are in `secrets`.
    """

    host_key_type = "ssh-ed25519"

    def __init__(self):
        self.host = "127.0.0.1"
        self.port = None
        self.user = "u123456"
        self.password = None
        self.secrets = [PASSWORD]

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="box-"))
        self.folder.chmod(0o755)  # pytest's own folders are closed to other users
        self.root = self.folder / "root"
        self.root.mkdir()
        self.key_file = self.folder / "user_key"
        self.user_key = asyncssh.generate_private_key("ssh-ed25519", comment="test")
        self.user_key.write_private_key(self.key_file)
        self.key_file.chmod(0o600)
        self.host_key = asyncssh.generate_private_key(self.host_key_type)
        self.known_hosts = self.folder / "known_hosts"
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        self.know(self.port)
        return self

    def __exit__(self, *exc):
        self.stop()
        # A test may have left folders that even their owner cannot list.
        for folder, names, _ in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    os.chmod(path, 0o755)
        shutil.rmtree(self.folder)

    def know(self, port):
        """Enter the host key in `known_hosts` for `port`, which may be a relay's."""
        key = self.host_key.export_public_key("openssh").decode().strip()
        with self.known_hosts.open("a") as file:
            file.write(f"[{self.host}]:{port} {key}\n")

    def settings(self, port=None):
        """Settings that reach this server, directly or through a relay's `port`."""
        if port is not None:
            self.know(port)
        return {
            "HETZNER_HOST": self.host,
            "HETZNER_PORT": str(port or self.port),
            "HETZNER_USER": self.user,
            "HETZNER_KEY_FILE": str(self.key_file),
            "HETZNER_KNOWN_HOSTS": str(self.known_hosts),
            "REMOTE_PATH": ".",
        }


class _Daemon(Box):
    """A Box that is served by a program; subclasses have `prepare` and `command`."""

    process = None

    def __init__(self):
        super().__init__()
        self.account, self.group, self.ids = ordinary_user()

    def start(self):
        self.log = self.folder / "server.log"
        self.service = self.folder / "service"  # what the server's user may read
        self.service.mkdir(mode=0o700)
        self.prepare()
        for path in (self.service, *self.service.iterdir()):
            os.chown(path, *self.ids)
        for _ in range(START_TRIES):
            self.port = free_port()
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    **self.run_as(),
                )
            if self.answers():
                return
            self.stop()
        raise RuntimeError(f"{self.program} did not start: {self.log.read_text()}")

    def stop(self):
        if self.process is not None:
            # A session that is stuck, in a FIFO say, would outlive the server.
            sessions = list(descendants(self.process.pid))
            self.process.terminate()
            try:
                self.process.wait(START_LIMIT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for pid in sessions:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def run_as(self):
        """Arguments for Popen that make root's child an ordinary user's process."""
        if not IS_ROOT:
            return {}
        uid, gid = self.ids
        return {"user": uid, "group": gid, "extra_groups": []}

    def answers(self):
        """Whether it sent its banner, in time and before it ended."""
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with socket.create_connection((self.host, self.port), 2) as connection:
                    if connection.recv(4) == b"SSH-":
                        return self.process.poll() is None
            except OSError:
                pass
            time.sleep(0.02)
        return False

    def keep(self, name, content):
        """Write a file that only the server's user may read; the path as text."""
        path = self.service / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(0o600)
        return str(path)


class OpenSSH(_Daemon):
    """Debian's sshd with its internal-sftp; login by key, passwords need the system."""

    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")

    def prepare(self):
        self.user = self.account
        host_key = self.keep("host_key", self.host_key.export_private_key())
        keys = self.keep("keys", self.user_key.export_public_key())
        self.config = self.keep(
            "sshd_config",
            f"HostKey {host_key}\nAuthorizedKeysFile {keys}\n"
            f"Subsystem sftp internal-sftp -d {self.root}\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n"
            "MaxStartups 100\nUseDNS no\n",
        )

    def command(self):
        listen = f"ListenAddress={self.host}:{self.port}"
        return [self.program, "-D", "-e", "-f", self.config, "-o", listen]


class ProFTPD(_Daemon):
    """Debian's ProFTPD with mod_sftp, as on a box's port 22; by key or password."""

    program = shutil.which("proftpd", path="/usr/sbin:/usr/local/sbin")
    modules = "/usr/lib/proftpd"
    host_key_type = "ecdsa-sha2-nistp256"  # in PEM: 1.3.9 does not read OpenSSH's form

    def prepare(self):
        self.password = PASSWORD
        uid, gid = self.ids
        host_key = self.keep("host_key", self.host_key.export_private_key("pkcs1-pem"))
        keys = self.keep("keys", self.user_key.export_public_key("rfc4716"))
        entry = f"{self.user}:{PASSWORD_CRYPT}:{uid}:{gid}::{self.root}:/bin/false\n"
        self.config_text = f"""
            ModulePath {self.modules}
            LoadModule mod_sftp.c
            ServerType standalone
            ServerName box
            DefaultAddress {self.host}
            SocketBindTight on
            UseIPv6 off
            UseReverseDNS off
            User {self.account}
            Group {self.group}
            AuthOrder mod_auth_file.c
            AuthUserFile {self.keep("users", entry)}
            RequireValidShell off
            WtmpLog off
            TransferLog none
            SystemLog {self.service}/system.log
            ScoreboardFile {self.service}/scoreboard
            PidFile {self.service}/pid
            <IfModule mod_delay.c>
              DelayEngine off
            </IfModule>
            MaxInstances 40
            SFTPEngine on
            SFTPHostKey {host_key}
            SFTPAuthMethods publickey password
            SFTPAuthorizedUserKeys file:{keys}
        """

    def command(self):
        config = self.keep("proftpd.conf", f"{self.config_text}\nPort {self.port}\n")
        os.chown(config, *self.ids)
        return [self.program, "--nodaemon", "--config", config]


def ordinary_user():
    """(user, group, (uid, gid)) that servers run as: daemon for root, else our own."""
    import grp  # noqa: PLC0415  neither of these is on Windows
    import pwd  # noqa: PLC0415

    user = pwd.getpwnam("daemon") if IS_ROOT else pwd.getpwuid(os.getuid())
    ids = (user.pw_uid, user.pw_gid)
    return user.pw_name, grp.getgrgid(user.pw_gid).gr_name, ids


def descendants(pid):
    """The processes below a process, where there is a /proc to tell."""
    with contextlib.suppress(FileNotFoundError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from descendants(child)
            yield int(child)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class AsyncSSHBox(Box):
    """asyncssh's server in a thread of this process: any login method, and any fault.

    `methods` are the logins that it offers, by their names in SSH. `sftp_server`
    takes a subclass of asyncssh.SFTPServer, for faults. `attempts` lists the
    (user, method) of each login tried, `connections` counts what was accepted. Host
    keys in `more_host_keys` are offered too, but not entered in `known_hosts`.
    The client's "/" is `root`.
    """

    unprivileged = True  # as root; not for a server that is to change files itself

    def __init__(
        self,
        methods=("publickey", "password", "keyboard-interactive"),
        sftp_server=asyncssh.SFTPServer,
        host="127.0.0.1",
        more_host_keys=(),
    ):
        super().__init__()
        self.more_host_keys = more_host_keys
        self.host = host
        self.password = PASSWORD
        self.methods = methods
        self.sftp_server = sftp_server
        self.attempts = []
        self.connections = 0

    def start(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        listening = asyncio.run_coroutine_threadsafe(self._listen(), self.loop)
        self.listener = listening.result(START_LIMIT)
        self.port = self.listener.get_port()

    def stop(self):
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(START_LIMIT)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(START_LIMIT)
        self.loop.close()

    def _serve(self):
        if self.unprivileged and IS_ROOT and sys.platform == "linux":
            # Only this thread loses root's right to read everything.
            ctypes.CDLL(None).setfsuid(ordinary_user()[2][0])
        self.loop.run_forever()

    async def _listen(self):
        self.open = set()
        return await asyncssh.listen(
            self.host,
            0,
            server_factory=lambda: _Login(self),
            server_host_keys=[self.host_key, *self.more_host_keys],
            sftp_factory=lambda channel: self.sftp_server(
                channel, chroot=os.fsencode(self.root)
            ),
        )

    async def _close(self):
        self.listener.close()
        for connection in list(self.open):
            connection.abort()
        await self.listener.wait_closed()

    def settings(self, port=None):
        """Settings for a login with the password."""
        settings = super().settings(port)
        del settings["HETZNER_KEY_FILE"]
        return {**settings, "HETZNER_PASSWORD": self.password}


class _Login(asyncssh.SSHServer):
    """One connection's login on an AsyncSSHBox."""

    def __init__(self, box):
        self.box = box

    def connection_made(self, conn):
        self.connection = conn
        self.box.connections += 1
        self.box.open.add(conn)

    def connection_lost(self, exc):
        self.box.open.discard(self.connection)

    def begin_auth(self, username):
        # Before each further try paramiko asks for the service again. sshd and
        # ProFTPD take that, and asyncssh does too if it awaits it.
        self.connection._next_service = b"ssh-userauth"
        return True

    def public_key_auth_supported(self):
        return "publickey" in self.box.methods

    def password_auth_supported(self):
        return "password" in self.box.methods

    def kbdint_auth_supported(self):
        return "keyboard-interactive" in self.box.methods

    def validate_public_key(self, username, key):
        self.box.attempts.append((username, "publickey"))
        return (username, key) == (self.box.user, self.box.user_key.convert_to_public())

    def validate_password(self, username, password):
        self.box.attempts.append((username, "password"))
        return (username, password) == (self.box.user, self.box.password)

    def get_kbdint_challenge(self, username, lang, submethods):
        return "", "", "", [("Password: ", False)]

    def validate_kbdint_response(self, username, responses):
        self.box.attempts.append((username, "keyboard-interactive"))
        return (username, list(responses)) == (self.box.user, [self.box.password])


class Moto:
    """moto's S3 over HTTP, in threads of this process, with the requests on record.

    `requests` lists what arrived as (method, path, query).
    """

    secrets = (SECRET_KEY,)

    def __enter__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.requests = []
        # Not moto's dispatcher: for each request, it would look for the service among all.
        self._application = create_backend_app("s3")
        self._server = make_server(
            "127.0.0.1", 0, self._answer, True, request_handler=MotoRequestHandler
        )
        self.port = self._server.port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._thread.join(START_LIMIT)
        self._server.server_close()

    def _answer(self, environ, start_response):
        query = environ["QUERY_STRING"]
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], query))
        return self._application(environ, start_response)

    def settings(self, bucket):
        return {
            "S3_BUCKET": bucket,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    @functools.cached_property
    def client(self):
        """One for all tests: it takes as long to make as some requests."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="AKIAIOSFODNN7EXAMPLE",
            aws_secret_access_key=SECRET_KEY,
        )

    def content(self, bucket, key):
        """The bytes of an object, cold or not, without restoring it."""
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        return backend.get_object(bucket, key).value

    def reset(self):
        """Forget all buckets, objects and recorded requests."""
        s3_backends.reset()
        self.requests.clear()
