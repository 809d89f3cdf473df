"""The paper's tables, 1 to 8, with the paper's own figures."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.study.rows import CONTROLS, Claim, Row, Table
from evaluation.study.settings import OURS

FOUR = ("TextVQA", "MME", "ScienceQA", "GQA")
TEN = ("VQAT", "SQA", "GQA", "POPE", "MM-Vet", "LLaVAW", "MMEP", "MMEC", "MMB", "MMBC")


def _figures(columns: Sequence[str], *values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(columns, values, strict=True) if value is not None}


def _four(*values: float) -> dict[str, float]:
    return _figures(FOUR, *values)


_BASELINE, _VISION_PAPER = _four(65.5, 1562, 76.4, 61.7), _four(65.2, 1590, 77.8, 62.3)
_SAMPLERS = ("Vision tokens", "Speed", *FOUR)

PAPER_TABLES = (
    Table(
        number=1,
        title="Main comparison",
        compared=(
            "Ways to spend fewer visual tokens. Rivals on the feature map leave a quarter of it, as 2x2 pooling "
            "does, and a newline for four of its rows, where both samplers have one for each row in which a token "
            "begins; rivals inside the language model come out with the converted share of both samplers. The vision "
            "tower here was trained on patches alone, so that its CLS token has not learned to look: PruMerge+ and "
            "VisionZip, which read its attention, run a second time on that of the patches, as VisionZip does for "
            "towers without such a token."
        ),
        columns=TEN,
        rows=(
            Row(setting="off", label="LLaVA-NeXT (Ours)",
                paper=_figures(TEN, 69.4, 77.3, 65.7, 86.9, 40.6, 64.7, 1558, 334, 74.2, 70.1)),
            Row(setting=OURS, label="FocusLLaVA (Ours)",
                paper=_figures(TEN, 70.0, 79.0, 66.0, 87.7, 41.3, 65.6, 1600, 328, 74.7, 70.3)),
            Row(setting="vision", label="FocusLLaVA, vision-guided sampler alone"),
            # The paper prints fewer columns in this row than the table has; only these are certain.
            Row(setting="prumerge_plus", label="LLaVA-PruMerge+",
                paper={"VQAT": 57.1, "SQA": 68.3, "POPE": 84.0, "MMEP": 1462, "MMB": 64.9}),
            Row(setting="trim", label="TRIM",
                paper=_figures(TEN, None, 69.1, 61.4, 85.3, 28.0, 58.7, 1461, None, 67.4, 54.9)),
            Row(setting="visionzip", label="VisionZip"),
            Row(setting="prumerge_plus_patches", label="PruMerge+, attention of the patches"),
            Row(setting="visionzip_patches", label="VisionZip, attention of the patches"),
            Row(setting="top_similarity", label="top similarity"),
            Row(setting="fastv", label="FastV"),
            Row(setting="pyramid_drop", label="PyramidDrop"),
            *CONTROLS,
        ),
        claims=(
            Claim(better=OURS, worse="off", group="all"),
            Claim(better=OURS, worse="prumerge_plus", group="all"),
            *(Claim(better=OURS, worse=rival, group="all", source="expected")
              for rival in ("visionzip", "visionzip_patches", "prumerge_plus_patches", "fastv", "pyramid_drop",
                            "random", "uniform_mean", "uniform_max")),
        ),
    ),
    Table(
        number=2,
        title="The two samplers",
        compared=(
            "Which samplers are on, in training and in evaluation. The vision-guided one is set to leave less of "
            "the map by itself than beside the text-guided one, so that both rows cost about the same."
        ),
        columns=_SAMPLERS,
        rows=(
            Row(setting="off", label="Baseline", paper=_figures(_SAMPLERS, 100, 2.85, 65.5, 1562, 76.4, 61.7)),
            Row(setting="vision", label="Vision", paper=_figures(_SAMPLERS, 49, 3.76, 65.2, 1590, 77.8, 62.3)),
            Row(setting="text", label="Text", paper=_figures(_SAMPLERS, 81, 3.19, 65.4, 1603, 76.9, 62.1)),
            Row(setting=OURS, label="Both", paper=_figures(_SAMPLERS, 39, 4.01, 65.9, 1597, 78.1, 62.6)),
            *CONTROLS,
        ),
        claims=(
            Claim(better=OURS, worse="off", group="all"),
            Claim(better="vision", worse="off", group="coarse"),
            Claim(better="text", worse="off", group="coarse"),
            Claim(better=OURS, worse="vision", group="all"),
            Claim(better=OURS, worse="text", group="fine"),
        ),
    ),
    Table(
        number=3,
        title="More scales",
        compared="Pooling kernels of the vision-guided sampler, at about equal tokens.",
        columns=FOUR,
        rows=(
            Row(setting="off", label="Baseline", paper=_BASELINE),
            Row(setting="vision", label="3-branch*", paper=_VISION_PAPER),
            Row(setting="branches_7", label="7-branch", paper=_four(66.6, 1589, 77.2, 62.4)),
            *CONTROLS,
        ),
        claims=(Claim(better="branches_7", worse="vision", group="fine"),),
    ),
    Table(
        number=4,
        title="Window size of a region",
        compared=(
            "Side of a region, in tokens. Shares aimed at are the same for 4x4, 8x8 and 12x12; a 2x2 window cannot "
            "go below a quarter of the map."
        ),
        columns=FOUR,
        rows=(
            Row(setting="off", label="baseline", paper=_BASELINE),
            Row(setting="window_1", label="1x1", paper=_four(64.5, 1557, 73.9, 61.9)),
            Row(setting="window_2", label="2x2", paper=_four(65.1, 1549, 76.1, 61.7)),
            Row(setting="vision", label="4x4*", paper=_VISION_PAPER),
            Row(setting="window_8", label="8x8", paper=_four(64.9, 1570, 77.2, 61.8)),
            Row(setting="window_12", label="12x12", paper=_four(64.2, 1567, 78.2, 61.5)),
            *CONTROLS,
        ),
        claims=tuple(Claim(better="vision", worse=f"window_{w}", group="all") for w in (1, 2, 8, 12)),
    ),
    Table(
        number=5,
        title="Role of the balance loss",
        compared=(
            "Weight of the balance loss, with the paper's own selector, gate and loss. Our selectors start at 1x1, so "
            "that without the loss the model stays at full resolution: its score is that of more tokens."
        ),
        columns=FOUR,
        rows=(
            Row(setting="balance_none", label="w/o", paper=_four(61.9, 1439, 74.6, 57.1)),
            Row(setting="balance_0.01", label="weight 0.01", paper=_four(63.7, 1537, 75.9, 60.0)),
            Row(setting="balance_0.1", label="weight 0.1*", paper=_VISION_PAPER),
            Row(setting="balance_0.5", label="weight 0.5", paper=_four(65.0, 1576, 76.9, 61.5)),
            *CONTROLS,
        ),
        claims=(
            Claim(better="balance_0.1", worse="balance_none", group="all"),
            Claim(better="balance_0.01", worse="balance_none", group="all"),
            Claim(better="balance_0.1", worse="balance_0.01", group="all"),
            Claim(better="balance_0.1", worse="balance_0.5", group="all"),
        ),
    ),
    Table(
        number=6,
        title="Effect of textual guidance",
        compared="The text-guided sampler in training: not at all, fixed, or at a random layer and threshold.",
        columns=FOUR,
        rows=(
            Row(setting="off", label="Baseline", paper=_BASELINE),
            Row(setting="text_direct", label="Direct", paper=_four(64.9, 1543, 76.6, 60.8)),
            Row(setting="text_train", label="Train", paper=_four(65.3, 1586, 77.3, 61.9)),
            Row(setting="text", label="Random*", paper=_four(65.4, 1603, 76.9, 62.1)),
            *CONTROLS,
        ),
        claims=(
            Claim(better="off", worse="text_direct", group="fine"),
            Claim(better="text_train", worse="text_direct", group="fine"),
            Claim(better="text", worse="text_direct", group="fine"),
            Claim(better="text", worse="off", group="coarse"),
        ),
    ),
    Table(
        number=7,
        title="Hand-made token dropping",
        compared="The share of tokens most like the base tile, against the learned sampler.",
        columns=("Vision tokens", *FOUR),
        rows=(
            Row(setting="off", label="Top-100%", paper={"Vision tokens": 100, **_BASELINE}),
            Row(setting="top_80", label="Top-80%", paper={"Vision tokens": 80, **_four(65.2, 1571, 76.2, 61.3)}),
            Row(setting="top_60", label="Top-60%", paper={"Vision tokens": 60, **_four(64.3, 1549, 75.9, 58.9)}),
            Row(setting="top_40", label="Top-40%", paper={"Vision tokens": 40, **_four(62.6, 1508, 75.2, 58.4)}),
            Row(setting="vision", label="FocusLLaVA", paper={"Vision tokens": 49, **_VISION_PAPER}),
            *CONTROLS,
        ),
        claims=(
            Claim(better="vision", worse="top_40", group="all"),
            Claim(better="vision", worse="top_60", group="all"),
            Claim(better="off", worse="top_40", group="all"),
        ),
    ),
    Table(
        number=8,
        title="Imbalance loss",
        compared="Penalties on 1x1, 2x2 and 4x4 in the balance loss; tokens are free to differ.",
        columns=FOUR,
        rows=(
            Row(setting="off", label="Baseline", paper=_BASELINE),
            Row(setting="imbalance_even", label="[1.0, 1.0, 1.0]", paper=_VISION_PAPER),
            Row(setting="imbalance_coarser", label="[1.1, 1.0, 0.9]", paper=_four(63.7, 1581, 78.0, 61.1)),
            Row(setting="imbalance_finer", label="[0.9, 1.0, 1.1]", paper=_four(65.7, 1587, 76.1, 62.1)),
            *CONTROLS,
        ),
        claims=(
            Claim(better="imbalance_even", worse="imbalance_coarser", group="fine"),
            Claim(better="imbalance_finer", worse="imbalance_even", group="fine"),
            Claim(better="imbalance_even", worse="imbalance_finer", group="coarse"),
        ),
    ),
)  # fmt: skip
