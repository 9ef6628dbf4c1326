"""The benchmark itself works; how fast anything is, no test says."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent / "bench.py"


def test_every_program_of_the_benchmark_uploads_exactly_what_it_should(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH), "--small", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout

    about = json.loads(figures.read_text())
    rows = about.pop("results")
    assert set(about) == {"date", "machine", "versions"}
    assert {row["work"] for row in rows} == {"one", "eight", "middle", "small", "unchanged"}
    assert {row["program"] for row in rows} >= {"archive.py", "plain"}
    for row in rows:
        assert row["fault"] == ""
        assert row["files"] > 0
        for figure in ("seconds", "cpu_seconds", "peak_bytes"):
            assert row[figure] > 0
