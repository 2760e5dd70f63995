"""Steps of Muon: their singular values, and which matrices it takes."""

import torch

from wallaroo.model.checkpoint import TINY, load
from wallaroo.model.muon import orthogonal, takes


def test_a_step_of_muon_turns_and_stretches_alike():
    """All singular values of what it takes of a gradient are near one, whatever the gradient's are."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((24, 40), (40, 24)):
        wide = torch.randn(shape, generator=generator)
        left, _, right = torch.linalg.svd(wide, full_matrices=False)
        matrix = left @ torch.diag(torch.linspace(1.0, 0.03, 24)) @ right
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert values.min() > 0.6 and values.max() < 1.3
        assert torch.linalg.matrix_norm(orthogonal(matrix) - left @ right, 2) < 0.4


def test_muon_takes_matrices_that_are_no_tables():
    model = load(TINY)
    taken = {name for name, parameter in model.named_parameters() if takes(name, parameter)}
    layer = "language_model.layers.0."
    assert {f"{layer}self_attn.qkv_proj.weight", f"{layer}mlp.down_proj.weight"} <= taken
    assert {"visual.blocks.0.attn.qkv.weight", "gen_image_head.0.weight"} <= taken
    tables = ("embed_tokens.weight", "lm_head.weight", "image_head.2.weight", "norm.weight", ".bias")
    assert not any(name.endswith(tables) or "conv" in name for name in taken)
