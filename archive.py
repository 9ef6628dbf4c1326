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
"""Archive a Hetzner Storage Box into Amazon S3 Glacier Deep Archive, and restore it.

A generator walks the box over SFTP.  A SQLite table of (path, size, mtime) says which files
are archived already.  Every other file is streamed to S3 with boto3, one object per file,
without a copy on local disk.  Its row is committed once S3 has acknowledged the object.

The bucket is the record, and the state database is a cache of it, which can be made again
from the bucket.  All code below upholds one invariant:

    A row with an mtime exists only if S3 holds an object of exactly the bytes that
    the box serves for that path at this size and mtime.

A row without an mtime says that S3 may hold such an object.  The file is compared with it
before the row is believed.  Anything may fail, be killed or be retried.  Only what S3 is
not known to hold is uploaded.  No object is ever deleted from the bucket, and only
`restore --to-box` changes anything on the box.

Sections, each calling only those above it: Limits, Prices, Errors, Names, Uploads and
checksums, Settings, SFTP, Login, Storage Box, State, Bucket, Comparison, Output, Parallel
work, Walk and plan, Run, Inspection (ls, status, verify, check), Restore, Command line.

The names of errors at the end of a docstring, as in "; FileError" or "Fatal, Stopped.", are
what the function raises.  Whatever uses the box may also raise Fatal and Stopped.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fnmatch
import gc
import hashlib
import heapq
import io
import itertools
import json
import logging
import math
import os
import queue
import random
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
import unicodedata
import zlib
from argparse import ArgumentTypeError
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache, partial
from logging.handlers import RotatingFileHandler
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Generic, NamedTuple, NoReturn, TextIO, TypeVar
from urllib.parse import quote, quote_plus

try:
    import boto3
    import botocore.config
    import botocore.handlers
    import dotenv.parser
    import paramiko
    import urllib3
    from boto3.s3.inject import upload_fileobj
    from boto3.s3.transfer import S3Transfer, TransferConfig
    from botocore import exceptions as aws
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: start it as .venv/bin/python archive.py, see the README")

all_logs = logging.getLogger("archive")  # to LOG_FILE
log = logging.getLogger("archive.messages")  # to stderr as well
files_log = logging.getLogger("archive.files")  # files archived or restored; bars replace it
results_log = logging.getLogger("archive.results")  # to stdout (--json: stderr) as well
warn_once = cache(log.warning)  # the same message is logged once

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")

VERSION = "2.0"  # "Upgrading" in the README says what changes with the first number

# ---------------------------------------------------------------------- Limits

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MAX_PARTS = 10_000  # S3 user guide, "Amazon S3 multipart upload limits"
MAX_KEY_BYTES = 1024  # S3 user guide, "Naming Amazon S3 objects"
# The usual part sizes, from S3's minimum of 5 MiB to its maximum of 5 GiB, the likeliest first:
# 8 MiB (boto3, AWS CLI), 5 MiB (rclone), 6 and 7 MiB, each doubled again and again.  An upload
# takes the smallest from PART_SIZE on that is allowed; Bucket._part_size guesses with them.
PART_SIZES = [(size << n) * MIB for size in (8, 5, 6, 7) for n in range(10)] + [5 * GIB]

# A file below SMALL_FILE is read whole and sent with one PUT.  A larger one goes up in parts.
# Larger parts need fewer requests (16 MiB: about $0.33 a TiB), smaller ones less memory.
SMALL_FILE = 16 * MIB
PART_SIZE = 16 * MIB  # larger if MAX_PARTS requires it
PARTS_AT_ONCE = 4  # of one file; fewer if MEMORY_LIMIT does not hold them
MIN_MEMORY = 2 * SMALL_FILE  # the least MEMORY_LIMIT: a small file is in memory twice
MAX_GROWTH = 64 * KIB  # of a file between its listing and its OPEN
COMPARE_BLOCK, DOWNLOAD_BLOCK = MIB, 256 * KIB  # bytes per read

# OpenSSH answers a READ with at most 261,120 bytes (limits@openssh.com).  READ_WINDOW divided
# by the round trip bounds the rate: 16 MiB at 20 ms are 800 MB/s.  SSH's own window is wider,
# so that a large file does not hold up listings and small files.
READ_SIZE, MIN_READ_SIZE, READS_PER_BATCH = 252 * KIB, 32 * KIB, 8
READ_WINDOW = 16 * MIB
SSH_WINDOW, SSH_PACKET = 32 * MIB, 256 * KIB
MAX_PACKET = MIB  # OpenSSH sends at most 256 KiB
MAX_PATH_BYTES = 8192  # no system opens longer paths; ends the walk of endless nesting
WRITE_SIZE = 32 * KIB  # the most that every server has to accept in one WRITE (SFTP's draft)
WRITES_AHEAD = 64  # WRITE requests that wait for a reply

LISTINGS_AT_ONCE = 64  # folders
NAMES_AHEAD = 1_200  # per folder; a larger one is listed again when its turn comes
FIRST_READDIRS = 4  # sent at once for a folder; each time twice as many, up to 8 times this
PAGE = 2_000  # paths per query of the state

# Limits of all waits, and pauses, in seconds.
CONNECT_LIMIT = 30  # for TCP, and again from SSH's banner to the SFTP session
SILENCE_LIMIT = 60  # without a byte while the box owes a reply; noticed within twice that
RECONNECT_PAUSES = (0, 1, 2, 4, 8, 15)  # before each attempt to connect to the box
FAILURE_PAUSE = 0.1  # after the answer FAILURE: too many files may have been open
KEEPALIVE = 60  # the box closes idle sessions, and a part may take minutes to upload
S3_CONNECT_LIMIT, S3_READ_LIMIT = 20, 60  # per attempt
LOCKED_LIMIT = 60  # for another program's lock on the state: `plan` may be copying it
COMMIT_PAUSE = 0.5  # between commits of finished files while the walk finds no new one
STOP_LIMIT = 5  # for work under way after a signal
EXIT_GRACE = 3  # after STOP_LIMIT, until the process is ended by force
RUNTIME_GRACE = 40  # for what is on its way to S3 after MAX_RUNTIME or a fatal error

TRIES = 5  # of an operation on the box, before its file is reported as failed
SHARED_TRIES = 2  # after these it is tried alone: no other operation may begin
S3_ATTEMPTS = 6  # of a request, with pauses of over 30 s in all
SAME_FAILURES = 20  # in a row, after which the run ends: the files are not the cause

# Seconds.  A file that was modified less than RECENT before it was read could be modified
# again and keep its size and mtime.  The mtime in an object's metadata is believed only if
# the object was stored more than RECENTLY_STORED after it: the clocks may differ.
RECENT, RECENTLY_STORED = 2, 60

# The hours that S3 takes at most (S3 user guide, "Archive retrieval options").
TIERS = {"bulk": 48, "standard": 12}
DAYS_RESTORED = 7  # for which S3 keeps restored copies, by default
WAIT_PAUSE = 15 * 60  # s between the passes of `restore --wait`
# Below TINY_FILE, STANDARD costs less than the 40 KB that S3 adds to a cold object.
TINY_FILE, CLASS_FOR_TINY = 8 * KIB, "STANDARD"

# ---------------------------------------------------------------------- Prices
#
# USD without tax, from Amazon's price lists as of PRICES_OF.  `month` is for a GB (2**30
# bytes) and month; `put`, `part`, `get` and `request` for 1,000 requests; `gb` and
# `egress` for a GB.  `part` is UploadPart and CreateMultipartUpload for this class.  The
# egress prices of eu-south-2 and eu-central-2 are inferred from those of other regions.
PRICES_OF = "September 2026"
REGION_PRICES = """
region DEEP_ARCHIVE.month DEEP_ARCHIVE.put DEEP_ARCHIVE.part STANDARD.month STANDARD.put get \
    GLACIER.month GLACIER.put DEEP_ARCHIVE.bulk.gb DEEP_ARCHIVE.bulk.request \
    DEEP_ARCHIVE.standard.gb DEEP_ARCHIVE.standard.request GLACIER.standard.gb \
    GLACIER.standard.request egress
eu-central-1 .0018 .06 .0054 .0245 .0054 .00043 .00405 .036 .005 .03 .024 .12 .012 .06 .09
eu-central-2 .00198 .06 .0054 .02695 .0054 .00043 .004455 .036 .005 .03 .024 .12 .012 .06 .09
eu-north-1 .00099 .055 .005 .023 .005 .0004 .0036 .033 .003 .025 .02 .11 .01 .055 .09
eu-south-1 .0018 .06 .0054 .024 .0053 .0004 .00405 .036 .005 .03 .024 .12 .012 .06 .09
eu-south-2 .0018 .06 .0054 .023 .0053 .0004 .00405 .036 .005 .03 .024 .12 .012 .06 .09
eu-west-1 .00099 .055 .005 .023 .005 .0004 .0036 .033 .003 .025 .02 .11 .01 .055 .09
eu-west-2 .0018 .06 .0053 .024 .0053 .00042 .00405 .0318 .005 .026 .021 .106 .0105 .053 .09
eu-west-3 .0018 .06 .0053 .024 .0053 .00042 .00405 .0318 .005 .02625 .021 .106 .0105 .053 .09
us-east-1 .00099 .05 .005 .023 .005 .0004 .0036 .03 .0025 .025 .02 .1 .01 .05 .09
us-east-2 .00099 .05 .005 .023 .005 .0004 .0036 .03 .0025 .025 .02 .1 .01 .05 .09
us-west-2 .00099 .05 .005 .023 .005 .0004 .0036 .03 .0025 .025 .02 .1 .01 .05 .09
"""
COLD_CLASSES = ("DEEP_ARCHIVE", "GLACIER")  # must be restored before they can be read
CLASSES = [*COLD_CLASSES, "STANDARD", "GLACIER_IR", "STANDARD_IA", "ONEZONE_IA"]
CLASSES += ["INTELLIGENT_TIERING", "REDUCED_REDUNDANCY"]
PRICE_NAMES = REGION_PRICES.splitlines()[1].split()[1:]
FREE = {"GLACIER.bulk.gb": 0.0, "GLACIER.bulk.request": 0.0}
CLASS_PRICES = [f"{name}.{what}" for name in CLASSES for what in ("month", "put", "part")]
ALL_PRICE_NAMES = list(dict.fromkeys([*PRICE_NAMES, *FREE, *CLASS_PRICES]))  # for PRICES

# S3 adds to each cold object: 8 KB at STANDARD's price, and 32 KB at the class's own.
OVERHEAD_IN_STANDARD, OVERHEAD_IN_CLASS = 8 * KIB, 32 * KIB
MINIMUM_DAYS = {"DEEP_ARCHIVE": 180, "GLACIER": 90, "GLACIER_IR": 90}  # that are charged
MINIMUM_DAYS |= {"STANDARD_IA": 30, "ONEZONE_IA": 30}
DAY, DAYS_PER_MONTH = 86_400, 30
FREE_EGRESS = 100  # GB a month


class Prices:
    """Estimated costs in a region, in USD; NaN if a price is not known.  `overrides` are
    prices by name, which replace those of the region."""

    def __init__(self, region: str | None, overrides: Mapping[str, float]):
        rows = (line.split() for line in REGION_PRICES.splitlines()[2:])
        table = {name: dict(zip(PRICE_NAMES, map(float, usd))) for name, *usd in rows}
        priced = region if region in table else "us-east-1"
        usd = table[priced] | FREE
        usd |= {"GLACIER.part": usd["DEEP_ARCHIVE.part"], "STANDARD.part": usd["STANDARD.put"]}
        self._usd = usd | dict(overrides)
        self.note = f"estimates, prices of {PRICES_OF} for {priced}"
        self.note += " with PRICES" if overrides else ""
        if priced != region and not overrides:
            self.note += f" (those of {region or 'your region'} may differ: set PRICES)"

    def _cost(self, count: float, name: str) -> float:
        """`count` times the price of that name; 0 for none, even if the price is not known."""
        return count * self._usd.get(name, math.nan) if count else 0.0

    def month(self, storage_class: str, files: int, size: int) -> float:
        """A month's storage of `files` objects with `size` bytes in all, and of the 40 KB that
        S3 adds to each cold object ("Amazon S3 pricing", note on archived objects)."""
        cold = files if storage_class in COLD_CLASSES else 0
        standard = self._cost(cold * OVERHEAD_IN_STANDARD / GIB, "STANDARD.month")
        size += cold * OVERHEAD_IN_CLASS
        return standard + self._cost(size / GIB, f"{storage_class}.month")

    def requests(self, storage_class: str, counts: Mapping[str, int]) -> float:
        """The cost of requests; `counts` has their numbers by kind (S3 user guide, "Multipart
        upload and pricing").  `head` and `list` cost the same in each class."""
        put, part = f"{storage_class}.put", f"{storage_class}.part"
        names = {"put": put, "complete": put, "create": part, "part": part}
        names |= {"head": "get", "list": "STANDARD.put"}
        return sum(self._cost(n / 1000, names[kind]) for kind, n in counts.items())

    def early(self, storage_class: str, size: int, age_days: float) -> float:
        """The charge for overwriting an object at this age: its storage for the rest of the
        class's minimum ("Amazon S3 pricing", early deletion, pro rata)."""
        days = max(0.0, MINIMUM_DAYS.get(storage_class, 0) - max(0.0, age_days))
        return self.month(storage_class, 1, size) * days / DAYS_PER_MONTH if days else 0.0

    def restore(self, storage_class: str, files: int, size: int, tier: str, days: int) -> float:
        """Restoring: requests and bytes at the tier's price, and copies in STANDARD for
        `days` (S3 user guide, "Restoring an archived object")."""
        if storage_class == "STANDARD":  # needs no restore; STANDARD_IA and others give NaN
            return 0.0
        requests = self._cost(files / 1000, f"{storage_class}.{tier}.request")
        copies = self._cost(size / GIB, "STANDARD.month") * days / DAYS_PER_MONTH
        return requests + self._cost(size / GIB, f"{storage_class}.{tier}.gb") + copies

    def download(self, files: int, size: int) -> float:
        """GETs, and the transfer out of AWS beyond the FREE_EGRESS of a month."""
        egress = self._cost(max(0.0, size / GIB - FREE_EGRESS), "egress")
        return self._cost(files / 1000, "get") + egress


def format_usd(usd: float) -> str:
    """`$1.23`, `under $0.01` or `unknown`."""
    if math.isnan(usd):
        return "unknown"
    return "under $0.01" if 0 < usd < 0.01 else f"${usd:,.2f}"


# ---------------------------------------------------------------------- Errors

FATAL, USAGE, INCOMPLETE, LOCKED, THAWING = 1, 2, 3, 11, 75  # exit statuses, see STATUSES


class ArchiveError(Exception):
    """An error that the user sees as one line, without a traceback.  `code` is S3's error code
    or HTTP status, a constant like VANISHED, the name of a library's error, or empty.
    `status` is the exit status if the error ends the program."""

    def __init__(self, message: str, code: str = "", status: int = FATAL):
        super().__init__(message)
        self.code, self.status = code, status


class Fatal(ArchiveError):
    """The command cannot go on: settings, credentials, bucket, box, state or lock."""


class FileError(ArchiveError):
    """One file, folder or object failed; the others go on."""


@contextlib.contextmanager
def fatal_os_errors(subject: str, status: int = FATAL) -> Iterator[None]:
    """Turns the error of a file that cannot be read or written into Fatal."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise Fatal(f"{subject}: {error}", status=status) from None


VANISHED = "vanished"  # the file was deleted after it was listed; this is not a failure
CHANGED = "changed"  # while it was read
LOST = "connection lost"  # at the last try of an operation on the box
UNAVAILABLE = "unavailable"  # S3 did not answer, or could not do its work
DENIED = "AccessDenied"  # S3's code
INVALID_STATE = "InvalidObjectState"  # S3's: GET of a cold object, restore of one that is not


class Stopped(BaseException):
    """The program has to end.  Not an Exception, so that no library handles it as a failure."""


class StopEvent(threading.Event):
    """Set when the program has to end: no new work begins then.  StorageBox.close sets it.  The
    handler of a signal sets only `received`: set() could wait for ever for a lock that the
    interrupted code holds."""

    received: int | None = None  # the number of the first signal
    is_deferred = False  # while True, a signal does not raise Stopped on the main thread

    def is_set(self) -> bool:
        return self.received is not None or super().is_set()

    def check(self) -> None:
        if self.is_set():
            raise Stopped

    def handle_signals(self) -> None:
        """From now on, SIGINT, SIGTERM and SIGHUP raise Stopped.  A SIGINT after the first
        of them ends the program at once.  So does a timer, some seconds after the first."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # A signal stays ignored if the program was started so, for example by nohup.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: object) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                os._exit(128 + number)
            return  # a shell, sudo and the kernel may all pass the same signal on
        self.received = number  # first, as the timer's thread may fail to start
        # Whatever hangs then is cut off, such as a print into a pipe that nobody reads.
        threading.Timer(STOP_LIMIT + EXIT_GRACE, os._exit, [128 + number]).start()
        if not self.is_deferred:
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Main thread: a signal in this block raises Stopped at its end, if no error did."""
        before, self.is_deferred = self.received, True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.received != before:
            raise Stopped


# ----------------------------------------------------------------------- Names
#
# File names are bytes, as in SFTP.  They are kept as text only in the state's path column, in
# S3 keys, and in what is printed.

# ESCAPE and two hex digits stand for a byte of invalid UTF-8 (in Python \udc80-\udcff), as in
# rclone; in keys also for each byte of ASCII's control characters, U+FFFE and U+FFFF.
ESCAPE = "\u201b"
TEXT_ESCAPES = re.compile(f"[\udc80-\udcff]|{ESCAPE}(?=[0-9A-F]{{2}})")
KEY_ESCAPES = re.compile(f"[\0-\x1f\x7f\ufffe\uffff]|{TEXT_ESCAPES.pattern}")
ESCAPE_SEQUENCE = re.compile(ESCAPE.encode() + b"([0-9A-F]{2})")


def escape(name: bytes, pattern: re.Pattern[str]) -> str:
    """`name` as text, with everything escaped that `pattern` matches.  `unescape` reverses
    it: an ESCAPE in the name that hex digits follow is escaped itself."""
    text = name.decode("utf-8", "surrogateescape")
    if text.isascii() and text.isprintable():  # nothing to escape; this is only faster
        return text

    def escape_match(match: re.Match[str]) -> str:
        raw = match[0].encode("utf-8", "surrogateescape")
        return "".join(f"{ESCAPE}{byte:02X}" for byte in raw)

    return pattern.sub(escape_match, text)


def unescape(text: str) -> bytes:
    return ESCAPE_SEQUENCE.sub(lambda match: bytes([int(match[1], 16)]), text.encode())


def path_text(path: bytes) -> str:
    """`path` as text, as in the state's path column: bytes that are not UTF-8 are escaped."""
    return escape(path, TEXT_ESCAPES)


def one_line(text: str) -> str:
    """`text` with unprintable characters escaped as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(name: bytes) -> str:
    """A name on one line.  Bytes that are not UTF-8 are shown in hex."""
    return one_line(name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace"))


def format_size(size: float) -> str:
    """`1.5 GiB`; exact below 1 KiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


class Size(int):
    """Bytes that a table shows like `1.5 GiB`."""

    def __str__(self) -> str:
        return format_size(self)


def format_time(seconds: float) -> str:
    """A time since the epoch in the user's time zone, with its offset."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S %z}"


def join(folder: bytes, name: bytes) -> bytes:
    """The path of `name` in `folder`; for an empty name, the folder with a slash at its end."""
    return folder + name if folder.endswith(b"/") else folder + b"/" + name


def relative_path(root: bytes, path: bytes) -> bytes:
    """`path` relative to the folder `root`, which is above it."""
    return path[len(join(root, b"")) :]


def unchecked_key(prefix: str, relative: bytes) -> str:
    """The key of a path relative to REMOTE_PATH, even if S3 does not allow it."""
    return prefix + escape(relative, KEY_ESCAPES)


def object_key(prefix: str, relative: bytes) -> str:
    """The S3 key of a path relative to REMOTE_PATH; FileError if no file can have that path, or
    its key is too long.  The path can be read from the key: `unescape(key[len(prefix):])`."""
    if {b"", b".", b".."} & set(relative.split(b"/")) or b"\0" in relative:
        raise FileError("its path has NUL, or a . or .. or empty segment: rename or exclude it")
    key = unchecked_key(prefix, relative)
    size = len(key.encode())
    if size > MAX_KEY_BYTES:
        reason = f"its key has {size:,} bytes, S3 allows {MAX_KEY_BYTES:,}"
        raise FileError(f"{reason}: shorten its path, or exclude it")
    return key


# ------------------------------------------------------- Uploads and checksums


class Upload(NamedTuple):
    """How a file is uploaded: in parts, or with one PUT if it is small.  An unfinished one in
    parts is a row of the state's table `uploads`, which has all fields but `parts`."""

    key: str
    path: str  # as in the state's path column
    size: int
    mtime: int | None  # of the file; None in the state if the upload must not be continued
    part_size: int = 0  # 0: one PUT
    settings: str = ""  # see Config.upload_settings
    id: str | None = None  # None until S3 has given one
    # Stored ones, from the first on without a gap, as CompleteMultipartUpload takes them.
    parts: tuple[dict[str, Any], ...] = ()

    @property
    def requests(self) -> dict[str, int]:
        """The number of requests by kind, if nothing is stored yet."""
        if not self.part_size:
            return {"put": 1}
        return {"create": 1, "part": -(-self.size // self.part_size), "complete": 1}

    def parts_at_once(self, memory_limit: int) -> int:
        """How many parts are sent at once, while another one is read."""
        return max(1, min(PARTS_AT_ONCE, (memory_limit - READ_WINDOW) // self.part_size - 1))

    def memory(self, memory_limit: int) -> int:
        """The most bytes that are in memory at once: more than `memory_limit` if the parts are
        so large.  A small file is in memory twice: as replies, and joined."""
        if not self.part_size:
            return 2 * self.size
        parts = (self.parts_at_once(memory_limit) + 1) * self.part_size
        return min(2 * self.size, parts + READ_WINDOW)


# A CRC is a polynomial modulo another one.  The highest bit is the coefficient of x**0.
CRC32_POLYNOMIAL, X_8 = 0xEDB88320, 1 << 23  # X_8 is x**8


def multiply(first: int, second: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        product ^= second if first >> bit & 1 else 0
        second = second >> 1 ^ (CRC32_POLYNOMIAL if second & 1 else 0)
    return product


def crc32_combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two byte strings joined, of which the second has `length` bytes.  Each
    byte appended to the first string multiplies its CRC by x**8 (crc32_combine in zlib).  A
    second pass over all bytes would take 7 % of the CPU time."""
    power = X_8
    while length:
        if length & 1:
            first = multiply(first, power)
        power, length = multiply(power, power), length >> 1
    return first ^ second


def crc_text(crc32: int) -> str:
    """A CRC-32 as S3 writes it: big-endian, in base64."""
    return base64.b64encode(crc32.to_bytes(4, "big")).decode()


md5 = partial(hashlib.md5, usedforsecurity=False)  # FIPS mode forbids it for security


# -------------------------------------------------------------------- Settings
#
# A parse_ function returns the value of a setting or an option.  Its ArgumentTypeError, whose
# text argparse shows as well, says what was expected.


def parse_match(pattern: str, expected: str, text: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ArgumentTypeError(f"expected {expected}")
    return text


def parse_size(text: str, minimum: int = 1) -> int:
    """Bytes of `20M`, `1.5G` or `4096`, in binary units."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.I | re.A)
    units = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
    size = int(float(match[1]) * units[match[2].upper()]) if match else 0
    if size < minimum:
        raise ArgumentTypeError(f"expected bytes like 128M or 2G, at least {minimum:,}")
    return size


def parse_int(low: int, high: int, text: str) -> int:
    if not re.fullmatch(r"(?a)\d{1,9}", text.strip()) or not low <= int(text) <= high:
        raise ArgumentTypeError(f"expected a whole number from {low} to {high}")
    return int(text)


def parse_usd(text: str) -> float:
    return float(parse_match(r"(?a)\d{1,6}(\.\d+)?|\.\d+", "USD like 5 or 0.25", text.strip()))


def parse_duration(text: str) -> int:
    """Seconds of `90s`, `1h30m`, `2d` or `45`."""
    pattern, units = r"(?a)\d+|(\d+\s*[smhd]\s*)+", {"s": 1, "m": 60, "h": 3600, "d": DAY}
    text = parse_match(pattern, "a time like 90m or 6h", text.strip().lower())
    return sum(int(n) * units[u or "s"] for n, u in re.findall(r"(\d+)\s*(\w?)", text))


def parse_time(text: str) -> float:
    """Seconds since the epoch of a date, a time or an age like `30d`.  A date means its
    beginning.  A time without an offset is in the user's time zone."""
    text, seconds = text.strip(), math.inf  # inf is refused below
    with contextlib.suppress(ArgumentTypeError, ValueError, OverflowError, OSError):
        if text[-1:].lower() in ("s", "m", "h", "d"):
            seconds = time.time() - parse_duration(text)
        else:
            seconds = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text)).timestamp()
    if not 0 <= seconds <= time.time():
        raise ArgumentTypeError("expected a time in the past like 2025-11-30T18:00 or 30d")
    return seconds


def parse_bool(text: str) -> bool:
    word = parse_match("true|yes|on|1|false|no|off|0", "true or false", text.strip().lower())
    return word in ("true", "yes", "on", "1")


def parse_path(text: str) -> Path:
    text = os.fsdecode(text.encode("utf-8", "surrogateescape"))  # names need not be UTF-8
    return Path(os.path.expanduser(text).removeprefix("~/"))  # "~/" is kept without a home


def parse_folder(text: str) -> bytes:
    """A folder of the box, without trailing slashes; `/` stays."""
    return text.encode("utf-8", "surrogateescape").rstrip(b"/") or b"/"


def parse_list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def parse_pairs(names: list[str], text: str) -> dict[str, str]:
    """Values by name, of `ServerSideEncryption=aws:kms, Tagging=kind=backup`, or of a JSON
    object, whose values may have commas."""
    items = (item.partition("=") for item in parse_list(text))
    pairs = {name.strip(): value.strip() for name, _, value in items}
    if text.lstrip().startswith("{"):
        pairs = json.loads(text)
    for number, (name, value) in enumerate(pairs.items(), 1):
        if not (name in names and isinstance(value, str) and re.fullmatch("[ -~]+", value)):
            # The text of the item may be an encryption key.
            expected = f"name=value in ASCII, with names of {', '.join(names)}"
            raise ArgumentTypeError(f"item {number}: expected {expected}")
    return pairs


def parse_prices(text: str) -> dict[str, float]:
    """USD by name, of `DEEP_ARCHIVE.month=0.0018, egress=0.05`."""
    return {name: parse_usd(usd) for name, usd in parse_pairs(ALL_PRICE_NAMES, text).items()}


# One colon would precede a port, which has a setting of its own; an IPv6 address has more.
host_expected = "a bare host name without a port, like u12345.your-storagebox.de"
parse_host = partial(parse_match, r"[^/\s@:]+|[^/\s@]*:[^/\s@]*:[^/\s@]*", host_expected)
parse_nonempty = partial(parse_match, r"(?s).+", "a path")  # "" may be an unset variable
parse_user = partial(parse_match, r"[^\s@\ud800-\udfff]+", "a bare user name, like u12345-sub1")
bucket_expected = "the bare name of a bucket, like my-archive"
parse_bucket = partial(parse_match, r"(?ai)[a-z0-9][\w.-]{1,253}[a-z0-9]", bucket_expected)
prefix_pattern = r"(?!(.*/)?\.\.?/|s3:|\w+://)[^\0-\x1f\x7f\ud800-\udfff\ufffe\uffff]*"
prefix_expected = "no URL, no . or .. segment, no control character and valid UTF-8"
parse_prefix = partial(parse_match, prefix_pattern, prefix_expected)
url_pattern = r"(?i)(https://[^/@\s]+|http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?)(/\S*)?"
url_expected = "an https:// URL (http:// only to this machine), no login"
parse_endpoint = partial(parse_match, url_pattern, url_expected)
parse_class = partial(parse_match, "|".join(CLASSES), "one of " + ", ".join(CLASSES))
# The names of boto3's ExtraArgs, without those that this program sets itself.
SET_HERE = ("Checksum", "Metadata", "MpuObjectSize", "StorageClass")  # beginnings of names
EXTRA_ARGS = [name for name in S3Transfer.ALLOWED_UPLOAD_ARGS if not name.startswith(SET_HERE)]


def setting(name: str, parse: Callable[[str], Any] = str, default: str | None = None) -> Any:
    """A field of Config that is read from the setting `name`.  If the setting is missing or
    empty, `default` is the text to parse; without a `default`, the value is None."""
    return field(metadata={"setting": (name, parse, default)})


@dataclass(frozen=True, repr=False)
class Config:
    """The settings, checked, in bytes, bytes per second, seconds, USD and %; None if off."""

    host: str = setting("HETZNER_HOST", parse_host, "")  # required: parse_host refuses ""
    user: str = setting("HETZNER_USER", parse_user, "")
    port: int = setting("HETZNER_PORT", partial(parse_int, 1, 65535), "23")
    password: str | None = setting("HETZNER_PASSWORD")
    key_file: Path | None = setting("HETZNER_KEY_FILE", parse_path)
    key_passphrase: str | None = setting("HETZNER_KEY_PASSPHRASE")
    known_hosts: Path = setting("HETZNER_KNOWN_HOSTS", parse_path, "~/.ssh/known_hosts")
    remote_path: bytes = setting("REMOTE_PATH", parse_folder, ".")
    bucket: str = setting("S3_BUCKET", parse_bucket, "")
    prefix: str = setting("S3_PREFIX", parse_prefix, "")
    region: str | None = setting("AWS_REGION")
    endpoint_url: str | None = setting("AWS_ENDPOINT_URL", parse_endpoint)
    storage_class: str = setting("STORAGE_CLASS", parse_class, "DEEP_ARCHIVE")
    small_files_below: int | None = setting("SMALL_FILES_BELOW", parse_size)
    small_files_class: str | None = setting("SMALL_FILES_CLASS", parse_class)
    extra_args: dict[str, str] = setting("S3_EXTRA_ARGS", partial(parse_pairs, EXTRA_ARGS), "")
    state_db: Path = setting("STATE_DB", parse_path, "archive_state.db")
    log_file: Path | None = setting("LOG_FILE", parse_path)
    exclude: tuple[str, ...] = setting("EXCLUDE_PATHS", parse_list, "")
    exclude_dirs: tuple[str, ...] = setting("EXCLUDE_DIRS", parse_list, "")  # an older name
    include_hidden: bool = setting("INCLUDE_HIDDEN", parse_bool, "false")
    transfers: int = setting("TRANSFERS", partial(parse_int, 1, 256), "32")
    memory_limit: int = setting("MEMORY_LIMIT", partial(parse_size, minimum=MIN_MEMORY), "128M")
    bandwidth_limit: int | None = setting("BANDWIDTH_LIMIT", parse_size)
    max_runtime: int | None = setting("MAX_RUNTIME", parse_duration)
    max_cost: float | None = setting("MAX_COST", parse_usd)
    max_changed: int | None = setting("MAX_CHANGED", partial(parse_int, 0, 100))
    prices: dict[str, float] = setting("PRICES", parse_prices, "")

    @property
    def url(self) -> str:
        """Where the objects are, for messages."""
        return f"s3://{self.bucket}/{self.prefix}"

    def storage_class_of(self, size: int) -> str:
        if self.small_files_class and size < (self.small_files_below or 0):
            return self.small_files_class
        return self.storage_class

    def upload_settings(self, size: int) -> str:
        """The settings that an upload in parts is begun with: a hash, as they may be secret."""
        settings = json.dumps([self.storage_class_of(size), self.extra_args], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()


SETTINGS = [f.metadata["setting"][0] for f in dataclasses.fields(Config)]
SETTINGS += ["AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
SETTINGS += ["AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"]
# boto3 gets all AWS_ variables, also those that are not named here, and the proxies.
PROXIES = re.compile("(?i)(https?|no)_proxy")
SECRETS = re.compile("HETZNER_(PASSWORD|KEY_PASSPHRASE)|AWS_(SECRET_ACCESS_KEY|.*_TOKEN)")
AWS_FILES = re.compile("AWS_.*_FILE|AWS_CA_BUNDLE")
secret_forms: set[str] = set()  # each secret in all its forms; messages show *** instead


def read_env_file(path: Path, faults: list[str]) -> dict[str, str]:
    """The settings in the env file; Fatal if it cannot be read.  Lines that are no setting are
    added to `faults`.  Paths in AWS_ settings are joined to the file's folder.  (dotenv's
    load_dotenv() would skip such lines, and expand ${...}, which may be part of a password.)"""
    settings: dict[str, str] = {}
    with fatal_os_errors(f"cannot read the env file {path}, see .env.example", USAGE):
        text = path.read_text(encoding="utf-8-sig")
        if os.name == "posix" and path.stat().st_mode & 0o077:
            log.warning("%s can be read by others: chmod 600 %s", path, shlex.quote(str(path)))
    for binding in dotenv.parser.parse_stream(io.StringIO(text)):
        name = binding.key or ""
        # Any other name is not shown: it may be the second line of a secret.
        if binding.value is not None and re.fullmatch(r"(?a)AWS_\w+|[\w.-]{1,40}", name):
            settings[name] = binding.value
        elif binding.key is not None or binding.error:
            source, line = binding.original  # `source` has the empty lines before it
            line += source[: -len(source.lstrip())].count("\n")
            faults.append(f"{path}, line {line}: expected NAME=value")
    for name in [n for n, value in settings.items() if value and AWS_FILES.fullmatch(n)]:
        settings[name] = str(path.parent / parse_path(settings[name]))
    return settings


def setting_faults(settings: Mapping[str, str]) -> Iterator[str]:
    """Messages, without the values, about unknown settings, keys in place of their paths,
    characters that no server accepts in a credential, and settings that need another one."""
    for name, value in settings.items():
        is_secret, is_aws = SECRETS.fullmatch(name), name.startswith("AWS_")
        refused = "[\0-\x1f\x7f\udc80-\udcff]" if is_secret else "[\0-\x1f\x7f]"
        if "PRIVATE KEY-----" in value:
            yield f"{name}: expected the path of a key's file, not the key itself"
        elif (is_secret or is_aws) and re.search(refused, value):
            yield f"{name}: contains a line break, another control character or invalid UTF-8"
        # Other programs have AWS_ variables, too.  AWS_ENDPOINT_URL_S3 is boto3's, and no typo.
        is_foreign = is_aws and (name in os.environ or name.startswith("AWS_ENDPOINT_URL_"))
        if is_foreign or name in SETTINGS or PROXIES.fullmatch(name):
            continue
        # An unknown AWS_ name is left to boto3, unless it looks like a typo of one of ours.
        near = difflib.get_close_matches(name.upper(), SETTINGS, 1, 0.76 if is_aws else 0.5)
        if near or not is_aws:
            where = " in the environment" if name in os.environ else ""
            advice = f"; did you mean {near[0]}?" if near else ""
            yield f"{name}: unknown setting{where}{advice}"
    if bool(settings.get("SMALL_FILES_BELOW")) != bool(settings.get("SMALL_FILES_CLASS")):
        yield "SMALL_FILES_BELOW and SMALL_FILES_CLASS: set both, or none"
    # On Windows no variable shows whether there is an agent.
    has_agent = os.environ.get("SSH_AUTH_SOCK") or sys.platform == "win32"
    if not (has_agent or settings.get("HETZNER_PASSWORD") or settings.get("HETZNER_KEY_FILE")):
        yield "HETZNER_PASSWORD or HETZNER_KEY_FILE: set one, or start an SSH agent"


def hide(secret: str | None) -> None:
    """Hides a secret in every form that the message of a library or a server may contain."""
    if secret and secret not in secret_forms:
        raw = secret.encode("utf-8", "surrogateescape")  # any bytes of the environment
        quoted = {quote(raw), quote(raw, safe=""), quote_plus(raw)}
        quoted |= {re.sub("%..", lambda code: code[0].lower(), form) for form in quoted}
        # repr() escapes a single quote only where there is a double quote, too.
        escaped = repr(secret)[1:-1], repr(f'"{secret}')[2:-1], json.dumps(secret)[1:-1]
        secret_forms.update({secret, base64.b64encode(raw).decode(), *quoted, *escaped})


def load_config(env_file: Path | None) -> Config:
    """The checked settings.  A variable of the environment replaces the env file's, even if it
    is empty.  Paths are relative to the env file's folder: cron starts the program in another
    one.  (Those in AWS_ variables of the environment are left as they are.)  Hides the secrets,
    and puts boto3's settings into the environment.  Logs all faults, then SystemExit; Fatal."""
    settings, faults = {"LOG_FILE": "archive.log"}, list[str]()  # LOG_FILE= turns it off
    # A link is not resolved here: an env file may be mounted as a link (a secret of a
    # container), whose target is in a folder that does not persist.
    path = env_file.absolute() if env_file else Path(__file__).resolve().parent / ".env"
    # Without an env file, all settings may be in the environment.
    if env_file or path.is_file() or "HETZNER_HOST" not in os.environ:
        settings |= read_env_file(path, faults)
    for name, raw in os.environ.items():
        if name in SETTINGS or PROXIES.fullmatch(name) or name.startswith(("HETZNER_", "AWS_")):
            # Python decodes the environment by the locale, which may not be UTF-8.
            settings[name] = os.fsencode(raw).decode("utf-8", "surrogateescape")
    for name in filter(SECRETS.fullmatch, settings):
        hide(settings[name])
    for name in filter(PROXIES.fullmatch, settings):  # http://user:password@host
        login = settings[name].rpartition("@")[0].rpartition("//")[2]
        hide(login.partition(":")[2])
    faults += setting_faults(settings)
    values: dict[str, Any] = {}
    for option in dataclasses.fields(Config):
        name, parse, default = option.metadata["setting"]
        text = settings.get(name) or default
        try:
            value = None if text is None else parse(text)
        except (ArgumentTypeError, ValueError) as error:
            # A URL may contain a password, and S3_EXTRA_ARGS an encryption key.
            is_secret = re.search("@|PRIVATE KEY-----", text) or name == "S3_EXTRA_ARGS"
            faults.append(f"{name}: {error}" + ("" if is_secret else f", not {text!r}"))
            continue
        if isinstance(value, Path):
            value = path.parent / value
            if name == "STATE_DB":  # it has one lock and journal, whatever link leads to it
                value = Path(os.path.realpath(value))
        values[option.name] = value
    for fault in faults:
        log.critical("%s", fault)
    if faults:
        sys.exit(USAGE)
    hide(values["extra_args"].get("SSECustomerKey"))
    if (prefix := values["prefix"]) and not re.fullmatch("[^/].*/", prefix):
        usual = "it usually ends in a slash, and does not begin with one"
        log.warning("S3_PREFIX %r: keys will begin %sname; %s", prefix, prefix, usual)
    for name in [n for n in settings if n.startswith("AWS_") or PROXIES.fullmatch(n)]:
        os.environ.pop(name, None)  # boto3 would take an empty variable for a value
        if settings[name]:
            os.environ[name] = settings[name]
    return Config(**values)


# ------------------------------------------------------------------------ SFTP
#
# SFTP version 3 (draft-ietf-secsh-filexfer-02) over one paramiko channel, with many
# requests in flight from many threads.  paramiko's SFTPClient lists a folder with one request
# at a time, and cannot be shared between threads.

FXP_INIT, FXP_OPEN, FXP_CLOSE, FXP_READ, FXP_WRITE, FXP_LSTAT, FXP_FSTAT = 1, 3, 4, 5, 6, 7, 8
FXP_FSETSTAT, FXP_OPENDIR, FXP_READDIR, FXP_REMOVE, FXP_MKDIR = 10, 11, 12, 13, 14
FXP_RENAME, FXP_READLINK, FXP_EXTENDED, FXP_EXTENDED_REPLY = 18, 19, 200, 201
FXP_VERSION, FXP_STATUS, FXP_HANDLE, FXP_DATA, FXP_NAME, FXP_ATTRS = 2, 101, 102, 103, 104, 105
FX_OK, FX_EOF, FX_NO_SUCH_FILE, FX_FAILURE = 0, 1, 2, 4
FOR_READING, FOR_WRITING = 1, 2 | 8 | 16  # FXF_READ; FXF_WRITE, FXF_CREAT, FXF_TRUNC
ATTR_SIZE, ATTR_UIDGID, ATTR_PERMISSIONS, ATTR_ACMODTIME, ATTR_EXTENDED = 1, 2, 4, 8, 1 << 31
NO_ATTRIBUTES = 0

U32, U64 = struct.Struct(">I"), struct.Struct(">Q")
HEADER = struct.Struct(">IBI")  # length of what follows, type, request id


class ConnectionLost(Exception):
    """The connection is closed, frozen or out of step; a new one is needed."""


class SFTPError(FileError):
    """The server refused a request with this SFTP status code.  `code` is VANISHED if an LSTAT
    found no file.  "No such file" as the answer to an OPEN does not count: some servers give it
    for other reasons, too."""

    def __init__(self, request_type: int, sftp_code: int, message: str):
        is_gone = request_type == FXP_LSTAT and sftp_code == FX_NO_SUCH_FILE
        reason = message or f"SFTP status {sftp_code}"
        super().__init__(f"the box answered: {reason}", VANISHED if is_gone else "")
        self.sftp_code = sftp_code


class Attributes(NamedTuple):
    """What the server says about a file.  A field is None if the server did not send it."""

    size: int | None
    mtime: int | None  # seconds since the epoch
    mode: int | None


class RemoteFile(NamedTuple):
    """A regular file on the box: path, size in bytes, mtime in seconds."""

    path: bytes
    size: int
    mtime: int


Request = tuple[Any, ...]  # a packet type, and its fields as `encode` takes them
Entry = tuple[bytes, Attributes]  # of a folder: a name and its attributes


def encode(value: bytes | int) -> bytes:
    """A string after its length, or a number of 32 bits.  An offset is two of these:
    `*divmod(offset, 1 << 32)`."""
    return U32.pack(value) if isinstance(value, int) else U32.pack(len(value)) + value


def decode_string(body: memoryview) -> memoryview:
    """The content of the SSH string that `body` begins with.  One that is cut short counts as
    a short reply, whose rest is requested again."""
    return body[4 : 4 + U32.unpack_from(body)[0]]


def decode_attributes(body: bytes | memoryview, at: int) -> tuple[Attributes, int]:
    """The attributes that begin at the offset `at`, and the offset where they end."""
    (flags,), at = U32.unpack_from(body, at), at + 4
    size = mtime = mode = None
    if flags & ATTR_SIZE:
        (size,), at = U64.unpack_from(body, at), at + 8
    if flags & ATTR_UIDGID:
        at += 8
    if flags & ATTR_PERMISSIONS:
        (mode,), at = U32.unpack_from(body, at), at + 4
    if flags & ATTR_ACMODTIME:  # atime, then mtime
        (mtime,), at = U32.unpack_from(body, at + 4), at + 8
    if flags & ATTR_EXTENDED:
        (count,), at = U32.unpack_from(body, at), at + 4
        for _ in range(2 * count):
            at += 4 + U32.unpack_from(body, at)[0]
    return Attributes(size, mtime, mode), at


def decode_names(body: memoryview) -> list[Entry]:
    """The entries of a folder.  This is the walk's inner loop."""
    data = bytes(body)  # slices of bytes are cheaper than those of a memoryview
    entries = []
    (count,), at = U32.unpack_from(data), 4
    for _ in range(count):
        end = at + 4 + U32.unpack_from(data, at)[0]
        name = data[at + 4 : end]
        end += 4 + U32.unpack_from(data, end)[0]  # skips the line that `ls -l` would print
        attributes, at = decode_attributes(data, end)
        entries.append((name, attributes))
    return entries


# The types of replies, and what decodes them.  The reply to other requests is FXP_STATUS.
REPLIES: dict[int, tuple[int, Callable[[memoryview], Any]]] = {
    FXP_INIT: (FXP_VERSION, bytes),
    FXP_OPEN: (FXP_HANDLE, decode_string),
    FXP_OPENDIR: (FXP_HANDLE, decode_string),
    FXP_READ: (FXP_DATA, decode_string),
    FXP_READDIR: (FXP_NAME, decode_names),
    FXP_READLINK: (FXP_NAME, decode_names),
    FXP_LSTAT: (FXP_ATTRS, lambda body: decode_attributes(body, 0)[0]),
    FXP_FSTAT: (FXP_ATTRS, lambda body: decode_attributes(body, 0)[0]),
    FXP_EXTENDED: (FXP_EXTENDED_REPLY, bytes),
}


def decode_reply(request_type: int, packet: memoryview) -> Any:
    """The content of a reply to a request of this type, None if there is nothing to decode.
    A refusal is returned as SFTPError, not raised: the other replies of its batch may be
    useful.  ConnectionLost for a reply of another type."""
    packet_type, body = packet[0], packet[5:]
    expected, decode = REPLIES.get(request_type, (FXP_STATUS, None))
    if packet_type == FXP_STATUS and (code := U32.unpack_from(body)[0]) != FX_OK:
        message = bytes(decode_string(body[4:])) if len(body) >= 8 else b""
        return SFTPError(request_type, code, message[:500].decode("utf-8", "replace"))
    if packet_type != expected and request_type != FXP_EXTENDED:  # its reply may be a status
        raise ConnectionLost(f"the box sent a reply of type {packet_type}, not {expected}")
    return decode(body) if decode else None


class Batch:
    """Requests that were sent together, and their replies."""

    def __init__(self, session: Session):
        self._session, self.sent_at = session, time.monotonic()
        self.types: dict[int, int] = {}  # by request id, in the order of the requests
        self.replies: dict[int, Any] = {}  # by request id, as from decode_reply
        # The session holds it until the last reply has arrived, or until the session has
        # ended.  This is much faster than an Event or a Future.
        self.arriving = threading.Lock()

    def results(self) -> list[Any]:
        """The replies as from decode_reply, in the order of the requests.  Waits for all of
        them; ConnectionLost if the session ends."""
        with self.arriving:  # waits for the replies
            if len(self.replies) < len(self.types):
                raise ConnectionLost(self._session.lost)
        return [self.replies[request_id] for request_id in self.types]

    def result(self) -> Any:
        """The only reply; SFTPError if it is a refusal, ConnectionLost."""
        (result,) = self.results()
        if isinstance(result, SFTPError):
            raise result
        return result


class Session:
    """One SFTP channel, shared by many threads.  Its own thread delivers the replies, and ends
    the session if the box owes one, but has sent nothing for SILENCE_LIMIT."""

    def __init__(self, channel: paramiko.Channel):
        """Exchanges versions; ConnectionLost if the box does not answer in SFTP."""
        self._channel = channel
        self._sending = threading.Lock()
        # Guards `_owed` and `lost`, and is never held while waiting for the box.
        self._lock = threading.Lock()
        # INIT and its reply have the version, which is 3, in the place of the id.
        self._ids = itertools.count(3)
        self._owed: dict[int, Batch] = {}  # by request id, oldest first
        self.lost: str | None = None  # the reason, once the session has ended
        self._unread = memoryview(b"")
        # The channel's own buffer copies every byte, which would take a third of the CPU time
        # of reading.  A queue passes the pieces on as they arrive; only the end is empty.
        pieces: Any = queue.SimpleQueue()
        channel.in_buffer = SimpleNamespace(
            feed=lambda data: data and pieces.put(data),
            read=lambda *_: pieces.get(timeout=SILENCE_LIMIT),
            close=lambda: pieces.put(b""),
        )
        channel.settimeout(SILENCE_LIMIT)  # for sending
        threading.Thread(target=self._receive, daemon=True).start()
        self.send((FXP_INIT,)).result()

    def send(self, *requests: Request) -> Batch:
        """Sends requests together, without waiting for the replies."""
        batch, packets = Batch(self), bytearray()
        with self._lock:
            for packet_type, *fields in requests:
                request_id = next(self._ids) & 0xFFFFFFFF
                batch.types[request_id] = packet_type
                payload = b"".join(map(encode, fields))
                packets += HEADER.pack(len(payload) + 5, packet_type, request_id) + payload
            if self.lost is not None:
                return batch  # whose `results` raises ConnectionLost
            batch.arriving.acquire()
            self._owed |= dict.fromkeys(batch.types, batch)
        try:
            with self._sending:
                self._channel.sendall(packets)
        except (OSError, EOFError, paramiko.SSHException) as error:
            self.close(f"sending failed: {str(error) or 'the connection was closed'}")
        return batch

    def close(self, reason: str) -> None:
        """Ends the session.  Threads that wait for a reply get ConnectionLost."""
        with self._lock:
            if self.lost is not None:
                return
            self.lost = reason
            owed, self._owed = self._owed, {}
        for batch in set(owed.values()):
            batch.arriving.release()
        self._channel.get_transport().close()

    def _receive(self) -> None:
        """Passes each reply to its batch, until the session ends."""
        try:
            while True:
                start = self._read(4)
                (size,) = U32.unpack(start)
                if not 5 <= size <= MAX_PACKET:
                    raise ConnectionLost(f"the box sent {bytes(start)!r}, not a reply")
                packet = self._read(size)
                (request_id,) = U32.unpack_from(packet, 1)
                batch = self._owed[request_id]
                batch.replies[request_id] = decode_reply(batch.types[request_id], packet)
                with self._lock:
                    del self._owed[request_id]  # KeyError if `close` has ended its batch
                if len(batch.replies) == len(batch.types):
                    batch.arriving.release()
        except ConnectionLost as error:
            self.close(str(error))
        except Exception as error:  # of any kind: no thread may wait for ever
            self.close(f"the box sent what is no reply to a request: {error!r}")

    def _read(self, size: int) -> memoryview:
        """The next `size` bytes from the box; ConnectionLost at the end, or if a reply is
        overdue."""
        pieces: list[memoryview] = []  # to be copied once: large files spend their time here
        while len(self._unread) < size:
            try:
                data = self._channel.recv(SSH_PACKET)
            except queue.Empty:
                with self._lock:
                    oldest = next(iter(self._owed.values()), None)
                if oldest and time.monotonic() - oldest.sent_at >= SILENCE_LIMIT:
                    raise ConnectionLost(f"the box was silent for {SILENCE_LIMIT} s") from None
                continue
            if not data:
                raise ConnectionLost("the box closed the connection")
            pieces.append(self._unread)
            size -= len(self._unread)
            self._unread = memoryview(data)
        pieces.append(self._unread[:size])
        self._unread = self._unread[size:]
        return memoryview(b"".join(pieces))


# ----------------------------------------------------------------------- Login

# The host keys of *.your-storagebox.de, the same for all boxes (Hetzner's page "SSH host
# keys"): ED25519 on port 23, RSA on port 22, ECDSA.
STORAGE_BOX_KEYS = (
    "SHA256:XqONwb1S0zuj5A1CDxpOSuD2hnAArV1A3wKY7Z3sdgM",
    "SHA256:EMlfI8GsRIfpVkoW1H2u0zYVpFGKkIMKHFZIRkf2ioI",
    "SHA256:oDHZqKXnoMtgvPBjjC57pcuFez28roaEuFcfwyg8O5c",
)
CONNECT_REMEDY = "check HETZNER_HOST and HETZNER_PORT (23 for SSH, or 22), and SSH support and"
CONNECT_REMEDY += " external reachability in Hetzner's console; a box allows 10 connections"
Keys = list[paramiko.PKey]


def connect(config: Config) -> Session:
    """A new session, logged in.  Fatal if another attempt cannot help (host key, login).
    Any other error, also one of a library, may be temporary."""
    sock = socket.create_connection((config.host, config.port), CONNECT_LIMIT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # requests are small
    transport = paramiko.Transport(sock, SSH_WINDOW, SSH_PACKET)
    # paramiko would wait for ever if the server froze while it starts the subsystem.
    watchdog = threading.Timer(CONNECT_LIMIT, transport.close)
    watchdog.start()
    try:
        known, revoked = known_host_keys(config)
        prefer_algorithms(transport.get_security_options(), {key.get_name() for key in known})
        transport.start_client(timeout=CONNECT_LIMIT)
        check_host_key(config, transport.get_remote_server_key(), known, revoked)
        log_in(config, transport)
        transport.set_keepalive(KEEPALIVE)
        channel = transport.open_session(timeout=CONNECT_LIMIT)
        channel.invoke_subsystem("sftp")
        return Session(channel)
    except Exception as error:
        transport.close()
        if isinstance(error, Fatal) and not watchdog.is_alive():
            raise ConnectionLost(str(error)) from None  # it was the watchdog that hung up
        raise
    finally:
        watchdog.cancel()


def known_host_name(config: Config) -> str:
    """The host and port as in known_hosts."""
    return config.host if config.port == 22 else f"[{config.host}]:{config.port}"


def known_host_keys(config: Config) -> tuple[Keys, Keys]:
    """The box's keys in known_hosts, and all keys that are revoked there, for any host.  Both
    are empty if there is no such file; Fatal if it cannot be read."""
    file, text = f"HETZNER_KNOWN_HOSTS {config.known_hosts}", ""
    with fatal_os_errors(file), contextlib.suppress(FileNotFoundError):
        text = config.known_hosts.read_text("utf-8", "replace")
    with_port, bare = known_host_name(config).lower(), config.host.lower()
    known, revoked = {with_port: Keys(), bare: Keys()}, Keys()
    for line in map(str.strip, text.split("\n")):
        # HostKeys.load() stops at a line that it does not know, and keeps one key per type.
        with contextlib.suppress(Exception):
            patterns, kind, encoded, *_ = line.removeprefix("@revoked").split()
            key = paramiko.PKey.from_type_string(kind, base64.b64decode(encoded))
            if line.startswith("@revoked"):
                revoked.append(key)
            elif not line.startswith("#"):
                for name in filter(partial(matches_host, patterns), known):
                    known[name].append(key)
    # A line for the bare host counts only if no line names this port.
    return known[with_port] or known[bare], revoked


def matches_host(patterns: str, name: str) -> bool:
    """Whether a line of known_hosts with these patterns is about the host.  A pattern may be
    a hash, have wildcards, or exclude hosts with a ! (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""

    def matches(pattern: str) -> bool:
        if pattern.startswith("|1|"):
            return bool(paramiko.HostKeys.hash_host(name, pattern) == pattern)
        literal = pattern.lower().replace("[", "[[]")  # [host]:23 is no set of characters
        return fnmatch.fnmatchcase(name, literal)

    excluded = [pattern[1:] for pattern in patterns.split(",") if pattern.startswith("!")]
    return any(map(matches, patterns.split(","))) and not any(map(matches, excluded))


def prefer_algorithms(options: paramiko.SecurityOptions, types: set[str]) -> None:
    """Prefers AES-GCM, by far the fastest cipher, and the host keys of these `types`, which are
    known: the server shows only one of its keys."""
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    if "ssh-rsa" in types:
        types |= {"rsa-sha2-512", "rsa-sha2-256"}
    options.key_types = sorted(options.key_types, key=lambda name: name not in types)


def check_host_key(config: Config, key: paramiko.PKey, known: Keys, revoked: Keys) -> None:
    """Fatal unless `key` is known for the box.  No credential has been sent yet."""
    subject = f"{config.host}:{config.port} has the host key {key.get_name()} {key.fingerprint}"
    path = shlex.quote(str(config.known_hosts))
    if key in revoked:
        raise Fatal(f"{subject}, which is revoked in HETZNER_KNOWN_HOSTS {path}")
    is_storage_box = config.host.lower().endswith(".your-storagebox.de")
    if key in known or (is_storage_box and key.fingerprint in STORAGE_BOX_KEYS):
        return
    name = known_host_name(config)
    if known:
        expected = ", ".join(other.fingerprint for other in known)
        raise Fatal(
            f"{subject}, not {expected} as in HETZNER_KNOWN_HOSTS: it has changed, or somebody "
            "is intercepting the connection; only if you know that the change is right, remove "
            f"the old key: ssh-keygen -R {shlex.quote(name)} -f {path} (or -R {config.host})"
        )
    # The key that was seen.  ssh-keyscan would ask again, and could get another one.
    raise Fatal(
        f"{subject}, which is not in HETZNER_KNOWN_HOSTS; if that is its fingerprint, accept "
        f"it with: mkdir -p {shlex.quote(str(config.known_hosts.parent))} && "
        f"printf '\\n%s\\n' '{name} {key.get_name()} {key.get_base64()}' >> {path}"
    )


def log_in(config: Config, transport: paramiko.Transport) -> None:
    """Logs in with the key file and the password if they are set, else with the SSH agent.
    Fatal if the box accepts none of them, or hangs up."""
    attempts: list[tuple[str, Callable[[str, Any], list[str]], object]] = []
    if config.key_file:
        key = load_private_key(config.key_file, config.key_passphrase)
        attempts.append((f"HETZNER_KEY_FILE {config.key_file}", transport.auth_publickey, key))
    if config.password:
        # paramiko also answers keyboard-interactive with it, if the box offers only that.
        attempts.append(("HETZNER_PASSWORD", transport.auth_password, config.password))
    if not attempts:
        listing = ThreadPoolExecutor(1).submit(lambda: paramiko.Agent().get_keys())
        # paramiko would wait for ever.  This ends before the watchdog hangs up.
        if not wait([listing], CONNECT_LIMIT / 2).done:
            raise Fatal("the SSH agent does not answer: restart it, or set HETZNER_KEY_FILE")
        keys = listing.result()
        name = f"the SSH agent's keys ({len(keys)})"
        attempts = [(name, transport.auth_publickey, key) for key in keys]
    tried = " and ".join(dict.fromkeys(name for name, *_ in attempts)) or "no key"
    message = f"the login of {config.user} with {tried}: correct HETZNER_USER or these"
    if config.key_file or not config.password:  # a key was tried
        message += "; a box takes a public key in RFC 4716 form (ssh-keygen -e) on port 22, in "
        message += f"OpenSSH's on port 23: HETZNER_PORT is {config.port}"
    for name, authenticate, credential in attempts:
        with contextlib.suppress(paramiko.AuthenticationException):
            if others := authenticate(config.user, credential):
                message += f"; {name} was right, but {' or '.join(others)} is wanted as well"
        if transport.is_authenticated():
            return
        if not transport.is_active():  # no new connection: the box might ban this machine
            break
    answer = "refused" if transport.is_active() else "hung up at"
    raise Fatal(f"{config.host}:{config.port} {answer} {message}")


def load_private_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """The key in `path`, in OpenSSH's or any PEM form: paramiko does not read PKCS#8, and would
    also read a certificate beside the key, which may have expired.  Fatal."""
    secret = passphrase.encode() if passphrase else None
    try:
        text = path.read_bytes()
        load: Callable[..., Any] = serialization.load_pem_private_key
        if b"BEGIN OPENSSH" in text:
            load = serialization.load_ssh_private_key
        key = load(text, secret)
        form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
        pem = key.private_bytes(*form, serialization.NoEncryption()).decode()
        for key_class in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
            with contextlib.suppress(paramiko.SSHException):
                return key_class.from_private_key(io.StringIO(pem))
        raise ValueError("no type of key that SSH uses")
    except (OSError, TypeError, ValueError, UnsupportedAlgorithm) as error:
        remedy = "it has to be a private key in OpenSSH's or PEM form (puttygen exports it)"
        remedy += ", and HETZNER_KEY_PASSPHRASE its passphrase, or not set if it has none"
        raise Fatal(f"HETZNER_KEY_FILE {path}: {error}; {remedy}") from None


# ----------------------------------------------------------------- Storage Box


class StorageBox:
    """The box.  All threads share one session, which is replaced when it is lost."""

    def __init__(self, config: Config, stopping: StopEvent, retries: bool = True):
        self._config, self.stopping = config, stopping
        self._pauses = RECONNECT_PAUSES if retries else (0,)
        self._alone_lock = threading.RLock()  # held while no other operation may begin
        self._pace_lock = threading.Lock()
        self._session: Session | None = None
        self._given_up: Fatal | None = None

    def close(self) -> None:
        """Ends the session for good.  Threads that use the box get Stopped."""
        self.stopping.set()
        if self._session is not None:
            self._session.close("stopped")

    def session(self) -> Session:
        """The session, a new one if it was lost.  One thread connects while the others wait.
        Fatal if the first login is refused, or once all attempts have failed; Stopped."""
        with self._alone_lock:
            self.stopping.check()
            if self._given_up is not None:
                raise self._given_up
            if self._session is None or self._session.lost is not None:
                self._session = self._connect()
            self.stopping.check()  # `close` may not have seen this session
            return self._session

    def pace(self, size: int) -> None:
        """Waits as long as `size` bytes take within BANDWIDTH_LIMIT, one thread at a time."""
        if limit := self._config.bandwidth_limit:
            with self._pace_lock:
                self.stopping.wait(size / limit)

    def _connect(self) -> Session:
        """A new session, after one attempt for each of `_pauses` at most.  Fatal, Stopped."""
        reason = self._session.lost if self._session else None  # why the last one ended
        remedy = ""
        for pause in self._pauses:
            if reason:
                log.warning("no connection: %s; connecting again in %s s", reason, pause)
            self.stopping.wait(pause)
            self.stopping.check()
            try:
                return connect(self._config)
            except Exception as error:  # paramiko raises whatever its thread met
                if isinstance(error, Fatal) and self._session is None:
                    raise  # a login that has never worked
                reason = str(error) or "the connection was closed"
                remedy = "" if isinstance(error, Fatal) else f"; {CONNECT_REMEDY}"
        attempts = f"{self._config.host}:{self._config.port} (attempts: {len(self._pauses)})"
        self._given_up = Fatal(f"no SFTP session with {attempts}: {reason}{remedy}")
        raise self._given_up

    def retry(self, operation: Callable[[Session], T], session: Session | None = None) -> T:
        """The result of operation(session).  It is called again if the session is lost, or if
        the server answers FAILURE: it may have too many files open.  After SHARED_TRIES, no
        other operation may begin, so that a file which breaks each connection does not make
        others fail.  A FileReader passes the `session` in which its file is open, and need not
        wait: an operation that is tried alone may need this file to be closed first.  After
        TRIES, FileError (LOST) or the SFTPError."""
        with contextlib.ExitStack() as stack:
            for attempt in range(1, TRIES + 1):
                if attempt == SHARED_TRIES + 1:  # until the end of the block
                    stack.enter_context(self._alone_lock)
                if session is None or session.lost is not None:
                    session = self.session()
                try:
                    return operation(session)
                except ConnectionLost as error:
                    reason = error
                except SFTPError as error:
                    if error.sftp_code != FX_FAILURE or attempt == TRIES:
                        raise
                    self.stopping.wait(FAILURE_PAUSE)
                    session = None  # the next try waits while another operation is tried alone
        raise FileError(f"lost the connection, tried {TRIES} times: {reason}", LOST)

    def list_folder(self, path: bytes, limit: float = math.inf) -> list[Entry] | None:
        """A folder's entries, sorted by name; None if more may follow after `limit` of them.
        FileError, with the code VANISHED if the folder is gone."""
        try:
            return self.retry(lambda session: read_folder(session, path, limit))
        except SFTPError as error:
            self.retry(lambda s: s.send((FXP_LSTAT, path)).result())  # VANISHED if it is gone
            raise FileError(str(error)) from None  # no code: a missing "." is VANISHED

    def space(self) -> tuple[Size, Size] | None:
        """Bytes used and free on the file system of REMOTE_PATH; None if the server does not
        say (statvfs@openssh.com)."""
        request = (FXP_EXTENDED, b"statvfs@openssh.com", self._config.remote_path)
        (reply,) = self.retry(lambda session: session.send(request).results())
        if isinstance(reply, SFTPError) or len(reply) < 88:
            return None
        _, block_size, blocks, free, available, *_ = struct.unpack_from(">11Q", reply)
        return Size((blocks - free) * block_size), Size(available * block_size)


class FileReader:
    """Reads a file on the box once, from an offset to its end.

    s3transfer would take an early end for a shorter file, so this class makes sure that
    every byte has arrived.  It reads READ_WINDOW ahead.  After a short reply, or in a new
    session, it opens the file again and continues at its offset.  `read` raises FileError if
    the file no longer has the size and mtime that it had when it was first opened: FSTAT
    shows whether it was changed, LSTAT whether another file was renamed over it.

    A small file takes two round trips: OPEN and LSTAT; then READs, FSTAT, LSTAT and CLOSE.
    """

    def __init__(self, box: StorageBox, listed: RemoteFile, offset: int = 0):
        """Opens the file; FileError, also if it has grown by more than MAX_GROWTH since it
        was listed, because no memory is reserved for that."""
        self._box, self._path, self._began = box, listed.path, time.time()
        self._offset = offset  # of the next byte to receive
        self._pieces = deque[memoryview]()  # received, and not yet returned by `read`
        self._batches = deque[tuple[Batch, range]]()  # under way, with the READs' offsets
        self._read_size = READ_SIZE
        self._handle = b""  # of `_session`; empty once its CLOSE has been sent
        try:
            self.file = box.retry(self._open)
            if self.file.size > listed.size + MAX_GROWTH:
                sizes = f"{listed.size:,} bytes when it was listed, now {self.file.size:,}"
                raise FileError(f"changed: {sizes}")
            if self.file.size == offset == 0:  # check that it is empty: `read` sends nothing
                box.retry(self._fetch, self._session)
        except FileError:
            self.close()
            raise

    @property
    def final_mtime(self) -> int | None:
        """The file's mtime; None if it was modified since it was opened, or within RECENT
        before: another change could keep its size and mtime.  An mtime that is further in the
        future is returned: else such a file would be compared every night."""
        is_recent = self._began - RECENT <= self.file.mtime <= time.time() + RECENT
        return None if is_recent else self.file.mtime

    def read(self, amount: int = -1) -> bytes:
        """The next `amount` bytes, fewer at the end; all if negative; FileError, Stopped."""
        left = self.file.size - self._offset + sum(map(len, self._pieces))
        amount = left if amount < 0 else min(amount, left)
        if missing := amount:
            self._box.stopping.check()
        data = io.BytesIO(bytes(amount))  # getvalue() copies nothing, join() would
        while missing:
            if not self._pieces:
                self._pieces = self._box.retry(self._fetch, self._session)
            piece = self._pieces.popleft()
            if len(piece) > missing:
                self._pieces.appendleft(piece[missing:])
            missing -= data.write(piece[:missing])
        return data.getvalue()

    def close(self) -> None:
        """Releases the file; does not wait."""
        if self._handle:
            self._session.send((FXP_CLOSE, self._handle))
        self._handle = b""

    def _open(self, session: Session) -> RemoteFile:
        """Opens the file in this session, and returns it as LSTAT describes it."""
        self.close()
        requests = (FXP_OPEN, self._path, FOR_READING, NO_ATTRIBUTES), (FXP_LSTAT, self._path)
        handle, found = session.send(*requests).results()
        if isinstance(handle, SFTPError):
            raise found if isinstance(found, SFTPError) else handle
        self._session, self._handle = session, handle
        self._batches.clear()
        # READs are sent up to `_requested`; the next batch to arrive begins at `_next_start`.
        self._requested = self._next_start = self._offset
        return self._file_now(found)

    def _fetch(self, session: Session) -> deque[memoryview]:
        """The bytes of the next batch."""
        # If a reply was short or a refusal, the batches after it would leave a gap.
        if session is not self._session or self._offset != self._next_start:
            self._open(session)
        self.read_ahead()
        batch, offsets = self._batches.popleft()
        self._next_start = offsets.stop
        return self._unpack(batch, offsets)

    def read_ahead(self) -> None:
        """Requests up to READ_WINDOW bytes, without waiting; `read` does this as well."""
        while self._handle and self._requested < self._offset + READ_WINDOW:
            end = min(self.file.size, self._requested + READS_PER_BATCH * self._read_size)
            self._batches.append(self._request(self._requested, end))
            self._requested = end

    def _unpack(self, batch: Batch, offsets: range) -> deque[memoryview]:
        """The bytes from READs at these offsets, up to the first short reply.  FileError if the
        file has changed."""
        *reads, fstat, lstat = batch.results()[: len(offsets) + 2]  # without CLOSE's reply
        for now in map(self._file_now, (lstat, fstat)):  # LSTAT first: it may be VANISHED
            if now != self.file:
                both = f"{self.file.size:,} bytes of mtime {self.file.mtime}"
                both += f", then {now.size:,} of {now.mtime}"
                raise FileError(f"changed while it was read: {both}", CHANGED)
        pieces = deque[memoryview]()
        for at, reply in zip(offsets, reads):
            if isinstance(reply, SFTPError) and reply.sftp_code != FX_EOF:
                raise reply
            data = memoryview(b"") if isinstance(reply, SFTPError) else reply
            due = min(offsets.step, self.file.size - at)
            if len(data) > due:
                raise FileError(f"has more than {self.file.size:,} bytes, its size on the box")
            if due and not data:
                raise FileError(f"ended at {at:,} of {self.file.size:,} bytes", CHANGED)
            pieces.append(data)
            if len(data) < due:  # perhaps the most that the box sends: request no more
                self._read_size = max(len(data), MIN_READ_SIZE)
                break
        # Last: after an error, the next try begins where this one did.
        self._offset = at + len(data)
        return pieces

    def _request(self, begin: int, end: int) -> tuple[Batch, range]:
        """Sends READs of these bytes, and the requests that show whether the file has changed
        by then; after the last byte a CLOSE, too.  Returns also the offsets of the READs."""
        handle, is_last = self._handle, end == self.file.size
        # One more byte at the end, also of an empty file: the size may be too small.
        offsets = range(begin, end + is_last, self._read_size)
        requests: list[Request] = []
        for at in offsets:
            length = min(offsets.step, offsets.stop - at)
            requests.append((FXP_READ, handle, *divmod(at, 1 << 32), length))
        requests += [(FXP_FSTAT, handle), (FXP_LSTAT, self._path)]
        if is_last:
            requests.append((FXP_CLOSE, handle))
            self._handle = b""
        self._box.pace(end - begin)
        return self._session.send(*requests), offsets

    def _file_now(self, reply: Attributes | SFTPError) -> RemoteFile:
        """The file with the size and mtime of the reply to an LSTAT or FSTAT; FileError."""
        if isinstance(reply, SFTPError):
            raise reply
        if reply.size is None or reply.mtime is None:
            raise FileError("the box does not tell its size and time")
        if not stat.S_ISREG(reply.mode or stat.S_IFREG):  # an empty folder may have 0 bytes
            raise FileError("changed: it is no file any more", CHANGED)
        return RemoteFile(self._path, reply.size, reply.mtime)


def read_folder(session: Session, path: bytes, limit: float) -> list[Entry] | None:
    """As StorageBox.list_folder, with several READDIRs at a time.  SFTPError if the folder
    cannot be read, FileError if it has no end, ConnectionLost."""
    handle = session.send((FXP_OPENDIR, path)).result()
    names: dict[bytes, Attributes] = {}  # a name may come twice while the folder changes
    count, refusals = FIRST_READDIRS, list[SFTPError]()
    try:
        while not refusals:
            before = len(names)
            results = session.send(*[(FXP_READDIR, handle)] * count).results()
            refusals = [result for result in results if isinstance(result, SFTPError)]
            names.update(itertools.chain(*(r for r in results if r not in refusals)))
            if not refusals and len(names) == before:  # only names that it has sent before
                raise FileError("the box sent a listing that does not end")
            if not refusals and len(names) >= limit:
                return None
            count = min(2 * count, 8 * FIRST_READDIRS)
    finally:
        session.send((FXP_CLOSE, handle))  # not waited for
    if refusals[0].sftp_code != FX_EOF:  # what is refused after the end does not matter
        raise refusals[0]
    if not names:  # not even "."; OpenSSH lists nothing of a folder that lacks the x permission
        session.send((FXP_LSTAT, join(path, b"."))).result()  # refused then
    return sorted(entry for entry in names.items() if entry[0] not in (b".", b".."))


nfc = partial(unicodedata.normalize, "NFC")


class Exclusions:
    """The items of EXCLUDE_PATHS.  Each excludes an entry and everything below it.  It is a
    path or a glob of `*` and `?`, which also match slashes, relative to REMOTE_PATH even if it
    begins with a slash; REMOTE_PATH itself may stand before it.  Paths are compared in
    Unicode's NFC form."""

    def __init__(self, config: Config):
        self._root = config.remote_path
        start = join(self._root, b"").decode("utf-8", "surrogateescape")
        # The items that have matched nothing yet, with their paths on the box and patterns.
        self.unmatched: dict[str, tuple[bytes, re.Pattern[str]]] = {}
        for item in (*config.exclude, *config.exclude_dirs):
            path = nfc(item.rstrip("/").removeprefix(start).removeprefix("./").lstrip("/"))
            # fnmatch would take the brackets of `Photos [2019]` for a set of characters.
            glob = path.replace("[", "[[]")
            globs = {glob, glob.removeprefix("**/")}  # **/ may stand for no folder
            place = join(self._root, path.encode("utf-8", "surrogateescape"))
            self.unmatched[item] = place, re.compile("|".join(map(fnmatch.translate, globs)))
        patterns = [pattern.pattern for _, pattern in self.unmatched.values()]
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def match(self, path: bytes) -> bool:
        """Whether `path` is excluded.  Items that match it are `unmatched` no longer."""
        if self._pattern is None:
            return False
        text = nfc(relative_path(self._root, path).decode("utf-8", "surrogateescape"))
        if not self._pattern.fullmatch(text):  # several times faster than one by one
            return False
        for item in [i for i, (_, one) in self.unmatched.items() if one.fullmatch(text)]:
            del self.unmatched[item]
        return True


# ----------------------------------------------------------------------- State

STATE_VERSION = 5  # SQLite's user_version of a database that has these tables
SCHEMA = """
CREATE TABLE files  -- mtime: NULL if the file has to be compared
    (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, uploaded_at INTEGER);
CREATE TABLE objects (path TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, etag TEXT,
    crc32 INTEGER, storage_class TEXT) WITHOUT ROWID;
CREATE TABLE uploads  -- see Upload: those in parts that are begun or due, and not completed
    (key TEXT PRIMARY KEY, path TEXT NOT NULL, size INTEGER NOT NULL, mtime INTEGER,
    part_size INTEGER NOT NULL, settings TEXT NOT NULL, upload_id TEXT) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);  -- see State._check_pins
CREATE TABLE runs  -- one that was killed has only its start, `spent` is in USD
    (started_at INTEGER PRIMARY KEY, ended_at INTEGER, status INTEGER,
    uploaded INTEGER, skipped INTEGER, failed INTEGER, bytes INTEGER, spent REAL);
CREATE TABLE gone (path TEXT PRIMARY KEY) WITHOUT ROWID;  -- see State.is_known_gone
"""
SOURCE_PINS = ("HETZNER_USER", "REMOTE_PATH")  # pins: settings that the state belongs to
PATHS = "(SELECT value FROM json_each(?))"  # many paths as one parameter, a JSON list
# A journal that was deleted may come back after a power loss, and undo what was committed.
DURABLE_COMMITS = "PRAGMA journal_mode = TRUNCATE"

# Whether S3 lets an object be read: one in a cold class has to be restored first.
READABLE, COLD, RESTORING, RESTORED = "readable", "cold", "restoring", "restored"


class StoredObject(NamedTuple):
    """What S3 says about an object."""

    key: str
    size: int
    uploaded_at: int  # seconds since the epoch; S3 dates an upload in parts by its beginning
    mtime: int  # from the metadata of a HEAD or GET, if it is there; else `uploaded_at`
    storage_class: str
    etag: str  # empty if S3 has sent none, or in a Record if it is not known
    crc32: int | None = None  # of the whole object; None if it is not known
    thaw_state: str = READABLE  # known only from a listing
    version_id: str | None = None  # None in a row, or in a listing of current objects


class Record(NamedTuple):
    """A row: what the state knows about a file.  In `stored`, the etag is empty if nothing is
    known about the content; the crc32 is of what a run has read, or from a HEAD."""

    path: str  # as in the path column
    mtime: int | None  # the file's; None if the file has to be compared
    stored: StoredObject


@dataclass
class Count:
    files: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.files:,} ({format_size(self.bytes)})"


class Counts(dict[str, Count]):
    """By storage class, or by a label of a table."""

    def add(self, name: str, size: int, files: int = 1) -> None:
        count = self.setdefault(name, Count())
        count.files, count.bytes = count.files + files, count.bytes + size

    def total(self) -> Count:
        return Count(sum(c.files for c in self.values()), sum(c.bytes for c in self.values()))


@contextlib.contextmanager
def state_errors(path: Path) -> Iterator[None]:
    """Turns an sqlite3.Error into Fatal."""
    try:
        yield
    except sqlite3.Error as error:
        remedy = "repair it, or move it away: the next run makes one from the bucket's listing"
        if isinstance(error, sqlite3.OperationalError):  # the database is not damaged
            remedy = "check its permissions, the room on its disk and in the folder for "
            remedy += "temporary files (TMPDIR), and the number of open files"
        raise Fatal(f"the state database {path} cannot be used: {error}; {remedy}") from None


def in_transaction(method: Callable[..., None]) -> Callable[..., None]:
    """A method of State whose statements are committed together, or not at all.  (In a context
    manager written in Python, a signal before the block would leave the transaction open.)"""

    def call(self: State, *values: Any) -> None:
        with state_errors(self._path), self._db:  # which commits or rolls back
            self._db.execute("BEGIN IMMEDIATE")
            method(self, *values)

    return call


class State:
    """The state database, for one thread.  Methods raise Fatal, and commit what they write."""

    def __init__(self, config: Config, new_source: bool = False, copy: bool = False):
        """Opens the database, or makes it.  With `copy`, it opens a temporary copy instead,
        which is empty if there is no database; changes are lost.  With `new_source`, it forgets
        all files, and the bucket's listing is taken over again.  Fatal if the state belongs to
        another destination, or without `new_source` to another source."""
        self._path = path = config.state_db
        self._default_class = config.storage_class  # of a row whose object is not known
        # With other settings than these, files would count as archived that are not.
        self._pins = {
            "S3_BUCKET": config.bucket,
            "S3_PREFIX": config.prefix,
            "HETZNER_USER": config.user,
            "REMOTE_PATH": path_text(config.remote_path),
        }
        self._open = partial(sqlite3.connect, timeout=LOCKED_LIMIT, isolation_level=None)
        with state_errors(path):
            if not copy:
                create_private(path)
            # "" is a temporary database, which SQLite deletes when it is closed.
            self._db = self._open("" if copy and not path.exists() else path)
            (fault,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
            if fault != "ok":
                raise sqlite3.DatabaseError(fault)
            if copy:
                with contextlib.closing(self._db) as source:
                    self._db = self._open("")
                    source.backup(self._db)
            self._db.row_factory = sqlite3.Row
            self._db.execute(DURABLE_COMMITS)
            self._db.execute("PRAGMA synchronous = FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > STATE_VERSION:
                raise Fatal(f"the state database {path} is of a newer archive.py: use that one")
            tables = {name for (name,) in self._execute("SELECT name FROM sqlite_master")}
            if "meta" in tables:
                self._check_pins(SOURCE_PINS if new_source else ())
            if version < STATE_VERSION:
                self._make_tables(tables)
            self._db.execute("CREATE TEMP TABLE seen (path TEXT PRIMARY KEY) WITHOUT ROWID")
        if new_source:
            self._forget_source()

    @in_transaction
    def _make_tables(self, tables: set[str]) -> None:
        """Makes the tables.  An earlier script's rows of files, whose columns may have other
        types, are kept for `take_over`.  Of an earlier version of this program, which had a
        table `meta`, uploads are kept, to be aborted; its rows of files are too uncertain."""
        kept = rows = ""
        if "meta" in tables:
            kept, rows = "uploads", "SELECT key, '', 0, NULL, 0, '', NULL FROM uploads"
        elif "files" in tables:
            kept, rows = "files", "SELECT path, size, mtime, NULL FROM files WHERE typeof(path)"
            rows += " = 'text' AND typeof(size) = 'integer' AND typeof(mtime) = 'integer'"
        if kept:
            self._execute(f"CREATE TEMP TABLE kept AS {rows}")
        old = {"files", "objects", "recheck", "replacing", "uploads", "meta", "runs", "gone"}
        for table in tables & old:
            self._execute(f"DROP TABLE {table}")
        for statement in SCHEMA.split(";"):
            self._execute(statement)
        if kept:
            self._execute(f"INSERT OR REPLACE INTO {kept} SELECT * FROM kept")
        self._execute(f"PRAGMA user_version = {STATE_VERSION}")

    def _execute(self, statement: str, *values: Any) -> list[Any]:
        """The rows that the statement returns.  Outside `in_transaction`, it is committed."""
        with state_errors(self._path):
            return self._db.execute(statement, values).fetchall()

    def close(self) -> None:
        self._execute("PRAGMA busy_timeout = 0")  # another program may have locked the state
        self._execute("PRAGMA journal_mode = DELETE")  # deletes the journal, which is empty
        self._db.close()

    # Source and destination

    @property
    def is_new(self) -> bool:
        """Whether the state still has to be made from the bucket's listing."""
        return not self._execute("SELECT 1 FROM meta WHERE name = 'S3_BUCKET'")

    def _check_pins(self, ignored: tuple[str, ...]) -> None:
        """Fatal if a setting, except those `ignored`, is not the one the state belongs to."""
        known = dict(self._execute("SELECT name, value FROM meta"))
        for name, value in self._pins.items():
            if name not in ignored and known.get(name, value) != value:
                pinned, wanted = known[name] or "(empty)", value or "(empty)"
                remedy = "give the other one a STATE_DB and S3_PREFIX of its own"
                if name in SOURCE_PINS:
                    remedy += ", or, if it has the same files, run with --new-source"
                reason = f"the state belongs to {name}={pinned}, but the setting is {wanted}"
                raise Fatal(f"{reason}: set it back, or {remedy}")

    @in_transaction
    def _forget_source(self) -> None:
        """Deletes all rows of files and the pins: the state `is_new` then.  Unfinished
        uploads may have parts of the old source's files, and are not continued."""
        self._execute("UPDATE uploads SET mtime = NULL")
        for table in ("files", "objects", "meta", "gone"):
            self._execute(f"DELETE FROM {table}")

    # Files

    def unrecorded(self, files: list[RemoteFile]) -> list[RemoteFile]:
        """Those of `files` that have no row with their size and mtime."""
        query = f"SELECT path, size, mtime FROM files WHERE path IN {PATHS}"
        paths = [path_text(file.path) for file in files]
        known = {tuple(row) for row in self._execute(query, json.dumps(paths))}
        return [f for path, f in zip(paths, files) if (path, f.size, f.mtime) not in known]

    def find(self, paths: Iterable[str]) -> dict[str, Record]:
        """The records of these paths, as far as there are any."""
        records = self._records(f"path IN {PATHS}", json.dumps([*paths]))
        return {record.path: record for record in records}

    def _records(self, condition: str, *values: str) -> Iterator[Record]:
        query = (  # from `key` on, the fields of StoredObject in their order
            "SELECT path, mtime, key, size, coalesce(uploaded_at, 0), coalesce(uploaded_at, 0),"
            " coalesce(storage_class, ?), coalesce(etag, ''), crc32"
            f" FROM files LEFT JOIN objects USING (path) WHERE {condition}"
        )
        with state_errors(self._path):
            for path, mtime, *stored in self._db.execute(query, (self._default_class, *values)):
                yield Record(path, mtime, StoredObject(*stored))

    def note_upload(self, upload: Upload) -> None:
        """Notes an upload before its first part is sent; for any thread.  One without an id
        has no part: the next run uploads the file from its start, and does not compare it
        first."""
        insert = "INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?)"
        with state_errors(self._path), contextlib.closing(self._open(self._path)) as db:
            db.execute(DURABLE_COMMITS)
            db.execute(insert, upload[:-1])  # without its parts

    @in_transaction
    def doubt(self, paths: list[str]) -> None:
        """Notes that new versions of these files may be sent.  S3 may store one, and its answer
        get lost.  So nothing is known about the content until S3 has acknowledged it."""
        for change in ("files SET mtime = NULL", "objects SET etag = NULL, crc32 = NULL"):
            self._execute(f"UPDATE {change} WHERE path IN {PATHS}", json.dumps(paths))

    @in_transaction
    def record(self, records: Iterable[Record]) -> None:
        """Commits files that S3 has acknowledged, or was found to hold already.  The
        invariant depends on this method, which must be called only with such files."""
        for record in records:
            self._store(record)
            self.forget_upload(record.stored.key)

    def _store(self, record: Record) -> None:
        path, mtime, found = record
        file_row = (path, found.size, mtime, found.uploaded_at)
        object_row = (path, found.key, found.etag or None, found.crc32, found.storage_class)
        self._execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", *file_row)
        self._execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)", *object_row)

    def uploads(self) -> dict[str, Upload]:
        """The noted uploads by key."""
        return {row["key"]: Upload(*row) for row in self._execute("SELECT * FROM uploads")}

    def forget_upload(self, key: str) -> None:
        self._execute("DELETE FROM uploads WHERE key = ?", key)

    @in_transaction
    def note_seen(self, paths: Iterable[str], updates: Iterable[Record] = ()) -> None:
        """Notes that these files are on the box, or their objects in the bucket.  Stores the
        `updates` in place of earlier records."""
        self._db.executemany("INSERT OR IGNORE INTO temp.seen VALUES (?)", zip(paths))
        for record in updates:
            self._store(record)

    def unseen(self) -> Iterator[Record]:
        return self._records("path NOT IN (SELECT path FROM temp.seen)")

    @in_transaction
    def end_listing(self) -> None:
        """Deletes the rows of `unseen`, forgets what was seen, and notes which source and
        destination the state belongs to: from now on it is not new."""
        for table in ("files", "objects"):
            self._execute(f"DELETE FROM {table} WHERE path NOT IN (SELECT path FROM temp.seen)")
        self._execute("DELETE FROM temp.seen")
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", self._pins.items())

    def is_known_gone(self, path: str) -> bool:
        """Whether this file was gone already when MAX_CHANGED last let a run go on."""
        return bool(self._execute("SELECT 1 FROM gone WHERE path = ?", path))

    @in_transaction
    def note_gone(self, paths: Iterable[str]) -> None:
        """Makes `is_known_gone` true for these paths, and false for files that were seen."""
        self._execute("DELETE FROM gone WHERE path IN (SELECT path FROM temp.seen)")
        self._db.executemany("INSERT OR IGNORE INTO gone VALUES (?)", zip(paths))

    def archived(self) -> Counts:
        """The archived files by storage class."""
        query = "SELECT coalesce(storage_class, ?), count(*), sum(size)"
        query += " FROM files LEFT JOIN objects USING (path) GROUP BY 1 ORDER BY 2 DESC"
        rows = self._execute(query, self._default_class)
        return Counts({name: Count(files, size) for name, files, size in rows})

    def record_run(self, started_at: int, *ended: object) -> None:
        """Adds the row of a run, which shows that the state is writable.  At its end, replaces
        it: `ended` are the values of all other columns."""
        values = started_at, *(ended or [None] * 7)
        self._execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *values)

    def past_runs(self) -> list[sqlite3.Row]:
        """Rows of `runs`, the latest first."""
        return self._execute("SELECT * FROM runs ORDER BY started_at DESC")


def create_private(path: Path) -> None:
    """Creates the file if it is missing, readable only by its owner: it has names in it."""
    with contextlib.suppress(OSError):  # the caller opens the file next, and gets the error
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


@contextlib.contextmanager
def locked(config: Config, suffix: str = ".lock") -> Iterator[None]:
    """Holds a lock beside the state; Fatal with status 11 if another process has it.  The
    lock is a writer's transaction on an empty database: this works on every system, and the
    lock is free again when its process ends, even if that is killed."""
    path = config.state_db.with_name(config.state_db.name + suffix)
    can_read = False
    try:
        create_private(path)
        db = sqlite3.connect(path, timeout=0, isolation_level=None)
        # Fails on a file system without locks, but not while another run holds the lock.
        db.execute("SELECT 1 FROM sqlite_master")
        can_read = True
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        if can_read and "locked" in str(error):
            raise Fatal(f"another run or restore holds {path}", status=LOCKED) from None
        remedy = "check its permissions and its folder's; if a network share has no locks, put "
        remedy += "STATE_DB on a local disk; or an earlier archive.py is still at work"
        raise Fatal(f"the lock {path} cannot be taken: {error}; {remedy}") from None
    with contextlib.closing(db):
        yield


# ---------------------------------------------------------------------- Bucket

REMEDIES = {  # by error code, for refusals that nearly every request would meet
    DENIED: "the credentials may not do this: see the README's IAM policy",
    "NoSuchBucket": "create the bucket, or correct S3_BUCKET",
    "PermanentRedirect": "set AWS_REGION to {region}",
    "AuthorizationHeaderMalformed": "set AWS_REGION to {region}, or correct AWS_ACCESS_KEY_ID",
    "IllegalLocationConstraintException": "set AWS_REGION to {region}",
    "RequestTimeTooSkewed": "set this machine's clock",
    "ExpiredToken": "renew the credentials",
    "InvalidToken": "renew the credentials",
    "InvalidAccessKeyId": "correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "correct AWS_SECRET_ACCESS_KEY",
    "400": "perhaps the credentials have expired, or S3_EXTRA_ARGS lacks the SSE-C key",
}
# A refusal without a code, like that of every HEAD, has its HTTP status as code, as 400 above.
HEAD_CODES = {"403": DENIED, "301": "PermanentRedirect"}
# Errors that are worth a retry: a body that was cut off or damaged on its way, a conflict
# with another request, and an overload or defect of a server or proxy.
TRANSIENT_CODES = ["IncompleteBody", "BadDigest", "OperationAborted", "RequestTimeout"]
TRANSIENT_CODES += ["XAmzContentSHA256Mismatch", "ThrottlingException"]  # the last by KMS
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504, *range(520, 528))

# The requests that a run counts, with their kinds in Prices.requests; retries do not count.
COUNTED = {"put_object": "put", "create_multipart_upload": "create", "upload_part": "part"}
COUNTED |= {"complete_multipart_upload": "complete", "head_object": "head"}
COUNTED |= {"list_objects_v2": "list", "list_parts": "list", "list_multipart_uploads": "list"}

# An answer without its entry in REQUIRED, or a listing with nothing of LISTING, was cut off
# within its headers, or is not S3's.  Some servers leave out one or two of LISTING.
REQUIRED = {"create_multipart_upload": "UploadId", "upload_part": "ETag"}
REQUIRED |= {"head_object": "ContentLength", "get_object": "ContentLength"}
LISTING = {"IsTruncated", "Name", "Bucket"}

Read = Callable[[int], bytes]  # the next bytes of a file, as FileReader.read
Hook = Callable[[int], None]  # is called with a number of bytes, on any thread


@contextlib.contextmanager
def s3_errors() -> Iterator[None]:
    """Turns the errors of boto3 into FileError, or into Fatal if every request would fail.
    With the code UNAVAILABLE, the same request may succeed later."""
    try:
        yield
    except aws.ClientError as error:
        details, http = error.response.get("Error", {}), error.response["ResponseMetadata"]
        operation = error.operation_name
        code = str(details.get("Code") or http.get("HTTPStatusCode"))  # a proxy sends no code
        code = HEAD_CODES.get(code, code)
        words = code, details.get("BucketName"), details.get("Message")
        refusal = f"{operation}: {' '.join(filter(None, words))}"
        if operation.startswith(("Assume", "GetSession", "GetRole", "CreateToken")):
            raise Fatal(f"no AWS credentials: {refusal}", code) from None
        if code in REMEDIES:
            region = http["HTTPHeaders"].get("x-amz-bucket-region", "the bucket's region")
            refusal += "; " + REMEDIES[code].format(region=region)
            # One object may be denied to `restore`, and 400 may have any cause.
            if code != "400" and (operation, code) != ("GetObject", DENIED):
                raise Fatal(f"S3 refused {refusal}", code) from None
        transient = http.get("HTTPStatusCode") in TRANSIENT_STATUSES or code in TRANSIENT_CODES
        transient |= code.isdigit() and operation != "HeadObject"  # not S3, but a proxy
        # BadDigest of Complete is permanent: S3 has other bytes.
        if transient and (operation, code) != ("CompleteMultipartUpload", "BadDigest"):
            code = UNAVAILABLE
        raise FileError(f"S3 refused {refusal}", code) from None
    except (aws.ConnectionError, aws.HTTPClientError, RecursionError) as error:
        # RecursionError: S3 has redirected boto3 again and again.  HTTPClientError itself, and
        # no subclass: s3transfer has cut off a part of a failed upload, or a proxy URL is bad.
        code = "" if type(error) is aws.HTTPClientError else UNAVAILABLE
        reason = f"S3 does not answer: {error}; check the network, AWS_REGION, AWS_ENDPOINT_URL"
        raise FileError(reason, code) from None
    except (aws.BotoCoreError, EOFError, OSError) as error:
        # EOFError: nobody answers the prompt for a code.  OSError: no such program or file.
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        reason = f"no AWS credentials, or another AWS setting is wrong: {error}; set {keys}"
        raise Fatal(reason) from None


def crc32_of(answer: Mapping[str, Any]) -> int | None:
    """The CRC-32 in an answer, None unless it is that of the whole object."""
    text = answer.get("ChecksumCRC32")
    if not text or "-" in text:  # with a dash it is a checksum of the parts' checksums
        return None
    return int.from_bytes(base64.b64decode(text)[:4], "big")


def stored_object(key: str, answer: Mapping[str, Any]) -> StoredObject:
    """The object that an entry of a listing or the answer to a HEAD or GET describes."""
    # Some servers change the case of header names.
    metadata = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
    mtime = re.fullmatch(r"(-?\d{1,12})(\.\d*)?", metadata.get("mtime", ""))
    uploaded_at = math.floor(answer["LastModified"].timestamp())
    return StoredObject(
        key=key,
        size=answer["Size"] if "Size" in answer else answer["ContentLength"],
        uploaded_at=uploaded_at,
        mtime=int(mtime[1]) if mtime else uploaded_at,
        storage_class=answer.get("StorageClass", "STANDARD"),
        etag=str(answer.get("ETag", "")).strip('"'),
        crc32=crc32_of(answer),
        thaw_state=thaw_state_of(answer),
        version_id=answer.get("VersionId"),
    )


def thaw_state_of(entry: Mapping[str, Any]) -> str:
    """The thaw state of an object in a listing with RestoreStatus."""
    if entry.get("StorageClass") not in COLD_CLASSES:
        return READABLE
    status = entry.get("RestoreStatus", {})
    if status.get("IsRestoreInProgress"):
        return RESTORING
    expiry = status.get("RestoreExpiryDate")
    return RESTORED if expiry and expiry.timestamp() > time.time() else COLD


def versions_at(entries: Iterable[Mapping[str, Any]], at: float) -> Iterator[Mapping[str, Any]]:
    """The versions that were current at the time `at`.  `entries` is a listing of versions
    and delete markers, sorted by key, each key's latest version first.

    LastModified is in whole seconds, and for an upload in parts it is when that began.  So
    versions of one second keep the order of the listing, and the version that is current now
    counts as the latest whatever its date is.  boto3 lists delete markers apart: within a
    second they count as older, since a file too many is better than one too few.
    """
    for _, group in itertools.groupby(entries, itemgetter("Key")):
        versions = [*group][::-1]  # the oldest first
        versions.sort(key=lambda e: (e["IsLatest"], e["LastModified"], "ETag" in e))
        past = [*itertools.takewhile(lambda e: e["LastModified"].timestamp() <= at, versions)]
        if past and "ETag" in past[-1]:  # a delete marker has none
            yield past[-1]


class MultipartClient:
    """Stands in for boto3's client and for the file in upload_fileobj.  It continues an upload
    after the parts that an earlier run has stored, and sends the CRC-32 of each part.  An error
    of `read` looks like the file's end: s3transfer would cut off the parts under way."""

    def __init__(self, bucket: Bucket, upload: Upload, read: Read, on_left: Hook):
        self._bucket, self._read, self._on_left = bucket, read, on_left
        self.target = {"Key": upload.key, "UploadId": upload.id}
        self._before = len(upload.parts)  # the first part after these is s3transfer's part 1
        self.parts = [*upload.parts]  # later also those read; a part has an ETag once stored
        self.crc32 = 0  # of all these parts
        for part in upload.parts:
            self.crc32 = crc32_combine(self.crc32, crc32_of(part) or 0, upload.part_size)
        self.left = upload.size - len(upload.parts) * upload.part_size  # bytes not stored yet
        self._lock = threading.Lock()  # for `left`
        self.error: BaseException | None = None  # of a read or a part, which ends the reading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bucket.client, name)

    def read(self, amount: int = -1) -> bytes:
        """The next part, empty after an error.  s3transfer calls this on one thread."""
        try:
            data = b"" if self.error is not None else self._read(amount)
        except (Exception, Stopped) as error:
            data, self.error = b"", error
        if data:
            crc32, number = zlib.crc32(data), len(self.parts) + 1
            self.parts.append({"PartNumber": number, "ChecksumCRC32": crc_text(crc32)})
            self.crc32 = crc32_combine(self.crc32, crc32, len(data))
        return data

    def create_multipart_upload(self, **_: Any) -> Any:
        return self.target  # which was begun before

    def upload_part(self, PartNumber: int, Body: Any, **_: Any) -> Any:
        part = self.parts[self._before + PartNumber - 1]
        try:
            answer = self._bucket.request("upload_part", Body=Body, **self.target, **part)
        except Exception as error:
            self.error = error
            raise
        part["ETag"] = answer["ETag"]
        with self._lock:
            self.left -= len(Body)
            self._on_left(self.left)
        return answer

    def complete_multipart_upload(self, **_: Any) -> None:
        """Does nothing, like the next two: Bucket.upload completes the upload, unless there was
        an error.  put_object is called if not even one part could be read."""

    abort_multipart_upload = put_object = complete_multipart_upload


class Bucket:
    """The bucket, below the prefix.  No object is ever deleted; only unfinished uploads of
    keys that the program uses are aborted.  FileError, Fatal, and what a `read` raises."""

    def __init__(self, config: Config, retries: bool = True):
        self._config, self.prefix = config, config.prefix
        self._attempts = S3_ATTEMPTS if retries else 1
        self.request_cost = 0.0  # USD, of the requests in COUNTED
        self._lock = threading.Lock()  # for `request_cost`, and for a warning
        settings = botocore.config.Config(
            connect_timeout=S3_CONNECT_LIMIT,
            read_timeout=S3_READ_LIMIT,
            retries={"mode": "standard", "total_max_attempts": 1},  # see request
            max_pool_connections=config.transfers * PARTS_AT_ONCE,
            # Uploads have checksums of ours.  boto3 would read each body again for others.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
            # boto3 would compose its own for each request: a tenth of a small PUT's CPU time.
            user_agent=f"archive.py/{VERSION}",
        )
        try:
            with s3_errors():
                session = boto3.Session(region_name=config.region)
                self.client = session.client(
                    "s3", endpoint_url=config.endpoint_url, config=settings
                )
                self._credentials = session.get_credentials()
            parse_endpoint(self.client.meta.endpoint_url)  # it may be set in ~/.aws
        except (ArgumentTypeError, ValueError, RuntimeError) as error:
            raise Fatal(f"AWS_ENDPOINT_URL or the AWS credentials are wrong: {error}") from None
        self.prices = Prices(self.client.meta.region_name, config.prices)
        # "Expect: 100-continue" costs every PUT a round trip.
        events = self.client.meta.events
        events.unregister("before-call.s3", botocore.handlers.add_expect_header)
        events.register("before-send.s3", self._note_secrets)
        # boto3 encodes the key of SSE-C for each operation but this one.
        events.register("before-parameter-build.s3.ListParts", botocore.handlers.sse_md5)

    def _note_secrets(self, **_: Any) -> None:
        """Hides the credentials.  Those of a role exist only once a request is signed."""
        for name in ("secret_key", "_secret_key", "token", "_token"):
            hide(vars(self._credentials).get(name))  # its properties could renew them

    def request(self, operation: str, *allowed: str, **parameters: Any) -> Any:
        """S3's answer; None if it refuses with one of the codes `allowed`.  Those S3_EXTRA_ARGS
        that the operation has are added, and parameters that are None are left out.

        A request that failed with UNAVAILABLE is sent again, up to `_attempts` times in all.
        boto3 would retry for fewer reasons, wait less than 3 s in all, and share a small number
        of retries among all requests.
        """
        meta, config = self.client.meta, self._config
        model = meta.service_model.operation_model(meta.method_to_api_mapping[operation])
        extra = {n: v for n, v in config.extra_args.items() if n in model.input_shape.members}
        given = {n: v for n, v in parameters.items() if v is not None}
        if operation in COUNTED:
            # A part's request does not name its class.
            storage_class = given.get("StorageClass", config.storage_class)
            cost = self.prices.requests(storage_class, {COUNTED[operation]: 1})
            with self._lock:
                self.request_cost += cost
        arguments: dict[str, Any] = {"Bucket": config.bucket, **extra, **given}
        for attempt in range(self._attempts):
            try:
                with s3_errors():
                    answer = getattr(self.client, operation)(**arguments)
                    if operation.startswith("list_") and not LISTING & answer.keys():
                        raise FileError("S3's answer is no listing", UNAVAILABLE)
                    if (needed := REQUIRED.get(operation, "ResponseMetadata")) not in answer:
                        raise FileError(f"S3's answer has no {needed}", UNAVAILABLE)
                    details = answer["ResponseMetadata"]
                    details["RetryAttempts"] = attempt  # for begin_upload
                    region = details["HTTPHeaders"].get("x-amz-bucket-region", meta.region_name)
                    # boto3 follows a redirect silently.  Other servers may name no real region.
                    if region != meta.region_name and re.fullmatch(r"[a-z-]+-\d", region):
                        warn_once("set AWS_REGION to %s, else prices are wrong", region)
                    return answer
            except ArchiveError as error:
                if error.code in allowed:
                    return None
                if error.code != UNAVAILABLE or attempt == self._attempts - 1:
                    raise
            time.sleep(random.uniform(1, 1.5) * (1 << attempt))  # not all at once
            if hasattr(arguments.get("Body"), "seek"):  # that of a part; a PUT's is bytes
                arguments["Body"].seek(0)

    def _list(self, operation: str, *names: str, **parameters: Any) -> Iterator[Any]:
        """The entries of all pages of a listing.  A page has them in the lists called `names`,
        which are merged by key.  Each NextX of a page is the X of the next request, for example
        NextKeyMarker its KeyMarker."""
        marker: dict[str, Any] = {}
        while True:
            page = self.request(operation, **parameters, **marker)
            lists = (page.get(name, ()) for name in names)
            yield from heapq.merge(*lists, key=lambda entry: entry.get("Key", ""))
            if not page.get("IsTruncated"):
                return
            last, marker = marker, {n[4:]: page[n] for n in page if n[:4] == "Next" and page[n]}
            if marker in ({}, last):  # none, or this page's again
                raise FileError("S3's listing breaks off, and does not say how it goes on")

    # Uploads

    def put(self, key: str, data: bytes, mtime: int) -> StoredObject:
        """Uploads with one PUT; S3 checks the CRC-32.  upload_fileobj takes 50 % more CPU."""
        crc32 = zlib.crc32(data)
        request = self._upload_arguments(len(data), mtime) | {"ChecksumCRC32": crc_text(crc32)}
        answer = self.request("put_object", Key=key, Body=data, **request)
        return self._confirm(key, answer, len(data), crc32)

    def begin_upload(self, upload: Upload) -> Upload:
        """Begins the upload, and returns it with its id, which has to be noted before the first
        part is sent."""
        arguments = self._upload_arguments(upload.size, upload.mtime)
        arguments |= {"Key": upload.key, "ChecksumType": "FULL_OBJECT"}
        answer = self.request("create_multipart_upload", **arguments)
        # S3 may have begun another one, whose id got lost with the answer.
        if answer["ResponseMetadata"]["RetryAttempts"] > 0:
            self.abort_upload(upload.key, keep=answer["UploadId"])
        return upload._replace(id=answer["UploadId"])

    def upload(self, upload: Upload, read: Read, on_sent: Hook, on_left: Hook) -> StoredObject:
        """Sends the parts after those that are stored, and completes the upload; `read` returns
        the rest of the file's bytes.  `on_sent` gets the bytes just sent, below 0 if they will
        be sent again, and `on_left` those that are not stored yet, after each part.  S3 gets
        the file's CRC-32, and refuses to complete an upload of other bytes.  If this fails, the
        parts stay for the next run.  They are aborted only if the file has changed while it was
        read, or S3 has refused a request."""
        key, size, part_size = upload.key, upload.size, upload.part_size
        at_once = upload.parts_at_once(self._config.memory_limit)
        client = MultipartClient(self, upload, read, on_left)
        config = TransferConfig(
            multipart_threshold=min(client.left, part_size),  # so that s3transfer sends no PUT
            multipart_chunksize=part_size,
            max_concurrency=at_once,
            preferred_transfer_client="classic",
        )
        config.max_in_memory_upload_chunks = at_once  # not in the constructor
        try:
            upload_fileobj(client, client, self._config.bucket, key, None, on_sent, config)
            if client.error is not None:
                raise client.error
            whole = {"ChecksumCRC32": crc_text(client.crc32), "ChecksumType": "FULL_OBJECT"}
            parts = {"MultipartUpload": {"Parts": client.parts}, "MpuObjectSize": size}
            request = client.target | parts | whole
            answer = self.request("complete_multipart_upload", **request)
        except Stopped:
            stored = f"{size - client.left:,} of {size:,}"
            log.info("unfinished %s: S3 has %s bytes", upload.path, stored)
            raise
        except FileError as error:
            # If S3's answer to Complete got lost, a retry gets NoSuchUpload.
            found = self.head(key) if error.code == "NoSuchUpload" else None
            if found and (found.size, found.crc32) == (size, client.crc32):
                return found
            # A refusal by the box has no code, or VANISHED.
            if error.code not in ("", LOST, UNAVAILABLE, VANISHED):
                self.abort_upload(key, upload.id)
            raise
        return self._confirm(key, answer, size, client.crc32)

    def _upload_arguments(self, size: int, mtime: int | None) -> dict[str, Any]:
        return {
            "StorageClass": self._config.storage_class_of(size),
            "ChecksumAlgorithm": "CRC32",
            "Metadata": {"mtime": str(mtime)},  # as rclone does, which restores it, too
        }

    def _confirm(self, key: str, answer: Any, size: int, crc32: int) -> StoredObject:
        """The object that S3 has stored; FileError if it is not what was read.  A server
        whose answer has no CRC-32 may not have checked it, and gets a HEAD."""
        now, storage_class = datetime.now(timezone.utc), self._config.storage_class_of(size)
        sent = {"Size": size, "LastModified": now, "StorageClass": storage_class}
        has_crc32 = crc32_of(answer) is not None
        found = stored_object(key, {**answer, **sent}) if has_crc32 else self.head(key)
        if found is None or found.size != size:
            stored = f"{found.size:,} bytes" if found else "no object"
            raise FileError(f"S3 holds {stored}, read {size:,}")
        if found.crc32 is None:
            with self._lock:  # two threads could find it out at the same time
                warn_once("this S3 server gives no CRC-32: only sizes are compared")
        elif found.crc32 != crc32:
            raise FileError(f"S3 holds CRC-32 {crc_text(found.crc32)}, read {crc_text(crc32)}")
        return found._replace(crc32=crc32)

    # Unfinished uploads

    def find_parts(self, upload: Upload) -> Upload:
        """The upload with the stored parts that can be kept: those before the first one that
        is missing, of another size or without a CRC-32.  The file's last part is sent again,
        as upload_fileobj has to send one.  Without an id if S3 does not have the upload."""
        parts: list[dict[str, Any]] = []
        try:
            for part in self._list("list_parts", "Parts", Key=upload.key, UploadId=upload.id):
                number, size = len(parts) + 1, upload.part_size
                is_next = (part["PartNumber"], part["Size"]) == (number, size)
                if not is_next or crc32_of(part) is None or number * size >= upload.size:
                    break
                names = ("PartNumber", "ETag", "ChecksumCRC32")
                parts.append({name: part[name] for name in names})
        except FileError as error:
            if error.code != "NoSuchUpload":
                raise
            return upload._replace(id=None)
        return upload._replace(parts=tuple(parts))

    def abort_upload(self, key: str, upload_id: str | None = None, keep: str = "") -> bool:
        """Aborts the upload with this id; without one, all unfinished uploads of `key` except
        the one with the id `keep`.  Their parts cost money.  Returns False, after a warning, if
        that fails for whatever reason."""
        one, ids = upload_id, {upload_id}
        try:
            if not upload_id:
                uploads = self._list("list_multipart_uploads", "Uploads", Prefix=key)
                ids = {entry["UploadId"] for entry in uploads if entry["Key"] == key} - {keep}
            for one in ids:
                self.request("abort_multipart_upload", "NoSuchUpload", Key=key, UploadId=one)
            return True
        except ArchiveError as error:
            message = "the unfinished upload of %s (id %s) could not be aborted: %s; its parts "
            message += "cost money until a lifecycle rule aborts it"
            log.warning(message, key, one or "unknown", error)
            return False

    def count_unfinished(self) -> int:
        """The number of unfinished uploads below the prefix, also those of other programs."""
        return len([*self._list("list_multipart_uploads", "Uploads", Prefix=self.prefix)])

    # Objects

    def objects(self, prefix: str, at: float | None = None) -> Iterator[StoredObject]:
        """The objects below `prefix`, now or at the time `at`, sorted by key.  The empty
        objects that S3's console makes for folders are skipped."""
        listing = {"Prefix": prefix, "OptionalObjectAttributes": ["RestoreStatus"]}
        if at is None:
            entries = self._list("list_objects_v2", "Contents", **listing)
        else:
            kinds = "Versions", "DeleteMarkers"
            entries = versions_at(self._list("list_object_versions", *kinds, **listing), at)
        for entry in entries:
            if entry["Size"] or not entry["Key"].endswith("/"):
                yield stored_object(entry["Key"], entry)

    def head(self, key: str, version_id: str | None = None) -> StoredObject | None:
        """The object, which may be cold; None if there is none."""
        version = {"Key": key, "VersionId": version_id}
        answer = self.request("head_object", "404", ChecksumMode="ENABLED", **version)
        return None if answer is None else stored_object(key, answer)

    def match_content(self, found: StoredObject, read: Read) -> StoredObject | None:
        """Reads a file.  If it has the object's size and ETag, returns the object with the
        CRC-32 of what was read; else None.  Reads nothing if `_part_size` is 0."""
        part_size, parts, offset, crc32 = self._part_size(found), [md5()], 0, 0
        if not part_size:
            return None
        # No block goes beyond the end of a part.
        while block := read(min(COMPARE_BLOCK, part_size - offset % part_size)):
            if offset and offset % part_size == 0:
                parts.append(md5())
            parts[-1].update(block)
            offset, crc32 = offset + len(block), zlib.crc32(block, crc32)
        whole = md5(b"".join(part.digest() for part in parts)).hexdigest()
        same_etag = found.etag in (parts[0].hexdigest(), f"{whole}-{len(parts)}")
        return found._replace(crc32=crc32) if same_etag and offset == found.size else None

    def _part_size(self, found: StoredObject) -> int:
        """The size of each part except the last; the whole size if one PUT has stored it;
        0 if no size of parts gives their number.  The ETag after a PUT is the MD5.  After an
        upload in parts, it is the MD5 of the parts' MD5s, "-" and their number ("Checking
        object integrity" in the S3 user guide).  S3 tells the size of the first part.  For a
        server that does not, the likeliest size is taken.  With SSE-KMS or SSE-C, an ETag is
        no MD5: the file is read, and does not match."""
        _, dash, count = found.etag.partition("-")
        size, refusals = max(1, found.size), (DENIED, "400", "404", "405", "412", "416", "501")
        if not dash:
            return size
        first = self.request("head_object", *refusals, Key=found.key, PartNumber=1) or {}
        sizes = (first.get("ContentLength", 0), *(min(size, part) for part in PART_SIZES))
        return next((part for part in sizes if part and str(-(-size // part)) == count), 0)

    def request_restore(self, found: StoredObject, tier: str, days: int) -> bool:
        """Asks S3 to restore the object; returns True if it can be read already."""
        how = {"Days": days, "GlacierJobParameters": {"Tier": tier.capitalize()}}
        request = {"Key": found.key, "VersionId": found.version_id, "RestoreRequest": how}
        try:
            answer = self.request("restore_object", "RestoreAlreadyInProgress", **request)
        except FileError as error:
            if error.code not in ("ObjectAlreadyInActiveTierError", INVALID_STATE):
                raise
            return True  # it needs no restore, or is restored already
        # 202: S3 begins.  None: it has begun before.
        return bool(answer and answer["ResponseMetadata"]["HTTPStatusCode"] == 200)

    # The bucket itself

    def check_lifecycle(self) -> bool:
        """Warns of lifecycle rules that delete objects below the prefix, now or later.  Returns
        whether one aborts unfinished uploads there."""
        missing, aborts = "NoSuchLifecycleConfiguration", False
        answer = self.request("get_bucket_lifecycle_configuration", missing) or {}
        for rule in answer.get("Rules", ()):
            scope = rule.get("Filter", rule)  # older rules have the prefix directly
            start = scope.get("And", scope).get("Prefix", "")
            for_all, for_some = self.prefix.startswith(start), start.startswith(self.prefix)
            if rule["Status"] == "Enabled" and (for_all or for_some):
                aborts |= for_all and "AbortIncompleteMultipartUpload" in rule
                if rule.get("Expiration", {}).keys() & {"Days", "Date"}:
                    log.warning("the lifecycle rule %r deletes objects", rule.get("ID"))
        return aborts

    def versioning(self) -> str:
        """`Enabled`, `Suspended`, or empty if the bucket has never kept earlier versions."""
        return str(self.request("get_bucket_versioning").get("Status", ""))

    def permission_probes(self) -> dict[str, Callable[[], object]]:
        """Each permission that is needed, but for --at, with a call that raises without it.
        Called in this order, they leave nothing behind: s3:PutObject aborts the upload that it
        begins.  Only `restore` needs s3:RestoreObject."""
        key = self.prefix + ".archive-check/"  # no file has it, as it ends in a slash
        restore = {"Days": 1, "GlacierJobParameters": {"Tier": "Bulk"}}
        not_found = "404", "NoSuchKey", "NoSuchUpload"

        def call(operation: str, **request: Any) -> Callable[[], object]:
            return partial(self.request, operation, *not_found, **request)

        def upload() -> None:  # S3 may also refuse STORAGE_CLASS or S3_EXTRA_ARGS
            self.abort_upload(key, self.begin_upload(Upload(key, "", SMALL_FILE, 0)).id)

        return {
            "s3:ListBucket": call("list_objects_v2", Prefix=self.prefix, MaxKeys=1),
            "s3:GetObject": call("head_object", Key=key),
            "s3:ListBucketMultipartUploads": call("list_multipart_uploads", Prefix=self.prefix),
            "s3:ListMultipartUploadParts": call("list_parts", Key=key, UploadId="none"),
            "s3:AbortMultipartUpload": call("abort_multipart_upload", Key=key, UploadId="none"),
            "s3:PutObject": upload,
            "s3:RestoreObject": call("restore_object", Key=key, RestoreRequest=restore),
        }


# ------------------------------------------------------------------ Comparison

# How the listing and the state agree about a path: labels of `verify`'s table.
AGREE, NO_OBJECT, WRONG_SIZE, WRONG_ETAG = "Agree", "Missing", "Wrong size", "Wrong checksum"
NOT_RECORDED, TO_COMPARE, OTHER_CLASS = "Not recorded", "To compare", "Other class"


class Comparison(NamedTuple):
    """A path in the bucket's listing, in the state, or in both."""

    path: str  # as in the state's path column
    verdict: str  # one of these labels
    reason: str = ""  # what is wrong; empty if nothing is
    update: Record | None = None  # to be recorded instead


def compare(path: str, found: StoredObject, record: Record | None) -> Comparison:
    """Compares a listed object with its record."""
    as_listed = Record(path, None, found)  # its file has to be compared
    if record is None:
        return Comparison(path, NOT_RECORDED, "in the bucket, but not recorded", as_listed)
    known = record.stored
    if record.mtime is None and not known.etag:  # in doubt: S3 may hold a new version
        return Comparison(path, TO_COMPARE, "", as_listed)
    if found.size != known.size:
        reason = f"S3 holds {found.size:,} bytes, the state says {known.size:,}"
        return Comparison(path, WRONG_SIZE, reason, as_listed)
    if known.etag not in ("", found.etag):
        reason = f"S3 holds ETag {found.etag}, the state says {known.etag}"
        return Comparison(path, WRONG_ETAG, reason, as_listed)
    completed = record._replace(stored=found._replace(crc32=known.crc32))
    if found.storage_class != known.storage_class:
        return Comparison(path, OTHER_CLASS, "", completed)  # this does no harm
    verdict = TO_COMPARE if record.mtime is None else AGREE
    return Comparison(path, verdict, "", completed if found.etag != known.etag else None)


def path_of_key(config: Config, key: str) -> str | None:
    """The path of the file with this key, as in the path column; None if no file has it."""
    relative = unescape(key[len(config.prefix) :])
    with contextlib.suppress(FileError):
        if object_key(config.prefix, relative) == key:
            return path_text(join(config.remote_path, relative))
    return None


def reconcile(config: Config, bucket: Bucket, state: State) -> Iterator[Comparison]:
    """Yields how state and bucket agree about each path, and brings the state in line with the
    bucket.  It has to be read to its end: the last step deletes the rows without an object.
    Objects whose key no file can have are not ours, and are skipped."""
    objects = bucket.objects(config.prefix)
    while page := list(itertools.islice(objects, PAGE)):
        by_path = {path: found for found in page if (path := path_of_key(config, found.key))}
        known = state.find(by_path)
        comparisons = [compare(path, found, known.get(path)) for path, found in by_path.items()]
        state.note_seen(by_path, [one.update for one in comparisons if one.update])
        yield from comparisons
    for record in state.unseen():
        yield Comparison(record.path, NO_OBJECT, "recorded, but not in the bucket")
    state.end_listing()


def take_over(config: Config, bucket: Bucket, state: State) -> None:
    """Makes a state that `is_new` agree with the bucket.  If this is interrupted, the next run
    begins it again."""
    counts = Counter(one.verdict for one in reconcile(config, bucket, state))
    gone = counts.pop(NO_OBJECT, 0)
    if counts or gone:
        message = "%s is new, or of an earlier script or source: took over %s objects of %s"
        log.warning(message, config.state_db, f"{counts.total():,}", config.url)
    if gone:
        log.warning("%s of its rows have no object there, and are dropped", f"{gone:,}")


# ---------------------------------------------------------------------- Output


class Formatter(logging.Formatter):
    """Makes every message one line without secrets, even if a library wrote it."""

    def format(self, record: logging.LogRecord) -> str:
        prefixes = {logging.WARNING: "warning: ", logging.CRITICAL: "error: "}
        record.prefix = prefixes.get(record.levelno, "")
        text = one_line(super().format(record))
        # The longest first: one secret may be the beginning of another.
        for secret in sorted(secret_forms, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


class Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes lines above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def start_logging(level: int, bars: bool, results: TextIO) -> None:
    """Sends results to `results`, and everything else from `level` on to stderr, except the
    lines of files that were archived or restored if there are `bars`."""
    logging.raiseExceptions = False  # no traceback for a full disk or a closed pipe
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is
    stderr, stdout = Console(sys.stderr), Console(results)
    for handler in (stderr, stdout):
        handler.setFormatter(Formatter("%(prefix)s%(message)s"))
    stderr.setLevel(level)
    log.handlers, results_log.handlers = [stderr], [stdout]
    files_log.handlers = [] if bars else [stderr]
    all_logs.setLevel(min(level, logging.INFO))
    # paramiko logs every broken connection with a traceback.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)


def start_log_file(path: Path) -> None:
    """Sends everything to the log file as well; Fatal if it cannot be written."""
    create_private(path)
    with fatal_os_errors("LOG_FILE cannot be written", USAGE):
        file = RotatingFileHandler(path, maxBytes=10 * MIB, backupCount=5, encoding="utf-8")
    file.rotator = rotate_log
    form = "%(asctime)s %(levelname)-8s %(message)s"
    file.setFormatter(Formatter(form, "%Y-%m-%dT%H:%M:%S%z"))
    all_logs.addHandler(file)


def rotate_log(source: str, dest: str) -> None:
    """Renames a log, and creates a new one that only its owner can read.  A log that cannot be
    renamed grows on, for example one that is mounted into a container."""
    with contextlib.suppress(OSError):
        os.rename(source, dest)
        create_private(Path(source))


def log_failure(name: bytes, reason: object) -> None:
    log.error("FAIL %s: %s", printable(name), reason)


show = partial(results_log.info, "%s")  # writes a line of a result to stdout and LOG_FILE

Rows = Iterator[tuple[str, object]]  # labels and values: a float is USD, None is not known


def show_table(title: str, rows: Mapping[str, object]) -> None:
    width = max(15, *map(len, rows))
    show(f"==== {title} ====")
    for label, value in rows.items():
        show(f"{label:<{width}}: {format_value(value)}")


def format_value(value: object) -> str:
    if value is None:
        return "not known"
    if isinstance(value, float):
        return format_usd(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):  # numbers by kind
        return ", ".join(f"{n:,} {kind}" for kind, n in value.items() if n) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def print_line(text: str) -> None:
    """Writes a line to stdout only; Stopped if its reader is gone, or its disk is full."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            log.critical("stdout cannot be written: %s", error)
        raise Stopped from None


class Progress:
    """tqdm bars on a terminal, for the bytes that are moved and the files that are counted."""

    def __init__(self, shown: bool):
        tqdm.set_lock(threading.RLock())  # tqdm's own starts a process from Python 3.14 on
        new_bar = partial(tqdm, disable=not shown, dynamic_ncols=True, leave=False)
        # counting(items) yields the items and counts them.  Without items, its caller counts.
        self.counting = partial(new_bar, unit=" files")
        self._of_bytes = partial(new_bar, unit="B", unit_scale=True, unit_divisor=1024)
        self._bar = tqdm(disable=True)  # until `expect` is called

    def expect(self, size: int) -> None:
        """Adds bytes to the number of those that will be moved."""
        if self._bar.disable:
            self._bar = self._of_bytes(desc="all files", total=0)
        self._bar.total += size
        self._bar.refresh()

    def moved(self, size: int) -> None:
        self._bar.update(size)

    def close(self) -> None:
        self._bar.close()


@dataclass
class Context:
    config: Config
    box: StorageBox
    bucket: Bucket
    progress: Progress
    summary: dict[str, object]  # for JSON

    def show_summary(self, title: str, rows: Mapping[str, object]) -> None:
        """Shows a table, whose labels in snake case are the names in JSON."""
        for label, value in rows.items():
            name = re.sub(r"\W+", "_", label.lower()).strip("_")
            self.summary[name] = value
            if isinstance(value, float):
                self.summary[name] = None if math.isnan(value) else round(value, 6)
        show_table(title, rows)


# --------------------------------------------------------------- Parallel work

# An item with its result, or with None and the error.
Outcome = tuple[Item, "Result | None", "FileError | None"]


@dataclass
class Parallel(Generic[Item, Result]):
    """Calls work(item) on threads, at most `threads` at once.  The items at work need at most
    `limit` bytes of `memory` together; one that needs more is worked on alone.  `work` may tell
    `needs` that an item needs less by now, so that the next one is begun before it has ended.

    A result of `work`, a FileError or any unexpected error is an outcome.  Fatal, Stopped,
    SAME_FAILURES with one code in a row or an error from `items` ends the work: no new item is
    begun, and the box is closed, which ends all reads.  What is under way is waited for and
    yielded, for RUNTIME_GRACE at most, after a signal for STOP_LIMIT; then the error is raised.
    A FileError from `items` closes nothing: all work is waited for.

    A signal raises Stopped only in the code of `items`: the code that takes outcomes would
    lose those of a list that it has not looked at yet."""

    work: Callable[[Item], Result]
    box: StorageBox
    threads: int
    memory: Callable[[Item], int] = field(default=lambda _: 0)
    limit: int = 0

    def __post_init__(self) -> None:
        # A None is not an outcome: it wakes up the main thread.
        self._finished: queue.SimpleQueue[Outcome[Item, Result] | None] = queue.SimpleQueue()
        self._under_way: dict[int, int] = {}  # bytes of memory, by the id() of the item
        self._codes: deque[str] = deque(maxlen=SAME_FAILURES)  # of the latest outcomes
        self._failure: BaseException | None = None
        self._wait_until = math.inf  # a monotonic time

    def outcomes(self, items: Iterable[Item | None]) -> Generator[list[Outcome[Item, Result]]]:
        """Finished work, in lists.  An item of None only lets finished work be yielded."""
        pool, stopping = ThreadPoolExecutor(self.threads), self.box.stopping
        try:
            try:
                for item in items:
                    with stopping.deferred():
                        while self._failure is None and self._must_wait(item):
                            yield self._collect()
                        if self._failure is not None:
                            break
                        if item is not None:
                            self._under_way[id(item)] = self.memory(item)
                            pool.submit(self._attempt, item)
            except (Exception, Stopped) as error:  # of any kind: S3 may hold what is under way
                self._fail(error)
            with stopping.deferred():
                while self._under_way and time.monotonic() < self._wait_until:
                    yield self._collect()
                if self._failure is not None:
                    raise self._failure from None
        finally:
            if self._under_way:
                self.box.close()
            pool.shutdown(wait=False, cancel_futures=True)

    def needs(self, item: Item, memory: int) -> None:
        """Notes, on any thread, that an item at work needs no more than this memory now."""
        self._under_way[id(item)] = min(memory, self._under_way[id(item)])
        self._finished.put(None)

    def _attempt(self, item: Item) -> None:
        result: Result | None = None
        error: FileError | None = None
        try:
            self.box.stopping.check()
            result = self.work(item)
        except FileError as expected:
            error = expected
        except (Fatal, Stopped) as end:
            self._fail(end)  # at once: no other thread begins new work.  This is no outcome.
        except Exception as other:  # a library's, from a server that it did not expect
            log.debug("traceback", exc_info=True)
            code = type(other).__name__
            error = FileError(f"unexpected {code}: {other}", code)
        cause: BaseException | None = error
        while cause is not None:  # a traceback would keep the file's bytes in memory
            cause.__traceback__, cause = None, cause.__context__
        self._finished.put((item, result, error))

    def _must_wait(self, item: Item | None) -> bool:
        """Whether finished work has to be collected before `item` is begun."""
        if not self._finished.empty():
            return True
        if item is None or not self._under_way:
            return False
        is_full = sum(self._under_way.values()) + self.memory(item) > self.limit
        return is_full or len(self._under_way) == self.threads

    def _collect(self) -> list[Outcome[Item, Result]]:
        """Waits for finished work at most COMMIT_PAUSE, and takes its outcomes.  Notes why the
        rest has to end."""
        outcomes: list[Outcome[Item, Result] | None] = []
        with contextlib.suppress(queue.Empty):
            while True:
                outcomes.append(self._finished.get(block=not outcomes, timeout=COMMIT_PAUSE))
        for item, _, error in filter(None, outcomes):
            del self._under_way[id(item)]
            code = error.code if error else ""
            if code not in (VANISHED, CHANGED, INVALID_STATE):  # which concern one file only
                self._codes.append(code)  # empty: a success, or a failure without a code
            if code and self._codes.count(code) == SAME_FAILURES:
                self._fail(Fatal(f"{error}; {SAME_FAILURES} in a row failed like this", code))
        if self.box.stopping.is_set():
            self._fail(Stopped())
        return [one for one in outcomes if one and any(one[1:])]  # without what was cut off

    def _fail(self, error: BaseException) -> None:
        """Ends the work: no new one begins.  Of several errors, the first is raised that is
        neither a FileError nor Stopped, else the last.  Sets how long to wait for the work."""
        if self._failure is None or isinstance(self._failure, (FileError, Stopped)):
            self._failure = error
        if not isinstance(error, FileError):
            self.box.close()
            limit = RUNTIME_GRACE if self.box.stopping.received is None else STOP_LIMIT
            self._wait_until = min(self._wait_until, time.monotonic() + limit)


# --------------------------------------------------------------- Walk and plan


class Job(NamedTuple):
    """A file that may have to be uploaded."""

    file: RemoteFile  # as it was listed
    record: Record | None  # its row
    upload: Upload  # to be continued if it has an id, else to be begun
    stale: Upload | None  # an earlier run's that cannot be continued, to be aborted first
    compares: bool  # it is first compared with its object
    lookups: dict[str, int]  # S3 requests before an upload, by kind, as for Prices.requests
    early: float  # USD for the object that an upload overwrites before its minimum days
    usd: float  # the most that it may cost: all requests, and `early`


def plan_upload(config: Config, file: RemoteFile) -> Upload:
    """The upload of a file, to be begun; FileError if S3 does not allow its key."""
    path, size, mtime = file
    key = object_key(config.prefix, relative_path(config.remote_path, path))
    upload = Upload(key, path_text(path), size, mtime)
    if size < SMALL_FILE:
        return upload
    possible = (part for part in PART_SIZES if part >= max(PART_SIZE, size / MAX_PARTS))
    part_size = min(possible, default=PART_SIZES[-1])
    return upload._replace(part_size=part_size, settings=config.upload_settings(size))


class Walk:
    """A walk of all regular files below REMOTE_PATH, in the same order each time, and what it
    has left out: the base of Forecast and Run.  LISTINGS_AT_ONCE folders are listed ahead.  Of
    a folder with more than NAMES_AHEAD entries nothing is kept ahead: it is listed again when
    its turn comes.  Links are not followed."""

    def __init__(self, context: Context, state: State, on_failure: Callable[..., None]):
        self._context, self._state, self._on_failure = context, state, on_failure
        self._box, self._config = context.box, context.config
        self._root, self.prices = context.config.remote_path, context.bucket.prices
        self.others = Counter[str]()  # neither uploaded, skipped nor failed, by their label
        self.failed = 0
        self.unlisted: set[bytes] = set()  # folders that failed, files without size or time
        self._exclusions = Exclusions(self._config)
        self._uploads = state.uploads()  # noted ones, less those of the jobs made so far
        self.early = 0.0  # USD for objects that are overwritten early

    def pages(self) -> Iterator[list[RemoteFile]]:
        """Lists of at most PAGE files, of one folder or of several that were listed by then.
        One comes within twice COMMIT_PAUSE, if need be an empty one: work can be committed
        then.  Fatal if REMOTE_PATH itself cannot be listed, Stopped."""
        waiting, page, next_page_at = [self._root], list[RemoteFile](), 0.0
        begun: deque[tuple[bytes, Future[list[Entry] | None]]] = deque()
        pool, list_folder = ThreadPoolExecutor(LISTINGS_AT_ONCE), self._box.list_folder
        try:
            while waiting or begun:
                while waiting and len(begun) < LISTINGS_AT_ONCE:
                    path = waiting.pop()
                    begun.append((path, pool.submit(list_folder, path, NAMES_AHEAD)))
                path, listing = begun.popleft()
                if time.monotonic() > next_page_at or (page and not listing.done()):
                    yield page
                    page, next_page_at = [], time.monotonic() + COMMIT_PAUSE
                while not wait([listing], COMMIT_PAUSE).done:
                    yield []
                entries = self._entries(path, listing)
                if entries is None:  # too large to be kept ahead; now it is its turn
                    begun.appendleft((path, pool.submit(list_folder, path)))
                    continue
                folders: list[bytes] = []
                for file in self._files(path, entries, folders):
                    page.append(file)
                    if len(page) == PAGE:
                        yield page
                        page = []
                waiting += reversed(folders)
            yield page
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for item, (place, _) in sorted(self._exclusions.unmatched.items()):
            if not self.leaves_out(place.rpartition(b"/")[0]):  # the walk has been there
                warn_once("EXCLUDE_PATHS: %s has matched nothing", item)  # once in two walks

    def add_failure(self, path: bytes, reason: object) -> None:
        self.failed += 1
        self._on_failure(path, reason)

    def leaves_out(self, path: bytes) -> bool:
        """Whether the walk does not reach this path, because it or a folder above it is
        hidden or excluded, or could not be listed."""
        names = filter(None, relative_path(self._root, path).split(b"/"))
        _, *paths = itertools.accumulate(names, join, initial=self._root)
        return any(path in self.unlisted or self._label(path) for path in paths)

    def _label(self, path: bytes) -> str:
        """The label under which a hidden or excluded entry is counted; empty for others."""
        if self._exclusions.match(path):
            return "Excluded"
        is_hidden = path.rpartition(b"/")[2].startswith(b".")
        return "Hidden entries" if is_hidden and not self._config.include_hidden else ""

    def _entries(self, path: bytes, listing: Future[list[Entry] | None]) -> list[Entry] | None:
        """The result of the listing: None if the folder is too large to be kept ahead, empty if
        its listing failed; Fatal if that of REMOTE_PATH failed."""
        try:
            return listing.result()
        except FileError as error:
            if path == self._root:
                message = f"REMOTE_PATH {printable(path)} cannot be listed: {error}"
                raise Fatal(message) from None
            if error.code == VANISHED:
                self.others["Vanished"] += 1
            else:
                self.unlisted.add(path)
                self.add_failure(path, f"this folder cannot be listed: {error}")
            return []

    def _files(
        self, folder: bytes, entries: list[Entry], folders: list[bytes]
    ) -> Iterator[RemoteFile]:
        """Yields the files among the entries of `folder`, and adds its folders to `folders`."""
        for name, (size, mtime, mode) in entries:
            path, file_type = join(folder, name), stat.S_IFMT(mode or 0)
            if not name or b"/" in name or len(path) > MAX_PATH_BYTES:
                self.add_failure(path[:MAX_PATH_BYTES], "no file can have this name")
            elif label := self._label(path):
                self.others[label] += 1
            elif file_type == stat.S_IFDIR:
                folders.append(path)
            elif file_type == stat.S_IFREG and size is not None and mtime is not None:
                yield RemoteFile(path, size, mtime)
            elif file_type in (stat.S_IFREG, 0):
                self.unlisted.add(path)
                self.add_failure(path, "the box does not tell its type, size and time")
            else:
                self.others["Links" if file_type == stat.S_IFLNK else "Special files"] += 1

    def _make_jobs(self, files: list[RemoteFile]) -> Iterator[Job]:
        """Jobs for files that are not recorded.  One whose key is not allowed is a failure."""
        records = self._state.find(path_text(f.path) for f in files)
        for file in files:
            try:
                upload = plan_upload(self._config, file)
            except FileError as error:
                self.add_failure(file.path, error)
                continue
            record, noted = records.get(upload.path), self._uploads.pop(upload.key, None)
            # Whether the noted upload is of this version of the file (no id: it has no parts).
            is_same = noted is not None and noted._replace(id=None) == upload
            continued = noted if noted and noted.id is not None and is_same else None
            compares, heads, early = False, 0, 0.0
            if record:
                stored = record.stored
                compares = stored.size == file.size and not is_same
                if compares:
                    # One if the row has no CRC-32, one for the size of the object's parts.
                    heads = (stored.crc32 is None) + ("-" in stored.etag)
                age_days = (time.time() - stored.uploaded_at) / DAY
                early = self.prices.early(stored.storage_class, stored.size, age_days)
            # One LIST of the stored parts, or of the key's uploads to find those to abort.
            lists = int(noted is not None and (is_same or noted.id is None))
            # One more HEAD: if S3 does not have the upload any more, it may be complete.
            lookups = {"head": heads + bool(continued), "list": lists}
            storage_class = self._config.storage_class_of(file.size)
            usd = early + self.prices.requests(storage_class, lookups | upload.requests)
            stale = None if continued else noted
            yield Job(file, record, continued or upload, stale, compares, lookups, early, usd)


def total_cost(counts: Counts, price: Callable[[str, int, int], float]) -> float:
    """The sum of price(storage class, files, bytes)."""
    return math.fsum(price(name, c.files, c.bytes) for name, c in counts.items())


NEW, MODIFIED, UNCHANGED = "New files", "Changed files", "Unchanged files"
TO_UPLOAD = "To upload"
MARKS = {NEW: "+", MODIFIED: "*", TO_COMPARE: "?"}


class Forecast(Walk):
    """What a run would do, and what that costs.  `on_file` is called for each file that may
    differ from the archive: with a mark, its path and, for a failure, the reason."""

    def __init__(self, context: Context, state: State, on_file: Callable[..., None]):
        super().__init__(context, state, partial(on_file, "!"))
        self._on_file = on_file
        self.counts = Counts({label: Count() for label in (*MARKS, UNCHANGED, TO_UPLOAD)})
        self.altered = 0  # archived files that have another size or mtime now
        self.gone = Counts()  # by class: archived, but not on the box any more
        self.newly_gone: list[str] = []  # their paths, unless State.is_known_gone
        self.requests = Counter(put=0, create=0, part=0, complete=0, head=0)  # by kind
        self.upload_cost = 0.0  # USD for them
        self.saving = 0.0  # USD less, if files below TINY_FILE went into CLASS_FOR_TINY
        self.afterwards = state.archived()

    def walk_box(self) -> None:
        """Adds all files of the box; Fatal, Stopped."""
        with self._context.progress.counting(desc="looking") as bar:
            for page in self.pages():
                self._add_page(page)
                self._state.note_seen(path_text(file.path) for file in page)
                bar.update(len(page))
        for record in self._state.unseen():
            path = unescape(record.path)
            if not self.leaves_out(path):
                self.gone.add(record.stored.storage_class, record.stored.size)
                if not self._state.is_known_gone(record.path):
                    self.newly_gone.append(record.path)
                self._on_file("-", path)

    def _add_page(self, page: list[RemoteFile]) -> None:
        pending = self._state.unrecorded(page)
        size = sum(f.size for f in page) - sum(f.size for f in pending)
        self.counts.add(UNCHANGED, size, len(page) - len(pending))
        for job in self._make_jobs(pending):
            size, record = job.file.size, job.record
            storage_class = self._config.storage_class_of(size)
            # Without an mtime in its row, a file of the same size may be unchanged.
            if record and (record.stored.size != size or record.mtime is not None):
                self.altered += 1
            if job.compares:
                label, requests = TO_COMPARE, job.lookups
            else:
                label = MODIFIED if record else NEW
                requests = job.lookups | job.upload.requests
                self.counts.add(TO_UPLOAD, size)
                self.early += job.early
                self.afterwards.add(storage_class, size)
                if record:
                    self.afterwards.add(record.stored.storage_class, -record.stored.size, -1)
            self.counts.add(label, size)
            self.requests.update({kind: n for kind, n in requests.items() if n})
            cost = self.prices.requests(storage_class, requests)
            self.upload_cost += cost
            if size < TINY_FILE:
                self.saving += cost - self.prices.requests(CLASS_FOR_TINY, requests)
            self._on_file(MARKS[label], job.file.path)

    def rows(self) -> Rows:
        prices, after, total = self.prices, self.afterwards, self.afterwards.total()
        yield from self.counts.items()
        yield "Unreadable", self.failed
        yield "Gone from the box", self.gone.total()
        yield "Gone, a month", total_cost(self.gone, prices.month)
        yield from sorted(self.others.items())
        yield "Requests", self.requests
        yield "Upload", self.upload_cost
        yield "Overwritten early", self.early
        yield "Archive afterwards", total
        yield "Storage a month", total_cost(after, prices.month)
        for tier, hours in TIERS.items():
            restore = partial(prices.restore, tier=tier, days=DAYS_RESTORED)
            yield f"Restore, {tier} ({hours} hours)", total_cost(after, restore)
        yield "Download of all", prices.download(total.files, total.bytes)
        yield "Prices", prices.note


def plan(context: Context, options: argparse.Namespace) -> int:
    """Shows what run would do and cost; changes nothing.  0, or 3 if a file would fail."""

    def show_file(mark: str, path: bytes, failure: object = "") -> None:
        if options.list and not options.json:
            print_line(f"{mark} {printable(path)}")
        if failure:
            log_failure(path, failure)

    if options.list:
        context.progress = Progress(shown=False)  # a bar would be drawn between the lines
    with contextlib.closing(State(context.config, options.new_source, copy=True)) as state:
        if state.is_new:
            take_over(context.config, context.bucket, state)
        forecast = Forecast(context, state, show_file)
        forecast.walk_box()
    context.show_summary("PLAN", dict(forecast.rows()))
    if forecast.saving > forecast.upload_cost / 10:
        message = "SMALL_FILES_BELOW=%dK and SMALL_FILES_CLASS=%s would save %s of the upload"
        log.warning(message, TINY_FILE // KIB, CLASS_FOR_TINY, format_usd(forecast.saving))
    return INCOMPLETE if forecast.failed else 0


# ------------------------------------------------------------------------- Run


class Archived(NamedTuple):
    """A file whose object S3 has acknowledged, or was found to hold already."""

    record: Record
    is_upload: bool


class Run(Walk):
    """One pass over the box, and its summary.  Other threads list folders, compare and send
    files, and note uploads in the state; the main thread finds the files, and commits them."""

    def __init__(self, context: Context, state: State):
        super().__init__(context, state, log_failure)
        self._bucket, self._progress = context.bucket, context.progress
        self.started_at, self._began = int(time.time()), time.monotonic()
        self.uploaded = self.unchanged = self.bytes_uploaded = 0
        self.ended_early = ""  # the reason
        self._turns = threading.Semaphore(self._config.transfers)  # to send files to S3
        self._reserved = 0.0  # USD: spent before, and what all jobs so far may cost
        # While TRANSFERS files are sent, nearly as many small ones are read, so that S3 never
        # waits for the box.  With TRANSFERS=1, one file is read and sent after the other.
        threads, limit = 2 * self._config.transfers - 1, self._config.memory_limit
        self._pool = Parallel(
            self._transfer, self._box, threads, lambda job: job.upload.memory(limit), limit
        )

    @property
    def spent(self) -> float:
        """USD that the run has spent by its own count."""
        return self.early + self._bucket.request_cost

    def rows(self) -> Rows:
        """The summary.  The rows of `others` and `ended_early` are left out if empty."""
        yield "Uploaded files", self.uploaded
        yield "Skipped files", self.unchanged
        yield "Failed files", self.failed
        yield "Bytes uploaded", self.bytes_uploaded
        yield "Duration (sec)", round(time.monotonic() - self._began)
        yield from sorted(self.others.items())
        yield "Spent", self.spent
        if self.ended_early:
            yield "Ended early", self.ended_early

    def archive(self) -> None:
        """Archives what is new or changed.  Before Fatal or Stopped is raised, everything is
        committed that S3 has acknowledged in the time that Parallel waits."""
        self._reserved = self.spent
        with contextlib.closing(self._pool.outcomes(self._jobs())) as outcomes:
            for finished in outcomes:
                self._settle(finished)
        if not self.unlisted:
            # Unfinished uploads of files that are gone, excluded or archived by now.
            for key, begun in self._uploads.items():
                if self._bucket.abort_upload(key, begun.id):
                    log.info("aborted the unfinished upload of %s", key)
                    self._state.forget_upload(key)

    def _jobs(self) -> Iterator[Job | None]:
        """The files that may have to be uploaded.  A None after each page lets finished files
        be committed although the walk finds no new ones."""
        for page in self.pages():
            files = self._state.unrecorded(page)
            self.unchanged += len(page) - len(files)
            if log.isEnabledFor(logging.DEBUG):
                for file in sorted(set(page) - set(files)):
                    log.debug("unchanged %s", printable(file.path))
            jobs = filter(self._fits, self._make_jobs(files))
            # Few at a time: those in doubt are compared by the next run if this one ends early.
            while some := [*itertools.islice(jobs, 4 * self._config.transfers)]:
                self._state.doubt([job.record.path for job in some if job.record])
                self._progress.expect(sum(job.file.size for job in some))
                for job in filter(self._fits, some):  # again: others before it were added
                    self._reserved += job.usd
                    yield job
            yield None

    def _fits(self, job: Job) -> bool:
        """Whether MAX_COST allows the job beside what is reserved; False if a price of it is
        not known.  Warns of the first job that is left out; the run has ended early then."""
        limit = self._config.max_cost
        if limit is None or round(self._reserved + job.usd - limit, 9) <= 0:
            return True
        if not self.ended_early:
            message = "MAX_COST is %s, and %s may cost %s beside %s so far: it is left out"
            if math.isnan(job.usd):
                message += ": set the prices of its storage class in PRICES"
            path, usd = printable(job.file.path), format_usd(job.usd)
            log.warning(message, format_usd(limit), path, usd, format_usd(self._reserved))
        self.ended_early = "MAX_COST was reached"
        return False

    def _transfer(self, job: Job) -> Archived:
        """Reads one file, and uploads it unless S3 holds it; FileError, Fatal, Stopped."""
        if job.stale:
            self._bucket.abort_upload(job.upload.key, job.stale.id)
        upload = self._bucket.find_parts(job.upload) if job.upload.id else job.upload
        # An upload that S3 does not have any more may be complete.
        compares = job.compares or upload.id != job.upload.id
        found = self._object_to_compare(job) if compares else None
        # The mtime from a HEAD is as good as a row of ours, unless the object was stored so
        # soon after it that a later change could have the same mtime.  (`found` may be the
        # row's object.  Its mtime is its uploaded_at, which this condition never accepts.)
        if found and found.mtime == job.file.mtime < found.uploaded_at - RECENTLY_STORED:
            return Archived(Record(upload.path, found.mtime, found), is_upload=False)
        if job.upload.part_size:
            with self._turns:
                self._box.stopping.check()
                return self._transfer_large(job, found, upload)
        with contextlib.closing(FileReader(self._box, job.file)) as reader:
            data = reader.read()
        if found and (same := self._bucket.match_content(found, io.BytesIO(data).read)):
            return Archived(Record(upload.path, reader.final_mtime, same), is_upload=False)
        with self._turns:
            self._box.stopping.check()
            stored = self._bucket.put(upload.key, data, reader.file.mtime)
        self._progress.moved(len(data))
        return Archived(Record(upload.path, reader.final_mtime, stored), is_upload=True)

    def _object_to_compare(self, job: Job) -> StoredObject | None:
        """The object to compare the file with; None if it cannot be the same.  The row is
        enough if it has a CRC-32; else S3 gets a HEAD; FileError."""
        if job.record and job.record.stored.crc32 is not None:
            return job.record.stored
        found = self._bucket.head(job.upload.key)
        return found if found and found.size == job.file.size else None

    def _transfer_large(self, job: Job, found: StoredObject | None, upload: Upload) -> Archived:
        """Reads a large file to compare it, and again to upload what follows the parts that
        are stored.  FileError if it has changed since it was listed: the parts are of that
        version."""
        file, offset = job.file, len(upload.parts) * upload.part_size
        if found:
            try:
                with contextlib.closing(FileReader(self._box, file)) as reader:
                    same = self._bucket.match_content(found, reader.read)
            except Stopped:  # the next run uploads instead: a comparison cannot be continued
                self._state.note_upload(upload)
                raise
            if same:
                return Archived(Record(upload.path, reader.final_mtime, same), is_upload=False)
        with contextlib.closing(FileReader(self._box, file, offset)) as reader:
            if reader.file != file:
                raise FileError("changed since it was listed: the next run archives it")
            reader.read_ahead()  # the box answers while S3 begins the upload
            if not upload.id:
                self._state.note_upload(upload)  # S3's answer may get lost
                # Without an mtime, it is not continued: its parts could be of two versions.
                upload = self._bucket.begin_upload(upload)._replace(mtime=reader.final_mtime)
                self._state.note_upload(upload)
            self._progress.moved(offset)
            hooks = self._progress.moved, partial(self._pool.needs, job)
            stored = self._bucket.upload(upload, reader.read, *hooks)
            return Archived(Record(upload.path, reader.final_mtime, stored), is_upload=True)

    def _settle(self, outcomes: list[Outcome[Job, Archived]]) -> None:
        self._state.record(archived.record for _, archived, _ in outcomes if archived)
        for job, archived, error in outcomes:
            path = printable(job.file.path)
            if archived and archived.is_upload:
                size = archived.record.stored.size
                self.early += job.early
                self.uploaded += 1
                self.bytes_uploaded += size
                files_log.info("archived %s (%s bytes)", path, f"{size:,}")
            elif archived:
                # Only the look-ups were sent, whose price does not depend on a class.
                self._reserved -= job.usd - self.prices.requests("", job.lookups)
                self.others["Compared files"] += 1
                self._progress.moved(job.file.size)
                log.debug("compared %s", path)
            elif error and error.code == VANISHED:
                self.others["Vanished"] += 1
                log.info("vanished %s", path)
            elif error:
                self.add_failure(job.file.path, error)


def check_changes(context: Context, state: State, limit: int) -> None:
    """Walks the box, before the run does.  Fatal if more than `limit` per cent of the archived
    files have changed or are gone, as after an attack by ransomware.  A file that is gone does
    not count again once this has let a run go on."""
    forecast = Forecast(context, state, lambda *_: None)
    forecast.walk_box()
    before, gone = state.archived().total().files, len(forecast.newly_gone)
    if (forecast.altered + gone) * 100 > limit * before:
        found = f"{forecast.altered:,} have changed and {gone:,} are gone"
        reason = f"MAX_CHANGED is {limit} %, but of {before:,} archived files {found}"
        remedy = "look at plan --list; if it is right, set MAX_CHANGED=100 for one run"
        raise Fatal(f"{reason}: nothing was sent; {remedy}")
    state.note_gone(forecast.newly_gone)


def run(context: Context, options: argparse.Namespace) -> int:
    """Archives what is new or changed (the default).  0, or 3 if something is incomplete."""
    config, stopping, status = context.config, context.box.stopping, FATAL
    limit = min(config.max_runtime or 0, threading.TIMEOUT_MAX)
    # Closing the box ends all reads.  What is on its way to S3 still gets RUNTIME_GRACE.
    out_of_time = threading.Timer(limit, context.box.close)
    if options.new_source:
        context.box.session()  # fails with a mistyped user, before the state is emptied
    with locked(config), contextlib.closing(State(config, options.new_source)) as state:
        work = Run(context, state)
        state.record_run(work.started_at)
        try:
            if config.max_runtime is not None:
                out_of_time.start()
            if state.is_new:
                take_over(config, context.bucket, state)
            if config.max_changed is not None:
                check_changes(context, state, config.max_changed)
            work.archive()
            status = INCOMPLETE if work.failed or work.ended_early else 0
        except Stopped:
            if stopping.received is not None:
                status = 128 + stopping.received
                work.ended_early = f"by {signal.Signals(stopping.received).name}"
            else:
                status, work.ended_early = INCOMPLETE, "MAX_RUNTIME was over"
                log.warning("MAX_RUNTIME is over: the rest is left to the next run")
        finally:
            out_of_time.cancel()
            if status == FATAL:
                work.ended_early = "by an error"
            with stopping.deferred():
                context.show_summary("SUMMARY", dict(work.rows()))
                counts = (work.uploaded, work.unchanged, work.failed, work.bytes_uploaded)
                state.record_run(work.started_at, int(time.time()), status, *counts, work.spent)
    return status


# ------------------------------------------------------------------ Inspection

NOTHING_THERE = "nothing is archived under this path; give it exactly, patterns do not work"
NO_STATE = "%s is missing, unfinished, or of an earlier archive.py: archive.py run makes it"


def ask(question: Callable[[], T]) -> T | None:
    """The answer to question(); None, after a warning, if it raises an ArchiveError."""
    try:
        return question()
    except ArchiveError as error:
        log.warning("%s", error)
        return None


def wanted_paths(context: Context, options: argparse.Namespace) -> list[bytes]:
    """The paths of the command line, relative to REMOTE_PATH, without those below another one.
    An empty list stands for all files.  Fatal for /, unless that is REMOTE_PATH, and for --at
    if the bucket has never kept versions; FileError."""
    root = context.config.remote_path.removeprefix(b"./")
    start = join(root, b"")
    names = [os.fsencode(path).rstrip(b"/").removeprefix(b"./") for path in options.path]
    if b"" in names and root != b"/":  # a script may have left a variable empty: $FOLDER/
        message = f"/ is not below REMOTE_PATH {printable(root)}: for all files, give no path"
        raise Fatal(message, status=USAGE)
    if options.at is not None and not context.bucket.versioning():
        raise Fatal("--at: the bucket is not versioned, and has no earlier versions")
    relative = {name.removeprefix(start).removeprefix(b"./") for name in names}
    if relative & {b"", b"."} or root in names:  # REMOTE_PATH itself
        return []
    folders = tuple(join(path, b"") for path in relative)
    return sorted(path for path in relative if not path.startswith(folders))


Selected = tuple[bytes, StoredObject]  # the path of its key, and the object


def select_objects(
    context: Context, at: float | None, paths: list[bytes], missing: set[bytes]
) -> Iterator[Selected]:
    """The objects at and below these paths, or all if there are no paths, now or at the time
    `at`.  Paths without objects are in `missing` at the end; without `paths`, this is Fatal."""
    config, bucket = context.config, context.bucket
    for path in paths or [b""]:
        missing.add(path)
        rclone_key = config.prefix + path_text(path)  # as rclone and others write it
        for start in sorted({unchecked_key(config.prefix, path), rclone_key}):
            for found in bucket.objects(start, at):
                if not path or found.key == start or found.key.startswith(start + "/"):
                    missing.discard(path)
                    yield unescape(found.key[len(config.prefix) :]), found
    if b"" in missing:
        when = f" at {format_time(at)}" if at is not None else ""
        reason = "correct S3_BUCKET or S3_PREFIX" if at is None else "correct --at"
        raise Fatal(f"nothing is archived in {config.url}{when}: {reason}")


def ls(context: Context, options: argparse.Namespace) -> int:
    """Lists what is archived, from the bucket's listing.  0, or 3 if a path has nothing."""
    listed, paths, missing = Count(), wanted_paths(context, options), set[bytes]()
    for name, found in select_objects(context, options.at, paths, missing):
        listed.files, listed.bytes = listed.files + 1, listed.bytes + found.size
        if options.json:
            utc = datetime.fromtimestamp(found.uploaded_at, timezone.utc)
            line = {
                "path": path_text(name),
                "size": found.size,
                "uploaded_at": f"{utc:%Y-%m-%dT%H:%M:%SZ}",
                "storage_class": found.storage_class,
                "state": found.thaw_state,
                "key": found.key,
                "etag": found.etag,
                "version_id": found.version_id,
            }
            print_line(json.dumps(line))
        else:
            uploaded = f"{datetime.fromtimestamp(found.uploaded_at):%Y-%m-%d %H:%M}"
            state = found.thaw_state if found.thaw_state in (RESTORING, RESTORED) else ""
            columns = f"{format_size(found.size):>11}  {uploaded}  {found.storage_class:<12}"
            print_line(f"{columns} {state:<9}  {printable(name)}")
    if not options.json:
        print_line(f"{listed.files:,} files, {format_size(listed.bytes)}")
    for path in sorted(missing):
        log_failure(path, NOTHING_THERE)
    return INCOMPLETE if missing else 0


def status(context: Context, _options: argparse.Namespace) -> int:
    """Shows what is archived, its cost, the last runs, and the box's room.  0, even if the
    state, the box or the bucket cannot be asked."""
    config, bucket, prices = context.config, context.bucket, context.bucket.prices

    def read_state() -> tuple[Counts, list[sqlite3.Row]]:
        with contextlib.closing(State(config, copy=True)) as state:
            if state.is_new:
                log.warning(NO_STATE, config.state_db)
            return state.archived(), state.past_runs()

    rows: dict[str, object] = dict.fromkeys(("Archived", "Storage a month", "Spent in 30 days"))
    counts, runs = ask(read_state) or (Counts(), None)
    if runs is not None:
        since = time.time() - 30 * DAY  # SQLite keeps a NaN as NULL; a killed run has no end
        spent = [p["spent"] for p in runs if p["started_at"] >= since and p["ended_at"]]
        rows = {"Archived": counts.total(), **counts}
        rows["Storage a month"] = total_cost(counts, prices.month)
        rows["Spent in 30 days"] = math.nan if None in spent else math.fsum(spent)
    if others := {*counts} - {config.storage_class, config.small_files_class}:
        log.warning("some files are not in STORAGE_CLASS, but in %s", ", ".join(sorted(others)))
    rows["Box used"], rows["Box free"] = ask(context.box.space) or (None, None)
    rows["Unfinished uploads"] = ask(bucket.count_unfinished)
    rows["Lifecycle rule"] = ask(bucket.check_lifecycle)
    rows["Versioning"] = ask(lambda: bucket.versioning() == "Enabled")
    rows["Prices"] = prices.note
    context.show_summary("STATUS", rows)
    context.summary["runs"] = runs and [dict(past) for past in runs[:5]]
    if runs is not None:
        show_runs(runs[:5])
    return 0


def show_runs(runs: list[sqlite3.Row]) -> None:
    columns = "{:<25}  {:<8}{:>10}{:>8}{:>12}{:>10}".format
    names = columns("Run", "status", "uploaded", "failed", "bytes", "took")
    show("")
    show(names if runs else "no run yet")
    for started_at, ended_at, ended_with, uploaded, _, failed, size, _ in runs:
        took = "" if ended_at is None else f"{ended_at - started_at:,} s"
        how = "no end" if ended_with is None else ended_with
        counts = f"{uploaded or 0:,}", f"{failed or 0:,}", format_size(size or 0)
        show(columns(format_time(started_at), how, *counts, took))


def verify(context: Context, options: argparse.Namespace) -> int:
    """Compares the state with the bucket's listing; downloads nothing.  0, or 3 if they
    differ.  --repair corrects the state: the next run uploads or compares these files."""
    config, repair, faults = context.config, options.repair, 0
    labels = (AGREE, NO_OBJECT, WRONG_SIZE, WRONG_ETAG, NOT_RECORDED)
    counts = Counter(dict.fromkeys(labels, 0))
    lock = locked(config) if repair else contextlib.nullcontext()
    copy = not repair or not config.state_db.exists()  # verify creates no database
    with lock, contextlib.closing(State(config, copy=copy)) as state:
        if state.is_new:
            raise Fatal(NO_STATE % config.state_db)
        paths = context.progress.counting(reconcile(config, context.bucket, state), "verifying")
        for path, verdict, reason, _ in paths:
            counts[verdict] += 1
            if reason:
                faults += 1
                log_failure(unescape(path), reason)
    if not counts.total():
        raise Fatal(f"nothing is archived in {config.url}: correct S3_BUCKET or S3_PREFIX")
    show_table("VERIFY", counts)
    if repair and faults:
        log.warning("the state is repaired: the next run uploads what S3 does not hold")
    return INCOMPLETE if faults else 0


def check(context: Context, _options: argparse.Namespace) -> int:
    """Tries settings, box, bucket and permissions, and says what is wrong.  Leaves
    nothing on the box or in S3.  0, or 1 if something that a run needs has failed."""
    config, bucket, root, status = context.config, context.bucket, context.config.remote_path, 0

    def try_state() -> None:
        with locked(config):
            State(config, copy=True).close()

    optional: dict[str, Callable[[], object]] = {
        "lifecycle rule for unfinished uploads": bucket.check_lifecycle,
        "versioning": lambda: bucket.versioning() == "Enabled",
    }
    groups: list[dict[str, Callable[[], object]]] = [
        {"settings": lambda: config, f"state in {config.state_db}": try_state},
        {
            "Storage Box (host key, login, SFTP)": context.box.session,
            f"REMOTE_PATH {printable(root)}": lambda: context.box.list_folder(root),
        },
        bucket.permission_probes() | optional,
    ]
    for group in groups:
        for name, question in group.items():
            verdict, text, is_over = "ok", name, False
            try:
                if question() is False:
                    verdict, text = "note", f"{name}: no, see the README, The bucket"
            except ArchiveError as error:
                # Another run holds the lock, or restore may have other credentials.
                is_harmless = error.status == LOCKED or name in ("s3:RestoreObject", *optional)
                verdict, text = "note" if is_harmless else "WRONG", f"{name}: {error}"
                status = status if is_harmless else FATAL
                # The rest of the group needs what has failed, unless that is a permission.  But
                # without the permission to abort, s3:PutObject would leave an upload behind.
                is_over = not is_harmless and (error.code != DENIED or "Abort" in name)
            show(f"{verdict:<5}  {text}")
            if is_over:
                break
    return status


# --------------------------------------------------------------------- Restore


class Download:
    """An object that is being read."""

    def __init__(self, context: Context, found: StoredObject):
        """Sends the GET.  FileError if S3 sends another object than was listed, or refuses;
        its code is INVALID_STATE if the object is cold."""
        self._context, version = context, {"Key": found.key, "VersionId": found.version_id}
        self._get = partial(context.bucket.request, "get_object", **version)
        answer = self._get(ChecksumMode="ENABLED")
        self._body = answer["Body"]  # None once `blocks` has taken it
        self.stored = stored_object(found.key, answer)
        if self.stored.size != found.size or found.etag not in ("", self.stored.etag):
            sent = f"{self.stored.size:,} bytes of ETag {self.stored.etag}"
            raise FileError(f"S3 sent {sent}, not {found.size:,} of {found.etag} as listed")
        # The file's name until it is complete.  It depends on bucket and key only: a pass that
        # was killed leaves one such file at most, and the next pass replaces it.
        uri = f"s3://{context.config.bucket}/{found.key}"
        self.partial_name = f".archive-{hashlib.sha256(uri.encode()).hexdigest()[:32]}.partial"

    def blocks(self, block_size: int) -> Iterator[bytes]:
        """The object's bytes, from the start at each call, in blocks of at most this size.  A
        broken download is continued.  If the size or CRC-32 is not that of the first answer,
        FileError after the last block: the bytes are not to be used then.  Also FileError and
        Fatal from S3, and Stopped."""
        stored, size, reason = self.stored, self.stored.size, ""
        offset = crc32 = failures = 0
        while offset < size and failures < S3_ATTEMPTS:
            rest = {"IfMatch": f'"{stored.etag}"', "Range": f"bytes={offset}-"}
            body, self._body = self._body or self._get(**rest)["Body"], None
            failures += 1  # until a block arrives
            try:
                for block in body.iter_chunks(block_size):
                    self._context.box.stopping.check()
                    self._context.progress.moved(len(block))
                    offset, crc32, failures = offset + len(block), zlib.crc32(block, crc32), 0
                    yield block
            except (aws.BotoCoreError, urllib3.exceptions.HTTPError) as error:
                reason = f": {error}"
        if offset != size:
            raise FileError(f"S3 sent {offset:,} of {size:,} bytes{reason}")
        if stored.crc32 not in (None, crc32):
            both = f"{crc_text(crc32)}, not {crc_text(stored.crc32)}"
            raise FileError(f"damaged on its way: its CRC-32 is {both}")


class LocalFolder:
    """A folder of this machine to restore to."""

    def __init__(self, folder: str):
        """Creates the folder if it is missing; Fatal if files cannot be created in it."""
        with fatal_os_errors(f"{folder} cannot be written to"):
            # No shell expands the ~ of --to=~/x.
            self._folder = Path(os.path.realpath(os.path.expanduser(folder)))
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()

    def free_space(self) -> float:
        with fatal_os_errors(f"{self._folder} cannot be used any more"):
            return shutil.disk_usage(self._folder).free

    def kept_mtime(self, name: bytes, mtime: int) -> int:
        """The mtime that the disk would store for this one: some disks have only even
        seconds, and each has an earliest and a latest time."""
        folder = (self._folder / os.fsdecode(name)).parent
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            os.utime(file.name, (mtime, mtime))  # a descriptor if the file has no name
            return int(os.fstat(file.fileno()).st_mtime)
        return mtime

    def find(self, name: bytes) -> Attributes | None:
        """The attributes of what has this name, None if nothing has; FileError."""
        try:
            found = (self._folder / os.fsdecode(name)).lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileError(f"cannot be looked up: {error}") from None
        return Attributes(found.st_size, int(found.st_mtime), found.st_mode)

    def store(self, name: bytes, download: Download, overwrite: bool) -> None:
        """Writes the file under another name, and renames it.  FileError, also if a file has
        this name by then and `overwrite` is False; Fatal if the disk is full."""
        path, stored = self._folder / os.fsdecode(name), download.stored
        partial_path = path.with_name(download.partial_name)
        if os.path.realpath(path.parent) != str(path.parent):
            raise FileError("a folder above it is a link, which may lead anywhere")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_path.unlink(missing_ok=True)  # of a pass that was killed
            with partial_path.open("xb") as file:
                file.writelines(download.blocks(DOWNLOAD_BLOCK))
                file.flush()
                os.fsync(file.fileno())  # the next pass trusts size and mtime
                if not os.path.samestat(os.fstat(file.fileno()), partial_path.lstat()):
                    raise FileError("another restore to this folder is writing it")
            os.utime(partial_path, (stored.mtime, stored.mtime))
            if not overwrite and os.path.lexists(path):
                raise FileError("another file has appeared there: --overwrite replaces it")
            partial_path.replace(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Fatal(f"{self._folder}: {error}") from None
            raise FileError(f"cannot be stored: {error}") from None
        finally:
            with contextlib.suppress(OSError):
                partial_path.unlink()


class BoxFolder:
    """A folder of the box to restore to, with the methods of LocalFolder."""

    def __init__(self, box: StorageBox, folder: str, overwrite: bool):
        """Creates the folder if it is missing; Fatal if no file can be stored in it."""
        self._box, self._folder = box, re.sub(b"/+", b"/", os.fsencode(folder))
        self._known = {b""}  # folders that exist; b"" stands for /
        # Stores an empty file as any other: a server may allow OPEN, but not RENAME.
        unique, stored = os.urandom(8).hex(), SimpleNamespace(size=0, mtime=1_000_000_000)
        name = f".archive-{unique}.partial"
        empty: Any = SimpleNamespace(stored=stored, partial_name=name, blocks=lambda _: ())
        probe = f".archive-{unique}.probe".encode()
        try:
            self.store(probe, empty, overwrite)
        except FileError as error:
            remedy = "take an account that may write; --overwrite needs posix-rename, too"
            raise Fatal(f"{folder} cannot be written to: {error}; {remedy}") from None
        finally:
            with contextlib.suppress(FileError):  # there may be none
                box.retry(lambda s: s.send((FXP_REMOVE, join(self._folder, probe))).result())

    def free_space(self) -> float:
        space = self._box.space()
        return space[1] if space else math.inf

    def kept_mtime(self, _name: bytes, mtime: int) -> int:
        return min(max(mtime, 0), 2**32 - 1)  # SFTP's range

    def find(self, name: bytes) -> Attributes | None:
        return self._box.retry(partial(look_up, path=join(self._folder, name)))

    def store(self, name: bytes, download: Download, overwrite: bool) -> None:
        """As LocalFolder.store; Fatal if the box is full."""
        path, stored = join(self._folder, name), download.stored
        partial_path = join(path.rpartition(b"/")[0], download.partial_name.encode())
        mtime = self.kept_mtime(name, stored.mtime)
        complete = stored.size, mtime  # the first two of its Attributes
        # RENAME replaces no file.  After a REMOVE, a RENAME that fails would leave none at all.
        rename = (FXP_EXTENDED, b"posix-rename@openssh.com") if overwrite else (FXP_RENAME,)

        def check_file(session: Session, where: bytes) -> None:
            size, time_there, _ = session.send((FXP_LSTAT, where)).result()
            if (size, time_there) != complete:
                wanted = f"not {stored.size:,} bytes of mtime {mtime} on the box"
                raise FileError(f"{wanted}, but {size} of {time_there}")

        def write_and_rename(session: Session) -> None:
            self._make_folders(session, path)
            # A killed pass may have left a file, which ProFTPD would not let us overwrite.
            found, _ = session.send((FXP_LSTAT, path), (FXP_REMOVE, partial_path)).results()
            if isinstance(found, Attributes) and found[:2] == complete:
                return  # an earlier attempt has renamed it, and the reply got lost
            handle = session.send((FXP_OPEN, partial_path, FOR_WRITING, NO_ATTRIBUTES)).result()
            try:  # no retry after FAILURE from here on: it would download the object again
                write_file(session, handle, download, mtime)
                check_file(session, partial_path)
                session.send((*rename, partial_path, path)).result()
                check_file(session, path)  # an OPEN of a lost session may have emptied it
            except SFTPError as error:
                raise FileError(f"the box cannot store it: {error}") from None

        try:
            self._box.retry(write_and_rename)
        except FileError as error:
            self._known = {b""}  # somebody may have deleted a folder
            free = self.free_space()  # before the partial file is deleted
            with contextlib.suppress(SFTPError):  # there may be none
                self._box.retry(lambda s: s.send((FXP_REMOVE, partial_path)).result())
            if free < MIB:
                raise Fatal(f"{error}; the box is full") from None
            raise

    def _make_folders(self, session: Session, path: bytes) -> None:
        """Creates the missing folders above `path`; the server refuses those that exist.
        FileError if one is a file, or a link in `self._folder`; SFTPError, ConnectionLost."""
        for folder in itertools.accumulate(path.split(b"/")[:-1], join):
            if folder in self._known:
                continue
            making = session.send((FXP_MKDIR, folder, NO_ATTRIBUTES))
            if not (found := look_up(session, folder)):
                making.result()  # raises the reason, unless somebody has deleted the folder
                continue
            mode = found.mode or 0
            is_inner = folder.startswith(join(self._folder, b""))
            if stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and is_inner):
                raise FileError(f"{printable(folder)} is a file or a link, not a folder")
            self._known.add(folder)


def look_up(session: Session, path: bytes) -> Attributes | None:
    """The attributes of `path`, of a link itself; None if it does not exist.  READLINK is sent
    because ProFTPD's LSTAT follows links; SFTPError, ConnectionLost."""
    found, target = session.send((FXP_LSTAT, path), (FXP_READLINK, path)).results()
    if isinstance(found, SFTPError):
        if found.code == VANISHED:
            return None
        raise found
    is_link = target and not isinstance(target, SFTPError)  # some servers send an empty list
    return Attributes(found.size, found.mtime, stat.S_IFLNK if is_link else found.mode)


def write_file(session: Session, handle: bytes, download: Download, mtime: int) -> None:
    """Writes the object into the file that `handle` is open for, and closes it; SFTPError,
    FileError of the download, ConnectionLost."""
    batches, at = deque[Batch](), 0
    try:
        for block in download.blocks(WRITE_SIZE):
            batches.append(session.send((FXP_WRITE, handle, *divmod(at, 1 << 32), block)))
            at += len(block)
            if len(batches) > WRITES_AHEAD:
                batches.popleft().result()
        for batch in batches:
            batch.result()
        # Not before: some servers write meanwhile, which changes the mtime.
        session.send((FXP_FSETSTAT, handle, ATTR_ACMODTIME, mtime, mtime)).result()
    finally:
        closing = session.send((FXP_CLOSE, handle))
    closing.result()


# What happens to an object: labels of the table, except READY.
THERE, DONE, FAILED = "Already there", "Restored files", "Failed files"
ASKED, BUSY, NOT_ASKED = "Asked of S3", "Under way at S3", "Not asked for"
READY = "Ready"  # can be downloaded


class Restore:
    """Downloads what can be read, and asks S3 to restore cold objects, in passes."""

    def __init__(self, context: Context, options: argparse.Namespace):
        """Creates the folder to restore to; Fatal, FileError."""
        self._context, self._options = context, options
        self._config, self._bucket = context.config, context.bucket
        self._paths = wanted_paths(context, options)
        self._select = partial(select_objects, context, options.at)
        self._target: LocalFolder | BoxFolder
        if options.to_box:
            self._target = BoxFolder(context.box, options.to_box, options.overwrite)
        else:
            self._target = LocalFolder(options.to)
        self._asked_at: float | None = None  # when S3 was last asked to restore an object
        # Files that were compared get no HEAD again.  Digests: there may be millions of them.
        self._present: set[bytes] = set()

    def one_pass(self) -> int:
        """Restores what can be read now, and asks S3 for the rest.  The exit status."""
        options = self._options
        labels = THERE, DONE, ASKED, BUSY, NOT_ASKED, FAILED
        self._counts = Counts({label: Count() for label in labels})
        self._missing: set[bytes] = set()  # paths without an object
        cold, ready = self._survey()
        is_agreed = options.manifest or options.yes or not cold
        if not is_agreed and sys.stdin and sys.stdin.isatty():
            print("Ask S3 to restore these? [y/N] ", end="", flush=True, file=sys.stderr)
            is_agreed = sys.stdin.readline().strip().lower() in ("y", "yes")
        if not is_agreed:
            message = "nothing was asked for: it costs money; run it again with --yes"
            raise Fatal(message, status=USAGE)
        agreed_to = 0 if options.manifest else cold.total().files
        self._allowed_requests = threading.Semaphore(agreed_to)
        self._context.progress.expect(ready)
        path = options.manifest or Path(os.devnull)
        with fatal_os_errors(f"--manifest {path}", USAGE), path.open("wb") as manifest:
            try:
                self._restore_all(manifest)
            finally:
                self._context.show_summary("RESTORE", dict(self._rows()))
        return self._conclude()

    def _survey(self) -> tuple[Counts, int]:
        """The cold objects by class, and the bytes that can be downloaded.  Shows what it
        costs to restore the cold ones and to download all, and warns if there is no room."""
        prices, tier, days = self._bucket.prices, self._options.tier, self._options.days
        cold, needed = Counts(), Counts({READY: Count()})
        outcomes = self._outcomes(self._label_of)
        for (_, found), label, _ in self._context.progress.counting(outcomes, "looking"):
            if label == NOT_ASKED:
                cold.add(found.storage_class, found.size)
            if label in (READY, BUSY, NOT_ASKED):
                needed.add(label, found.size)
        total = needed.total()
        if cold:
            when = f"ready within {TIERS[tier]} hours, for {days} days"
            rows: dict[str, object] = {
                "To be asked of S3": cold.total(),
                "Tier": f"{tier.capitalize()}, {when}",
                "Restore": total_cost(cold, partial(prices.restore, tier=tier, days=days)),
                "Download": prices.download(total.files, total.bytes),
                "Prices": prices.note,
            }
            show_table("ESTIMATE", rows)
        if total.bytes > (free := self._target.free_space()):
            message = "%s are to be restored, but only %s are free there: copies that S3 makes "
            message += "cost money while they wait"
            log.warning(message, format_size(total.bytes), format_size(free))
        return cold, needed[READY].bytes

    def _restore_all(self, manifest: BinaryIO) -> None:
        """Downloads what can be read, asks S3 for the rest, counts it, and logs failures.
        `manifest` gets a line of CSV for each object that is not asked for."""
        for (name, found), label, error in self._outcomes(self._restore_one):
            self._counts.add(label or FAILED, found.size)
            if error:
                log_failure(name, error)
            elif label == DONE:
                files_log.info("restored %s (%s bytes)", printable(name), f"{found.size:,}")
            elif label == ASKED:
                self._asked_at = time.time()
            elif label == NOT_ASKED:
                columns = self._config.bucket, quote(found.key), found.version_id
                manifest.write(",".join(filter(None, columns)).encode() + b"\n")
        for path in sorted(self._missing):
            self._counts.add(FAILED, 0)
            log_failure(path, NOTHING_THERE)

    def _rows(self) -> Rows:
        yield from ((label, count.files) for label, count in self._counts.items())
        yield "Restored bytes", self._counts[DONE].bytes
        if self._asked_at is not None:
            yield "Asked at", format_time(self._asked_at)
            yield "Promised by", format_time(self._asked_at + TIERS[self._options.tier] * 3600)

    def _conclude(self) -> int:
        """Says what remains to be done, and returns the exit status."""
        counts, options, at = self._counts, self._options, ""
        waiting = sum(counts[label].files for label in (ASKED, BUSY, NOT_ASKED))
        if options.at is not None:  # an age like 1d is another time when it is run again
            then = datetime.fromtimestamp(options.at).astimezone()
            at = f" with --at {then.isoformat(timespec='seconds')}"
        if options.manifest and counts[NOT_ASKED].files:
            message = "%s lists %s objects: upload it, start an S3 Batch Operations job with "
            message += "it (Restore, %d days, %s), then run restore again%s without --manifest"
            job = options.days, options.tier.capitalize(), at
            log.warning(message, options.manifest, f"{counts[NOT_ASKED].files:,}", *job)
        elif waiting:
            message = "%s files are still being restored by S3, which takes up to %d hours."
            message += "" if options.wait else f"  Run the same command again later{at}."
            log.warning(message, f"{waiting:,}", TIERS[options.tier])
        return THAWING if waiting else INCOMPLETE if counts[FAILED].files else 0

    def _outcomes(self, work: Callable[[bytes, StoredObject], str]) -> Iterator[Any]:
        """Each wanted object with the label that `work` returns, or with a FileError."""
        box, threads = self._context.box, self._config.transfers
        pool: Parallel[Selected, str] = Parallel(lambda one: work(*one), box, threads)
        with contextlib.closing(pool.outcomes(self._wanted())) as outcomes:
            yield from itertools.chain.from_iterable(outcomes)

    def _wanted(self) -> Iterator[Selected]:
        """The selected objects and the paths to restore them to.  A file whose path is also a
        folder gets another name.  If two keys stand for one path, the key that this
        program writes wins."""
        # Files that may turn out to be folders, too: keys are sorted as a, a.txt, a/b.
        pending: list[Selected] = []
        for path, found in self._select(self._paths, self._missing):
            key, our_key = found.key, unchecked_key(self._config.prefix, path)
            while pending and not key.startswith(pending[-1][1].key):
                yield pending.pop()
            if pending and key.startswith(pending[-1][1].key + "/"):
                file_path, file = pending.pop()
                name = file_path + b".file"
                while any(self._select([name], set())):
                    name += b".file"
                message = "%s is a folder as well: the file of that name is restored as %s"
                warn_once(message, printable(file_path), printable(name))
                yield name, file
            # A generator: it sends no request unless another program wrote the key.
            same_path = (other.key for _, other in self._select([path], set()))
            if our_key != key and our_key in same_path:
                warn_once("left out %s: %s stands for the same name", key, our_key)
            else:
                pending.append((path, found))
        yield from pending

    def _label_of(self, name: bytes, found: StoredObject) -> str:
        """THERE, READY, BUSY or NOT_ASKED.  FileError if no file can have the name, or if what
        has it may not be replaced."""
        is_windows_name = os.name == "nt" and (b"\\" in name or b":" in name)
        if {b"", b".", b".."} & set(name.split(b"/")) or b"\0" in name or is_windows_name:
            raise FileError("no file can have this name")
        if existing := self._target.find(name):
            digest = md5(repr((found.key, found.etag, existing)).encode()).digest()
            if digest in self._present:
                return THERE
            if not stat.S_ISREG(existing.mode or 0):
                raise FileError("something that is not a file has its name")
            # A listing has no metadata.
            mtime = (self._bucket.head(found.key, found.version_id) or found).mtime
            kept = mtime if existing.mtime == mtime else self._target.kept_mtime(name, mtime)
            if existing[:2] == (found.size, kept):
                self._present.add(digest)
                return THERE
            if not self._options.overwrite:
                other = f"{existing.size:,} bytes of mtime {existing.mtime} are there"
                wanted = f"not {found.size:,} of {mtime}"
                raise FileError(f"{other}, {wanted}: --overwrite replaces them")
        return {COLD: NOT_ASKED, RESTORING: BUSY}.get(found.thaw_state, READY)

    def _restore_one(self, name: bytes, found: StoredObject) -> str:
        """Downloads the object or asks S3 for it, and returns its label then; FileError."""
        options, label = self._options, self._label_of(name, found)
        # The user has agreed to a number of requests; more objects may be cold by now.
        if label == NOT_ASKED and self._allowed_requests.acquire(blocking=False):
            self._context.box.stopping.check()  # no paid request after the end
            can_be_read = self._bucket.request_restore(found, options.tier, options.days)
            label = READY if can_be_read else ASKED
        if label != READY:
            return label
        try:
            self._target.store(name, Download(self._context, found), options.overwrite)
        except FileError as error:
            # An object in an archive tier of INTELLIGENT_TIERING is never asked for.
            if error.code != INVALID_STATE or found.storage_class not in COLD_CLASSES:
                raise
            return NOT_ASKED  # S3's copy has expired meanwhile; the next pass asks again
        return DONE


def restore(context: Context, options: argparse.Namespace) -> int:
    """Brings files back; run it again until it ends with 0.  75 while one is cold, 3 if one
    failed, else 0.  --wait repeats the pass while it gives 75."""
    with locked(context.config, ".restore.lock"):
        work = Restore(context, options)
        while options.wait:
            try:
                if (status := work.one_pass()) != THAWING:
                    return status
            except FileError as error:  # of a listing or the box: the next pass may succeed
                log.warning("%s", error)
            log.info("looking again in %d minutes", WAIT_PAUSE // 60)
            context.box.stopping.wait(WAIT_PAUSE)
            context.box.stopping.check()
        return work.one_pass()


# ---------------------------------------------------------------- Command line

STATUSES = """\
exit statuses:
  0      all selected files are archived (restore: are there; verify: agree)
  1      fatal error: credentials, host key, bucket, box, state, MAX_CHANGED
  2      usage or settings
  3      incomplete: a file failed or differs; MAX_RUNTIME or MAX_COST reached
  11     another run, or another restore, is at work
  75     S3 is still restoring: run it again later
  128+n  ended by signal n
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message}; see {self.prog} --help\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    # Their defaults are below: those of a command would replace what stands before its name.
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    env_file = "the settings (default: .env beside archive.py)"
    common.add_argument("--env-file", type=Path, metavar="FILE", help=env_file)
    level = common.add_mutually_exclusive_group()
    add_level = partial(level.add_argument, dest="level", action="store_const")
    add_level("-v", "--verbose", const=logging.DEBUG, help="also unchanged files, tracebacks")
    add_level("-q", "--quiet", const=logging.WARNING, help="only problems and the summary")
    parser = Parser(
        prog="archive.py",
        description="Archive a Hetzner Storage Box into Amazon S3 Glacier Deep Archive.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("-V", "--version", action="version", version=f"archive.py {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(function: Callable[..., int], example: str, **flags: str) -> Parser:
        """Adds a command, whose help is the first sentence of the function's docstring."""
        text, end = (function.__doc__ or "").split(".  ")[0], f"example: archive.py {example}"
        make = partial(commands.add_parser, help=text, description=f"{text}.", epilog=end)
        command = make(function.__name__, parents=[common])
        command.set_defaults(function=function)
        add_flags(command, **flags)
        return command

    summary = "the table as JSON, and nothing else on stdout"
    new_source = "the files are at another HETZNER_USER or REMOTE_PATH now: compare them"
    of_run = add(run, "-q", json=summary, new_source=new_source)
    dry_run = partial(of_run.add_argument, action="store_const", dest="function", const=plan)
    dry_run("-n", "--dry-run", help="the same as plan --list")
    files = "first what differs: + new, * changed, ? to compare, - gone from the box, ! failing"
    add_flags(add(plan, "plan --list").add_mutually_exclusive_group(), list=files, json=summary)
    of_ls = add(ls, "ls photos/2024 --at 30d", json="as JSON, an object a line")
    add(status, "status --json", json=summary)
    repair = "correct the state: the next run uploads or compares what differs"
    add(verify, "verify --repair", repair=repair)
    of_restore = add(restore, "restore photos/2024 will.pdf --to drill", json=summary)
    add_restore(of_restore)
    add(check, "--env-file other.env check")
    for command in (of_ls, of_restore):
        path = "file or folder as on the box (default: all)"
        command.add_argument("path", nargs="*", type=parse_nonempty, metavar="PATH", help=path)
        when = "as it was then: a date, a time, or an age like 30d (for versioned buckets)"
        command.add_argument("--at", type=parse_time, metavar="WHEN", help=when)
    # Of run, also if it is not named; `list` is for its --dry-run.
    as_run = {"function": run, "new_source": False, "json": False, "list": True}
    defaults = argparse.Namespace(env_file=None, level=logging.INFO, **as_run)
    return parser.parse_args(argv, defaults)


def add_flags(options: argparse._ActionsContainer, **flags: str) -> None:
    for name, effect in flags.items():
        flag = f"--{name.replace('_', '-')}"
        options.add_argument(flag, action="store_true", help=effect)


def add_restore(command: argparse.ArgumentParser) -> None:
    """Adds the options that only `restore` has."""
    place = command.add_mutually_exclusive_group(required=True)
    add_place = partial(place.add_argument, type=parse_nonempty, metavar="FOLDER")
    add_place("--to", help="a folder of this machine")
    add_place("--to-box", help="a folder of the Storage Box")
    tiers = "bulk: within 48 hours; standard: within 12, costs more; for new requests only"
    command.add_argument("--tier", choices=TIERS, default="bulk", help=tiers)
    days = f"how long the copies can be read (default: {DAYS_RESTORED})"
    number = partial(parse_int, 1, 3650)
    command.add_argument("--days", type=number, default=DAYS_RESTORED, metavar="N", help=days)
    add_flags(command, yes="agree to the cost without being asked")
    add_flags(command, overwrite="replace other files that are in the way")
    later = command.add_mutually_exclusive_group()
    manifest = "list what is cold in this file, for S3 Batch Operations, and ask for nothing"
    later.add_argument("--manifest", type=Path, metavar="FILE", help=manifest)
    add_flags(later, wait="repeat this until all is there, instead of ending with 75")


def tune_memory() -> None:
    """Makes glibc reuse the memory of parts (mallopt(3)).  By default, it gets 16 MiB from the
    system for each part, and the page faults take a fifth of the CPU time; or it keeps a heap
    for each thread.  Also makes the garbage collector skip what was imported, and run less."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * MIB)  # M_MMAP_THRESHOLD, the highest that it takes
        libc.mallopt(-1, 192 * MIB)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX
    gc.freeze()
    gc.set_threshold(10_000)  # with 700, it takes a tenth of the CPU time of a large walk


def main(argv: list[str] | None = None) -> int:
    """Runs the command, and returns its exit status.  Nothing is raised."""
    tune_memory()  # before tqdm starts a thread, which would get a heap of its own
    stopping, summary, progress = StopEvent(), dict[str, object](), Progress(shown=False)
    exit_status, shows_json = FATAL, False
    try:
        try:
            stopping.handle_signals()
            arguments = parse_arguments(argv)
            # If it does, stdout gets one JSON object at the end, and nothing else.
            shows_json = arguments.json and arguments.function is not ls
            bars = bool(sys.stderr and sys.stderr.isatty()) and arguments.level <= logging.INFO
            results = sys.stderr if shows_json else sys.stdout
            start_logging(arguments.level, bars, results)
            config = load_config(arguments.env_file)
            if config.log_file is not None:
                start_log_file(config.log_file)
            retries = arguments.function not in (status, check)
            box, bucket = StorageBox(config, stopping, retries), Bucket(config, retries)
            progress = Progress(bars)
            context = Context(config, box, bucket, progress, summary)
            exit_status = arguments.function(context, arguments)
        finally:  # from here on, a signal cuts off neither the message nor the JSON
            stopping.is_deferred = True
            progress.close()
    except SystemExit as end:  # after help, or a message about the usage or settings
        exit_status = int(end.code or 0)
        with contextlib.suppress(AttributeError, OSError):  # there is no stdout, or no reader
            sys.stdout.flush()
    except Stopped:  # by a signal, see below; else stdout could not be written
        pass
    except ArchiveError as error:
        log.critical("%s", error)
        exit_status = error.status
    except Exception as error:  # a defect of this program, also shown as one line
        log.critical("unexpected %s: %s; -v shows where", type(error).__name__, error)
        log.debug("traceback", exc_info=True)
    if stopping.received is not None:
        exit_status = 128 + stopping.received
    if shows_json:
        try:
            summary["exit_status"] = exit_status
            print_line(json.dumps(summary, indent=2, default=vars))  # vars() of a Count
        except Stopped:
            exit_status = exit_status or FATAL
    return exit_status


if __name__ == "__main__":
    # sys.exit() would wait for threads that wait for S3.
    os._exit(main())
