"""The loop: pieces of a step, skipped steps, what is frozen, and a resume to the same losses."""

import pytest
import torch

from tests.unit.training.cases import learning, losses_of
from wallaroo.model.training.loop import optimise


@pytest.mark.numerics
def test_pieces_of_a_step_count_by_their_tokens(tmp_path):
    """A step in pieces whose rows have answers of many lengths is the step in one piece."""
    said = []
    for accumulate in (1, 4):
        learner, made, lines, report = learning(tmp_path / str(accumulate), steps=3, accumulate=accumulate)
        optimise(learner, made, report)
        said.append(losses_of(lines))
    for step, line in said[0].items():
        assert line == pytest.approx(said[1][step], rel=1e-4), step


@pytest.mark.parametrize(("bound", "skipped"), [(1.0, 3), (0.0, 0), (30.0, 0)])
def test_only_a_large_loss_of_pictures_from_text_skips_a_step(tmp_path, bound, skipped):
    learner, made, said, report = learning(tmp_path, steps=3, largest_loss=bound)
    before = [parameter.clone() for parameter in learner.module.parameters()]
    optimise(learner, made, report)
    assert said[3]["skipped_steps"] == skipped
    assert all(map(torch.equal, before, learner.module.parameters())) == bool(skipped)


@pytest.mark.parametrize("muon", [False, True])
def test_a_killed_run_goes_on_to_the_same_losses(tmp_path, muon):
    learner, made, whole, report = learning(tmp_path / "whole", steps=6, muon=muon)
    optimise(learner, made, report)
    learner, made, first, report = learning(tmp_path / "parts", steps=6, muon=muon)

    class Killed(Exception):
        pass

    def kill(step):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        optimise(learner, made, report, after=kill)
    # A new process: nothing is left but the folder.
    learner, made, second, report = learning(tmp_path / "parts", steps=6, muon=muon)
    optimise(learner, made, report)
    assert min(second) == 3
    assert losses_of(first | second) == losses_of(whole)


@pytest.mark.parametrize("muon", [False, True])
def test_the_losses_fall_and_what_is_frozen_stays(tmp_path, muon):
    learner, made, said, report = learning(tmp_path, steps=12, rate=3e-3, muon=muon)
    before = {name: value.clone() for name, value in learner.module.model.state_dict().items()}
    optimise(learner, made, report)
    assert said[12]["loss"] < 0.8 * said[1]["loss"]
    moved = {
        name
        for name, value in learner.module.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved and not any(name.startswith("vq.") for name in moved)
    assert {name.split(".")[0] for name in moved} == {
        "language_model", "lm_head", "visual", "gen_input_adapter", "gen_image_head", "edit_input_adapter",
        "edit_image_head", "pixel_adapter",
    }  # fmt: skip
