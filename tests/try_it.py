"""Try archive.py with no account at all, on this machine alone:

    python tests/try_it.py

An SFTP server plays the Storage Box and an S3 server plays Amazon, both on
loopback. A small box is filled, archive.py is run on it twice, just as you would
run it, and what is then in the bucket is shown and compared with the box. Then the
state is thrown away, all is restored, and compared as well. Nothing is left behind.
It ends with 0 if everything was as promised, else with 1.
"""

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from zlib import crc32

from servers import AsyncSSHBox, Moto

PROGRAM = Path(__file__).resolve().parent.parent / "archive.py"
BUCKET = "my-archive"
MTIME = 1_600_000_000

# Name on the box -> (size in bytes, key in the bucket); no key: not to be archived.
FILES = {
    b"letters/2024/r\xc3\xa9sum\xc3\xa9 (final).odt": (31_000, None),
    b"letters/2024/an old name: \xe9t\xe9.txt": (
        900,
        "letters/2024/an old name: \u201bE9t\u201bE9.txt",
    ),
    b"letters/two\nlines.txt": (120, "letters/two\u201b0Alines.txt"),
    b"photos/ leading space, 100% #1 \xf0\x9f\x93\xb7.jpg": (700_000, None),
    b"photos/empty": (0, None),
    b"videos/holiday.mp4": (50 * 2**20, None),
}
HIDDEN = b".trash/old"
LINK = b"latest"


def main():
    with tempfile.TemporaryDirectory() as folder, AsyncSSHBox() as box, Moto() as moto:
        moto.client.create_bucket(Bucket=BUCKET)
        expected = fill(os.fsencode(box.root))
        env_file = write_env_file(Path(folder), {**box.settings(), **moto.settings(BUCKET)})
        print(f"A box with {len(expected)} files, a link and a hidden file; an empty")
        print(f"bucket, {BUCKET}. The first run archives all that is new:\n")
        first = run(env_file)
        print("\nThe second run finds nothing to do:\n")
        second = run(env_file)
        print("\nWhat the bucket holds:\n")
        held = show(moto)
        print("\nThis machine is lost, all but the settings. Deep Archive is cold: the first")
        print("restore only asks for the files, which would take hours at Amazon:\n")
        (Path(folder) / "archive_state.db").unlink()
        back = Path(folder) / "back"
        asked = run(env_file, "restore", "--to", "back", "--yes")
        print("\nThe same again brings back what is ready.  (This server's listing does not")
        print("tell what that is, so the estimate comes again; Amazon's tells.)\n")
        restored = run(env_file, "restore", "--to", "back", "--yes")
        whole = tree(os.fsencode(back)) == tree(os.fsencode(box.root))

    promises = {
        "both runs ended with status 0": first[0] == second[0] == 0,
        f"the first run archived {len(expected)} files": summary(
            first, "Uploaded files", len(expected)
        ),
        "the second run archived none": summary(second, "Uploaded files", 0),
        "each file is an object of the same bytes, in DEEP_ARCHIVE": held == expected,
        "the restores ended with 75, to be run again, and 0": (asked[0], restored[0])
        == (75, 0),
        "names, bytes and times of all files came back": whole,
    }
    print()
    for promise, kept in promises.items():
        print(f"{'yes' if kept else 'NO '}  {promise}")
    return 0 if all(promises.values()) else 1


def fill(root):
    """Put the files on the box; {key: (size, crc32)} of what is to be archived."""
    expected = {}
    for name, (size, key) in {**FILES, HIDDEN: (1, None)}.items():
        path = os.path.join(root, name)
        content = random.Random(name).randbytes(size)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
        except OSError:
            continue  # not every file system has every name: macOS wants UTF-8
        os.utime(path, (MTIME, MTIME))
        if name != HIDDEN:
            expected[key or name.decode()] = (size, crc32(content))
    os.symlink(b"photos", os.path.join(root, LINK))
    return expected


def write_env_file(folder, settings):
    path = folder / "demo.env"
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
    return path


def run(env_file, *arguments):
    """Run archive.py and show what it prints; (exit status, output).

    A relative folder among the arguments is one beside the settings."""
    told = " ".join(["--env-file", env_file.name, *arguments])
    print(f"$ python archive.py {told}", flush=True)
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "--env-file", env_file, *arguments],
        cwd=env_file.parent,
        # Nothing of your own settings takes part.
        env={"PATH": os.environ["PATH"], "AWS_EC2_METADATA_DISABLED": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    output = ""
    for line in process.stdout:
        shown = line.replace(f"{env_file.parent}{os.sep}", "")
        print(f"  {shown}", end="", flush=True)
        output += line
    return process.wait(), output


def tree(root):
    """{path: (bytes, mtime)} of what is archived of a folder."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                content = Path(os.fsdecode(path)).read_bytes()
                found[os.path.relpath(path, root)] = content, int(os.stat(path).st_mtime)
    return found


def summary(run, label, number):
    """Whether a run's summary has that number."""
    return any(
        line.partition(":")[::2] == (label.ljust(15), f" {number}")
        for line in run[1].splitlines()
    )


def show(moto):
    """Print the bucket; {key: (size, crc32)} of the objects in DEEP_ARCHIVE."""
    held = {}
    client = moto.client
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        key, size, storage_class = entry["Key"], entry["Size"], entry["StorageClass"]
        parts = entry["ETag"].strip('"').partition("-")[2]
        note = f"  in {parts} parts" if parts else ""
        print(f"  {storage_class:12} {size:>11,}  {key}{note}")
        if storage_class == "DEEP_ARCHIVE":
            held[key] = (size, crc32(moto.content(BUCKET, key)))
    return held


if __name__ == "__main__":
    sys.exit(main())
