"""A plan as lines for a person: parameters, memory by part and ZeRO stage, the micro-batch that fits, hours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.supported import largest_image
from training.plan.memory import BUCKET, STAGES, Memory, ZeroStage, on_host, step_memory
from training.plan.operations import PEAK, Operations, hours, sample_operations
from training.plan.parameters import PARTS, Parameters, Trained
from training.plan.workload import Workload, image_workload, longest_workload

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, and the machines and the data that it is planned for."""

    name: str
    model: FocusLlavaConfig
    trained: Trained
    parameters: Parameters
    global_batch: int
    max_length: int
    micro_batch: int
    """Samples that the run gives a GPU at a time."""
    zero: ZeroStage
    """The run's own ZeRO stage; the others are shown beside it."""
    checkpointing: bool
    """Whether the run checkpoints activations; both are shown."""
    gpus: int
    gpu_memory: int
    """Bytes of each."""
    gpu: str = "A100"
    samples: int
    uncounted: tuple[str, ...] = ()
    """Sources of the data whose samples nobody has counted, and which are left out."""
    itemsize: int = 2
    """Bytes of a weight."""
    offload: Literal["none", "optimizer", "all"] = "none"
    cuts: tuple[int, int] | None = None
    """First and last layer that the text-guided sampler may be drawn at; None: it is off."""
    vision_share: float = 1.0
    """Visual tokens that the vision-guided sampler leaves, as a share of all."""
    text_share: float = 1.0
    """Visual tokens that go on at the text-guided sampler, as a share of those that reach it."""
    text_tokens: int = 400
    """Words and markers of a sample in the mean, answers among them."""
    answer_tokens: int = 200
    utilisation: float = 0.4
    """Operations a second that are reached, as a share of the GPU's peak."""

    def longest(self) -> Workload:
        """The sample that memory is planned for."""
        return longest_workload(self.model, self.max_length)

    def usual(self, *, sampled: bool) -> Workload:
        """The sample that hours are planned for: one image of the largest size."""
        return image_workload(
            self.model,
            text_tokens=self.text_tokens,
            answer_tokens=self.answer_tokens,
            cuts=self.cuts if sampled else None,
            vision_share=self.vision_share if sampled else 1.0,
            text_share=self.text_share if sampled else 1.0,
        )

    def memory(self, work: Workload, zero: ZeroStage, *, samples: int, checkpointing: bool) -> Memory:
        """Bytes of a step on one GPU."""
        return step_memory(
            self.model,
            self.trained,
            self.parameters,
            work,
            samples=samples,
            zero=zero,
            devices=self.gpus,
            checkpointing=checkpointing,
            itemsize=self.itemsize,
            offload=self.offload,
        )

    def micro_batches(self) -> list[int]:
        """The micro-batches that divide a GPU's share of the global batch, ascending; none where GPUs do not."""
        share, rest = divmod(self.global_batch, self.gpus)
        return [] if rest else [size for size in range(1, share + 1) if share % size == 0]

    def largest(self, work: Workload, zero: ZeroStage, *, checkpointing: bool) -> int:
        """The largest micro-batch that fits, 0 for none."""
        fits = 0
        for size in self.micro_batches():
            needed = self.memory(work, zero, samples=size, checkpointing=checkpointing).total
            if needed > self.gpu_memory:
                break
            fits = size
        return fits

    def operations(self, *, sampled: bool, checkpointing: bool) -> Operations:
        """Operations of one usual sample."""
        return sample_operations(self.model, self.trained, self.usual(sampled=sampled), checkpointing=checkpointing)

    def hours(self, *, sampled: bool, checkpointing: bool) -> float:
        """Hours of all samples."""
        return hours(
            self.operations(sampled=sampled, checkpointing=checkpointing),
            samples=self.samples,
            devices=self.gpus,
            peak=PEAK[self.gpu],
            utilisation=self.utilisation,
        )


def lines(plan: Plan, source: str = "") -> Iterator[str]:
    """The whole plan. source: where the model's configuration is from."""
    work = plan.longest()
    yield (
        f"{plan.name}: {plan.gpus} x {plan.gpu} of {plan.gpu_memory / GB:.0f} GB, global batch {plan.global_batch}, "
        f"{plan.max_length:,} tokens at most"
    )
    if source:
        yield f"model: {source}"
    yield from _parameters(plan)
    yield ""
    yield from _memory(plan, work)
    yield ""
    yield from _largest(plan, work)
    yield ""
    yield from _hours(plan)
    yield ""
    yield from _assumptions(plan, work)


def _parameters(plan: Plan) -> Iterator[str]:
    for name, counts in (("parameters", plan.parameters.total), ("trained", plan.parameters.trained)):
        yield f"{name}: " + ", ".join(
            f"{part.replace('_', ' ')} {_count(counts[part])}" for part in PARTS if counts[part]
        )


def _memory(plan: Plan, work: Workload) -> Iterator[str]:
    yield "memory of a GPU in GB, one sample of the longest at a time"
    by_stage = {
        kept: [plan.memory(work, zero, samples=1, checkpointing=not kept) for zero in STAGES] for kept in (False, True)
    }
    cells = [["", *(f"ZeRO-{zero}" + "*" * (zero == plan.zero) for zero in STAGES)]]
    for row in ("weights", "gradients", "optimizer", "buffers"):
        cells.append([row, *(_gb(getattr(memory, row)) for memory in by_stage[False])])
    for kept, name in ((False, "checkpointed"), (True, "all kept")):
        cells.append([f"activations, {name}", *(_gb(memory.activations) for memory in by_stage[kept])])
        cells.append([f"backward pass, {name}", *(_gb(memory.working) for memory in by_stage[kept])])
    cells.append(["the optimizer's step", *(_gb(memory.at_step) for memory in by_stage[False])])
    cells.append(["most at once, checkpointed", *(_gb(memory.total) for memory in by_stage[False])])
    cells.append(["most at once, all kept", *(_gb(memory.total) for memory in by_stage[True])])
    yield from _table(cells)


def _largest(plan: Plan, work: Workload) -> Iterator[str]:
    if not plan.micro_batches():
        yield f"no micro-batch: {plan.gpus} GPUs do not divide the global batch of {plan.global_batch}"
        return
    yield f"largest micro-batch that fits, and how often it is accumulated to {plan.global_batch}"
    cells = [["", *(f"ZeRO-{zero}" + "*" * (zero == plan.zero) for zero in STAGES)]]
    for name, checkpointing in (("checkpointed", True), ("all kept", False)):
        sizes = [plan.largest(work, zero, checkpointing=checkpointing) for zero in STAGES]
        cells.append([name, *(f"{size} x {plan.global_batch // plan.gpus // size}" if size else "-" for size in sizes)])
    yield from _table(cells)
    needed = plan.memory(work, plan.zero, samples=plan.micro_batch, checkpointing=plan.checkpointing).total
    verdict = "fits" if needed <= plan.gpu_memory else "DOES NOT FIT"
    how = "checkpointed" if plan.checkpointing else "all kept"
    yield f"this run's: {plan.micro_batch}, {how}, in ZeRO-{plan.zero}: {needed / GB:.1f} GB, {verdict}"


def _hours(plan: Plan) -> Iterator[str]:
    yield f"hours of {plan.samples:,} samples, {plan.samples // plan.global_batch:,} steps"
    cells = [["", "visual tokens", "10^12 operations a sample", "of them recomputed", "checkpointed", "all kept"]]
    settings = [("samplers off", False)]
    if plan.vision_share < 1 or plan.cuts:
        settings.append(("samplers on", True))
    layers = plan.model.text_config.num_hidden_layers
    for name, sampled in settings:
        work, operations = plan.usual(sampled=sampled), plan.operations(sampled=sampled, checkpointing=True)
        draws = work.draws(layers)
        seen = sum(map(sum, draws)) / len(draws) / layers - work.text_tokens
        spent = [f"{plan.hours(sampled=sampled, checkpointing=checkpointing):.1f}" for checkpointing in (True, False)]
        each = (f"{operations.total / 1e12:.1f}", f"{operations.recomputed / operations.total:.0%}")
        cells.append([name, f"{seen:,.0f}", *each, *spent])
    yield from _table(cells)


def _assumptions(plan: Plan, work: Workload) -> Iterator[str]:
    (height, width), visual = largest_image(plan.model)
    yield "assumed"
    dtype = {2: "bfloat16 with float32 master weights", 4: "float32"}[plan.itemsize]
    yield f"- weights in {dtype}, AdamW's two moments in float32; * marks the run's own ZeRO stage"
    if plan.offload != "none":
        host = on_host(plan.parameters, zero=plan.zero, itemsize=plan.itemsize, offload=plan.offload)
        yield f"- offloaded to the host: {plan.offload}; {host / GB:.0f} GB of its memory, for all GPUs together"
    yield (
        f"- memory: a sample of {work.longest:,} tokens, {work.map_tokens:,} of them visual and none sampled away "
        f"({work.tiles} tiles), as a selector that has not learned yet may leave them"
    )
    yield (
        f"- attention that keeps no matrix of scores; DeepSpeed's buckets of {BUCKET:.0e} numbers, CUDA and NCCL under "
        "buffers; nothing for fragments: leave some GB free"
    )
    yield (
        f"- hours: a sample of one {width} x {height} image, {visual:,} visual tokens before the samplers, and "
        f"{plan.text_tokens} words, {plan.answer_tokens} of them answers"
    )
    yield (
        f"- {plan.utilisation:.0%} of {PEAK[plan.gpu] / 1e12:.0f} x 10^12 bf16 operations a second reached, the "
        "recomputed ones counted, and never a wait for data"
    )
    if plan.uncounted:
        yield f"- samples: as the data's file states them; not those of {', '.join(plan.uncounted)}, see --samples"
    if plan.vision_share < 1 or plan.cuts:
        kept = [f"the vision-guided sampler leaves {plan.vision_share:.0%}"] if plan.vision_share < 1 else []
        if plan.cuts:
            first, last = plan.cuts
            kept.append(f"{plan.text_share:.0%} of what reaches layer {first} to {last}, each as often, goes on")
        yield f"- samplers: {', '.join(kept)}"


def _table(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        aligned = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join(aligned).rstrip()


def _gb(size: int) -> str:
    return f"{size / GB:.1f}" if size else "-"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,}"
