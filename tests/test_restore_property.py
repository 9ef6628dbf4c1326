"""Random trees, restored under random faults: nothing wrong, and what is missing is named.

More examples: TEST_EFFORT=50. The same ones again: TEST_SEED=the seed printed.
"""

import os
import random
from zlib import crc32

import hypothesis.strategies as st
from conftest import MIB, Archive, Bucket
from faults import SEED, SIZES, drawn_by_lot
from faulty_sftp import (
    FAILURE,
    PERMISSION_DENIED,
    FaultyBox,
    answer_then_drop,
    at_most,
    drop,
    status,
    unknown_id,
)
from scripted_s3 import ScriptedS3, error, halfway, headers, lost_answer, reset
from test_restore import WRITING, damaged, settled

NAMES = ["a", "b", "d/a", "d/e/b", "d/e/ü", "f/g"]
LENGTHS = [0, 1, 5_000, MIB, 5 * MIB + 1]

BOX_FAULTS = {
    (kind, name): fault
    for kind in ("LSTAT", "READLINK", "MKDIR", *WRITING, "REMOVE", "POSIX_RENAME")
    for name, fault in {
        "drop": drop,
        "answer, then drop": answer_then_drop,
        "failure": status(FAILURE),
        "denied": status(PERMISSION_DENIED),
        "unknown id": unknown_id,
    }.items()
} | {("WRITE", "short"): at_most(1_000)}
del BOX_FAULTS["REMOVE", "denied"]  # which leaves a temporary file

S3_FAULTS = {
    (operation, name): fault
    for operation in ("GetObject", "HeadObject")
    for name, fault in {
        "500": error(500, "InternalError"),
        "403": error(403, "AccessDenied"),
        "404": error(404, "NoSuchKey"),
        "reset": reset,
        "lost answer": lost_answer,
    }.items()
} | {
    ("GetObject", "halfway"): halfway(then_all=False),
    ("GetObject", "damaged"): damaged,
    ("GetObject", "wrong etag"): error(412, "PreconditionFailed"),
    ("GetObject", "expired"): error(403, "InvalidObjectState"),
    ("ListObjectsV2", "500"): error(500, "InternalError"),
    ("ListObjectsV2", "reset"): reset,
    ("HeadObject", "other time"): headers(x_amz_meta_mtime="5"),
}

nth = st.sampled_from([1, 1, 2, 2, 3, 4, 5, 6])
s3_faults = st.tuples(st.just("s3"), st.sampled_from(sorted(S3_FAULTS)), nth)
box_faults = st.tuples(st.just("box"), st.sampled_from(sorted(BOX_FAULTS)), nth)


@st.composite
def drills(draw):
    """Where to restore to, and the faults of each pass: (whose, which, the request that
    meets it)."""
    to_box = draw(st.booleans())
    faults = st.one_of(s3_faults, box_faults) if to_box else s3_faults
    return to_box, draw(
        st.lists(st.lists(faults, min_size=3, max_size=8), min_size=2, max_size=3)
    )


trees = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(LENGTHS), min_size=3)
# The lengths of other files that are in the way.
others = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0, 3, 5_000]), max_size=2)


@drawn_by_lot(trees, drills(), others, st.booleans())
def test_any_fault_restores_nothing_wrong_and_a_pass_without_one_restores_all(
    moto, tmp_path_factory, files, drill, there, overwrite
):
    print(f"TEST_SEED={SEED}")
    to_box, plan = drill
    moto.reset()
    bucket = Bucket(moto, "property")
    folder = tmp_path_factory.mktemp("property")
    with FaultyBox() as box, ScriptedS3(moto.url) as s3:
        archive = Archive(
            box, bucket, folder / "archive", AWS_ENDPOINT_URL=s3.url, STORAGE_CLASS="STANDARD"
        )
        lots, expected = random.Random(1), {}
        for number, (name, length) in enumerate(sorted(files.items())):
            path, content = box.root / name, lots.randbytes(length)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, (1_700_000_000 + number,) * 2)
            expected[name.encode()] = (length, crc32(content), 1_700_000_000 + number)
        assert archive(constants=SIZES).status == 0
        target = (box.root if to_box else folder) / "back"
        before = {}
        for name, length in there.items():
            if name in files:
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bytes(length))
                os.utime(path, (1_600_000_000,) * 2)
                before[name.encode()] = (length, crc32(bytes(length)), 1_600_000_000)
        own = ["restore", "--yes", *(["--to-box", "back"] if to_box else ["--to", target])]
        own += ["--overwrite"] if overwrite else []
        for troubles in [*plan, []]:
            for whose, which, number in troubles:
                if whose == "box":
                    box.on(which[0], None, BOX_FAULTS[which], nth=number)
                else:
                    s3.on(which[0], S3_FAULTS[which], nth=number)
            result = archive(*own, constants=SIZES)
            box.rules.clear()
            s3.rules.clear()
            found = settled(target) if target.exists() else {}
            kept = {} if overwrite else before
            # 1: a refusal that every request would meet
            assert result.status in ((0, 1, 3) if troubles or kept else (0,)), result.stderr
            for name, what in found.items():
                if name in kept:
                    assert what == kept[name], name
                elif b".archive" in name:  # a later pass deletes it
                    assert troubles, name
                else:
                    assert what in (expected[name], before.get(name)), (name, result.stderr)
            assert before.keys() <= found.keys()
            missing = {name for name in expected if found.get(name) != expected[name]}
            named = {failure.split(": ")[0].encode() for failure in result.failures}
            assert result.status == 1 or missing <= named
            assert result.status or not named
        assert found == expected | kept
