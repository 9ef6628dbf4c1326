"""Any name that a box can hold is archived, under a key of its own that tells it."""

import os
import re

import asyncssh
import pytest
from asyncssh.sftp import SFTPAttrs, SFTPName
from conftest import OLD, fill, tree
from servers import AsyncSSHBox, OpenSSH

HOSTILE = [
    b"latin-\xe9",
    b"sibling-of-latin",
    b"\xff\xfe\xfd",
    b"half a euro \xe2\x82",
    b"surrogate \xed\xa0\x80",
    b"overlong \xc0\xaf",
    b"new\nline",
    b"FAIL forged: line\n2026-11-20 00:00:00 archived forged (1 B)",
    b"carriage\rreturn",
    b"escape\x1b[2J\x1b]0;title\x07",
    b"tab\there",
    b"delete\x7f",
    b"c1 control \xc2\x9b31m",
    b"back\\slash",
    b"\\x41 \\n \\u0041",
    b"per%cent %s %(name)s %d %41",
    b"{braces} {0} $HOME `id` $(id)",
    b"quote' double\" both'\"",
    b"l" * 255,
    "é".encode() * 127,
    "nfc-é".encode(),
    "nfd-e\u0301".encode(),
    b" leading space",
    b"trailing space ",
    b" ",
    b"...",
    b"..leading",
    b"-rf",
    b"~",
    b"None",
    b"*?[a-z]",
    b"a+b&c=d;e,f:g@h!i#j",
    b'<xml attribute="1"/>]]>',
    "emoji \U0001f4be".encode(),
    "bidi \u202egnp.exe".encode(),
    "separators \u2028 \u2029 \u0085".encode(),
    "not characters \ufffe\uffff".encode(),
    "\u201b0A is how we write a newline".encode(),
    "\u201b is harmless alone".encode(),
    "\u201bE2\u201b80\u201b9B0A".encode(),
    "\u201b\n0A".encode(),
    b"\xe2\x80\x9b\xe9A0",
]


# For what does not depend on the server.
ONE_SERVER = pytest.mark.parametrize("box", [OpenSSH], indirect=True, ids=["openssh"])


def bytes_of(key):
    """The name that a key was made from: the inverse that a restore needs."""
    return re.sub(
        b"\xe2\x80\x9b([0-9A-F]{2})",
        lambda match: bytes.fromhex(match[1].decode()),
        key.encode(),
    )


def test_every_name_gets_a_key_of_its_own_that_gives_the_name_back(archive, box):
    files = {name: b"content of " + name for name in HOSTILE}
    files.update({b"folder " + name[:200] + b"/file": name for name in HOSTILE})
    # Hidden entries are not what this is about, so they are included.
    fill(box.root, files)

    result = archive(INCLUDE_HIDDEN="true")

    assert result.status == 0, result.stderr
    objects = archive.objects()
    assert {bytes_of(key): (size, crc) for key, (size, crc, _) in objects.items()} == tree(
        box.root
    )
    assert len(archive.rows()) == len(objects) == len(files)
    archive.assert_invariant()

    again = archive(INCLUDE_HIDDEN="true")

    assert (again.status, again.counts) == (0, (0, len(files), 0))


def test_keys_are_the_names_and_only_what_s3_cannot_carry_is_escaped(archive_of, asyncssh_box):
    keys = {
        b"plain \xc3\xa9 %20+\\.txt": "plain é %20+\\.txt",
        b"nfd-e\xcc\x81": "nfd-e\u0301",
        b"latin-\xe9": "latin-\u201bE9",
        b"new\nline": "new\u201b0Aline",
        "\u201b0A".encode(): "\u201bE2\u201b80\u201b9B0A",
        "\u201b0a \u201bG0".encode(): "\u201b0a \u201bG0",
    }
    fill(asyncssh_box.root, {name: name for name in keys})
    archive = archive_of(asyncssh_box)

    archive()

    assert archive.contents() == {key: name for name, key in keys.items()}


@ONE_SERVER
def test_each_name_is_one_line_of_output_whatever_is_in_it(archive, box):
    """What control characters are in the output, the fixture looks at itself."""
    fill(box.root, dict.fromkeys(HOSTILE, b"x"))

    result = archive(INCLUDE_HIDDEN="true")

    archived = re.findall(r"^.*\barchived .*$", result.stderr, re.MULTILINE)
    assert len(archived) == len(HOSTILE)
    for text in (result.stderr, result.log):
        assert not re.search("^(FAIL forged|2026-11-20 00:00:00)", text, re.MULTILINE)
        assert len(text.splitlines()) == len(text.split("\n")) - 1


@ONE_SERVER
def test_a_failure_names_its_file_on_one_line(archive, box):
    name = b"bad\x1b[2J\nname\xe9"
    fill(box.root, {name: b"x", b"good": b"x"})
    os.chmod(os.fsencode(box.root) + b"/" + name, 0)

    result = archive()

    assert result.status == 3
    [failure] = result.failures
    assert failure.startswith(r"./bad\x1b[2J\nname\xe9: ")


@ONE_SERVER
def test_names_that_differ_only_in_normal_form_are_two_objects(archive, box):
    fill(box.root, {"é".encode(): b"composed", b"e\xcc\x81": b"decomposed"})

    archive()

    assert archive.contents() == {"\u00e9": b"composed", "e\u0301": b"decomposed"}


# --- Keys: prefix and REMOTE_PATH ---


def test_remote_path_is_removed_from_keys_once_and_only_in_front(archive, box):
    fill(
        box.root,
        {
            "backup/www/1.tgz": b"1",
            "backup/www/backup1.tgz": b"2",
            "backup/backup/www/1.tgz": b"3",
            "backup2/x": b"outside",
        },
    )

    result = archive(REMOTE_PATH="backup")

    assert result.status == 0
    assert archive.contents() == {
        "www/1.tgz": b"1",
        "www/backup1.tgz": b"2",
        "backup/www/1.tgz": b"3",
    }
    assert set(archive.rows()) == {
        "backup/www/1.tgz",
        "backup/www/backup1.tgz",
        "backup/backup/www/1.tgz",
    }


@pytest.mark.parametrize("remote_path", ["backup/", "./backup//"])
def test_slashes_around_remote_path_do_not_reach_the_keys(
    archive_of, asyncssh_box, remote_path
):
    fill(asyncssh_box.root, {"backup/a/b": b"x"})
    archive = archive_of(asyncssh_box)

    assert archive(REMOTE_PATH=remote_path).status == 0

    assert set(archive.objects()) == {"a/b"}


@pytest.mark.parametrize("remote_path, key, path", [("/", "a/b", "/a/b"), ("/a", "b", "/a/b")])
def test_an_absolute_remote_path_is_no_part_of_the_keys(
    archive_of, asyncssh_box, remote_path, key, path
):
    fill(asyncssh_box.root, {"a/b": b"x"})
    archive = archive_of(asyncssh_box)

    assert archive(REMOTE_PATH=remote_path).status == 0

    assert set(archive.objects()) == {key}
    assert set(archive.rows()) == {path}


@ONE_SERVER
def test_without_a_prefix_keys_begin_with_the_path(archive, box):
    fill(box.root, {"file": b"x"})

    for prefix in (None, ""):
        archive(S3_PREFIX=prefix)

    assert set(archive.objects()) == {"file"}


def test_a_prefix_is_used_exactly_as_given_and_warned_of_without_a_slash(
    archive_of, asyncssh_box
):
    fill(asyncssh_box.root, {"file": b"x"})
    glued = archive_of(asyncssh_box, S3_PREFIX="box")
    whole = archive_of(asyncssh_box, S3_PREFIX="boxes/mine/")

    warned = glued()
    silent = whole()

    assert warned.status == silent.status == 0
    assert "S3_PREFIX" in warned.stderr and "slash" in warned.stderr
    assert "S3_PREFIX" not in silent.stderr
    assert set(glued.objects()) == {"boxfile", "boxes/mine/file"}


# --- Keys that cannot be ---


@ONE_SERVER
def test_a_key_of_1024_bytes_is_archived_and_a_longer_one_fails_by_name(archive, box):
    folder = "/".join("é" * 50 for _ in range(10))  # 1,009 bytes
    longest = folder + "/" + "x" * 14
    fill(box.root, {longest: b"x", longest + "y": b"x", "good": b"x"})
    assert len(longest.encode()) == 1024

    result = archive()

    assert result.status == 3
    assert set(archive.objects()) == {longest, "good"}
    [failure] = result.failures
    assert failure.startswith(f"./{longest}y: ")
    archive.assert_invariant()


def test_a_name_that_would_leave_its_folder_fails_and_the_rest_is_archived(archive_of):
    names = [b"../evil", b"a/../../evil", b"folder/evil", b""]

    class Server(asyncssh.SFTPServer):
        async def scandir(self, path):
            if path in (b".", b"/", b""):
                attributes = SFTPAttrs(permissions=0o100644, size=1, mtime=OLD, atime=0)
                for name in names:
                    yield SFTPName(name, attrs=attributes)
            async for entry in super().scandir(path):
                yield entry

    with AsyncSSHBox(sftp_server=Server) as box:
        fill(box.root, {"good": b"x", "folder/evil": b"x"})
        archive = archive_of(box, REMOTE_PATH=".")

        result = archive()

        assert result.status == 3
        assert set(archive.objects()) == {"good", "folder/evil"}
        assert len(result.failures) == len(names)
        for name in names:
            assert [failure for failure in result.failures if name.decode() in failure]
        archive.assert_invariant()
