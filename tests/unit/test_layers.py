"""The dependency direction at run time, and what `model/` says of itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "model"

ABSENT = """
import importlib, pkgutil, sys
import wallaroo

class Without:
    'A finder for which some packages are not installed.'
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        absent = {"ray", "pyarrow", "boto3", "botocore", "s3fs", "fsspec", "duckdb", "triton"}
        if name.partition(".")[0] in absent:
            return None
        return self.finder.find_spec(name, *rest)

sys.meta_path[:] = map(Without, sys.meta_path)
try:
    import pyarrow
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("pyarrow was not hidden")
import wallaroo.model as model
for module in pkgutil.walk_packages(model.__path__, "wallaroo.model."):
    if not module.name.endswith("_kernels"):  # imported when one of them is launched
        importlib.import_module(module.name)
    print(module.name)
"""


def module_name(path):
    """Of a file of `model/`, such as wallaroo.model.cuda.ops."""
    return "wallaroo." + ".".join(path.relative_to(MODEL.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def test_model_imports_without_ray_arrow_and_triton():
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = {module_name(path) for path in MODEL.rglob("*.py")} - {"wallaroo.model"}
    assert set(done.stdout.split()) == modules


@pytest.mark.parametrize(
    ("script", "libraries"),
    [
        ("import wallaroo.jobs.cli", {"torch", "ray", "pyarrow", "numpy", "rich"}),
        ("import wallaroo.workflows.runs.driver", {"torch", "transformers"}),
        (
            "from wallaroo.model.checkpoint import TINY, load; load(TINY, 'generate')",
            {"torch._dynamo", "transformers", "triton"},
        ),
    ],
    ids=["wallaroo --help", "around replicas", "replica"],
)
def test_processes_that_somebody_waits_for_import_no_more_than_they_use(script, libraries):
    script = f"import sys; {script}; print(*{libraries} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def public_functions():
    """Each public function and method of `model/`, with the docstrings that a reader finds for it: its
    own, and for a method also that of its class and of the same method elsewhere in the module, since
    backends fill in what a protocol beside them says."""
    found = []
    for path in sorted(MODEL.rglob("*.py")):
        module = module_name(path).removeprefix("wallaroo.model.")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found.append(pytest.param(node, ast.get_docstring(node), id=f"{module}.{node.name}"))
        for holder in classes.values():
            for node in holder.body if not holder.name.startswith("_") else ():
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
                    continue
                same = [
                    one
                    for kin in classes.values()
                    for one in kin.body
                    if getattr(one, "name", "") == node.name
                ]
                words = "\n".join(ast.get_docstring(one) or "" for one in [holder, *same])
                found.append(pytest.param(node, words, id=f"{module}.{holder.name}.{node.name}"))
    return found


@pytest.mark.parametrize("function, docstring", public_functions())
def test_public_function_says_what_it_takes_and_gives(function, docstring):
    assert docstring, "has no docstring"
    arguments = [argument.annotation for argument in function.args.args + function.args.kwonlyargs]
    texts = [ast.unparse(node) for node in [*arguments, function.returns] if node]
    arrays = [text for text in texts if re.match(r"(np\.ndarray|Tensor)\b", text)]
    if arrays:
        shape = r"[\[(][\w.*+/ -]*,[\w.*+/, -]*[\])]"
        assert re.search(shape, docstring), f"takes or gives {arrays}, but states no shape such as (rows, n)"


def test_no_text_names_a_module_by_its_folder_alone():
    """Only a checkout has `model.gpu_check`; what is installed is `wallaroo.model.gpu_check`."""
    root, seen = MODEL.parent, 0
    for folder in ("model", "actors", "workflows", "jobs"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    seen += 1
                    if re.fullmatch(r"(model|actors|workflows|jobs)(\.\w+)+", node.value):
                        file = root / node.value.replace(".", "/")
                        assert not (file.is_dir() or file.with_suffix(".py").is_file()), (path, node.value)
    assert seen > 1000
