"""Wallaroo Batch: distributed batch generation with the Wallaroo model on Ray.

`generate`, `edit` and `understand` take a Ray Dataset and return one. Nothing is imported before it is used,
so that `wallaroo --help` need not wait for Ray.
"""

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wallaroo.workflows.api import edit, generate, understand

    __version__: str

__all__ = ["__version__", "edit", "generate", "understand"]

LIBRARIES = {
    *("PIL", "boto3", "botocore", "click", "duckdb", "fsspec", "jinja2", "numpy", "pyarrow", "ray", "rich"),
    *("s3fs", "safetensors", "tokenizers", "torch", "transformers"),
}
"""Top-level modules of the packages that this one depends on."""


class _InstalledLibraries:
    """Finds LIBRARIES among the installed packages before anything else is searched.

    The directory of a script and the working directory come first in `sys.path`, on Ray's workers too, so a
    user's `PIL.py` there would be imported in place of Pillow. All other names are left to Python.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if path is not None or name not in LIBRARIES:
            return None
        installed = [
            folder for folder in sys.path if os.path.basename(folder) in ("site-packages", "dist-packages")
        ]
        return importlib.machinery.PathFinder.find_spec(name, installed, target)


sys.meta_path.insert(0, _InstalledLibraries)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("wallaroo-batch")
    if name in __all__:
        import wallaroo.workflows.api

        return getattr(wallaroo.workflows.api, name)
    raise AttributeError(f"module 'wallaroo' has no attribute '{name}'")
