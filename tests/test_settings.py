"""Settings, the command line, and what a person sees of a run."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
from conftest import MIB, PROGRAM, fill

ROOT = PROGRAM.parent
SETTINGS = {
    "HETZNER_HOST",
    "HETZNER_USER",
    "HETZNER_PORT",
    "HETZNER_PASSWORD",
    "HETZNER_KEY_FILE",
    "HETZNER_KEY_PASSPHRASE",
    "HETZNER_KNOWN_HOSTS",
    "REMOTE_PATH",
    "S3_BUCKET",
    "S3_PREFIX",
    "AWS_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "STORAGE_CLASS",
    "STATE_DB",
    "LOG_FILE",
    "EXCLUDE_PATHS",
    "INCLUDE_HIDDEN",
    "TRANSFERS",
    "MEMORY_LIMIT",
    "BANDWIDTH_LIMIT",
    "MAX_RUNTIME",
}


@pytest.fixture
def box(asyncssh_box):
    fill(asyncssh_box.root, {"file": b"x"})
    return asyncssh_box


def env_file(path, settings, mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    path.chmod(mode)
    return path


# --- Where settings come from ---


@pytest.mark.as_users_do
def test_settings_come_from_the_env_file_that_is_named(archive, tmp_path):
    file = env_file(tmp_path / "my.env", archive.settings)
    unset = dict.fromkeys(archive.settings)

    result = archive("--env-file", file, **unset)

    assert result.counts == (1, 0, 0)
    assert result.stderr.count("\n") == 1  # the archived file, and no warning


@pytest.mark.as_users_do
def test_the_environment_comes_before_the_env_file(archive, tmp_path):
    settings = {**archive.settings, "HETZNER_HOST": "no-such-box.invalid"}
    file = env_file(tmp_path / "my.env", settings)

    assert archive("--env-file", file).status == 0


@pytest.mark.parametrize("in_file, in_environment", [("", "DEAD"), ("DEAD", "")])
def test_the_proxy_of_the_environment_comes_before_that_of_the_env_file(
    archive, in_file, in_environment
):
    dead = "http://127.0.0.1:9"
    archive.env_file.write_text(f"HTTP_PROXY={in_file.replace('DEAD', dead)}\n")
    result = archive("status", HTTP_PROXY=in_environment.replace("DEAD", dead))
    assert (f'proxy URL: "{dead}"' in result.stderr) == bool(in_environment)


@pytest.fixture
def installed(archive, tmp_path):
    """Runs a copy of the program in a folder of its own, with no --env-file."""
    home = tmp_path / "opt" / "storage" / "archive"
    home.mkdir(parents=True)
    shutil.copy(PROGRAM, home)

    def run(cwd=tmp_path, **settings):
        environment = archive.environment(STATE_DB=None, LOG_FILE=None, **settings)
        return subprocess.run(
            [sys.executable, home / "archive.py"],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    run.folder = home
    run.unset = dict.fromkeys(archive.settings)
    return run


def test_the_env_file_beside_the_program_is_found_from_any_folder(archive, installed, tmp_path):
    env_file(installed.folder / ".env", archive.settings)
    elsewhere = tmp_path / "elsewhere"
    env_file(elsewhere / ".env", {"HETZNER_HOST": "wrong.invalid"})

    first = installed(cwd=elsewhere, **installed.unset)
    second = installed(cwd="/", **installed.unset)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "Skipped files  : 1" in second.stdout
    assert (installed.folder / "archive_state.db").exists()
    assert (installed.folder / "archive.log").exists()
    assert os.listdir(elsewhere) == [".env"]


def test_no_env_file_is_looked_for_in_the_folders_above(archive, installed):
    env_file(installed.folder.parent / ".env", archive.settings)

    result = installed(cwd=installed.folder, **installed.unset)

    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "see .env.example" in result.stderr
    assert f"No such file or directory: '{installed.folder}/.env'" in result.stderr


def test_value_in_quotes_may_have_several_lines(archive, box):
    fill(box.root, {"file": b"x"})
    archive.env_file.write_text('S3_EXTRA_ARGS=\'{\n"ContentLanguage": "de"}\'\nTRANSFERS=2\n')
    assert archive().counts == (1, 0, 0)
    bucket = archive.bucket
    answer = bucket.client.head_object(Bucket=bucket.name, Key="file")
    assert answer["ContentLanguage"] == "de"


def test_env_file_that_is_no_text_is_named(archive, tmp_path):
    path = tmp_path / "latin-1.env"
    path.write_bytes(b"HETZNER_PASSWORD=\xe4\n")
    result = archive("--env-file", path)
    assert result.status == 2
    assert f"cannot read the env file {path}" in result.stderr


@pytest.mark.as_users_do
def test_relative_files_are_relative_to_the_env_file(archive, tmp_path):
    """From another working directory everything would be paid for a second time."""
    settings = {**archive.settings, "STATE_DB": "state/my.db", "LOG_FILE": "my.log"}
    file = env_file(tmp_path / "config" / "my.env", settings)
    (file.parent / "state").mkdir()
    unset = dict.fromkeys(settings)

    first = archive("--env-file", file, **unset)
    archive.folder = tmp_path / "config" / "state"
    second = archive("--env-file", file, **unset)

    assert (first.counts, second.counts) == ((1, 0, 0), (0, 1, 0))
    assert (file.parent / "state" / "my.db").exists()
    assert (file.parent / "my.log").exists()


def test_env_file_behind_a_link_has_its_folder_where_it_was_named(archive, tmp_path):
    """Secrets are links, often into a file system that is gone after a reboot."""
    settings = {**archive.settings, "STATE_DB": "my.db"}
    file = env_file(tmp_path / "secrets" / "archive.env", settings)
    link = tmp_path / "home" / ".env"
    link.parent.mkdir()
    link.symlink_to(file)

    result = archive("--env-file", link, **dict.fromkeys(settings))

    assert result.status == 0, result.stderr
    assert (link.parent / "my.db").exists()
    assert os.listdir(file.parent) == [file.name]


def test_values_are_taken_literally(archive, box, tmp_path):
    box.password = box.secrets[0] = "a${HOME}b$c #d'e\\n"
    settings = {**archive.settings, "HETZNER_PASSWORD": f'"{box.password}"'}
    settings["HETZNER_PASSWORD"] = '"' + box.password.replace("\\", "\\\\") + '"'
    file = env_file(tmp_path / "my.env", settings)

    assert archive("--env-file", file, HETZNER_PASSWORD=None).counts == (1, 0, 0)


@pytest.mark.as_users_do
def test_any_aws_setting_of_the_env_file_reaches_boto3(archive, tmp_path):
    keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"]
    key_id, secret, region = (archive.settings.pop(name) for name in keys)
    credentials = tmp_path / "credentials"
    credentials.write_text(
        f"[box]\naws_access_key_id={key_id}\naws_secret_access_key={secret}\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[profile box]\nregion={region}\n")
    settings = {
        "AWS_SHARED_CREDENTIALS_FILE": credentials,
        "AWS_CONFIG_FILE": config,
        "AWS_PROFILE": "box",
    }
    file = env_file(tmp_path / "my.env", settings)

    result = archive("--env-file", file)

    assert result.counts == (1, 0, 0), result.stderr


# --- Faults in them ---


@pytest.mark.as_users_do
def test_all_faults_are_told_in_one_message_with_status_2(archive, box):
    faults = {
        "HETZNER_HOST": None,
        "HETZNER_PORT": "twenty-three",
        "HETZNER_PASWORD": "misspelt",
        "S3_BUCKET": None,
        "STORAGE_CLASS": "ICE",
        "TRANSFERS": "0",
        "MEMORY_LIMIT": "plenty",
        "BANDWIDTH_LIMIT": "-1",
        "MAX_RUNTIME": "soon",
        "INCLUDE_HIDDEN": "perhaps",
        "AWS_ENDPOINT_URL": "http://s3.example.com",
    }

    result = archive(**faults)

    assert result.status == 2
    assert [name for name in faults if name not in result.stderr] == []
    assert "HETZNER_PASSWORD" in result.stderr  # what was meant
    for value in ("twenty-three", "ICE", "plenty", "soon", "perhaps"):
        assert value in result.stderr
    assert result.stdout == ""
    assert not archive.state_db.exists()
    assert box.connections == 0


BAD_VALUES = [
    {
        "HETZNER_HOST": "",
        "HETZNER_PORT": "0",
        "HETZNER_USER": "",
        "S3_BUCKET": "s3://bucket",
        "S3_PREFIX": "a/../b/",
        "STORAGE_CLASS": "deep archive",
        "TRANSFERS": "many",
        "MEMORY_LIMIT": "0",
        "BANDWIDTH_LIMIT": "fast",
        "MAX_RUNTIME": "6 parsecs",
        "AWS_ENDPOINT_URL": "ftp://127.0.0.1",
    },
    {
        "HETZNER_HOST": "box.example.com:23",
        "HETZNER_USER": "u1@box.example.com",
        "HETZNER_PORT": "65536",
        "S3_BUCKET": "bucket/folder",
        "S3_PREFIX": "s3://bucket/folder/",
        "MAX_RUNTIME": "10\u017f",  # a long s
        "AWS_ENDPOINT_URL": "http://127.0.0.1.example.com",
        "MAX_COST": "5 USD",
        "MAX_CHANGED": "101",
        "SMALL_FILES_BELOW": "tiny",
        "SMALL_FILES_CLASS": "WARM",
        "S3_EXTRA_ARGS": "Tagging",
        "PRICES": "egress",
    },
    {"SMALL_FILES_BELOW": "tiny", "SMALL_FILES_CLASS": "STANDARD"},
    {"SMALL_FILES_BELOW": "8K", "SMALL_FILES_CLASS": "WARM"},
    {"HETZNER_USER": "u1\udcff", "S3_PREFIX": "s3:bucket/folder/"},
    {"S3_PREFIX": "https://bucket.s3.amazonaws.com/folder/", "TRANSFERS": "\u0663"},
]


BAD_IDS = ["one of each", "others", "a bad limit", "a bad class", "no UTF-8", "a URL"]


@pytest.mark.parametrize("values", BAD_VALUES, ids=BAD_IDS)
def test_a_bad_value_ends_with_status_2_and_the_name_of_its_setting(archive, values):
    result = archive(**values)

    assert result.status == 2
    told = re.findall(r"^error: (\w+)", result.stderr, re.MULTILINE)
    good = {"STANDARD", "8K"}
    bad = [name for name, value in values.items() if value not in good]
    assert sorted(told) == sorted(bad), result.stderr


PASTED = """-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
vjVgElzDQBvOpPMRwniwAAAACGJveEBob21lAQIDBAU=
-----END OPENSSH PRIVATE KEY-----
"""


@pytest.mark.parametrize("name", ["HETZNER_KEY_FILE", "HETZNER_KNOWN_HOSTS", "HETZNER_HOST"])
@pytest.mark.parametrize("quote", ["'", "", None], ids=["quoted", "bare", "environment"])
def test_key_that_was_pasted_into_a_setting_is_not_shown(archive, name, quote):
    """Without quotes, its second line looks like another setting."""
    settings = {}
    if quote is None:
        settings[name] = PASTED
    else:
        archive.settings.pop(name, None)
        archive.env_file.write_text(f"{name}={quote}{PASTED}{quote}\n")

    result = archive(**settings)

    assert result.status == 2
    assert name in result.stderr
    assert "b3Blb" not in result.stderr and "vjVgE" not in result.stderr


def test_second_line_of_a_secret_is_not_shown(archive):
    archive.env_file.write_text("AWS_SESSION_TOKEN=one+part\nthe/other+part==\n")
    result = archive()
    assert result.status == 2
    assert "line 2: expected NAME=value" in result.stderr
    assert "other" not in result.stderr


@pytest.mark.parametrize(
    "proxy", ["socks5://user:%s@127.0.0.1:1", "http://user:%s@127.0.0.1:1"]
)
def test_password_of_a_proxy_is_not_shown(archive, proxy):
    password = "secret+of the:proxy"
    result = archive("status", HTTP_PROXY=proxy % password)
    assert "127.0.0.1:1" in result.stderr
    assert password not in result.stderr


def test_unknown_variable_is_said_to_be_in_the_environment(archive):
    result = archive(HETZNER_PORTS="23")
    assert result.status == 2
    message = "HETZNER_PORTS: unknown setting in the environment; did you mean HETZNER_PORT?"
    assert message in result.stderr


NEARLY_BOTO3S = ["AWS_ENDPOINT", "AWS_SECRET_KEY", "AWS_REGION_NAME"]
NEARLY_BOTO3S += ["AWS_ACCESS_KEY", "AWS_S3_ENDPOINT_URL"]  # other programs do have these


@pytest.mark.parametrize("name", NEARLY_BOTO3S)
def test_name_in_the_env_file_that_looks_like_one_of_boto3s_is_a_fault(archive, name):
    """In the environment, it may be another program's."""
    archive.env_file.write_text(f"{name}=value\n")
    result = archive()
    assert result.status == 2
    assert f"{name}: unknown setting; did you mean AWS_" in result.stderr
    archive.env_file.write_text("")
    assert archive(**{name: "value"}).status == 0


def test_names_of_boto3s_own_and_paths_with_odd_names_are_no_faults(archive):
    name = "AWS_ENDPOINT_URL_APPLICATION_DISCOVERY_SERVICE"
    archive.env_file.write_text(
        f"{name}=https://example.com\nAWS_STS_REGIONAL_ENDPOINTS=legacy\n"
    )
    result = archive(EXCLUDE_PATHS="PRIVATE KEYS")
    assert result.status == 0, result.stderr


GOOD_VALUES = [
    {"MAX_RUNTIME": "999999d"},
    {
        "MEMORY_LIMIT": "256M",
        "BANDWIDTH_LIMIT": "20M",
        "MAX_RUNTIME": "90",
        "INCLUDE_HIDDEN": "True",
        "STORAGE_CLASS": "GLACIER",
        "LOG_FILE": "",
        "EXCLUDE_PATHS": " , ",
    },
    {"MEMORY_LIMIT": "1GiB", "MAX_RUNTIME": "6h", "INCLUDE_HIDDEN": "no"},
    {
        "MAX_COST": " 0.5 ",
        "MAX_CHANGED": "100",
        "SMALL_FILES_BELOW": "1",
        "SMALL_FILES_CLASS": "STANDARD",
        "S3_EXTRA_ARGS": "Tagging=a=b, ,",
        "PRICES": "GLACIER_IR.put = 0.02",
    },
    dict.fromkeys(("MAX_COST", "MAX_CHANGED", "S3_EXTRA_ARGS", "SMALL_FILES_BELOW"), ""),
]
GOOD_IDS = ["endless", "one of each", "others", "guards", "empty"]


@pytest.mark.parametrize("values", GOOD_VALUES, ids=GOOD_IDS)
def test_a_good_value_is_taken_without_a_word(archive, values):
    result = archive(**values)

    assert result.status == 0, result.stderr
    assert [setting for setting in values if setting in result.stderr] == []
    [(_, _, storage_class)] = archive.objects().values()
    assert storage_class == values.get("STORAGE_CLASS", "DEEP_ARCHIVE")


def test_an_env_file_that_is_missing_ends_with_status_2_and_its_name(archive):
    result = archive("--env-file", "/nowhere/my.env")

    assert result.status == 2
    assert "/nowhere/my.env" in result.stderr


def test_a_misspelt_setting_in_the_env_file_is_an_error_with_a_suggestion(archive, tmp_path):
    file = env_file(tmp_path / "my.env", {"S3_BUKET": "x", "MY_OWN": "x"})

    result = archive("--env-file", file)

    assert result.status == 2
    assert "S3_BUKET" in result.stderr and "S3_BUCKET" in result.stderr
    assert "MY_OWN: unknown setting" in result.stderr


def test_a_setting_in_other_letters_is_misspelt(archive, tmp_path):
    names = ("storage_class", "Hetzner_Port", "exclude_paths")
    file = env_file(tmp_path / "env", dict.fromkeys(names, 1))
    result = archive("--env-file", file)
    assert result.status == 2
    for name in names:
        assert re.search(rf"\b{name}: .*did you mean {name.upper()}\?", result.stderr)


def test_an_env_file_that_others_can_read_is_worth_a_warning(archive, tmp_path):
    file = env_file(tmp_path / "my box.env", archive.settings, mode=0o644)

    result = archive("--env-file", file)

    assert result.status == 0
    assert f"{file} can be read by others: chmod 600 '{file}'\n" in result.stderr


# --- The command line ---


@pytest.mark.as_users_do
def test_help_names_every_command_option_and_exit_status(archive):
    result = archive("--help")

    assert result.status == 0
    for status in (0, 1, 2, 3, 11, 75, 128):
        assert re.search(rf"^ *{status}\b", result.stdout, re.MULTILINE), status
    for command in ("run", "plan", "status", "verify", "restore", "check"):
        assert re.search(rf"^ +{command} ", result.stdout, re.MULTILINE), command
    for option in ("-v, --verbose", "-q, --quiet", "--env-file FILE"):
        assert option in result.stdout, option
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("command", "option"), [("run", "--new-source"), ("verify", "--repair"), ("plan", "--json")]
)
def test_help_of_a_command_explains_its_options(archive, command, option):
    result = archive(command, "--help")

    assert result.status == 0
    assert re.search(rf"^ +{option} +\w+", result.stdout, re.MULTILINE), result.stdout


@pytest.mark.parametrize("arguments", [["rum"], ["--new-state"], ["-v", "-q"]])
def test_an_unknown_word_on_the_command_line_ends_with_status_2(archive, arguments):
    assert archive(*arguments).status == 2
    assert archive.bucket.list() == []


@pytest.mark.as_users_do
@pytest.mark.parametrize("arguments", [["-v", "run"], ["run", "-v"]])
def test_options_stand_before_the_command_or_after_it(archive, arguments):
    archive()

    found = archive(*arguments, "--env-file", archive.env_file)

    assert found.counts == (0, 1, 0)
    assert "unchanged ./file" in found.stderr


def test_run_is_the_default_command(archive):
    assert archive("run").counts == (1, 0, 0)
    assert archive().counts == (0, 1, 0)


def test_importing_the_program_does_nothing(tmp_path):
    code = "import logging, signal; before = signal.getsignal(15); import archive;"
    code += "assert not logging.root.handlers and signal.getsignal(15) == before"

    result = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert os.listdir(tmp_path) == []


# --- What a person sees ---


def test_a_python_without_the_packages_is_told_of_in_one_line(tmp_path):
    """The first mistake of most: not the virtual environment's."""
    bare = [sys.executable, "-I", "-S", PROGRAM]
    ended = subprocess.run(
        bare, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: No module named 'boto3': start it as ")
    assert ended.stderr.count("\n") == 1


def test_there_is_a_line_for_each_archived_file_and_none_for_a_skipped_one(archive):
    first = archive()
    second = archive()

    assert re.search(r"\barchived \./file \(1 bytes?\)", first.stderr)
    assert "file" not in second.stderr
    assert "unchanged ./file" in archive("-v").stderr


def test_quiet_leaves_failures_and_the_summary(archive, box):
    os.mkdir(box.root / "closed", 0)

    result = archive("--quiet")

    assert result.status == 3
    [line] = result.stderr.splitlines()
    assert line.startswith("FAIL ./closed: ")
    assert result.counts == (1, 0, 1)


@pytest.mark.as_users_do
def test_the_log_file_holds_all_lines_and_the_summary_of_each_run(archive):
    archive()
    result = archive("-q")

    assert result.log.count("==== SUMMARY ====") == 2
    assert result.log.count("archived ./file") == 1
    assert result.log.count("Uploaded files : 1") == 1
    for path in (archive.log_file, archive.state_db):
        assert path.stat().st_mode & 0o002 == 0, "it is no one's business but the user's"


def test_log_file_that_cannot_be_renamed_grows(archive):
    """As one that a container has mounted by itself."""
    archive.log_file.write_bytes(b"x" * (10 << 20))
    busy = "import os\ndef rename(*_):\n    raise OSError(16, 'busy')\nos.rename = rename\n"
    for runs in (1, 2):
        archive(before=busy)
        assert archive.log_file.read_text().count("SUMMARY") == runs


def test_without_a_log_file_none_is_written(archive):
    archive(LOG_FILE="")

    assert {path.name for path in archive.folder.iterdir()} <= {
        "home",
        "empty.env",
        archive.state_db.name,
        archive.state_db.name + ".lock",
    }


def test_a_log_file_that_cannot_be_written_ends_the_run_with_its_path(archive):
    result = archive(LOG_FILE="/proc/nowhere/archive.log")

    assert result.status in (1, 2)
    assert "/proc/nowhere/archive.log" in result.stderr
    assert archive.bucket.list() == []


def test_there_are_no_bars_where_there_is_no_terminal(archive, box):
    fill(box.root, {"large": 17 * MIB})

    result = archive()

    assert "\r" not in result.output and "%|" not in result.output


@pytest.mark.parametrize("columns, term", [(80, "xterm"), (1, "xterm"), (80, "dumb")])
def test_a_terminal_of_any_kind_does_no_harm(archive, box, columns, term):
    fill(box.root, {"large": 17 * MIB, b"name \x1b[2J\n": b"x"})
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "--env-file", archive.env_file],
        env=archive.environment(TERM=term, COLUMNS=columns),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    archive.running.append(process)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # what Linux says when the last writer has closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)

    assert process.wait(60) == 0, shown
    assert b"Traceback" not in shown
    assert b"\x1b[2J" not in shown
    assert b"Uploaded files : 3" in shown
    archive.assert_invariant()


@pytest.mark.as_users_do
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_reads_any_more_is_no_traceback(archive, box, stream):
    fill(box.root, {str(n): b"x" for n in range(20)})
    running = archive.start()
    getattr(running.process, stream).close()
    other = "stderr" if stream == "stdout" else "stdout"

    text = getattr(running.process, other).read()

    running.process.wait(60)
    assert "Traceback" not in text and "Exception ignored" not in text
    assert "BrokenPipe" not in text
    assert len(archive.rows()) == 21
    archive.assert_invariant()


# --- The repository tells the same everywhere ---


def test_the_inline_metadata_and_requirements_txt_name_the_same_packages():
    block = re.search(r"^# /// script\n(.*?)^# ///$", PROGRAM.read_text(), re.M | re.S)
    inline = re.findall(r'"([^"]+)"', block[1].partition("dependencies")[2])
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line.strip() for line in lines if line and not line.startswith("#")]

    assert sorted(inline) == sorted(required)
    assert all(">=" in line and "<" in line for line in required)


def test_the_example_env_file_names_every_setting():
    text = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"^#? ?([A-Z0-9_]+)=", text, re.MULTILINE))

    assert SETTINGS - named == set()


@pytest.mark.as_users_do
def test_the_example_env_file_lacks_only_what_only_the_user_knows(archive, tmp_path):
    file = tmp_path / "example.env"
    shutil.copy(ROOT / ".env.example", file)
    file.chmod(0o600)

    result = archive("--env-file", file)

    assert result.status == 0, result.stderr
    assert result.counts == (1, 0, 0)


@pytest.mark.parametrize("line", ["S3_PREFIX my-box/", "S3_PREFIX", "S3_PREFIX='my-box/"])
def test_line_of_the_env_file_that_says_nothing_is_a_fault(archive, line):
    archive.env_file.write_text(f"TRANSFERS=4\n\n{line}\nHETZNER_PORT=23\n")
    result = archive()
    assert result.status == 2
    assert f"{archive.env_file}, line 3: " in result.stderr
    assert archive.box.connections == 0


def test_password_in_a_setting_is_refused_and_not_shown(archive):
    values = {
        "AWS_ENDPOINT_URL": "https://me:hush@s3.example",
        "S3_BUCKET": "s3://me:hush@bucket/x",
    }
    result = archive(**values)
    assert result.status == 2
    assert [setting for setting in values if setting not in result.stderr] == []
    assert "hush" not in result.output + result.log


def test_password_between_quotes_in_another_setting_is_not_shown(archive):
    result = archive(HETZNER_PASSWORD="hush'hush", TRANSFERS='password: "hush\'hush"')
    assert result.status == 2 and "TRANSFERS" in result.stderr
    assert "hush" not in result.output


def test_endpoint_that_boto3_refuses_is_told(archive):
    result = archive(AWS_ENDPOINT_URL="https://exam_ple.org")
    assert result.status == 1
    assert "AWS_ENDPOINT_URL" in result.stderr
    assert "unexpected" not in result.stderr


def test_state_that_is_a_link_to_itself_is_a_fault(archive, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    result = archive(STATE_DB=tmp_path / "loop")
    assert result.status in (1, 2)  # not every Python finds it as early
    assert "loop" in result.stderr
    assert "Traceback" not in result.stderr


def test_empty_aws_setting_counts_as_not_set(archive):
    names = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CA_BUNDLE")
    assert archive(**dict.fromkeys(names, "")).status == 0


def test_setting_of_another_program_about_secrets_is_no_secret(archive):
    """Lambda's extension for secrets has such variables, whose values are everyday words."""
    name = "AWS_PARAMETERS_SECRETS_EXTENSION_"
    result = archive(**{f"{name}MAX_CONNECTIONS": "3", f"{name}LOG_LEVEL": "files"})
    assert result.counts == (1, 0, 0)
    assert "***" not in result.output + result.log


def test_text_that_the_terminal_cannot_show_is_escaped(archive, box):
    fill(box.root, {"\u0444/a": b"1"})
    result = archive("check", REMOTE_PATH="\u0444", PYTHONIOENCODING="ascii")
    assert result.status == 0, result.stderr
    assert "\\u0444" in result.stdout


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_cannot_be_written_leaves_the_status(archive, stream):
    output = os.open("/dev/full", os.O_WRONLY)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: output}
    command = [sys.executable, PROGRAM, "--env-file", archive.env_file]
    ended = subprocess.run(
        command, env=archive.environment(), timeout=60, check=False, text=True, **streams
    )
    os.close(output)
    assert ended.returncode == 0
    assert "Traceback" not in (ended.stderr or "")


def test_json_is_json_whatever_the_secrets_are(archive):
    result = archive("plan", "--json", HETZNER_KEY_PASSPHRASE="files")
    assert json.loads(result.stdout)["new_files"]["files"] >= 0


@pytest.mark.as_users_do
def test_ctrl_c_before_anything_was_done_is_no_traceback(archive):
    pressed = (
        "import boto3, os, signal\n"
        "real = boto3.Session\n"
        "def session(**settings):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(**settings)\n"
        "boto3.Session = session"
    )
    result = archive.start(before=pressed).wait()
    assert (result.status, result.stderr) == (130, "")


@pytest.mark.as_users_do
@pytest.mark.parametrize("message", [1, 2])
def test_signal_at_a_message_about_settings_is_no_traceback(archive, message):
    stopped = (
        "import itertools, logging, os, signal\n"
        "real, number = logging.StreamHandler.emit, itertools.count(1)\n"
        "def emit(self, record):\n"
        "    real(self, record)\n"
        f"    if next(number) == {message}:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "logging.StreamHandler.emit = emit"
    )
    faults = {"TRANSFERS": "none", "MAX_COST": "much"}
    result = archive.start("status", "--json", before=stopped, **faults).wait()
    assert (result.status, json.loads(result.stdout)) == (143, {"exit_status": 143})
