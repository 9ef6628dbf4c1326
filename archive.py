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
"""Archive a Hetzner Storage Box into Amazon S3 Glacier Deep Archive, and bring it back.

A generator walks the box over SFTP; a SQLite table of (path, size, mtime) says
what is archived already; the rest is streamed, with no copy on local disk,
through boto3, one object per file; each file is committed to the table after S3
has acknowledged it.

The invariant, which everything below upholds:

    A row exists only if S3 has acknowledged an object of exactly the bytes
    that the box served for that path, with the size and the CRC-32 computed
    while reading them.

Everything else may fail, be killed or be retried.  When in doubt: no row.

Not part of it: deletion or retention, versions beyond S3's own, bundling of
small files, encryption of its own, a daemon.  Nothing is ever deleted from the
bucket, nor changed on the box but by `restore --to-box`.

Exit statuses: 0 all is archived (restore: is there; verify: agrees), 1 fatal, 2
usage or configuration, 3 some file failed, 11 another run holds the lock, 75
restore is under way, 128+n ended by signal n.

Sections, each using only those above it: Limits, Prices, Errors, Names,
Configuration, Source: SFTP, Places to restore to, State: SQLite, Archive: S3, Money,
Progress, The run, Other commands, Command line.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fnmatch
import gc
import hashlib
import io
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO, TypeVar
from urllib.parse import quote, urlsplit

try:
    import boto3
    import botocore.config
    import botocore.handlers
    import dotenv.parser
    import paramiko
    import urllib3
    from boto3.s3.transfer import TransferConfig
    from botocore import exceptions as aws
    from cryptography.exceptions import UnsupportedAlgorithm
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: start it as .venv/bin/python archive.py, see the README")

log = logging.getLogger("archive")
files_log = logging.getLogger("archive.files")  # a line for each file
logfile_log = logging.getLogger("archive.logfile")  # not for the console

T = TypeVar("T")
Answer = TypeVar("Answer")

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
GROWTH = 64 * KIB  # of a file since it was listed, for which no memory is set aside

# OpenSSH answers at most 261,120 bytes to one read.  What is in flight divided
# by the round trip bounds the rate: 16 MiB at 20 ms are 800 MB/s.  The window
# is wider, so that listings and small files pass beside a large one.
READ_SIZE = 252 * KIB
READS_PER_FLIGHT = 8
LEAST_READ = 4 * KIB  # however little a server has answered
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
WALK_PAUSE = 1  # s; while no page is full, what S3 acknowledged is committed

# Every wait has a limit, in seconds.
CONNECT_LIMIT = 30  # TCP connect; and again from the banner to SFTP's version
SILENCE_LIMIT = 60  # nothing at all from the box while it owes a reply
REPLY_LIMIT = 900  # one reply, while others keep coming
RECONNECT_PAUSES = (0, 1, 2, 4, 8, 15)  # before each try of one outage
LOSSES_IN_A_ROW = 5  # lost connections, until the file at hand is at fault
TRIES_IN_COMPANY = 2  # of them: mostly it is the line, which breaks for all at once
BROKEN_IN_A_ROW = 100  # such files, until the box is: half an hour of connecting anew
KEEPALIVE = 60  # the box cuts idle sessions; parts may take minutes to upload
S3_CONNECT_LIMIT = 20
S3_READ_LIMIT = 60  # one answer of S3, per attempt
S3_ATTEMPTS = 5
LOCKED_LIMIT = 10  # another program holds the state database at the start
COMMIT_LIMIT = 60  # and later: `plan` may be copying it
STOP_LIMIT = 5  # a signal arrived: uploads wind up; then the process ends

# A file that changed this shortly before it was read may change again within
# the same second, with the same size: the next run has to look again.
RECENT = 2

# S3 takes no request from a clock that is wrong by more than these seconds.
CLOCK_LIMIT = 900

# Hours until a copy of an object in DEEP_ARCHIVE can be read, at most.
TIERS = {"bulk": 48, "standard": 12}

# RestoreObject: S3 takes about 1,000 a second from an account.
RESTORES_A_SECOND = 500
DOWNLOAD_BLOCK = 256 * KIB
WRITE_SIZE = 32 * KIB  # what every server takes in one WRITE, says the draft
WRITES_AHEAD = 8  # blocks of a file that the box has not confirmed

# ---------------------------------------------------------------------- Prices
#
# USD, from "Amazon S3 pricing" (storage, requests, retrieval, transfer); `month`
# is a GB (2**30 bytes) and month, `put`, `part`, `get` and `request` are a
# thousand requests, `gb` and `egress` a GB.  Where a region is not in the table,
# its prices are not known, and those of us-east-1 are taken and named.
PRICES_OF = "November 2026"
US_PRICES = {
    "STANDARD.month": 0.023,
    "STANDARD.put": 0.005,
    "STANDARD.part": 0.005,
    "GLACIER.month": 0.0036,
    "GLACIER.put": 0.03,
    "GLACIER.part": 0.005,
    "GLACIER.bulk.gb": 0.0,
    "GLACIER.bulk.request": 0.0,
    "GLACIER.standard.gb": 0.01,
    "GLACIER.standard.request": 0.05,
    "DEEP_ARCHIVE.month": 0.00099,
    "DEEP_ARCHIVE.put": 0.05,
    "DEEP_ARCHIVE.part": 0.005,
    "DEEP_ARCHIVE.bulk.gb": 0.0025,
    "DEEP_ARCHIVE.bulk.request": 0.025,
    "DEEP_ARCHIVE.standard.gb": 0.02,
    "DEEP_ARCHIVE.standard.request": 0.10,
    "get": 0.0004,
    "egress": 0.09,
}
PRICES = {"us-east-1": US_PRICES, "us-east-2": US_PRICES, "us-west-2": US_PRICES}
COLD_CLASSES = ("DEEP_ARCHIVE", "GLACIER")  # must be restored before they can be read
# Of each object in these: 8 KB at STANDARD's price, 32 KB at its own.
INDEX_IN_STANDARD, INDEX_IN_CLASS = 8 * KIB, 32 * KIB
MINIMUM_DAYS = {"DEEP_ARCHIVE": 180, "GLACIER": 90}
DAYS_A_MONTH = 30
FREE_EGRESS = 100  # GB a month

# ---------------------------------------------------------------------- Errors


class ArchiveError(Exception):
    """Told to the user in one line, without a traceback; `code` is S3's, or HTTP's
    where S3 gave none, if it was S3 that refused."""

    def __init__(self, told: str, code: str = ""):
        super().__init__(told)
        self.code = code


class ConfigError(ArchiveError):
    """Settings or usage; status 2."""


class Fatal(ArchiveError):
    """The run cannot go on: credentials, bucket, box, state; status 1."""


class Locked(ArchiveError):
    """Another run is at work on the same state; status 11."""


class FileError(ArchiveError):
    """One file or folder, or one request to S3, failed; the run goes on; status 3."""

    def bare(self) -> FileError:
        """Itself, without the frames that it came through: they hold a file's bytes."""
        self.__traceback__ = self.__context__ = None
        return self


class Cold(FileError):
    """Its object has to be restored before it can be read."""


class Unusable(ArchiveError):
    """The state's snapshot is in the bucket, but cannot be taken."""


class Vanished(FileError):
    """Listed, but gone when it was opened: not a failure, only counted."""


class Stopped(Exception):
    """The end was asked for: by a signal (status 128 + its number), or after a Fatal.
    No ArchiveError: nothing has failed, and who sees to failures lets it pass."""


class Stopping(threading.Event):
    """Set when the program is to end; `number` is that of the signal, if it was one."""

    number: int | None = None

    def check(self) -> None:
        if self.is_set():
            raise Stopped("stopped")


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
PROBE = ".archive//check"  # permissions are tried with it: no file has such a key


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


def size_text(size: float) -> str:
    """`1.5 GiB`: binary units, exact below 1 KiB."""
    units = iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def time_text(seconds: float) -> str:
    """A time since the epoch in the user's zone, with its offset."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S %z}"


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
        raise FileError(
            f"its key has {size:,} bytes, S3 takes {MAX_KEY_BYTES:,}: give it a shorter "
            "path, or exclude it"
        )
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


# --------------------------------------------------------------- Configuration
#
# Parsers take a setting's text and raise ValueError with what they expected.


def parse_size(text: str, least: int = 1) -> int:
    """Bytes of `20M`, `1.5G` or `4096`: binary units."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.I | re.A)
    unit = " KMGT".index(match[2].upper() or " ") if match else 0
    size = int(float(match[1]) * 1024**unit) if match else 0
    if not size:
        raise ValueError("expected bytes like 128M or 2G")
    if size < least:
        raise ValueError(f"expected at least {least // MIB}M")
    return size


def parse_duration(text: str) -> int:
    """Seconds of `90s`, `1h30m`, `2d` or `45`."""
    if not re.fullmatch(r"\d+|(\d+\s*[smhd]\s*)+", text.strip(), re.I | re.A):
        raise ValueError("expected a time like 90m or 6h")
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}
    return sum(int(n) * units[u.lower()] for n, u in re.findall(r"(\d+)\s*(\w?)", text))


def parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise ValueError("expected true or false")
    return word in ("true", "yes", "on", "1")


def parse_whole(low: int, high: int, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text.strip()) or not low <= int(text) <= high:
        raise ValueError(f"expected a whole number from {low} to {high}")
    return int(text)


def parse_host(text: str) -> str:
    if re.search(r"[/\s@]", text):
        raise ValueError("expected a bare host name, like u12345.your-storagebox.de")
    return text.strip("[]")


def parse_root(text: str) -> bytes:
    """A folder of the box, without trailing slashes; `/` stays."""
    return text.encode("utf-8", "surrogateescape").rstrip(b"/") or b"/"


def parse_bucket(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", text):
        likely = re.search(r"^(?:s3://(?:.*@)?|arn:aws:s3:::)([^/@:]{3,})", text)
        name = likely[1] if likely else "my-archive"
        raise ValueError(f"expected the bare name of a bucket, like {name}")
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
    if "@" in url.netloc:
        raise ValueError("expected no user name or password in it")
    return text


def parse_list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def parse_prices(text: str) -> dict[str, float]:
    """USD by name, of `DEEP_ARCHIVE.month=0.0018, egress=0.05`."""
    prices = {}
    for item in parse_list(text):
        name, _, usd = (part.strip() for part in item.partition("="))
        if name not in US_PRICES or not re.fullmatch(r"\d{0,6}(\.\d+)?", usd) or not usd:
            raise ValueError(f"expected name=USD with names of {', '.join(US_PRICES)}")
        prices[name] = float(usd)
    return prices


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
    port: int = setting("HETZNER_PORT", partial(parse_whole, 1, 65535), "23")
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
    transfers: int = setting("TRANSFERS", partial(parse_whole, 1, 256), "32")
    memory_limit: int = setting("MEMORY_LIMIT", partial(parse_size, least=MIN_MEMORY), "128M")
    bandwidth_limit: int | None = setting("BANDWIDTH_LIMIT", parse_size)
    max_runtime: int | None = setting("MAX_RUNTIME", parse_duration)
    prices: dict[str, float] = setting("PRICES", parse_prices, "")
    aws_environ: Mapping[str, str] = dataclasses.field(repr=False, kw_only=True)
    secrets: tuple[str, ...] = dataclasses.field(repr=False, kw_only=True)


# The rest of AWS_ is boto3's own, and reaches it as it is.
SETTINGS = (
    *(f.metadata["name"] for f in dataclasses.fields(Config) if f.metadata),
    *("EXCLUDE_DIRS", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", *SECRETS),
)


def read_settings(env_file: Path | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The settings of the env file, overruled by those of the environment.

    An empty value is kept: it overrules, too, and an empty LOG_FILE means none.
    ConfigError if the file cannot be read, or a line of it.
    """
    settings: dict[str, str] = {}
    if env_file is not None:
        try:
            text = env_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the env file {env_file}: {error}") from None
        # find_dotenv() would walk upwards, and load_dotenv() takes ${...} out of
        # passwords and leaves out what it cannot read.
        for found in dotenv.parser.parse_stream(io.StringIO(text)):
            if found.error or (found.key is not None and found.value is None):
                source, line = found.original  # with the empty lines before it
                line += source[: -len(source.lstrip())].count("\n")
                raise ConfigError(f"{env_file}, line {line}: expected NAME=value")
            if found.key is not None:
                settings[found.key] = found.value or ""
    ours = (n for n in environ if n in SETTINGS or n.startswith(("HETZNER_", "AWS_")))
    settings.update({name: environ[name] for name in ours})
    return settings


def misspelt(names: Iterable[str]) -> Iterator[str]:
    """A fault for each name that is nearly one of ours."""
    for name in names:
        near = difflib.get_close_matches(name.upper(), SETTINGS, 1, 0.86)
        # AWS_ENDPOINT_URL_S3 and its like are boto3's.
        others = name.upper().startswith("AWS_ENDPOINT_URL_")
        if near and name not in SETTINGS and not others:
            yield f"{name}: there is no such setting; did you mean {near[0]}?"


def cautions(config: Config, env_file: Path | None) -> Iterator[str]:
    """What is allowed, but worth a warning."""
    if config.prefix and not config.prefix.endswith("/"):
        yield (
            f"S3_PREFIX {config.prefix!r} does not end in a slash: keys will begin "
            f"{config.prefix}name, not {config.prefix}/name"
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
    # The folder as it was named: secrets are links, often to where nothing stays.
    base = env_file.absolute().parent if env_file else Path(__file__).resolve().parent
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
            faults.append(f"{name}: is required, in {env_file or 'the environment'}")
        elif text is not None:
            try:
                value = parse(text)
                value = base / value if isinstance(value, Path) else value
                if name == "STATE_DB":  # its lock and journal are beside the file itself
                    value = value.resolve()
                values[option.name] = value
            except (ValueError, OSError, RuntimeError) as error:  # of a link to itself
                told = "@" in text or any(secret in text for secret in secrets)
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
    )


# ---------------------------------------------------------------- Source: SFTP
#
# SFTP version 3 (draft-ietf-secsh-filexfer-02) over one paramiko channel, with
# many requests in flight, from many threads.  paramiko's own SFTPClient sends
# one request at a time and cannot be shared between threads.

FXP_INIT, FXP_VERSION, FXP_OPEN, FXP_CLOSE, FXP_READ = 1, 2, 3, 4, 5
FXP_WRITE, FXP_LSTAT, FXP_FSTAT, FXP_FSETSTAT, FXP_OPENDIR, FXP_READDIR = 6, 7, 8, 10, 11, 12
FXP_REMOVE, FXP_MKDIR, FXP_RENAME, FXP_EXTENDED, FXP_EXTENDED_REPLY = 13, 14, 18, 200, 201
FXP_STATUS, FXP_HANDLE, FXP_DATA, FXP_NAME, FXP_ATTRS = 101, 102, 103, 104, 105
FX_OK, FX_EOF, FX_NO_SUCH_FILE, FX_PERMISSION_DENIED, FX_UNSUPPORTED = 0, 1, 2, 3, 8
FXF_READ, FXF_WRITE, FXF_CREAT, FXF_TRUNC = 1, 2, 8, 16
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


class ConnectionLost(Exception):
    """The connection is gone, frozen or out of step: only a new one helps."""


class HungUp(ConnectionLost):
    """The connection broke at the login: perhaps the box's way to refuse it."""


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
Entry = tuple[bytes, Attributes]  # of a folder: its name there, and what it is
Keys = list[paramiko.PKey]


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


def take_names(body: memoryview) -> list[Entry]:
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


def status_of(reply: Reply, wanted: int) -> Status:
    """What a reply says of a request; ConnectionLost if it is of another kind."""
    if reply.kind != FXP_STATUS:
        raise ConnectionLost(f"the box sent a reply of type {reply.kind}, not {wanted}")
    (code,) = U32.unpack_from(reply.body, 0)
    text = take_blob(reply.body, 4)[0] if len(reply.body) >= 8 else b""
    return Status(code, text[:500].decode("utf-8", "replace"))


def expect(kind: int, reply: Reply) -> memoryview:
    """The body of a reply of this kind; Status if the server refused."""
    if reply.kind == kind:
        return reply.body
    raise status_of(reply, kind)


def expect_ok(flight: Flight) -> None:
    """Status unless the server did all that was asked."""
    for reply in flight.replies():
        status = status_of(reply, FXP_STATUS)
        if status.code != FX_OK:
            raise status


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

    @property
    def whole(self) -> bool:
        """Whether all replies are there: they stay if the connection is lost."""
        return not self._missing

    def replies(self) -> list[Reply]:
        """The replies in the order of the requests, once; ConnectionLost.

        It needs no limit of its own: the connection ends every flight within
        SILENCE_LIMIT of the last byte heard.
        """
        self._done.acquire()
        if self._error is not None:
            # Of its own: one that all raise would keep the frames of all.
            raise ConnectionLost(str(self._error))
        replies, self._replies = self._replies, []
        return replies


class Pipe:
    """Stands in for a paramiko channel's BufferedPipe, and hands the pieces on
    as they came in: a third of the CPU that reading takes goes into its copies."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def feed(self, data: bytes) -> None:
        if data:  # else it would be taken for the end
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
        self.useful = False  # whether anything was looked at, read or written over it
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
            if self.lost is not None:
                flight.lose(self.lost)
                return flight
            for index, (kind, payload) in enumerate(requests):
                self._number = (self._number + 1) & 0xFFFFFFFF
                self._owed[self._number] = (flight, index)
                packets += HEADER.pack(len(payload) + 5, kind, self._number)
                packets += payload
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
        for flight, _ in list(owed.values()):
            flight.lose(self.lost)
        # paramiko's close() joins its thread, and may wait for a send.
        with contextlib.suppress(RuntimeError):  # no thread may be left
            threading.Thread(target=self._transport.close, daemon=True).start()

    def _deliver(self, packets: Iterator[memoryview]) -> None:
        try:
            for packet in packets:
                kind, number = KIND_AND_ID.unpack_from(packet)
                flight, index = self._owed.pop(number)
                flight.deliver(index, Reply(kind, packet[KIND_AND_ID.size :]))
        except (ConnectionLost, EOFError, OSError, paramiko.SSHException) as error:
            self.close(str(error) or "the box closed the connection")
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


def connect(config: Config, passed: Callable[[str], None] = lambda _: None) -> Connection:
    """A logged-in connection to the box; `passed` is told of each stage.

    Raises Fatal where another try cannot help (host key, login), ConnectionLost
    where it may.
    """
    where = f"{config.host}:{config.port}"
    try:
        sock = socket.create_connection((config.host, config.port), CONNECT_LIMIT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # requests are small
    except (OSError, UnicodeError) as error:
        remedy = connect_remedy(config, error)
        raise ConnectionLost(f"no connection to {where}: {error}; {remedy}") from None
    transport = paramiko.Transport(
        sock, default_window_size=SSH_WINDOW, default_max_packet_size=SSH_PACKET
    )
    # A server that freezes while the subsystem starts is waited for without
    # limit, whatever timeouts are set: this one bounds the whole of it.
    limit = threading.Timer(CONNECT_LIMIT, transport.close)
    limit.daemon = True
    began = time.monotonic()
    limit.start()
    try:
        pinned, revoked = pinned_keys(config)
        prefer(transport.get_security_options(), pinned)
        transport.start_client(timeout=CONNECT_LIMIT)
        passed(f"connected to {where}")
        check_host_key(config, transport.get_remote_server_key(), pinned, revoked)
        passed(f"the host key is the pinned {transport.get_remote_server_key().get_name()}")
        log_in(config, transport)
        passed(f"logged in as {config.user}")
        transport.set_keepalive(KEEPALIVE)
        channel = transport.open_session(timeout=CONNECT_LIMIT)
        channel.invoke_subsystem("sftp")
        return Connection(transport, channel)
    except Exception as error:  # paramiko hands on whatever its thread met
        transport.close()
        hung_up = isinstance(error, HungUp) and time.monotonic() - began < CONNECT_LIMIT
        if hung_up or isinstance(error, Fatal):
            raise
        reason = str(error) or "the connection was closed"
        # Something listens, but it is no SSH server.
        if "banner" in reason or "protocol version" in reason:
            reason += f"; {connect_remedy(config, error)}"
        kind = Fatal if isinstance(error, paramiko.IncompatiblePeer) else ConnectionLost
        raise kind(f"no SFTP session with {where}: {reason}") from None
    finally:
        limit.cancel()


def connect_remedy(config: Config, error: Exception) -> str:
    """What is likely to be wrong where nothing answers in SSH."""
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "correct HETZNER_HOST, or this machine's DNS"
    console = "SSH support and external reachability are switched on in Hetzner's console"
    if config.port in (22, 23):
        return f"see that {console}, and that HETZNER_HOST is right"
    return f"HETZNER_PORT is 23 for SSH, or 22; see that {console}"


def known_name(config: Config) -> str:
    """The box as known_hosts names it."""
    return config.host if config.port == 22 else f"[{config.host}]:{config.port}"


def pinned_keys(config: Config) -> tuple[Keys, Keys]:
    """The keys that known_hosts has for the box, and those it has revoked, of any host:
    somebody else may have them; Fatal if it cannot be read."""
    try:
        lines = config.known_hosts.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise Fatal(f"HETZNER_KNOWN_HOSTS {config.known_hosts}: {error}") from None
    pinned: Keys = []
    revoked: Keys = []
    for line in (" ".join(line.split()) for line in lines):  # any blanks, as for OpenSSH
        # HostKeys.load() gives up at the first line that it does not know, and
        # keeps one key of a kind; such a line says nothing about the box.
        with contextlib.suppress(Exception):
            entry = paramiko.hostkeys.HostKeyEntry.from_line(line.removeprefix("@revoked "))
            if entry is None or line.startswith(("#", "@cert-authority ")):
                continue
            if line.startswith("@revoked "):
                revoked.append(entry.key)
                continue
            known = paramiko.HostKeys()
            for name in entry.hostnames:
                known.add(name, entry.key.get_name(), entry.key)
            if known.lookup(known_name(config)):
                pinned.append(entry.key)
    return pinned, revoked


def prefer(options: paramiko.SecurityOptions, pinned: Keys) -> None:
    """AES-GCM first, it is the fastest by far; and of the host keys the kind
    that is pinned, since the server shows only one."""
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    kinds = {key.get_name() for key in pinned}
    if "ssh-rsa" in kinds:
        kinds |= {"rsa-sha2-512", "rsa-sha2-256"}
    options.key_types = sorted(options.key_types, key=lambda name: name not in kinds)


def check_host_key(config: Config, key: paramiko.PKey, pinned: Keys, revoked: Keys) -> None:
    """Fatal unless the box's key is a pinned one; no credential was sent yet."""
    fingerprint = key.fingerprint
    shown = f"{config.host}:{config.port} is {key.get_name()} {fingerprint}"
    file = f"HETZNER_KNOWN_HOSTS {config.known_hosts}"
    place = shlex.quote(str(config.known_hosts))
    if key in revoked:
        raise Fatal(f"the host key of {shown}, which is revoked in {file}")
    built_in = config.host.lower().endswith(STORAGE_BOX) and fingerprint in STORAGE_BOX_KEYS
    if built_in or key in pinned:
        return
    if pinned:
        known = ", ".join(f"{other.get_name()} {other.fingerprint}" for other in pinned)
        raise Fatal(
            f"the host key has changed: that of {shown}, but {file} has {known}; somebody may "
            "be in between: only if the change is known to be right, remove the old one with: "
            f"ssh-keygen -R {shlex.quote(known_name(config))} -f {place}"
        )
    # The very key that was seen: asking for it again may bring another one.
    line = f"{known_name(config)} {key.get_name()} {key.get_base64()}"
    folder = shlex.quote(str(config.known_hosts.parent))
    make = "" if config.known_hosts.parent.is_dir() else f"mkdir -p {folder} && "
    raise Fatal(
        f"the host key of {shown}, and is not in HETZNER_KNOWN_HOSTS; if that is its "
        f"fingerprint, accept it with: {make}echo '{line}' >> {place}"
    )


def log_in(config: Config, transport: paramiko.Transport) -> None:
    """By key file and by password, what is set of them, else by the agent.
    Fatal if the box takes none of it, HungUp if the connection breaks."""
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
    if not attempts:
        keys = within(CONNECT_LIMIT, lambda: paramiko.Agent().get_keys())
        if keys is None:
            raise Fatal("the SSH agent does not answer: restart it, or set HETZNER_KEY_FILE")
        name = f"the SSH agent's keys ({len(keys)})"
        attempts = [(name, partial(transport.auth_publickey, user, key)) for key in keys]
    tried = " and ".join(dict.fromkeys(name for name, _ in attempts)) or "an empty agent"
    told = f"the login of {user} with {tried}: {login_remedy(config)}"
    where = f"{config.host}:{config.port}"
    for _, attempt in attempts:
        try:
            attempt()
        except paramiko.AuthenticationException:
            # A connection that breaks now looks like a refusal to paramiko.
            if not transport.is_active():
                raise HungUp(f"{where} hung up at {told}") from None
        if transport.is_authenticated():
            return
    raise Fatal(f"{where} refused {told}")


def login_remedy(config: Config) -> str:
    """What is likely to be wrong where the box does not take a login."""
    if config.password and not config.key_file:
        return "correct HETZNER_USER or that"
    form = "RFC 4716 (ssh-keygen -e)" if config.port == 22 else "OpenSSH's"
    fewer = "" if config.key_file else ", or set HETZNER_KEY_FILE: it takes a few tries only"
    return (
        f"correct HETZNER_USER or that{fewer}; on port {config.port} a Storage Box takes the "
        f"public key in {form} form, the other form is for HETZNER_PORT="
        f"{23 if config.port == 22 else 22}"
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


def within(seconds: float, act: Callable[[], T]) -> T | None:
    """act() on a thread of its own, None if it takes longer: it may never end."""
    future: Future[T] = Future()

    def perform() -> None:
        try:
            future.set_result(act())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=perform, daemon=True).start()
    concurrent.futures.wait((future,), seconds)
    return future.result() if future.done() else None


class Pace:
    """Keeps what many threads do below `rate` units a second; None: any."""

    def __init__(self, rate: float | None, stopping: Stopping):
        self._rate, self._stopping = rate, stopping
        self._lock = threading.Lock()
        self._due = 0.0

    def wait(self, units: float) -> None:
        """Waits until `units` more may be used."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now) + units / self._rate
            pause = self._due - now
        self._stopping.wait(pause)


class Broken(FileError):
    """The connection was lost under it again and again: this file's or folder's failure,
    but the run's if all end so."""


class Box:
    """The Storage Box: one connection at a time, renewed when it is lost.

    Whoever meets the dead connection first reconnects, the others wait for it.
    An outage ends when something is looked at, read or written again; RECONNECT_PAUSES
    bounds the tries of one.  What has lost its connection is a suspect: after its tries
    in company it is tried alone, and nothing begins beside it.
    """

    def __init__(self, config: Config, stopping: Stopping, patient: bool = True):
        """`patient`: tries again when it does not answer, and waits meanwhile."""
        self._config = config
        self.stopping = stopping
        self._pauses = RECONNECT_PAUSES if patient else (0,)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._tries = 0
        self._given_up: Fatal | None = None
        self.alone = threading.RLock()  # held by whoever may have broken the connection
        self.pace = Pace(config.bandwidth_limit, stopping).wait

    def close(self) -> None:
        """Ends the connection for good; whoever waits on the box gets Stopped."""
        self.stopping.set()
        if self._connection is not None:
            self._connection.close("stopped")

    def connection(self) -> Connection:
        """The connection, a new one if it was lost; Fatal when the box is gone,
        Stopped after `close`."""
        with self._lock:
            self.stopping.check()
            if self._given_up is not None:  # nobody need find out once more
                raise self._given_up
            connection = self._connection
            if connection is None or connection.lost is not None:
                try:
                    connection = self._connect_anew(connection)
                except Fatal as error:
                    self._given_up = error
                    raise
        if self.stopping.is_set():
            self.close()
        return connection

    def _connect_anew(self, old: Connection | None) -> Connection:
        """Once `old` is lost, None at first; Fatal, Stopped."""
        reason = old.lost if old is not None else None
        if old is not None and old.useful:
            self._tries = 0
        for pause in self._pauses[self._tries :]:
            if reason is not None:
                log.warning("%s; trying again in %s s", reason, pause)
            self.stopping.wait(pause)
            self.stopping.check()
            self._tries += 1
            try:
                self._connection = connection = connect(self._config)
                self.stopping.check()  # `close` has not met this one
                if self._tries > TRIES_IN_COMPANY:  # is it the box, or a file on it?
                    prove(connection, self._config.remote_path)
                return connection
            except ConnectionLost as error:
                # More tries of what never worked, and the box may ban this machine.
                if old is None and isinstance(error, HungUp) and isinstance(reason, HungUp):
                    raise Fatal(str(error)) from None
                reason = error
        tries = f"gave up after {self._tries} tries: " if self._tries > 1 else ""
        raise Fatal(f"{tries}{reason}")

    def insist(self, operation: Callable[[Connection], T]) -> T:
        """operation(connection), again from its start whenever the connection
        is lost under it; Broken after LOSSES_IN_A_ROW times, since then it may
        be this file that breaks it.

        From the third try on it is `alone`, so that a file that breaks the
        connection does not take others down with it.
        """
        with contextlib.ExitStack() as stack:
            for attempt in range(LOSSES_IN_A_ROW):
                if attempt == TRIES_IN_COMPANY:
                    stack.enter_context(self.alone)
                with self.alone:  # nothing is begun beside what may break the connection
                    connection = self.connection()
                try:
                    return operation(connection)
                except LOST as error:
                    connection.close(str(error))  # it may be out of step only
                    reason = error
            raise self.broken(LOSSES_IN_A_ROW, reason)

    def insist_on(self, path: bytes, operation: Callable[[Connection], T]) -> T:
        """The same, of what opens `path`: a refusal is its FileError, or Vanished."""
        try:
            return self.insist(operation)
        except Status as error:
            raise self.failure(path, error) from None

    def alone_if_free(self, act: Callable[[], None]) -> bool:
        """act() with nothing beginning beside it; False, at once, if something else is
        alone."""
        if not self.alone.acquire(blocking=False):
            return False
        try:
            act()
        finally:
            self.alone.release()
        return True

    def room(self) -> tuple[int, int] | None:
        """Bytes used and free where REMOTE_PATH is, None if the server does not
        tell (OpenSSH's extension, which a Storage Box has)."""
        path = self._config.remote_path

        def statvfs(connection: Connection) -> tuple[int, int] | None:
            (reply,) = connection.ask((FXP_EXTENDED, blob(b"statvfs@openssh.com") + blob(path)))
            try:
                body = expect(FXP_EXTENDED_REPLY, reply)
            except Status:
                return None
            _, unit, blocks, free, available, *_ = struct.unpack_from(">11Q", body)
            return (blocks - free) * unit, available * unit

        return self.insist(statvfs)

    def attributes(self, path: bytes) -> Attributes:
        """Of `path` itself, not of what a link points to; Status, FileError."""
        return self.insist(lambda connection: lstat(connection, path))

    def broken(self, times: int, last: Exception) -> Broken:
        """What to tell of a file or folder under which the connection was lost `times`
        in a row, if the box does answer otherwise: then the outage is over.  Fatal,
        Stopped."""
        with contextlib.suppress(ConnectionLost):
            prove(self.connection(), self._config.remote_path)
        return Broken(f"lost the connection {times} times, last: {last}")

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
            began = time.time()
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
            return now, b"".join(pieces), recent(now, began)

        result = self.insist_on(file.path, read)
        if result is not None:
            return result
        # Its size is not the listed one, or replies were short.
        with contextlib.closing(Reader(self, file.path)) as reader:
            reader.must_fit(file)
            data = reader.read()
            return reader.file, data, reader.fresh


def lstat(connection: Connection, path: bytes) -> Attributes:
    """Of `path` itself, not of what a link points to; Status, ConnectionLost."""
    (reply,) = connection.ask((FXP_LSTAT, blob(path)))
    connection.useful = True
    return attributes_of(reply)


def prove(connection: Connection, path: bytes) -> None:
    """ConnectionLost unless the box answers, be it with a refusal."""
    try:
        lstat(connection, path)
    except Status:
        pass
    except LOST as error:
        connection.close(str(error))
        raise ConnectionLost(str(error)) from None


def attributes_of(reply: Reply) -> Attributes:
    """What a reply to LSTAT or FSTAT tells; Status."""
    return take_attributes(expect(FXP_ATTRS, reply), 0)[0]


def is_link(look: Reply) -> bool:
    """Whether LSTAT tells of a link."""
    with contextlib.suppress(Status):
        return stat.S_ISLNK(attributes_of(look).mode or 0)
    return False


def open_file(connection: Connection, path: bytes, flags: int = FXF_READ) -> bytes:
    """The handle of `path`, as requests carry it; Status, ConnectionLost."""
    no_attributes = U32.pack(0)
    (reply,) = connection.ask((FXP_OPEN, blob(path) + U32.pack(flags) + no_attributes))
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
        size, mtime, mode = attributes_of(reply)
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


def recent(file: RemoteFile, began: float) -> bool:
    """Whether `file`, read since `began` (seconds since the epoch), changed so shortly
    before that, or since, that another change could have the same time."""
    return began - RECENT <= file.mtime <= time.time() + RECENT


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
        self._began = time.time()
        self.crc32 = 0  # of all that was delivered
        self.last_crc32 = 0  # of what the last read() delivered
        self.fresh = False  # `recent`, as the check at its end found
        self._delivered = 0
        self._arrived: deque[memoryview] = deque()
        self._got = 0  # end of what arrived
        self._asked = 0  # end of what was asked for
        self._flights: deque[tuple[Flight, list[tuple[int, int]]]] = deque()
        self._read_size = READ_SIZE
        self._short = 0  # length of the last short reply
        self._checked = False
        self.file = box.insist_on(path, self._open)

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
        if self.file.size > listed.size + GROWTH:
            raise FileError(
                f"changed: {listed.size:,} bytes when it was listed, now {self.file.size:,}"
            )

    def close(self) -> None:
        """Gives the handle back, if the file was not read to its end."""
        if self._handle:
            self._connection.flight((FXP_CLOSE, self._handle))

    def _open(self, connection: Connection) -> RemoteFile:
        asked, self._asked = self._flights, self._got
        self._flights = deque()
        for flight, spans in asked:  # what has arrived need not be asked for again
            if not flight.whole or spans[0][0] != self._asked:
                break
            self._flights.append((flight, spans))
            self._asked = sum(spans[-1])
        handle = open_file(connection, self._path)
        # Together: a handle of an earlier connection may be another file's on this one.
        self._connection, self._handle = connection, handle
        (reply,) = connection.ask((FXP_FSTAT, handle))
        try:
            return regular_file(self._path, reply)
        except FileError:
            connection.flight((FXP_CLOSE, handle))
            self._handle = b""
            raise

    def _step(self, step: Callable[[], None]) -> None:
        """One step; over a new connection, everything that had not arrived is asked for
        again."""

        def go_on(connection: Connection) -> None:
            if connection is not self._connection and self._open(connection) != self.file:
                raise FileError("changed while the connection was lost")
            step()

        self._box.insist_on(self._path, go_on)

    def _receive(self) -> None:
        """Keeps the window full and takes in the oldest flight."""
        window_end = min(self.file.size, self._got + READ_WINDOW)
        while self._asked < window_end and len(self._flights) < FLIGHTS_AHEAD:
            start, step = self._asked, self._read_size
            end = self._asked = min(self.file.size, start + READS_PER_FLIGHT * step)
            spans = [(at, min(step, end - at)) for at in range(start, end, step)]
            self._box.pace(end - start)
            requests = (read_request(self._handle, *span) for span in spans)
            self._flights.append((self._connection.flight(*requests), spans))
        flight, spans = self._flights.popleft()
        for (at, size), reply in zip(spans, flight.replies()):
            self._take(at, size, data_of(reply))

    def _take(self, at: int, size: int, data: memoryview) -> None:
        """`size` bytes from offset `at`, of which `data` came; asks for the rest."""
        if 0 < len(data) < size:
            # Twice the same length: that is the most this server answers.
            if len(data) == self._short:
                self._read_size = max(len(data), LEAST_READ)
            self._short = len(data)
        while True:
            if not data:
                must_be(self.file, *self._connection.ask((FXP_FSTAT, self._handle)))
                raise FileError(f"ended at {at:,} of {self.file.size:,} bytes")
            if len(data) > size:
                raise ConnectionLost(f"the box sent {len(data):,} bytes for {size:,}")
            self._arrived.append(data)
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
        self._handle = b""  # closed: on the box it may be another file's by now
        must_be(self.file, last, named)
        if data_of(beyond):
            raise FileError(f"does not end at its size of {self.file.size:,} bytes")
        self.fresh = recent(self.file, self._began)
        self._checked = True


class Listing:
    """One folder on its way: opendir, then readdirs together until the end.

    It sends and never waits: `arrived` gets it whenever a flight of it is back,
    for the walk to call `advance`.  It stops asking while PAGE entries wait.  At first,
    and after its connection was lost, it is `stalled` until the walk calls `start`: then
    at its turn, and alone until it is `proven`, so that a folder that breaks the
    connection takes nothing else down with it.
    """

    def __init__(
        self, box: Box, path: bytes, arrived: queue.SimpleQueue[Listing], may_be_link: bool
    ):
        self.path = path
        self._may_be_link = may_be_link
        self._box = box
        self._queue = arrived
        self._losses = 0
        self._given: list[bytes] = []  # the names of earlier pages, / between
        self._furthest = 0  # the most names that it came to
        self.entries: list[Entry] = []
        self.complete, self.stalled = False, True

    def start(self) -> None:
        """Lists from the beginning; what was handed on is skipped.  Fatal, Stopped."""
        self.entries = []
        self.complete = self.stalled = False
        self.proven = False  # whether names came
        self.error: FileError | None = None
        self._handle = b""
        self._at_end = False
        self._came_to = 0
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
            look, *replies = self._flight.replies()
            if self._handle:
                if not self._may_be_link and is_link(look):
                    raise FileError("changed: it is a link now")
                names = sum(map(self._take, replies))
                if not names and not self._at_end:
                    raise ConnectionLost("the box sent a listing that does not end")
                self._came_to += names
                if self._came_to > self._furthest:  # not merely as far as before
                    self._furthest, self._losses = self._came_to, 0
                self._connection.useful = self.proven = True
                if self._at_end:
                    self._end(None)
            else:
                self._handle = handle_of(look)
        except LOST as lost:
            self._connection.close(str(lost))
            self._losses += 1
            if self._losses < LOSSES_IN_A_ROW:
                self.entries, self.stalled = [], True
                return
            self._end(self._box.broken(self._losses, lost))
        except Status as error:
            self._end(self._box.failure(self.path, error))
        except FileError as error:
            self._end(error)
        if not self.complete and len(self.entries) < PAGE:
            self._ask()

    def _ask(self) -> None:
        readdirs = [(FXP_READDIR, self._handle)] * self._readdirs
        self._send((FXP_LSTAT, blob(self.path)), *readdirs)
        self._readdirs = min(2 * self._readdirs, 8 * READDIRS_PER_FLIGHT)

    def _take(self, reply: Reply) -> int:
        """The number of names that a READDIR brought, none at the end; a server that
        answers many at once may bring more names after it."""
        try:
            entries = take_names(expect(FXP_NAME, reply))
        except Status as error:
            if error.code != FX_EOF and not self._at_end:
                raise
            self._at_end = True
            return 0
        self.entries += [entry for entry in entries if entry[0] not in self._skip]
        return sum(name not in (b".", b"..") for name, _ in entries)

    def _end(self, error: FileError | None) -> None:
        self.complete = True
        self.error = error
        if self._handle:  # not waited for: it costs no round trip
            self._connection.flight((FXP_CLOSE, self._handle))

    def page(self) -> list[Entry]:
        """The entries, by name, once PAGE wait or all are there; lets the listing go on."""
        entries, self.entries = self.entries, []
        entries.sort(key=lambda entry: entry[0])
        if not self.complete:
            self._given.append(b"/".join(name for name, _ in entries))
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
        self._broken = 0  # folders in a row under which the connection was lost

    def __iter__(self) -> Iterator[list[RemoteFile]]:
        """Raises Fatal (also if `root` itself cannot be listed), Stopped.  Yields an
        empty page after each WALK_PAUSE without one."""
        arrived: queue.SimpleQueue[Listing] = queue.SimpleQueue()
        waiting = [self._root]
        begun: deque[Listing] = deque()
        folders: list[bytes] = []
        while waiting or begun:
            while waiting and len(begun) < LISTINGS_AT_ONCE:
                path = waiting.pop()
                begun.append(Listing(self._box, path, arrived, path == self._root))
                self._box.alone_if_free(begun[-1].start)  # else at its turn
            listing = begun[0]
            yielded = time.monotonic()
            while not listing.complete and len(listing.entries) < PAGE:
                restart = partial(self._restart, listing, arrived)
                # What is alone is not waited for: what has finished is to be committed.
                if not (listing.stalled and self._box.alone_if_free(restart)):
                    with contextlib.suppress(queue.Empty):
                        arrived.get(timeout=WALK_PAUSE).advance()
                if time.monotonic() - yielded >= WALK_PAUSE:
                    yield []
                    yielded = time.monotonic()
            files = []
            for name, attributes in listing.page():
                path = join(listing.path, name)
                file = self._sort_out(path, name, attributes, folders)
                if file is not None:
                    files.append(file)
            yield files
            if listing.complete:
                begun.popleft()
                self._unlisted(listing)
                waiting += sorted(folders, reverse=True)
                folders = []

    def _restart(self, listing: Listing, arrived: queue.SimpleQueue[Listing]) -> None:
        """Begins a listing anew, until it has got further: that takes SILENCE_LIMIT twice
        at most."""
        listing.start()
        while not (listing.proven or listing.complete or listing.stalled):
            arrived.get().advance()

    def _unlisted(self, listing: Listing) -> None:
        """Counts a folder that could not be listed, or not to its end."""
        if isinstance(listing.error, Vanished) and listing.path != self._root:
            self.vanished += 1
        elif listing.error and listing.path == self._root:
            gone = isinstance(listing.error, Vanished)
            reason = "there is no such folder on the box" if gone else listing.error
            raise Fatal(f"REMOTE_PATH {printable(self._root)} cannot be listed: {reason}")
        elif listing.error:
            self._failed(listing.path, f"this folder cannot be listed: {listing.error}")
        self._broken = self._broken + 1 if isinstance(listing.error, Broken) else 0
        if self._broken >= BROKEN_IN_A_ROW:
            raise Fatal(f"{listing.error}; {self._broken} folders in a row failed so")

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


# ------------------------------------------------------- Places to restore to

NO_FILE = (-1, -1)
THROUGH_LINK = "a folder above it is a link, which may lead anywhere: nothing is written there"
Blocks = Callable[[], Iterator[bytes]]  # a file's bytes, from the start at each call


class BoxFolder:
    """A folder of the box to restore to.  Nothing is overwritten unless told to."""

    def __init__(self, box: Box, folder: bytes):
        self._box = box
        self._folder = re.sub(b"/+", b"/", folder)  # as `_make` takes it apart
        self._made: set[bytes] = set()

    def room(self) -> int | None:
        """Free bytes, None if nobody tells."""
        room = self._box.room()
        return room and room[1]

    def find(self, name: bytes) -> tuple[int, int] | None:
        """Size and mtime of the file, None if there is none, NO_FILE if something
        else is in its place; FileError."""
        try:
            size, mtime, mode = self._box.attributes(join(self._folder, name))
        except Status as error:
            if error.code == FX_NO_SUCH_FILE:
                return None
            raise FileError(f"the box does not tell what is there: {error}") from None
        if size is None or mtime is None or not stat.S_ISREG(mode or 0):
            return NO_FILE
        return size, mtime

    def store(self, name: bytes, mtime: int, blocks: Blocks, replace: bool) -> None:
        """Writes the file under another name and renames it; FileError, also if
        there is one already and it is not to be replaced.  Fatal if the box is full."""
        if not 0 <= mtime < 1 << 32:
            raise FileError(f"SFTP cannot carry its time, {mtime}")
        path = join(self._folder, name)
        folder = path.rpartition(b"/")[0]
        partial_path = join(self._folder, partial_name(name))
        written: int | None = None

        def write(connection: Connection) -> None:
            nonlocal written
            # The answer to an earlier rename may have been lost with its connection.
            if written is not None and size_and_mtime(connection, path) == (written, mtime):
                return
            self._make(connection, folder)
            written = self._write(connection, partial_path, mtime, blocks())
            self._rename(connection, partial_path, path, replace)
            # A lost connection's request may be carried out as late as now.
            if size_and_mtime(connection, path) != (written, mtime):
                raise FileError("the box has something else in its place then")

        try:
            self._box.insist(write)
        except (Status, FileError) as error:
            room = self.room() if isinstance(error, Status) else None  # with that file
            with contextlib.suppress(Fatal, Stopped):  # not waited for
                self._box.connection().flight((FXP_REMOVE, blob(partial_path)))
            if isinstance(error, Status):
                kind = FileError if room is None or room >= MIB else Fatal
                raise kind(f"the box cannot store it: {error}") from None
            raise

    def try_out(self) -> None:
        """Fatal unless files can be made there; leaves the folder."""
        probe = join(self._folder, partial_name(b""))

        def write(connection: Connection) -> None:
            self._make(connection, self._folder.rstrip(b"/"))
            handle = open_file(connection, probe, FXF_WRITE | FXF_CREAT | FXF_TRUNC)
            connection.ask((FXP_CLOSE, handle), (FXP_REMOVE, blob(probe)))

        try:
            self._box.insist(write)
        except Status as error:
            told = f"{printable(self._folder)} cannot be written to: {error}"
            raise Fatal(f"{told}; --to-box takes an account that may write") from None

    def _make(self, connection: Connection, folder: bytes) -> None:
        """The folder and those above it; FileError if one below the folder that is
        restored to is a link, Status if it cannot be made."""
        if folder and folder not in self._made:
            above = [path for path in itertools.accumulate(folder.split(b"/"), join) if path]
            inner = [path for path in above if path.startswith(join(self._folder, b""))]
            looks = [(FXP_LSTAT, blob(path)) for path in inner]
            if looks and any(map(is_link, connection.ask(*looks))):
                raise FileError(THROUGH_LINK)
            makes = ((FXP_MKDIR, blob(path) + U32.pack(0)) for path in above)
            *made, there = connection.ask(*makes, (FXP_LSTAT, blob(folder)))
            if there.kind == FXP_STATUS:
                refusals = [status_of(reply, FXP_STATUS) for reply in reversed(made)]
                raise min(refusals, key=lambda status: status.code != FX_PERMISSION_DENIED)
            if stat.S_ISREG(attributes_of(there).mode or 0):
                raise FileError(f"{printable(folder)} is a file on the box, not a folder")
            if len(self._made) >= PAGE:  # they come in order: the rest is not met again
                self._made.clear()
            self._made.add(folder)

    def _write(
        self, connection: Connection, path: bytes, mtime: int, blocks: Iterator[bytes]
    ) -> int:
        """The number of bytes that it wrote, and that the box says are there."""
        # What a killed pass has left; ProFTPD lets nobody write to a file anew.
        connection.flight((FXP_REMOVE, blob(path)))
        handle = open_file(connection, path, FXF_WRITE | FXF_CREAT | FXF_TRUNC)
        flights: deque[Flight] = deque()
        at = 0
        try:
            for block in blocks:
                writes = []
                for start in range(0, len(block), WRITE_SIZE):
                    piece = block[start : start + WRITE_SIZE]
                    writes.append((FXP_WRITE, handle + U64.pack(at) + blob(piece)))
                    at += len(piece)
                flights.append(connection.flight(*writes))
                if len(flights) > WRITES_AHEAD:
                    expect_ok(flights.popleft())
            for flight in flights:
                expect_ok(flight)
            times = U32.pack(ATTR_ACMODTIME) + U32.pack(mtime) + U32.pack(mtime)
            expect_ok(connection.flight((FXP_FSETSTAT, handle + times)))
        except BaseException:
            connection.flight((FXP_CLOSE, handle))
            raise
        expect_ok(connection.flight((FXP_CLOSE, handle)))
        if size_and_mtime(connection, path) != (at, mtime):
            raise FileError(f"the box does not have {at:,} bytes of mtime {mtime} then")
        return at

    def _rename(
        self, connection: Connection, source: bytes, target: bytes, replace: bool
    ) -> None:
        names = blob(source) + blob(target)
        if replace:
            extended = (FXP_EXTENDED, blob(b"posix-rename@openssh.com") + names)
            try:
                return expect_ok(connection.flight(extended))
            except Status as error:
                if error.code != FX_UNSUPPORTED:
                    raise
            connection.ask((FXP_REMOVE, blob(target)))
        expect_ok(connection.flight((FXP_RENAME, names)))


def size_and_mtime(connection: Connection, path: bytes) -> tuple[int | None, int | None]:
    """Size and mtime of `path`, None where the server tells none."""
    with contextlib.suppress(Status):
        return lstat(connection, path)[:2]
    return None, None


class LocalFolder:
    """A folder of this machine to restore to, with the same methods."""

    def __init__(self, folder: Path):
        self._folder = os.fsencode(folder)

    def room(self) -> int | None:
        folder = Path(os.fsdecode(self._folder)).absolute()
        with contextlib.suppress(OSError):
            there = next(path for path in (folder, *folder.parents) if path.exists())
            return shutil.disk_usage(there).free
        return None

    def try_out(self) -> None:
        try:
            os.makedirs(self._folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise Fatal(f"{printable(self._folder)} cannot be written to: {error}") from None

    def find(self, name: bytes) -> tuple[int, int] | None:
        try:
            found = os.lstat(self._path(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileError(f"cannot be stored: {error.strerror}") from None
        if found.st_nlink > 1:  # killed between link and unlink
            with contextlib.suppress(OSError):
                os.unlink(self._path(partial_name(name)))
        is_file = stat.S_ISREG(found.st_mode)
        return (found.st_size, int(found.st_mtime)) if is_file else NO_FILE

    def store(self, name: bytes, mtime: int, blocks: Blocks, replace: bool) -> None:
        """Fatal if the disk is full."""
        path, partial_path = self._path(name), self._path(partial_name(name))
        try:
            inside = os.path.join(os.path.realpath(self._folder), os.path.dirname(name))
            if os.path.realpath(os.path.dirname(path)) != os.path.normpath(inside):
                raise FileError(THROUGH_LINK)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial_path)  # of a run that was killed
            try:
                with open(partial_path, "xb") as file:
                    for block in blocks():
                        file.write(block)
                    file.flush()
                    os.fsync(file.fileno())  # the next run believes size and mtime
                    ours = os.fstat(file.fileno())
                if not os.path.samestat(ours, os.lstat(partial_path)):
                    raise FileError("another restore to this folder is writing it")
                os.utime(partial_path, (mtime, mtime))
                if replace:
                    os.replace(partial_path, path)
                else:
                    rename_to_new(partial_path, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial_path)
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT):
                raise Fatal(f"{printable(self._folder)}: {error}") from None
            raise FileError(f"cannot be stored: {error}") from None

    def _path(self, name: bytes) -> bytes:
        return os.path.join(self._folder, name)


def partial_name(name: bytes) -> bytes:
    """What a file is called until it is whole, in the same folder: the same in each
    run, so that nothing piles up, and short enough for every name."""
    folder, slash, last = name.rpartition(b"/")
    hidden = b".archive-" + hashlib.sha256(last).hexdigest()[:32].encode() + b".partial"
    return folder + slash + hidden


def rename_to_new(source: bytes, target: bytes) -> None:
    """Renames, but not over another file: rename(2) would."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "there is one already") from None
        os.rename(source, target)


# --------------------------------------------------------------- State: SQLite

SCHEMA = """
CREATE TABLE IF NOT EXISTS files
    (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, uploaded_at INTEGER);
CREATE TABLE IF NOT EXISTS objects
    (path TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, crc32 INTEGER NOT NULL,
     parts INTEGER NOT NULL, storage_class TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS recheck (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replacing (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uploads (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs
    (started_at INTEGER PRIMARY KEY, ended_at INTEGER, status INTEGER,
     uploaded INTEGER, skipped INTEGER, failed INTEGER, bytes INTEGER);
"""
SNAPSHOT_DUE = ("INSERT OR IGNORE INTO meta VALUES ('snapshot', 'due')",)
PATHS_PER_QUERY = 500  # below SQLite's limit on parameters, 999 in old builds


class Recorded(NamedTuple):
    """A row of the state; None is what an earlier script did not record."""

    key: str | None
    path: str  # as in the path column
    size: int
    mtime: int
    uploaded_at: int | None
    crc32: int | None
    storage_class: str | None
    doubtful: bool  # a newer object may have been stored since


# Without what an earlier script may have written in another form: that is unknown.
RECORDED = (
    "SELECT {key} AS key, path, size, mtime,"
    " CASE typeof(uploaded_at) WHEN 'integer' THEN uploaded_at END, crc32, storage_class,"
    " path IN (SELECT path FROM replacing)"
    " FROM files LEFT JOIN objects USING (path) WHERE typeof(path) = 'text'"
    " AND typeof(size) = 'integer' AND typeof(mtime) = 'integer'"
)
PLACED = RECORDED.format(key="coalesce(key, key_of(path))")


class PastRun(NamedTuple):
    """A run as the state keeps it; None from `ended_at` on if it was killed."""

    started_at: int
    ended_at: int | None
    status: int | None
    uploaded: int | None
    skipped: int | None
    failed: int | None
    bytes: int | None


class Stored(NamedTuple):
    """What S3 has acknowledged: a file's bytes under `key`; `parts` 0 means
    one PUT."""

    file: RemoteFile
    key: str
    crc32: int
    parts: int
    recheck: bool  # it may have changed again within the second
    clean: bool  # no unfinished upload of `key` is left


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
    """The record of what is archived: used by one thread, under the lock unless it
    is a private copy.

    A row is written after S3 has acknowledged the object, in one transaction
    with all that is known of it, synchronously: what is here, is there.  Every
    method raises Fatal when the database cannot be used.
    """

    def __init__(self, path: Path, key_of: Callable[[str], str | None], private: bool = False):
        """Opens the database at `path`, which `state_is_empty` has checked through,
        or creates it.  `key_of` gives the key of a path whose row has none, an earlier
        script's; None if it can have none.  `private`: a copy of it on temporary disk, so
        that what is written goes nowhere; empty if there is none."""
        self._path = path
        with state_errors(path):
            self._db = sqlite3.connect(
                "" if private else path, timeout=LOCKED_LIMIT, isolation_level=None
            )
            if private and path.exists():
                with contextlib.closing(sqlite3.connect(path, timeout=LOCKED_LIMIT)) as source:
                    source.backup(self._db)
            self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
            self._db.execute(f"PRAGMA busy_timeout = {COMMIT_LIMIT * 1000}")
            self._db.create_function("key_of", 1, key_of, deterministic=True)
        self.as_of = math.inf  # when it was stored, of a snapshot: what is newer is unknown

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with state_errors(self._path):
            return self._db.execute(query, values).fetchall()

    def _commit(self, *statements: tuple[Any, ...]) -> None:
        """(SQL, value, …) statements in one transaction."""
        with state_errors(self._path), self._db:  # which commits or rolls back
            self._db.execute("BEGIN IMMEDIATE")
            for sql, *values in statements:
                self._db.execute(sql, values)

    def close(self) -> None:
        self._db.close()

    def pin(self, pins: Mapping[str, str]) -> None:
        """Ties the state to its source and destination, by setting; Fatal if
        it is tied to another one: believing that everything is archived there
        already would lose it."""
        known = dict(self._rows("SELECT name, value FROM meta"))
        for name, value in pins.items():
            if known.get(name, value) != value:
                tied, wanted = (printable(text) or "(empty)" for text in (known[name], value))
                raise Fatal(
                    f"the state belongs to {name}={tied}, but the setting is {wanted}: set it "
                    "back, or give the other one a STATE_DB and S3_PREFIX of its own"
                )
        new = pins.items() - known.items()
        if new:
            self._commit(*(("INSERT INTO meta VALUES (?, ?)", *pin) for pin in new))

    def is_pinned(self) -> bool:
        return bool(self._rows("SELECT 1 FROM meta WHERE name = 'S3_BUCKET'"))

    def not_archived(self, files: list[RemoteFile]) -> list[RemoteFile]:
        """Those of `files` that have no row of their size and mtime, or one
        that is to be looked at again, or may be that of a replaced object."""
        missing = []
        for start in range(0, len(files), PATHS_PER_QUERY):
            some = {path_text(file.path): file for file in files[start:][:PATHS_PER_QUERY]}
            marks = ",".join("?" * len(some))
            query = (
                f"SELECT path, size, mtime FROM files WHERE path IN ({marks})"
                " AND path NOT IN (SELECT path FROM recheck)"
                " AND path NOT IN (SELECT path FROM replacing)"
            )
            settled = set(self._rows(query, *some))
            missing += [f for path, f in some.items() if (path, *f[1:]) not in settled]
        return missing

    def doubt(self, paths: Iterable[str]) -> None:
        """Notes which of these paths, as text, have a row: their objects may be other ones
        by now, or, should S3's answer to a new one get lost, soon."""
        note = "INSERT OR IGNORE INTO replacing SELECT path FROM files WHERE path = ?"
        notes = [(note, path) for path in paths]
        if notes:
            self._commit(*notes)

    def earlier(self, file: RemoteFile) -> Recorded | None:
        """What is recorded of the path of `file`, whatever its size and mtime."""
        rows = self._rows(RECORDED.format(key="key") + " AND path = ?", path_text(file.path))
        return Recorded(*rows[0]) if rows else None

    def recorded(self, start: str) -> Iterator[Recorded]:
        """All rows whose key begins with `start`, in the order of their keys, which
        is S3's."""
        with state_errors(self._path):
            query = f"SELECT * FROM ({PLACED}) WHERE substr(key, 1, ?) = ? ORDER BY key"
            for row in self._db.execute(query, (len(start), start)):
                yield Recorded(*row)

    def not_below(self, start: str) -> int:
        """The number of rows that `recorded` does not give."""
        below = f"SELECT count(*) FROM ({PLACED}) WHERE substr(key, 1, ?) = ?"
        query = f"SELECT count(*) - ({below}) FROM files"
        return int(self._rows(query, len(start), start)[0][0])

    def totals(self) -> list[tuple[str | None, int, int]]:
        """(storage class, None where it was not recorded; files; bytes)."""
        return self._rows(
            "SELECT storage_class, count(*), coalesce(sum(size), 0)"
            f" FROM ({RECORDED.format(key='key')}) GROUP BY 1 ORDER BY 2 DESC"
        )

    def count(self) -> int:
        """The number of files that are recorded."""
        return sum(files for _, files, _ in self.totals())

    def last_runs(self, count: int) -> list[PastRun]:
        """The latest first."""
        query = "SELECT * FROM runs ORDER BY started_at DESC LIMIT ?"
        return [PastRun(*row) for row in self._rows(query, count)]

    def forget(self, path: str) -> None:
        """Drops all that is recorded of `path`, as text: the next run archives it."""
        tables = ("files", "objects", "recheck", "replacing")
        statements = [(f"DELETE FROM {table} WHERE path = ?", path) for table in tables]
        self._commit(*statements, SNAPSHOT_DUE)

    def crc_to_recheck(self, file: RemoteFile) -> int | None:
        """The CRC-32 of `file`'s object if its row says that it has this size
        and mtime, and that it was read too soon after a change."""
        query = (
            "SELECT crc32 FROM files JOIN objects USING (path) JOIN recheck USING (path)"
            " WHERE path = ? AND size = ? AND mtime = ?"
            " AND path NOT IN (SELECT path FROM replacing)"
        )
        rows = self._rows(query, path_text(file.path), *file[1:])
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
        for file, key, crc32, parts, recheck, clean in archived:
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
                ("DELETE FROM replacing WHERE path = ?", path),
                ("DELETE FROM recheck WHERE path = ?", path),
            ]
            if recheck:
                statements.append(("INSERT INTO recheck VALUES (?)", path))
            if clean:
                statements.append(("DELETE FROM uploads WHERE key = ?", key))
        if statements:
            self._commit(*statements, SNAPSHOT_DUE)

    def snapshot_due(self) -> bool:
        """Whether anything was archived or forgotten since the last one was stored."""
        return bool(self._rows("SELECT 1 FROM meta WHERE name = 'snapshot'"))

    def snapshot_stored(self) -> None:
        self._commit(("DELETE FROM meta WHERE name = 'snapshot'",))

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
    with (
        state_errors(path),
        contextlib.closing(sqlite3.connect(path, timeout=LOCKED_LIMIT)) as db,
    ):
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


class Damaged(FileError):
    """What came is not what S3 holds, or not what is recorded."""


class Unreachable(FileError):
    """S3 did not answer: this file's failure, but the run's if it stays so."""


def s3_failure(error: Exception) -> ArchiveError:
    """What boto3 raised, as Fatal where every file would fail alike, as Cold where
    the object has to be restored first."""
    if isinstance(error, aws.ClientError):
        told = error.response.get("Error", {})
        code = str(told.get("Code"))
        code = HEAD_CODES.get(code, code)
        where = f" {told['BucketName']}:" if "BucketName" in told else ""
        said = f"S3 refused {error.operation_name}: {code}{where} {told.get('Message', '')}"
        if code in REMEDIES:
            return Fatal(f"{said}; {REMEDIES[code]}", code)
        return (Cold if code == "InvalidObjectState" else FileError)(said, code)
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
    except (aws.ClientError, aws.BotoCoreError) as error:
        raise s3_failure(error) from None


def crc_text(crc32: int) -> str:
    """A CRC-32 as S3 writes it: big-endian, base64."""
    return base64.b64encode(U32.pack(crc32)).decode()


def crc32_of(answer: Mapping[str, Any]) -> int | None:
    """The CRC-32 that a HEAD or GET answered, None unless it is of the whole object."""
    told = answer.get("ChecksumCRC32", "-")
    return None if "-" in told else int.from_bytes(base64.b64decode(told)[:4], "big")


class Held(NamedTuple):
    """What S3 keeps of an object beside its bytes; None where it keeps none."""

    mtime: int | None  # of the metadata, in rclone's form
    crc32: int | None  # of the whole object
    stored_at: int


def held(answer: Mapping[str, Any]) -> Held:
    """What a HEAD or GET answered."""
    # HTTP's names have no case, and some servers change it.
    told = {name.lower(): value for name, value in answer["Metadata"].items()}.get("mtime", "")
    is_time = re.fullmatch(r"-?\d{1,12}(\.\d*)?", told)
    mtime = math.floor(float(told)) if is_time else None
    return Held(mtime, crc32_of(answer), math.floor(answer["LastModified"].timestamp()))


def other_size(stored: int, recorded: int) -> str:
    return f"S3 holds {stored:,} bytes, recorded are {recorded:,}"


NO_REGION = "a region that it does not tell"
NOTHING_THERE = ("404", "NoSuchKey", "NoSuchUpload")


class S3Object(NamedTuple):
    """As the listing has it.  `restored`: None where nothing is known of a copy
    that can be read, False while it is being made, True while it is there."""

    key: str
    size: int
    storage_class: str
    restored: bool | None
    stored_at: int


def lifecycle_prefix(rule: Mapping[str, Any]) -> str:
    """What the keys begin with that a lifecycle rule is for; in both of its forms."""
    chosen = rule.get("Filter", rule)
    return str(chosen.get("And", chosen).get("Prefix", ""))


class Download:
    """One object's bytes, checked; `held` is what S3 keeps beside them."""

    def __init__(self, get: Callable[..., Any], stopping: Stopping):
        """`get` sends the GET with further parameters; FileError, Cold, Fatal."""
        self._get, self._stopping = get, stopping
        answer = get(ChecksumMode="ENABLED")
        self._first: dict[str, Any] | None = answer
        self._etag = answer["ETag"]
        self.size: int = answer["ContentLength"]
        self.held = held(answer)

    def blocks(self, size: int, crc32: int | None) -> Iterator[bytes]:
        """All of it, from the start at each call; FileError in place of the end
        unless it has `size` bytes and that CRC-32, or the one that S3 told.

        A connection that breaks is renewed at the offset where it broke.
        """
        crc32 = self.held.crc32 if crc32 is None else crc32
        if size != self.size:
            raise FileError(other_size(self.size, size))
        at = found = failures = 0
        while True:
            try:
                for block in self._body(at).iter_chunks(DOWNLOAD_BLOCK):
                    self._stopping.check()
                    found = zlib.crc32(block, found)
                    at += len(block)
                    failures = 0
                    yield block
                reason = "it ended early"
            except aws.FlexibleChecksumError as error:
                raise Damaged(f"damaged on the way: {error}") from None
            except (aws.BotoCoreError, urllib3.exceptions.HTTPError) as error:
                reason = str(error)
            if at >= size:
                break
            failures += 1
            if failures >= S3_ATTEMPTS:
                raise FileError(f"S3 broke off at {at:,} of {size:,} bytes: {reason}")
        if at != size:
            raise FileError(f"S3 sent {at:,} of {size:,} bytes")
        if crc32 is not None and found != crc32:
            raise Damaged(f"its CRC-32 is {crc_text(found)}, not {crc_text(crc32)}")

    def _body(self, at: int) -> Any:
        answer, self._first = self._first, None
        if answer is None:
            # The very object that was begun with, not one that has replaced it.
            part = {"Range": f"bytes={at}-"} if at else {}
            answer = self._get(IfMatch=self._etag, **part)
            told = answer.get("ContentRange", "bytes 0-")
            if answer["ETag"] != self._etag or not told.startswith(f"bytes {at}-"):
                raise FileError("S3 sent another object, or another part, than was asked for")
        return answer["Body"]


class Archive:
    """The bucket, below the prefix.  Nothing in it is ever deleted, except
    unfinished multipart uploads of our own."""

    def __init__(self, config: Config, stopping: Stopping, patient: bool):
        """`patient`: makes S3_ATTEMPTS of each request, not one."""
        self._bucket = config.bucket
        self._prefix = config.prefix
        self._storage_class = config.storage_class
        self._stopping = stopping
        self._uploads: dict[str, str] = {}  # key: upload id, while under way
        self._part_sums: dict[str, list[int]] = {}  # CRC-32 of the parts, in their order
        self._refused: dict[str, Exception] = {}  # of a multipart upload, by key
        self._maybe_left: set[str] = set()  # keys with perhaps an upload of unknown id
        self._told_left: set[str] = set()  # keys whose upload could not be aborted
        self._told_no_checksums = False
        settings = botocore.config.Config(
            connect_timeout=S3_CONNECT_LIMIT,
            read_timeout=S3_READ_LIMIT,
            retries={"mode": "standard", "total_max_attempts": S3_ATTEMPTS if patient else 1},
            max_pool_connections=config.transfers * PARTS_AT_ONCE,
            # Our own checksums go with every upload: no second ones, and over
            # TLS no signature that would sum the bytes once more.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
            user_agent="archive.py",  # boto3's own takes a tenth of a small PUT
            tcp_keepalive=True,
        )
        try:
            with s3_errors():
                session = boto3.Session(region_name=config.region)
                self._client = session.client(
                    "s3", endpoint_url=config.endpoint_url, config=settings
                )
            parse_endpoint(self._client.meta.endpoint_url)
        except ValueError as error:
            raise Fatal(f"AWS_ENDPOINT_URL, or what boto3 has for it: {error}") from None
        self.region: str | None = self._client.meta.region_name
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
        if response is None or response[0].status_code >= 500:
            self._stopping.check()

    def _after(self, context: dict[str, Any], event_name: str, **event: Any) -> None:
        """What S3 said, for those who only see s3transfer's result."""
        key = context["archive_key"]
        answer, exception = event.get("parsed") or {}, event.get("exception")
        if "Error" in answer:
            exception = aws.ClientError(answer, event_name.rpartition(".")[2])
        if exception is not None and key in self._part_sums:
            self._refused[key] = exception
        if event_name.endswith(".CreateMultipartUpload"):
            if "UploadId" in answer:
                self._uploads[key] = answer["UploadId"]
            # The answer to an earlier attempt may have been lost on its way.
            sent = not isinstance(exception, NO_CREDENTIALS)
            if sent and answer.get("ResponseMetadata", {}).get("RetryAttempts", 1):
                self._maybe_left.add(key)

    def _ask(self, request: Callable[..., Any], *missing: str, **parameters: Any) -> Any:
        """The client's answer to a request about our bucket, None if S3 refuses it with
        one of the codes `missing`: it has looked; FileError, Fatal."""
        try:
            with s3_errors():
                return request(Bucket=self._bucket, **parameters)
        except FileError as error:
            if error.code not in missing:
                raise
            return None

    def _pages(self, listing: str, prefix: str, **parameters: Any) -> Iterator[Any]:
        """The answers to a listing of what is below `prefix`; FileError, Fatal."""
        paginator = self._client.get_paginator(listing)
        with s3_errors():
            yield from paginator.paginate(Bucket=self._bucket, Prefix=prefix, **parameters)

    def put(self, key: str, data: bytes, crc32: int, mtime: int) -> None:
        """One PUT, with the CRC-32 for S3 to hold the bytes against.

        Not by upload_fileobj, which takes half as much CPU again for it.
        """
        checksum = {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": crc_text(crc32)}
        extra = self._extra(mtime) | checksum
        answer = self._ask(self._client.put_object, Key=key, Body=data, **extra)
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
        sums = self._part_sums[key] = []

        def read(amount: int = -1) -> bytes:
            """Called once for each part, in their order."""
            if key in self._refused:  # s3transfer would read to the end, for nothing
                raise self._refused[key]
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
            self._refused.pop(key, None)
            self._clean_up(key)

    def _extra(self, mtime: int) -> dict[str, Any]:
        # The time in rclone's form, so that other tools restore it.
        return {"StorageClass": self._storage_class, "Metadata": {"mtime": str(mtime)}}

    def _confirm(self, key: str, size: int, crc32: int) -> None:
        """Holds what S3 stored against what was read; FileError if they differ."""
        head = self._ask(self._client.head_object, Key=key, ChecksumMode="ENABLED")
        stored_size, stored_crc = head["ContentLength"], crc32_of(head)
        if stored_size != size:
            raise FileError(f"S3 holds {stored_size:,} bytes, read {size:,}")
        if stored_crc is None:
            if not self._told_no_checksums:
                self._told_no_checksums = True
                log.warning("this S3 server gives no CRC-32: only sizes are compared")
        elif stored_crc != crc32:
            raise FileError(f"S3 holds CRC-32 {crc_text(stored_crc)}, read {crc_text(crc32)}")

    def _clean_up(self, key: str) -> None:
        """Aborts what is left of an upload: s3transfer tries that too, but does
        not tell how it went."""
        upload_id = self._uploads.get(key)
        try:
            if upload_id is not None:
                self._abort(key, upload_id)
                self._uploads.pop(key, None)
            if key in self._maybe_left:
                self.abort_leftovers(key)
                self._maybe_left.discard(key)
        except (ArchiveError, Stopped) as error:
            self._told_left.add(key)
            log.warning(
                "the upload %s of %s could not be aborted, its parts cost money: %s; the "
                "next run tries again, a lifecycle rule is the safety net",
                *(upload_id or "of unknown id", printable(key), error),
            )

    def _abort(self, key: str, upload_id: str) -> None:
        abort = self._client.abort_multipart_upload
        self._ask(abort, "NoSuchUpload", Key=key, UploadId=upload_id)

    def may_have_left(self, keys: Iterable[str]) -> None:
        """Each of these may have an unfinished upload by an earlier run."""
        self._maybe_left.update(keys)

    def is_clean(self, key: str) -> bool:
        """Whether no multipart upload of `key` is left."""
        return key not in self._uploads and key not in self._maybe_left

    def abort_all(self) -> None:
        """Aborts what is under way, all at once, for an end that cannot wait for it."""
        keys = {*self._uploads, *self._maybe_left}
        with ThreadPoolExecutor(len(keys) or 1) as pool:
            pool.map(self._clean_up, keys)

    def tell_unfinished(self) -> None:
        """Warns of the uploads that are left as they are."""
        for key in {*self._uploads, *self._maybe_left} - self._told_left:
            log.warning(
                "the upload of %s is unfinished, its parts cost money: the next run aborts it",
                printable(key),
            )

    def abort_leftovers(self, key: str) -> int:
        """Aborts the unfinished uploads of exactly `key`; their number."""
        found = [
            upload["UploadId"]
            for page in self._pages("list_multipart_uploads", key)
            for upload in page.get("Uploads", ())
            if upload["Key"] == key
        ]
        for upload_id in found:
            self._abort(key, upload_id)
        return len(found)

    def objects(self, prefix: str) -> Iterator[S3Object]:
        """What is in the bucket below `prefix`, in the order of the keys; a request
        for 1,000 of them.  Neither the snapshot nor the empty objects that S3's
        console makes of folders."""
        more = {"OptionalObjectAttributes": ["RestoreStatus"]}
        for entry in self._entries(prefix, **more):
            status = entry.get("RestoreStatus", {})
            expiry = status.get("RestoreExpiryDate")
            restored = True if expiry and expiry.timestamp() > time.time() else None
            if status.get("IsRestoreInProgress"):
                restored = False
            kind = entry.get("StorageClass", "STANDARD")
            # Whole seconds, as in the answer to a GET.
            stored_at = math.floor(entry["LastModified"].timestamp())
            yield S3Object(entry["Key"], entry["Size"], kind, restored, stored_at)

    def _entries(self, prefix: str, **more: Any) -> Iterator[Any]:
        for page in self._pages("list_objects_v2", prefix, **more):
            self._stopping.check()
            for entry in page.get("Contents", ()):
                folder = entry["Key"].endswith("/") and not entry["Size"]
                if not folder and entry["Key"] != self._prefix + SNAPSHOT:
                    yield entry

    def head(self, key: str) -> Held:
        """What S3 keeps of an object, also of a cold one; FileError."""
        return held(self._ask(self._client.head_object, Key=key, ChecksumMode="ENABLED"))

    def has(self, key: str) -> bool:
        """Whether there is such an object; FileError, Fatal if S3 does not tell."""
        return self._ask(self._client.head_object, "404", Key=key) is not None

    def ask_for(self, key: str, tier: str, days: int) -> bool:
        """Asks S3 for a copy that can be read; whether there is one already.
        FileError, Fatal."""
        request = {"Days": days, "GlacierJobParameters": {"Tier": tier.capitalize()}}
        try:
            answer = self._ask(self._client.restore_object, Key=key, RestoreRequest=request)
        except FileError as error:
            if error.code == "RestoreAlreadyInProgress":
                return False
            # Its class is none that has to be restored, or it is back already.
            if error.code in ("ObjectAlreadyInActiveTierError", "InvalidObjectState"):
                return True
            raise
        return bool(answer["ResponseMetadata"]["HTTPStatusCode"] == 200)

    def download(self, key: str) -> Download:
        """The object; FileError, Cold if it has to be restored first."""

        def get(**more: str) -> dict[str, Any]:
            try:
                return self._ask(self._client.get_object, Key=key, **more)
            except Fatal as error:
                if error.code == "AccessDenied":  # perhaps to this one alone
                    raise FileError(str(error), error.code) from None
                raise

        return Download(get, self._stopping)

    def unfinished(self) -> int:
        """The number of multipart uploads below the prefix that are not ended."""
        pages = self._pages("list_multipart_uploads", self._prefix)
        return sum(len(page.get("Uploads", ())) for page in pages)

    def aborts_leftovers(self) -> bool:
        """Whether a lifecycle rule ends unfinished uploads below the prefix."""
        rules = self._client.get_bucket_lifecycle_configuration
        answer = self._ask(rules, "NoSuchLifecycleConfiguration") or {}
        return any(
            rule["Status"] == "Enabled"
            and "AbortIncompleteMultipartUpload" in rule
            and self._prefix.startswith(lifecycle_prefix(rule))
            for rule in answer.get("Rules", ())
        )

    def versioned(self) -> bool:
        """Whether the bucket keeps earlier versions of its objects."""
        answer = self._ask(self._client.get_bucket_versioning)
        return bool(answer.get("Status") == "Enabled")

    def look(self) -> tuple[str, float]:
        """The bucket's region, and the seconds that this machine's clock is ahead
        of S3's; FileError, Fatal."""
        with s3_errors():
            try:
                answer = self._client.head_bucket(Bucket=self._bucket)
            except aws.ClientError:  # without a word of why
                self.has_objects()
                raise
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        ahead = time.time() - parsedate_to_datetime(headers["date"]).timestamp()
        return headers.get("x-amz-bucket-region", NO_REGION), ahead

    def permissions(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each permission that a run needs, and what raises FileError or Fatal if
        it is missing, to be called in this order; nothing is left behind."""
        prefix, key, client = self._prefix, self._prefix + PROBE, self._client

        def upload() -> None:
            self._abort(key, self._ask(client.create_multipart_upload, Key=key)["UploadId"])

        def tried(request: Callable[..., Any], **parameters: Any) -> None:
            self._ask(request, *NOTHING_THERE, **parameters)

        yield "s3:ListBucket", partial(tried, client.list_objects_v2, Prefix=prefix, MaxKeys=1)
        yield "s3:GetObject", partial(tried, client.head_object, Key=key)
        uploads = partial(tried, client.list_multipart_uploads, Prefix=prefix, MaxUploads=1)
        yield "s3:ListBucketMultipartUploads", uploads
        aborted = partial(tried, client.abort_multipart_upload, Key=key, UploadId="none")
        yield "s3:AbortMultipartUpload", aborted
        yield "s3:PutObject", upload

    def may_restore(self) -> bool:
        """Whether `restore` has the permission that it needs."""
        request = {"Days": 1, "GlacierJobParameters": {"Tier": "Bulk"}}
        probe = {"Key": self._prefix + PROBE, "RestoreRequest": request}
        try:
            self._ask(self._client.restore_object, *NOTHING_THERE, **probe)
        except Fatal:
            return False
        return True

    def has_objects(self) -> bool:
        """Whether anything is below the prefix."""
        return next(self._entries(self._prefix), None) is not None

    def put_snapshot(self, database: Path) -> None:
        """Stores a copy of the state below the prefix, in the class that needs no
        restore; no transaction is open."""
        extra = {"ChecksumAlgorithm": "CRC32"}
        # One PUT, as long as S3 takes it: parts would be left when a run is killed.
        config = TransferConfig(
            multipart_threshold=MAX_PART, preferred_transfer_client="classic"
        )
        with s3_errors(), database.open("rb") as source:
            self._client.upload_fileobj(
                source, self._bucket, self._prefix + SNAPSHOT, extra, Config=config
            )

    def get_snapshot(self, target: Path) -> int | None:
        """Writes the state's copy to `target`; when it was stored, None if there is
        none; Unusable."""
        key = self._prefix + SNAPSHOT
        try:
            snapshot = self.download(key)
        except Cold:
            told = f"its snapshot {key} has gone to an archive class: restore it there"
            raise Unusable(told) from None
        except FileError as error:
            if error.code != "NoSuchKey":
                raise
            return None
        try:
            with target.open("wb") as copy:
                copy.writelines(snapshot.blocks(snapshot.size, None))
        except Damaged as error:
            raise Unusable(f"its snapshot {key} in the bucket is damaged: {error}") from None
        except FileError as error:
            raise FileError(f"the state's snapshot {key}: {error}") from None
        return snapshot.held.stored_at


# ----------------------------------------------------------------------- Money
#
# Estimates, of PRICES_OF, without taxes.  What has no price costs NaN, shown as
# unknown.


class Requests(NamedTuple):
    """Numbers of requests to S3, by kind."""

    put: int = 0
    create: int = 0
    part: int = 0
    complete: int = 0
    head: int = 0


def requests_of(size: int, plan: Plan) -> Requests:
    """What the upload of a file of `size` bytes takes."""
    if not plan.parts_at_once:
        return Requests(put=1)
    return Requests(create=1, part=-(-size // plan.part_size), complete=1, head=1)


class Money:
    """USD, by the prices of a region, with those that PRICES overrides."""

    def __init__(self, region: str | None, changed: dict[str, float]):
        self.region = region if region in PRICES else "us-east-1"
        self._usd = PRICES[self.region] | changed
        self.note = f"estimates, prices of {PRICES_OF}, {self.region}"
        if self.region != region:
            self.note += f" (those of {region or 'your region'} may differ: set PRICES)"
        if changed:
            self.note += " with PRICES"

    def about(self) -> dict[str, str]:
        """What the prices are, as JSON has it."""
        return {"of": PRICES_OF, "region": self.region, "note": self.note}

    def _cost(self, count: float, *name: str) -> float:
        """What `count` at the price of that name costs; nothing costs nothing."""
        return count * self._usd.get(".".join(name), math.nan) if count else 0.0

    def month(self, kind: str, files: int, size: int) -> float:
        """Storage for a month: bytes at the class's price; for a cold class also
        8 KB a file at STANDARD's and 32 KB at its own ("Amazon S3 pricing", note
        on metadata of archived objects)."""
        return self._cost(size / GIB, kind, "month") + self.index(kind, files)

    def index(self, kind: str, files: int) -> float:
        """The part of `month` that does not depend on the files' size."""
        if kind not in COLD_CLASSES:
            return 0.0
        standard = self._cost(files * INDEX_IN_STANDARD, "STANDARD", "month")
        return (standard + self._cost(files * INDEX_IN_CLASS, kind, "month")) / GIB

    def upload(self, kind: str, requests: Requests) -> float:
        """PUT and Complete at the class's price, Create and parts at that of parts,
        HEAD at that of GET (S3 user guide, "Multipart upload and pricing")."""
        put, create, part, complete, head = requests
        cost = self._cost(put + complete, kind, "put")
        cost += self._cost(create + part, kind, "part")
        return (cost + self._cost(head, "get")) / 1000

    def early(self, kind: str, size: int, age_days: float) -> float:
        """The charge for an object that is overwritten `age_days` after its upload:
        its storage for what is left of the class's minimum ("Amazon S3 pricing",
        early deletion, pro rata by days)."""
        if kind not in MINIMUM_DAYS:
            return 0.0 if kind == "STANDARD" else math.nan
        left = max(0.0, MINIMUM_DAYS[kind] - max(0.0, age_days))
        return self.month(kind, 1, size) * left / DAYS_A_MONTH

    def restore(self, kind: str, tier: str, files: int, size: int, days: int) -> float:
        """Requests and bytes at the tier's price, and the copies at STANDARD's for
        `days` (S3 user guide, "Restoring an archived object")."""
        if kind not in COLD_CLASSES:
            return 0.0 if kind == "STANDARD" or not files else math.nan
        request = self._cost(files / 1000, kind, tier, "request")
        read = self._cost(size / GIB, kind, tier, "gb")
        copies = self._cost(size / GIB, "STANDARD", "month") * days / DAYS_A_MONTH
        return request + read + copies

    def download(self, files: int, size: int) -> float:
        """GETs, and the transfer out of AWS beyond the free 100 GB of a month
        ("Amazon S3 pricing", data transfer; within AWS's region it is free)."""
        out = self._cost(max(0.0, size / GIB - FREE_EGRESS), "egress")
        return self._cost(files / 1000, "get") + out


def usd_text(usd: float) -> str:
    """`$1.23`, `under $0.01`, `unknown`."""
    if math.isnan(usd):
        return "unknown"
    return "under $0.01" if 0 < usd < 0.01 else f"${usd:,.2f}"


# -------------------------------------------------------------------- Progress

Sent = Callable[[int], None]  # called with each number of bytes sent


class Progress:
    """tqdm bars on a terminal: one for all, one for each large file.

    Where they are not shown, they cost next to nothing.
    """

    def __init__(self, shown: bool):
        self._shown = shown
        self._total = tqdm(disable=True)
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def _bar(self, name: str, size: int) -> Any:
        return tqdm(
            total=size, desc=name, unit="B", unit_scale=True, unit_divisor=1024,
            dynamic_ncols=True, leave=False,
        )  # fmt: skip

    def _tick(self) -> None:
        """So that a slow line does not look like a dead one."""
        while not self._over.wait(1):
            self._total.refresh()

    @contextlib.contextmanager
    def counting(self, doing: str) -> Iterator[Sent]:
        """A function to be called with each number of files that were looked at."""
        form = {"unit": " files", "dynamic_ncols": True, "leave": False}
        with tqdm(desc=doing, disable=not self._shown, **form) as bar:
            yield bar.update

    def found(self, size: int) -> None:
        """`size` more bytes are to be moved."""
        if self._shown and self._total.disable:
            self._total = self._bar("all files", 0)
            self._clock.start()
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
        self._over.set()
        if self._clock.ident:
            self._clock.join()
        self._total.close()


# --------------------------------------------------------------------- The run


class Job(NamedTuple):
    """One file that is to be archived."""

    file: RemoteFile
    key: str
    plan: Plan
    known_crc: int | None  # of the object: only looked at then, and sent if it is another


class Failed(NamedTuple):
    job: Job
    error: FileError


class Unchanged(NamedTuple):
    """Looked at again, and found to be what is archived."""

    file: RemoteFile
    recheck: bool


class Changed(NamedTuple):
    """Looked at again, and found to be another one: to be sent."""

    job: Job


Outcome = Stored | Unchanged | Changed | Failed


def tell_failure(name: bytes | str, reason: object) -> None:
    log.error("FAIL %s: %s", printable(name), reason)


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
    ended_early: str = ""  # why
    complete: bool = False
    snapshot_failed: bool = False
    walk: Walk | None = None

    def failure(self, path: bytes, reason: object) -> None:
        self.failed += 1
        tell_failure(path, reason)

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
        told = [f"{label:<15}: {count:,}" for label, count in lines]
        if self.ended_early:
            told.append(f"{'Ended early':<15}: {self.ended_early}")
        return ["==== SUMMARY ====", *told]


class Patience:
    """Counts the files in a row that S3 gave no answer to, or denied; or under which the
    connection to the box broke."""

    def __init__(self, transfers: int):
        self._most = {Unreachable: max(4, transfers), Broken: BROKEN_IN_A_ROW}
        self._kind: type[FileError] | None = None
        self._count = 0

    def met(self, error: FileError | None) -> None:
        """Another file has ended so; Fatal if they all do."""
        kind: type[FileError] | None = None
        if isinstance(error, Broken):
            kind = Broken
        elif isinstance(error, Unreachable) or getattr(error, "code", "") == "AccessDenied":
            kind = Unreachable
        self._count = self._count + 1 if kind is self._kind else 1
        self._kind = kind
        if kind is not None and self._count >= self._most[kind]:
            raise Fatal(f"{error}; {self._count} files in a row failed so")


class UnderWay:
    """The jobs that are on their way, on threads, and what became of them; used by
    one thread.  `errors` are those that end the run."""

    def __init__(self, most: int, memory_limit: int, patience: Patience):
        self._most, self._memory_limit, self._patience = most, memory_limit, patience
        self._finished: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(most)
        self.jobs: dict[Future[Outcome], Job] = {}
        self.errors: list[Exception] = []

    def begin(self, job: Job, send: Callable[[Job], Outcome]) -> None:
        future = self.pool.submit(send, job)
        self.jobs[future] = job
        future.add_done_callback(self._finished.put)

    def must_settle_before(self, job: Job | None) -> bool:
        """Whether something has finished, or has to before `job` can begin; None: a page
        of jobs is over."""
        return not self._finished.empty() or bool(self.jobs and job and not self._fits(job))

    def _fits(self, job: Job) -> bool:
        memory = job.plan.memory + sum(other.plan.memory for other in self.jobs.values())
        # A name may be listed twice while its folder changes.
        twice = any(job.key == other.key for other in self.jobs.values())
        room = len(self.jobs) < self._most and memory <= self._memory_limit
        return room and not twice

    def outcomes(self) -> list[Outcome]:
        """Waits for one that finishes; of all that have by then."""
        done = [self._finished.get()]
        while not self._finished.empty():
            done.append(self._finished.get())
        ended: list[Outcome] = []
        for future in done:
            del self.jobs[future]
            try:
                outcome = future.result()
                ended.append(outcome)
                self._patience.met(outcome.error if isinstance(outcome, Failed) else None)
            except Exception as error:  # what is under way is still settled
                self.errors.append(error)
        return ended


def walk_of(config: Config, box: Box, failed: Callable[[bytes, object], None]) -> Walk:
    """The walk over all that is selected."""
    rules = Rules(config.remote_path, config.exclude, config.include_hidden)
    return Walk(box, config.remote_path, rules, failed)


def key_and_plan(file: RemoteFile, config: Config, state: State) -> tuple[str, Plan]:
    """Where and how `file` goes up; FileError if it cannot."""
    key = object_key(config.prefix, below(config.remote_path, file.path))
    owner = state.owner(key)
    if owner not in (None, path_text(file.path)):
        raise FileError(f"its key {printable(key)} is that of {printable(owner or '')}")
    return key, upload_plan(file.size, config.memory_limit)


@dataclass
class Run:
    """One pass over the box, a chain of generators: walk, pending, transfer,
    settle.  Only the files themselves are read and sent on other threads."""

    config: Config
    box: Box
    archive: Archive
    state: State
    report: Report
    progress: Progress

    def __post_init__(self) -> None:
        # TRANSFERS files are on their way to S3 at once, and nearly as many small
        # ones are being read, or wait for their turn: so S3 need not wait for the
        # box's round trips.  With 1, one file comes after another.
        self._most_under_way = 2 * self.config.transfers - 1
        self._turns = threading.Semaphore(self.config.transfers)

    def archive_all(self) -> None:
        """Archives what is new or changed; Fatal, Stopped.  What S3 has
        acknowledged by then is committed in any case."""
        self.report.walk = walk_of(self.config, self.box, self.report.failure)
        pending = (self._jobs(page) for page in self.report.walk)
        with contextlib.closing(self._transfer(pending)) as transfer:
            for outcomes in transfer:
                self._settle(outcomes)

    def abort_leftovers(self) -> None:
        """Ends the multipart uploads that a killed run left.  Not being allowed
        to look is no reason not to archive; Fatal, Stopped."""
        # Else a tampered snapshot would have us abort others' uploads.
        ours = [k for k in self.state.unfinished_uploads() if k.startswith(self.config.prefix)]
        for key in ours:
            try:
                count = self.archive.abort_leftovers(key)
            except ArchiveError as error:
                if not isinstance(error, FileError) and error.code != "AccessDenied":
                    raise
                log.warning("unfinished uploads stay, that of %s: %s", printable(key), error)
                self.archive.may_have_left(ours[ours.index(key) :])
                return  # the next would take as long, and end so, too
            if count:
                log.info("aborted %d unfinished upload(s) of %s", count, printable(key))
            self.state.end_upload(key)

    def store_snapshot(self) -> None:
        """Puts a copy of the state into the bucket, if it has changed since the
        last, be it in an earlier run that was ended."""
        if self.state.snapshot_due():
            try:
                self.archive.put_snapshot(self.config.state_db)
            except ArchiveError as error:
                self.report.snapshot_failed = True
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
                key, plan = key_and_plan(file, self.config, self.state)
            except FileError as error:
                self.report.failure(file.path, error)
                continue
            jobs.append(Job(file, key, plan, self.state.crc_to_recheck(file)))
        # What is only looked at again may be Unchanged.
        self.state.doubt(path_text(job.file.path) for job in jobs if job.known_crc is None)
        self.progress.found(sum(job.file.size for job in jobs))
        return jobs

    def _transfer(self, pages: Iterable[list[Job]]) -> Generator[list[Outcome], None, None]:
        """Sends many files at once and yields what became of them, as many as
        have finished at a time.

        Nothing starts that does not fit into MEMORY_LIMIT with what is under
        way.  On an error the rest ends, and is yielded as far as it succeeded.
        """
        under_way = UnderWay(
            self._most_under_way, self.config.memory_limit, Patience(self.config.transfers)
        )
        errors = under_way.errors
        try:
            try:
                # None after each page: what has finished is committed though nothing is new.
                for job in (job for page in pages for job in (*page, None)):
                    while not errors and under_way.must_settle_before(job):
                        yield from self._outcomes(under_way)
                    if errors or self._time_is_over():
                        break
                    if job is None:
                        continue
                    if job.known_crc is None:
                        self._note(job)
                    under_way.begin(job, self._send)
            except Exception as error:  # of the walk
                errors.append(error)
            while under_way.jobs:
                if errors:
                    self.box.close()
                yield from self._outcomes(under_way)
            if errors:
                # Who waited for a turn was only stopped, by another's error.
                raise min(errors, key=lambda error: isinstance(error, Stopped))
        finally:
            if under_way.jobs:
                self.box.close()
            under_way.pool.shutdown()

    def _outcomes(self, under_way: UnderWay) -> Iterator[list[Outcome]]:
        """Those that are there; once they are settled, what has Changed is sent."""
        outcomes = under_way.outcomes()
        yield outcomes
        for outcome in outcomes:
            if not isinstance(outcome, Changed) or under_way.errors or self._time_is_over():
                continue
            self._note(outcome.job)
            under_way.begin(outcome.job._replace(known_crc=None), self._send)

    def _note(self, job: Job) -> None:
        """Notes what is to be sent: whatever becomes of it, the next run knows.  The page
        is noted already, but not what was recorded since, of a file that is listed twice."""
        self.state.doubt([path_text(job.file.path)])
        if job.plan.parts_at_once:
            self.state.begin_upload(job.key)

    def _time_is_over(self) -> bool:
        """Whether nothing new may be started; tells so."""
        limit = self.config.max_runtime
        if limit is None or time.monotonic() - self.report.started < limit:
            return False
        if not self.report.ended_early:
            log.warning("MAX_RUNTIME is over: the rest is left to the next run")
            self.report.ended_early = "MAX_RUNTIME was over"
        return True

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Waits for one of the TRANSFERS turns; Stopped if the run is over by then."""
        with self._turns:
            self.box.stopping.check()
            try:
                yield
            except Fatal:
                self.box.close()
                raise

    def _send(self, job: Job) -> Outcome:
        """On a thread of its own: reads one file and stores it."""
        try:
            with self.progress.sending(job.file) as sent:
                if job.plan.parts_at_once:
                    with self._turn():
                        return self._send_large(job, sent)
                file, data, fresh = self.box.read_small(job.file)
                with self._turn():
                    return self._send_small(job, file, data, fresh, sent)
        except FileError as error:
            return Failed(job, error.bare())
        except (ArchiveError, Stopped):
            raise
        except Exception as error:  # whatever a library did not expect of a server
            log.debug("traceback of %s", printable(job.file.path), exc_info=True)
            return Failed(job, FileError(f"unexpected {type(error).__name__}: {error}"))

    def _send_small(
        self, job: Job, file: RemoteFile, data: bytes, fresh: bool, sent: Sent
    ) -> Outcome:
        crc32 = zlib.crc32(data)
        if job.known_crc is not None:
            same = job.known_crc == crc32 and file == job.file
            return Unchanged(file, fresh) if same else Changed(job)
        self.archive.put(job.key, data, crc32, file.mtime)
        sent(len(data))
        return Stored(file, job.key, crc32, 0, fresh, self.archive.is_clean(job.key))

    def _send_large(self, job: Job, sent: Sent) -> Outcome:
        with contextlib.closing(Reader(self.box, job.file.path)) as reader:
            file = reader.file
            if job.known_crc is not None:
                while reader.read(MIB):
                    pass
                same = job.known_crc == reader.crc32 and file == job.file
                return Unchanged(file, reader.fresh) if same else Changed(job)
            plan = upload_plan(file.size, self.config.memory_limit)
            if plan.memory > job.plan.memory:
                reader.must_fit(job.file)
            if not plan.parts_at_once:
                data = reader.read()
                return self._send_small(job, file, data, reader.fresh, sent)
            self.archive.upload(job.key, reader, plan, sent)
            parts = -(-file.size // plan.part_size)
            clean = self.archive.is_clean(job.key)
            return Stored(file, job.key, reader.crc32, parts, reader.fresh, clean)

    def _settle(self, outcomes: list[Outcome]) -> None:
        """Commits and counts what has finished."""
        stored = [outcome for outcome in outcomes if isinstance(outcome, Stored)]
        self.state.record(stored, self.config.storage_class)
        for outcome in outcomes:
            if isinstance(outcome, Stored):
                path, size, _ = outcome.file
                self.report.uploaded += 1
                self.report.bytes_uploaded += size
                files_log.info("archived %s (%s bytes)", printable(path), f"{size:,}")
            elif isinstance(outcome, Unchanged):
                self.report.skipped += 1
                if not outcome.recheck:
                    self.state.settle(outcome.file)
            elif isinstance(outcome, Failed):
                self._settle_failure(*outcome)

    def _settle_failure(self, job: Job, error: FileError) -> None:
        if isinstance(error, Vanished):
            self.report.vanished += 1
            log.info("vanished %s", printable(job.file.path))
        else:
            self.report.failure(job.file.path, error)
        if job.plan.parts_at_once and self.archive.is_clean(job.key):
            self.state.end_upload(job.key)


def open_state(config: Config, archive: Archive, new_state: bool) -> State:
    """The state, if need be from its snapshot in the bucket.

    A missing or empty one beside a bucket with objects is never a fresh start:
    everything would be paid for again.  Fatal then, unless `new_state`.
    """
    path = config.state_db
    if new_state and path.exists():
        aside = path.with_name(f"{path.name}.{int(time.time())}")
        path.rename(aside)
        for old, new in zip(sidecars(path), sidecars(aside)):
            if old.exists():
                old.rename(new)
        log.warning("the old state is kept as %s", aside)
    elif not new_state and state_is_empty(path):
        way_out = (
            "put the state database back, or correct STATE_DB, S3_BUCKET or S3_PREFIX; only "
            "if everything may be uploaded and paid for again: archive.py run --new-state"
        )
        if not take_snapshot(config, archive, way_out) and archive.has_objects():
            raise Fatal(
                f"no state in {path} and no snapshot in the bucket, but s3://{config.bucket}/"
                f"{config.prefix} has objects: {way_out}"
            )
    state = State(path, partial(key_of_row, config))
    if not state.is_pinned():
        if may_not_be_pinned(state, archive, config):
            return state
        if any(row.crc32 is not None for row in state.recorded("")):
            doubt_replaced(state, archive, config, math.inf)  # archived elsewhere, perhaps
    state.pin(pins_of(config))
    return state


def key_of_row(config: Config, path: str) -> str | None:
    """The key of a row that has none, made by an earlier script: nothing is escaped."""
    start = path_text(join(config.remote_path, b""))
    inner = path.removeprefix(start)
    with contextlib.suppress(FileError):
        object_key(config.prefix, unescape(inner))  # as far as a file can have it at all
        return config.prefix + inner if path.startswith(start) else None
    return None


def may_not_be_pinned(state: State, archive: Archive, config: Config) -> bool:
    """Whether an earlier script's state may not be tied to these settings yet; warns if
    it does not seem to be that of this bucket: what it says is archived would never be
    archived here."""
    if not state.count():
        return False
    theirs = (row for row in state.recorded(config.prefix) if row.crc32 is None)
    for row in itertools.islice(theirs, 10):
        try:
            if archive.has(str(row.key)):
                return False
        except (Fatal, FileError):  # the next run asks again
            return True
    log.warning(
        "%s was made by an earlier script, and what it has recorded is not in s3://%s/%s: if "
        "S3_BUCKET, S3_PREFIX or REMOTE_PATH is wrong, nothing of it will be archived",
        *(config.state_db, config.bucket, config.prefix),
    )
    return True


def destination(config: Config) -> dict[str, str]:
    """What a state is tied to at S3, by setting."""
    return {"S3_BUCKET": config.bucket, "S3_PREFIX": config.prefix}


def pins_of(config: Config) -> dict[str, str]:
    """All that a state is tied to: on the box as well."""
    root = path_text(config.remote_path)
    return destination(config) | {"HETZNER_USER": config.user, "REMOTE_PATH": root}


def sidecars(database: Path) -> list[Path]:
    """What SQLite takes in when it opens `database` after a kill; -wal beside that of
    an earlier script."""
    names = (f"{database.name}{suffix}" for suffix in ("-journal", "-wal", "-shm"))
    return [database.with_name(name) for name in names]


def fetch_snapshot(archive: Archive, target: Path) -> int | None:
    """Writes the bucket's snapshot to `target`; when it was stored, None if there is
    none; Unusable."""
    try:
        stored_at = archive.get_snapshot(target)
        if stored_at is None:
            return None
        with contextlib.suppress(Fatal):  # what SQLite says of it does not matter
            if not state_is_empty(target):
                return stored_at
        raise Unusable("its snapshot in the bucket is damaged")
    except Unusable:
        target.unlink(missing_ok=True)  # nobody is to take it for a state
        raise


def take_snapshot(config: Config, archive: Archive, way_out: str) -> bool:
    """Puts the snapshot in the bucket, if there is one, in the state's place; Fatal,
    with the `way_out` if it is of no use, and if it is another box's."""
    path = config.state_db
    copy = path.with_name(path.name + ".partial")
    for left in sidecars(copy):
        left.unlink(missing_ok=True)
    try:
        stored_at = fetch_snapshot(archive, copy)
        if stored_at is None:
            return False
        told = time_text(stored_at)
        log.warning("no state in %s: taking the bucket's snapshot of %s", path, told)
        with contextlib.closing(State(copy, partial(key_of_row, config))) as state:
            if state.is_pinned():
                state.pin(pins_of(config))
            doubt_replaced(state, archive, config, stored_at)
        for left in sidecars(path):  # by a killed run: it would go into the snapshot
            left.unlink(missing_ok=True)
        os.replace(copy, path)
    except Unusable as error:
        raise Fatal(f"no state in {path}, and {error}: {way_out}") from None
    finally:
        copy.unlink(missing_ok=True)
    return True


def matched(
    objects: Iterable[S3Object], rows: Iterable[Recorded]
) -> Iterator[tuple[str, S3Object | None, Recorded | None]]:
    """Each key with its object and its row, None where there is none; both come
    in the order of their keys."""
    left, right = iter(objects), iter(rows)
    found, row = next(left, None), next(right, None)
    while found or row:
        key = min(str(one.key) for one in (found, row) if one)
        held = found if found and found.key == key else None
        known = row if row and row.key == key else None
        yield key, held, known
        found = next(left, None) if held else found
        row = next(right, None) if known else row


def doubt_replaced(state: State, archive: Archive, config: Config, stored_at: float) -> None:
    """Notes the rows, known at that time, whose objects are newer: a run that was lost
    with its state has replaced them.  And those of our own without an object, which may
    have been forgotten since.  FileError, Fatal."""

    def outdated(found: S3Object | None, row: Recorded) -> bool:
        if found is None:
            return row.crc32 is not None
        return found.size != row.size or found.stored_at > stored_at

    pairs = matched(archive.objects(config.prefix), state.recorded(""))
    state.doubt(row.path for _, found, row in pairs if row and outdated(found, row))


def run(work: Run) -> int:
    """Archives the box: 0, or 3 if something is incomplete; ArchiveError."""
    report = work.report
    work.state.begin_run(report.started_at)
    status = 1
    try:
        work.box.connection()
        work.abort_leftovers()
        work.archive_all()
        work.store_snapshot()
        status = 3 if report.failed or report.ended_early or report.snapshot_failed else 0
        report.complete = True
    except Stopped:
        status = 128 + (work.box.stopping.number or 0)
        raise
    finally:
        counts = (report.uploaded, report.skipped, report.failed, report.bytes_uploaded)
        work.state.end_run(report.started_at, status, *counts)
    return status


# -------------------------------------------------------------- Other commands


@dataclass
class Count:
    """Files and their bytes."""

    files: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        self.files += 1
        self.bytes += size

    def __add__(self, other: Count) -> Count:
        return Count(self.files + other.files, self.bytes + other.bytes)

    def __str__(self) -> str:
        return f"{self.files:,} ({size_text(self.bytes)})"


@dataclass
class Tools:
    """What every command works with."""

    config: Config
    box: Box
    archive: Archive
    show: Callable[[str], None]  # on stdout
    tell: Callable[[list[str]], None]  # lines of the result, in LOG_FILE as well
    progress: Progress

    def table(self, title: str, rows: Iterable[tuple[str, object]]) -> None:
        """Prints rows of a label and a value, numbers with separators."""
        rows = [(label, f"{v:,}" if isinstance(v, int) else str(v)) for label, v in rows]
        width = max(len(label) for label, _ in rows)
        lines = (f"{label:<{width}} : {value}" for label, value in rows)
        self.tell([f"==== {title} ====", *lines])

    def state(self, pins: Mapping[str, str]) -> State:
        """A copy of the state to look at, from the bucket's snapshot if there is
        none here, empty if there is none there either; Fatal."""
        path, key_of = self.config.state_db, partial(key_of_row, self.config)
        if not state_is_empty(path):
            state = State(path, key_of, private=True)
        else:
            with tempfile.TemporaryDirectory(prefix="archive-") as folder:
                snapshot = Path(folder) / "snapshot"
                as_of, told = self._snapshot(snapshot)
                log.warning("no state in %s, %s", path, told)
                state = State(snapshot, key_of, private=True)
                state.as_of = as_of
            # A snapshot names the bucket that it was made for.  `restore` and `verify`,
            # which pin no more than that, may read it in a copy of the bucket, too.
            if pins == destination(self.config):
                pins = {}
        state.pin(pins)
        return state

    def _snapshot(self, target: Path) -> tuple[float, str]:
        """Takes the bucket's snapshot, if it is of any use: when it was stored, and
        what to tell of it."""
        try:
            stored_at = fetch_snapshot(self.archive, target)
        except Unusable as error:
            return math.inf, f"and {error}"
        if stored_at is not None:
            return stored_at, f"taking the snapshot of {time_text(stored_at)}"
        if self.archive.has_objects():
            beside = "nor a snapshot of it beside the bucket's objects"
            return math.inf, f"{beside}: run would not start so"
        return math.inf, "nor a snapshot of it in the bucket"


def nothing_there(config: Config) -> Fatal:
    """A mistyped prefix is not to look like an archive in order."""
    return Fatal(
        f"nothing is archived in s3://{config.bucket}/{config.prefix}: correct S3_BUCKET or "
        "S3_PREFIX, unless nothing was archived yet"
    )


def in_parallel(
    function: Callable[[T], Answer], items: Iterable[T], threads: int, stopping: Stopping
) -> Iterator[Answer]:
    """function(item) of each, in order, on threads, a bounded number ahead; what it
    raises ends the others, too."""
    ahead: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise


def json_number(usd: float) -> float | None:
    """An amount as JSON has it: null where it is unknown."""
    return None if math.isnan(usd) else round(usd, 6)


def by_class(state: State, default: str) -> dict[str, Count]:
    """What is archived, by storage class; `default` where none was recorded."""
    held: dict[str, Count] = {}
    for kind, files, size in state.totals():
        held[kind or default] = held.get(kind or default, Count()) + Count(files, size)
    return held


# plan


@dataclass
class Forecast:
    """What a run would do, and what that costs in USD."""

    config: Config
    money: Money
    afterwards: dict[str, Count]  # what is archived, by class
    new: Count = dataclasses.field(default_factory=Count)
    changed: Count = dataclasses.field(default_factory=Count)
    unchanged: Count = dataclasses.field(default_factory=Count)
    unreadable: int = 0
    requests: Requests = Requests()
    early: float = 0.0

    def failure(self, path: bytes, reason: object) -> None:
        self.unreadable += 1
        tell_failure(path, reason)

    def add(self, page: list[RemoteFile], state: State) -> None:
        """Foresees what becomes of a page of files."""
        pending = state.not_archived(page)
        for file in set(page) - set(pending):
            self.unchanged.add(file.size)
        for file in pending:
            if state.crc_to_recheck(file) is not None:
                self.unchanged.add(file.size)
                continue
            row = state.earlier(file)
            try:
                requests = requests_of(file.size, key_and_plan(file, self.config, state)[1])
            except FileError as error:
                self.failure(file.path, error)
                continue
            (self.changed if row else self.new).add(file.size)
            self.requests = Requests(*map(sum, zip(self.requests, requests)))
            if row:
                kind = row.storage_class or self.config.storage_class
                age = (time.time() - (row.uploaded_at or 0)) / 86400
                self.early += self.money.early(kind, row.size, age)
                self.afterwards[kind].files -= 1
                self.afterwards[kind].bytes -= row.size
            self.afterwards.setdefault(self.config.storage_class, Count()).add(file.size)

    def usd(self) -> dict[str, float]:
        """What comes of it, in USD."""
        money, after = self.money, self.afterwards.items()
        archived = sum(self.afterwards.values(), Count())
        return {
            "upload": money.upload(self.config.storage_class, self.requests),
            "overwritten_early": self.early,
            "storage_a_month": sum(money.month(k, c.files, c.bytes) for k, c in after),
            "of_it_per_object": sum(money.index(k, c.files) for k, c in after),
            "full_restore_bulk": restore_cost(money, after, "bulk"),
            "full_restore_standard": restore_cost(money, after, "standard"),
            "full_download": money.download(archived.files, archived.bytes),
        }


def plan(tools: Tools, as_json: bool) -> int:
    """Walks the box and tells what `run` would do; changes nothing.  0, or 3 if
    something could not be listed."""
    config, money = tools.config, Money(tools.archive.region, tools.config.prices)
    with contextlib.closing(tools.state(pins_of(config))) as state:
        if state.as_of < math.inf:
            doubt_replaced(state, tools.archive, config, state.as_of)
        forecast = Forecast(config, money, by_class(state, config.storage_class))
        walk = walk_of(config, tools.box, forecast.failure)
        with tools.progress.counting("looking") as looked:
            for page in walk:
                forecast.add(page, state)
                looked(len(page))
    usd = forecast.usd()
    if as_json:
        told = {
            "new": forecast.new,
            "changed": forecast.changed,
            "unchanged": forecast.unchanged,
            "unreadable": forecast.unreadable,
            "hidden": walk.hidden,
            "excluded": walk.excluded,
            "links": walk.links,
            "special": walk.special,
            "requests": forecast.requests._asdict(),
            "afterwards": sum(forecast.afterwards.values(), Count()),
            "usd": {name: json_number(amount) for name, amount in usd.items()},
            "prices": money.about(),
        }
        tools.show(json.dumps(told, indent=2, default=vars))
    else:
        show_plan(tools, forecast, walk, usd)
    return 3 if forecast.unreadable else 0


def restore_cost(
    money: Money, held: Iterable[tuple[str, Count]], tier: str, days: int = 7
) -> float:
    """USD for copies of all of it that can be read for `days`."""
    return sum(money.restore(kind, tier, c.files, c.bytes, days) for kind, c in held)


def show_plan(tools: Tools, forecast: Forecast, walk: Walk, usd: dict[str, float]) -> None:
    others = (("Links", walk.links), ("Special", walk.special))
    requests = (f"{n:,} {kind}" for kind, n in forecast.requests._asdict().items() if n)
    archived = sum(forecast.afterwards.values(), Count())
    told = {name: usd_text(amount) for name, amount in usd.items()}
    bulk, standard = told["full_restore_bulk"], told["full_restore_standard"]
    tools.table(
        "PLAN",
        [
            ("New files", forecast.new),
            ("Changed files", forecast.changed),
            ("Unchanged files", forecast.unchanged),
            ("Unreadable", forecast.unreadable),
            ("Hidden", walk.hidden),
            ("Excluded", walk.excluded),
            *((label, count) for label, count in others if count),
            ("To upload", forecast.new + forecast.changed),
            ("Requests", ", ".join(requests) or "none"),
            ("Upload", told["upload"]),
            ("Overwritten early", told["overwritten_early"]),
            ("Archive afterwards", archived),
            ("Storage a month", told["storage_a_month"]),
            ("Restore all, Bulk", f"{bulk}, within 48 hours, for 7 days"),
            ("Restore, Standard", f"{standard}, within 12 hours, for 7 days"),
            ("and download it", f"{told['full_download']} out of AWS"),
        ],
    )
    tools.tell([f"({forecast.money.note})"])
    index = usd["of_it_per_object"]
    data = usd["storage_a_month"] - index
    if index > data:
        times = f"{index / data:,.1f} times as much as" if data else "more than"
        log.warning(
            "files have %s on average: the 40 KB that S3 adds to each object cost %s the data",
            *(size_text(archived.bytes / archived.files), times),
        )


# status

NOT_KNOWN = "not known"


def status(tools: Tools, as_json: bool) -> int:
    """Tells what is archived and how both ends are, as far as they can be asked."""
    config, money = tools.config, Money(tools.archive.region, tools.config.prices)
    held: dict[str, Count] = {}
    runs: list[PastRun] = []
    state, state_told = asked(partial(tools.state, pins_of(config)))
    if state is not None:
        with contextlib.closing(state):
            held, runs = by_class(state, config.storage_class), state.last_runs(5)
    month = sum(money.month(kind, count.files, count.bytes) for kind, count in held.items())
    room, room_told = asked(tools.box.room, "the server does not tell")
    leftovers, leftovers_told = asked(tools.archive.unfinished)
    rule, rule_told = versions, versions_told = None, leftovers_told
    if leftovers_told != NOT_KNOWN:  # each question may take as long as S3 has time
        rule, rule_told = asked(tools.archive.aborts_leftovers)
        versions, versions_told = asked(tools.archive.versioned)
    if as_json:
        told = {
            "archived": held if state else None,
            "usd_a_month": json_number(month) if state else None,
            "prices": money.about(),
            "runs": [run._asdict() for run in runs],
            "box": {"used": room[0], "free": room[1]} if room else None,
            "unfinished_uploads": leftovers,
            "lifecycle_rule": rule,
            "versioning": versions,
        }
        tools.show(json.dumps(told, indent=2, default=vars))
        return 0
    no_rule = "none that aborts unfinished uploads: see the README"
    box = f"{size_text(room[0])} used, {size_text(room[1])} free" if room else room_told
    tools.table(
        "STATUS",
        [
            ("Archived", state_told or sum(held.values(), Count())),
            *held.items(),
            ("Storage a month", state_told or usd_text(month)),
            ("Box", box),
            ("Unfinished uploads", leftovers_told or leftovers),
            ("Lifecycle rule", rule_told or ("aborts unfinished uploads" if rule else no_rule)),
            ("Versioning", versions_told or ("on" if versions else "off")),
        ],
    )
    tools.tell([f"({money.note})", *(["", *past_runs(runs)] if state else ())])
    return 0


def asked(question: Callable[[], T], unknown: str = "") -> tuple[T | None, str]:
    """The answer and what to tell instead of it, if there is none."""
    try:
        answer = question()
    except ArchiveError as error:
        if error.code == "AccessDenied":
            return None, "the credentials may not ask"
        log.warning("%s", error)
        return None, NOT_KNOWN
    return answer, unknown if answer is None else ""


def past_runs(runs: list[PastRun]) -> list[str]:
    """The last runs as a table."""
    if not runs:
        return ["no run yet"]
    lines = [
        f"{'Run':<25}  {'status':<8}{'uploaded':>10}{'failed':>8}{'bytes':>12}{'took':>10}"
    ]
    for run in runs:
        took = "" if run.ended_at is None else f"{run.ended_at - run.started_at:,} s"
        ended = "no end" if run.status is None else str(run.status)
        lines.append(
            f"{time_text(run.started_at):<25}  {ended:<8}{run.uploaded or 0:>10,}"
            f"{run.failed or 0:>8,}{size_text(run.bytes or 0):>12}{took:>10}"
        )
    return lines


# verify


class Finding(NamedTuple):
    """What became of one key: a label of the summary, what is wrong, and the row's
    path as text if the row is not to be believed any more."""

    label: str
    key: str
    fault: str = ""
    wrong: str | None = None


def verify(tools: Tools, checksums: bool, repair: bool) -> int:
    """Holds the state against the bucket's listing; 0, or 3 if they differ."""
    config = tools.config
    labels = ["Agree", "Missing", "Wrong size", "Wrong class"]
    labels += ["Wrong checksum"] if checksums else []
    counts = dict.fromkeys((*labels, "In doubt", "No checksum", "Not recorded", "Failed"), 0)
    forgotten = 0

    def judge(pair: tuple[str, S3Object | None, Recorded | None]) -> Finding:
        key, _, row = pair
        finding = compare(state.as_of, *pair)
        if finding.fault or row is None:
            return finding
        try:
            stored = tools.archive.head(key).crc32
        except FileError as error:
            return Finding("Failed", key, str(error))
        if stored is None or row.crc32 is None:
            return finding if finding.label == "In doubt" else Finding("No checksum", key)
        if stored == row.crc32:
            return Finding("Agree", key)
        fault = f"S3 holds CRC-32 {crc_text(stored)}, recorded is {crc_text(row.crc32)}"
        return Finding("Wrong checksum", key, fault, row.path)

    with contextlib.ExitStack() as stack:
        if repair:
            stack.enter_context(locked(config.state_db))
            if state_is_empty(config.state_db):
                raise Fatal(f"no state in {config.state_db} to repair: archive.py run")
            real = State(config.state_db, partial(key_of_row, config))
            stack.callback(real.close)
            if not real.is_pinned():  # a mistyped setting would make all of it forgotten
                raise Fatal(f"{config.state_db} is an earlier script's: archive.py run first")
            real.pin(pins_of(config))
        state = stack.enter_context(contextlib.closing(tools.state(destination(config))))
        looked = stack.enter_context(tools.progress.counting("verifying"))
        pairs = matched(tools.archive.objects(config.prefix), state.recorded(config.prefix))
        compared = partial(compare, state.as_of)
        findings: Iterator[Finding] = itertools.starmap(compared, pairs)
        if checksums:
            findings = in_parallel(judge, pairs, config.transfers, tools.box.stopping)
        for finding in findings:
            looked(1)
            counts[finding.label] += 1
            if finding.fault:
                tell_failure(finding.key, finding.fault)
            if repair and finding.wrong is not None and surely(tools.archive, finding):
                real.forget(finding.wrong)
                forgotten += 1
        counts["No key"] = without_key(state, config)
    if not any(counts.values()):
        raise nothing_there(config)
    good = ("Agree", "In doubt", "No checksum")  # the next run sees to what is in doubt
    bad = sum(count for label, count in counts.items() if label not in good)
    shown = [(label, count) for label, count in counts.items() if count or label in labels]
    tools.table("VERIFY", shown)
    if forgotten:
        told = "%s are forgotten: the next run archives what of them is still on the box"
        log.warning(told, f"{forgotten:,}")
    return 3 if bad else 0


def without_key(state: State, config: Config) -> int:
    """The number of records that cannot have been made with these settings; warns."""
    count = state.not_below(config.prefix)
    if count:
        told = "%s rows cannot have been made with these settings, and are not looked at"
        log.warning(f"{told}: correct S3_PREFIX or REMOTE_PATH", f"{count:,}")
    return count


def surely(archive: Archive, finding: Finding) -> bool:
    """Whether a finding may cost a row: what is missing from the listing is asked
    for by name, too; Fatal."""
    with contextlib.suppress(FileError):
        return finding.label != "Missing" or not archive.has(finding.key)
    return False


def compare(as_of: float, key: str, found: S3Object | None, row: Recorded | None) -> Finding:
    """What the listing has of `key` against what is recorded, known at that time."""
    if row is None:
        return Finding("Not recorded", key, "in the bucket, but not recorded")
    if found is None:
        return Finding("Missing", key, "recorded, but not in the bucket", row.path)
    if found.size != row.size:
        return Finding("Wrong size", key, other_size(found.size, row.size), row.path)
    if row.storage_class not in (None, found.storage_class):
        fault = f"S3 holds it in {found.storage_class}, recorded is {row.storage_class}"
        return Finding("Wrong class", key, fault, row.path)
    doubtful = row.doubtful or found.stored_at > as_of
    return Finding("In doubt" if doubtful else "Agree", key)


# restore


class Wanted(NamedTuple):
    """An object that is to be restored, with its row, if it has one."""

    key: str
    name: bytes  # below the folder that is restored to
    size: int
    row: Recorded | None
    maybe_newer: bool  # than the object that the row is of
    storage_class: str
    restored: bool | None  # as in S3Object
    fault: str = ""  # why it cannot be

    def time_and_sum(self, held: Held) -> tuple[int, int | None]:
        """Its mtime and CRC-32, None if nobody knows that: the row's if it may be the
        row's object, S3's if it is another and may be.  FileError if it is another and
        may not.

        A run gives a new object another time.  Where the row says that an answer was
        lost, or an earlier script's object may have any time, size and sum tell as well.
        """
        row = self.row
        if row is not None:
            other_time = held.mtime not in (None, row.mtime)
            other_sum = None not in (row.crc32, held.crc32) and row.crc32 != held.crc32
            time_says_little = row.doubtful or row.crc32 is None
            other = other_time or (time_says_little and (other_sum or row.size != self.size))
            if not (other and self.maybe_newer):
                if row.size != self.size:
                    raise FileError(other_size(self.size, row.size))
                return row.mtime, row.crc32
        return held.stored_at if held.mtime is None else held.mtime, held.crc32


# What is the case with one, in the words of the summary.
THERE, RESTORED, FAILED = "Already there", "Restored files", "Failed files"
ASKED, BUSY, COLD = "Asked of S3", "Under way at S3", "Not asked for"
READY = "Ready"


@dataclass
class Restore:
    """One pass of bringing files back: what can be read is fetched, what is cold
    is asked for."""

    tools: Tools
    state: State
    target: LocalFolder | BoxFolder
    paths: list[bytes]  # below REMOTE_PATH; empty for all
    tier: str
    days: int
    replace: bool
    manifest: TextIO | None = None  # a line of CSV for each that is cold
    may_ask: threading.Semaphore | None = None  # how many more S3 may be asked for
    bytes: int = 0

    def __post_init__(self) -> None:
        self._pace = Pace(RESTORES_A_SECOND, self.tools.box.stopping)
        self._threads = self.tools.config.transfers
        self.counts = dict.fromkeys((THERE, RESTORED, ASKED, BUSY, COLD, FAILED), 0)
        self._under_way: dict[bytes, Wanted] = {}  # by name, while it is being written

    def look(self) -> tuple[int, int, dict[str, Count]]:
        """Bytes that can be fetched, and that S3 is at work on; what is cold, by class."""
        cold: dict[str, Count] = {}
        sizes = {READY: 0, BUSY: 0}
        with self.tools.progress.counting("looking") as looked:
            for wanted, case, _ in self._each(self._case):
                looked(1)
                if case == COLD:
                    cold.setdefault(wanted.storage_class, Count()).add(wanted.size)
                if case in sizes:
                    sizes[case] += wanted.size
        return sizes[READY], sizes[BUSY], cold

    def bring_back(self) -> None:
        """Counts what was done, and tells failures."""
        patience = Patience(self._threads)
        for wanted, case, fault in self._each(self._bring_back):
            self.counts[case] += 1
            patience.met(fault)
            if case == FAILED:
                tell_failure(wanted.name, fault)
            elif case == RESTORED:
                self.bytes += wanted.size
                size = f"{wanted.size:,}"
                files_log.info("restored %s (%s bytes)", printable(wanted.name), size)
            elif case == COLD and self.manifest is not None:
                self.manifest.write(f"{self.tools.config.bucket},{quote(wanted.key)}\n")

    def summarize(self) -> None:
        rows = [*self.counts.items(), ("Restored bytes", self.bytes)]
        self.tools.table("RESTORE", rows)

    def _each(
        self, judge: Callable[[Wanted], str]
    ) -> Iterator[tuple[Wanted, str, FileError | None]]:
        """Each that is wanted, what `judge` says of it, and the FileError."""

        def judged(wanted: Wanted) -> tuple[Wanted, str, FileError | None]:
            self.tools.box.stopping.check()
            try:
                return wanted, judge(wanted), None
            except FileError as error:
                return wanted, FAILED, error.bare()
            except (ArchiveError, Stopped):
                raise
            except Exception as error:  # whatever a library did not expect of a server
                log.debug("traceback of %s", printable(wanted.key), exc_info=True)
                reason = f"unexpected {type(error).__name__}: {error}"
                return wanted, FAILED, FileError(reason)

        return in_parallel(judged, self._wanted(), self._threads, self.tools.box.stopping)

    def _wanted(self) -> Iterator[Wanted]:
        config = self.tools.config
        for path in self.paths or [b""]:
            met = False
            # As this program spells a key, and as other ones do.
            spellings = (escape(path, KEY_ESCAPES), path.decode("utf-8", "replace"))
            for start in dict.fromkeys(config.prefix + spelling for spelling in spellings):
                pairs = matched(self.tools.archive.objects(start), self.state.recorded(start))
                for wanted in map(self._describe, pairs):
                    if not path or wanted.key[len(start) :][:1] in ("", "/"):
                        met = True
                        yield wanted
            if path and not met:
                nothing = "nothing is archived under this path: the exact one, no pattern"
                yield Wanted("", path, 0, None, False, "", None, nothing)
            elif not met:
                raise nothing_there(config)

    def _describe(self, pair: tuple[str, S3Object | None, Recorded | None]) -> Wanted:
        key, found, row = pair
        inner = key[len(self.tools.config.prefix) :]
        name = unescape(inner)
        size, kind, restored = found[1:4] if found else (0, "", None)
        maybe_newer = False
        if row and found:  # a run that was lost with its state may have replaced it
            known_at = min((row.uploaded_at or math.inf) + CLOCK_LIMIT, self.state.as_of)
            maybe_newer = row.doubtful or found.stored_at > known_at
        fault = ""
        windows = os.name == "nt" and (b"\\" in name or b":" in name)
        if {b"", b".", b".."} & set(name.split(b"/")) or b"\0" in name or windows:
            fault = "no file can have this name"
        elif inner not in (escape(name, KEY_ESCAPES), name.decode("utf-8", "replace")):
            fault = "another program's: its name is that of another key"
        elif found is None:
            fault = "recorded, but not in the bucket"
        elif row and row.size != size and not maybe_newer:
            fault = other_size(size, row.size)
        return Wanted(key, name, size, row, maybe_newer, kind, restored, fault)

    def _case(self, wanted: Wanted) -> str:
        """What is the case; FileError."""
        if wanted.fault:
            raise FileError(wanted.fault)
        ours = self.tools.config.prefix + escape(wanted.name, KEY_ESCAPES)
        if wanted.key != ours and self.tools.archive.has(ours):
            raise FileError(f"an earlier one of this name: {printable(ours)} has replaced it")
        there = self.target.find(wanted.name)
        if there is not None:
            row = wanted.row
            mtime = row.mtime if row else None
            if there[0] == wanted.size and (row is None or wanted.maybe_newer):
                mtime, _ = wanted.time_and_sum(self.tools.archive.head(wanted.key))
            if there == (wanted.size, mtime):
                return THERE
            if there == NO_FILE:
                raise FileError("something that is no file is in its place")
            if not self.replace:
                raise FileError(
                    f"another file is there, of {there[0]:,} bytes and mtime {there[1]}, not "
                    f"{wanted.size:,} and {mtime}: --overwrite replaces it"
                )
        if wanted.storage_class not in COLD_CLASSES or wanted.restored:
            return READY
        return COLD if wanted.restored is None else BUSY

    def _bring_back(self, wanted: Wanted) -> str:
        """Does what can be done now, and says what was; FileError."""
        case = self._case(wanted)
        # More may have become cold since it was agreed to.
        if case == COLD and self.may_ask and self.may_ask.acquire(blocking=False):
            self._pace.wait(1)
            ready = self.tools.archive.ask_for(wanted.key, self.tier, self.days)
            case = READY if ready else ASKED
        if case != READY:
            return case
        try:
            self._fetch(wanted)
        except Cold:  # its copy has gone since it was listed: the next pass asks anew
            if wanted.storage_class in COLD_CLASSES:
                return COLD
            kind = wanted.storage_class
            raise FileError(f"is in an archive tier of {kind}: restore it there") from None
        return RESTORED

    def _fetch(self, wanted: Wanted) -> None:
        """The object's bytes to their place; FileError."""
        name = wanted.name
        if self._under_way.setdefault(name, wanted) is not wanted:
            raise FileError("another object gives the same name")
        try:
            download = self.tools.archive.download(wanted.key)
            mtime, crc32 = wanted.time_and_sum(download.held)
            if wanted.row and (mtime, crc32) != (wanted.row.mtime, wanted.row.crc32):
                told = "%s was stored anew after it was recorded: S3's word holds"
                log.warning(told, printable(wanted.name))
            with self.tools.progress.sending(RemoteFile(name, wanted.size, mtime)) as sent:

                def blocks() -> Iterator[bytes]:
                    for block in download.blocks(wanted.size, crc32):
                        yield block
                        sent(len(block))

                self.target.store(name, mtime, blocks, self.replace)
        finally:
            del self._under_way[name]


def restore(tools: Tools, options: argparse.Namespace, agreed: Callable[[str], bool]) -> int:
    """Brings files back; 75 while something is cold, 3 if something failed, else 0.

    `agreed` is asked before anything is requested that costs money.
    """
    config = tools.config
    if options.to is not None:
        target: LocalFolder | BoxFolder = LocalFolder(Path(options.to))
    else:
        target = BoxFolder(tools.box, parse_root(options.to_box))
    lock = config.state_db.with_name(config.state_db.name + ".restore")
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(lock))
        state = stack.enter_context(contextlib.closing(tools.state(destination(config))))
        without_key(state, config)
        paths = restore_paths(options.path, config.remote_path)
        work = Restore(
            tools, state, target, paths, options.tier, options.days, options.overwrite
        )
        ready, busy, cold = work.look()
        if cold:
            estimate(tools, cold, ready + busy, options)
        warn_of_room(target, ready + busy + sum(count.bytes for count in cold.values()))
        if cold and options.manifest:
            work.manifest = stack.enter_context(manifest(options.manifest))
        elif cold:
            if not options.yes and not agreed("Ask S3 for it?"):
                raise ConfigError("nothing was asked for: it costs money; --yes agrees to it")
            target.try_out()
            work.may_ask = threading.Semaphore(sum(count.files for count in cold.values()))
        tools.progress.found(ready)
        try:
            work.bring_back()
        except (ArchiveError, Stopped):
            work.summarize()
            raise
    work.summarize()
    counts = work.counts
    waiting = counts[ASKED] + counts[BUSY] + counts[COLD]
    if work.manifest and counts[COLD]:
        log.warning(
            "%s lists %s objects: upload it, and start an S3 Batch Operations job with it, "
            "operation Restore, %d days, %s; then run restore again without --manifest",
            *(options.manifest, f"{counts[COLD]:,}", options.days, options.tier.capitalize()),
        )
    elif waiting:
        log.warning(
            "%s files cannot be read yet: run the same command again, it may take %d hours",
            *(f"{waiting:,}", TIERS[options.tier]),
        )
    return 75 if waiting else 3 if counts[FAILED] else 0


@contextlib.contextmanager
def manifest(path: Path) -> Iterator[TextIO]:
    """A new file; ConfigError."""
    try:
        with path.open("w", newline="", encoding="ascii") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"--manifest: {error}") from None


def warn_of_room(target: LocalFolder | BoxFolder, needed: int) -> None:
    """Warns where that many bytes do not fit: before they are paid for."""
    room = target.room()
    if room is not None and needed > room:
        log.warning(
            "%s are to be restored, but only %s are free there: make room, or restore less at "
            "a time (copies that S3 makes cost money while they wait)",
            *(size_text(needed), size_text(room)),
        )


def restore_paths(given: Iterable[str], root: bytes) -> list[bytes]:
    """The paths below REMOTE_PATH, given as on the box, whole or relative to it;
    none of them below another."""
    start = join(root, b"")
    names = [os.fsencode(path).rstrip(b"/") for path in given]
    if b"" in names and root != b"/":  # `$unset/`, perhaps
        raise ConfigError(f"/ is not below REMOTE_PATH {printable(root)}: name none for all")
    inner = {name.removeprefix(start).removeprefix(b"./") for name in names}
    if inner & {b"", b"."} or {root, join(b".", root)} & set(names):
        return []
    return sorted(p for p in inner if not any(p.startswith(join(q, b"")) for q in inner))


def estimate(
    tools: Tools, cold: dict[str, Count], more: int, options: argparse.Namespace
) -> None:
    """Tells what the restore costs; `more` bytes need not be asked for, but fetched."""
    money = Money(tools.archive.region, tools.config.prices)
    asked_for = sum(cold.values(), Count())
    tier, days = options.tier, options.days
    download = money.download(asked_for.files, asked_for.bytes + more)
    tools.table(
        "ESTIMATE",
        [
            ("To be asked of S3", asked_for),
            ("Tier", f"{tier.capitalize()}, ready within {TIERS[tier]} hours, for {days} days"),
            ("Restore", usd_text(restore_cost(money, cold.items(), tier, days))),
            ("Download", f"{usd_text(download)} out of AWS"),
        ],
    )
    tools.tell([f"({money.note})"])


# check


def check(tools: Tools) -> int:
    """Tries everything that a run needs, one after another, and prints a line for
    each; leaves nothing behind.  0, or 1 if something is wrong."""
    wrong = 0

    def told(verdict: str, what: str) -> None:
        tools.tell([f"{verdict:<5}  {printable(what)}"])

    def tried(what: str, question: Callable[[], Any]) -> bool:
        nonlocal wrong
        try:
            told("ok", question() or what)
        except Locked as busy:
            told("note", f"{what}: {busy}")
        except (ArchiveError, ConnectionLost) as error:
            wrong += 1
            told("WRONG", f"{what}: {error}")
            return False
        return True

    def advised(what: str, question: Callable[[], bool], advice: str) -> None:
        answer, unknown = asked(question)
        told("ok" if answer else "note", f"{what}: {unknown or ('yes' if answer else advice)}")

    told("ok", "settings")
    tried("state", lambda: check_state(tools.config))
    if tried("Storage Box", lambda: check_box(tools, partial(told, "ok"))):
        tried("REMOTE_PATH", lambda: check_root(tools))
    if tried("bucket", lambda: check_bucket(tools)):
        for permission, attempt in tools.archive.permissions():
            if not tried(permission, attempt) and permission == "s3:AbortMultipartUpload":
                break  # the next one would leave something behind
        needed = "no, and restore needs it"
        advised("s3:RestoreObject", tools.archive.may_restore, needed)
        rule = "lifecycle rule for unfinished uploads"
        advised(rule, tools.archive.aborts_leftovers, "none: see the README, The bucket")
        off = "no: what changes on the box replaces its object"
        advised("versioning", tools.archive.versioned, off)
        if not wrong and state_is_empty(tools.config.state_db):
            tried("snapshot of the state", lambda: check_snapshot(tools))
    return 1 if wrong else 0


def check_state(config: Config) -> str:
    """That the state can be used, or made; Fatal."""
    with locked(config.state_db):
        if state_is_empty(config.state_db):
            if not os.access(config.state_db.parent, os.W_OK):
                raise Fatal(f"STATE_DB {config.state_db} cannot be created there")
            return f"state: none yet in {config.state_db}"
        state = State(config.state_db, partial(key_of_row, config), private=True)
        with contextlib.closing(state):
            state.pin(pins_of(config))
            files = state.count()
    return f"state: {files:,} files in {config.state_db}"


def check_snapshot(tools: Tools) -> str:
    """That a run could start, though there is no state here; Fatal."""
    with contextlib.closing(tools.state(pins_of(tools.config))) as state:
        files = state.count()
    if not files and tools.archive.has_objects():
        raise Fatal("none, but the bucket has objects: put the state database back")
    return f"snapshot of the state: {files:,} files" if files else "nothing is archived yet"


def check_box(tools: Tools, passed: Callable[[str], None]) -> str:
    connect(tools.config, passed).close("checked")
    return "SFTP answers"


def check_root(tools: Tools) -> str:
    root = tools.config.remote_path
    walk = Walk(tools.box, root, Rules(root, ("*",), True), lambda *_: None)
    deque(walk, 0)  # this folder alone, to its end: all that is in it is excluded
    return f"REMOTE_PATH {printable(root)} can be listed"


def check_bucket(tools: Tools) -> str:
    region, ahead = tools.archive.look()
    if abs(ahead) > CLOCK_LIMIT:
        way = "ahead of" if ahead > 0 else "behind"
        raise Fatal(f"this machine's clock is {abs(ahead):,.0f} s {way} S3's: set it")
    if region not in (tools.archive.region, NO_REGION):
        raise Fatal(f"it is in {region}, not {tools.archive.region}: set AWS_REGION={region}")
    return f"bucket {tools.config.bucket} in {region}, clocks {abs(ahead):.0f} s apart"


# ---------------------------------------------------------------- Command line

STATUSES = """\
exit statuses:
  0      all selected files are archived (restore: are there; verify: agree)
  1      fatal: credentials, host key, bucket, box or state; the reason is told
  2      usage or configuration
  3      incomplete: some file failed or differs, or MAX_RUNTIME was over
  11     another run holds the lock
  75     restore is under way: run it again later
  128+n  ended by signal n
"""


def redacted(text: str, secrets: Iterable[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):  # one may begin another
        text = text.replace(secret, "***")
    return text


class OneLine(logging.Formatter):
    """Any message on one line, whoever wrote it, and without secrets."""

    def __init__(self, form: str, secrets: Iterable[str]):
        super().__init__(form, "%Y-%m-%dT%H:%M:%S%z")
        self._secrets = secrets

    def formatMessage(self, record: logging.LogRecord) -> str:
        kind = {logging.WARNING: "warning: ", logging.CRITICAL: "error: "}
        text = kind.get(record.levelno, "") + record.message
        shown = (char if char.isprintable() else printable(char) for char in text)
        record.message = text if text.isprintable() else "".join(shown)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei))

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record), self._secrets)


class Console(logging.StreamHandler):
    """Log lines on stderr, above the bars where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(sys.stderr):
            super().emit(record)


def start_logging(config: Config, level: int, bars: bool) -> None:
    """To stderr from `level` on, and to LOG_FILE; ConfigError if that cannot be
    written."""
    logging.raiseExceptions = False  # a closed pipe or a full disk is no traceback
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


def show(text: str) -> None:
    """Prints to stdout; a closed output (`| head`) is no error."""
    try:
        with tqdm.external_write_mode(sys.stdout):  # above the bars, if there are any
            print(text, flush=True)
    except OSError as error:
        let_go(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            log.warning("the output could not be written: %s", error)


def let_go(stream: Any) -> None:
    """What nobody takes goes nowhere: else Python ends with a status of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(secrets: Iterable[str], lines: list[str]) -> None:
    """Lines of a result, on stdout and in LOG_FILE."""
    show(redacted("\n".join(lines), secrets))  # S3's words may be among them
    for line in lines:
        logfile_log.info("%s", line)


class Signals:
    """Makes SIGINT, SIGTERM and SIGHUP an orderly end within ten seconds.

    Python's handlers run on the main thread only, which a signal may not wake,
    and whatever they interrupt may hold any lock.  So the number goes through a
    socket to a thread that does the rest: `close` lets all that waits on the
    box end.  What has not ended after STOP_LIMIT, or at a second signal, is cut
    off with the process, after its uploads were aborted and `last_words` told.
    """

    def __init__(self, box: Box, archive: Archive, last_words: Callable[[], None]):
        self._box, self._archive, self._last_words = box, archive, last_words
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
        self._woken.close()
        self._waker.close()

    def _watch(self) -> None:
        (number,) = self._woken.recv(1)
        if number == 0:
            return
        self._box.stopping.number = number
        self._box.close()
        # Where nobody reads what is told, whoever tells it waits for ever; and no thread
        # may be left to tell it.
        with contextlib.suppress(RuntimeError):
            within(1, lambda: log.warning("%s: ending", signal.Signals(number).name))
        self._woken.settimeout(STOP_LIMIT)
        with contextlib.suppress(TimeoutError):
            if self._woken.recv(1) == b"\0":
                return
        try:
            within(STOP_LIMIT / 2, self._archive.abort_all)
            within(1, self._last_words)
        finally:
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
    choice = partial(loudness.add_argument, dest="level", action="store_const")
    choice("-v", const=logging.DEBUG, help="tell of unchanged files too")
    choice("-q", const=logging.WARNING, help="only warnings, failures and the summary")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")

    def add(name: str, text: str, **flags: str) -> argparse.ArgumentParser:
        described = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=described)
        for flag, told in flags.items():
            command.add_argument("--" + flag.replace("_", "-"), action="store_true", help=told)
        return command

    again = "start with an empty state although the bucket has objects: everything is "
    again += "uploaded, and paid for, again"
    add("run", "archive what is new or changed (the default)", new_state=again)
    add("plan", "what run would do and what it would cost; changes nothing", json="as JSON")
    add("status", "what is archived, its cost, the last runs, the box's room", json="as JSON")
    sums = "the stored CRC-32, too: a request for each object"
    repair = "forget what is missing or wrong, so that the next run archives it again"
    held = "hold the state against the bucket, without cold reads"
    add("verify", held, checksums=sums, repair=repair)
    add_restore(add("restore", "bring files back; to be run again until it ends with 0"))
    add("check", "try settings, box, bucket and permissions, with the remedy for each")
    parser.set_defaults(level=logging.INFO, command="run", new_state=False)
    return parser


def add_restore(command: argparse.ArgumentParser) -> None:
    """The arguments of `restore`."""
    add = command.add_argument
    path = "file or folder as on the box (default: all)"
    add("path", nargs="*", type=not_empty, metavar="PATH", help=path)
    where = command.add_mutually_exclusive_group(required=True)
    local = "a folder of this machine"
    where.add_argument("--to", type=not_empty, metavar="FOLDER", help=local)
    box = "a folder of the Storage Box"
    where.add_argument("--to-box", type=not_empty, metavar="FOLDER", help=box)
    add("--tier", choices=TIERS, default="bulk", help="bulk: 48 hours; standard: 12, dearer")
    days = "how long the copies can be read (default: 7)"
    add("--days", type=whole_days, default=7, metavar="N", help=days)
    add("--yes", action="store_true", help="agree to the cost without being asked")
    add("--overwrite", action="store_true", help="replace other files that are in the way")
    manifest = "write what is cold there, for S3 Batch Operations, and ask for nothing"
    add("--manifest", type=Path, metavar="FILE", help=manifest)


def not_empty(text: str) -> str:
    """Not what an unset variable of a shell script leaves."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, not nothing")
    return text


def whole_days(text: str) -> int:
    try:
        return parse_whole(1, 3650, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, not {text!r}") from None


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
        return start(argv)
    except KeyboardInterrupt:  # before there is anything to end in order
        return 128 + signal.SIGINT
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                let_go(stream)


def start(argv: list[str] | None) -> int:
    """Reads arguments and settings, and runs the command; its exit status."""
    try:
        arguments = make_parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed help or a usage error
        return int(end.code or 0)
    bars = bool(sys.stderr and sys.stderr.isatty()) and arguments.level <= logging.INFO
    # State, lock and log tell all names, and whoever can read the lock can hold it.
    os.umask(0o077)
    tune_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is
    beside = Path(__file__).resolve().parent / ".env"
    env_file = arguments.env_file or (beside if beside.is_file() else None)
    try:
        config = load_config(env_file, os.environ)
        start_logging(config, arguments.level, bars)
    except ConfigError as error:
        if env_file is None:
            print(f"error: there is no {beside}: copy .env.example to it", file=sys.stderr)
        for fault in str(error).splitlines():
            print(f"error: {fault}", file=sys.stderr)
        return 2
    for warning in cautions(config, env_file):
        log.warning("%s", warning)
    # Where boto3 looks for them; what is empty it would take for a value.
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(config.aws_environ)
    return command(config, arguments, bars)


def command(config: Config, arguments: argparse.Namespace, bars: bool) -> int:
    """Runs the command; the one place where errors become exit statuses."""
    stopping = Stopping()
    patient = arguments.command not in ("status", "check")
    box = Box(config, stopping, patient)
    progress = Progress(bars)
    report = Report()

    def summarize() -> None:
        number = stopping.number
        if not report.complete and (report.walk is not None or number is not None):
            name = "an error" if number is None else signal.Signals(number).name
            report.ended_early = f"by {name}"
        if report.walk is not None or (arguments.command == "run" and report.ended_early):
            tell(config.secrets, report.summary())

    try:
        archive = Archive(config, stopping, patient)
        tools = Tools(config, box, archive, show, partial(tell, config.secrets), progress)

        def last_words() -> None:
            archive.tell_unfinished()
            summarize()

        with Signals(box, archive, last_words):
            return perform(tools, arguments, report)
    except (ArchiveError, Stopped) as error:
        if isinstance(error, ArchiveError):
            log.critical("%s", error)
        if stopping.number is not None:
            return 128 + stopping.number
        return 11 if isinstance(error, Locked) else 2 if isinstance(error, ConfigError) else 1
    except Exception as error:  # a defect of ours: told in one line all the same
        log.critical("unexpected %s: %s", type(error).__name__, error)
        log.debug("traceback", exc_info=True)
        return 1
    finally:
        box.close()
        progress.close()
        summarize()


def perform(tools: Tools, arguments: argparse.Namespace, report: Report) -> int:
    """The command's exit status; ArchiveError."""
    match arguments.command:
        case "plan":
            return plan(tools, arguments.json)
        case "status":
            return status(tools, arguments.json)
        case "verify":
            return verify(tools, arguments.checksums, arguments.repair)
        case "restore":
            return restore(tools, arguments, agreed)
        case "check":
            return check(tools)
    config, archive = tools.config, tools.archive
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(config.state_db))
        state = open_state(config, archive, arguments.new_state)
        stack.enter_context(contextlib.closing(state))
        return run(Run(config, tools.box, archive, state, report, tools.progress))


def agreed(question: str) -> bool:
    """Whether a person at the terminal says yes."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False

    def leave(*_: object) -> None:
        raise Stopped("stopped")

    before = signal.signal(signal.SIGINT, leave)  # else the line would be waited for
    try:
        print(f"{question} [y/N] ", end="", flush=True, file=sys.stderr)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
