"""What the box may do to a run: cut, freeze, lie, and change under its hands.

A run here has a small and a large file wherever both may meet the fault.
"""

import fcntl
import os
import random
import shutil
import signal
import stat
import threading
import time

import faulty_sftp
import paramiko
import pytest
import scripted_s3
from conftest import MIB
from faults import (
    LARGE,
    SIZES,
    SMALL,
    assert_all_archived,
    assert_failed,
    max_runtime_at,
    wait_for,
    write,
)
from faulty_sftp import (
    A_FOLDER,
    EOF,
    FAILURE,
    HANDLE,
    NO_SUCH_FILE,
    PERMISSION_DENIED,
    FaultyBox,
    Generated,
    a_file,
    answer_then_drop,
    at_most,
    attributes,
    deep_folders,
    drop,
    ends_at,
    every_second,
    first,
    freeze,
    honest,
    longer,
    many_files,
    names,
    one_file,
    status,
    unknown_id,
)
from relay import Relay
from scripted_s3 import error

IMPATIENT = {**SIZES, "CONNECT_LIMIT": 2, "SILENCE_LIMIT": 1, "RECONNECT_PAUSES": (0, 0.1, 0.2)}
TRIES = len(IMPATIENT["RECONNECT_PAUSES"])
SIX_TRIES = {**SIZES, "RECONNECT_PAUSES": (0, *[0.1] * 5)}
FILES = {"small": SMALL, "large": LARGE}


@pytest.fixture
def box(faulty_box):
    return faulty_box


def fill(box):
    for name, size in FILES.items():
        write(box.root / name, size)


# --- The connection is cut --------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fault"), [("OPEN", answer_then_drop), ("OPEN", drop), ("READ", drop)]
)
def test_connection_that_is_cut_around_the_first_read_costs_no_byte(archive, box, kind, fault):
    fill(box)
    cuts = [box.on(kind, name.encode(), fault) for name in FILES]
    result = archive(constants=SIZES)
    assert [cut.fired for cut in cuts] == [1, 1]
    assert (result.status, result.counts) == (0, (2, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_large_file_goes_on_at_its_offset_within_the_same_upload(archive, box, bucket):
    """The cut comes further into the file than what may be in flight."""
    write(box.root / "large", 40 * MIB)
    cut = box.on("READ", b"large", drop, at=36 * MIB)
    result = archive(constants=SIZES)
    assert cut.fired == 1
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert box.connections == 2
    assert sum(offset == 0 for _, offset, _ in box.reads) == 1
    begun = [path for method, path, query in bucket.writes() if query == "uploads"]
    assert len(begun) == 1
    assert_all_archived(archive, box)


def grown(path):
    with path.open("ab") as file:
        file.write(b"more")
    os.utime(path, (1_700_000_000, 1_700_000_000))


def touched(path):
    os.utime(path, (1_700_000_001, 1_700_000_001))


def rewritten(path):
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, (1_700_000_002, 1_700_000_002))


def replaced(path):
    other = path.with_name(".other")
    write(other, path.stat().st_size, 1_700_000_003)
    os.replace(other, path)


CHANGES = {change.__name__: change for change in (grown, touched, rewritten, replaced)}


def test_large_file_that_changed_during_an_outage_fails(archive, box):
    write(box.root / "other", SMALL)
    cuts = []
    for name, change in CHANGES.items():
        write(box.root / name, LARGE)
        act = first(lambda change=change, name=name: change(box.root / name), drop)
        cuts.append(box.on("READ", name.encode(), act, at=LARGE // 2))
    result = archive(constants=SIZES)
    assert [cut.fired for cut in cuts] == [1] * 4
    assert_failed(result, dict.fromkeys(CHANGES, "changed"))
    assert set(archive.objects()) == {"other"}
    archive.assert_invariant()
    assert archive(constants=SIZES).counts == (4, 1, 0)
    assert_all_archived(archive, box)


@pytest.mark.parametrize("kind", ["OPENDIR", "READDIR", "CLOSE"])
def test_walk_goes_on_after_cuts_with_nothing_missed_and_nothing_twice(
    archive, box, bucket, kind
):
    for number in range(20):
        write(box.root / f"d{number % 4}" / f"e{number % 8}" / f"f{number}", 10)
    count = 125 if kind == "READDIR" else 40
    for number in range(20, count):  # more than one reply holds
        write(box.root / f"f{number}", 10)
    cuts = [box.on(kind, None, drop, nth=nth) for nth in (2, 7, 12)]
    result = archive(constants=SIZES)
    assert [cut.fired for cut in cuts] == [1, 1, 1]
    assert (result.status, result.counts) == (0, (count, 0, 0)), result.stderr
    puts = [path for _, path, _ in bucket.writes() if "/f" in path]
    assert len(puts) == len(set(puts)) == count
    assert_all_archived(archive, box)


def test_connection_that_is_cut_again_and_again_still_gets_there(archive, box):
    """Progress begins a new count of tries."""
    for number in range(10):
        write(box.root / f"f{number}", MIB - 1)
    with Relay(box.host, box.port) as relay:
        relay.cut_each_after(2 * MIB)
        settings = {"TRANSFERS": 1, **box.settings(port=relay.port)}
        result = archive(constants=IMPATIENT, **settings)
        assert relay.connections > TRIES
    assert (result.status, result.counts) == (0, (10, 0, 0)), result.stderr
    assert_all_archived(archive, box)


@pytest.mark.parametrize("name", FILES)
def test_box_that_is_gone_for_good_ends_the_run_with_what_was_done(archive, box, name):
    """One file after another here, so that it is known what was done by then."""
    for other in ("a", "b", "c"):
        write(box.root / other, SMALL)
    write(box.root / name, FILES[name])
    with Relay(box.host, box.port) as relay:
        box.on("READ", name.encode(), first(relay.stop, drop))
        settings = {"TRANSFERS": 1, **box.settings(port=relay.port)}
        result = archive(constants=IMPATIENT, **settings)
    assert result.status == 1, result.stderr
    assert "Ended early    : by an error" in result.stdout
    assert result.counts[0] == 3
    assert set(archive.objects()) == {"a", "b", "c"}
    assert len(archive.rows()) == 3
    archive.assert_invariant()
    assert archive(constants=SIZES, **box.settings()).counts == (1, 3, 0)
    assert_all_archived(archive, box)


STOPPED_WHILE_CONNECTING = """
import os, signal, time
connect, connections = archive.connect, []
def stopped(config):
    connections.append(connect(config))
    if len(connections) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return connections[-1]
archive.connect = stopped
"""


def test_signal_during_an_outage_ends_the_run_in_order(archive, box):
    write(box.root / "f", SMALL)
    box.always("OPENDIR", None, drop)
    box.always("LSTAT", None, freeze)
    result = archive.start(constants=SIX_TRIES, before=STOPPED_WHILE_CONNECTING).wait()
    assert result.status == 143
    assert archive.query("SELECT status FROM runs") == [(143,)]


def test_box_that_cuts_every_connection_gets_a_bounded_number_of_tries(archive, box):
    box.always("INIT", None, drop)
    result = archive(constants=IMPATIENT)
    assert result.status == 1
    assert box.connections == TRIES


def test_many_folders_do_not_multiply_the_tries(archive, box):
    """They are listed at once; one thread connects, and gives up, for all."""
    for number in range(30):
        write(box.root / f"d{number}" / "f", SMALL)
    box.on("INIT", None, drop, nth=2, times=1_000)
    box.on("OPENDIR", None, drop, nth=10, times=1_000)
    result = archive("plan", constants=IMPATIENT)
    assert result.status == 1
    assert "no SFTP session" in result.stderr
    assert box.connections == 1 + TRIES


def test_text_in_place_of_sftp_is_shown(archive, box):
    """As of a shell that greets everybody: its letters would be a length of 1.4 GB."""
    box.always("INIT", None, lambda request: b"Welcome to this box\n" + request.reply())
    result = archive(constants=IMPATIENT)
    assert result.status == 1
    assert "the box sent b'Welc', not a reply" in result.stderr


@pytest.mark.parametrize("size", FILES.values(), ids=FILES)
def test_file_that_breaks_the_connection_whenever_it_is_read_fails_alone(archive, box, size):
    """It comes first, and the line is slow: the others are under way whenever it is read."""
    write(box.root / "a", size)
    for number in range(60):
        write(box.root / f"f{number}", SMALL)
    box.always("READ", b"a", drop)
    with Relay(box.host, box.port, delay_ms=10) as relay:
        result = archive(constants=SIZES, **box.settings(port=relay.port))
    assert_failed(result, {"a": "lost the connection"})
    assert box.connections < 20
    assert len(archive.rows()) == 60
    archive.assert_invariant()


def test_files_that_always_break_the_connection_are_no_outage(archive, box):
    """Each is to blame itself, though nothing else shows that the box is well; in the
    next run, too, when there is nothing to read but them."""
    bad = {"a": SMALL, "b": LARGE, "c": SMALL}
    for name, size in bad.items():
        write(box.root / name, size)
        box.always("READ", name.encode(), drop)
    write(box.root / "well", SMALL)
    impatient = {**SIZES, "RECONNECT_PAUSES": (0, *[0.05] * 5)}
    for _ in range(2):
        result = archive(constants=impatient, TRANSFERS="1")
        assert_failed(result, dict.fromkeys(bad, "lost the connection"))
    assert len(archive.rows()) == 1


def test_file_that_breaks_the_connection_in_more_than_one_way_is_no_outage(archive, box):
    """The box is well: it answers to everything else."""
    write(box.root / "bad", LARGE)
    write(box.root / "well", SMALL)
    box.on("OPEN", b"bad", drop, times=2)
    box.always("READ", b"bad", drop)
    result = archive(constants=SIX_TRIES, TRANSFERS="1")
    assert_failed(result, {"bad": "lost the connection"})
    assert len(archive.rows()) == 1


def test_hanging_up_at_a_login_that_was_good_before_is_an_outage_like_others(
    archive, box, monkeypatch
):
    fill(box)
    logins = []

    def check(login, *_):
        logins.append(login)
        if len(logins) in (2, 3):
            box.transports[-1].close()
            return paramiko.AUTH_FAILED
        return paramiko.AUTH_SUCCESSFUL

    monkeypatch.setattr(faulty_sftp._Login, "check_auth_password", check)
    box.on("READ", b"large", drop)
    result = archive(constants=SIX_TRIES)
    assert result.status == 0, result.stderr
    assert len(logins) == 4


def test_connection_that_breaks_at_every_file_ends_the_run(archive, box):
    """They are not to blame for it."""
    for number in range(8):
        write(box.root / f"f{number}", SMALL)
    box.always("READ", None, drop)
    result = archive(constants={**SIX_TRIES, "SAME_FAILURES": 4}, TRANSFERS="1")
    assert result.status == 1
    assert "4 in a row failed like this" in result.stderr
    assert len(result.failures) == 4
    assert box.connections < 40
    archive.assert_invariant()


def test_folders_that_always_break_the_connection_fail_alone(archive, box):
    """More of them than are listed at once, behind well ones: the box is not gone."""
    for number in range(10):
        write(box.root / f"a{number}" / "f", SMALL)
    bad = [f"bad{number}" for number in range(5)]
    for number, name in enumerate(bad):
        write(box.root / name / "f", SMALL)
        box.always(("OPENDIR", "READDIR")[number % 2], name.encode(), drop)
    write(box.root / "z" / "f", SMALL)
    result = archive(constants={**SIX_TRIES, "LISTINGS_AT_ONCE": 4})
    assert_failed(result, dict.fromkeys(bad, "lost the connection"))
    assert len(archive.rows()) == 11
    assert box.connections <= 1 + 6 * len(bad)


def test_many_that_break_the_connection_fail_alone(archive, box):
    """Files and folders at once, over a line on which much is under way."""
    bad = {"bad0": SMALL, "bad1": LARGE, "bad2": SMALL, "bad3": LARGE}
    for name, size in bad.items():
        write(box.root / name, size)
        box.always("READ", name.encode(), drop)
    for name in ("folder0", "folder1"):
        (box.root / name).mkdir()
        box.always("OPENDIR", name.encode(), drop)
        bad[name] = 0
    for number in range(20):
        write(box.root / f"well{number}", SMALL)
        write(box.root / f"d{number}" / "well", SMALL)
    write(box.root / "large", 3 * LARGE)
    with Relay(box.host, box.port, delay_ms=10) as relay:
        settings = box.settings(port=relay.port)
        result = archive(constants=SIX_TRIES, **settings)
    assert_failed(result, dict.fromkeys(bad, "lost the connection"))
    assert result.counts == (41, 0, 6)


def test_reply_that_cannot_be_read_ends_the_connection(archive, box):
    """Nothing says any more which reply belongs where; and what was open is closed."""
    fill(box)
    spoilt = [box.on("FSTAT", name.encode(), cut_short) for name in FILES]
    result = archive(constants=SIX_TRIES)
    assert [rule.fired for rule in spoilt] == [1, 1]
    assert (result.status, result.counts) == (0, (2, 0, 0)), result.stderr
    assert box.connections in (2, 3)
    assert_all_archived(archive, box)


def cut_short(request):
    """Attributes without all of them."""
    return request.packet(105, b"\0\0\0\x0f\0")


def test_reply_of_another_type_is_not_believed(archive, box):
    """Here a handle as long as the file that is read."""
    write(box.root / "f", SMALL)
    handle = SMALL.to_bytes(4, "big") + bytes(SMALL)
    wrong = box.on("READ", b"f", lambda request: request.packet(HANDLE, handle))
    result = archive(constants=IMPATIENT)
    assert wrong.fired == 1
    assert "a reply of type 102, not 103" in result.stderr
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_attributes_of_the_servers_own_are_skipped(archive, box, monkeypatch):
    """SFTP lets a server add pairs of strings, and send an owner."""
    fill(box)
    packed = faulty_sftp.Attributes.packed

    def extended(attributes):
        flags, fields = packed(attributes)[:4], packed(attributes)[4:]
        at = 8 * (flags[3] & 1)  # behind the size
        owner, pairs = b"\0\0\x03\xe8" * 2, b"\0\0\0\x02\0\0\0\x03acl\0\0\0\0" + b"\0" * 8
        return bytes([0x80, 0, 0, flags[3] | 2]) + fields[:at] + owner + fields[at:] + pairs

    monkeypatch.setattr(faulty_sftp.Attributes, "packed", extended)
    assert archive(constants=SIZES).counts == (2, 0, 0)
    assert_all_archived(archive, box)


def test_packet_without_data_is_not_the_end(archive, box):
    write(box.root / "f", SMALL)

    def empty(request):
        channel = request.session.channel
        message = paramiko.Message()
        message.add_byte(b"\x5e")  # SSH_MSG_CHANNEL_DATA
        message.add_int(channel.remote_chanid)
        message.add_string(b"")
        channel.transport._send_user_message(message)
        return request.reply()

    box.always("OPEN", None, empty)
    assert archive().counts == (1, 0, 0)
    assert box.connections == 1


# --- A listing goes wrong ---------------------------------------------------


def test_names_that_come_after_the_end_are_taken(archive, box):
    """A server that answers several requests at once may bring them in that order."""
    for number in range(105):  # more than one reply has
        write(box.root / f"f{number}", 10)
    box.on("READDIR", b"", status(EOF), nth=2)
    assert archive(constants=SIZES).counts == (105, 0, 0)


def answered(request):
    """How many READDIRs of this handle were answered before."""
    count = vars(request.handle).setdefault("answered", 0)
    request.handle.answered += 1
    return count


def dies_after(count):
    return lambda request: request.reply() if answered(request) < count else drop(request)


def refuses_after(count):
    return lambda request: (honest if answered(request) < count else status(FAILURE))(request)


def never_ends(request):
    return request.reply() if answered(request) < 1 else request.names([])


@pytest.mark.parametrize(
    "fault",
    [dies_after(6), refuses_after(1), never_ends],
    ids=["cut after 6", "refused after 1", "without an end"],
)
def test_listing_that_always_fails_at_the_same_place_fails_alone(archive, box, fault):
    """Its neighbours take some flights, too."""
    for folder in ("large", "poison", "zlarge"):
        (box.root / folder).mkdir()
        for number in range(900):
            (box.root / folder / f"f{number}").touch()
    box.always("READDIR", b"poison", fault)
    result = archive("plan", constants={**SIZES, "PAGE": 500})
    assert result.status == 3, result.stderr
    assert [failure.split(": ")[0] for failure in result.failures] == ["./poison"]
    assert "1,800" in result.stdout, "its neighbours are whole"
    assert box.requests["OPENDIR"] < 20


def failure_after_the_end(request):
    if vars(request.handle).get("ended"):
        return request.status(FAILURE)
    entries = list(request.handle.listing)
    request.handle.ended = not entries
    return request.names(entries) if entries else request.status(EOF)


def test_very_large_folder_behind_many_others_is_listed_whole(archive_of):
    """Its turn comes late, and it is too large to be listed ahead of that."""

    def names(path):
        if path:
            count = 20_000 if path == b"z" else 10
            return ((b"f%d" % number, a_file(0)) for number in range(count))
        return ((name, A_FOLDER) for name in (*(b"d%d" % n for n in range(200)), b"z"))

    tree = Generated(names, lambda path: a_file(0) if b"/" in path else A_FOLDER)
    with FaultyBox(tree) as box:
        result = archive_of(box)("plan")
        assert result.status == 0, result.stderr
        assert "22,000" in result.stdout
        assert box.opened[b"z"] == 2
        assert sum(box.opened.values()) == 203


def test_refusal_after_the_end_of_a_listing_does_no_harm(archive, box):
    write(box.root / "d" / "f", SMALL)
    box.always("READDIR", b"d", failure_after_the_end)
    assert archive().status == 0


def test_folder_that_lists_nothing_and_hides_itself_within_is_not_gone(archive, box):
    write(box.root / "d" / "f", SMALL)
    assert archive().status == 0
    box.always("READDIR", b"d", status(EOF))
    box.on("LSTAT", b"d", status(NO_SUCH_FILE))  # the first is that of d/.
    result = archive()
    assert_failed(result, {"d": "this folder cannot be listed: the box answered"})
    assert "Vanished" not in result.stdout


# --- The box refuses to open more --------------------------------------------


def test_server_that_allows_few_open_handles_is_archived_in_full(archive_of):
    """Folders, small files and large ones, more of each than may be open at once; and
    folders with more files than are read at once."""
    with FaultyBox(max_handles=16) as box:
        for number in range(120):
            write(box.root / f"d{number % 3}" / f"f{number}", 10)
        for number in range(30):
            write(box.root / f"e{number}" / "f", 10)
            write(box.root / f"f{number}", 10)
        for number in range(18):
            write(box.root / f"large{number}", MIB)
        archive = archive_of(box)
        result = archive(constants=SIZES)
        assert box.refused
        assert (result.status, result.counts) == (0, (198, 0, 0)), result.stderr
        assert_all_archived(archive, box)


def test_large_folders_are_listed_whole_with_few_open_handles(archive_of):
    """Each is too large to be listed ahead of its turn."""
    with FaultyBox(many_files(30, 600), max_handles=4) as box:
        result = archive_of(box)("plan", constants={"NAMES_AHEAD": 400})
        assert box.refused
        assert result.status == 0, result.stderr
        assert "18,000" in result.stdout


@pytest.mark.parametrize("transfers", [1, 32])
def test_server_that_refuses_every_second_open_is_archived_in_full(archive, box, transfers):
    for number in range(20):
        write(box.root / f"d{number}" / "f", SMALL)
        write(box.root / f"f{number}", SMALL)
    for number in range(2):
        write(box.root / f"large{number}", LARGE)
    refusal = every_second(status(FAILURE))
    refused = [box.always(kind, None, refusal) for kind in ("OPEN", "OPENDIR")]
    result = archive(constants=SIZES, TRANSFERS=transfers)
    assert all(rule.fired for rule in refused)
    assert (result.status, result.counts) == (0, (42, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_files_that_are_refused_do_not_hold_up_the_others_beside_a_large_one(
    archive_of, box, s3
):
    """Nothing tells such a file from one of too many: but more were open before."""
    go = threading.Event()
    s3.always("UploadPart", lambda exchange: go.wait(60) and exchange.forward())
    write(box.root / "a", LARGE)
    bad = [f"bad{number}" for number in range(30)]
    for name in bad:
        write(box.root / name, SMALL)
        box.always("OPEN", name.encode(), status(FAILURE))
    for number in range(30):
        write(box.root / f"f{number}", SMALL)
    archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
    began = time.monotonic()
    running = archive.start(constants={**SIZES, "SILENCE_LIMIT": 5})
    # Before the first PUT there may be no table to look into.
    wait_for(lambda: s3.requests["PutObject"] and len(archive.rows()) == 30)
    took = time.monotonic() - began
    go.set()
    result = running.wait()
    assert_failed(result, dict.fromkeys(bad, "the box answered"))
    assert result.counts == (31, 0, 30)
    assert took < 20, "it waits for one of them at most"


# --- The box falls silent ---------------------------------------------------


def test_signal_ends_a_run_whose_output_nobody_reads(archive, box):
    for number in range(120):
        write(box.root / ("n" * 60 + str(number)), 1)
    running = archive.start(constants={"STOP_LIMIT": 1, "EXIT_GRACE": 1}, LOG_FILE="")
    fcntl.fcntl(running.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    seen = [-1]
    while seen[-1] < 1 or seen[-3:].count(seen[-1]) < 3:
        time.sleep(0.7)  # until the pipe is full
        seen.append(len(archive.rows()))
    assert seen[-1] < 120
    running.process.terminate()
    assert running.process.wait(15) == 143


@pytest.mark.parametrize("after", [0, 30, 700], ids=["banner", "key exchange", "login"])
def test_freeze_before_the_session_is_there_is_waited_for_only_so_long(archive, box, after):
    write(box.root / "f", SMALL)
    with Relay(box.host, box.port) as relay:
        relay.freeze(after)
        running = archive.start(constants=IMPATIENT, **box.settings(port=relay.port))
        wait_for(lambda: relay.connections == 2)
        relay.thaw()
        result = running.wait()
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_connection_on_which_nothing_is_asked_is_not_taken_for_frozen(archive_of, box, s3):
    """S3 takes longer for a file than the box may be silent."""
    archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
    for name in ("a", "b"):
        write(box.root / name, SMALL)
    s3.on("PutObject", scripted_s3.first(lambda: time.sleep(2.5)))
    result = archive(constants=IMPATIENT, TRANSFERS=1)
    assert (result.status, result.counts) == (0, (2, 0, 0)), result.stderr
    assert box.connections == 1


def test_login_that_freezes_again_and_again_is_no_refusal(archive, box, monkeypatch):
    write(box.root / "f", SMALL)
    asked = []

    def check(login, *_):
        asked.append(1)
        if len(asked) < 4:
            login.box.closing.wait(20)
        return paramiko.AUTH_SUCCESSFUL

    monkeypatch.setattr(faulty_sftp._Login, "check_auth_password", check)
    result = archive(constants={**SIX_TRIES, "CONNECT_LIMIT": 1})
    assert (result.status, len(asked)) == (0, 4), result.stderr


@pytest.mark.parametrize("kind", ["INIT", "OPENDIR", "READDIR"])
def test_freeze_in_the_walk_is_waited_for_only_so_long(archive, box, kind):
    write(box.root / "d" / "f", SMALL)
    frozen = box.on(kind, None, freeze, nth=1 if kind == "INIT" else 2)
    result = archive(constants=IMPATIENT)
    assert frozen.fired == 1
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert box.connections >= 2
    assert_all_archived(archive, box)


@pytest.mark.parametrize("kind", ["OPEN", "READ"])
def test_freeze_in_a_file_is_waited_for_only_so_long(archive, box, kind):
    fill(box)
    frozen = [box.on(kind, name.encode(), freeze) for name in FILES]
    result = archive(constants=IMPATIENT)
    assert [rule.fired for rule in frozen] == [1, 1]
    assert (result.status, result.counts) == (0, (2, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_box_that_is_frozen_for_good_ends_the_run(archive, box):
    box.always("READDIR", None, freeze)
    write(box.root / "f", SMALL)
    result = archive(constants=IMPATIENT)
    assert result.status == 1
    assert 1 < box.connections <= 2 * TRIES


@pytest.mark.parametrize(
    ("number", "kind", "path"),
    [
        (signal.SIGTERM, "INIT", None),
        (signal.SIGTERM, "READDIR", b"d"),
        (signal.SIGINT, "READ", b"large"),
    ],
)
def test_signal_ends_a_run_that_waits_for_a_frozen_box(archive, box, number, kind, path):
    fill(box)
    write(box.root / "d" / "f", SMALL)
    frozen = box.on(kind, path, freeze)
    running = archive.start(constants={**SIZES, "STOP_LIMIT": 1})
    wait_for(lambda: frozen.fired)
    running.process.send_signal(number)
    result = running.wait(timeout=10)
    assert result.status == 128 + number
    assert result.summary
    archive.assert_invariant()


NO_LAST_THREAD = """
import threading
def refuse(timer, start=threading.Timer.start):
    if timer.function is os._exit:
        raise RuntimeError("can't start new thread")
    start(timer)
threading.Timer.start = refuse
"""


def test_signal_is_told_by_the_status_though_no_thread_can_be_started(archive, box):
    fill(box)
    frozen = box.on("READ", b"large", freeze)
    running = archive.start(constants={**SIZES, "STOP_LIMIT": 1}, before=NO_LAST_THREAD)
    wait_for(lambda: frozen.fired)
    running.process.terminate()
    result = running.wait(timeout=20)
    assert result.status == 143
    assert result.summary
    archive.assert_invariant()


@pytest.mark.parametrize(("kind", "path"), [("READDIR", b"d"), ("READ", b"large")])
def test_max_runtime_ends_a_run_that_waits_for_a_frozen_box(archive, box, tmp_path, kind, path):
    fill(box)
    write(box.root / "d" / "f", SMALL)
    sign = tmp_path / "over"
    frozen = box.on(kind, path, first(sign.touch, freeze))
    grace = {**SIZES, "RUNTIME_GRACE": 1}
    result = archive.start(constants=grace, **max_runtime_at(sign)).wait(timeout=20)
    assert frozen.fired
    assert result.status == 3
    assert "Ended early    : MAX_RUNTIME was over" in result.stdout
    archive.assert_invariant()
    assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)


@pytest.mark.parametrize("at", [0, LARGE - 1], ids=["first read", "last read"])
def test_signal_leaves_what_was_done_and_nothing_half_done(archive, box, at):
    """One file after another here, so that it is known what was done by then."""
    write(box.root / "a", SMALL)
    write(box.root / "large", LARGE)

    def stop():
        running.process.terminate()

    box.on("READ", b"large", first(stop, freeze), at=at)
    running = archive.start(constants={**SIZES, "STOP_LIMIT": 1}, TRANSFERS=1)
    result = running.wait(timeout=20)
    assert result.status == 143
    assert result.counts[0] == 1
    assert set(archive.objects()) == {"a"}
    archive.assert_invariant()
    assert archive(constants=SIZES).counts == (1, 1, 0)
    assert_all_archived(archive, box)


STRIKE = """
import pathlib, signal, threading, time
def strike():
    while not pathlib.Path({flag!r}).exists():
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=strike, daemon=True).start()
"""


def test_signal_that_does_not_wake_the_main_thread_ends_the_run(archive, box, tmp_path):
    """Python handles signals there, but one that comes as it goes to sleep, or that
    another thread receives, as here, does not wake it."""
    flag = tmp_path / "strike"
    write(box.root / "small", SMALL)
    frozen = box.on("READ", b"small", freeze)
    running = archive.start(constants=SIZES, before=STRIKE.format(flag=str(flag)))
    wait_for(lambda: frozen.fired)
    flag.touch()
    result = running.wait(timeout=15)
    assert result.status == 143
    archive.assert_invariant()


# --- The box lies about a file ----------------------------------------------


def test_file_without_a_usable_fstat_fails_alone(archive, box):
    write(box.root / "other", SMALL)
    faults = {
        "fails": status(FAILURE),
        "no-size": attributes(size=None),
        "no-mtime": attributes(mtime=None),
    }
    files = {f"{what}-{kind}": what for what in faults for kind in FILES}
    for name, what in files.items():
        write(box.root / name, FILES[name.split("-")[-1]])
        box.always("FSTAT", name.encode(), faults[what])
    result = archive(constants=SIZES)
    reasons = {"fails": "the box answered: told to"}
    assert_failed(
        result, {f: reasons.get(w, "does not tell its size") for f, w in files.items()}
    )
    assert set(archive.objects()) == {"other"}
    archive.assert_invariant()


def test_file_that_ends_early_is_not_recorded(archive, box):
    write(box.root / "other", SMALL)
    reasons = {}
    ends = {SMALL: (0, SMALL - 1), LARGE: (0, 2 * MIB, LARGE - 1)}
    for size, places in ends.items():
        for end in places:
            name = f"{end}-of-{size}"
            write(box.root / name, size)
            box.always("READ", name.encode(), ends_at(end))
            reasons[name] = f"ended at {end} of {size} bytes"
    result = archive(constants=SIZES)
    assert_failed(result, reasons)
    assert set(archive.objects()) == {"other"}
    archive.assert_invariant()


def test_file_that_changes_while_it_is_read_is_archived_by_the_next_run(archive, box):
    write(box.root / "other", SMALL)
    files = {f"{change}-{kind}": change for change in CHANGES for kind in FILES}
    for name, change in files.items():
        size = FILES[name.split("-")[-1]]
        write(box.root / name, size)
        act = first(lambda name=name, change=change: CHANGES[change](box.root / name))
        box.on("READ", name.encode(), act, at=size // 2)
    result = archive(constants=SIZES)
    assert_failed(result, dict.fromkeys(files, "changed while it was read"))
    assert set(archive.objects()) == {"other"}
    archive.assert_invariant()
    assert archive(constants=SIZES).counts == (8, 1, 0)
    assert_all_archived(archive, box)


def test_changed_file_that_fails_leaves_its_earlier_object_to_be_compared(archive, box):
    fill(box)
    assert archive(constants=SIZES).status == 0
    before = archive.objects()
    for name, size in FILES.items():
        rewritten(box.root / name)
        act = first(lambda name=name: touched(box.root / name))
        box.on("READ", name.encode(), act, at=size // 2)
    result = archive(constants=SIZES)
    reason = "changed while it was read: {0} bytes of mtime 1700000002 then {0} of 1700000001"
    assert_failed(result, {name: reason.format(size) for name, size in FILES.items()})
    assert archive.objects() == before
    assert archive.rows() == {f"./{name}": (size, None) for name, size in FILES.items()}
    archive.assert_invariant()
    assert archive(constants=SIZES).counts == (2, 0, 0)
    assert_all_archived(archive, box)


def test_handle_of_a_file_that_changed_is_closed_once(archive, box):
    """A server gives the number out again: a second CLOSE ends another file's, and the
    reads after it may be those of a third.  The fixture `faulty_box` counts."""
    write(box.root / "large", LARGE)
    box.on("READ", b"large", first(lambda: os.utime(box.root / "large", (5, 5))), nth=3)
    result = archive(constants=SIZES)
    assert_failed(result, {"large": "changed while it was read"})


def test_handle_of_a_file_that_is_refused_after_a_cut_is_closed_once(archive, box):
    write(box.root / "large", LARGE)
    box.on("READ", b"large", drop, nth=3)
    box.on("FSTAT", b"large", attributes(size=None), nth=2)
    result = archive(constants=SIZES)
    assert_failed(result, {"large": "does not tell"})


def test_file_whose_lookup_is_refused_is_closed_before_the_next_try(archive, box):
    write(box.root / "small", SMALL)
    refused = box.on("LSTAT", b"small", status(FAILURE), times=2)
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert refused.fired == 2
    assert box.requests["OPEN"] + box.requests["OPENDIR"] == box.requests["CLOSE"] == 4


@pytest.mark.parametrize(("kind", "nth"), [("READ", 20), ("LSTAT", 2)])
def test_file_rewritten_within_its_second_while_it_is_read_is_archived_again(
    archive, box, kind, nth
):
    """Reading takes longer than the time for which a file counts as changed just now."""
    name, size = {"READ": ("large", LARGE), "LSTAT": ("small", SMALL)}[kind]
    path, times, recent = box.root / name, [], 4  # s, so that a slow machine is in time
    write(path, size)

    def change():
        times[:] = [int(time.time())] * 2
        os.utime(path, tuple(times))

    def rewrite(request):
        reply = request.reply()  # for a small file it is the last one that is waited for
        path.write_bytes(b"!" * size)
        os.utime(path, tuple(times))
        # From now on its time is no longer recent.
        time.sleep(max(0, times[0] + recent + 1 - time.time()))
        return reply

    # A large file has to be as it was listed.
    kind_of_change, place = {"large": ("OPENDIR", b""), "small": ("OPEN", b"small")}[name]
    box.on(kind_of_change, place, first(change))
    rewritten = box.on(kind, name.encode(), rewrite, nth=nth)
    assert archive(constants={**SIZES, "RECENT": recent}).counts == (1, 0, 0)
    assert rewritten.fired
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert_all_archived(archive, box)


def test_file_written_after_its_turn_came_may_be_rewritten_within_that_second(archive, box):
    """It was changed later than the time for which a file counts as changed just now, and
    before it is opened; and again when it has been read."""
    path, times = box.root / "small", []
    write(path, SMALL)

    def change():
        time.sleep(2.1)
        times[:] = [int(time.time())] * 2
        os.utime(path, tuple(times))

    def rewrite(request):
        reply = request.reply()
        path.write_bytes(b"!" * SMALL)
        os.utime(path, tuple(times))
        return reply

    box.on("OPEN", b"small", first(change))
    rewritten = box.on("LSTAT", b"small", rewrite, nth=2)
    assert archive(constants={**SIZES, "RECENT": 1}).counts == (1, 0, 0)
    assert rewritten.fired
    assert archive(constants=SIZES).counts == (1, 0, 0)
    assert archive.contents()["small"] == path.read_bytes()


def test_file_that_changed_since_it_was_listed_is_archived_as_it_is(archive, box):
    """A large one is left to the next run: its parts have to be of the listed version."""
    files = {f"{change}-{kind}": change for change in CHANGES for kind in FILES}
    for name, change in files.items():
        write(box.root / name, FILES[name.split("-")[-1]])
        act = first(lambda name=name, change=change: CHANGES[change](box.root / name))
        box.on("OPEN", name.encode(), act)
    result = archive(constants=SIZES)
    assert_failed(result, {f"{change}-large": "changed since" for change in CHANGES})
    assert result.counts[0] == 4
    archive.assert_invariant()
    assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)


def test_small_file_that_grew_by_far_since_it_was_listed_is_left_to_the_next_run(archive, box):
    """No memory was set aside for it."""
    write(box.root / "small", SMALL)
    grow = first(lambda: write(box.root / "small", 3 * MIB, 1_700_000_000))
    box.on("OPEN", b"small", grow)
    failed = archive()
    assert_failed(failed, {"small": f"changed: {SMALL} bytes when it was listed now {3 * MIB}"})
    assert box.reads == []
    wait_for(lambda: box.requests["CLOSE"] == box.requests["OPENDIR"] + box.requests["OPEN"])
    assert archive().counts == (1, 0, 0)
    assert_all_archived(archive, box)


def test_folder_that_took_the_place_of_a_file_is_not_archived_as_an_empty_one(archive, box):
    """btrfs gives an empty folder the size 0, and OpenSSH opens a folder like a file."""
    write(box.root / "f", SMALL)
    assert archive().status == 0
    before = archive.objects()
    write(box.root / "f", SMALL, mtime=1_700_000_001)
    folder = attributes(mode=stat.S_IFDIR | 0o755, size=0)
    for kind in ("LSTAT", "FSTAT"):
        box.always(kind, b"f", folder)
    box.always("READ", b"f", status(FAILURE))
    assert_failed(archive(), {"f": "changed"})
    assert archive.objects() == before


def test_two_tiny_replies_do_not_slow_the_rest(archive, box):
    write(box.root / "large", 4 * MIB)
    for nth in (2, 5):
        box.on("READ", b"large", at_most(1), nth=nth)
    assert archive(constants={**SIZES, "READ_WINDOW": MIB}).status == 0
    assert_all_archived(archive, box)
    assert box.requests["READ"] < 2_000


def test_short_replies_are_asked_to_the_end(archive, box):
    for size, cap in [(500, 1), (100_000, 1_000), (2 * MIB, 32 * 1024)]:
        name = f"{size}-by-{cap}"
        write(box.root / name, size)
        box.always("READ", name.encode(), at_most(cap))
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (3, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_random_short_replies_in_random_order_are_put_together(archive_of):
    lengths = random.Random(1)

    def some(request):
        return at_most(lengths.randint(1, 200_000))(request)

    with FaultyBox(shuffle=1) as box:
        archive = archive_of(box)
        write(box.root / "large", LARGE)
        for number in range(20):
            write(box.root / f"f{number}", 300_000)
        box.always("READ", None, some)
        result = archive(constants=SIZES)
        assert (result.status, result.counts) == (0, (21, 0, 0)), result.stderr
        assert_all_archived(archive, box)


def test_replies_without_a_byte_are_the_end_of_the_file(archive, box):
    fill(box)
    box.always("READ", None, at_most(0))
    result = archive(constants=SIZES)
    assert_failed(result, dict.fromkeys(FILES, "ended at 0 of"))
    assert archive.objects() == {}
    archive.assert_invariant()


def test_answer_that_nobody_asked_for_does_no_harm(archive, box):
    fill(box)
    kinds = ("OPENDIR", "READDIR", "OPEN", "FSTAT", "READ")
    stray = [box.on(kind, None, unknown_id, times=2) for kind in kinds]
    result = archive(constants=SIZES)
    assert all(rule.fired for rule in stray)
    assert (result.status, result.counts) == (0, (2, 0, 0)), result.stderr
    assert_all_archived(archive, box)


def test_reply_longer_than_asked_for_is_not_believed(archive, box):
    fill(box)
    for name in FILES:
        box.on("READ", name.encode(), longer)
    result = archive(constants=SIZES)
    assert_failed(result, dict.fromkeys(FILES, "has more than"))
    assert archive.objects() == {}
    assert archive(constants=SIZES).counts == (2, 0, 0)
    assert_all_archived(archive, box)


# --- The box lies about a folder --------------------------------------------


def test_listing_that_fails_costs_only_that_folder(archive, box):
    for number in range(110):
        write(box.root / "midway" / f"f{number:03}", 10)
    for folder in ("never", "denied", "well"):
        write(box.root / folder / "f", SMALL)
    box.always("READDIR", b"midway", refuses_after(1))
    box.always("OPENDIR", b"denied", status(PERMISSION_DENIED))
    box.always("READDIR", b"never", status(FAILURE))
    result = archive(constants=SIZES)
    assert_failed(result, dict.fromkeys(("midway", "denied", "never"), "cannot be listed"))
    assert set(archive.objects()) == {"well/f"}
    archive.assert_invariant()


@pytest.mark.parametrize("kind", ["OPENDIR", "READDIR"])
def test_unreadable_remote_path_is_never_a_success(archive, box, kind):
    write(box.root / "f", SMALL)
    box.always(kind, b"", status(FAILURE))
    assert archive(constants=SIZES).status == 1


def test_remote_path_that_does_not_exist_is_fatal(archive, box):
    result = archive(REMOTE_PATH="nowhere")
    assert result.status == 1
    assert "nowhere" in result.stderr


def test_what_vanishes_while_it_is_read_is_no_failure(archive, box):
    """On a server that answers FSTAT and READDIR by path."""
    write(box.root / "d" / "f", SMALL)
    write(box.root / "f", SMALL)
    box.on("READDIR", b"d", first(lambda: shutil.rmtree(box.root / "d"), status(NO_SUCH_FILE)))
    box.on("FSTAT", b"f", first((box.root / "f").unlink, status(NO_SUCH_FILE)))
    result = archive(constants=SIZES)
    assert (result.status, result.failures) == (0, []), result.stderr
    assert "Vanished       : 2" in result.stdout


def test_what_vanishes_after_it_was_listed_is_no_failure(archive, box):
    fill(box)
    write(box.root / "d" / "f", SMALL)
    write(box.root / "other", SMALL)
    for name in FILES:
        box.on("OPEN", name.encode(), first((box.root / name).unlink))
    box.on("OPENDIR", b"d", first(lambda: shutil.rmtree(box.root / "d")))
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert "Vanished       : 3" in result.stdout
    assert {f"vanished ./{name}" for name in FILES} <= set(result.stderr.splitlines())
    assert archive(constants=SIZES).counts == (0, 1, 0)
    assert_all_archived(archive, box)


def test_name_that_no_file_can_have_is_never_opened(archive, box):
    write(box.root / "good", SMALL)
    hostile = [b"../evil", b"x/y", b"/etc/passwd", b"x/..", b""]
    entries = [(name, kind) for name in hostile for kind in (a_file(10), A_FOLDER)]
    box.on("READDIR", b"", names(*entries))
    result = archive(constants=SIZES)
    assert (result.status, result.counts[0]) == (3, 1), result.stderr
    assert set(box.opened) - {b"", b"good"} == set()
    assert box.requests["OPENDIR"] == 1
    assert set(archive.objects()) == {"good"}
    archive.assert_invariant()


def test_name_with_a_nul_byte_fails_alone(archive, box):
    write(box.root / "good", SMALL)
    box.on("READDIR", b"", names((b"a\0b", a_file(10)), (b"c\0d", A_FOLDER)))
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (3, (1, 0, 2)), result.stderr
    assert set(archive.objects()) == {"good"}
    archive.assert_invariant()


def test_dot_and_dotdot_in_a_listing_are_not_entered(archive, box):
    write(box.root / "d" / "good", SMALL)
    box.on("READDIR", b"d", names((b".", A_FOLDER), (b"..", A_FOLDER)))
    result = archive(constants=SIZES)
    assert (result.status, result.counts) == (0, (1, 0, 0)), result.stderr
    assert box.requests["OPENDIR"] == 2
    assert_all_archived(archive, box)


def test_name_that_is_listed_twice_does_no_harm(archive, box):
    fill(box)
    box.on("READDIR", b"", names(*((name.encode(), a_file(10)) for name in FILES)))
    result = archive(constants=SIZES)
    assert result.status in (0, 3)
    archive.assert_invariant()
    assert archive(constants=SIZES).status == 0
    assert_all_archived(archive, box)


# --- Sizes that no disk has -------------------------------------------------


def test_folders_of_any_depth_are_walked(archive_of):
    with FaultyBox(deep_folders(1_100, files_at={0, 500, 600})) as box:
        archive = archive_of(box)
        result = archive()
        assert (result.status, result.counts) == (3, (2, 0, 1)), result.stderr
        assert "1,024" in result.failures[0], "the third one's key is too long"
        assert set(archive.objects()) == {"f", "d/" * 500 + "f"}
        assert box.requests["OPENDIR"] == 1_101


def test_sparse_file_of_any_size_fits_into_the_parts_that_s3_allows(archive_of, s3):
    """S3 refuses the parts, whose size tells enough; then nothing more is read."""
    s3.always("UploadPart", error(403, "AccessDenied"))
    for gib in (100, 400):
        size = gib * 2**30
        with FaultyBox(one_file(b"big", size)) as box:
            archive = archive_of(box, AWS_ENDPOINT_URL=s3.url)
            result = archive(MEMORY_LIMIT="32M")
            assert result.status == 1, result.stderr
            part = s3.sizes["UploadPart", "big", 1]
            assert 5 * MIB <= part <= 5 * 2**30
            assert size <= 10_000 * part
            assert box.handed_out <= 300 * MIB
            archive.assert_invariant()
