"""The benchmark's helpers, each a process of its own that bench.py starts.

    bench_servers.py relay TARGET_PORT ONE_WAY_SECONDS
    bench_servers.py sink CERTIFICATE KEY
    bench_servers.py measure LOG_FILE COMMAND...
    bench_servers.py plain copy|walk

The relay and the sink print the port of 127.0.0.1 that they listen on.  Each is
one thread around one selector: they share the processor with what is measured,
and threads would spend it on handing the interpreter lock around.  Measured on
2 cores of an AMD EPYC in November 2026: the relay passes on 1.6 GB/s at 20 ms,
the sink takes 1.3 GB/s over TLS, or 40,000 objects of 4 KiB a second.
"""

import base64
import bisect
import collections
import datetime
import json
import os
import re
import selectors
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.parse
import zlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

LOOPBACK = "127.0.0.1"
READ_SIZE = 256 * 1024  # bytes taken from a socket at once
IN_FLIGHT = 64 * 1024 * 1024  # bytes a relay holds per direction, at most
KEPT_OBJECT = 16 * 1024 * 1024  # bytes; a STANDARD object up to it can be read
LIST_PAGE = 1000  # keys, as S3 answers them


def listen() -> socket.socket:
    """A listening socket on a free port, told to the parent on stdout."""
    listener = socket.create_server((LOOPBACK, 0), backlog=256)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    return listener


def no_delay(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


# --- The relay ---------------------------------------------------------------


class Way:
    """One direction of one relayed connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.back: Way  # the other direction
        self.due: collections.deque[memoryview] = collections.deque()
        self.held = 0  # bytes read and not yet sent, due or not
        self.ended = False  # the source's end was read
        self.finished = False  # and was passed on
        self.watched = 0  # events of the source that the relay waits for


class Relay:
    """Passes every byte on `delay` seconds after it came, in both directions.

    The delay being the same for all, one queue in order of arrival is also
    in order of departure.  The selector is select(2): the others round a
    timeout up to whole milliseconds, which would add to every round trip.
    """

    def __init__(self, target_port: int, delay: float) -> None:
        self.target = (LOOPBACK, target_port)
        self.delay = delay
        self.listener = listen()
        self.ready = selectors.SelectSelector()
        self.ready.register(self.listener, selectors.EVENT_READ)
        self.queue: collections.deque[tuple[float, Way, bytes]] = collections.deque()

    def serve(self) -> None:
        while True:
            wait = None
            if self.queue:
                wait = max(0.0, self.queue[0][0] - time.monotonic())
            for key, events in self.ready.select(wait):
                if key.fileobj is self.listener:
                    self.accept()
                elif events & selectors.EVENT_READ:
                    self.read(key.data)
                if events & selectors.EVENT_WRITE:
                    self.send(key.data.back)
            now = time.monotonic()
            while self.queue and self.queue[0][0] <= now:
                _, way, data = self.queue.popleft()
                way.due.append(memoryview(data))
                if len(way.due) == 1:  # else it waits for room already
                    self.send(way)

    def accept(self) -> None:
        near = no_delay(self.listener.accept()[0])
        far = no_delay(socket.create_connection(self.target))
        there, back = Way(near, far), Way(far, near)
        there.back, back.back = back, there
        self.watch(there)
        self.watch(back)

    def read(self, way: Way) -> None:
        try:
            data = way.source.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        way.ended = not data
        way.held += len(data)
        self.queue.append((time.monotonic() + self.delay, way, data))
        self.watch(way)

    def send(self, way: Way) -> None:
        """Send what is due, until it is gone or there is no room."""
        try:
            while way.due:
                data = way.due[0]
                if data:
                    sent = way.target.send(data)
                    way.held -= sent
                    way.due[0] = data[sent:]
                else:
                    way.target.shutdown(socket.SHUT_WR)
                    way.finished = True
                if not way.due[0]:
                    way.due.popleft()
        except BlockingIOError:
            pass
        except OSError:  # the target is gone, and what it would have got
            way.ended = way.finished = True
            way.due.clear()
        self.watch(way)
        self.watch(way.back)
        if way.finished and way.back.finished:
            self.close(way)

    def watch(self, way: Way) -> None:
        """Wait for what can be done at the way's source."""
        events = 0
        if not way.ended and way.held < IN_FLIGHT:
            events |= selectors.EVENT_READ
        if way.back.due:
            events |= selectors.EVENT_WRITE
        if events == way.watched:
            return
        if not way.watched:
            self.ready.register(way.source, events, way)
        elif not events:
            self.ready.unregister(way.source)
        else:
            self.ready.modify(way.source, events, way)
        way.watched = events

    def close(self, way: Way) -> None:
        for end in (way, way.back):
            if end.watched:
                self.ready.unregister(end.source)
                end.watched = 0
            end.source.close()


# --- The S3 sink -------------------------------------------------------------

Waiting = Generator[int, None, Any]  # yields the event that it waits for


@dataclass
class Stored:
    """What is kept of an object: not its bytes, unless it is small and STANDARD."""

    size: int
    crc32: int
    storage_class: str
    mtime: str
    content: bytes | None = None


@dataclass
class Upload:
    """A multipart upload under way."""

    bucket: str
    key: str
    headers: dict[str, str]
    parts: dict[int, Stored] = field(default_factory=dict)


class Stream:
    """The bytes of one TLS connection, without blocking.

    The methods are generators that yield EVENT_READ or EVENT_WRITE when they
    have to wait for the socket.  They raise EOFError where it ends.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.sock = sock
        self.buffer = memoryview(bytearray(READ_SIZE))
        self.start = self.end = 0

    def wait(self, operation: Any, *args: Any) -> Waiting:
        """What `operation` returns, once it need not wait any more."""
        while True:
            try:
                return operation(*args)
            except ssl.SSLWantReadError:
                yield selectors.EVENT_READ
            except ssl.SSLWantWriteError:
                yield selectors.EVENT_WRITE

    def piece(self, most: int) -> Waiting:
        """At least one byte and at most `most`: a view, until the next call."""
        if self.start == self.end:
            self.start = 0
            self.end = yield from self.wait(self.sock.recv_into, self.buffer)
            if not self.end:
                raise EOFError
        start, self.start = self.start, min(self.end, self.start + most)
        return self.buffer[start : self.start]

    def head(self) -> Waiting:
        """The request line and headers, up to the empty line."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = bytes((yield from self.piece(READ_SIZE)))
            end = (head + data).find(b"\r\n\r\n") + 4 - len(head)
            if end >= 4 - len(head):
                self.start -= len(data) - end
                data = data[:end]
            head += data
        return head

    def send(self, data: bytes) -> Waiting:
        rest = memoryview(data)
        while rest:
            rest = rest[(yield from self.wait(self.sock.send, rest)) :]


class Sized:
    """A body of a known length.  Its pieces end with an empty one."""

    def __init__(self, source: Any, length: int) -> None:
        self.source = source
        self.left = length

    def piece(self, most: int) -> Waiting:
        if not self.left:
            return b""
        piece = yield from self.source.piece(min(most, self.left))
        self.left -= len(piece)
        return piece


class Chunked:
    """A body in chunks, each after its length in hexadecimal, then trailers.

    HTTP's own framing and S3's aws-chunked have this same form; the SDKs send
    the one, the other, or the one inside the other.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.left = 0  # of the current chunk
        self.begun = self.ended = False

    def line(self) -> Waiting:
        line = b""
        while not line.endswith(b"\n"):
            line += yield from self.source.piece(1)
        return line.strip()

    def piece(self, most: int) -> Waiting:
        if not self.left and not self.ended:
            if self.begun:
                yield from self.line()  # the one that ends the chunk before
            self.begun = True
            self.left = int((yield from self.line()).split(b";")[0], 16)
            if not self.left:
                while (yield from self.line()):
                    pass  # trailers: the sink sums up for itself
                self.ended = True
        if self.ended:
            return b""
        piece = yield from self.source.piece(min(most, self.left))
        self.left -= len(piece)
        return piece


@dataclass
class Request:
    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    content: Stored  # of the body


class Sink:
    """As much of S3 as an upload and its checks need.  No signature is checked."""

    def __init__(self, certificate: str, key: str) -> None:
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate, key)
        self.listener = listen()
        self.ready = selectors.DefaultSelector()
        self.ready.register(self.listener, selectors.EVENT_READ)
        self.buckets: dict[str, dict[str, Stored]] = collections.defaultdict(dict)
        self.sorted: dict[str, list[str]] = {}  # the keys of a bucket, when listed
        self.uploads: dict[str, Upload] = {}
        self.created = 0  # uploads; makes their ids
        self.requests: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )

    # Connections

    def serve(self) -> None:
        while True:
            for key, _ in self.ready.select():
                if key.fileobj is self.listener:
                    sock = self.tls.wrap_socket(
                        no_delay(self.listener.accept()[0]),
                        server_side=True,
                        do_handshake_on_connect=False,
                    )
                    connection = self.connection(sock)
                    self.ready.register(sock, selectors.EVENT_READ, connection)
                    self.go_on(sock, connection, selectors.EVENT_READ)
                else:
                    self.go_on(key.fileobj, key.data, key.events)

    def go_on(self, sock: Any, connection: Any, watched: int) -> None:
        try:
            events = next(connection)
        except (StopIteration, OSError, EOFError):
            self.ready.unregister(sock)
            sock.close()
        else:
            if events != watched:
                self.ready.modify(sock, events, connection)

    def connection(self, sock: ssl.SSLSocket) -> Waiting:
        """Answer the requests of one connection until it ends."""
        stream = Stream(sock)
        yield from stream.wait(sock.do_handshake)
        while True:
            line, *lines = (yield from stream.head()).decode().split("\r\n")
            method, target, _ = line.split(" ")
            headers = {}
            for name, _, value in (line.partition(":") for line in lines):
                headers[name.lower()] = value.strip()
            path, _, query = target.partition("?")
            _, bucket, key, *_ = *urllib.parse.unquote(path).split("/", 2), "", ""
            request = Request(
                method,
                bucket,
                key,
                dict(urllib.parse.parse_qsl(query, keep_blank_values=True)),
                headers,
                empty(headers),
            )
            if "expect" in headers:
                yield from stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            yield from self.receive(stream, request)
            yield from stream.send(self.answer(request))

    def receive(self, stream: Stream, request: Request) -> Waiting:
        """Read the body to its end, summing it up in `request.content`."""
        headers, content = request.headers, request.content
        body: Sized | Chunked
        if "chunked" in headers.get("transfer-encoding", ""):
            body = Chunked(stream)
        else:
            body = Sized(stream, int(headers.get("content-length", 0)))
        outer = body
        if "aws-chunked" in headers.get("content-encoding", ""):
            body = Chunked(body)
        keep = content.storage_class == "STANDARD" and "partNumber" not in request.query
        kept = []
        while piece := (yield from body.piece(READ_SIZE)):
            content.size += len(piece)
            content.crc32 = zlib.crc32(piece, content.crc32)
            if keep and content.size <= KEPT_OBJECT:
                kept.append(bytes(piece))
        if keep and content.size <= KEPT_OBJECT:
            content.content = b"".join(kept)
        while (yield from outer.piece(READ_SIZE)):
            pass

    # Requests

    def answer(self, request: Request) -> bytes:
        for kind, method, with_key, parameter, operation in self.OPERATIONS:
            if (
                request.method == method
                and bool(request.key) == with_key
                and (not parameter or parameter in request.query)
            ):
                if kind:
                    self.requests[request.bucket][kind] += 1
                return operation(self, request)
        self.requests[request.bucket]["unknown"] += 1
        return error(501, "NotImplemented")

    def put_object(self, request: Request) -> bytes:
        self.store(request.bucket, request.key, request.content)
        return response(200, of_content(request.content))

    def store(self, bucket: str, key: str, content: Stored) -> None:
        self.buckets[bucket][key] = content
        self.sorted.pop(bucket, None)

    def create_upload(self, request: Request) -> bytes:
        self.created += 1
        upload = f"upload-{self.created}"
        self.uploads[upload] = Upload(request.bucket, request.key, request.headers)
        return document(
            "InitiateMultipartUploadResult",
            f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key>"
            f"<UploadId>{upload}</UploadId>",
        )

    def upload_part(self, request: Request) -> bytes:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None:
            return error(404, "NoSuchUpload")
        upload.parts[int(request.query["partNumber"])] = request.content
        return response(200, of_content(request.content))

    def complete_upload(self, request: Request) -> bytes:
        upload = self.uploads.pop(request.query["uploadId"], None)
        if upload is None:
            return error(404, "NoSuchUpload")
        numbers = re.findall(rb"<PartNumber>(\d+)<", request.content.content or b"")
        whole = empty(upload.headers)
        for number in numbers:
            part = upload.parts[int(number)]
            whole.crc32 = crc32_combine(whole.crc32, part.crc32, part.size)
            whole.size += part.size
        self.store(upload.bucket, upload.key, whole)
        return document(
            "CompleteMultipartUploadResult",
            f"<Bucket>{upload.bucket}</Bucket><Key>{escape(upload.key)}</Key>"
            f"<ETag>{etag(whole)}</ETag><ChecksumCRC32>{checksum(whole)}</ChecksumCRC32>"
            "<ChecksumType>FULL_OBJECT</ChecksumType>",
        )

    def abort_upload(self, request: Request) -> bytes:
        self.uploads.pop(request.query["uploadId"], None)
        return response(204)

    def list_uploads(self, request: Request) -> bytes:
        prefix = request.query.get("prefix", "")
        return document(
            "ListMultipartUploadsResult",
            f"<Bucket>{request.bucket}</Bucket><IsTruncated>false</IsTruncated>"
            + "".join(
                f"<Upload><Key>{escape(upload.key)}</Key><UploadId>{name}</UploadId>"
                f"<Initiated>{STARTED.isoformat()}</Initiated></Upload>"
                for name, upload in self.uploads.items()
                if upload.bucket == request.bucket and upload.key.startswith(prefix)
            ),
        )

    def get_object(self, request: Request) -> bytes:
        stored = self.buckets[request.bucket].get(request.key)
        if stored is None:
            return error(404, "NoSuchKey")
        if stored.content is None:
            return error(403, "InvalidObjectState")
        return response(200, of_stored(stored), stored.content)

    def head_object(self, request: Request) -> bytes:
        stored = self.buckets[request.bucket].get(request.key)
        if stored is None:
            return response(404)
        return response(200, of_stored(stored), length=stored.size)

    def list_objects(self, request: Request) -> bytes:
        """Both versions of the listing; they differ in the names of the marks."""
        query, bucket = request.query, self.buckets[request.bucket]
        if request.bucket not in self.sorted:
            self.sorted[request.bucket] = sorted(bucket)
        keys = self.sorted[request.bucket]
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = int(query.get("max-keys", LIST_PAGE))
        after = max(query.get(name, "") for name in AFTER)
        as_asked = urllib.parse.quote if "encoding-type" in query else escape
        entries: list[str] = []
        at = bisect.bisect_left(keys, prefix)
        if after:
            at = max(at, bisect.bisect_right(keys, after))
        while at < len(keys) and keys[at].startswith(prefix) and len(entries) < most:
            key = after = keys[at]
            folder, slash, _ = key[len(prefix) :].partition(delimiter or "\0")
            if delimiter and slash:
                name = as_asked(prefix + folder + slash)
                entries.append(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>")
                after = prefix + folder + slash + chr(sys.maxunicode)
                at = bisect.bisect_right(keys, after)
            else:
                stored = bucket[key]
                entries.append(
                    f"<Contents><Key>{as_asked(key)}</Key><Size>{stored.size}</Size>"
                    f"<LastModified>{STARTED.isoformat()}</LastModified>"
                    f"<ETag>{etag(stored)}</ETag>"
                    f"<StorageClass>{stored.storage_class}</StorageClass></Contents>"
                )
                at += 1
        more = at < len(keys) and keys[at].startswith(prefix)
        mark = ""
        if more:
            name = "NextContinuationToken" if "list-type" in query else "NextMarker"
            mark = f"<{name}>{as_asked(after)}</{name}>"
        return document(
            "ListBucketResult",
            f"<Name>{request.bucket}</Name><Prefix>{as_asked(prefix)}</Prefix>"
            f"<KeyCount>{len(entries)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{mark}{''.join(entries)}",
        )

    def report(self, request: Request) -> bytes:
        """For the benchmark: what the bucket holds, and what it was asked for."""
        archived = {
            key: stored
            for key, stored in self.buckets[request.bucket].items()
            if stored.storage_class == "DEEP_ARCHIVE"
        }
        digest = Digest()
        for key, stored in archived.items():
            digest.add(key, stored.size, stored.crc32)
        requests = self.requests.pop(request.bucket, collections.Counter())
        return response(
            200,
            content=json.dumps(
                {**digest.as_dict(), "requests": requests, "uploads": len(self.uploads)}
            ).encode(),
        )

    def head_bucket(self, request: Request) -> bytes:
        return response(200, {"x-amz-bucket-region": "us-east-1"})

    OPERATIONS = (
        # what it is counted as, method, has a key, parameter, answer
        ("part", "PUT", True, "partNumber", upload_part),
        ("put", "PUT", True, "", put_object),
        ("create", "POST", True, "uploads", create_upload),
        ("complete", "POST", True, "uploadId", complete_upload),
        ("abort", "DELETE", True, "uploadId", abort_upload),
        ("head", "HEAD", True, "", head_object),
        ("get", "GET", True, "", get_object),
        ("bucket", "HEAD", False, "", head_bucket),
        ("list uploads", "GET", False, "uploads", list_uploads),
        ("", "GET", False, "report", report),
        ("list", "GET", False, "list-type", list_objects),
        ("list", "GET", False, "prefix", list_objects),
    )


AFTER = ("continuation-token", "start-after", "marker")
STARTED = datetime.datetime.now(datetime.timezone.utc)


class Digest:
    """A set of objects, in whatever order: count, bytes, and a sum over them."""

    def __init__(self) -> None:
        self.objects = self.bytes = self.sum = 0

    def add(self, key: str, size: int, crc32: int) -> None:
        self.objects += 1
        self.bytes += size
        self.sum += zlib.crc32(f"{key} {size} {crc32}".encode())

    def as_dict(self) -> dict[str, int]:
        return {"objects": self.objects, "bytes": self.bytes, "sum": self.sum}


def crc32_combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two strings together; `length` is the second one's.

    As zlib's: the first is multiplied by x to the power 8 * length, modulo the
    CRC's polynomial, all with the bits reversed.
    """
    power, square = 1 << 31, 1 << 23  # x**0, x**8
    while length:
        if length & 1:
            power = _product(power, square)
        square = _product(square, square)
        length >>= 1
    return _product(power, first) ^ second


def _product(a: int, b: int) -> int:
    product = 0
    while a:
        if a & 1 << 31:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


def empty(headers: dict[str, str]) -> Stored:
    """An object without bytes yet, as the request's headers want it."""
    storage_class = headers.get("x-amz-storage-class", "STANDARD")
    return Stored(0, 0, storage_class, headers.get("x-amz-meta-mtime", ""))


def etag(stored: Stored) -> str:
    return f'"{stored.crc32:08x}-1"'


def checksum(stored: Stored) -> str:
    return base64.b64encode(stored.crc32.to_bytes(4, "big")).decode()


def of_content(stored: Stored) -> dict[str, str]:
    return {
        "ETag": etag(stored),
        "x-amz-checksum-crc32": checksum(stored),
        "x-amz-checksum-type": "FULL_OBJECT",
    }


def of_stored(stored: Stored) -> dict[str, str]:
    return {
        **of_content(stored),
        "Last-Modified": STARTED.strftime("%a, %d %b %Y %H:%M:%S GMT"),
        "x-amz-storage-class": stored.storage_class,
        "x-amz-meta-mtime": stored.mtime,
    }


def response(
    status: int,
    headers: dict[str, str] | None = None,
    content: bytes = b"",
    length: int | None = None,
) -> bytes:
    size = len(content) if length is None else length
    fields = {"Content-Length": str(size), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} S3\r\n{lines}\r\n".encode() + content


def document(root: str, content: str) -> bytes:
    xml = f'<?xml version="1.0"?><{root}>{content}</{root}>'
    return response(200, {"Content-Type": "application/xml"}, xml.encode())


def error(status: int, code: str) -> bytes:
    xml = f"<Error><Code>{code}</Code></Error>"
    return response(status, {"Content-Type": "application/xml"}, xml.encode())


# --- The commands ------------------------------------------------------------


def relay(target_port: str, delay: str) -> None:
    Relay(int(target_port), float(delay)).serve()


def sink(certificate: str, key: str) -> None:
    Sink(certificate, key).serve()


def measure(log_file: str, *command: str) -> None:
    """Run a command, its output in a file, and print what it took.

    Not done by bench.py itself, because Linux counts the parent's memory at the
    time of the fork as the child's.
    """
    with open(log_file, "wb") as log:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
    unit = 1 if sys.platform == "darwin" else 1024
    print(
        json.dumps(
            {
                "status": os.waitstatus_to_exitcode(status),
                "seconds": seconds,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_bytes": usage.ru_maxrss * unit,
            }
        )
    )


def plain(job: str) -> None:
    """Copy, or only walk, as the first script that comes to mind does.

    Prints the files it met, and what its loop alone took.
    """
    # Not at the top: they would be in the memory of all the other commands.
    import boto3  # noqa: PLC0415
    import paramiko  # noqa: PLC0415

    s3 = boto3.client("s3")
    with paramiko.SSHClient() as ssh:
        ssh.load_host_keys(os.environ["HETZNER_KNOWN_HOSTS"])
        ssh.connect(
            os.environ["HETZNER_HOST"],
            int(os.environ["HETZNER_PORT"]),
            os.environ["HETZNER_USER"],
            key_filename=os.environ["HETZNER_KEY_FILE"],
            allow_agent=False,
            look_for_keys=False,
        )
        sftp = ssh.open_sftp()
        root = os.environ["REMOTE_PATH"]
        start, cpu_start = time.monotonic(), time.process_time()
        files = 0
        folders = [root]
        while folders:
            folder = folders.pop()
            for entry in sftp.listdir_attr(folder):
                path = f"{folder}/{entry.filename}"
                if stat.S_ISDIR(entry.st_mode or 0):
                    folders.append(path)
                    continue
                files += 1
                if job == "copy":
                    with sftp.open(path) as file:
                        s3.upload_fileobj(
                            file,
                            os.environ["S3_BUCKET"],
                            os.environ["S3_PREFIX"] + path[len(root) + 1 :],
                            ExtraArgs={"StorageClass": "DEEP_ARCHIVE"},
                        )
        print(
            json.dumps(
                {
                    "files": files,
                    "seconds": time.monotonic() - start,
                    "cpu_seconds": time.process_time() - cpu_start,
                }
            )
        )


if __name__ == "__main__":
    {"relay": relay, "sink": sink, "measure": measure, "plain": plain}[sys.argv[1]](
        *sys.argv[2:]
    )
