"""The share of a feature map that the vision-guided sampler leaves, set after training."""

from __future__ import annotations

import io
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from services.checkpoint.config import FocusLlavaConfig, VisionSamplerConfig
from services.checkpoint.store import load_stage, verify
from services.common.errors import InvalidInput
from services.encoder.pipeline import EncoderPipeline
from services.sampler.calibration import finer_for_share, set_branch_shares, set_map_share, tokens_by_branch
from services.sampler.vision_guided import VisionGuidedSampler
from tests.tiny_checkpoints import make_random_checkpoint
from training.calibrate import calibrate, main

WIDTH = 8
SIZES = ((24, 24), (9, 14))
BRANCHES = {
    "three": ((1, 1), (2, 2), (4, 4)),
    "seven": ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (4, 4)),
    "keep or drop": ((1, 1), (0, 0)),
}


def built(branches: str, std: float = 0.3) -> VisionGuidedSampler:
    torch.manual_seed(0)
    window = 1 if branches == "keep or drop" else 4
    sampler = VisionGuidedSampler(
        WIDTH, 4, window=window, branches=BRANCHES[branches], selector_input="region", selector_temperature=3.0
    )
    torch.nn.init.normal_(sampler.selector.linear.weight, std=std)
    return sampler


def looks(sampler: VisionGuidedSampler) -> list[tuple[torch.Tensor, tuple[int, int]]]:
    """The sampler's logits for random maps, and their sizes."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(*size, WIDTH, generator=generator) for size in SIZES]
    with torch.no_grad():
        return [(sampler(m, torch.zeros(4, WIDTH), torch.zeros(WIDTH)).logits_MK, m.shape[:2]) for m in maps]


def emitted(sampler: VisionGuidedSampler, **options: float) -> int:
    """Tokens that the sampler makes of the same maps, newlines not counted."""
    generator = torch.Generator().manual_seed(1)
    total = 0
    rest = torch.zeros(4, WIDTH), torch.zeros(WIDTH)
    for size in SIZES:
        sampled = sampler(torch.randn(*size, WIDTH, generator=generator), *rest, **options)
        total += len(sampled.tokens_ND) - sampled.newlines
    return total


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.85, 1.0])
def test_the_sampler_then_leaves_the_share(branches: str, share: float) -> None:
    sampler, cells = built(branches), sum(height * width for height, width in SIZES)
    met = set_map_share(sampler, looks(sampler), share)
    assert met <= share and share - met < 0.05, "a region is at most 16 of 702 tokens"
    with torch.no_grad():
        assert abs(emitted(sampler) - met * cells) <= 16, "one region may lie on the line"


@pytest.mark.parametrize("branches", BRANCHES)
def test_moved_for_one_batch_it_chooses_as_with_its_biases_set(branches: str) -> None:
    sampler, (height, width) = built(branches), SIZES[0]
    map_HWD = torch.randn(height, width, WIDTH, generator=torch.Generator().manual_seed(1))
    finer = finer_for_share(sampler, looks(sampler), 0.7)
    rest = torch.zeros(4, WIDTH), torch.zeros(WIDTH)
    with torch.no_grad():
        as_it_is, moved = sampler(map_HWD, *rest), sampler(map_HWD, *rest, finer=finer)
        set_map_share(sampler, looks(sampler), 0.7)
        after = sampler(map_HWD, *rest)
    assert torch.equal(moved.branch_ids_M, after.branch_ids_M)
    assert not torch.equal(moved.branch_ids_M, as_it_is.branch_ids_M)
    torch.testing.assert_close(moved.probs_MK, after.probs_MK, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.8, 1.0])
def test_a_saturated_selector_is_set_like_another(branches: str, share: float) -> None:
    """Its p are zeros and ones, and its logits farther apart than any fixed range of biases."""
    sampler, cells = built(branches, std=50.0), sum(height * width for height, width in SIZES)
    assert all((logits_MK.softmax(1) == 0).any() for logits_MK, _ in looks(sampler))
    finer = finer_for_share(sampler, looks(sampler), share)
    with torch.no_grad():
        held = emitted(sampler, finer=finer) / cells
        met = set_map_share(sampler, looks(sampler), share)
        assert share - 0.05 < met <= share and share - 0.05 < held <= share
        assert emitted(sampler) / cells == pytest.approx(met, abs=16 / cells), "one region may lie on the line"


@pytest.mark.parametrize(
    ("branches", "shares"),
    [
        ("three", (0.5, 0.1, 0.4)),
        ("three", (0.6, 0.0, 0.4)),
        ("three", (0.0, 0.0, 1.0)),
        ("three", (1.0, 0.0, 0.0)),
        ("seven", (0.3, 0.1, 0.1, 0.2, 0.0, 0.1, 0.2)),
        ("keep or drop", (0.25, 0.75)),
    ],
)
@pytest.mark.parametrize("std", [0.3, 50.0])
def test_each_branch_gets_its_share_of_the_regions(branches: str, shares: tuple[float, ...], std: float) -> None:
    sampler = built(branches, std)
    left = set_branch_shares(sampler, looks(sampler), shares)
    chosen_M = torch.cat([logits_MK.argmax(1) for logits_MK, _ in looks(sampler)])
    counts_K = chosen_M.bincount(minlength=len(shares))
    for count, share in zip(counts_K.tolist()[1:], shares[1:], strict=True):
        assert share * len(chosen_M) - 2 < count <= share * len(chosen_M) + 1e-6
    cells = sum(height * width for height, width in SIZES)
    with torch.no_grad():
        assert emitted(sampler) == pytest.approx(left * cells)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.2, 0.2), (1.2, -0.2, 0.0), (float("nan"), 0.5, 0.5)])
def test_shares_that_are_none_are_named(shares: tuple[float, ...]) -> None:
    sampler = built("three")
    before = sampler.selector.linear.bias.clone()
    with pytest.raises(InvalidInput, match="shares: is .* expected 3 that add up to 1, none below 0"):
        set_branch_shares(sampler, looks(sampler), shares)
    with pytest.raises(InvalidInput, match="seen: is empty"):
        set_branch_shares(sampler, [], (0.5, 0.1, 0.4))
    assert torch.equal(sampler.selector.linear.bias, before)


def test_regions_keep_their_order() -> None:
    """What was finer before is not coarser than its like after."""
    finest = []
    for share in (0.3, 0.5, 0.7, 0.9):
        sampler = built("three")
        set_map_share(sampler, looks(sampler), share)
        finest.append({i for i, p in enumerate(looks(sampler)[0][0].argmax(1).tolist()) if p == 0})
    assert finest[0] < finest[1] < finest[2] < finest[3]


def test_tokens_of_partial_regions_are_those_that_are_real() -> None:
    tokens_MK = tokens_by_branch((5, 6), built("three"))
    assert tokens_MK.tolist() == [[16, 4, 1], [8, 2, 1], [4, 2, 1], [2, 1, 1]]


def test_a_share_that_cannot_be_is_named() -> None:
    sampler = built("three")
    before = sampler.selector.linear.bias.clone()
    for share in (0.01, 1.5, float("nan")):
        with pytest.raises(InvalidInput, match=f"share: is {share}, expected 0.0"):
            set_map_share(sampler, looks(sampler), share)
    with pytest.raises(InvalidInput, match="seen: is empty"):
        set_map_share(sampler, [], 0.5)
    assert torch.equal(sampler.selector.linear.bias, before)


def picture(seed: int) -> bytes:
    file, random = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    make_random_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "images").mkdir()
    for seed in range(3):
        (tmp_path / "images" / f"{seed}.png").write_bytes(picture(seed))
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments)])
    main()


@pytest.mark.parametrize("asked", [("--map-share", 0.5), ("--branch-shares", 0.4, 0.1, 0.5)])
def test_a_checkpoint_is_set_by_one_command(
    asked: tuple[object, ...], folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, made = folder / "checkpoint", folder / "made"
    command(monkeypatch, source, made, "--images", folder / "images", *asked)
    assert "% of the feature map" in capsys.readouterr().out
    assert verify(made) != verify(source)
    assert FocusLlavaConfig.load(made).to_dict() == FocusLlavaConfig.load(source).to_dict()
    old, new = load_stage(source, "encoder"), load_stage(made, "encoder")
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        "vision_guided_sampler.selector.linear.bias"
    }
    pipeline = EncoderPipeline.from_checkpoint(made)
    images = pipeline.encode([pipeline.prepare(picture(seed)) for seed in range(3)], [True] * 3)
    sampled = sum(len(image.tokens_ND) for image in images)
    assert sampled < sum(image.uncompressed_tokens for image in images)
    shutil.rmtree(source)
    assert verify(made)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_share_reported_is_what_the_stored_biases_leave(
    share: float, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds even where weights are stored in bfloat16 and this machine computes in float32."""
    monkeypatch.setattr("services.encoder.pipeline.dtype_of_stored", lambda *_: torch.float32)
    sampler = VisionSamplerConfig(base_grid=(4, 4))  # raw inner products, which saturate
    make_random_checkpoint(tmp_path / "checkpoint", dtype="bfloat16", vision_sampler=sampler)
    images = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, image in enumerate(images):
        image.write_bytes(picture(seed))
    met = calibrate(tmp_path / "checkpoint", tmp_path / "made", images, share)
    pipeline = EncoderPipeline.from_checkpoint(tmp_path / "made")
    with torch.inference_mode():
        encoded = pipeline.model([pipeline.prepare(image.read_bytes()).tiles for image in images], [True] * 3)
    cells = sum(image.map_hw[0] * image.map_hw[1] for image in encoded)
    assert sum(image.map_tokens for image in encoded) / cells == pytest.approx(met) and met <= share


def test_what_cannot_be_calibrated_is_named(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, broken = folder / "checkpoint", folder / "broken"
    broken.mkdir()
    (broken / "1.png").write_bytes(picture(0)[:500])
    for arguments, message in (
        (("--images", folder / "nowhere", "--map-share", 0.5), "--images: holds no image"),
        (("--images", folder / "images", "--map-share", 2), "share: is 2.0"),
        (("--images", folder / "images", "--branch-shares", 0.5, 0.5), "shares: is"),
        (("--images", source, "--map-share", 0.5), "--images: holds no image"),
        (("--images", broken, "--map-share", 0.5), "--images: 1.png: "),
    ):
        with pytest.raises(SystemExit, match=f"calibrate: {message}"):
            command(monkeypatch, source, folder / "made", *arguments)
    assert not (folder / "made").exists()
