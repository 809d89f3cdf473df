"""What the study compares: the paper's tables, with the paper's own figures, and Tables 9 to 12, which are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from evaluation.study.settings import LONG, OURS, SETTINGS, Setting
from services.common.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Row:
    """A setting in a table."""

    setting: str
    label: str
    """The paper's, or ours for a row that it does not have."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's figures by column; what it does not report is left out."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`better` scores above `worse` on a group of questions."""

    better: str
    worse: str
    group: Literal["all", "fine", "coarse"]
    source: Literal["paper", "expected"] = "paper"
    """Who says so: the paper's table, or the trials that this study follows up."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper, or one of the study's own: 9 to 12."""

    number: int
    title: str
    compared: str
    """What differs between the rows, and how they were made comparable."""
    columns: tuple[str, ...]
    """The paper's; token shares in percent, Speed in the paper's unit."""
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]


CONTROLS = (
    Row(setting="random", label="random tokens"),
    Row(setting="uniform_mean", label="uniform 2x2, average"),
    Row(setting="uniform_max", label="uniform 2x2, max"),
)
"""In every table: simple rules that many published ones do not beat."""

FOUR = ("TextVQA", "MME", "ScienceQA", "GQA")
TEN = ("VQAT", "SQA", "GQA", "POPE", "MM-Vet", "LLaVAW", "MMEP", "MMEC", "MMB", "MMBC")


def _figures(columns: Sequence[str], *values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(columns, values, strict=True) if value is not None}


def _four(*values: float) -> dict[str, float]:
    return _figures(FOUR, *values)


_BASELINE, _VISION_PAPER = _four(65.5, 1562, 76.4, 61.7), _four(65.2, 1590, 77.8, 62.3)
_SAMPLERS = ("Vision tokens", "Speed", *FOUR)

TABLES: dict[int, Table] = {
    table.number: table
    for table in (
        Table(
            number=1,
            title="Main comparison",
            compared=(
                "Ways to spend fewer visual tokens. Rivals on the feature map leave a quarter of it, as 2x2 pooling "
                "does, and a newline for four of its rows, where both samplers have one for each row in which a token "
                "begins; rivals inside the language model come out with the converted share of both samplers."
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
                Row(setting="top_similarity", label="top similarity"),
                Row(setting="fastv", label="FastV"),
                Row(setting="pyramid_drop", label="PyramidDrop"),
                *CONTROLS,
            ),
            claims=(
                Claim(better=OURS, worse="off", group="all"),
                Claim(better=OURS, worse="prumerge_plus", group="all"),
                *(Claim(better=OURS, worse=rival, group="all", source="expected")
                  for rival in ("visionzip", "fastv", "pyramid_drop", "random", "uniform_mean", "uniform_max")),
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
            compared="Weight of the balance loss, with the paper's own selector, gate and loss.",
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
        Table(
            number=9,
            title="The gate",
            compared=(
                "How the selector learns and what it sees, at about equal tokens, with controls that tell a selector "
                "that looks from one that is lucky. From the similarity to the base tile the two gates that were run "
                "learned to leave out next to nothing in the study's steps, so their rows are not at equal tokens. "
                "Tokens go region by region; selector and controls were not compared in rows. Not in the paper."
            ),
            columns=(),
            rows=(
                Row(setting="off", label="full resolution"),
                Row(setting="vision", label="counterfactual gate, region"),
                Row(setting="gate_counterfactual_base_tile", label="counterfactual gate, base tile"),
                Row(setting="gate_straight_through_region", label="straight-through gate, region"),
                Row(setting="gate_straight_through_base_tile", label="straight-through gate, base tile"),
                Row(setting="gate_paper_region", label="the paper's gate, region"),
                Row(setting="gate_paper_base_tile", label="the paper's gate, base tile"),
                Row(setting="balance_0.1", label="the paper as written (tokens free to differ)"),
                Row(setting="random_branches", label="random branches"),
                Row(setting="uniform_branches", label="every region at 2x2"),
                Row(setting="permuted_branches", label="the learned branches, permuted"),
                Row(setting="no_task_gradient", label="no task gradient"),
                Row(setting="oracle", label="oracle"),
                *CONTROLS,
            ),
            claims=(
                *(Claim(better="vision", worse=control, group="fine", source="expected")
                  for control in ("random_branches", "permuted_branches", "no_task_gradient", "uniform_branches",
                                  "uniform_mean", "uniform_max", "random", "gate_paper_region",
                                  "gate_straight_through_region")),
                Claim(better="gate_counterfactual_base_tile", worse="gate_paper_base_tile", group="fine",
                      source="expected"),
            ),
        ),
        Table(
            number=10,
            title="The order of sampled tokens",
            compared=(
                "How the vision-guided sampler's tokens follow each other: region by region, or by the row of the map "
                "in which they begin, each row closed by a newline as in LLaVA-NeXT. The paper does not say. The other "
                "tables have what was better on the validation split, by less than two standard errors either way: "
                "rows with both samplers, which leave more than half of the map, regions where the vision-guided one "
                "works alone and leaves a quarter."
            ),
            columns=(),
            rows=(
                Row(setting="off", label="full resolution"),
                Row(setting=OURS, label="both samplers, rows"),
                Row(setting=f"{OURS}_region", label="both samplers, region by region"),
                Row(setting="vision_row", label="vision-guided sampler, rows"),
                Row(setting="vision", label="vision-guided sampler, region by region"),
                *CONTROLS,
            ),
            claims=(
                Claim(better=OURS, worse=f"{OURS}_region", group="all", source="expected"),
                Claim(better="vision_row", worse="vision", group="all", source="expected"),
            ),
        ),
        Table(
            number=11,
            title="Longer training",
            compared=(
                "Twice the steps, for all alike; the selector learns in the first 150 and rests. What it leaves "
                "differs from seed to seed (46, 57 and 65 % of the map), and the more the better the score; set after "
                "training, on images of the validation split, all leave 60 %. Held, every batch after step 150 leaves "
                "66 %, without the balance loss; learning on from the task alone, the selector then gives up 4x4 for "
                "2x2. On the validation split the held ones are 0.5 points behind full resolution, those set "
                "afterwards 0.3. The shares and the text-guided sampler's thresholds were chosen on the validation "
                "split. Both samplers start from a model that has only seen whole maps and have more to learn than the "
                "model without them. The controls were trained as long as everywhere else."
            ),
            columns=(),
            rows=(
                Row(setting="off", label="full resolution, the study's steps"),
                Row(setting=f"off{LONG}", label="full resolution, twice the steps"),
                Row(setting=OURS, label="both samplers, the study's steps"),
                Row(setting=f"{OURS}{LONG}", label="both samplers, twice the steps"),
                Row(setting=f"{OURS}_more{LONG}", label="the same weights, threshold 0.995"),
                Row(setting=f"{OURS}_set{LONG}", label="the same, set to 60 % of the map, threshold 0.995"),
                Row(setting=f"{OURS}_set_most{LONG}", label="the same, set to 60 % of the map, threshold 0.999"),
                Row(setting=f"{OURS}_held{LONG}", label="held at 66 % of the map, learning on, threshold 0.995"),
                Row(setting="pyramid_drop", label="PyramidDrop, the study's steps"),
                Row(setting=f"pyramid_drop{LONG}", label="PyramidDrop, twice the steps"),
                *CONTROLS,
            ),
            claims=(
                Claim(better=f"{OURS}{LONG}", worse=OURS, group="all", source="expected"),
                Claim(better=f"{OURS}{LONG}", worse=f"off{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}{LONG}", worse=f"off{LONG}", group="fine", source="expected"),
                Claim(better=f"{OURS}_more{LONG}", worse=f"off{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}_set{LONG}", worse=f"{OURS}_more{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}_set_most{LONG}", worse=f"off{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}_held{LONG}", worse=f"off{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}_held{LONG}", worse=f"{OURS}_set{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}{LONG}", worse=f"pyramid_drop{LONG}", group="all", source="expected"),
            ),
        ),
        Table(
            number=12,
            title="Longer training, what else was tried",
            compared=(
                "As Table 11. Where the whole encoder rests, learning ever slower for 50 steps before, what is chosen "
                "stays, and the model learns less. Few regions at 4x4 were to help counting, after the seed "
                "that had fewest of three counted best: they do not. Nor do more regions at 1x1 in training, higher "
                "thresholds there, or a text-guided sampler a layer later (a seed each). Held at its share, a selector "
                "at rest does as well as one that learns on (a seed)."
            ),
            columns=(),
            rows=(
                Row(setting=f"off{LONG}", label="full resolution, twice the steps"),
                Row(setting=f"{OURS}_more{LONG}", label="both samplers, twice the steps, threshold 0.995"),
                Row(setting=f"{OURS}_held{LONG}", label="held at 66 % of the map, learning on, threshold 0.995"),
                Row(setting=f"{OURS}_held_rest{LONG}", label="held at 66 % of the map, at rest, threshold 0.995"),
                Row(setting=f"{OURS}_rest{LONG}", label="the encoder at rest, threshold 0.995"),
                Row(setting=f"{OURS}_count{LONG}", label="few regions at 4x4, threshold 0.995"),
                Row(setting=f"{OURS}_fine{LONG}", label="more regions at 1x1, threshold 0.995"),
                Row(setting=f"{OURS}_high{LONG}", label="thresholds of 0.99 to 1 in training, 0.997"),
                Row(setting=f"{OURS}_late{LONG}", label="text-guided sampler before layer 4 of 6, 0.98"),
                *CONTROLS,
            ),
            claims=(
                Claim(better=f"{OURS}_held{LONG}", worse=f"{OURS}_held_rest{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}_rest{LONG}", worse=f"{OURS}_more{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}_count{LONG}", worse=f"{OURS}_more{LONG}", group="all", source="expected"),
                Claim(better=f"{OURS}_count{LONG}", worse=f"off{LONG}", group="all", source="expected"),
            ),
        ),
    )
}  # fmt: skip

FIGURES: dict[int, tuple[str, ...]] = {
    2: ("off", "text_layer_1", "text_layer_2", "text", "text_layer_4", "text_layer_5"),
    3: ("vision",),
    **{number: (OURS,) for number in range(4, 11)},
}
"""Settings that a figure of the paper shows."""


def settings_of(table: int | None = None, figure: int | None = None) -> list[Setting]:
    """Those of a table or figure, of all when neither is named, in a runnable order: what another needs stands first.

    Without a table or figure the gate's come first, then the two samplers and their rivals, then the rest. Settings
    that cannot run are left out. Raises InvalidInput for a number that the paper and this study do not have.
    """
    if table is not None and table not in TABLES:
        raise InvalidInput(f"is {table}, expected 1..{max(TABLES)}", field="table")
    if figure is not None and figure not in FIGURES:
        raise InvalidInput(f"is {figure}, expected {min(FIGURES)}..{max(FIGURES)}", field="figure")
    if table is None and figure is None:
        names = [row.setting for number in (9, 2, 1, 10, 11, *range(3, 9), 12) for row in TABLES[number].rows]
        names += [name for number in FIGURES for name in FIGURES[number]]
    else:
        names = [row.setting for row in TABLES[table].rows] if table is not None else []
        names += FIGURES[figure] if figure is not None else ()
    ordered: dict[str, Setting] = {}
    for name in names:
        _add(ordered, SETTINGS[name])
    return [setting for setting in ordered.values() if not setting.unavailable]


def _add(ordered: dict[str, Setting], setting: Setting) -> None:
    for name in setting.needs:
        _add(ordered, SETTINGS[name])
    ordered.setdefault(setting.name, setting)
