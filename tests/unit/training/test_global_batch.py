"""A step's global batch is the same however it is cut: by micro-batches and workers, on any device."""

import dataclasses
import pathlib

import pytest
import torch

from services.common.errors import InvalidInput
from services.common.types import ImageTiles
from services.modeling.packing import TrainedSequence
from tests.tiny_training import tiny_run
from training.global_batch import Totals, accumulation, mean_over_workers, sum_counts, to_device
from training.question_stage import QuestionTask

STEP = 3


def test_a_wrong_product_is_refused_with_the_numbers():
    run = dataclasses.replace(tiny_run("o"), global_batch=12)
    assert [accumulation(run, workers) for workers in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert accumulation(dataclasses.replace(run, global_batch=0), 5) == 1
    with pytest.raises(InvalidInput, match="is 12, expected a multiple of samples_per_worker 2 x workers 4"):
        accumulation(run, 4)


def one_step(folder, samples: int, places: int):
    """Loss and gradients of a step's global batch, cut into so many micro-batches."""
    torch.manual_seed(0)
    stage = {"prune": {"layers": [1, 3], "thresholds": [0.4, 0.9]}, "loss": {"balance": 2.0}}
    task = QuestionTask(tiny_run(str(folder), samples_per_worker=samples, stage=stage))
    torch.nn.init.normal_(task.module.model.encoder.vision_guided_sampler.selector.linear.weight)
    batches = [task.batch(STEP, place, places) for place in range(places)]
    counts = torch.stack([task.count(batch, STEP) for batch in batches]).sum(0)
    totals = Totals(micro_batches=places, counts=counts) if places > 1 else None
    losses = []
    for batch in batches:
        loss, metrics = task.module.train()(batch, STEP, totals)
        (loss / places).backward()
        losses.append({"loss": loss.item(), "balance": metrics["balance"], "language": metrics["language"]})
    gradients = torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])
    return {name: sum(row[name] for row in losses) / places for name in losses[0]}, gradients


@pytest.mark.parametrize(("samples", "places"), [(1, 8), (4, 2)])
def test_accumulating_is_one_large_batch(tmp_path, samples, places):
    """Answers differ in length between samples, and so do the branches that regions choose."""
    whole, gradients = one_step(tmp_path, 8, 1)
    parts, summed = one_step(tmp_path, samples, places)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["balance"] == pytest.approx(whole["balance"], rel=1e-5)
    torch.testing.assert_close(summed, gradients, rtol=2e-3, atol=2e-5)


def _sum(_: int, rank: int, store: str, found: str) -> None:
    """Runs as one of two workers."""
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    counts = [torch.tensor([1.0 + rank, 10.0]), torch.tensor([5.0, 0.0])]
    totals = sum_counts(counts, 4, torch.device("cpu"))
    means = mean_over_workers([float(rank), 3.0], torch.device("cpu"))
    pathlib.Path(f"{found}{rank}").write_text(f"{totals.micro_batches} {totals.counts.tolist()} {means}")
    torch.distributed.destroy_process_group()


def test_counts_are_summed_over_workers_and_losses_are_means(tmp_path):
    files = str(tmp_path / "store"), str(tmp_path / "rank")
    other = torch.multiprocessing.start_processes(_sum, (1, *files), 1, join=False, start_method="fork")
    _sum(0, 0, *files)
    other.join()
    assert {(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)} == {"4 [13.0, 20.0] [0.5, 3.0]"}


def test_every_tensor_of_a_batch_is_moved():
    image = ImageTiles(pixels_T3HW=torch.zeros(1, 3, 2, 2), image_size_hw=(2, 2), grid_hw=(1, 1))
    ids = torch.tensor([1, 2])
    sequence = TrainedSequence(
        input_ids=ids, labels=ids, instruction=ids > 1, images=(image, image), name="file.json:3"
    )
    moved = to_device({"rank": 0, "sequences": [sequence], "pair": (ids, None)}, "meta")
    (there,) = moved["sequences"]
    tensors = [there.input_ids, there.labels, there.instruction, moved["pair"][0]]
    tensors += [image.pixels_T3HW for image in there.images]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and len(tensors) == 6
    assert there.name == "file.json:3" and moved["pair"][1] is None and there.images[1].grid_hw == (1, 1)


@pytest.mark.parametrize("stage", [{}, {"prune": None}, {"vision_sampler": False}])
def test_no_tensor_of_a_step_is_made_without_the_modules_device(tmp_path, stage):
    """Where the default is another device than the model's, one that is not told the model's would not fit."""
    task = QuestionTask(tiny_run(str(tmp_path), stage=stage))
    batch = task.batch(0, 0, 1)
    with torch.device("meta"):
        totals = Totals(micro_batches=2, counts=2 * task.count(to_device(batch, "cpu"), 0).to("cpu"))
        loss, _ = task.module.train()(to_device(batch, "cpu"), 0, totals)
        loss.backward()
    assert loss.device.type == "cpu" and loss.isfinite()
