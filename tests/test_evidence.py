"""evidence: scripts that measure a published claim, their jobs side by side."""

import os
from pathlib import Path

import pytest

from lilliput import evidence


@pytest.mark.slow
def test_jobs_of_a_script_run_side_by_side_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "squares.py").write_text(
        "import os\n"
        "from functools import cache\n"
        "from lilliput.evidence import each\n"
        "@cache\n"
        "def offset():\n"
        "    return 10\n"
        "def one(job):\n"
        "    return offset() + job**2, os.getpid()\n"
        "def measure(quick):\n"
        "    return {'claim': 'c', 'baseline': 'b', 'rows': each(one, [1, 2, 3])}\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = evidence.load("squares").measure(False)["rows"]
    assert [value for value, _ in rows] == [11, 14, 19] and os.getpid() not in {pid for _, pid in rows}
