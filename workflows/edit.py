"""Pictures edited as they are told: the task as a function. The pipeline is that of `workflows.pipeline`."""

from typing import TYPE_CHECKING, Any

from workflows.pipeline import map_dataset

if TYPE_CHECKING:
    import ray.data


def edit(
    ds: "ray.data.Dataset", *, model: str = "tiny", replicas: int = 1, **options: Any
) -> "ray.data.Dataset":
    """A Dataset of pictures and instructions becomes one of edited pictures, without an output folder.

    ds: has the columns of a manifest, `image` and, without the option `prompt`, `prompt`. A picture is a
    path (relative ones start in the present folder), an address, bytes, or a struct of bytes and path; one
    that cannot be used makes an error row. options: as for `workflows.pipeline.generate`, but for the
    size, and also prompt, image_root, allow_https, max_source_bytes, max_source_pixels and restore_size.

    What comes when, and what is raised, is told at `generate`.
    """
    return map_dataset("edit", ds, model, replicas, options)
