"""Generate, edit and understand as functions: a Ray Dataset in, a Ray Dataset out."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from wallaroo.actors.replica import Replica
from wallaroo.actors.rows import from_ipc
from wallaroo.model.errors import did_you_mean
from wallaroo.workflows.cluster import choose_device
from wallaroo.workflows.options import Option, OptionError
from wallaroo.workflows.plans.dataset import plan_dataset
from wallaroo.workflows.runs.pool import load_stage, make_pool, make_results
from wallaroo.workflows.runs.setup import resolve
from wallaroo.workflows.runs.stages import encode, prepare
from wallaroo.workflows.settings import OPTIONS, REMOVED, RunConfig

if TYPE_CHECKING:
    import ray.data

Function = TypeVar("Function", bound=Callable[..., Any])


def options_of(task: str) -> dict[str, Option]:
    """The options that the function of a task takes, by name: all that need no output folder."""
    return {name: one for name, one in OPTIONS.items() if one.serves(task) and not one.run_only}


def _takes_options(function: Function) -> Function:
    """Puts the options of a task into signature and docstring of its function, for `help` and editors."""
    options = options_of(function.__name__)
    types: dict[str, Any] = {one.name: one.type for one in dataclasses.fields(RunConfig)}
    signature = inspect.signature(function)
    named = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=one.default,
            annotation=types[name] if one.default is not None else types[name] | None,
        )
        for name, one in options.items()
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[signature.parameters["ds"], *named]
    )
    words = "\n".join(f"    {one.name}: {one.help_text}" for one in options.values())
    function.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n{words}\n"
    return function


@_takes_options
def generate(ds: "ray.data.Dataset", **options: Any) -> "ray.data.Dataset":
    """Turns a Dataset of prompts into one of pictures, without an output folder.

    Every row is planned before this returns, which executes `ds` once. The pictures are made when the
    result is consumed. The same ids and options give the same pictures as a run.

    Args:
        ds: Has the columns of a manifest.
        **options: Options of `wallaroo generate` by name, such as `cfg=4`, `replicas=2`,
            `model="s3://bucket/wallaroo-7b"`.

    Returns:
        A row for every sample, in no certain order, with the columns of `data/` and the carried ones;
        `row_id` counts in the order of `ds`. An invalid row is an error row, and so is every
        later row of an id that occurs twice.

    Raises:
        OptionError: An option does not exist or breaks a rule.
        InputError: The column `prompt` is missing.
    """
    return map_dataset("generate", ds, options)


@_takes_options
def edit(ds: "ray.data.Dataset", **options: Any) -> "ray.data.Dataset":
    """Turns a Dataset of pictures and instructions into one of edited pictures, without an output folder.

    Args:
        ds: Has the columns of a manifest: `image` and, without the option `prompt`, `prompt`. A picture is
            a path (relative to the working directory), an address, bytes, or a struct of bytes and path. A
            picture that cannot be used makes an error row.
        **options: Options of `wallaroo edit` by name.

    Returns:
        As `generate` does.

    Raises:
        OptionError: An option does not exist or breaks a rule.
        InputError: A column is missing.
    """
    return map_dataset("edit", ds, options)


@_takes_options
def understand(ds: "ray.data.Dataset", **options: Any) -> "ray.data.Dataset":
    """Turns a Dataset of pictures, with or without questions, into one of texts, without an output folder.

    Args:
        ds: Has the columns of a manifest: `image`, as for `edit`, and perhaps `prompt`. A picture without a
            question is described.
        **options: Options of `wallaroo understand` by name.

    Returns:
        As `generate` does, with texts.

    Raises:
        OptionError: An option does not exist or breaks a rule.
        InputError: The column `image` is missing.
    """
    return map_dataset("understand", ds, options)


def map_dataset(
    task: str, ds: "ray.data.Dataset", options: dict[str, Any], replica: type = Replica
) -> "ray.data.Dataset":
    """What `generate` does, for any task.

    Args:
        task: One of `model.config.TASKS`.
        ds: Has the columns of a manifest.
        options: Values by name, of `options_of(task)`.
        replica: The class of the replicas.

    Returns:
        The rows as they would stand in `data/`.

    Raises:
        OptionError: An option does not exist or breaks a rule.
        InputError: A column is missing.
    """
    import ray.data

    from wallaroo.actors import watch

    known = options_of(task)
    for name in options:
        if name in OPTIONS and OPTIONS[name].run_only:
            raise OptionError(
                f"{name} is for runs with an output folder, which {task}() has not: leave it out."
            )
        for key, why in REMOVED.items():
            if key.partition(".")[2] == name:
                raise OptionError(f"{name} {why}")
        if name not in OPTIONS:
            raise OptionError(f"there is no option '{name}'{did_you_mean(name, known) or '.'}")
    resolved = resolve(RunConfig(manifest="", output="", task=task, **options))
    config = resolved.config
    plans, rows, carried = plan_dataset(ds, resolved.settings, config.model)
    context = resolved.context(carried)
    if not rows:
        return ray.data.from_arrow(context.schema.empty_table())
    pool = make_pool(config, choose_device(config.device), rows, plans.count(), replica)
    loaded = load_stage(plans, functools.partial(prepare, context=context), context, pool)
    stage = functools.partial(encode, context=context)
    return make_results(loaded, stage, context, pool, watch.start()).map_batches(
        _unpack, batch_size=1, batch_format="pyarrow", num_cpus=pool.cpus
    )


def _unpack(batch: pa.Table) -> pa.Table:
    """The rows of the shards in a batch."""
    return pa.concat_tables(from_ipc(result.as_py()) for result in batch.column("result"))
