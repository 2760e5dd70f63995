"""Editing and understanding along the way of a workflow: picture file, load stage, Arrow, engine."""

import dataclasses

import pytest
from PIL import Image

from tests.conformance.cases import GUIDED, PLAIN, edit_requests, serve, tolerances, understand_requests
from tests.conformance.models import config_of, tiny
from tests.conformance.published import Family, assert_close, assert_greedy, cases, metadata, name_of
from wallaroo.actors.rows import from_ipc, request_values, requests, requests_table, to_ipc
from wallaroo.workflows.sources.prepare import Source, load_many
from wallaroo.workflows.sources.references import SourceOptions

pytestmark = pytest.mark.numerics

LIMITS = metadata("i2i_meta")["seg"]["min_pixels"], metadata("i2i_meta")["seg"]["max_pixels"]


@pytest.fixture(scope="module", params=["edit", "understand"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Task and the results of all its cases; of the model-level requests only prompt and seed are kept."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    config = dataclasses.replace(config_of("tiny_model"), edit_pixels=LIMITS, understand_pixels=LIMITS)
    family = "i2i" if task == "edit" else "mmu"
    asked = []
    for case in cases(family):
        Image.fromarray(Family(family, case["case"])["src"]).save(folder / f"{case['case']}.png")
        plain = edit_requests(case) if task == "edit" else understand_requests(case, *LIMITS)
        # The null branch on its own is no request of a workflow.
        plain = [one for one in plain if one.key[1] != "null_logits_correct"]
        names = [f"{case['case']}.png"] * len(plain)
        ((positions, source),) = load_many(names, task, config, SourceOptions(str(folder)))
        assert positions == list(range(len(plain))) and isinstance(source, Source)
        picture = source.prepared
        assert (picture.height, picture.width) == Family(family, case["case"])["src"].shape[:2]
        assert (picture.grid[0] * 28, picture.grid[1] * 28) == (case["seg_h"], case["seg_w"])
        values = [
            request_values(
                row=row,
                prompt=one.prompt,
                null=one.null,
                size=picture.size,
                seed=0,
                sampling=dataclasses.asdict(GUIDED if one.sampling.guided else PLAIN),
                semantic=picture.semantic,
                pixels=picture.pixels,
                max_new_tokens=one.max_new_tokens,
            )
            for row, one in enumerate(plain)
        ]
        crossed = requests(from_ipc(to_ipc(requests_table(values))), [one.key for one in plain])
        asked += [
            dataclasses.replace(made, forced=one.forced) for made, one in zip(crossed, plain, strict=True)
        ]
    return task, serve("engine", tiny(), task, asked)


def test_tokens_and_logits_are_those_of_the_model(served):
    task, results = served
    family = "i2i" if task == "edit" else "mmu"
    for case in cases(family):
        arrays, name = Family(family, case["case"]), name_of(case)
        row, guided = tolerances(tiny(), task, arrays)
        if task == "edit":
            forced = (("cond_logits", row), ("cfg3_correct", guided))
            greedy = (("greedy_cfg1", row), ("greedy_cfg3_correct", guided))
        else:
            forced, greedy = (("tf_logits", row),), (("greedy", row),)
        for array, allowed in forced:
            result = results[case["case"], array]
            assert result.tokens.tolist() == arrays["tf_tokens"].tolist(), name
            assert_close(result.logits, arrays.where(array), arrays[array], allowed, "workflow")
        for array, allowed in greedy:
            result = results[case["case"], array]
            where = arrays.where(array)
            assert_greedy(result.tokens, result.logits, where, arrays[array], allowed, "workflow")
