#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "boto3>=1.40,<2",
#     "paramiko>=4.0,<6",
#     "tqdm>=4.66,<5",
#     "python-dotenv>=1.0,<2",
# ]
# ///
"""Archive a Hetzner Storage Box into Amazon S3 Glacier Deep Archive.

A generator walks the box over SFTP; a SQLite table of (path, size, mtime) says
what is archived already; the rest is streamed, with no copy on local disk,
through boto3's upload_fileobj, one object per file; each file is committed to
the table after S3 has acknowledged it.

The invariant, which everything below upholds:

    A row exists only if S3 has acknowledged an object of exactly the bytes
    that the box served for that path, with the size and the CRC-32 computed
    while reading them.

Everything else may fail, be killed or be retried.  When in doubt: no row.

Not part of it: deletion or retention, versions beyond S3's own, bundling of
small files, encryption of its own, a daemon.  Nothing is ever deleted from the
bucket or changed on the box.

Exit statuses: 0 all is archived, 1 fatal, 2 usage or configuration, 3 some file
failed, 11 another run holds the lock, 128+n ended by signal n.

Sections, each using only those above it: Limits, Errors, Configuration, Names,
Source: SFTP, State: SQLite, Archive: S3, The run, Command line.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import dataclasses
import difflib
import fnmatch
import gc
import hashlib
import io
import logging
import logging.handlers
import os
import queue
import re
import signal
import socket
import sqlite3
import stat
import struct
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.handlers
import dotenv
import paramiko
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from cryptography.exceptions import UnsupportedAlgorithm
from tqdm import tqdm

log = logging.getLogger("archive")
files_log = logging.getLogger("archive.files")  # a line for each file
logfile_log = logging.getLogger("archive.logfile")  # not for the console

T = TypeVar("T")

# ---------------------------------------------------------------------- Limits

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# S3's own, from "Amazon S3 multipart upload limits" and "Naming Amazon S3
# objects" in its user guide.
MAX_PARTS = 10_000
MIN_PART = 5 * MIB
MAX_PART = 5 * GIB
MAX_KEY_BYTES = 1024

# A file below SMALL_FILE is read whole and sent with one PUT, which carries its
# CRC-32 and costs one request; from there on it goes up in parts.  Larger parts
# cost fewer requests (16 MiB: about $0.33 a TiB), smaller ones less memory.
SMALL_FILE = 16 * MIB
PART_SIZE = 16 * MIB
PARTS_AT_ONCE = 4
MIN_MEMORY = 32 * MIB

# OpenSSH answers at most 261,120 bytes to one read.  What is in flight divided
# by the round trip bounds the rate: 16 MiB at 20 ms are 800 MB/s.  The window
# is wider, so that listings and small files pass beside a large one.
READ_SIZE = 252 * KIB
READS_PER_FLIGHT = 8
READ_WINDOW = 16 * MIB
FLIGHTS_AHEAD = 64  # where a server answers so little that the window is never full
SSH_WINDOW = 32 * MIB
SSH_PACKET = 256 * KIB
MAX_REPLY = MIB  # the longest honest one is a read's; OpenSSH sends 256 KiB
MAX_HANDLE = 4 + 256  # the draft's limit, and the length in front
MAX_PATH_BYTES = 8192  # no system opens more; ends an endless nesting of folders

# LISTINGS_AT_ONCE folders are listed at the same time.  A folder is sorted and
# handed on in pages, so that memory does not grow with its size.
LISTINGS_AT_ONCE = 64
READDIRS_PER_FLIGHT = 4
PAGE = 2_000

# Every wait has a limit; these are all of them, in seconds.
CONNECT_LIMIT = 30  # TCP connect; and again from the banner to SFTP's version
SILENCE_LIMIT = 60  # nothing at all from the box while it owes a reply
REPLY_LIMIT = 900  # one reply, while others keep coming
RECONNECT_PAUSES = (0, 1, 2, 4, 8, 15)  # before each try of one outage
LOSSES_IN_A_ROW = 5  # lost connections, until the file at hand is at fault
KEEPALIVE = 60  # the box cuts idle sessions; parts may take minutes to upload
S3_CONNECT_LIMIT = 20
S3_READ_LIMIT = 60  # one answer of S3, per attempt
S3_ATTEMPTS = 5
LOCKED_LIMIT = 10  # another program holds the state database
STOP_LIMIT = 5  # a signal arrived: uploads wind up; then the process ends

# A file that changed this shortly before it was read may change again within
# the same second, with the same size: the next run has to look again.
RECENT = 2

# ---------------------------------------------------------------------- Errors


class ArchiveError(Exception):
    """Told to the user in one line, without a traceback."""


class ConfigError(ArchiveError):
    """Settings or usage; status 2."""


class Fatal(ArchiveError):
    """The run cannot go on: credentials, bucket, box, state; status 1."""


class Locked(ArchiveError):
    """Another run is at work on the same state; status 11."""


class Stopped(ArchiveError):
    """A signal asked for the end; status 128 + its number."""


class FileError(ArchiveError):
    """One file or folder cannot be archived; the run goes on; status 3."""


class Vanished(FileError):
    """Listed, but gone when it was opened: not a failure, only counted."""


# --------------------------------------------------------------- Configuration
#
# Parsers take a setting's text and raise ValueError with what they expected.


def parse_size(text: str) -> int:
    """Bytes of `20M`, `1.5G` or `4096`: binary units."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.I)
    unit = " KMGT".index(match[2].upper() or " ") if match else 0
    size = int(float(match[1]) * 1024**unit) if match else 0
    if not size:
        raise ValueError("expected bytes like 128M or 2G")
    return size


def parse_memory(text: str) -> int:
    size = parse_size(text)
    if size < MIN_MEMORY:
        raise ValueError(f"expected at least {MIN_MEMORY // MIB}M")
    return size


def parse_duration(text: str) -> int:
    """Seconds of `90s`, `1h30m`, `2d` or `45`."""
    if not re.fullmatch(r"\d+|(\d+\s*[smhd]\s*)+", text.strip(), re.I):
        raise ValueError("expected a time like 90m or 6h")
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}
    return sum(int(n) * units[u.lower()] for n, u in re.findall(r"(\d+)\s*(\w?)", text))


def parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise ValueError("expected true or false")
    return word in ("true", "yes", "on", "1")


def parse_whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text.strip()) or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(text)

    return parse


def parse_host(text: str) -> str:
    if re.search(r"[/\s@]", text):
        raise ValueError("expected a bare host name, like u12345.your-storagebox.de")
    return text.strip("[]")


def parse_root(text: str) -> bytes:
    """A folder of the box, without trailing slashes; `/` stays."""
    return text.encode("utf-8", "surrogateescape").rstrip(b"/") or b"/"


def parse_bucket(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", text):
        likely = text.removeprefix("s3://").split("/")[0]
        raise ValueError(f"expected the bare name of a bucket, like {likely or 'my-archive'}")
    return text


def parse_prefix(text: str) -> str:
    if {".", ".."} & set(text.split("/")[:-1]) or KEY_ESCAPES.search(text):
        raise ValueError("expected no . or .. segment and no control character")
    if len(text.encode()) >= MAX_KEY_BYTES:
        raise ValueError(f"expected fewer than {MAX_KEY_BYTES} bytes")
    return text


def parse_storage_class(text: str) -> str:
    known = ["DEEP_ARCHIVE", "GLACIER", "GLACIER_IR", "STANDARD", "STANDARD_IA", "ONEZONE_IA"]
    known += ["INTELLIGENT_TIERING", "REDUCED_REDUNDANCY"]
    if text.upper() not in known:
        raise ValueError("expected one of " + ", ".join(known))
    return text.upper()


def parse_endpoint(text: str) -> str:
    url = urlsplit(text)
    local = url.hostname in ("localhost", "127.0.0.1", "::1")
    if not url.hostname or url.scheme not in (("https", "http") if local else ("https",)):
        raise ValueError("expected an https:// URL (http:// only to this machine)")
    return text


def parse_list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def parse_path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise ValueError(f"expected a path ({error})") from None


REQUIRED = object()
SECRETS = (
    "HETZNER_PASSWORD",
    "HETZNER_KEY_PASSPHRASE",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


def setting(name: str, parse: Callable[[str], Any] = str, default: object = None) -> Any:
    """A field of Config read from `name`; `default` as text, or REQUIRED."""
    metadata = {"name": name, "parse": parse, "default": default}
    return dataclasses.field(metadata=metadata, repr=name not in SECRETS)


@dataclass(frozen=True)
class Config:
    """Every setting, checked.  Sizes in bytes, rates in bytes a second, times
    in seconds; None where a setting is off."""

    host: str = setting("HETZNER_HOST", parse_host, REQUIRED)
    user: str = setting("HETZNER_USER", str, REQUIRED)
    port: int = setting("HETZNER_PORT", parse_whole(1, 65535), "23")
    password: str | None = setting("HETZNER_PASSWORD")
    key_file: Path | None = setting("HETZNER_KEY_FILE", parse_path)
    key_passphrase: str | None = setting("HETZNER_KEY_PASSPHRASE")
    known_hosts: Path = setting("HETZNER_KNOWN_HOSTS", parse_path, "~/.ssh/known_hosts")
    remote_path: bytes = setting("REMOTE_PATH", parse_root, ".")
    bucket: str = setting("S3_BUCKET", parse_bucket, REQUIRED)
    prefix: str = setting("S3_PREFIX", parse_prefix, "")
    region: str | None = setting("AWS_REGION")
    endpoint_url: str | None = setting("AWS_ENDPOINT_URL", parse_endpoint)
    storage_class: str = setting("STORAGE_CLASS", parse_storage_class, "DEEP_ARCHIVE")
    state_db: Path = setting("STATE_DB", parse_path, "archive_state.db")
    log_file: Path | None = setting("LOG_FILE", parse_path, "archive.log")
    exclude: tuple[str, ...] = setting("EXCLUDE_PATHS", parse_list, "")
    include_hidden: bool = setting("INCLUDE_HIDDEN", parse_bool, "false")
    transfers: int = setting("TRANSFERS", parse_whole(1, 256), "32")
    memory_limit: int = setting("MEMORY_LIMIT", parse_memory, "128M")
    bandwidth_limit: int | None = setting("BANDWIDTH_LIMIT", parse_size)
    max_runtime: int | None = setting("MAX_RUNTIME", parse_duration)
    aws_environ: Mapping[str, str] = dataclasses.field(repr=False, kw_only=True)
    secrets: tuple[str, ...] = dataclasses.field(repr=False, kw_only=True)
    warnings: tuple[str, ...] = dataclasses.field(kw_only=True)


# The rest of AWS_ is boto3's own, and reaches it as it is.
SETTINGS = (
    *(f.metadata["name"] for f in dataclasses.fields(Config) if f.metadata),
    *("EXCLUDE_DIRS", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", *SECRETS),
)


def read_settings(env_file: Path | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The settings of the env file, overruled by those of the environment.

    An empty value is kept: it switches a setting off.  ConfigError if the file
    cannot be read.
    """
    settings: dict[str, str] = {}
    if env_file is not None:
        try:
            text = env_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the env file {env_file}: {error}") from None
        # find_dotenv() would walk upwards, and interpolation would take ${...}
        # out of passwords.
        found = dotenv.dotenv_values(stream=io.StringIO(text), interpolate=False)
        settings = {name: value or "" for name, value in found.items()}
    ours = (n for n in environ if n in SETTINGS or n.startswith(("HETZNER_", "AWS_")))
    settings.update({name: environ[name] for name in ours})
    return settings


def misspelt(names: Iterable[str]) -> Iterator[str]:
    """A fault for each name that is nearly one of ours."""
    for name in names:
        near = difflib.get_close_matches(name, SETTINGS, 1, 0.86)
        # AWS_ENDPOINT_URL_S3 and its like are boto3's.
        if near and name not in SETTINGS and not name.startswith("AWS_ENDPOINT_URL_"):
            yield f"{name}: there is no such setting; did you mean {near[0]}?"


def cautions(settings: Mapping[str, str], env_file: Path | None) -> Iterator[str]:
    """What is allowed, but worth a warning."""
    prefix = settings.get("S3_PREFIX", "")
    if prefix and not prefix.endswith("/"):
        yield (
            f"S3_PREFIX {prefix!r} does not end in a slash: keys will begin "
            f"{prefix}name, not {prefix}/name"
        )
    if env_file and os.name == "posix" and env_file.stat().st_mode & 0o077:
        yield f"{env_file} can be read by others: chmod 600 {env_file}"


def load_config(env_file: Path | None, environ: Mapping[str, str]) -> Config:
    """The checked settings; `env_file` None where there is none.

    Relative paths are relative to the env file's folder, or to archive.py's:
    cron's working directory is elsewhere, and a state in the wrong place means
    paying for everything twice.  Raises one ConfigError that names every fault.
    """
    settings = read_settings(env_file, environ)
    faults = list(misspelt(settings))
    base = (env_file or Path(__file__)).resolve().parent
    both = (settings.get("EXCLUDE_PATHS", ""), settings.get("EXCLUDE_DIRS", ""))
    settings["EXCLUDE_PATHS"] = ",".join(both)
    secrets = tuple(settings[name] for name in SECRETS if settings.get(name))
    values: dict[str, Any] = {}
    for option in dataclasses.fields(Config):
        if not option.metadata:
            continue
        name, parse, default = (option.metadata[key] for key in ("name", "parse", "default"))
        text = settings.get(name) or default
        if name == "LOG_FILE" and settings.get(name) == "":
            text = None
        values[option.name] = None
        if text is REQUIRED:
            faults.append(f"{name}: is required")
        elif text is not None:
            try:
                value = parse(text)
                values[option.name] = base / value if isinstance(value, Path) else value
            except ValueError as error:
                told = any(secret in text for secret in secrets)
                faults.append(f"{name}: {error}" + ("" if told else f", not {text!r}"))
    # Windows' agent has no variable to tell.
    agent = environ.get("SSH_AUTH_SOCK") or sys.platform == "win32"
    if not (values["password"] or values["key_file"] or agent):
        faults.append(
            "HETZNER_PASSWORD or HETZNER_KEY_FILE: one is required, or a running SSH agent"
        )
    if faults:
        raise ConfigError("\n".join(faults))
    return Config(
        **values,
        aws_environ={n: v for n, v in settings.items() if n.startswith("AWS_") and v},
        secrets=secrets,
        warnings=tuple(cautions(settings, env_file)),
    )


# ----------------------------------------------------------------------- Names
#
# Names are bytes from end to end, as SFTP has them.  They become text in three
# places: the state's path column, the S3 key, and what is printed.

# Stands for a byte that text cannot carry, before its two upper-case hex digits:
# what rclone writes for invalid UTF-8, so that it restores such names too.
ESCAPE = "\u201b"
TEXT_ESCAPES = re.compile(f"[\udc80-\udcff]|{ESCAPE}(?=[0-9A-F]{{2}})")
KEY_ESCAPES = re.compile(f"[\0-\x1f\x7f\ufffe\uffff]|{TEXT_ESCAPES.pattern}")
ESCAPED = re.compile(ESCAPE.encode() + b"([0-9A-F]{2})")

SNAPSHOT = ".archive_state.db"  # key of the state's copy, below the prefix


def escape(name: bytes, pattern: re.Pattern[str]) -> str:
    """`name` as text with what `pattern` matches escaped; see `unescape`.

    An escape character that would read as the start of an escape is escaped
    itself, so that no two names become one text.
    """
    text = name.decode("utf-8", "surrogateescape")
    if text.isascii() and text.isprintable():
        return text

    def spell(match: re.Match[str]) -> str:
        raw = match[0].encode("utf-8", "surrogateescape")
        return "".join(f"{ESCAPE}{byte:02X}" for byte in raw)

    return pattern.sub(spell, text)


def unescape(text: str) -> bytes:
    """The name that `escape` made `text` of."""
    return ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), text.encode())


def path_text(path: bytes) -> str:
    """The state's path column: `path` itself wherever it is valid UTF-8."""
    return escape(path, TEXT_ESCAPES)


def printable(name: bytes | str) -> str:
    """Any name on one line, for people: what is not printable is escaped."""
    text = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text

    def shown(char: str) -> str:
        if "\udc80" <= char <= "\udcff":
            return f"\\x{ord(char) - 0xDC00:02x}"
        plain = char.isprintable() and char != "\\"
        return char if plain else char.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def join(folder: bytes, name: bytes) -> bytes:
    """The path of `name` in `folder`."""
    return folder + name if folder.endswith(b"/") else folder + b"/" + name


def below(root: bytes, path: bytes) -> bytes:
    """`path` without the `root` it was joined to: by position, so that a folder
    of the same name further down stays."""
    return path[len(join(root, b"")) :]


def object_key(prefix: str, relative: bytes) -> str:
    """The S3 key of a path below REMOTE_PATH; FileError if S3 takes none.

    Reversible: `unescape(key[len(prefix):])` is `relative`.
    """
    if {b"", b".", b".."} & set(relative.split(b"/")):
        raise FileError("a . or .. or empty segment cannot be part of a key")
    key = prefix + escape(relative, KEY_ESCAPES)
    size = len(key.encode())
    if size > MAX_KEY_BYTES:
        raise FileError(f"its key has {size:,} bytes; S3 takes {MAX_KEY_BYTES:,}")
    if key == prefix + SNAPSHOT:
        raise FileError(f"{key} is the key of the state's own snapshot")
    return key


class Rules:
    """What the walk leaves out: hidden entries and EXCLUDE_PATHS."""

    def __init__(self, root: bytes, exclude: Iterable[str], include_hidden: bool):
        """An item of `exclude` is a path relative to `root` or whole, or a glob
        whose `*` crosses slashes; it stands for that entry and all under it."""
        self._root = root
        start = join(root, b"").decode("utf-8", "surrogateescape")
        items = {item.rstrip("/") for item in exclude}
        items |= {item.removeprefix(start) for item in items}
        items |= {item.removeprefix("./") for item in items}
        self._exact = items
        self._glob = re.compile("|".join(map(fnmatch.translate, items)))
        self._include_hidden = include_hidden

    def excluded(self, path: bytes) -> bool:
        if not self._exact:
            return False
        text = below(self._root, path).decode("utf-8", "surrogateescape")
        return text in self._exact or bool(self._glob.match(text))

    def hidden(self, name: bytes) -> bool:
        return name.startswith(b".") and not self._include_hidden


class Plan(NamedTuple):
    """How a file goes up: `parts_at_once` 0 means one PUT of the whole file;
    `memory` is what it may hold at once, in bytes."""

    part_size: int
    parts_at_once: int
    memory: int


def upload_plan(size: int, memory_limit: int) -> Plan:
    """The plan of a file of `size` bytes; FileError if `memory_limit` is too
    small for it.

    A large file holds the parts under way, the one being read and the reads
    ahead; a small one its replies and the whole they are joined to.
    """
    if size < SMALL_FILE:
        return Plan(size, 0, 2 * size)
    least = max(MIN_PART, -(-size // MAX_PARTS))
    if least > MAX_PART:
        raise FileError(f"{size:,} bytes are more than an S3 object can have")
    room = memory_limit - READ_WINDOW
    part = max(least, min(PART_SIZE, room // 2))
    at_once = min(PARTS_AT_ONCE, room // part - 1)
    if at_once < 1:
        needed = -(-(2 * part + READ_WINDOW) // MIB)
        raise FileError(
            f"{size:,} bytes need parts of {part:,}: MEMORY_LIMIT is "
            f"{memory_limit // MIB}M, set it to {needed}M or more"
        )
    return Plan(part, at_once, min(2 * size, (at_once + 1) * part + READ_WINDOW))


# ---------------------------------------------------------------- Source: SFTP
#
# SFTP version 3 (draft-ietf-secsh-filexfer-02) over one paramiko channel, with
# many requests in flight, from many threads.  paramiko's own SFTPClient sends
# one request at a time and cannot be shared between threads.

FXP_INIT, FXP_VERSION, FXP_OPEN, FXP_CLOSE, FXP_READ = 1, 2, 3, 4, 5
FXP_LSTAT, FXP_FSTAT, FXP_OPENDIR, FXP_READDIR = 7, 8, 11, 12
FXP_STATUS, FXP_HANDLE, FXP_DATA, FXP_NAME, FXP_ATTRS = 101, 102, 103, 104, 105
FX_EOF, FX_NO_SUCH_FILE, FX_PERMISSION_DENIED = 1, 2, 3
FXF_READ = 1
ATTR_SIZE, ATTR_UIDGID, ATTR_PERMISSIONS, ATTR_ACMODTIME, ATTR_EXTENDED = 1, 2, 4, 8, 1 << 31
ATTR_USUAL = ATTR_SIZE | ATTR_UIDGID | ATTR_PERMISSIONS | ATTR_ACMODTIME

U32, U64 = struct.Struct(">I"), struct.Struct(">Q")
HEADER = struct.Struct(">IBI")  # length of what follows, type, request id
KIND_AND_ID = struct.Struct(">BI")
USUAL = struct.Struct(">QIIIII")  # size, uid, gid, permissions, atime, mtime

# Of *.your-storagebox.de, the same for all boxes (Hetzner's page "SSH host
# keys"): ED25519 on port 23, RSA on port 22, ECDSA.
STORAGE_BOX = ".your-storagebox.de"
STORAGE_BOX_KEYS = (
    "SHA256:XqONwb1S0zuj5A1CDxpOSuD2hnAArV1A3wKY7Z3sdgM",
    "SHA256:EMlfI8GsRIfpVkoW1H2u0zYVpFGKkIMKHFZIRkf2ioI",
    "SHA256:oDHZqKXnoMtgvPBjjC57pcuFez28roaEuFcfwyg8O5c",
)


UNREADABLE_LINE = (
    paramiko.SSHException,
    paramiko.hostkeys.InvalidHostKey,
    ValueError,
    AssertionError,
)


class ConnectionLost(Exception):
    """The connection is gone, frozen or out of step: only a new one helps."""


# A reply that cannot be read is as bad as none.
LOST = (ConnectionLost, struct.error)


class Status(Exception):
    """The server refused a request with this SFTP status code."""

    def __init__(self, code: int, text: str):
        super().__init__(printable(text) or f"SFTP status {code}")
        self.code = code


class Attributes(NamedTuple):
    """Of a file, None where the server left one out; `mtime` in seconds."""

    size: int | None
    mtime: int | None
    mode: int | None


class RemoteFile(NamedTuple):
    """A regular file: its path, size in bytes and mtime in seconds."""

    path: bytes
    size: int
    mtime: int


class Reply(NamedTuple):
    kind: int
    body: memoryview  # what follows the request id


Request = tuple[int, bytes]  # type, and what follows the request id


def crc32_combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two strings together from that of each; `length` is the
    second one's, in bytes.

    As in zlib: the first is multiplied by x**(8 * length) modulo the CRC's
    polynomial; bits are reversed, so that 1 << 31 is x**0.
    """

    def product(a: int, b: int) -> int:
        result = 0
        while a:
            if a & 1 << 31:
                result ^= b
            a = a << 1 & 0xFFFFFFFF
            b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
        return result

    square = 1 << 23  # x**8
    while length:
        if length & 1:
            first = product(square, first)
        square = product(square, square)
        length >>= 1
    return first ^ second


def blob(data: bytes) -> bytes:
    """An SSH string: its length, then itself."""
    return U32.pack(len(data)) + data


def take_blob(body: bytes | memoryview, at: int) -> tuple[bytes, int]:
    """The SSH string at `at`, and where it ends."""
    end = at + 4 + U32.unpack_from(body, at)[0]
    if end > len(body):
        raise ConnectionLost("the box sent a string that is cut short")
    return bytes(body[at + 4 : end]), end


def take_attributes(body: bytes | memoryview, at: int) -> tuple[Attributes, int]:
    """The file attributes at `at`, and where they end."""
    (flags,) = U32.unpack_from(body, at)
    at += 4
    if flags == ATTR_USUAL:
        size, _, _, mode, _, mtime = USUAL.unpack_from(body, at)
        return Attributes(size, mtime, mode), at + USUAL.size
    size = mtime = mode = None
    if flags & ATTR_SIZE:
        (size,) = U64.unpack_from(body, at)
        at += 8
    if flags & ATTR_UIDGID:
        at += 8
    if flags & ATTR_PERMISSIONS:
        (mode,) = U32.unpack_from(body, at)
        at += 4
    if flags & ATTR_ACMODTIME:
        (mtime,) = U32.unpack_from(body, at + 4)
        at += 8
    if flags & ATTR_EXTENDED:
        (count,) = U32.unpack_from(body, at)
        at += 4
        for _ in range(2 * count):
            _, at = take_blob(body, at)
    return Attributes(size, mtime, mode), at


def take_names(body: memoryview) -> list[tuple[bytes, Attributes]]:
    """The entries of a reply to READDIR.  The walk's inner loop."""
    data = bytes(body)  # whose slices are cheaper than a memoryview's
    entries = []
    (count,) = U32.unpack_from(data, 0)
    at = 4
    for _ in range(count):
        end = at + 4 + U32.unpack_from(data, at)[0]
        name = data[at + 4 : end]
        end += 4 + U32.unpack_from(data, end)[0]  # the line that `ls -l` would show
        attributes, at = take_attributes(data, end)
        entries.append((name, attributes))
    return entries


def expect(kind: int, reply: Reply) -> memoryview:
    """The body of a reply of this kind; Status if the server refused."""
    if reply.kind == kind:
        return reply.body
    if reply.kind != FXP_STATUS:
        raise ConnectionLost(f"the box sent a reply of type {reply.kind}, not {kind}")
    (code,) = U32.unpack_from(reply.body, 0)
    text = take_blob(reply.body, 4)[0] if len(reply.body) >= 8 else b""
    raise Status(code, text[:500].decode("utf-8", "replace"))


class Flight:
    """Requests that were sent together, and what became of them.

    `arrived`, if given, is called with the flight when it is complete or lost,
    on the thread that reads replies: it must not block.
    """

    __slots__ = ("_arrived", "_done", "_error", "_missing", "_replies", "sent")

    def __init__(self, count: int, arrived: Callable[[Flight], None] | None):
        self.sent = time.monotonic()
        self._replies: list[Any] = [None] * count
        self._missing = count
        self._error: ConnectionLost | None = None
        self._done = threading.Lock()  # a bare lock: an Event costs ten times that
        self._done.acquire()
        self._arrived = arrived

    def deliver(self, index: int, reply: Reply) -> None:
        self._replies[index] = reply
        self._missing -= 1
        if not self._missing:
            self._finish()

    def lose(self, error: ConnectionLost) -> None:
        if self._missing and self._error is None:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        self._done.release()
        if self._arrived is not None:
            self._arrived(self)

    def replies(self) -> list[Reply]:
        """The replies in the order of the requests, once; ConnectionLost.

        It needs no limit of its own: the connection ends every flight within
        SILENCE_LIMIT of the last byte heard.
        """
        self._done.acquire()
        if self._error is not None:
            raise self._error
        replies, self._replies = self._replies, []
        return replies


class Pipe:
    """Stands in for a paramiko channel's BufferedPipe, and hands the pieces on
    as they came in: a third of the CPU that reading takes goes into its copies."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def feed(self, data: bytes) -> None:
        self._pieces.put(data)

    def read(self, _nbytes: int, timeout: float | None = None) -> bytes:
        try:
            return self._pieces.get(timeout=timeout)
        except queue.Empty:
            raise paramiko.buffered_pipe.PipeTimeout from None

    def close(self) -> None:
        self._pieces.put(b"")


class Connection:
    """One SSH connection with one SFTP channel, safe from many threads.

    Requests get numbers, their replies are handed to the flights they belong
    to by one thread, which is also the watchdog: when the box owes a reply and
    is silent for SILENCE_LIMIT, or owes one for REPLY_LIMIT, the connection is
    ended, since after that nothing says which reply belongs where.
    """

    def __init__(self, transport: paramiko.Transport, channel: paramiko.Channel):
        """Exchanges versions; ConnectionLost if the other side talks no SFTP."""
        self._transport = transport
        self._channel = channel
        self._sending = threading.Lock()
        self._lock = threading.Lock()  # never held while waiting for anything
        self._number = 0
        self._owed: dict[int, tuple[Flight, int]] = {}
        self._watched = time.monotonic()
        self.lost: ConnectionLost | None = None
        self.useful = False  # whether anything was listed or read over it
        channel.in_buffer = Pipe()
        # Nobody reads it: it would only pile up.
        channel.in_stderr_buffer = SimpleNamespace(feed=lambda _: None, close=lambda: None)
        channel.settimeout(SILENCE_LIMIT)
        channel.sendall(HEADER.pack(5, FXP_INIT, 3))
        packets = self._packets()
        if next(packets)[0] != FXP_VERSION:
            raise ConnectionLost("the box did not answer in SFTP")
        threading.Thread(target=self._deliver, args=(packets,), daemon=True).start()

    def flight(
        self, *requests: Request, arrived: Callable[[Flight], None] | None = None
    ) -> Flight:
        """Sends requests together and does not wait for the replies."""
        flight = Flight(len(requests), arrived)
        packets = bytearray()
        with self._lock:
            lost = self.lost
            for index, (kind, payload) in enumerate(requests if lost is None else ()):
                self._number = (self._number + 1) & 0xFFFFFFFF
                self._owed[self._number] = (flight, index)
                packets += HEADER.pack(len(payload) + 5, kind, self._number)
                packets += payload
        if lost is not None:
            flight.lose(lost)
            return flight
        try:
            with self._sending:
                self._channel.sendall(packets)
        except (OSError, EOFError, paramiko.SSHException) as error:
            self.close(f"sending failed: {error or 'connection closed'}")
        return flight

    def ask(self, *requests: Request) -> list[Reply]:
        """Sends requests together and waits for their replies; ConnectionLost."""
        return self.flight(*requests).replies()

    def close(self, reason: str) -> None:
        """Ends the connection; whoever waits for a reply gets ConnectionLost."""
        with self._lock:
            if self.lost is not None:
                return
            self.lost = ConnectionLost(printable(reason))
            owed, self._owed = self._owed, {}
        # paramiko's close() joins its thread, and may wait for a send.
        threading.Thread(target=self._transport.close, daemon=True).start()
        for flight, _ in list(owed.values()):
            flight.lose(self.lost)

    def _deliver(self, packets: Iterator[memoryview]) -> None:
        try:
            for packet in packets:
                kind, number = KIND_AND_ID.unpack_from(packet)
                flight, index = self._owed.pop(number)
                flight.deliver(index, Reply(kind, packet[KIND_AND_ID.size :]))
        except ConnectionLost as error:
            self.close(str(error))
        except (KeyError, struct.error):
            self.close("the box sent a reply to no request")
        except Exception as error:  # or whoever waits would wait for ever
            self.close(f"unexpected {type(error).__name__}: {error}")

    def _packets(self) -> Iterator[memoryview]:
        """The packets as they come in, without their length in front."""
        rest = memoryview(b"")

        def take(count: int) -> bytes:
            nonlocal rest
            pieces = []
            while count > len(rest):
                pieces.append(rest)
                count -= len(rest)
                rest = memoryview(self._hear())
            pieces.append(rest[:count])
            rest = rest[count:]
            return b"".join(pieces)

        while True:
            (length,) = U32.unpack(take(4))
            if not 5 <= length <= MAX_REPLY:
                raise ConnectionLost(f"the box sent a packet of {length:,} bytes")
            yield memoryview(take(length))

    def _hear(self) -> bytes:
        """The next bytes; ConnectionLost at the end, or if a reply is overdue."""
        while True:
            try:
                piece = self._channel.recv(SSH_PACKET)
            except TimeoutError:
                self._watch(SILENCE_LIMIT)
            else:
                if time.monotonic() - self._watched > SILENCE_LIMIT:
                    self._watch(REPLY_LIMIT)
                if not piece:
                    raise ConnectionLost("the box closed the connection")
                return piece

    def _watch(self, limit: float) -> None:
        self._watched = time.monotonic()
        with self._lock:
            oldest = next(iter(self._owed.values()), None)
        if oldest and self._watched - oldest[0].sent >= limit:
            raise ConnectionLost(f"the box owed an answer for {limit} s")


def connect(config: Config) -> Connection:
    """A logged-in connection to the box.

    Raises Fatal where another try cannot help (host key, login), ConnectionLost
    where it may.
    """
    where = f"{config.host}:{config.port}"
    try:
        sock = socket.create_connection((config.host, config.port), CONNECT_LIMIT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # requests are small
    except (OSError, UnicodeError) as error:
        raise ConnectionLost(f"no connection to {where}: {error}") from None
    transport = paramiko.Transport(
        sock, default_window_size=SSH_WINDOW, default_max_packet_size=SSH_PACKET
    )
    # A server that freezes while the subsystem starts is waited for without
    # limit, whatever timeouts are set: this one bounds the whole of it.
    limit = threading.Timer(CONNECT_LIMIT, transport.close)
    limit.daemon = True
    limit.start()
    try:
        pinned, revoked = pinned_keys(config)
        prefer(transport.get_security_options(), pinned)
        transport.start_client(timeout=CONNECT_LIMIT)
        check_host_key(config, transport.get_remote_server_key(), pinned, revoked)
        log_in(config, transport)
        transport.set_keepalive(KEEPALIVE)
        channel = transport.open_session(timeout=CONNECT_LIMIT)
        channel.invoke_subsystem("sftp")
        return Connection(transport, channel)
    except Exception as error:  # paramiko hands on whatever its thread met
        transport.close()
        if isinstance(error, Fatal):
            raise
        final = isinstance(error, paramiko.ssh_exception.IncompatiblePeer)
        reason = str(error) or "the connection was closed"
        kind = Fatal if final else ConnectionLost
        raise kind(f"no SFTP session with {where}: {reason}") from None
    finally:
        limit.cancel()


def known_name(config: Config) -> str:
    """The box as known_hosts names it."""
    return config.host if config.port == 22 else f"[{config.host}]:{config.port}"


def pinned_keys(config: Config) -> tuple[list[paramiko.PKey], list[paramiko.PKey]]:
    """The keys that known_hosts has for the box, and those it has revoked;
    Fatal if it cannot be read."""
    try:
        lines = config.known_hosts.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise Fatal(f"HETZNER_KNOWN_HOSTS {config.known_hosts}: {error}") from None
    pinned: list[paramiko.PKey] = []
    revoked: list[paramiko.PKey] = []
    for line in lines:
        found = revoked if line.startswith("@revoked ") else pinned
        # HostKeys.load() gives up at the first line that it does not know, and
        # keeps one key of a kind; such a line says nothing about the box.
        with contextlib.suppress(*UNREADABLE_LINE):
            entry = paramiko.hostkeys.HostKeyEntry.from_line(line.removeprefix("@revoked "))
            if entry is not None and not line.startswith(("#", "@cert-authority ")):
                known = paramiko.HostKeys()
                for name in entry.hostnames:
                    known.add(name, entry.key.get_name(), entry.key)
                if known.lookup(known_name(config)):
                    found.append(entry.key)
    return pinned, revoked


def prefer(options: paramiko.SecurityOptions, pinned: list[paramiko.PKey]) -> None:
    """AES-GCM first, it is the fastest by far; and of the host keys the kind
    that is pinned, since the server shows only one."""
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    kinds = {key.get_name() for key in pinned}
    if "ssh-rsa" in kinds:
        kinds |= {"rsa-sha2-512", "rsa-sha2-256"}
    options.key_types = sorted(options.key_types, key=lambda name: name not in kinds)


def check_host_key(
    config: Config,
    key: paramiko.PKey,
    pinned: list[paramiko.PKey],
    revoked: list[paramiko.PKey],
) -> None:
    """Fatal unless the box's key is a pinned one; no credential was sent yet."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest())
    fingerprint = "SHA256:" + digest.decode().rstrip("=")
    shown = f"{config.host}:{config.port} is {key.get_name()} {fingerprint}"
    file = f"{config.known_hosts} (HETZNER_KNOWN_HOSTS)"
    if key in revoked:
        raise Fatal(f"the host key of {shown}, which is revoked in {file}")
    built_in = config.host.lower().endswith(STORAGE_BOX) and fingerprint in STORAGE_BOX_KEYS
    if built_in or key in pinned:
        return
    if pinned:
        raise Fatal(
            f"the host key has changed: that of {shown}, but {file} has another; somebody "
            "may be in between: only if the change is known to be right, remove the old "
            "key there"
        )
    # The very key that was seen: asking for it again may bring another one.
    line = f"{known_name(config)} {key.get_name()} {key.get_base64()}"
    raise Fatal(
        f"the host key of {shown}, and is not known; if that is its fingerprint, accept "
        f"it with: echo '{line}' >> {file}"
    )


def log_in(config: Config, transport: paramiko.Transport) -> None:
    """By key file and by password, what is set of them, else by the agent.
    Fatal if the box takes none of it, SSHException if the connection fails."""
    user = config.user
    attempts: list[tuple[str, Callable[[], object]]] = []
    if config.key_file:
        key = load_key(config.key_file, config.key_passphrase)
        name = f"HETZNER_KEY_FILE {config.key_file}"
        attempts.append((name, partial(transport.auth_publickey, user, key)))
    if config.password:
        # Also answers keyboard-interactive, where that is what the box offers.
        login = partial(transport.auth_password, user, config.password)
        attempts.append(("HETZNER_PASSWORD", login))
    for known in () if attempts else paramiko.Agent().get_keys():
        attempts.append(("the SSH agent", partial(transport.auth_publickey, user, known)))
    for _, attempt in attempts:
        try:
            attempt()
        except paramiko.AuthenticationException as error:
            # A connection that breaks now looks like a refusal to paramiko.
            if not transport.is_active():
                raise paramiko.SSHException(f"login: {error}") from None
        if transport.is_authenticated():
            return
    tried = " and ".join(dict.fromkeys(name for name, _ in attempts)) or "an empty agent"
    raise Fatal(
        f"{config.host}:{config.port} refused the login of {user} with {tried}: correct "
        "HETZNER_USER or that, or HETZNER_PORT if the key is only known on another one"
    )


def load_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """The private key in `path`; Fatal that says what is wrong with it."""
    secret = passphrase.encode() if passphrase else None
    try:
        return paramiko.PKey.from_path(path, secret)
    except OSError as error:
        reason = f"cannot be read: {error}"
    except (TypeError, paramiko.PasswordRequiredException):
        reason = "needs its passphrase: set HETZNER_KEY_PASSPHRASE"
        if secret:
            reason = "has no passphrase, but HETZNER_KEY_PASSPHRASE is set"
    except (ValueError, paramiko.SSHException, UnsupportedAlgorithm):
        reason = "is no private key that can be used"
        if secret:
            reason += ", or HETZNER_KEY_PASSPHRASE is wrong"
    raise Fatal(f"HETZNER_KEY_FILE {path} {reason}")


class Box:
    """The Storage Box: one connection at a time, renewed when it is lost.

    Whoever meets the dead connection first reconnects, the others wait for it.
    An outage ends when something is listed or read again; RECONNECT_PAUSES bounds
    the tries of one.
    """

    def __init__(self, config: Config, stopping: threading.Event):
        self._config = config
        self._stopping = stopping
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._tries = 0
        self._given_up = ""
        self._suspects = threading.Lock()
        self._pace = threading.Lock()
        self._due = 0.0  # when BANDWIDTH_LIMIT lets the next bytes be read

    def close(self) -> None:
        """Ends the connection for good; whoever waits on the box gets Stopped."""
        self._stopping.set()
        connection = self._connection
        if connection is not None:
            connection.close("stopped")

    def connection(self) -> Connection:
        """The connection, a new one if it was lost; Fatal when the box is gone,
        Stopped after `close`."""
        with self._lock:
            old = self._connection
            if self._stopping.is_set():
                raise Stopped("stopped")
            if old is not None and old.lost is None:
                return old
            reason = old.lost if old is not None else None
            if old is not None and old.useful:
                self._tries = 0
            self._connection = None
            for pause in RECONNECT_PAUSES[self._tries :]:
                if reason is not None:
                    log.warning("%s; trying again in %s s", reason, pause)
                if self._stopping.wait(pause):
                    raise Stopped("stopped")
                self._tries += 1
                try:
                    self._connection = connect(self._config)
                except ConnectionLost as error:
                    reason = error
                else:
                    break
            if self._connection is None:
                # The others that waited for this outage's end get the same.
                self._given_up = (
                    self._given_up or f"gave up after {self._tries} tries: {reason}"
                )
                raise Fatal(self._given_up)
        if self._stopping.is_set():
            self.close()
        return self._connection

    def insist(self, operation: Callable[[Connection], T]) -> T:
        """operation(connection), again from its start whenever the connection
        is lost under it; FileError after LOSSES_IN_A_ROW times, since then it
        may be this file that breaks it.

        From the second try on only one operation is under way at a time, so that
        a file that breaks the connection does not take others down with it.
        """
        for attempt in range(LOSSES_IN_A_ROW):
            with self._suspects if attempt else contextlib.nullcontext():
                try:
                    return operation(self.connection())
                except LOST as error:
                    reason = error
        raise FileError(f"lost the connection {LOSSES_IN_A_ROW} times, last: {reason}")

    def pace(self, size: int) -> None:
        """Waits until BANDWIDTH_LIMIT lets `size` more bytes be read."""
        if self._config.bandwidth_limit is None:
            return
        with self._pace:
            now = time.monotonic()
            self._due = max(self._due, now) + size / self._config.bandwidth_limit
            pause = self._due - now
        self._stopping.wait(pause)

    def attributes(self, path: bytes) -> Attributes:
        """Of `path` itself, not of what a link points to; Status, FileError."""

        def lstat(connection: Connection) -> Attributes:
            (reply,) = connection.ask((FXP_LSTAT, blob(path)))
            return take_attributes(expect(FXP_ATTRS, reply), 0)[0]

        return self.insist(lstat)

    def failure(self, path: bytes, error: Status) -> FileError:
        """What a refusal to open `path` means; Vanished only if it is gone.

        OpenSSH answers "no such file" for other reasons too, and a file that
        would be taken for vanished every night would never be archived.
        """
        if error.code == FX_NO_SUCH_FILE:
            try:
                self.attributes(path)
            except Status as gone:
                if gone.code == FX_NO_SUCH_FILE:
                    return Vanished("vanished before it was read")
            except FileError as lost:
                return lost
        if error.code == FX_PERMISSION_DENIED:
            return FileError("the box denies permission to read it")
        return FileError(f"the box cannot open it: {error}")

    def read_small(self, file: RemoteFile) -> tuple[RemoteFile, bytes, bool]:
        """The file as it is now, all its bytes, and whether it is `recent`, in
        two round trips: open; then fstat, reads, fstat and close together.
        FileError, Vanished."""
        spans = [(at, min(READ_SIZE, file.size - at)) for at in range(0, file.size, READ_SIZE)]
        self.pace(file.size)

        def read(connection: Connection) -> tuple[RemoteFile, bytes, bool] | None:
            handle = open_file(connection, file.path)
            first, *reads, last, named, _ = connection.ask(
                (FXP_FSTAT, handle),
                *(read_request(handle, *span) for span in spans),
                *look_and_close(file.path, handle),
            )
            now = regular_file(file.path, first)
            pieces = [data_of(reply) for reply in reads]
            if now.size != file.size or [len(p) for p in pieces] != [n for _, n in spans]:
                return None
            must_be(now, last, named)
            connection.useful = True
            return now, b"".join(pieces), recent(now)

        try:
            result = self.insist(read)
        except Status as error:
            raise self.failure(file.path, error) from None
        if result is not None:
            return result
        # Its size is not the listed one, or replies were short.
        with contextlib.closing(Reader(self, file.path)) as reader:
            reader.must_fit(file)
            data = reader.read()
            return reader.file, data, reader.fresh


def open_file(connection: Connection, path: bytes) -> bytes:
    """The handle of `path`, as requests carry it; Status, ConnectionLost."""
    no_attributes = U32.pack(0)
    (reply,) = connection.ask((FXP_OPEN, blob(path) + U32.pack(FXF_READ) + no_attributes))
    return handle_of(reply)


def handle_of(reply: Reply) -> bytes:
    """An open file or folder, as requests carry it; Status, ConnectionLost."""
    handle = bytes(expect(FXP_HANDLE, reply))
    if len(handle) > MAX_HANDLE:
        raise ConnectionLost(f"the box sent a handle of {len(handle):,} bytes")
    return handle


def read_request(handle: bytes, at: int, size: int) -> Request:
    """A READ of `size` bytes from offset `at`; `handle` as from open_file."""
    return FXP_READ, handle + U64.pack(at) + U32.pack(size)


def data_of(reply: Reply) -> memoryview:
    """The bytes that a READ brought, none at the end of the file; FileError."""
    try:
        body = expect(FXP_DATA, reply)
    except Status as error:
        if error.code == FX_EOF:
            return memoryview(b"")
        raise FileError(f"reading failed: {error}") from None
    if U32.unpack_from(body, 0)[0] != len(body) - 4:
        raise ConnectionLost("the box sent data of another length than it said")
    return body[4:]


def regular_file(path: bytes, reply: Reply) -> RemoteFile:
    """What FSTAT says of `path`; FileError if that is not a whole answer."""
    try:
        size, mtime, mode = take_attributes(expect(FXP_ATTRS, reply), 0)[0]
    except Status as error:
        if error.code == FX_NO_SUCH_FILE:
            raise Vanished("vanished while it was read") from None
        raise FileError(f"the box does not tell its size: {error}") from None
    if size is None or mtime is None:
        raise FileError("the box does not tell its size and time")
    if mode is not None and not stat.S_ISREG(mode):
        raise FileError("changed: it is no regular file any more")
    return RemoteFile(path, size, mtime)


def look_and_close(path: bytes, handle: bytes) -> list[Request]:
    """What ends the reading of a file; the replies but the last are for must_be.
    By its path as well: another file may have been renamed over it."""
    return [(FXP_FSTAT, handle), (FXP_LSTAT, blob(path)), (FXP_CLOSE, handle)]


def must_be(before: RemoteFile, *replies: Reply) -> None:
    """FileError unless size and mtime in all `replies` are what they were."""
    for reply in replies:
        after = regular_file(before.path, reply)
        if before != after:
            raise FileError(
                f"changed while it was read: {before.size:,} bytes of mtime "
                f"{before.mtime}, then {after.size:,} of {after.mtime}"
            )


def recent(file: RemoteFile) -> bool:
    """Whether `file` changed so shortly before now that another change could
    have the same time."""
    return abs(time.time() - file.mtime) <= RECENT


class Reader:
    """A file that offers nothing but read(n), so that s3transfer goes through
    it once, from front to end, and cannot guess its size.

    It owns the question whether every byte came: it reads a window ahead,
    completes short replies, goes on at its offset over a new connection, counts
    and sums what it delivers, and before it lets the last bytes go it checks
    that the file ends where it should and has the size and mtime that it had
    when it was opened.  It raises rather than end early: s3transfer would take
    an early end for a shorter file.
    """

    def __init__(self, box: Box, path: bytes):
        """Opens `path`; FileError, Vanished."""
        self._box = box
        self._path = path
        self.file = self._open()
        self.crc32 = 0  # of all that was delivered
        self.last_crc32 = 0  # of what the last read() delivered
        self.fresh = False  # changed shortly before the check at its end
        self._delivered = 0
        self._arrived: deque[memoryview] = deque()
        self._got = 0  # end of what arrived
        self._asked = 0  # end of what was asked for
        self._flights: deque[tuple[Flight, list[tuple[int, int]]]] = deque()
        self._read_size = READ_SIZE
        self._short = 0  # length of the last short reply
        self._losses = 0
        self._checked = False

    def read(self, amount: int = -1) -> bytes:
        """The next `amount` bytes, fewer only at the end; FileError."""
        left = self.file.size - self._delivered
        amount = min(amount, left) if amount >= 0 else left
        data = io.BytesIO()  # its getvalue() does not copy, join() would
        if amount:  # all its room at once: growing would copy
            data.seek(amount - 1)
            data.write(b"\0")
            data.seek(0)
        while data.tell() < amount:
            while not self._arrived:
                self._step(self._receive)
            piece = self._arrived.popleft()
            wanted = amount - data.tell()
            if len(piece) > wanted:
                self._arrived.appendleft(piece[wanted:])
            data.write(piece[:wanted])
        while amount == left and not self._checked:
            self._step(self._check_end)
        self._delivered += amount
        self.last_crc32 = zlib.crc32(data.getbuffer())
        self.crc32 = crc32_combine(self.crc32, self.last_crc32, amount)
        return data.getvalue()

    def must_fit(self, listed: RemoteFile) -> None:
        """FileError if the file has outgrown the memory that was set aside."""
        if self.file.size > listed.size + MIB:
            raise FileError(
                f"changed: {listed.size:,} bytes when it was listed, now {self.file.size:,}"
            )

    def close(self) -> None:
        """Gives the handle back, if the file was not read to its end."""
        if not self._checked:
            self._connection.flight((FXP_CLOSE, self._handle))

    def _open(self) -> RemoteFile:
        def open_and_look(connection: Connection) -> RemoteFile:
            handle = open_file(connection, self._path)
            # Together: a handle of an earlier connection may be another file's
            # on this one.
            self._connection, self._handle = connection, handle
            (reply,) = connection.ask((FXP_FSTAT, handle))
            try:
                return regular_file(self._path, reply)
            except FileError:
                connection.flight((FXP_CLOSE, handle))
                raise

        try:
            return self._box.insist(open_and_look)
        except Status as error:
            raise self._box.failure(self._path, error) from None

    def _step(self, step: Callable[[], None]) -> None:
        """One step; if the connection is lost under it, everything that had
        not arrived is asked for again over a new one."""
        try:
            step()
        except LOST as error:
            self._losses += 1
            if self._losses >= LOSSES_IN_A_ROW:
                raise FileError(
                    f"lost the connection {self._losses} times at {self._got:,} of "
                    f"{self.file.size:,} bytes, last: {error}"
                ) from None
            self._flights.clear()
            self._asked = self._got
            if self._open() != self.file:
                raise FileError("changed while the connection was lost") from None

    def _receive(self) -> None:
        """Keeps the window full and takes in the oldest flight."""
        while (
            self._asked < self.file.size
            and self._asked - self._got < READ_WINDOW
            and len(self._flights) < FLIGHTS_AHEAD
        ):
            spans: list[tuple[int, int]] = []
            while self._asked < self.file.size and len(spans) < READS_PER_FLIGHT:
                spans.append((self._asked, min(self._read_size, self.file.size - self._asked)))
                self._asked += spans[-1][1]
            self._box.pace(sum(size for _, size in spans))
            requests = (read_request(self._handle, *span) for span in spans)
            self._flights.append((self._connection.flight(*requests), spans))
        flight, spans = self._flights.popleft()
        for (at, size), reply in zip(spans, flight.replies()):
            self._take(at, size, data_of(reply))

    def _take(self, at: int, size: int, data: memoryview) -> None:
        """`size` bytes from offset `at`, of which `data` came; asks for the rest."""
        if 0 < len(data) < size:
            # Twice the same length: that is the most this server answers.
            self._read_size = len(data) if len(data) == self._short else self._read_size
            self._short = len(data)
        while True:
            if not data:
                must_be(self.file, *self._connection.ask((FXP_FSTAT, self._handle)))
                raise FileError(f"ended at {at:,} of {self.file.size:,} bytes")
            if len(data) > size:
                raise ConnectionLost(f"the box sent {len(data):,} bytes for {size:,}")
            self._arrived.append(data)
            self._losses = 0
            self._connection.useful = True
            at, size = at + len(data), size - len(data)
            self._got = at
            if not size:
                return
            (reply,) = self._connection.ask(read_request(self._handle, at, size))
            data = data_of(reply)

    def _check_end(self) -> None:
        beyond, last, named, _ = self._connection.ask(
            read_request(self._handle, self.file.size, 1),
            *look_and_close(self._path, self._handle),
        )
        must_be(self.file, last, named)
        if data_of(beyond):
            raise FileError(f"does not end at its size of {self.file.size:,} bytes")
        self.fresh = recent(self.file)
        self._checked = True


Entry = tuple[bytes, Attributes]


class Listing:
    """One folder on its way: opendir, then readdirs together until the end.

    It sends and never waits: `arrived` gets it whenever a flight of it is back,
    for the walk to call `advance`.  It stops asking while PAGE entries wait.
    """

    def __init__(self, box: Box, path: bytes, arrived: queue.SimpleQueue[Listing]):
        self.path = path
        self._box = box
        self._queue = arrived
        self._losses = 0
        self._given: list[bytes] = []  # the names of earlier pages, / between
        self._start()

    def _start(self) -> None:
        self.entries: list[Entry] = []
        self.complete = False
        self.error: FileError | None = None
        self._handle = b""
        self._paused = False
        self._readdirs = READDIRS_PER_FLIGHT
        given = b"/".join(self._given).split(b"/") if self._given else ()
        self._skip = {b".", b"..", *given}
        self._connection = self._box.connection()
        self._send((FXP_OPENDIR, blob(self.path)))

    def _send(self, *requests: Request) -> None:
        self._flight = self._connection.flight(
            *requests, arrived=lambda _: self._queue.put(self)
        )

    def advance(self) -> None:
        """Takes in the flight that arrived; Fatal, Stopped."""
        try:
            if self._handle:
                names = sum(self._take(reply) for reply in self._flight.replies())
                if not names and not self.complete:
                    raise ConnectionLost("the box sent a listing that does not end")
                self._losses = 0
                self._connection.useful = True
            else:
                (reply,) = self._flight.replies()
                self._handle = handle_of(reply)
        except LOST as lost:
            self._losses += 1
            if self._losses < LOSSES_IN_A_ROW:
                return self._start()
            self._end(FileError(f"lost the connection {self._losses} times, last: {lost}"))
        except Status as error:
            self._end(self._box.failure(self.path, error))
        self._paused = len(self.entries) >= PAGE
        if not self.complete and not self._paused:
            self._ask()

    def _ask(self) -> None:
        self._send(*[(FXP_READDIR, self._handle)] * self._readdirs)
        self._readdirs = min(2 * self._readdirs, 8 * READDIRS_PER_FLIGHT)

    def _take(self, reply: Reply) -> int:
        """The number of names that a READDIR brought."""
        try:
            entries = take_names(expect(FXP_NAME, reply))
        except Status as error:
            if error.code != FX_EOF:
                raise
            if not self.complete:
                self._end(None)
            return 0
        self.entries += [entry for entry in entries if entry[0] not in self._skip]
        return sum(name not in (b".", b"..") for name, _ in entries)

    def _end(self, error: FileError | None) -> None:
        self.complete = True
        self.error = error
        if self._handle:  # not waited for: it costs no round trip
            self._connection.flight((FXP_CLOSE, self._handle))

    def page(self) -> list[Entry]:
        """The entries that wait, by name; lets the listing go on."""
        entries, self.entries = self.entries, []
        entries.sort(key=lambda entry: entry[0])
        if not self.complete:
            self._given.append(b"/".join(name for name, _ in entries))
        if self._paused and not self.complete:
            self._paused = False
            self._ask()
        return entries


class Walk:
    """Every regular file below `root`, in pages of one folder each, in the same
    order each time, with flat memory; no recursion, links are not followed.

    Many folders are listed at once, and taken in the order in which they were
    begun.  What is left out is counted; what cannot be listed goes to `failed`.
    """

    def __init__(
        self, box: Box, root: bytes, rules: Rules, failed: Callable[[bytes, object], None]
    ):
        self._box, self._root, self._rules, self._failed = box, root, rules, failed
        self.hidden = self.excluded = self.links = self.special = self.vanished = 0

    def __iter__(self) -> Iterator[list[RemoteFile]]:
        """Raises Fatal (also if `root` itself cannot be listed), Stopped."""
        arrived: queue.SimpleQueue[Listing] = queue.SimpleQueue()
        waiting = [self._root]
        begun: deque[Listing] = deque()
        folders: list[bytes] = []
        while waiting or begun:
            while waiting and len(begun) < LISTINGS_AT_ONCE:
                begun.append(Listing(self._box, waiting.pop(), arrived))
            listing = begun[0]
            while not listing.complete and len(listing.entries) < PAGE:
                arrived.get().advance()
            last = listing.complete
            files = []
            for name, attributes in listing.page():
                path = join(listing.path, name)
                file = self._sort_out(path, name, attributes, folders)
                if file is not None:
                    files.append(file)
            yield files
            if last:
                begun.popleft()
                self._unlisted(listing)
                waiting += sorted(folders, reverse=True)
                folders = []

    def _unlisted(self, listing: Listing) -> None:
        """Counts a folder that could not be listed, or not to its end."""
        if isinstance(listing.error, Vanished) and listing.path != self._root:
            self.vanished += 1
        elif listing.error and listing.path == self._root:
            raise Fatal(
                f"REMOTE_PATH {printable(self._root)} cannot be listed: {listing.error}"
            )
        elif listing.error:
            self._failed(listing.path, f"this folder cannot be listed: {listing.error}")

    def _sort_out(
        self, path: bytes, name: bytes, attributes: Attributes, folders: list[bytes]
    ) -> RemoteFile | None:
        """The entry if it is a file to be archived; a folder goes to `folders`,
        everything else is counted."""
        if b"/" in name or not name or len(path) > MAX_PATH_BYTES:
            self._failed(path[:MAX_PATH_BYTES], "no file can have this name")
            return None
        if self._rules.hidden(name):
            self.hidden += 1
            return None
        if self._rules.excluded(path):
            self.excluded += 1
            return None
        size, mtime, mode = attributes
        if size is None or mtime is None or mode is None:
            try:
                size, mtime, mode = self._box.attributes(path)
            except (Status, FileError) as error:
                self._failed(path, f"the box does not tell what it is: {error}")
                return None
        kind = stat.S_IFMT(mode or 0)
        if kind == stat.S_IFDIR:
            folders.append(path)
        elif kind == stat.S_IFLNK:
            self.links += 1
        elif kind not in (stat.S_IFREG, 0):
            self.special += 1
        elif kind == 0 or size is None or mtime is None:
            self._failed(path, "the box does not tell its type, size and time")
        else:
            return RemoteFile(path, size, mtime)
        return None


# --------------------------------------------------------------- State: SQLite

SCHEMA = """
CREATE TABLE IF NOT EXISTS files
    (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, uploaded_at INTEGER);
CREATE TABLE IF NOT EXISTS objects
    (path TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, crc32 INTEGER NOT NULL,
     parts INTEGER NOT NULL, storage_class TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS recheck (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uploads (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs
    (started_at INTEGER PRIMARY KEY, ended_at INTEGER, status INTEGER,
     uploaded INTEGER, skipped INTEGER, failed INTEGER, bytes INTEGER);
"""
PATHS_PER_QUERY = 500  # below SQLite's limit on parameters, 999 in old builds


class Stored(NamedTuple):
    """What S3 has acknowledged: a file's bytes under `key`; `parts` 0 means
    one PUT."""

    file: RemoteFile
    key: str
    crc32: int
    parts: int
    recheck: bool  # it may have changed again within the second


@contextlib.contextmanager
def state_errors(path: Path) -> Iterator[None]:
    """Turns every sqlite3.Error into Fatal: nothing goes on without a state."""
    try:
        yield
    except (sqlite3.Error, UnicodeEncodeError) as error:
        raise Fatal(
            f"the state database {path} cannot be used: {error}; put that right, or move "
            "it away, and the next run takes the snapshot from the bucket"
        ) from None


class State:
    """The record of what is archived: used by one thread, under the lock.

    A row is written after S3 has acknowledged the object, in one transaction
    with all that is known of it, synchronously: what is here, is there.  Every
    method raises Fatal when the database cannot be used.
    """

    def __init__(self, path: Path):
        """Opens the database at `path`, which `state_is_empty` has checked through,
        or creates it."""
        self._path = path
        with state_errors(path):
            self._db = sqlite3.connect(path, LOCKED_LIMIT, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        self._recheck = {path for (path,) in self._rows("SELECT path FROM recheck")}
        due = "SELECT 1 FROM meta WHERE name = 'snapshot'"
        self.snapshot_due = bool(self._rows(due))  # since a file was archived

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with state_errors(self._path):
            return self._db.execute(query, values).fetchall()

    def _commit(self, *statements: tuple[Any, ...]) -> None:
        """(SQL, value, …) statements in one transaction."""
        with state_errors(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for sql, *values in statements:
                    self._db.execute(sql, values)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        self._db.close()

    def pin(self, pins: Mapping[str, str]) -> None:
        """Ties the state to its source and destination, by setting; Fatal if
        it is tied to another one: believing that everything is archived there
        already would lose it."""
        known = dict(self._rows("SELECT name, value FROM meta"))
        for name, value in pins.items():
            if known.get(name, value) != value:
                raise Fatal(
                    f"the state database {self._path} belongs to {name}="
                    f"{printable(known[name])}, but the setting is {printable(value)}: "
                    "set it back, or give the other one a STATE_DB of its own"
                )
        new = pins.items() - known.items()
        if new:
            self._commit(*(("INSERT INTO meta VALUES (?, ?)", *pin) for pin in new))

    def not_archived(self, files: list[RemoteFile]) -> list[RemoteFile]:
        """Those of `files` that have no row of their size and mtime, or one
        that is to be looked at again."""
        missing = []
        for start in range(0, len(files), PATHS_PER_QUERY):
            some = {path_text(file.path): file for file in files[start:][:PATHS_PER_QUERY]}
            marks = ",".join("?" * len(some))
            known = {
                path: (size, mtime)
                for path, size, mtime in self._rows(
                    f"SELECT path, size, mtime FROM files WHERE path IN ({marks})", *some
                )
            }
            missing += [
                file
                for path, file in some.items()
                if known.get(path) != (file.size, file.mtime) or path in self._recheck
            ]
        return missing

    def crc_to_recheck(self, file: RemoteFile) -> int | None:
        """The CRC-32 of `file`'s object if its row says that it has this size
        and mtime, and that it was read too soon after a change."""
        path = path_text(file.path)
        if path not in self._recheck:
            return None
        rows = self._rows(
            "SELECT crc32 FROM files JOIN objects USING (path)"
            " WHERE path = ? AND size = ? AND mtime = ?",
            *(path, file.size, file.mtime),
        )
        return rows[0][0] if rows else None

    def owner(self, key: str) -> str | None:
        """The path whose object has `key`, as text."""
        rows = self._rows("SELECT path FROM objects WHERE key = ?", key)
        return rows[0][0] if rows else None

    def record(self, archived: list[Stored], storage_class: str) -> None:
        """Commits files.  The invariant stands or falls here: only what S3 has
        acknowledged, and what was checked against it, is passed in.

        One transaction takes all that was acknowledged while the last one was
        being written: no file waits longer than with one for each.
        """
        statements: list[tuple[Any, ...]] = []
        for file, key, crc32, parts, recheck in archived:
            path = path_text(file.path)
            statements += [
                (
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                    *(path, file.size, file.mtime, int(time.time())),
                ),
                (  # not REPLACE: another path's row with this key must not give way
                    "INSERT INTO objects VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (path) DO"
                    " UPDATE SET key = ?2, crc32 = ?3, parts = ?4, storage_class = ?5",
                    *(path, key, crc32, parts, storage_class),
                ),
            ]
            if recheck:
                statements.append(("INSERT OR IGNORE INTO recheck VALUES (?)", path))
            elif path in self._recheck:
                statements.append(("DELETE FROM recheck WHERE path = ?", path))
            if parts:
                statements.append(("DELETE FROM uploads WHERE key = ?", key))
        if statements and not self.snapshot_due:
            statements.append(("INSERT INTO meta VALUES ('snapshot', 'due')",))
            self.snapshot_due = True
        if statements:
            self._commit(*statements)

    def snapshot_stored(self) -> None:
        self._commit(("DELETE FROM meta WHERE name = 'snapshot'",))
        self.snapshot_due = False

    def settle(self, file: RemoteFile) -> None:
        """`file` was looked at again, and is what is archived."""
        self._commit(("DELETE FROM recheck WHERE path = ?", path_text(file.path)))

    def begin_upload(self, key: str) -> None:
        """Notes that a multipart upload of `key` may be under way from now on."""
        self._commit(("INSERT OR IGNORE INTO uploads VALUES (?)", key))

    def end_upload(self, key: str) -> None:
        """Nothing of a multipart upload of `key` is left."""
        self._commit(("DELETE FROM uploads WHERE key = ?", key))

    def unfinished_uploads(self) -> list[str]:
        """The keys whose multipart uploads a killed run may have left."""
        return [key for (key,) in self._rows("SELECT key FROM uploads")]

    def begin_run(self, started_at: int) -> None:
        """Also shows, before anything is uploaded, that rows can be written."""
        self._commit(("INSERT OR REPLACE INTO runs (started_at) VALUES (?)", started_at))

    def end_run(self, started_at: int, *ending: int) -> None:
        """`ending`: status, files uploaded, skipped and failed, bytes uploaded."""
        self._commit(
            (
                "UPDATE runs SET ended_at = ?, status = ?, uploaded = ?, skipped = ?,"
                " failed = ?, bytes = ? WHERE started_at = ?",
                *(int(time.time()), *ending, started_at),
            )
        )


def state_is_empty(path: Path) -> bool:
    """Whether the database at `path` is missing, or holds neither rows nor
    pins: of no use, and not to be trusted.  Fatal if it is damaged."""
    if not path.exists() or not path.stat().st_size:
        return True
    with state_errors(path), contextlib.closing(sqlite3.connect(path, LOCKED_LIMIT)) as db:
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        return not any(
            db.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone()
            for name in tables & {"files", "meta"}
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of the state at `path`; Locked if another run has it.

    The lock is an exclusive transaction on a database of its own: the same on
    every system, and gone with its holder however that ends.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        db = sqlite3.connect(lock, timeout=0, isolation_level=None)
        db.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise Locked(f"another run is at work: it holds {lock}") from None
        raise Fatal(f"the lock {lock} cannot be taken: {error}") from None
    with contextlib.closing(db):
        yield


# ----------------------------------------------------------------- Archive: S3

REMEDIES = {
    "AccessDenied": "the credentials may not do this: see the README's IAM policy",
    "NoSuchBucket": "create the bucket, or correct S3_BUCKET",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION to it",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's region",
    "IllegalLocationConstraintException": "set AWS_REGION to the bucket's region",
    "RequestTimeTooSkewed": "set this machine's clock",
    "ExpiredToken": "renew the credentials",
    "InvalidToken": "renew the credentials",
    "InvalidAccessKeyId": "correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "correct AWS_SECRET_ACCESS_KEY",
    "AllAccessDisabled": "the account is disabled: ask AWS",
    "AccountProblem": "the account has a problem: ask AWS",
    "NotSignedUp": "the account is not signed up for S3",
}
# An answer to HEAD has no body, and so no code but its status.
HEAD_CODES = {"403": "AccessDenied", "301": "PermanentRedirect"}
NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.ProfileNotFound,
    aws.TokenRetrievalError,
    aws.SSOError,
)


class Unreachable(FileError):
    """S3 did not answer: this file's failure, but the run's if it stays so."""


def s3_failure(error: Exception) -> ArchiveError:
    """What boto3 raised, as Fatal where every file would fail alike."""
    if isinstance(error, aws.ClientError):
        about = error.response.get("Error", {})
        code = HEAD_CODES.get(str(about.get("Code")), str(about.get("Code")))
        said = f"S3 refused {error.operation_name}: {code} {about.get('Message', '')}"
        if code in REMEDIES:
            return Fatal(f"{said}; {REMEDIES[code]}")
        return FileError(said)
    if isinstance(error, NO_CREDENTIALS):
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return Fatal(f"no AWS credentials: {error}; set {keys}")
    if isinstance(error, (aws.ConnectionError, aws.HTTPClientError)):
        return Unreachable(f"S3 does not answer: {error}")
    return FileError(f"S3: {error}")


@contextlib.contextmanager
def s3_errors() -> Iterator[None]:
    """Turns what boto3 raises into our own errors."""
    try:
        yield
    except (aws.ClientError, aws.BotoCoreError, Boto3Error) as error:
        raise s3_failure(error) from None


def crc_text(crc32: int) -> str:
    """A CRC-32 as S3 writes it: big-endian, base64."""
    return base64.b64encode(U32.pack(crc32)).decode()


class Archive:
    """The bucket, below the prefix.  Nothing in it is ever deleted, except
    unfinished multipart uploads of our own."""

    def __init__(self, config: Config, stopping: threading.Event):
        self._bucket = config.bucket
        self._prefix = config.prefix
        self._storage_class = config.storage_class
        self._stopping = stopping
        self._uploads: dict[str, str] = {}  # key: upload id, while under way
        self._part_sums: dict[str, list[int]] = {}  # CRC-32 of each part read
        self._refused: set[str] = set()  # keys of which S3 refused a request
        self._doubtful: set[str] = set()  # keys with perhaps a second upload
        self._told_no_checksums = False
        settings = botocore.config.Config(
            connect_timeout=S3_CONNECT_LIMIT,
            read_timeout=S3_READ_LIMIT,
            retries={"mode": "standard", "total_max_attempts": S3_ATTEMPTS},
            max_pool_connections=config.transfers * PARTS_AT_ONCE,
            # Our own checksums go with every upload: no second ones, and over
            # TLS no signature that would sum the bytes once more.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
            user_agent="archive.py",  # boto3's own takes a tenth of a small PUT
            tcp_keepalive=True,
        )
        with s3_errors():
            session = boto3.Session(region_name=config.region)
            self._client = session.client(
                "s3", endpoint_url=config.endpoint_url, config=settings
            )
        try:
            parse_endpoint(self._client.meta.endpoint_url)
        except ValueError as error:  # boto3 has other sources for it than ours
            raise Fatal(f"S3 endpoint {self._client.meta.endpoint_url}: {error}") from None
        events = self._client.meta.events
        # "Expect: 100-continue" costs every PUT a round trip.
        events.unregister("before-call.s3", botocore.handlers.add_expect_header)
        events.register("before-parameter-build.s3", self._before)
        events.register_first("needs-retry.s3", self._before_retry)
        events.register("after-call.s3", self._after)
        events.register("after-call-error.s3", self._after)

    def _before(self, params: dict[str, Any], context: dict[str, Any], **_: object) -> None:
        context["archive_key"] = key = params.get("Key", "")
        if "PartNumber" in params:
            # In a header, for S3 to hold the part against: what s3transfer would
            # do, a trailer, costs half as much CPU again, and not every
            # S3-compatible server takes it.
            crc32 = self._part_sums[key][params["PartNumber"] - 1]
            params["ChecksumCRC32"] = crc_text(crc32)

    def _before_retry(self, response: Any, **_: object) -> None:
        """Called after every attempt, the successful ones too."""
        failed = response is None or response[0].status_code >= 500
        if failed and self._stopping.is_set():
            raise Stopped("stopped")

    def _after(
        self, context: dict[str, Any], event_name: str, parsed: Any = None, **_: object
    ) -> None:
        """What S3 said, for those who only see s3transfer's result."""
        key = context["archive_key"]
        answer = parsed or {}
        if "Error" in answer or parsed is None:
            self._refused.add(key)
        if event_name.endswith(".CreateMultipartUpload"):
            if "UploadId" in answer:
                self._uploads[key] = answer["UploadId"]
            # The answer to an earlier attempt may have been lost on its way.
            if answer.get("ResponseMetadata", {}).get("RetryAttempts", 1):
                self._doubtful.add(key)

    def put(self, key: str, data: bytes, crc32: int, mtime: int) -> None:
        """One PUT, with the CRC-32 for S3 to hold the bytes against.

        Not by upload_fileobj, which takes half as much CPU again for it.
        """
        checksum = {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": crc_text(crc32)}
        with s3_errors():
            answer = self._client.put_object(
                Bucket=self._bucket, Key=key, Body=data, **checksum, **self._extra(mtime)
            )
        # A server that says nothing of the checksum may not have looked at it.
        if answer.get("ChecksumCRC32") != crc_text(crc32):
            self._confirm(key, len(data), crc32)

    def upload(
        self, key: str, reader: Reader, plan: Plan, progress: Callable[[int], None]
    ) -> None:
        """A multipart upload of all that `reader` has, confirmed."""
        config = TransferConfig(
            multipart_threshold=plan.part_size,
            multipart_chunksize=plan.part_size,
            max_concurrency=plan.parts_at_once,
            preferred_transfer_client="classic",
        )
        # The parts it holds at once; the constructor does not take it.
        config.max_in_memory_upload_chunks = plan.parts_at_once
        checksum = {
            "ChecksumAlgorithm": "CRC32",
            "ChecksumType": "FULL_OBJECT",
            "MpuObjectSize": reader.file.size,
        }
        self._refused.discard(key)
        sums = self._part_sums[key] = []

        def read(amount: int = -1) -> bytes:
            """Called once for each part, in their order."""
            if key in self._refused:  # s3transfer would read to the end, for nothing
                raise FileError("S3 refused a part")
            data = reader.read(amount)
            sums.append(reader.last_crc32)
            return data

        try:
            with s3_errors():
                self._client.upload_fileobj(
                    *(SimpleNamespace(read=read), self._bucket, key),
                    *(self._extra(reader.file.mtime) | checksum, progress, config),
                )
            self._uploads.pop(key, None)
            self._confirm(key, reader.file.size, reader.crc32)
        finally:
            del self._part_sums[key]
            self._clean_up(key)

    def _extra(self, mtime: int) -> dict[str, Any]:
        # The time in rclone's form, so that other tools restore it.
        return {"StorageClass": self._storage_class, "Metadata": {"mtime": str(mtime)}}

    def _confirm(self, key: str, size: int, crc32: int) -> None:
        """Holds what S3 stored against what was read; FileError if they differ."""
        with s3_errors():
            head = self._client.head_object(
                Bucket=self._bucket, Key=key, ChecksumMode="ENABLED"
            )
        stored_size, stored_crc = head["ContentLength"], head.get("ChecksumCRC32")
        if stored_size != size:
            raise FileError(f"S3 holds {stored_size:,} bytes, read {size:,}")
        if stored_crc is None:
            if not self._told_no_checksums:
                self._told_no_checksums = True
                log.warning("this S3 server gives no CRC-32: only sizes are compared")
        elif stored_crc != crc_text(crc32):
            raise FileError(f"S3 holds CRC-32 {stored_crc}, read {crc_text(crc32)}")

    def _clean_up(self, key: str) -> None:
        """Aborts what is left of an upload: s3transfer tries that too, but does
        not tell how it went."""
        upload_id = self._uploads.get(key)
        try:
            with s3_errors():
                if upload_id is not None:
                    self._abort(key, upload_id)
                    self._uploads.pop(key, None)
                if key in self._doubtful:
                    self.abort_leftovers(key)
                    self._doubtful.discard(key)
        except ArchiveError as error:
            log.warning(
                "the upload %s of %s could not be aborted, its parts cost money: %s; the "
                "next run tries again, a lifecycle rule is the safety net",
                *(upload_id or "", printable(key), error),
            )

    def _abort(self, key: str, upload_id: str) -> None:
        with contextlib.suppress(self._client.exceptions.NoSuchUpload):
            self._client.abort_multipart_upload(
                Bucket=self._bucket, Key=key, UploadId=upload_id
            )

    def is_clean(self, key: str) -> bool:
        """Whether no multipart upload of `key` is left."""
        return key not in self._uploads and key not in self._doubtful

    def abort_all(self) -> None:
        """Aborts what is under way, for an end that cannot wait for it."""
        for key in list(self._uploads):
            self._clean_up(key)

    def abort_leftovers(self, key: str) -> int:
        """Aborts the unfinished uploads of exactly `key`; their number."""
        with s3_errors():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=key
            )
            found = [
                upload["UploadId"]
                for page in pages
                for upload in page.get("Uploads", ())
                if upload["Key"] == key
            ]
            for upload_id in found:
                self._abort(key, upload_id)
        return len(found)

    def has_objects(self) -> bool:
        """Whether anything is below the prefix."""
        with s3_errors():
            found = self._client.list_objects_v2(
                Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1
            )
        return bool(found.get("Contents"))

    def put_snapshot(self, database: Path) -> None:
        """Stores a copy of the state below the prefix; no transaction is open."""
        extra = {"StorageClass": "STANDARD", "ChecksumAlgorithm": "CRC32"}
        # One PUT: parts would be left when a run is killed.
        config = TransferConfig(
            multipart_threshold=MAX_PART, preferred_transfer_client="classic"
        )
        with s3_errors(), database.open("rb") as source:
            self._client.upload_fileobj(
                source, self._bucket, self._prefix + SNAPSHOT, extra, Config=config
            )

    def get_snapshot(self, target: Path) -> datetime | None:
        """Writes the state's copy to `target`; the time when it was stored, None
        if there is none."""
        key = self._prefix + SNAPSHOT
        with s3_errors():
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=key)
            except self._client.exceptions.NoSuchKey:
                return None
            with target.open("wb") as copy:
                for block in answer["Body"].iter_chunks(MIB):
                    copy.write(block)
        return answer["LastModified"]


# --------------------------------------------------------------------- The run


class Job(NamedTuple):
    """One file that is to be archived."""

    file: RemoteFile
    key: str
    plan: Plan
    known_crc: int | None  # of the object, if the file may not have changed


class Unchanged(NamedTuple):
    """Looked at again, and found to be what is archived."""

    file: RemoteFile
    recheck: bool


class Failed(NamedTuple):
    job: Job
    error: FileError


Outcome = Stored | Unchanged | Failed
Sent = Callable[[int], None]  # called with each number of bytes sent


@dataclass
class Report:
    """What a run did, as the summary tells it."""

    started_at: int = dataclasses.field(default_factory=lambda: int(time.time()))
    started: float = dataclasses.field(default_factory=time.monotonic)
    uploaded: int = 0
    skipped: int = 0
    failed: int = 0
    vanished: int = 0
    bytes_uploaded: int = 0
    complete: bool = True
    walk: Walk | None = None

    def failure(self, path: bytes, reason: object) -> None:
        self.failed += 1
        log.error("FAIL %s: %s", printable(path), reason)

    def summary(self) -> list[str]:
        """The five lines that are always there, and what else was met."""
        lines = [
            ("Uploaded files", self.uploaded),
            ("Skipped files", self.skipped),
            ("Failed files", self.failed),
            ("Bytes uploaded", self.bytes_uploaded),
            ("Duration (sec)", round(time.monotonic() - self.started)),
        ]
        if self.walk is not None:
            others = [
                ("Hidden entries", self.walk.hidden),
                ("Excluded", self.walk.excluded),
                ("Links", self.walk.links),
                ("Special files", self.walk.special),
                ("Vanished", self.vanished + self.walk.vanished),
            ]
            lines += [(label, count) for label, count in others if count]
        return ["==== SUMMARY ====", *(f"{label:<15}: {count:,}" for label, count in lines)]


@dataclass
class Run:
    """One pass over the box, a chain of generators: walk, pending, transfer,
    settle.  Only the sending itself happens on other threads."""

    config: Config
    box: Box
    archive: Archive
    state: State
    report: Report
    found: Sent  # told of the bytes that are to be uploaded
    sending: Callable[[RemoteFile], contextlib.AbstractContextManager[Sent]]
    _unanswered: int = 0  # files in a row that S3 gave no answer to

    def __post_init__(self) -> None:
        # TRANSFERS files are on their way to S3 at once, and as many small ones
        # are being read, or wait for their turn: three round trips become two.
        self._under_way = 2 * self.config.transfers
        self._turns = threading.Semaphore(self.config.transfers)
        self._over = False  # something failed that ends the run

    def archive_all(self) -> None:
        """Archives what is new or changed; Fatal, Stopped.  What S3 has
        acknowledged by then is committed in any case."""
        root = self.config.remote_path
        rules = Rules(root, self.config.exclude, self.config.include_hidden)
        self.report.walk = Walk(self.box, root, rules, self.report.failure)
        pending = (self._jobs(page) for page in self.report.walk)
        with contextlib.closing(self._transfer(pending)) as transfer:
            for outcomes in transfer:
                self._settle(outcomes)

    def abort_leftovers(self) -> None:
        """Ends the multipart uploads that a killed run left.  Not being allowed
        to look is no reason not to archive."""
        for key in self.state.unfinished_uploads():
            if not key.startswith(self.config.prefix):
                continue  # a tampered snapshot would have us abort others' uploads
            try:
                count = self.archive.abort_leftovers(key)
            except ArchiveError as error:
                log.warning("unfinished uploads of %s stay: %s", printable(key), error)
                continue
            if count:
                log.info("aborted %d unfinished upload(s) of %s", count, printable(key))
            self.state.end_upload(key)

    def store_snapshot(self) -> None:
        """Puts a copy of the state into the bucket, if it has changed since the
        last, be it in an earlier run that was ended."""
        if self.state.snapshot_due:
            try:
                self.archive.put_snapshot(self.config.state_db)
            except ArchiveError as error:
                self.report.complete = False
                log.warning("the state's snapshot could not be stored: %s", error)
            else:
                self.state.snapshot_stored()

    def _jobs(self, page: list[RemoteFile]) -> list[Job]:
        """What of a page is to be archived."""
        files = self.state.not_archived(page)
        self.report.skipped += len(page) - len(files)
        if log.isEnabledFor(logging.DEBUG):
            for file in sorted(set(page) - set(files)):
                log.debug("unchanged %s", printable(file.path))
        jobs = []
        for file in files:
            try:
                jobs.append(self._job(file))
            except FileError as error:
                self.report.failure(file.path, error)
        self.found(sum(job.file.size for job in jobs))
        return jobs

    def _job(self, file: RemoteFile) -> Job:
        key = object_key(self.config.prefix, below(self.config.remote_path, file.path))
        owner = self.state.owner(key)
        if owner not in (None, path_text(file.path)):
            raise FileError(f"its key {printable(key)} is that of {printable(owner or '')}")
        plan = upload_plan(file.size, self.config.memory_limit)
        return Job(file, key, plan, self.state.crc_to_recheck(file))

    def _transfer(self, pages: Iterable[list[Job]]) -> Iterator[list[Outcome]]:
        """Sends many files at once and yields what became of them, as many as
        have finished at a time.

        Nothing starts that does not fit into MEMORY_LIMIT with what is under
        way.  On an error the rest ends, and is yielded as far as it succeeded.
        """
        finished: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        held: dict[Future[Outcome], Job] = {}  # what is under way
        errors: list[BaseException] = []
        pool = ThreadPoolExecutor(self._under_way)

        def outcomes() -> list[Outcome]:
            done = [finished.get()]
            while not finished.empty():
                done.append(finished.get())
            for future in done:
                del held[future]
            raised = [(future, future.exception()) for future in done]
            errors.extend(error for _, error in raised if error is not None)
            return [future.result() for future, error in raised if error is None]

        def fits(job: Job) -> bool:
            memory = job.plan.memory + sum(other.plan.memory for other in held.values())
            # A name may be listed twice while its folder changes.
            twice = any(job.key == other.key for other in held.values())
            room = len(held) < self._under_way and memory <= self.config.memory_limit
            return room and not twice

        try:
            try:
                for job in self._in_time(pages):
                    while not errors and (
                        not finished.empty() or (held and job and not fits(job))
                    ):
                        yield outcomes()
                    if errors:
                        break
                    if job is None:
                        continue
                    if job.plan.parts_at_once:
                        self.state.begin_upload(job.key)
                    future = pool.submit(self._send, job)
                    held[future] = job
                    future.add_done_callback(finished.put)
            except Exception as error:  # of the walk
                errors.append(error)
            while held:
                if errors:
                    self.box.close()
                yield outcomes()
            if errors:
                # Who waited for a turn was only stopped, by another's error.
                raise min(errors, key=lambda error: isinstance(error, Stopped))
        finally:
            if held:
                self.box.close()
            pool.shutdown()

    def _in_time(self, pages: Iterable[list[Job]]) -> Iterator[Job | None]:
        """The jobs, until MAX_RUNTIME is over; None after each page, so that
        what has finished is committed though nothing new is found."""
        limit = self.config.max_runtime
        for page in pages:
            for job in (*page, None):
                if limit is not None and time.monotonic() - self.report.started >= limit:
                    log.warning("MAX_RUNTIME is over: the rest is left to the next run")
                    self.report.complete = False
                    return
                yield job

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Waits for one of the TRANSFERS turns; Stopped if the run is over by then."""
        with self._turns:
            if self._over:
                raise Stopped("stopped")
            try:
                yield
            except FileError:
                raise
            except ArchiveError:
                self._over = True
                raise

    def _send(self, job: Job) -> Outcome:
        """On a thread of its own: reads one file and stores it."""
        try:
            with self.sending(job.file) as sent:
                if job.plan.parts_at_once:
                    with self._turn():
                        return self._send_large(job, sent)
                file, data, fresh = self.box.read_small(job.file)
                with self._turn():
                    return self._send_small(job, file, data, fresh, sent)
        except FileError as error:
            return Failed(job, error)
        except ArchiveError:
            raise
        except Exception as error:  # whatever a library did not expect of a server
            log.debug("traceback of %s", printable(job.file.path), exc_info=True)
            return Failed(job, FileError(f"unexpected {type(error).__name__}: {error}"))

    def _send_small(
        self, job: Job, file: RemoteFile, data: bytes, fresh: bool, sent: Sent
    ) -> Outcome:
        crc32 = zlib.crc32(data)
        if job.known_crc == crc32 and file == job.file:
            return Unchanged(file, fresh)
        self.archive.put(job.key, data, crc32, file.mtime)
        sent(len(data))
        return Stored(file, job.key, crc32, 0, fresh)

    def _send_large(self, job: Job, sent: Sent) -> Outcome:
        if job.known_crc is not None:
            with contextlib.closing(Reader(self.box, job.file.path)) as reader:
                while reader.read(MIB):
                    pass
                if reader.crc32 == job.known_crc and reader.file == job.file:
                    return Unchanged(reader.file, reader.fresh)
        with contextlib.closing(Reader(self.box, job.file.path)) as reader:
            file = reader.file
            reader.must_fit(job.file)
            plan = upload_plan(file.size, self.config.memory_limit)
            if not plan.parts_at_once:
                data = reader.read()
                return self._send_small(job, file, data, reader.fresh, sent)
            self.archive.upload(job.key, reader, plan, sent)
            parts = -(-file.size // plan.part_size)
            return Stored(file, job.key, reader.crc32, parts, reader.fresh)

    def _settle(self, outcomes: list[Outcome]) -> None:
        """Commits and counts what has finished; Fatal if S3 has gone."""
        stored = [outcome for outcome in outcomes if isinstance(outcome, Stored)]
        self.state.record(stored, self.config.storage_class)
        for outcome in outcomes:
            if isinstance(outcome, Stored):
                path, size, _ = outcome.file
                self.report.uploaded += 1
                self.report.bytes_uploaded += size
                files_log.info("archived %s (%s bytes)", printable(path), f"{size:,}")
                if not self.archive.is_clean(outcome.key):
                    self.state.begin_upload(outcome.key)
            elif isinstance(outcome, Unchanged):
                self.report.skipped += 1
                if not outcome.recheck:
                    self.state.settle(outcome.file)
            else:
                self._settle_failure(*outcome)
            if not isinstance(outcome, Failed) or not isinstance(outcome.error, Unreachable):
                self._unanswered = 0

    def _settle_failure(self, job: Job, error: FileError) -> None:
        if isinstance(error, Vanished):
            self.report.vanished += 1
            log.info("vanished %s", printable(job.file.path))
        else:
            self.report.failure(job.file.path, error)
        if job.plan.parts_at_once and self.archive.is_clean(job.key):
            self.state.end_upload(job.key)
        if isinstance(error, Unreachable):
            self._unanswered += 1
            if self._unanswered >= max(4, self.config.transfers):
                raise Fatal(f"{error}; {self._unanswered} files in a row failed so")


def open_state(config: Config, archive: Archive, new_state: bool) -> State:
    """The state, if need be from its snapshot in the bucket.

    A missing or empty one beside a bucket with objects is never a fresh start:
    everything would be paid for again.  Fatal then, unless `new_state`.
    """
    path = config.state_db
    if new_state and path.exists():
        aside = path.with_name(f"{path.name}.{int(time.time())}")
        path.rename(aside)
        if journal(path).exists():
            journal(path).rename(journal(aside))
        log.warning("the old state is kept as %s", aside)
    elif not new_state and state_is_empty(path):
        way_out = (
            "put the state database back, or correct STATE_DB, S3_BUCKET or S3_PREFIX; only "
            "if everything may be uploaded and paid for again: archive.py run --new-state"
        )
        if not take_snapshot(path, archive, way_out) and archive.has_objects():
            raise Fatal(
                f"no state in {path} and no snapshot in the bucket, but s3://{config.bucket}/"
                f"{config.prefix} has objects: {way_out}"
            )
    state = State(path)
    state.pin(
        {
            "S3_BUCKET": config.bucket,
            "S3_PREFIX": config.prefix,
            "HETZNER_USER": config.user,
            "REMOTE_PATH": path_text(config.remote_path),
        }
    )
    return state


def journal(database: Path) -> Path:
    """What SQLite rolls back when it opens `database` after a kill."""
    return database.with_name(database.name + "-journal")


def take_snapshot(path: Path, archive: Archive, way_out: str) -> bool:
    """Puts the snapshot in the bucket, if there is one, in the state's place;
    Fatal with the `way_out` if it is of no use."""
    partial = path.with_name(path.name + ".partial")
    stored_at = archive.get_snapshot(partial)
    if stored_at is None:
        return False
    try:
        usable = not state_is_empty(partial)
    except Fatal:
        usable = False
    if not usable:
        partial.unlink()
        raise Fatal(f"no state in {path}, and the snapshot in the bucket is damaged: {way_out}")
    # Left by a killed run, it would be rolled back into the snapshot.
    journal(path).unlink(missing_ok=True)
    os.replace(partial, path)
    log.warning(
        "no state in %s: took the snapshot of %s from the bucket",
        *(path, f"{stored_at.astimezone():%Y-%m-%d %H:%M:%S %z}"),
    )
    return True


def run(state: State, work: Run) -> int:
    """Archives the box: 0, or 3 if something is incomplete; ArchiveError."""
    report = work.report
    state.begin_run(report.started_at)
    status = 1
    try:
        work.box.connection()
        work.abort_leftovers()
        work.archive_all()
        work.store_snapshot()
        status = 0 if report.complete and not report.failed else 3
    finally:
        counts = (report.uploaded, report.skipped, report.failed, report.bytes_uploaded)
        state.end_run(report.started_at, status, *counts)
    return status


# ---------------------------------------------------------------- Command line

STATUSES = """\
exit statuses:
  0      all selected files are archived
  1      fatal: credentials, host key, bucket, box or state; the reason is told
  2      usage or configuration
  3      incomplete: some file failed, or MAX_RUNTIME was over
  11     another run holds the lock
  128+n  ended by signal n
"""


class OneLine(logging.Formatter):
    """Any message on one line, whoever wrote it, and without secrets."""

    def __init__(self, form: str, secrets: Iterable[str]):
        super().__init__(form, "%Y-%m-%dT%H:%M:%S%z")
        self._secrets = sorted(secrets, key=len, reverse=True)

    def formatMessage(self, record: logging.LogRecord) -> str:
        kind = {logging.WARNING: "warning: ", logging.CRITICAL: "error: "}
        text = kind.get(record.levelno, "") + record.message
        shown = (char if char.isprintable() else printable(char) for char in text)
        record.message = text if text.isprintable() else "".join(shown)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class Progress:
    """tqdm bars on a terminal: one for the run, one for each large file.

    Where they are not shown, `sending` costs next to nothing.
    """

    def __init__(self, shown: bool):
        self._shown = shown
        self._total = self._bar("archiving", 0)

    def _bar(self, name: str, size: int) -> Any:
        return tqdm(
            total=size, desc=name, unit="B", unit_scale=True, unit_divisor=1024,
            disable=not self._shown, dynamic_ncols=True, leave=not size,
        )  # fmt: skip

    def found(self, size: int) -> None:
        """`size` more bytes are to be uploaded."""
        if self._shown and size:
            self._total.total += size
            self._total.refresh()

    @contextlib.contextmanager
    def sending(self, file: RemoteFile) -> Iterator[Sent]:
        """A function to be called with each number of bytes sent."""
        if not self._shown or file.size < SMALL_FILE:
            yield self._total.update
            return
        with self._bar(printable(file.path)[-24:], file.size) as bar:

            def sent(size: int) -> None:
                bar.update(size)
                self._total.update(size)

            yield sent

    def close(self) -> None:
        self._total.close()


class Console(logging.StreamHandler):
    """Log lines on stderr, above the bars where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(sys.stderr):
            super().emit(record)


def start_logging(config: Config, verbosity: int, bars: bool) -> None:
    """To stderr and LOG_FILE; `verbosity` -1 quiet, 0, 1 verbose.  ConfigError
    if LOG_FILE cannot be written."""
    logging.raiseExceptions = False  # a closed pipe or a full disk is no traceback
    level = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[verbosity]
    console = Console(sys.stderr)
    console.setLevel(level)
    # The bars tell of each file already.
    hidden = {logfile_log.name, files_log.name if bars else ""}
    console.addFilter(lambda record: record.name not in hidden)
    console.setFormatter(OneLine("%(message)s", config.secrets))
    log.handlers = [console]
    log.setLevel(min(level, logging.INFO))
    log.propagate = False
    # paramiko tells of every broken connection with a traceback.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)
    if config.log_file is not None:
        try:
            handler = logging.handlers.RotatingFileHandler(
                config.log_file, maxBytes=10 * MIB, backupCount=5, encoding="utf-8"
            )
        except OSError as error:
            raise ConfigError(f"LOG_FILE cannot be written: {error}") from None
        form = "%(asctime)s %(levelname)-8s %(message)s"
        handler.setFormatter(OneLine(form, config.secrets))
        log.addHandler(handler)


def tell(summary: list[str]) -> None:
    """The summary, on stdout and in LOG_FILE; a closed output (`| head`) is no
    error."""
    try:
        print(*summary, sep="\n", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for line in summary:
        logfile_log.info("%s", line)


class Signals:
    """Makes SIGINT, SIGTERM and SIGHUP an orderly end within ten seconds.

    Python's handlers run on the main thread only, which a signal may not wake,
    and whatever they interrupt may hold any lock.  So the number goes through a
    socket to a thread that does the rest: `close` lets all that waits on the
    box end.  What has not ended after STOP_LIMIT, or at a second signal, is cut
    off with the process, after its uploads were aborted.
    """

    def __init__(self, close: Callable[[], None], archive: Archive, report: Report):
        self.number: int | None = None
        self._close, self._archive, self._report = close, archive, report
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._old: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Signals:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Ignored by whoever started us, nohup say: so be it.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waker.send(b"\0")  # no signal's number
        self._thread.join()
        signal.set_wakeup_fd(-1)
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _watch(self) -> None:
        (number,) = self._woken.recv(1)
        if number == 0:
            return
        self.number = number
        self._close()
        log.warning("%s: ending", signal.Signals(number).name)
        self._woken.settimeout(STOP_LIMIT)
        with contextlib.suppress(TimeoutError):
            if self._woken.recv(1) == b"\0":
                return
        aborting = threading.Thread(target=self._archive.abort_all, daemon=True)
        aborting.start()
        aborting.join(STOP_LIMIT / 2)
        tell(self._report.summary())
        os._exit(128 + number)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="archive.py",
        description="Archive a Hetzner Storage Box into Amazon S3 Glacier Deep Archive.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    env_help = "the settings (default: .env beside archive.py)"
    parser.add_argument("--env-file", type=Path, metavar="FILE", help=env_help)
    loudness = parser.add_mutually_exclusive_group()
    choice = partial(loudness.add_argument, dest="verbosity", action="store_const")
    choice("-v", const=1, help="tell of unchanged files too")
    choice("-q", const=-1, help="only warnings, failures and the summary")
    parser.set_defaults(verbosity=0, new_state=False)
    commands = parser.add_subparsers(metavar="COMMAND")
    run_help = "archive what is new or changed (the default)"
    commands.add_parser("run", help=run_help, description=run_help).add_argument(
        "--new-state",
        action="store_true",
        help="start with an empty state although the bucket has objects: "
        "everything is uploaded, and paid for, again",
    )
    return parser


def tune_memory() -> None:
    """Keeps parts in memory that is used again, and in no more than that.

    By default glibc fetches 16 MiB from the system for each part, whose page
    faults take a fifth of the CPU, or keeps a heap for each thread, twice what
    is held (mallopt(3)).  And the collector need not look again and again at
    what was imported.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 32 * MIB)  # the highest that it takes
        libc.mallopt(m_trim_threshold, 192 * MIB)
        libc.mallopt(m_arena_max, 1)
    gc.freeze()


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status; nothing is raised."""
    try:
        arguments = make_parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed help or a usage error
        return int(end.code or 0)
    bars = bool(sys.stderr and sys.stderr.isatty()) and arguments.verbosity >= 0
    # State, lock and log tell all names, and whoever can read the lock can hold it.
    os.umask(0o077)
    tune_memory()
    try:
        beside = Path(__file__).resolve().parent / ".env"
        env_file = arguments.env_file or (beside if beside.is_file() else None)
        config = load_config(env_file, os.environ)
        start_logging(config, arguments.verbosity, bars)
    except ConfigError as error:
        for fault in str(error).splitlines():
            print(f"error: {fault}", file=sys.stderr)
        return 2
    for warning in config.warnings:
        log.warning("%s", warning)
    os.environ.update(config.aws_environ)  # where boto3 looks for them
    return command(config, bars, arguments.new_state)


def command(config: Config, bars: bool, new_state: bool) -> int:
    """Runs the command; the one place where errors become exit statuses."""
    stopping = threading.Event()
    box = Box(config, stopping)
    progress = Progress(bars)
    report = Report()
    stopped_by = None
    try:
        archive = Archive(config, stopping)
        with locked(config.state_db), Signals(box.close, archive, report) as signals:
            try:
                with contextlib.closing(open_state(config, archive, new_state)) as state:
                    work = Run(
                        *(config, box, archive, state, report),
                        *(progress.found, progress.sending),
                    )
                    return run(state, work)
            finally:
                stopped_by = signals.number
    except ArchiveError as error:
        if stopped_by is not None:
            return 128 + stopped_by
        log.critical("%s", error)
        return 11 if isinstance(error, Locked) else 1
    except Exception as error:  # a defect of ours: told in one line all the same
        log.critical("unexpected %s: %s", type(error).__name__, error)
        log.debug("traceback", exc_info=True)
        return 1
    finally:
        box.close()
        progress.close()
        if report.walk is not None or stopped_by is not None:
            tell(report.summary())


if __name__ == "__main__":
    sys.exit(main())
