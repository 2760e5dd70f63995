import copy

import pytest
import torch
import torch.nn.functional as F

from wallaroo.model.checkpoint import TINY, load
from wallaroo.model.config import VQConfig
from wallaroo.model.vq import ChannelsLastNorm, VQModel, to_float, to_uint8

pytestmark = pytest.mark.numerics

CONFIG = VQConfig(
    channels=16,
    channel_multipliers=(1, 1, 2, 2, 4),
    norm_groups=8,
    z_channels=32,
    codebook_size=64,
)


@pytest.fixture(scope="module")
def vq() -> VQModel:
    torch.manual_seed(0)
    return VQModel(CONFIG).eval().requires_grad_(False)


def test_shapes_are_a_sixteenth(vq: VQModel):
    latents = vq.encode(torch.rand(2, 3, 48, 80) * 2 - 1)
    assert latents.shape == (2, 8, 3, 5)
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(2, 3, 5))
    tokens = vq.quantise(latents)
    assert tokens.shape == (2, 3, 5) and tokens.dtype == torch.int64
    assert vq.decode(tokens).shape == (2, 3, 48, 80)


def test_the_codebook_has_unit_length(vq: VQModel):
    assert vq.codebook().shape == (64, 8)
    torch.testing.assert_close(vq.codebook().norm(dim=1), torch.ones(64))


def test_an_entry_is_its_own_nearest(vq: VQModel):
    entries = vq.codebook().T.reshape(1, 8, 8, 8)
    assert vq.quantise(entries).flatten().tolist() == list(range(64))


def test_a_tie_gives_the_lowest_entry(vq: VQModel):
    twin = VQModel(CONFIG).requires_grad_(False)
    twin.quantize.embedding.weight[:] = vq.quantize.embedding.weight
    # Another length, and the same direction after normalisation.
    twin.quantize.embedding.weight[[11, 40, 63]] = twin.quantize.embedding.weight[5] * 2
    latents = twin.codebook()[[5, 40]].T.reshape(1, 8, 1, 2)
    assert twin.quantise(latents).flatten().tolist() == [5, 5]


def test_a_picture_is_the_same_beside_any_others(vq: VQModel):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (4, 3, 4), generator=generator)
    pictures = torch.rand(4, 3, 48, 64, generator=generator) * 2 - 1
    order = torch.tensor([3, 0, 0, 1])
    assert torch.equal(vq.decode(tokens)[order], vq.decode(tokens[order]))
    assert torch.equal(vq.encode(pictures)[order], vq.encode(pictures[order]))


def test_the_memory_layout_of_the_input_does_not_matter(vq: VQModel):
    pictures = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    other = pictures.contiguous(memory_format=torch.channels_last)
    assert torch.equal(vq.encode(pictures), vq.encode(other))


def test_pixels_are_cut_off_and_truncated():
    levels = torch.tensor([-2.0, -1.0, -0.5 / 127.5, 0.0, 0.999 / 127.5, 1.0, 3.0])
    picture = levels.expand(3, 1, -1)
    assert to_uint8(picture)[0, :, 0].tolist() == [0, 0, 127, 128, 128, 255, 255]
    assert to_uint8(picture[None, None]).shape == (1, 1, 1, 7, 3)


def test_floats_of_pixels_and_back():
    image = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).repeat(1, 1, 3)
    floats = to_float(image)
    assert floats.shape == (3, 16, 16)
    assert (floats.min().item(), floats.max().item()) == (-1.0, 1.0)
    # Decoding counts 128 for 0 and encoding 127.5, so that a level comes back as itself or as the next.
    assert ((to_uint8(floats).int() - image.int()) >= 0).all()
    assert ((to_uint8(floats).int() - image.int()) <= 1).all()


def test_the_names_of_attention_and_resampling_levels(vq: VQModel):
    names = set(vq.state_dict())
    assert {"encoder.conv_blocks.4.attn.1.q.weight", "decoder.conv_blocks.0.attn.2.q.weight"} <= names
    assert not any("conv_blocks.3.attn" in name or "decoder.conv_blocks.1.attn" in name for name in names)
    assert {
        "encoder.conv_blocks.3.downsample.conv.weight",
        "decoder.conv_blocks.3.upsample.conv.bias",
    } <= names
    assert not any("conv_blocks.4.downsample" in name or "conv_blocks.4.upsample" in name for name in names)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 1, 1), (2, 32, 5, 3), (4, 64, 16, 16)], ids=str)
def test_the_norm_of_channels_that_lie_together_is_the_same(shape: tuple[int, ...], kernels: bool):
    torch.manual_seed(1)
    norm = torch.nn.GroupNorm(8, shape[1], eps=1e-6).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 * torch.randn(shape) + 1).contiguous(memory_format=torch.channels_last)
    together = ChannelsLastNorm(norm, kernels)
    for made, expected in ((together(x), norm(x)), (together(x, swish=True), F.silu(norm(x)))):
        assert made.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True])
def test_the_model_for_cuda_leaves_the_one_it_is_made_of_alone(vq: VQModel, kernels: bool):
    tokens = torch.arange(2 * 3 * 5).view(2, 3, 5)
    expected, before = vq.decode(tokens), str(vq.decoder)
    made = vq.for_cuda(kernels)
    assert made.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert vq.decoder.conv_in.weight.is_contiguous() and str(vq.decoder) == before
    torch.testing.assert_close(made.decode(tokens), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(vq.decode(tokens), expected)


def test_tf32_moves_few_values_and_those_by_one_level():
    """Convolutions whose inputs and weights have 10 bits after the point, as TF32 has them, on a CPU."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    exact = load(TINY, "generate").vq
    tf32 = copy.deepcopy(exact)
    for module in tf32.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    tokens = torch.randint(0, 1024, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = (to_uint8(one.decode(tokens)).to(torch.float32) for one in (tf32, exact))
    difference = ours - theirs
    assert 0 < difference.abs().max() <= 1
    assert 10 * torch.log10(255**2 / difference.square().mean()) > 60
