"""Starts archive.py many times at the price of importing it once.

Most of the processor's time of a short run goes into imports. So one process imports the
program and forks for each run. What it forks is a process of its own: with a pid, pipes,
folder and environment, with signals as of a new process; its status is the program's.

    with Starter(PROGRAM.parent) as starter:
        process = starter.start(code, ["plan"], environment, folder)
        stdout, stderr = process.communicate(timeout=60)

What Python reads of the environment before it runs anything is the starter's: the
variables named in OWN_START.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

import boto3
from botocore.loaders import JSONFileLoader, Loader

OWN_START = ("PYTHON", "LANG", "LC_")  # Python reads variables that begin so as it starts
ENVIRONMENT = {"LANG": "C.UTF-8", "PATH": os.environ["PATH"]}


class Starter:
    """The process that has imported the program, and a connection to it."""

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        self.control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.folder, str(theirs.fileno())],
                env={**ENVIRONMENT, "HOME": os.devnull},  # no configuration of AWS
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # or each run would take it for a terminal
            )
        return self

    def __exit__(self, *exc):
        self.control.close()
        self.process.communicate()

    def start(self, code, arguments, environment, folder):
        """Execute the code in a new process, where `import archive` costs nothing."""
        ours, theirs = socket.socketpair()
        (stdout, its_stdout), (stderr, its_stderr) = os.pipe(), os.pipe()
        socket.send_fds(self.control, [b"x"], [theirs.fileno(), its_stdout, its_stderr])
        theirs.close()
        os.close(its_stdout)
        os.close(its_stderr)
        ours.sendall(pickle.dumps((code, arguments, environment, folder)))
        return Forked(ours, stdout, stderr)


class Forked:
    """A process that was forked for a run, with what tests use of subprocess.Popen."""

    def __init__(self, connection, stdout, stderr):
        self.stdout, self.stderr = (
            os.fdopen(pipe, encoding="utf-8", errors="surrogateescape")
            for pipe in (stdout, stderr)
        )
        self.readers, self.said = {}, {}  # by stream
        self.returncode = None
        answers = connection.makefile("rb")
        connection.close()
        self.pid = pickle.load(answers)
        self.waiting = _started(self._wait, answers)

    def _wait(self, answers):
        with answers:
            self.returncode = pickle.load(answers)

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._join([self.waiting], timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """The rest of both outputs, nothing of one that was closed."""
        for stream in (self.stdout, self.stderr):
            if stream not in self.readers and not stream.closed:
                self.readers[stream] = _started(self._read, stream)
        self._join([*self.readers.values(), self.waiting], timeout)
        return self.said.get(self.stdout, ""), self.said.get(self.stderr, "")

    def _read(self, stream):
        with stream:
            self.said[stream] = stream.read()

    def _join(self, threads, timeout):
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in threads:
            thread.join(deadline and max(0, deadline - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.pid, timeout)

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _started(action, argument):
    thread = threading.Thread(target=action, args=[argument], daemon=True)
    thread.start()
    return thread


# --- In the process that forks ---


def read_ahead():
    """Read what botocore reads for a client of S3, so that no run has to.

    Each run is given it once, as it was read: botocore changes what it has read.
    """
    both = [remember(JSONFileLoader, "load_file"), remember(Loader, "list_available_services")]
    boto3.Session("none", "none", region_name="us-east-1").client("s3")
    for give_it in both:
        give_it()


def remember(owner, name):
    """Keep what a method returns, until the function that this returns is called: from then
    on the method gives it, once."""
    method, held = getattr(owner, name), {}

    def note(self, *names, **more):
        held[names, tuple(more.values())] = method(self, *names, **more)
        return method(self, *names, **more)

    def give(self, *names, **more):
        kept = held.pop((names, tuple(more.values())), None)
        return kept or method(self, *names, **more)

    setattr(owner, name, note)
    return lambda: setattr(owner, name, give)


def serve(control):
    """For each run, fork; tell its pid, and its status when it has ended."""
    connections = {}  # by pid

    def reap(*_):
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with connections.pop(ended[0]) as connection:
                    tell(connection, os.waitstatus_to_exitcode(ended[1]))

    signal.signal(signal.SIGCHLD, reap)
    while files := socket.recv_fds(control, 1, 3)[1]:
        connection, stdout, stderr = socket.socket(fileno=files[0]), *files[1:]
        with connection.makefile("rb") as file:
            request = pickle.load(file)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until its pid is noted
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            run(stdout, stderr, *request)
        connections[pid] = connection
        tell(connection, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        os.close(stdout)
        os.close(stderr)


def tell(connection, number):
    with contextlib.suppress(OSError):  # the test is over
        connection.sendall(pickle.dumps(number))


def run(stdout, stderr, code, arguments, environment, folder):
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, 64)  # what the starter holds
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    sys.argv = arguments
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]
    import archive  # noqa: F401

    read_ahead()
    serve(socket.socket(fileno=int(sys.argv[2])))
