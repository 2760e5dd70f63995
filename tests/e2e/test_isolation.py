"""Nothing of a user's folder is imported in place of a library, and its names may be in any script."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from wallaroo.model.checkpoint import TINY

ROOT = Path(__file__).parents[2]
MODULES = (
    "model.py",
    "PIL.py",
    "jobs/__init__.py",
    "workflows/__init__.py",
    "actors/__init__.py",
)
HOSTILE = """import pathlib
pathlib.Path(__file__ + ".imported").touch()
raise ImportError(__file__)
"""
ROWS = [
    {"id": "猫/一", "prompt": "红色圆形", "主题": "动物"},
    {"id": "狗", "prompt": "蓝色方块", "主题": "é"},
]

SCRIPT = """
import ray
from wallaroo import edit

ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
rows = ray.data.read_parquet("编辑.parquet")
made = edit(rows, model="模型", slots=2).take_all()
print(sorted((row["id"], row["status"], row["in_主题"]) for row in made))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a manifest, a model, and modules that leave a mark when they are imported."""
    folder = tmp_path_factory.mktemp("里") / "中文 目录"
    for name in MODULES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(HOSTILE)
    (folder / "提示.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    shutil.copytree(TINY, folder / "模型")
    return folder


def ended(folder, *command, **variables):
    """Output of a command in the folder that ends with 0 and imports nothing from there."""
    # Other tests put this checkout on the path of workers.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(folder.rglob("*.imported"))
    return done.stdout


@pytest.fixture(scope="module")
def generated(folder):
    """The output of the installed command, started in the folder."""
    command = Path(sys.executable).with_name("wallaroo")
    # In a script's folder these would break Python or Ray itself, before Wallaroo is imported.
    more = [
        folder / name for name in ("numpy.py", "json.py", "ray.py", "sitecustomize.py", "yaml/__init__.py")
    ]
    for module in more:
        module.parent.mkdir(exist_ok=True)
        module.write_text(HOSTILE)
    ended(folder, command, "generate", "提示.jsonl", "输出", "--model", "模型", "--slots", "2", LC_ALL="C")
    for module in more:
        module.unlink()
    return folder / "输出"


def test_the_command_generates_with_names_in_any_script(generated):
    rows = pq.read_table(generated / "data").to_pylist()
    assert [(row["id"], row["status"], row["主题"]) for row in rows] == [
        ("猫/一", "ok", "动物"),
        ("狗", "ok", "é"),
    ]


def test_a_script_with_modules_beside_it_edits(folder, generated):
    rows = pq.read_table(generated / "data", columns=["id", "image", "主题"])
    table = rows.rename_columns(["id", "image", "in_主题"])
    table = table.append_column("prompt", [["把背景变成黑色", "把背景变成黑色"]])
    pq.write_table(table, folder / "编辑.parquet")
    (folder / "改.py").write_text(SCRIPT, encoding="utf-8")
    said = ended(folder, sys.executable, "改.py")
    assert said.splitlines()[-1] == "[('狗', 'ok', 'é'), ('猫/一', 'ok', '动物')]"


def test_a_wheel_holds_one_name_and_runs_in_another_environment(folder, generated, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(packages)
        files = set(archive.namelist())
    for part in ("train", "examples"):
        named = {f"wallaroo/jobs/{part}/{path.name}" for path in (ROOT / "jobs" / part).iterdir()}
        assert named and named <= files
    assert {name for name in names if not name.endswith(".dist-info")} == {"wallaroo"}
    # Its dependencies are those of this environment, whose own wallaroo is not on that path.
    (packages / "dependencies.pth").write_text(
        "\n".join(path for path in sys.path if "site-packages" in path)
    )
    python = environment / "bin" / "python"
    where = ended(folder, python, "-c", "import wallaroo.model.engine as engine; print(engine.__file__)")
    assert Path(where.strip()).is_relative_to(packages)
    ended(folder, python, "-m", "wallaroo", "understand", "输出", "答案", "--model", "模型", "--slots", "2")
    rows = pq.read_table(folder / "答案" / "data").to_pylist()
    assert [(row["id"], row["status"]) for row in rows] == [("猫/一", "ok"), ("狗", "ok")]
    assert [row["in_主题"] for row in rows] == ["动物", "é"]
