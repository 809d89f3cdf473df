"""Every test of training data keeps its indices to itself."""

import pytest

from training.data.sources.index import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def own_indices(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "indices"))
