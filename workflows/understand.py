"""Pictures described, and questions about them answered: the task as a function.

The pipeline is that of `workflows.pipeline`.
"""

from typing import TYPE_CHECKING, Any

from workflows.pipeline import map_dataset

if TYPE_CHECKING:
    import ray.data


def understand(
    ds: "ray.data.Dataset", *, model: str = "tiny", replicas: int = 1, **options: Any
) -> "ray.data.Dataset":
    """A Dataset of pictures, with questions or without, becomes one of texts, without an output folder.

    ds: has the columns of a manifest, `image` and perhaps `prompt`; a picture without a question is
    described. Pictures are as for `workflows.edit.edit`. options: as for `workflows.pipeline.generate`,
    but for those about pictures that are made, and also prompt, image_root, allow_https,
    max_source_bytes, max_source_pixels and max_new_tokens.

    What comes when, and what is raised, is told at `generate`.
    """
    return map_dataset("understand", ds, model, replicas, options)
