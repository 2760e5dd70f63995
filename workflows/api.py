"""Generate, edit and understand as functions: a Ray Dataset in, a Ray Dataset out."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from wallaroo.actors.replica import Replica
from wallaroo.actors.rows import from_ipc
from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.workflows.cluster import choose_device
from wallaroo.workflows.plans.dataset import plan_dataset
from wallaroo.workflows.runs.pool import load_stage, make_pool, make_results
from wallaroo.workflows.runs.setup import (
    make_job,
    meaning_of,
    plan_settings,
    with_absolute_paths,
)
from wallaroo.workflows.runs.stages import prepare
from wallaroo.workflows.settings import RunConfig

if TYPE_CHECKING:
    import ray.data


def generate(
    ds: "ray.data.Dataset", *, model: str = "tiny", replicas: int = 1, **options: Any
) -> "ray.data.Dataset":
    """A Dataset of prompts becomes one of pictures, without an output folder.

    ds: has the columns of a manifest. model: `tiny`, or the folder of a checkpoint. options: fields of
    `workflows.settings.RunConfig` that say what a row is or what makes it: samples, seed, sampling,
    preset, width, height, language, templates, prompt_column, image_format, image_quality, save_tokens,
    max_prompt_tokens, cfg_interval, weights, slots, device, threads.

    Every row is planned before this returns, which executes `ds` once; the pictures are made when the
    answer is consumed. It has a row for every sample, with the columns of `data/`, the carried ones
    included: same ids and options, same pictures as of a run. Rows come in no certain order, with
    `row_id` counted in the order of `ds`. Rows that cannot be served are error rows, and so is every
    later row of an id that occurs twice.
    Raises InputError for an option that does not exist or breaks a rule, and where `prompt` is missing.
    """
    return map_dataset("generate", ds, model, replicas, options)


def map_dataset(
    task: str,
    ds: "ray.data.Dataset",
    model: str,
    replicas: int,
    options: dict[str, Any],
    replica: type = Replica,
) -> "ray.data.Dataset":
    """What `generate` does, for any task. replica: the class of the replicas."""
    import ray.data

    from wallaroo.actors import watch

    fields = {one.name for one in dataclasses.fields(RunConfig)}
    for name in options:
        if name not in fields - _OF_A_RUN:
            raise InputError(f"there is no option '{name}'{did_you_mean(name, fields - _OF_A_RUN) or '.'}")
    config = RunConfig(manifest="", output="", task=task, replicas=(replicas, replicas), **options)
    config = with_absolute_paths(dataclasses.replace(config, model=model))
    meaning = meaning_of(config)
    plans, rows, carried = plan_dataset(ds, plan_settings(config), config.model)
    job = make_job(config, meaning, carried)
    if not rows:
        return ray.data.from_arrow(job.schema.empty_table())
    pool = make_pool(config, choose_device(config.device), rows, plans.count(), replica)
    loaded = load_stage(plans, functools.partial(prepare, job=job), job, pool)
    return make_results(loaded, job, pool, watch.start()).map_batches(
        _unpack, batch_size=1, batch_format="pyarrow", num_cpus=pool.cpus
    )


_OF_A_RUN = {
    "manifest",
    "output",
    "task",
    "model",
    "replicas",
    "limit",
    "where",
    "incremental",
    "max_error_rate",
    "retry_errors",
    "grace",
    "deadline",
    "strict",
    "address",
    "price_per_hour",
}


def _unpack(batch: pa.Table) -> pa.Table:
    """The rows of the shards in a batch."""
    return pa.concat_tables(from_ipc(result.as_py()) for result in batch.column("result"))


def edit(
    ds: "ray.data.Dataset", *, model: str = "tiny", replicas: int = 1, **options: Any
) -> "ray.data.Dataset":
    """A Dataset of pictures and instructions becomes one of edited pictures, without an output folder.

    ds: has the columns of a manifest, `image` and, without the option `prompt`, `prompt`. A picture is a
    path (relative ones start in the present folder), an address, bytes, or a struct of bytes and path; one
    that cannot be used makes an error row. options: as for `generate`, but for the
    size, and also prompt, image_root, allow_https, max_source_bytes, max_source_pixels and restore_size.

    What comes when, and what is raised, is told at `generate`.
    """
    return map_dataset("edit", ds, model, replicas, options)


def understand(
    ds: "ray.data.Dataset", *, model: str = "tiny", replicas: int = 1, **options: Any
) -> "ray.data.Dataset":
    """A Dataset of pictures, with questions or without, becomes one of texts, without an output folder.

    ds: has the columns of a manifest, `image` and perhaps `prompt`; a picture without a question is
    described. Pictures are as for `edit`. options: as for `generate`,
    but for those about pictures that are made, and also prompt, image_root, allow_https,
    max_source_bytes, max_source_pixels and max_new_tokens.

    What comes when, and what is raised, is told at `generate`.
    """
    return map_dataset("understand", ds, model, replicas, options)
