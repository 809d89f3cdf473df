"""What the tests of training share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
