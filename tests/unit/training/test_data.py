"""The order of rows."""

import numpy as np

from wallaroo.model.training.data import shuffled


def test_every_row_once_an_epoch():
    seen = np.concatenate([shuffled(10, first, 4, 3) for first in range(0, 20, 4)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
