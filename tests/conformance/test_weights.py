"""The recipe gives the tensors whose hashes were published; all other comparisons rest on that."""

import pytest

from tests.conformance import weights
from tests.conformance.published import metadata

MODELS = ("tiny_model", "mid_model", "vq_model")


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_has_its_published_hash(model: str):
    manifest, checksums = metadata(model), metadata("checksums")[model]
    shapes = dict(manifest["tensors"])
    assert shapes and set(shapes) == set(checksums), f"{model}: manifest and hashes name other tensors"
    for name, shape in shapes.items():
        found = weights.digest(weights.tensor(manifest["salt"], name, shape))
        assert found == checksums[name], f"{model}: tensor {name} has another hash"


def test_no_model_without_a_manifest():
    assert set(metadata("checksums")) == set(MODELS)
