"""The chunked loss equals plain cross-entropy, holds no more logits than a chunk's, and keeps sharded ranks in step."""

import pathlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from services.modeling.loss import IGNORED, answer_loss_sum

ROWS, WIDTH, VOCABULARY, CHUNK = 300, 16, 1000, 32


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation made, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


class Lora(nn.Module):
    """A frozen head with a low-rank update beside it, as PEFT wraps one."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, VOCABULARY, bias=False)

    def forward(self, rows):
        return self.base(rows) + self.up(self.down(rows))


HEADS = {
    "plain": lambda: nn.Linear(WIDTH, VOCABULARY, bias=False),
    "bias": lambda: nn.Linear(WIDTH, VOCABULARY),
    "frozen": lambda: nn.Linear(WIDTH, VOCABULARY).requires_grad_(False),
    "lora": Lora,
}


def _inputs(labelled=0.5):
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    labels = torch.randint(VOCABULARY, (ROWS,)).masked_fill(torch.rand(ROWS) >= labelled, IGNORED)
    return hidden, labels


def _gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *(p for p in head.parameters() if p.requires_grad)])


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_of_plain_cross_entropy(name):
    hidden, labels = _inputs()
    head = HEADS[name]()
    plain = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    expected = _gradients(plain, hidden, head)
    with Largest() as largest:
        loss, right = answer_loss_sum(hidden, labels, head, CHUNK)
        found = _gradients(loss, hidden, head)
    assert largest.elements == CHUNK * VOCABULARY
    assert torch.equal(right, (head(hidden).argmax(1) == labels)[labels != IGNORED]) and loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))
    with torch.no_grad(), Largest() as largest:
        torch.testing.assert_close(answer_loss_sum(hidden, labels, head, CHUNK)[0], plain, rtol=1e-6, atol=0)
    assert largest.elements == CHUNK * VOCABULARY


def test_logits_of_bf16_states_are_summed_in_float32():
    hidden, labels = _inputs(1.0)
    head = nn.Linear(WIDTH, VOCABULARY).bfloat16()
    rows = hidden.detach().bfloat16()
    plain = nn.functional.cross_entropy(head(rows).float(), labels, reduction="sum")
    torch.testing.assert_close(answer_loss_sum(rows, labels, head, CHUNK)[0], plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_without_a_label_the_loss_is_zero_and_so_are_its_gradients(name):
    hidden, labels = _inputs(0.0)
    head = HEADS[name]()
    loss, right = answer_loss_sum(hidden, labels, head)
    assert loss.item() == len(right) == 0
    assert not any(gradient.any() for gradient in _gradients(loss, hidden, head))


def test_on_the_meta_device_every_row_counts():
    hidden, labels = _inputs()
    head = HEADS["plain"]().to("meta")
    rows = hidden.detach().to("meta").requires_grad_()
    loss, right = answer_loss_sum(rows, labels.to("meta"), head, CHUNK)
    assert len(right) == ROWS and all(gradient.is_meta for gradient in _gradients(loss, rows, head))


def _rank(_: int, rank: int, folder: str) -> None:
    """Runs as one of two ranks, whose samples have 0 and 300 labels."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    hidden, labels = _inputs(float(rank))
    head, calls = HEADS["plain"](), []
    head.weight.ds_id = 0  # the mark that ZeRO-3 leaves on what it shards
    head.register_forward_hook(lambda *_: calls.append(1))
    loss, right = answer_loss_sum(hidden, labels, head, CHUNK)
    loss.backward()
    plain = nn.functional.cross_entropy(head(hidden), labels, reduction="sum") if rank else torch.zeros(())
    torch.testing.assert_close(loss.detach(), plain.detach(), rtol=1e-6, atol=0)
    pathlib.Path(folder, str(rank)).write_text(f"{len(right)} {len(calls) - rank}", encoding="utf8")
    torch.distributed.destroy_process_group()


def test_ranks_that_share_a_head_call_it_as_often(tmp_path):
    other = torch.multiprocessing.start_processes(_rank, (1, str(tmp_path)), 1, join=False, start_method="fork")
    _rank(0, 0, str(tmp_path))
    other.join()
    rounds = -(-ROWS // CHUNK)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == [f"0 {2 * rounds}", f"{ROWS} {2 * rounds}"]
