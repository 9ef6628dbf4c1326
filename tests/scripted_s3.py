"""An HTTP proxy in front of an S3 server that counts, and answers by script.

    with ScriptedS3(moto.url) as s3:
        slow = s3.on("PutObject", error(503, "SlowDown"), times=2)
        archive(AWS_ENDPOINT_URL=s3.url)
        assert slow.fired == 2 and s3.requests["PutObject"] == 3

A fault is a function that is given an Exchange and returns the Answer to send, or
None to close the connection without one. The true answer is `exchange.forward()`.
"""

import base64
import http.client
import re
import socket
import struct
import threading
import zlib
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# (method, about an object, parameter in the query) -> operation; first match counts.
OPERATIONS = [
    ("POST", True, "uploads", "CreateMultipartUpload"),
    ("POST", True, "uploadId", "CompleteMultipartUpload"),
    ("POST", True, "restore", "RestoreObject"),
    ("PUT", True, "partNumber", "UploadPart"),
    ("PUT", True, "", "PutObject"),
    ("DELETE", True, "uploadId", "AbortMultipartUpload"),
    ("DELETE", True, "", "DeleteObject"),
    ("HEAD", True, "", "HeadObject"),
    ("GET", True, "uploadId", "ListParts"),
    ("GET", True, "", "GetObject"),
    ("GET", False, "uploads", "ListMultipartUploads"),
    ("GET", False, "list-type", "ListObjectsV2"),
    ("GET", False, "versions", "ListObjectVersions"),
    ("HEAD", False, "", "HeadBucket"),
]


@dataclass
class Answer:
    status: int
    headers: dict  # names in lower case
    body: bytes = b""


class Exchange:
    """A request of the program, and the way to the real server."""

    def __init__(self, handler, s3):
        self.handler = handler
        self.s3 = s3
        self.method = handler.command
        target = urlsplit(handler.path)
        query = parse_qs(target.query, keep_blank_values=True)
        self.bucket, _, key = target.path.lstrip("/").partition("/")
        self.key = unquote(key)
        self.part = int(query.get("partNumber", [0])[0])
        self.upload_id = query.get("uploadId", [""])[0]
        self.operation = next(
            (
                operation
                for method, of_object, parameter, operation in OPERATIONS
                if (method, of_object) == (self.method, bool(key))
                and (not parameter or parameter in query)
            ),
            self.method,
        )
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.length = int(self.headers.get("content-length", 0))
        self._body = None

    def body(self):
        """The request's body, read from the connection when first asked for."""
        if self._body is None:
            self._body = self.handler.rfile.read(self.length)
            if len(self._body) < self.length:
                raise ConnectionAbortedError("the program was killed in the middle")
            with self.s3.lock:
                self.s3.received += len(self._body)
        return self._body

    def forward(self):
        """The true answer."""
        return self.s3.honest(self)

    def ask(self):
        """The real server's answer."""
        connection = http.client.HTTPConnection(self.s3.upstream, timeout=60)
        try:
            connection.request(
                self.method, self.handler.path, self.body() or None, self.headers
            )
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())
        finally:
            connection.close()


# --- Faults -----------------------------------------------------------------


def error(status, code, message="as the script says", **headers):
    """S3's error answer; `headers` as x_amz_bucket_region="eu-west-1"."""

    def refused(exchange):
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{message}</Message>"
            f"<RequestId>1</RequestId></Error>"
        )
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Answer(status, {"content-type": "application/xml", **named}, body.encode())

    return refused


def proxy_page(status, body=b"<html><hr>Not for you</html>"):
    """The answer of a proxy that did not ask S3, without an error code."""
    return lambda _: Answer(status, {"content-type": "text/html", "location": "/login"}, body)


def reset(exchange):
    """Reset the connection in the middle of the request."""
    linger = struct.pack("ii", 1, 0)
    exchange.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def hang(exchange):
    """Take the request and never answer."""
    exchange.body()
    exchange.s3.closing.wait()


def lost_answer(exchange):
    """Do what is asked, and close the connection before the answer."""
    exchange.forward()


def cut_headers(exchange):
    """Do what is asked, and close the connection within the headers of the answer. To
    http.client, it has no others."""
    answer = exchange.forward()
    exchange.handler.send_response_only(answer.status)
    exchange.handler.send_header("x-amz-request-id", "1")
    exchange.handler.send_header("x-amz-abort-rule-id", "a lifecycle rule")
    exchange.handler.send_header("x-amz-request-charged", "requester")
    exchange.handler.flush_headers()


def halfway(action=lambda: None, then_all=True):
    """Send half of the object, do something, then send the rest or hang up."""

    def sent(exchange):
        answer = exchange.forward()
        handler = exchange.handler
        handler.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name not in ("connection", "transfer-encoding"):
                handler.send_header(name, value)
        handler.end_headers()
        half = len(answer.body) // 2
        handler.wfile.write(answer.body[:half])
        action()
        if then_all:
            handler.wfile.write(answer.body[half:])

    return sent


def rewritten(edit):
    """The honest answer with the body that `edit` makes of its own."""

    def answer(exchange):
        honest = exchange.forward()
        honest.body = edit(honest.body)
        honest.headers["content-length"] = str(len(honest.body))
        return honest

    return answer


def until(event):
    """Take nothing of the body before `event` is set."""

    def waiting(exchange):
        event.wait()
        return exchange.forward()

    return waiting


def headers(**changes):
    """Change headers of the true answer; None leaves one out."""

    def changed(exchange):
        answer = exchange.forward()
        for name, value in changes.items():
            answer.headers[name.replace("_", "-")] = value
        return answer

    return changed


def whole_object(exchange):
    """Answer to a HEAD as a server that does not know its PartNumber."""
    exchange.handler.path = exchange.handler.path.partition("?")[0]
    return exchange.forward()


def no_checksums(exchange):
    """Behave as an S3-compatible server that has never heard of checksums."""
    about = ("x-amz-checksum", "x-amz-sdk-checksum")
    for name in [name for name in exchange.headers if name.startswith(about)]:
        del exchange.headers[name]
    answer = exchange.forward()
    for name in [name for name in answer.headers if name.startswith(about)]:
        del answer.headers[name]
    return answer


def first(action, then=Exchange.forward):
    """Take the whole request, do something, then meet another fault or answer truly."""

    def act(exchange):
        exchange.body()
        action()
        return then(exchange)

    return act


# --- The proxy --------------------------------------------------------------


@dataclass
class Rule:
    operation: str | None
    key: str | None
    fault: object
    nth: int  # the first matching request that meets the fault, from 1
    times: float  # how many do
    seen: int = 0
    fired: int = 0

    def applies(self, exchange):
        if self.operation not in (None, exchange.operation):
            return False
        if self.key not in (None, exchange.key):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class ScriptedS3:
    """Stands before the S3 server at `url` from the `with` to its end."""

    def __init__(self, url):
        self.upstream = urlsplit(url).netloc
        self.rules = []
        self.requests = Counter()  # by operation
        self.about = Counter()  # by (operation, key)
        self.sizes = {}  # bytes of the last request by (operation, key, part number)
        self.received = 0  # bytes of all bodies that were read to their end
        self.under_way = 0  # requests that are being answered
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self):
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.s3 = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # `shutdown` waits until the server looks whether it was called.
        look_every = 0.02  # s
        threading.Thread(
            target=self.server.serve_forever, args=[look_every], daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def take_little_ahead(self):
        """Of a body that nobody reads, connections from now on take up 64 KiB only."""
        self.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)

    def on(self, operation, fault, key=None, nth=1, times=1):
        """Let requests of that operation (None: any), about `key` (None: any), meet
        `fault`: the `nth` of them and the ones after, `times` in all. Returns the
        rule, whose `fired` counts."""
        rule = Rule(operation, key, fault, nth, times)
        self.rules.append(rule)
        return rule

    def always(self, operation, fault, key=None):
        return self.on(operation, fault, key, times=float("inf"))

    def honest(self, exchange):
        """The true answer to a request."""
        return exchange.ask()

    def answer(self, exchange):
        with self.lock:
            self.under_way += 1
            self.requests[exchange.operation] += 1
            self.about[exchange.operation, exchange.key] += 1
            place = exchange.operation, exchange.key, exchange.part
            self.sizes[place] = exchange.length
            applying = [rule for rule in self.rules if rule.applies(exchange)]
            rule = applying[0] if applying else None
            if rule:
                rule.fired += 1
        try:
            return rule.fault(exchange) if rule else exchange.forward()
        finally:
            with self.lock:
                self.under_way -= 1


class StrictS3(ScriptedS3):
    """The same, with CRC-32 checksums as S3 has them and moto has not.

    Bytes that differ from their x-amz-checksum-crc32 header are refused. The checksum of
    each part is kept, and is in the answer to ListParts. An upload is completed only with
    the checksum of all parts together, which is in the answer to that.

    `parts` lists (key, part number, bytes) of each part that was received to its end.
    """

    def __init__(self, url):
        super().__init__(url)
        self.parts = []
        self.part_sums = {}  # (CRC-32, bytes) by (key, upload id, part number)

    def honest(self, exchange):
        told = exchange.headers.get("x-amz-checksum-crc32")
        is_whole = exchange.operation == "CompleteMultipartUpload"
        summed = self.sum_of_parts(exchange) if is_whole else zlib.crc32(exchange.body())
        if exchange.operation == "UploadPart":
            with self.lock:
                self.parts.append((exchange.key, exchange.part, exchange.length))
        if told and summed is not None and told != _crc_text(summed):
            return error(400, "BadDigest", "The CRC32 you specified did not match")(exchange)
        answer = exchange.ask()
        if answer.status != 200:
            return answer
        if told and exchange.operation == "UploadPart":
            with self.lock:
                part = exchange.key, exchange.upload_id, exchange.part
                self.part_sums[part] = summed, exchange.length
        elif told and is_whole and summed is not None:
            told = f"<ChecksumCRC32>{told}</ChecksumCRC32><ChecksumType>FULL_OBJECT<"
            end = b"</CompleteMultipartUploadResult>"
            _insert(answer, end, told.encode() + b"/ChecksumType>" + end)
        elif exchange.operation == "ListParts":
            for number in map(int, re.findall(rb"<PartNumber>(\d+)<", answer.body)):
                found = self.part_sums.get((exchange.key, exchange.upload_id, number))
                if found:
                    end = b"<PartNumber>%d</PartNumber>" % number
                    sum_text = f"<ChecksumCRC32>{_crc_text(found[0])}</ChecksumCRC32>"
                    _insert(answer, end, sum_text.encode() + end)
        return answer

    def sum_of_parts(self, exchange):
        """The CRC-32 of the parts that are to be completed, None if that of one is not
        known."""
        whole = 0
        for number in map(int, re.findall(rb"<PartNumber>(\d+)<", exchange.body())):
            part = self.part_sums.get((exchange.key, exchange.upload_id, number))
            if part is None:
                return None
            zeros = bytes(part[1])
            whole = zlib.crc32(zeros, whole) ^ zlib.crc32(zeros) ^ part[0]
        return whole


def _crc_text(crc):
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _insert(answer, what, replacement):
    assert answer.body.count(what) == 1, answer.body
    answer.body = answer.body.replace(what, replacement)
    answer.headers["content-length"] = str(len(answer.body))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """The program hung up, as a killed one does: nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def exchange(self):
        exchange = Exchange(self, self.server.s3)
        answer = self.server.s3.answer(exchange)
        if answer is None:
            self.close_connection = True
            return
        exchange.body()  # what is left of it would be taken for the next request
        self.send_response_only(answer.status)
        # An answer to HEAD has a length and no body.
        answer.headers.setdefault("content-length", str(len(answer.body)))
        for name, value in answer.headers.items():
            if value is not None and name not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = exchange
