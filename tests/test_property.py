"""Random trees, random edits, random faults: the invariant holds after each run.

More examples: TEST_EFFORT=50. The same ones again: TEST_SEED=the seed printed.
"""

import os
import posixpath
import random
import re
from collections import defaultdict
from zlib import crc32

import hypothesis.strategies as st
from conftest import MIB, Archive, Bucket, tree
from faults import SEED, SIZES, assert_rows_are_true, drawn_by_lot, recorded
from faulty_sftp import (
    EOF,
    FAILURE,
    FaultyBox,
    answer_then_drop,
    at_most,
    attributes,
    drop,
    ends_at,
    first,
    longer,
    status,
    unknown_id,
)
from scripted_s3 import StrictS3, error, headers, lost_answer, reset

NAMES = ["a", "b", "c", "d/a", "d/e/b", "d/e/ü", "f/g"]
# bytes; about the limits between small and large, and of parts
LENGTHS = [0, 1, 5_000, MIB - 1, MIB, 3 * MIB, 5 * MIB, 5 * MIB + 1]

BOX_FAULTS = {
    (kind, name): fault
    for kind in ("OPENDIR", "READDIR", "OPEN", "FSTAT", "READ", "CLOSE")
    for name, fault in {
        "drop": drop,
        "answer, then drop": answer_then_drop,
        "failure": status(FAILURE),
        "end": status(EOF),
        "unknown id": unknown_id,
    }.items()
} | {
    ("READ", "short"): at_most(1_000),
    ("READ", "long"): longer,
    ("READ", "ends at 1"): ends_at(1),
    ("FSTAT", "no size"): attributes(size=None),
    ("FSTAT", "no mtime"): attributes(mtime=None),
    ("FSTAT", "other size"): attributes(size=3),
    ("FSTAT", "other mtime"): attributes(mtime=3),
}


def told_after_the_deed(answer):
    """Do what is asked, and give another answer."""

    def done(exchange):
        exchange.forward()
        return answer(exchange)

    return done


S3_FAULTS = {
    (None, "500"): error(500, "InternalError"),
    (None, "503"): error(503, "SlowDown"),
    (None, "403"): error(403, "AccessDenied"),
    (None, "reset"): reset,
    (None, "lost answer"): lost_answer,
    ("PutObject", "damaged"): error(400, "BadDigest"),
    ("UploadPart", "damaged"): error(400, "BadDigest"),
    ("CompleteMultipartUpload", "damaged"): error(400, "BadDigest"),
    ("CompleteMultipartUpload", "gone"): error(404, "NoSuchUpload"),
    ("CompleteMultipartUpload", "done, but gone"): told_after_the_deed(
        error(404, "NoSuchUpload")
    ),
    ("AbortMultipartUpload", "refused"): error(403, "AccessDenied"),
    ("PutObject", "wrong CRC-32"): headers(x_amz_checksum_crc32="AAAAAA=="),
    ("HeadObject", "wrong size"): headers(content_length="7"),
    ("HeadObject", "missing"): error(404, "NoSuchKey"),
}

edits = st.tuples(
    st.sampled_from(["write", "write", "rewrite", "rewrite", "replace", "touch", "delete"]),
    st.sampled_from(NAMES),
    st.sampled_from(LENGTHS),
)
troubles = st.one_of(
    st.tuples(st.just("box"), st.sampled_from(sorted(BOX_FAULTS))),
    st.tuples(st.just("box"), st.just(("READ", "drop"))),
    st.tuples(st.just("s3"), st.sampled_from(sorted(S3_FAULTS, key=str))),
    st.tuples(st.just("edit"), edits),
)


@st.composite
def rounds(draw):
    """Edits; and for the run after them faults, each of them (whose, which, the file
    that it is about, the request about it that meets it)."""
    changes = draw(st.lists(edits, min_size=4, max_size=9))
    changed = st.sampled_from([name for _, name, _ in changes])
    nth = st.sampled_from([1, 1, 1, 2, 3])
    faults = draw(st.lists(st.tuples(troubles, changed, nth), min_size=2, max_size=7))
    return changes, [(*trouble, name, nth) for trouble, name, nth in faults]


class Tree:
    """The files on the box, and every content that each has ever had."""

    def __init__(self, root):
        self.root = root
        self.versions = defaultdict(set)  # {(size, mtime, crc32)} by name
        self.changes = 0

    def edit(self, action, name, length):
        path = self.root / name
        self.changes += 1
        if action == "delete":
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.root / ".new" if action == "replace" else path
        if action == "rewrite" and path.exists():
            length = path.stat().st_size
        if action != "touch" or not path.exists():
            new.write_bytes(random.Random(self.changes).randbytes(length))
        mtime = 1_700_000_000 + self.changes
        os.utime(new, (mtime, mtime))
        os.replace(new, path)
        content = path.read_bytes()
        self.versions[name].add((len(content), mtime, crc32(content)))


def arm(box, s3, files, whose, which, name, nth):
    if whose == "edit":
        action, _, length = which
        edit = first(lambda: files.edit(action, name, length))
        box.on("READ", name.encode(), edit, nth=nth)
    elif whose == "s3":
        s3.on(which[0], S3_FAULTS[which], key=name, nth=nth)
    else:
        of_folder = which[0] in ("OPENDIR", "READDIR")
        path = posixpath.dirname(name) if of_folder else name
        box.on(which[0], path.encode(), BOX_FAULTS[which], nth=nth)


@drawn_by_lot(st.lists(rounds(), min_size=2, max_size=3))
def test_any_fault_leaves_a_true_state_and_a_run_without_one_archives_all(
    moto, tmp_path_factory, plan
):
    print(f"TEST_SEED={SEED}")
    moto.reset()  # nothing of an earlier example is there, even if that one failed
    bucket = Bucket(moto, "property")
    with FaultyBox() as box, StrictS3(moto.url) as s3:
        folder = tmp_path_factory.mktemp("property") / "archive"
        archive = Archive(box, bucket, folder, AWS_ENDPOINT_URL=s3.url)
        files, named = Tree(box.root), set()
        for changes, faults in [*plan, ([], [])]:
            for change in changes:
                files.edit(*change)
            for fault in faults:
                arm(box, s3, files, *fault)
            result = archive(constants=SIZES)
            assert result.status in ((0, 1, 3) if faults else (0,)), result.stderr
            box.rules.clear()
            s3.rules.clear()

            assert_rows_are_true(archive)
            objects = archive.objects()
            for size, mtime, key, crc in recorded(archive).values():
                known = {(size, crc) for size, _, crc in files.versions[key]}
                assert mtime is None or (size, mtime, crc) in files.versions[key], key
                assert crc is None or (size, crc) in known, key
            for key, (size, crc, _) in objects.items():
                contents = {(size, crc) for size, _, crc in files.versions[key]}
                assert (size, crc) in contents, key
            named |= set(
                re.findall(r"unfinished upload of (.+) \(id .+ not be aborted", result.stderr)
            )
            archive.assert_invariant(named)
        rows = archive.rows()
        for name, found in tree(box.root).items():
            assert objects[name.decode()][:2] == found
            assert rows[f"./{name.decode()}"][1] is not None
