"""What the tests share: real servers, and the program run as its users run it.

A test takes `archive` and calls it; `box` is the SFTP server behind it, `bucket`
the empty S3 bucket:

    def test_file_is_archived_under_its_own_name(archive, box):
        (box.root / "a.txt").write_bytes(b"content")
        result = archive()
        assert result.status == 0
        assert archive.objects() == {"a.txt": (7, crc32(b"content"), "DEEP_ARCHIVE")}

`box` makes such a test run once on OpenSSH and once on ProFTPD. A test module for
which the server does not matter says so by overriding it:

    @pytest.fixture
    def box(asyncssh_box):
        return asyncssh_box

`archive_of(box, **settings)` makes further Archives with a state of their own.

Most runs are forks of a process that has imported archive.py (starter.py): a start takes
ten times as long as the rest of a short run. Each run of a test with the mark

    @pytest.mark.as_users_do

is started as users do, `python archive.py`: the main ones of the ordinary job and of settings
and command line, and tests of memory, of the process list and of kills at any instant. So is
a run with variables that Python itself reads as it starts, and with TEST_FRESH=1 in the
environment every run.
"""

import base64
import contextlib
import gc
import hashlib
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from faulty_sftp import FaultyBox
from scripted_s3 import ScriptedS3, StrictS3
from servers import AsyncSSHBox, Moto, OpenSSH, ProFTPD
from starter import ENVIRONMENT, OWN_START, Starter

PROGRAM = Path(__file__).resolve().parent.parent / "archive.py"
LABELS = {"Uploaded files", "Skipped files", "Failed files", "Bytes uploaded", "Duration (sec)"}
MIB = 2**20
OLD = 1_600_000_000  # a time of modification that is not "just now"

TIMEOUT = 120  # s for a test, far more than any should need

# Runs the program with things changed beforehand: constants of the module, or more.
CHANGED = """
import os
import sys
sys.path.insert(0, {folder!r})
import archive
for name, value in {constants!r}.items():
    getattr(archive, name)
    setattr(archive, name, value)
{before}
os._exit(archive.main())  # as the program itself: no thread is waited for
"""

# A shell's background job ignores it, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.umask(0o022)  # the servers' user must be able to read what tests create

# The tests' own clients of S3 read nothing of whoever runs them: a profile, say, ends them.
for name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[name]
os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull


@dataclass
class Result:
    """How one run of the program ended and what it said."""

    status: int
    stdout: str
    stderr: str
    log: str  # everything that LOG_FILE holds, earlier runs included

    @property
    def output(self):
        return self.stdout + self.stderr

    @property
    def summary(self):
        """The summary's numbers by label, empty if there is no summary."""
        _, _, block = self.stdout.partition("==== SUMMARY ====\n")
        lines = re.findall(r"^(\w[^:\n]*?) *: ([\d,]+)$", block, re.MULTILINE)
        return {
            label: int(number.replace(",", "")) for label, number in lines if label in LABELS
        }

    @property
    def counts(self):
        """(uploaded, skipped, failed) of the summary."""
        labels = ("Uploaded files", "Skipped files", "Failed files")
        return tuple(self.summary[label] for label in labels)

    @property
    def compared(self):
        """How many files were compared with what S3 holds and not sent."""
        found = re.search(r"^Compared files *: ([\d,]+)$", self.stdout, re.MULTILINE)
        return int(found[1].replace(",", "")) if found else 0

    @property
    def failures(self):
        """The lines that begin with FAIL, without that word."""
        return re.findall(r"FAIL (.*)", self.stderr)


class Running:
    """A run in the background; `wait` for its Result."""

    def __init__(self, archive, process):
        self.archive = archive
        self.process = process

    def wait(self, timeout=TIMEOUT):
        stdout, stderr = self.process.communicate(timeout=timeout)
        return self.archive.result(self.process.returncode, stdout, stderr)


class Archive:
    """archive.py with its settings, its state and its bucket, for one test."""

    starter = None  # what forks the runs of all tests
    as_users_do = "TEST_FRESH" in os.environ

    def __init__(self, box, bucket, folder, **settings):
        self.box = box
        self.bucket = bucket
        self.folder = folder
        self.state_db = folder / "state.db"
        self.log_file = folder / "archive.log"
        self.env_file = folder / "empty.env"
        self.settings = {**box.settings(), **bucket.settings(), **settings}
        self.secrets = [*box.secrets, *bucket.secrets]
        self.running = []
        (folder / "home").mkdir(parents=True)
        self.env_file.touch(mode=0o600)

    def __call__(self, *args, timeout=TIMEOUT, constants=None, **settings):
        """Run to the end. A setting of None is left out of the environment."""
        return self.start(*args, constants=constants, **settings).wait(timeout)

    def start(self, *args, constants=None, before="", **settings):
        """Start a run in the background; the end of the test ends it too.

        `constants` are set in the module and the code `before` is executed in the
        process before the program's main function.
        """
        # Never the .env that a developer may have beside archive.py.
        own = [] if "--env-file" in args else ["--env-file", self.env_file]
        arguments = [str(argument) for argument in (*own, *args)]
        environment = self.environment(**settings)
        code = CHANGED.format(
            folder=str(PROGRAM.parent), constants=constants or {}, before=before
        )
        if not self.as_users_do and not reads_as_it_starts(environment):
            command = [str(PROGRAM), *arguments]
            process = self.starter.start(code, command, environment, str(self.folder))
        else:
            program = ["-c", code] if constants or before else [str(PROGRAM)]
            process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="surrogateescape",
            )
        self.running.append(process)
        return Running(self, process)

    def environment(self, **settings):
        """A whole environment, made from nothing."""
        environment = {
            **ENVIRONMENT,
            "HOME": str(self.folder / "home"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "STATE_DB": str(self.state_db),
            "LOG_FILE": str(self.log_file),
            **self.settings,
            **settings,
        }
        return {name: str(value) for name, value in environment.items() if value is not None}

    def result(self, status, stdout, stderr):
        """A Result, after a look at what must hold for the output of every run."""
        log = ""
        with contextlib.suppress(FileNotFoundError):
            log = self.log_file.read_text("utf-8", "surrogateescape")
        for text in (stdout or "", stderr, log):
            assert not [secret for secret in self.secrets if secret in text]
            assert "Traceback" not in text, text
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\udc80-\udcff]", text)
        return Result(status, stdout, stderr, log)

    def terminate(self):
        """Send SIGTERM to the latest run."""
        self.running[-1].terminate()

    def kill(self):
        """Kill the latest run at once; it is gone when this returns."""
        self.running[-1].kill()
        self.running[-1].wait()

    def objects(self):
        """{key: (size, crc32, storage class)} of the bucket.

        The CRC-32 is that of the bytes which S3 holds, not one that S3 was told.
        """
        return {
            entry["Key"]: (
                entry["Size"],
                crc32(self.bucket.content(entry["Key"])),
                entry["StorageClass"],
            )
            for entry in self.bucket.list()
        }

    def contents(self):
        """{key: bytes} of the bucket."""
        return {key: self.bucket.content(key) for key in self.objects()}

    def query(self, sql, *values):
        """Rows of the state database, which is only read."""
        with contextlib.closing(
            sqlite3.connect(f"file:{self.state_db}?mode=ro", uri=True)
        ) as db:
            return db.execute(sql, values).fetchall()

    def execute(self, sql, *values):
        """Change the state database, as nobody but a test should."""
        with contextlib.closing(sqlite3.connect(self.state_db)) as db, db:
            db.execute(sql, values)

    def rows(self):
        """{path: (size, mtime)} of the state, empty if there is none."""
        if not self.state_db.exists():
            return {}
        return {
            path: (size, mtime)
            for path, size, mtime in self.query("SELECT path, size, mtime FROM files")
        }

    def assert_invariant(self, named=frozenset()):
        """Each row has an object of that size; with an mtime also of that CRC-32, as far as
        the state knows one.  Unfinished uploads below our prefix are known to the state,
        but for those whose keys are `named`.

        Multipart uploads outside of our prefix are other people's.
        """
        objects = self.objects()
        recorded, unfinished = [], set()
        if self.state_db.exists():
            assert self.query("PRAGMA integrity_check") == [("ok",)]
            recorded = self.query(
                "SELECT path, size, mtime, key, crc32 FROM files LEFT JOIN objects USING (path)"
            )
            unfinished = {key for (key,) in self.query("SELECT key FROM uploads")}
        for path, size, mtime, key, crc in recorded:
            assert key in objects, f"{path} is recorded, but S3 has no {key}"
            if mtime is not None:
                held_size, held_crc, _ = objects[key]
                assert held_size == size, path
                if crc is not None:
                    assert held_crc == self.bucket.checksum(key) == crc, path
        prefix = self.settings.get("S3_PREFIX", "")
        left = {key for key in self.bucket.uploads() if key.startswith(prefix)}
        assert left <= unfinished | named, "unfinished uploads that nobody goes on with"


def reads_as_it_starts(environment):
    """Whether Python would start otherwise with these variables than the starter did."""
    return any(
        name.startswith(OWN_START) and ENVIRONMENT.get(name) != value
        for name, value in environment.items()
    )


class Bucket:
    """One bucket on moto."""

    secrets = Moto.secrets

    def __init__(self, moto, name):
        self.moto = moto
        self.name = name
        self.client = moto.client
        self.client.create_bucket(Bucket=name)

    def settings(self):
        return self.moto.settings(self.name)

    def list(self):
        """All entries of ListObjectsV2."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [entry for page in pages for entry in page.get("Contents", [])]

    def set_lifecycle(self, *rules):
        self.client.put_bucket_lifecycle_configuration(
            Bucket=self.name, LifecycleConfiguration={"Rules": rules}
        )

    def content(self, key):
        return self.moto.content(self.name, key)

    def checksum(self, key):
        """The CRC-32 of the whole object that S3 stores beside it; None if none."""
        head = self.client.head_object(Bucket=self.name, Key=key, ChecksumMode="ENABLED")
        value = head.get("ChecksumCRC32")
        return value and int.from_bytes(base64.b64decode(value), "big")

    def uploads(self):
        """The keys of multipart uploads that were begun, but not ended or aborted."""
        return [upload["Key"] for upload in self._uploads()]

    def upload_ids(self, key=None):
        """The ids of these uploads, of all keys or of one."""
        return {
            upload["UploadId"] for upload in self._uploads() if key in (None, upload["Key"])
        }

    def _uploads(self):
        listing = self.client.list_multipart_uploads(Bucket=self.name)
        return listing.get("Uploads", [])

    def writes(self):
        """The requests that could change the bucket, as (method, path, query)."""
        return [request for request in self.moto.requests if request[0] not in "GET HEAD"]


def pytest_xdist_auto_num_workers():
    """For `-n auto`: more than there are cores, since half of the time is waiting."""
    return len(os.sched_getaffinity(0)) + 3


def pytest_configure(config):
    config.addinivalue_line("markers", "as_users_do: no run is a fork of the starter's")


def pytest_collection_finish():
    """Let the garbage collector skip what was imported, which is most of what there is."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT))


def real(server):
    """A server of that class; asyncssh's where it is not installed.

    Under CI nothing takes its place: a missing server is a failure.
    """
    if server.program is None:
        assert "CI" not in os.environ, f"{server.__name__} is not installed"
        return AsyncSSHBox()
    return server()


@pytest.fixture(params=[OpenSSH, ProFTPD], ids=["openssh", "proftpd"])
def box(request):
    """Each real SFTP server in turn."""
    with real(request.param) as running:
        yield running


@pytest.fixture
def asyncssh_box():
    """A server in this process, which starts faster and knows all login methods."""
    with AsyncSSHBox() as running:
        yield running


@pytest.fixture
def faulty_box():
    """A server that misbehaves where it is told to, and counts."""
    with FaultyBox() as running:
        yield running
        # The number of a closed handle may be another file's by then.
        assert running.requests["STALE"] == 0, "a handle was used after it was closed"


@pytest.fixture(scope="session")
def moto():
    with Moto() as running:
        yield running


@pytest.fixture
def bucket(moto):
    """A fresh, empty bucket."""
    bucket = Bucket(moto, f"archive-{uuid.uuid4().hex[:12]}")
    moto.requests.clear()
    yield bucket
    moto.reset()


@pytest.fixture
def s3(moto):
    """A way to moto that counts, and answers by script."""
    with ScriptedS3(moto.url) as running:
        yield running


@pytest.fixture
def strict_s3(moto):
    """The same, with the checksums of parts and of whole uploads that S3 has."""
    with StrictS3(moto.url) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def starter():
    with Starter(PROGRAM.parent) as Archive.starter:
        yield


@pytest.fixture
def archive_of(request, bucket, tmp_path):
    """Makes an Archive of a given box, each with a folder and state of its own."""
    made = []

    def make(box, **settings):
        folder = tmp_path / f"archive{len(made) or ''}"
        made.append(Archive(box, bucket, folder, **settings))
        if request.node.get_closest_marker("as_users_do"):
            made[-1].as_users_do = True
        return made[-1]

    yield make
    for archive in made:
        for process in archive.running:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def archive(archive_of, box):
    return archive_of(box)


def earlier_database(archive, rows, uploaded_at=1_700_000_000):
    """A state as earlier scripts left it: one table, rows of (path, size, mtime)."""
    with contextlib.closing(sqlite3.connect(archive.state_db)) as db, db:
        db.execute(
            "CREATE TABLE files (path TEXT PRIMARY KEY, size INTEGER,"
            " mtime INTEGER, uploaded_at INTEGER)"
        )
        values = ((*row, uploaded_at) for row in rows)
        db.executemany("INSERT INTO files VALUES (?, ?, ?, ?)", values)


def fill(root, files, mtime=OLD):
    """Write {path: content} below a folder; an int stands for that many random bytes.

    Paths may be bytes. All files get the same `mtime`, long ago if not told.
    """
    for name, content in files.items():
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            if isinstance(content, int):
                file.write(noise((name, content), content))
            else:
                file.write(content)
        os.utime(path, (mtime, mtime))


def noise(seed, size):
    """So many bytes, which depend on the seed alone. Those of a cipher cost a tenth of what
    those of random.Random do."""
    key = hashlib.sha256(ascii(seed).encode()).digest()
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))


def tree(root):
    """{path: (size, crc32)} of the regular files below a folder, links not followed."""
    found = {}
    for folder, _, names in os.walk(os.fsencode(root)):
        for name in names:
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "rb") as file:
                    content = file.read()
                relative = os.path.relpath(path, os.fsencode(root))
                found[relative] = (len(content), crc32(content))
    return found
