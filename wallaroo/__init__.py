"""Wallaroo Batch: distributed batch generation with the Wallaroo model on Ray.

`generate`, `edit` and `understand` take a Ray Dataset and return one. Nothing is imported before it is used,
so that `wallaroo --help` need not wait for Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wallaroo.workflows.api import edit, generate, understand

    __version__: str

__all__ = ["__version__", "edit", "generate", "understand"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("wallaroo-batch")
    if name in __all__:
        import wallaroo.workflows.api

        return getattr(wallaroo.workflows.api, name)
    raise AttributeError(f"module 'wallaroo' has no attribute '{name}'")
