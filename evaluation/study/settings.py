"""What the study trains: its settings, each a way to train and to evaluate the model.

The paper's model has 32 layers and maps of up to 96 x 96 tokens; that of the study 6 layers and 24 x 24. Layers drawn
in training are scaled by 6/32 (8 -> 2, 24 -> 4), the rest is taken as it is. All settings share data, steps, seeds and
start; the vision-guided sampler starts fresh in each, whatever the start knew of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

START = "start"
"""In `Setting.weights_of`: the start itself."""
LAYER, THRESHOLD = 3, 0.98
"""Where the text-guided sampler is evaluated, unless a setting says otherwise. Half-way, a layer later than the paper's
scaled: on 100 validation images both samplers lost 1.7 points more before layer 2. The paper's 0.85 keeps four in five
tokens; here, where pre-training has taught attention to be narrow, one in forty."""
SHARES = (0.17, 0.14, 0.69)
"""Shares of regions at 1x1, 2x2 and 4x4 where the balance loss is level: 25 % of the map's tokens, as 2x2 pooling."""
SHARES_BOTH = (0.5, 0.2, 0.3)
"""The same with both samplers, 57 % of the map: the paper's 49 % of the tokens, of which the text-guided one then takes
what the question does not need."""
SHARES_REST = (0.66, 0.18, 0.16)
"""Shares for an encoder that rests slowly, 77 % of the visual tokens. A selector that rests at once was to leave 64 %
and, with the features learning on, left 55 to 71: the seed with the most was the best on all questions."""
SHARES_FINE = (0.6, 0.2, 0.2)
"""66 % of the map. Of three seeds trained for SHARES_BOTH the one with the most tokens, 65 %, lost nothing on the
validation split, and the one with the fewest, 46 %, lost the most."""
SHARES_COUNT = (0.55, 0.35, 0.1)
"""64 % of the map, few regions at 4x4. Of three seeds trained for SHARES_BOTH, with 14, 34 and 54 % of regions there,
the first counted best and the last worst, but that was chance: with 16 and 1 % two seeds counted no better."""
RIVAL_BUDGET = 0.25
"""Share of the map, for rivals outside the LLM: what 2x2 pooling leaves, 35 % of all visual tokens with the base
tile's; both samplers end at as many, converted."""
LEAST_LAYER_BUDGET = 0.2
"""Converted share of a rival inside the language model: its first layer of six sees all tokens, 17 % by itself."""

STAGE: dict[str, Any] = {
    "data": "posters",
    "questions_per_image": 8,
    "kind_weights": {"presence": 0.5},
    "vision_sampler": False,
    "fresh_selector": True,
}
"""Fields of `training.joint_stage.JointStage` that every setting starts from."""
OPTIMIZER: dict[str, Any] = {
    "learning_rate": 4e-4,
    "betas": [0.9, 0.98],
    "weight_decay": 0.02,
    "warmup_steps": 20,
    "selector_lr_scale": 0.2,
    "vision_lr_scale": 0.2,
}
"""A fast selector goes coarse in its first 20 steps, before the task can tell it where detail matters: at 4 times the
learning rate one seed of three never read tables again."""
IMAGES_PER_STEP = 8
SELECTOR_STEPS = 150
"""Steps in a longer run. Once questions are learned, only the balance loss moves the selector: in 400 steps it took
detail from fine questions again, 92 to 89 % of them right."""
REST_COOLDOWN = 50
"""Steps before a rest in which the learning rate falls to zero, or it is chance where the selector's swings end."""
BALANCE_WARMUP = 60
"""Steps in which the balance loss of our selectors gets its weight. With all of it at once no region was left at 1x1 by
step 80, the model learned to read what is pooled, and glyphs ended in the coarsest regions of all."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train and to evaluate the model."""

    name: str
    title: str
    stage: Mapping[str, Any] = field(default_factory=dict)
    """Over STAGE, mappings merged field by field; with `weights_of`, over that setting's and when evaluated only."""
    text: tuple[int, float] | None = None
    """Layer and threshold of the text-guided sampler when evaluated; None leaves it off."""
    map_share: float | None = None
    """Share of the feature map that the selector is set to leave after training, on validation images; or as it is."""
    permuted: bool = False
    """Evaluated with the branches that the selector chose dealt to the regions anew, at random, image by image."""
    weights_of: str = ""
    """The setting whose trained weights are evaluated as they are, or START; empty trains its own."""
    times: int = 1
    """How many times the study's steps it is trained."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Over OPTIMIZER."""
    match: str = ""
    """The setting that this one's tokens are made equal to, seed by seed: its result on the validation split gives the
    budget or the shares that `stage` leaves out."""
    unavailable: str = ""
    """Why it cannot run with this model; empty when it can."""

    @property
    def train(self) -> bool:
        return not self.weights_of

    @property
    def selects(self) -> bool:
        """Whether a selector is trained."""
        control = self.stage.get("branch_control", {}).get("name", "no_task_gradient")
        return bool(self.stage.get("vision_sampler")) and control == "no_task_gradient"

    @property
    def needs(self) -> tuple[str, ...]:
        """Settings whose result or weights come first."""
        return tuple(dict.fromkeys(name for name in (self.weights_of, self.match) if name and name != START))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`; where both hold a mapping, field by field."""
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def coefficients(shares: Sequence[float]) -> list[float]:
    """c of Eq. 10 for which the loss is level where branches are used with these shares: c_k ~ 1 / share_k, sum K."""
    inverse = [1 / share for share in shares]
    return [round(len(inverse) * value / sum(inverse), 4) for value in inverse]


def _vision(gate: str = "counterfactual", selector: str = "region", *, shares: Sequence[float] = SHARES,
            order: str = "region", **sampler: Any) -> dict[str, Any]:  # fmt: skip
    """Stage of a vision-guided sampler; `sampler` are fields of VisionSamplerConfig."""
    fields: dict[str, Any] = {
        "window": 4,
        "branches": [[1, 1], [2, 2], [4, 4]],
        "selector_input": selector,
        "similarity": "normalized",
        "region_pool": "max",
        "probability_gate": gate,
        "selector_temperature": 3.0,
        "balance_coefficients": coefficients(shares),
    }
    if order != "region":
        fields["token_order"] = order
    return {
        "vision_sampler": True,
        "loss": {"balance": 0.1, "balance_warmup": BALANCE_WARMUP},
        "model": {"vision_sampler": {**fields, **sampler}},
    }


def _as_written(weight: float) -> dict[str, Any]:
    """The paper to the letter: inner products with the base tile, Eq. 2, Eq. 3, one weight from the first step on."""
    stage = _vision("paper", "base_tile", similarity="inner_product", region_pool="mean",
                    selector_temperature=1.0, balance_coefficients=[1.0, 1.0, 1.0])  # fmt: skip
    return {**stage, "loss": {"balance": weight}}


def _map_rival(name: str, budget: float = RIVAL_BUDGET, **options: Any) -> dict[str, Any]:
    # A newline for each row of regions, as the sampler alone pays; in rows, up to four.
    return {"map_rival": {"name": name, "newline_rows": 4, "budget": budget, **options}}


def _control(name: str, **options: Any) -> dict[str, Any]:
    return {**_vision(), "branch_control": {"name": name, **options}}


def _pruned(layers: tuple[int, int], thresholds: tuple[float, float]) -> dict[str, Any]:
    """Stage of a text-guided sampler."""
    return {"prune": {"layers": list(layers), "thresholds": list(thresholds)}, "model": TEXT_SAMPLER}


# The user's words alone drop the shapes that are to be counted: the tokens between question and answer do that.
TEXT_SAMPLER = {"text_sampler": {"instruction": "to_answer", "layer": LAYER, "threshold": THRESHOLD}}
RANDOM_PRUNE = _pruned((2, 4), (0.9, 1.0))
FIXED_PRUNE = _pruned((LAYER, LAYER), (0.97, 1.0))
"""What both samplers are trained with. Counting reads how attention is shared out, which each layer's pruning changes
in its own way: 200 steps are too few to learn it for all of them."""
LATE_PRUNE = _pruned((LAYER + 1, LAYER + 1), (0.97, 1.0))
HIGH_PRUNE = _pruned((LAYER, LAYER), (0.99, 1.0))
TEXT = (LAYER, THRESHOLD)
TEXT_MORE = (LAYER, 0.995)
"""Enough to count by. Of 0.98, 0.99, 0.995, 0.999 and 1 it was the best on the validation split for both samplers
trained twice as long (one seed): 81.5 % of counts right, 75.5 at 0.98, 78.8 with all kept, for 3 % more tokens."""
MAP_SHARE = 0.6
"""What selectors are set to leave after training, all seeds alike: left alone, three seeds trained for 57 % left 46 to
65. Of 0.6, 0.66, 0.72 and 0.8 it was as good as any on the validation split (0.995; two seeds, the last two of one)."""
HOLD = {"share": 0.66, "after": SELECTOR_STEPS}
"""Held share of longer runs: with FIXED_PRUNE at TEXT_MORE about 42 % of the tokens, as the seed that lost least."""
LONG = "_long"
"""Ending of the name of a setting that is trained twice as long."""
OURS = "both"
"""Both samplers: what the study is about."""
KEEP: dict[str, Any] = {"window": 1, "branches": [[1, 1], [0, 0]]}
BRANCHES_7 = [[1, 1], [2, 1], [1, 2], [2, 2], [4, 2], [2, 4], [4, 4]]
SHARES_7 = (0.12, 0.04, 0.04, 0.1, 0.04, 0.04, 0.62)

_ALL = (
    Setting(name="off", title="no sampler"),
    Setting(name="vision", title="vision-guided sampler", stage=_vision()),
    Setting(name="text", title="text-guided sampler", stage=RANDOM_PRUNE, text=TEXT),
    Setting(name=OURS, title="both samplers",
            stage=merged(_vision(shares=SHARES_BOTH, order="row"), FIXED_PRUNE), text=TEXT),
    # The order of the tokens: rows where most of the map stays, as measured on the validation split.
    Setting(name="vision_row", title="vision-guided sampler, tokens row by row", stage=_vision(order="row")),
    Setting(name=f"{OURS}_region", title="both samplers, tokens region by region",
            stage=merged(_vision(shares=SHARES_BOTH), FIXED_PRUNE), text=TEXT),
    # A window of one token, kept or dropped.
    Setting(name=f"{OURS}_keep", title="both samplers, keep or drop",
            stage=merged(_vision(**KEEP, shares=(0.5, 0.5), order="row"), FIXED_PRUNE), text=TEXT),
    Setting(name=f"{OURS}_keep_more", title="both samplers, keep or drop, threshold 0.995", weights_of=f"{OURS}_keep",
            text=TEXT_MORE),
    # Twice the steps of it, held near 38 % of the tokens.
    *(Setting(name=f"{OURS}_keep_{name}{LONG}", times=2, text=(layer, TEXT_MORE[1]),
              title="both samplers, keep or drop, twice the steps, "
                    f"held at {100 * share:.0f} % of the map, layer {layer}",
              stage=merged(_vision(**KEEP, shares=(share, 1 - share), order="row"),
                           {**prune, "hold": {"share": share, "after": SELECTOR_STEPS}}))
      for name, layer, share, prune in (("held", LAYER, 0.58, FIXED_PRUNE), ("late", LAYER + 1, 0.42, LATE_PRUNE))),
    Setting(name=f"{OURS}_keep_gradual{LONG}", times=2, text=TEXT_MORE,
            title="both samplers, keep or drop, twice the steps, falling to 58 % of the map in 200",
            stage=merged(_vision(**KEEP, shares=(0.5, 0.5), order="row"),
                         {**FIXED_PRUNE, "hold": {"share": 0.58, "after": 200, "falls_from": 10}})),
    # Twice the steps.
    Setting(name=f"off{LONG}", title="no sampler, twice the steps", times=2),
    Setting(name=f"{OURS}{LONG}", title="both samplers, twice the steps, the selector at rest after 150", times=2,
            optimizer={"selector_steps": SELECTOR_STEPS},
            stage=merged(_vision(shares=SHARES_BOTH, order="row"), FIXED_PRUNE), text=TEXT),
    Setting(name=f"{OURS}_more{LONG}", title="both samplers, twice the steps, threshold 0.995",
            weights_of=f"{OURS}{LONG}", text=TEXT_MORE),
    Setting(name=f"{OURS}_rest{LONG}", times=2,
            title="both samplers, twice the steps, the encoder at rest after 150, threshold 0.995",
            optimizer={"encoder_steps": SELECTOR_STEPS, "rest_cooldown": REST_COOLDOWN},
            stage=merged(_vision(shares=SHARES_REST, order="row"), FIXED_PRUNE), text=TEXT_MORE),
    Setting(name=f"{OURS}_count{LONG}", times=2,
            title="both samplers, twice the steps, few regions at 4x4, threshold 0.995",
            optimizer={"selector_steps": SELECTOR_STEPS, "rest_cooldown": REST_COOLDOWN},
            stage=merged(_vision(shares=SHARES_COUNT, order="row"), FIXED_PRUNE), text=TEXT_MORE),
    *(Setting(name=f"{OURS}_set{name}{LONG}", weights_of=f"{OURS}{LONG}", text=(LAYER, threshold), map_share=MAP_SHARE,
              title=f"both samplers, twice the steps, set to 60 % of the map, threshold {threshold}")
      for name, threshold in (("", 0.995), ("_most", 0.999))),
    *(Setting(name=f"{OURS}_{name}{LONG}", times=2, title=f"both samplers, twice the steps, {title}, threshold 0.995",
              optimizer=rest, text=TEXT_MORE,
              stage=merged(_vision(shares=SHARES_BOTH, order="row"), {**FIXED_PRUNE, "hold": HOLD}))
      for name, title, rest in (("held", "held at 66 % of the map after 150 and learning on", {}),
                                ("held_rest", "at rest and held at 66 % of the map after 150",
                                 {"selector_steps": SELECTOR_STEPS}))),
    Setting(name=f"{OURS}_fine{LONG}", times=2,
            title="both samplers, twice the steps, more regions at 1x1, threshold 0.995",
            optimizer={"selector_steps": SELECTOR_STEPS},
            stage=merged(_vision(shares=SHARES_FINE, order="row"), FIXED_PRUNE), text=TEXT_MORE),
    Setting(name=f"{OURS}_late{LONG}", times=2,
            title="both samplers, twice the steps, the text-guided one before layer 4",
            optimizer={"selector_steps": SELECTOR_STEPS},
            stage=merged(_vision(shares=SHARES_BOTH, order="row"), LATE_PRUNE), text=(LAYER + 1, THRESHOLD)),
    Setting(name=f"{OURS}_high{LONG}", times=2,
            title="both samplers, twice the steps, threshold 0.99 to 1 in training, 0.997 when evaluated",
            optimizer={"selector_steps": SELECTOR_STEPS},
            stage=merged(_vision(shares=SHARES_BOTH, order="row"), HIGH_PRUNE), text=(LAYER, 0.997)),
    Setting(name=f"pyramid_drop{LONG}", title="PyramidDrop, twice the steps", times=2,
            stage={"layer_rival": {"name": "pyramid_drop"}}, match=f"{OURS}{LONG}"),
    # Rivals at equal tokens.
    Setting(name="random", title="random tokens", stage=_map_rival("random")),
    Setting(name="uniform_mean", title="2x2 average pooling everywhere", stage=_map_rival("uniform_mean")),
    Setting(name="uniform_max", title="2x2 max-pooling everywhere", stage=_map_rival("uniform_max")),
    Setting(name="visionzip", title="VisionZip", stage=_map_rival("visionzip")),
    Setting(name="prumerge_plus", title="PruMerge+", stage=_map_rival("prumerge_plus")),
    # In a tower trained on patches alone, CLS has not learned to look: both read the patches' own attention as well.
    *(Setting(name=f"{name}_patches", title=f"{title}, attention of the patches",
              stage=_map_rival(name, source="patches"))
      for name, title in (("visionzip", "VisionZip"), ("prumerge_plus", "PruMerge+"))),
    Setting(name="top_similarity", title="top similarity to the base tile", stage=_map_rival("top_similarity")),
    Setting(name="fastv", title="FastV before layer 1 of 6 (2 of 32)",
            stage={"layer_rival": {"name": "fastv", "layer": 1}}, match=OURS),
    Setting(name="pyramid_drop", title="PyramidDrop before layers 1, 3 and 4 of 6 (8, 16 and 24 of 32)",
            stage={"layer_rival": {"name": "pyramid_drop"}}, match=OURS),
    Setting(name="trim", title="TRIM",
            unavailable="needs patch and text embeddings in one space (CLIP's); this vision tower has no text tower"),
    # Scales and windows.
    Setting(name="branches_7", title="7 branches",
            stage=_vision(branches=BRANCHES_7, shares=SHARES_7)),
    Setting(name="window_1", title="1x1 window: keep or drop",
            stage=_vision(**KEEP, shares=(0.23, 0.77))),
    Setting(name="window_2", title="2x2 window: 1x1 and 2x2 only",
            stage=_vision(window=2, branches=[[1, 1], [2, 2]], shares=(0.1, 0.9))),
    Setting(name="window_8", title="8x8 window", stage=_vision(window=8)),
    Setting(name="window_12", title="12x12 window", stage=_vision(window=12)),
    # The balance loss, with the paper's own selector and gate.
    *(Setting(name=f"balance_{name}", title=f"the paper as written, {title}", stage=_as_written(weight))
      for name, title, weight in (("none", "no balance loss", 0.0), ("0.01", "balance weight 0.01", 0.01),
                                  ("0.1", "balance weight 0.1", 0.1), ("0.5", "balance weight 0.5", 0.5))),
    # The text-guided sampler.
    Setting(name="text_direct", title="text-guided sampler on the model trained without it, threshold 0.9",
            weights_of="off", stage={"model": TEXT_SAMPLER}, text=(LAYER, 0.9)),
    Setting(name="text_train", title="text-guided sampler, layer and threshold fixed in training",
            stage=_pruned((LAYER, LAYER), (THRESHOLD, THRESHOLD)), text=TEXT),
    *(Setting(name=f"text_layer_{layer}", title=f"text-guided sampler before layer {layer} of 6", weights_of="text",
              text=(layer, THRESHOLD)) for layer in (1, 2, 4, 5)),
    # The hand-made rule at the paper's shares.
    *(Setting(name=f"top_{percent}", title=f"top similarity, {percent} %",
              stage=_map_rival("top_similarity", percent / 100)) for percent in (80, 60, 40)),
    # Coefficients of the imbalance loss.
    *(Setting(name=f"imbalance_{name}", title=f"coefficients {values}", stage=_vision(balance_coefficients=values))
      for name, values in (("even", [1.0, 1.0, 1.0]), ("coarser", [1.1, 1.0, 0.9]), ("finer", [0.9, 1.0, 1.1]))),
    # The gate.
    *(Setting(name=f"gate_{gate}_{selector}", title=f"{gate.replace('_', '-')} gate, {title}",
              stage=_vision(gate, selector))
      for selector, title in (("base_tile", "similarity to the base tile"), ("region", "the region as its input"))
      for gate in ("paper", "straight_through", "counterfactual") if (gate, selector) != ("counterfactual", "region")),
    Setting(name="random_branches", title="random branches, shares of the learned selector",
            stage=_control("random"), match="vision"),
    Setting(name="uniform_branches", title="every region at 2x2", stage=_control("uniform", branch=1)),
    Setting(name="permuted_branches", title="the learned selector's branches permuted among regions",
            weights_of="vision", permuted=True),
    Setting(name="no_task_gradient", title="selector trained by the balance loss alone",
            stage=_control("no_task_gradient")),
    Setting(name="oracle", title="oracle: regions with a glyph or a bar at 1x1, all else at 4x4",
            stage=_control("oracle")),
)  # fmt: skip

SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _ALL}


def resolved(setting: Setting, shares: Sequence[float], converted_percent: float) -> Setting:
    """The setting with the budget or shares that it takes from what it is matched with."""
    stage = dict(setting.stage)
    rival = stage.get("layer_rival", {})
    if rival and "budget" not in rival:
        stage["layer_rival"] = {**rival, "budget": round(max(converted_percent / 100, LEAST_LAYER_BUDGET), 4)}
    control = stage.get("branch_control", {})
    if control.get("name") == "random" and "shares" not in control:
        stage["branch_control"] = {**control, "shares": [round(share, 4) for share in shares]}
    return dataclasses.replace(setting, stage=stage)
