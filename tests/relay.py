"""A TCP relay for tests: delay, cuts and silence between a program and a server.

    with Relay(box.host, box.port, delay_ms=10) as relay:
        archive(**box.settings(port=relay.port))

It forwards bytes and knows nothing of SSH. It does not count round trips: with
many requests in flight, the bytes of an encrypted stream do not tell which of
them waited for which. That is counted where requests are seen, in a server.
"""

import contextlib
import queue
import socket
import threading
import time

CHUNK = 64 * 1024  # bytes a read
QUEUED = 256  # chunks under way in one direction at most


class Relay:
    """Forwards connections on a free loopback port to `host`:`port`.

    Counts `connections` accepted, `bytes_from_client` and `bytes_from_server`
    delivered. All methods may be called at any time, from any thread.
    """

    def __init__(self, host, port, delay_ms=0):
        """`delay_ms` is added in each direction, so a round trip costs twice that."""
        self.server = (host, port)
        self.delay = delay_ms / 1000
        self.host = "127.0.0.1"
        self.port = 0  # known once started, and kept by a later start()
        self.connections = 0
        self.bytes_from_client = 0
        self.bytes_from_server = 0
        self._lock = threading.Lock()
        self._listener = None
        self._open = []  # a pair of sockets for each connection
        self._flowing = threading.Event()
        self._flowing.set()
        # Byte counts from the server at which something happens, or None.
        self._cut_at = self._cut_each_at = self._freeze_at = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop()
        self.thaw()

    def start(self):
        """Accept connections; after `stop`, on the same port as before."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def limit_buffer(self, count):
        """Let the system keep only so many bytes of what clients send, of new connections."""
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, count)

    def stop(self):
        """Cut everything and refuse new connections, like a server that is gone."""
        listener, self._listener = self._listener, None
        if listener is not None:
            _close(listener)
        self.cut()

    def cut(self):
        """Close every connection that is open now; new ones are welcome."""
        with self._lock:
            connections, self._open = self._open, []
        for client, server in connections:
            _close(client)
            _close(server)

    def cut_after(self, count):
        """Cut all connections once, when `count` more bytes came from the server."""
        with self._lock:
            self._cut_at = self.bytes_from_server + count

    def cut_each_after(self, count):
        """Cut every connection when it has had `count` bytes from the server.

        This goes on until it is called with None.
        """
        self._cut_each_at = count

    def freeze(self, after=0):
        """Deliver nothing any more, once `after` more bytes came from the server.

        Connections stay open and new ones are accepted: the peer just falls silent.
        """
        with self._lock:
            self._freeze_at = self.bytes_from_server + after
            if after == 0:
                self._flowing.clear()

    def thaw(self):
        """End `freeze`; what came meanwhile is delivered late, not lost."""
        with self._lock:
            self._freeze_at = None
            self._flowing.set()

    @property
    def frozen(self):
        return not self._flowing.is_set()

    def _accept(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # stopped
            try:
                server = socket.create_connection(self.server, timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._open.append((client, server))
            self._pump(client, server, self._deliver_to_server)
            self._pump(server, client, self._deliver_to_client)

    def _pump(self, source, target, deliver):
        """Forward one direction: one thread reads and stamps, one sends when due."""
        chunks = queue.Queue(QUEUED)

        def read():
            data = b"-"
            while data:
                try:
                    data = source.recv(CHUNK)
                except OSError:
                    data = b""
                chunks.put((time.monotonic() + self.delay, data))

        def write():
            data = b"-"
            delivered = 0
            while data:
                due, data = chunks.get()
                time.sleep(max(0, due - time.monotonic()))
                try:
                    delivered += deliver(target, data, delivered)
                except OSError:
                    break
            _close(source)
            _close(target)
            while data:  # so that a reader that waits for room comes to its end
                _, data = chunks.get()

        for loop in (read, write):
            threading.Thread(target=loop, daemon=True).start()

    def _deliver_to_server(self, server, data, delivered):
        self._flowing.wait()
        server.sendall(data)
        with self._lock:
            self.bytes_from_client += len(data)
        return len(data)

    def _deliver_to_client(self, client, data, delivered):
        """Send `data`, of a connection that has had `delivered` bytes before.

        Raises ConnectionAbortedError after what may pass, if this connection or
        all connections are cut within these bytes.
        """
        sent = 0
        while sent < len(data):
            self._flowing.wait()
            with self._lock:
                room = {
                    "freeze": _left(self._freeze_at, self.bytes_from_server),
                    "cut": _left(self._cut_at, self.bytes_from_server),
                    "cut this": _left(self._cut_each_at, delivered + sent),
                }
                event = min(room, key=room.get)
                piece = data[sent:][: int(min(room[event], len(data)))]
                sent += len(piece)
                self.bytes_from_server += len(piece)
                happens = room[event] == len(piece)
                if happens and event == "freeze":
                    self._flowing.clear()
                if happens and event == "cut":
                    self._cut_at = None
            client.sendall(piece)
            if happens and event == "cut":
                self.cut()
            if happens and event != "freeze":
                raise ConnectionAbortedError
        return sent


def _left(limit, count):
    return float("inf") if limit is None else max(0, limit - count)


def _close(connection):
    """Close at once, also for a thread that is blocked on it."""
    with contextlib.suppress(OSError):  # the other end was faster
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
