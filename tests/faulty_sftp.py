"""An SFTP server for tests that misbehaves where it is told to, and counts.

paramiko carries SSH. The SFTP packets (version 3, draft-ietf-secsh-filexfer-02)
are answered here, over a folder or a tree that exists only as functions, so that
nothing stands between a test and the bytes of a reply:

    with FaultyBox() as box:
        (box.root / "big").write_bytes(content)
        cut = box.on("READ", b"big", drop, at=8 * MiB)
        archive(**box.settings())
        assert cut.fired

A fault is a function that is given a Request and returns the reply as bytes. The
honest reply is `request.reply()`, for which it may first change the request's
offset or length.
"""

import contextlib
import errno
import io
import itertools
import os
import posixpath
import random
import socket
import stat
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace

import paramiko
from servers import PASSWORD, Box

KINDS = {
    1: "INIT",
    3: "OPEN",
    4: "CLOSE",
    5: "READ",
    6: "WRITE",
    7: "LSTAT",
    8: "FSTAT",
    10: "FSETSTAT",
    11: "OPENDIR",
    12: "READDIR",
    13: "REMOVE",
    14: "MKDIR",
    16: "REALPATH",
    17: "STAT",
    18: "RENAME",
    19: "READLINK",
    200: "EXTENDED",
}
VERSION, STATUS, HANDLE, DATA, NAME, ATTRS = 2, 101, 102, 103, 104, 105
OK, EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE, UNSUPPORTED = 0, 1, 2, 3, 4, 8
HONEST_READ = 261_120  # bytes; what OpenSSH answers a larger READ with
NAMES_PER_REPLY = 100  # as OpenSSH


# --- Trees ------------------------------------------------------------------


@dataclass(frozen=True)
class Attributes:
    """What a listing or a stat tells; None leaves the field out of the reply."""

    mode: int | None
    size: int | None
    mtime: int | None

    def packed(self):
        flags, fields = 0, []
        if self.size is not None:
            flags |= 1
            fields.append(struct.pack(">Q", self.size))
        if self.mode is not None:
            flags |= 4
            fields.append(struct.pack(">I", self.mode))
        if self.mtime is not None:
            flags |= 8
            fields.append(struct.pack(">II", self.mtime, self.mtime))
        return struct.pack(">I", flags) + b"".join(fields)


class Disk:
    """A folder of this machine. Paths are bytes, relative to it, b"" is itself."""

    def __init__(self, root):
        self.root = os.fsencode(root)

    def lstat(self, path):
        return _of(os.lstat(os.path.join(self.root, path)))

    def stat(self, path):
        return _of(os.stat(os.path.join(self.root, path)))

    def names(self, path):
        folder = os.path.join(self.root, path)
        for name in sorted(os.listdir(folder)):
            with contextlib.suppress(FileNotFoundError):
                yield name, _of(os.lstat(os.path.join(folder, name)))

    def open(self, path):
        return _DiskFile(os.open(os.path.join(self.root, path), os.O_RDONLY))

    def create(self, path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        return _DiskFile(os.open(os.path.join(self.root, path), flags, 0o644))

    def make(self, path):
        os.mkdir(os.path.join(self.root, path))

    def remove(self, path):
        os.unlink(os.path.join(self.root, path))

    def link_target(self, path):
        return os.readlink(os.path.join(self.root, path))

    def rename(self, path, target):
        """As SFTP has it: not over another file."""
        os.link(os.path.join(self.root, path), os.path.join(self.root, target))
        self.remove(path)

    def replace(self, path, target):
        """As posix-rename has it."""
        os.replace(os.path.join(self.root, path), os.path.join(self.root, target))


class _DiskFile:
    def __init__(self, descriptor):
        self.descriptor = descriptor

    def stat(self):
        return _of(os.fstat(self.descriptor))

    def read(self, offset, length):
        return os.pread(self.descriptor, length, offset)

    def write(self, offset, data):
        os.pwrite(self.descriptor, data, offset)

    def set_times(self, *times):
        os.utime(self.descriptor, times)

    def close(self):
        os.close(self.descriptor)


def _of(found):
    return Attributes(found.st_mode, found.st_size, int(found.st_mtime))


class Generated:
    """A tree that takes no room: `names(path)` yields (name, Attributes) of a folder,
    `lstat(path)` gives a path's Attributes or raises FileNotFoundError. Files hold
    zero bytes."""

    def __init__(self, names, lstat):
        self.names = names
        self.lstat = self.stat = lstat

    def open(self, path):
        return _ZeroFile(self.lstat(path))

    def link_target(self, path):
        raise OSError(errno.EINVAL, "not a link")


class _ZeroFile:
    def __init__(self, attributes):
        self.attributes = attributes

    def stat(self):
        return self.attributes

    def read(self, offset, length):
        return bytes(max(0, min(length, self.attributes.size - offset)))

    def close(self):
        pass


LONG_AGO = 1_600_000_000  # an mtime, s since the epoch, that nothing finds suspicious
A_FOLDER = Attributes(stat.S_IFDIR | 0o755, 4096, LONG_AGO)


def a_file(size):
    return Attributes(stat.S_IFREG | 0o644, size, LONG_AGO)


def one_file(name, size):
    """A single file of zero bytes, of any size."""

    def lstat(path):
        return {b"": A_FOLDER, name: a_file(size)}[path]

    return Generated(lambda _: [(name, a_file(size))], lstat)


def many_files(folders, files, size=0):
    """`folders` folders d0, d1, ... with `files` files f0, f1, ... each."""

    def names(path):
        prefix, count, made = (b"f%d", files, a_file(size))
        if not path:
            prefix, count, made = (b"d%d", folders, A_FOLDER)
        return ((prefix % number, made) for number in range(count))

    return Generated(names, lambda path: a_file(size) if b"/" in path else A_FOLDER)


def deep_folders(levels, files_at=()):
    """Folders d/d/d/...; a file f of one byte in each level of `files_at`."""

    def names(path):
        level = path.count(b"d")
        if level in files_at:
            yield b"f", a_file(1)
        if level < levels:
            yield b"d", A_FOLDER

    return Generated(names, lambda path: a_file(1) if path[-1:] == b"f" else A_FOLDER)


# --- Faults -----------------------------------------------------------------


class Dropped(Exception):
    """The connection was cut on purpose."""


def honest(request):
    """No fault: for `first`, and to count requests of a kind by its rule."""
    return request.reply()


def drop(request):
    """Cut the connection instead of answering."""
    raise Dropped


def answer_then_drop(request):
    """Cut the connection when the reply has gone out."""
    request.session.send(request.reply())
    time.sleep(0.2)  # paramiko's sender is another thread
    raise Dropped


def freeze(request):
    """Never answer, nor anything after this, until the box closes."""
    request.session.box.closing.wait()
    raise Dropped


def unanswered(request):
    """Say nothing to this one, go on with the next."""
    return b""


def status(code):
    """Answer with a status, as FAILURE or EOF."""
    return lambda request: request.status(code)


def at_most(length):
    """Answer a READ with that many bytes at most."""

    def shorter(request):
        request.length = min(request.length, length)
        return request.reply()

    return shorter


def ends_at(size):
    """Answer READs as if the file had that many bytes; its attributes stay."""

    def ended(request):
        if request.offset >= size:
            return request.status(EOF)
        request.length = min(request.length, size - request.offset)
        return request.reply()

    return ended


def longer(request):
    """Answer a READ with a byte more than was asked for."""
    data = request.handle.file.read(request.offset, request.length)
    return request.packet(DATA, _string(data + b"!"))


def attributes(**changes):
    """Answer a stat with other attributes: `attributes(size=None)`."""

    def changed(request):
        return request.attributes(replace(request.stat(), **changes))

    return changed


def names(*entries):
    """Answer a READDIR with these (name, Attributes) and nothing else."""
    return lambda request: request.names(entries)


def every_second(fault):
    """Meet `fault` in the second request, the fourth and so on, whatever they are about."""
    answers = itertools.cycle((honest, fault))

    def act(request):
        return next(answers)(request)

    return act


def unknown_id(request):
    """Answer under an id that nobody asked with, then honestly."""
    honest = request.reply()
    return honest[:5] + struct.pack(">I", 0xFFFFFFF0) + honest[9:] + honest


def first(action, then=honest):
    """Do something (edit a file, say), then meet another fault, or answer honestly."""

    def act(request):
        action()
        return then(request)

    return act


# --- The server -------------------------------------------------------------


@dataclass
class Rule:
    kind: str
    path: bytes | None
    fault: object
    nth: int  # the first matching request that meets the fault, from 1
    times: float  # how many do
    at: int | None  # a READ or WRITE matches when it ends past this offset
    seen: int = 0
    fired: int = 0

    def applies(self, request):
        if self.kind != request.kind or self.path not in (None, request.path):
            return False
        if self.at is not None and request.offset + request.length <= self.at:
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


@dataclass
class Handle:
    path: bytes
    file: object = None
    listing: object = None


@dataclass
class Request:
    """One request, with what its kind has of the fields below."""

    session: object
    kind: str
    id: int
    path: bytes
    handle: Handle | None = None
    offset: int = 0
    length: int = 0
    name: bytes = b""  # of an extension
    writing: bool = False  # what OPEN is for
    data: bytes = b""  # of a WRITE
    times: tuple = ()  # of a FSETSTAT
    target: bytes = b""  # of a RENAME or POSIX_RENAME

    def packet(self, kind, body):
        return struct.pack(">IBI", len(body) + 5, kind, self.id) + body

    def status(self, code):
        return self.packet(STATUS, struct.pack(">I", code) + _string(b"told to") * 2)

    def attributes(self, found):
        return self.packet(ATTRS, found.packed())

    def names(self, entries):
        listed = [_string(name) * 2 + found.packed() for name, found in entries]
        return self.packet(NAME, struct.pack(">I", len(listed)) + b"".join(listed))

    def stat(self):
        tree = self.session.box.tree
        if self.kind == "FSTAT":
            return self.handle.file.stat()
        return (tree.lstat if self.kind == "LSTAT" else tree.stat)(self.path)

    def reply(self):
        """The honest answer."""
        try:
            return getattr(self, "_" + self.kind.lower())()
        except FileNotFoundError:
            return self.status(NO_SUCH_FILE)
        except PermissionError:
            return self.status(PERMISSION_DENIED)
        except (OSError, ValueError):  # ValueError: a name with a NUL
            return self.status(FAILURE)

    def _init(self):
        return struct.pack(">IBI", 5, VERSION, 3)

    def _open(self):
        tree = self.session.box.tree
        file = (tree.create if self.writing else tree.open)(self.path)
        return self.session.new_handle(self, Handle(self.path, file=file))

    def _opendir(self):
        listing = iter(self.session.box.tree.names(self.path))
        return self.session.new_handle(self, Handle(self.path, listing=listing))

    def _read(self):
        length = min(self.length, HONEST_READ)
        data = self.handle.file.read(self.offset, length)
        return self.packet(DATA, _string(data)) if data else self.status(EOF)

    def _readdir(self):
        entries = list(itertools.islice(self.handle.listing, NAMES_PER_REPLY))
        return self.names(entries) if entries else self.status(EOF)

    def _write(self):
        self.handle.file.write(self.offset, self.data)
        return self.status(OK)

    def _fsetstat(self):
        self.handle.file.set_times(*self.times)
        return self.status(OK)

    def _mkdir(self):
        self.session.box.tree.make(self.path)
        return self.status(OK)

    def _remove(self):
        self.session.box.tree.remove(self.path)
        return self.status(OK)

    def _rename(self):
        self.session.box.tree.rename(self.path, self.target)
        return self.status(OK)

    def _posix_rename(self):
        self.session.box.tree.replace(self.path, self.target)
        return self.status(OK)

    def _readlink(self):
        target = self.session.box.tree.link_target(self.path)
        return self.names([(target, Attributes(None, None, None))])

    def _close(self):
        if self.handle.file:
            self.handle.file.close()
        return self.status(OK)

    def _lstat(self):
        return self.attributes(self.stat())

    _stat = _fstat = _lstat

    def _realpath(self):
        return self.names([(b"/" + self.path, Attributes(None, None, None))])

    def _stale(self):
        return self.status(FAILURE)  # a handle that is not open

    def _extended(self):
        return self.status(UNSUPPORTED)


class FaultyBox(Box):
    """Serves its folder `root`, or a Generated `tree`.

    `quiet` (seconds), where given, makes round trips countable: replies are kept
    back until nothing more has arrived for so long. What a client sends without
    waiting is then one flight, and a path costs as many round trips as there are
    flights with a request about it, other than a CLOSE. `shuffle` (a seed) answers
    each flight in random order. While `max_handles` files and folders are open, it
    refuses to open more with FAILURE, and counts that in `refused`.
    """

    def __init__(self, tree=None, quiet=None, shuffle=None, max_handles=float("inf")):
        super().__init__()
        self.max_handles = max_handles
        self.refused = 0
        self.tree = tree
        self.quiet = quiet
        self.shuffle = random.Random(shuffle) if shuffle is not None else None
        self.rules = []
        self.requests = Counter()  # by kind
        self.opened = Counter()  # by path, files and folders
        self.round_trips = Counter()  # by path
        self.flights = 0
        self.connections = 0
        self.reads = []  # (path, offset, bytes asked for)
        self.handed_out = 0  # bytes of file data
        self.on_data = lambda: None  # called when handed_out has grown
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.transports = []

    def start(self):
        self.tree = self.tree or Disk(self.root)
        key = self.host_key.export_private_key().decode()
        self.server_key = paramiko.Ed25519Key.from_private_key(io.StringIO(key))
        self.listener = socket.create_server((self.host, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self):
        self.closing.set()
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept, as close does not
        self.listener.close()
        for transport in self.transports:
            transport.close()

    def settings(self, port=None):
        """Settings for a login with the password, a secret that every fault may show."""
        settings = super().settings(port)
        del settings["HETZNER_KEY_FILE"]
        return {**settings, "HETZNER_PASSWORD": PASSWORD}

    def on(self, kind, path, fault, nth=1, times=1, at=None):
        """Let requests of that kind about `path` (None: any) meet `fault`: the `nth`
        of them and the ones after, `times` in all; with `at`, only READs and WRITEs
        that reach past that offset. Returns the rule, whose `fired` counts."""
        rule = Rule(kind, path, fault, nth, times, at)
        self.rules.append(rule)
        return rule

    def always(self, kind, path, fault):
        return self.on(kind, path, fault, times=float("inf"))

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # closed
            self.connections += 1
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = paramiko.Transport(client, default_window_size=1 << 24)
        transport.set_log_channel("faulty_sftp")
        transport.add_server_key(self.server_key)
        self.transports.append(transport)
        with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
            transport.start_server(server=_Login(self))

    def answer(self, request):
        """The bytes to send for a request: the first fault that applies, or the truth."""
        with self.lock:
            self.requests[request.kind] += 1
            self.opened[request.path] += request.kind in ("OPEN", "OPENDIR")
            if request.kind == "READ":
                self.reads.append((request.path, request.offset, request.length))
            applying = [rule for rule in self.rules if rule.applies(request)]
            rule = applying[0] if applying else None
            if rule:
                rule.fired += 1
        return rule.fault(request) if rule else request.reply()


class _Login(paramiko.ServerInterface):
    def __init__(self, box):
        self.box = box

    def get_allowed_auths(self, username):
        return "password"

    def check_auth_password(self, username, password):
        right = (username, password) == (self.box.user, PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED

    def check_channel_subsystem_request(self, channel, name):
        session = _Session(self.box, channel)
        threading.Thread(target=session.run, daemon=True).start()
        return True


class _Session:
    """One SFTP channel."""

    def __init__(self, box, channel):
        self.box = box
        self.channel = channel
        self.handles = {}
        self.numbers = itertools.count()

    def run(self):
        try:
            with contextlib.suppress(Dropped, OSError, EOFError, paramiko.SSHException):
                for packets in self.flights():
                    self.serve(packets)
        finally:
            self.channel.get_transport().close()
            for handle in self.handles.values():
                if handle.file:
                    handle.file.close()

    def flights(self):
        """Lists of packets that came without waiting for a reply to one another."""
        buffer = bytearray()
        while chunk := self.channel.recv(1 << 16):
            while chunk:
                buffer += chunk
                chunk = self.more()
            packets = []
            while len(buffer) >= 4:
                end = 4 + struct.unpack_from(">I", buffer)[0]
                if len(buffer) < end:
                    break
                packets.append(bytes(buffer[4:end]))
                del buffer[:end]
            if packets:
                yield packets

    def more(self):
        if self.box.quiet is None:
            return b""
        self.channel.settimeout(self.box.quiet)
        try:
            return self.channel.recv(1 << 16)
        except TimeoutError:
            return b""
        finally:
            self.channel.settimeout(None)

    def serve(self, packets):
        replies, seen = [], set()
        for request in map(self.parsed, packets):
            if request.kind != "CLOSE":
                seen.add(request.path)
            reply = self.box.answer(request)
            if self.box.quiet is None and self.box.shuffle is None:
                self.send(reply)
            else:
                replies.append(reply)
        with self.box.lock:
            self.box.flights += 1
            self.box.round_trips.update(seen)
        if self.box.shuffle:
            self.box.shuffle.shuffle(replies)
        for reply in replies:
            self.send(reply)

    def send(self, reply):
        self.channel.sendall(reply)
        if reply[4:5] == bytes([DATA]):
            with self.box.lock:
                self.box.handed_out += len(reply) - 13
            self.box.on_data()

    def new_handle(self, request, handle):
        if len(self.handles) >= self.box.max_handles:
            self.box.refused += 1
            if handle.file:
                handle.file.close()
            return request.status(FAILURE)
        name = b"%d" % next(self.numbers)
        self.handles[name] = handle
        return request.packet(HANDLE, _string(name))

    def parsed(self, packet):
        kind = KINDS.get(packet[0])
        if kind == "INIT":
            return Request(self, kind, 0, b"")
        number, length = struct.unpack_from(">II", packet, 1)
        text, rest = packet[9 : 9 + length], packet[9 + length :]
        if kind in ("CLOSE", "READ", "WRITE", "FSTAT", "FSETSTAT", "READDIR"):
            take = self.handles.pop if kind == "CLOSE" else self.handles.get
            handle = take(text, None)
            if handle is None:
                return Request(self, "STALE", number, b"")
            request = Request(self, kind, number, handle.path, handle)
            if kind == "READ":
                request.offset, request.length = struct.unpack(">QI", rest)
            if kind == "WRITE":
                request.offset, request.length = struct.unpack_from(">QI", rest)
                request.data = rest[12:]
            if kind == "FSETSTAT":
                request.times = struct.unpack_from(">II", rest, 4)
            return request
        if kind == "EXTENDED" and text == b"posix-rename@openssh.com":
            kind, (length,) = "POSIX_RENAME", struct.unpack_from(">I", rest)
            text, rest = rest[4 : 4 + length], rest[4 + length :]
        if kind == "EXTENDED":
            return Request(self, kind, number, b"", name=text)
        request = Request(self, kind, number, _relative(text))
        if kind == "OPEN":
            request.writing = bool(rest[3] & 2)
        if kind in ("RENAME", "POSIX_RENAME"):
            request.target = _relative(rest[4:])
        return request


def _string(data):
    return struct.pack(">I", len(data)) + data


def _relative(path):
    return posixpath.normpath(b"/" + path).lstrip(b"/")
