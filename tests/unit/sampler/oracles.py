"""What both samplers and the balance loss do, once more: plain Python over lists of floats, one region and one token at
a time, from the method's text. Nothing here is shared with the code that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Vector = list[float]
Grid = list[list[Vector]]
"""Feature map, [row][column][dimension]."""
Kernel = tuple[int, int]
Cell = list[tuple[int, int]]
"""The real tokens, (row, column), that one pooled token stands for."""

PAPER: tuple[Kernel, ...] = ((1, 1), (2, 2), (4, 4))
SEVEN: tuple[Kernel, ...] = (*PAPER, (4, 2), (2, 4), (2, 1), (1, 2))
DROP: Kernel = (0, 0)
WINDOWS: tuple[tuple[int, tuple[Kernel, ...]], ...] = (
    (1, ((1, 1), DROP)),
    (2, ((1, 1), (2, 2))),
    (4, PAPER),
    (4, SEVEN),
    (8, PAPER),
    (12, PAPER),
)
"""Window and branches: the default, Tab. 3's seven branches and every window of Tab. 4."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The selector's options, and its linear layer as lists."""

    weight: list[Vector]
    bias: Vector
    selector_input: str = "base_tile"
    similarity: str = "inner_product"
    region_pool: str = "mean"
    temperature: float = 1.0


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def layer_norm(x: Vector) -> Vector:
    centre = mean(x)
    scale = 1 / math.sqrt(mean([(v - centre) ** 2 for v in x]) + 1e-5)
    return [(v - centre) * scale for v in x]


def softmax(x: Vector) -> Vector:
    powers = [math.exp(v - max(x)) for v in x]
    return [p / sum(powers) for p in powers]


def regions(grid: Grid, window: int) -> Iterator[tuple[int, int]]:
    """Top left corners in raster order."""
    for top in range(0, len(grid), window):
        for left in range(0, len(grid[0]), window):
            yield top, left


def cells(grid: Grid, corner: tuple[int, int], window: int, kernel: Kernel) -> list[Cell]:
    """A region's pooled tokens, row-major; the map's edge cuts regions and cells short."""
    if kernel == DROP:
        return []
    bottom, right = min(corner[0] + window, len(grid)), min(corner[1] + window, len(grid[0]))
    return [
        [(i, j) for i in range(y, min(y + kernel[0], bottom)) for j in range(x, min(x + kernel[1], right))]
        for y in range(corner[0], bottom, kernel[0])
        for x in range(corner[1], right, kernel[1])
    ]


def maximum(grid: Grid, cell: Cell) -> Vector:
    return [max(grid[i][j][d] for i, j in cell) for d in range(len(grid[0][0]))]


def probabilities(grid: Grid, base: list[Vector], window: int, selection: Selection) -> list[Vector]:
    """p of every region: a linear layer on its similarity to the base tile, or on what is in the region itself."""
    return [
        softmax(
            [
                selection.temperature * (dot(row, features) + bias)
                for row, bias in zip(selection.weight, selection.bias, strict=True)
            ]
        )
        for features in (_features(grid, corner, base, window, selection) for corner in regions(grid, window))
    ]


def _features(grid: Grid, corner: tuple[int, int], base: list[Vector], window: int, selection: Selection) -> Vector:
    tokens = [grid[i][j] for ((i, j),) in cells(grid, corner, window, (1, 1))]
    columns = list(zip(*tokens, strict=True))
    average, most = [mean(c) for c in columns], [max(c) for c in columns]
    if selection.selector_input == "region":
        spread = [math.sqrt(mean([(v - m) ** 2 for v in c]) + 1e-6) for c, m in zip(columns, average, strict=True)]
        return [*layer_norm(average), *layer_norm(most), *layer_norm(spread)]
    pooled = average if selection.region_pool == "mean" else most
    if selection.similarity == "inner_product":
        return [dot(pooled, token) for token in base]
    normed = [layer_norm(token) for token in base]
    centre = [mean(c) for c in zip(*normed, strict=True)]
    towards, *others = ([v - c for v, c in zip(x, centre, strict=True)] for x in (layer_norm(pooled), *normed))
    return [dot(towards, other) / math.sqrt(dot(towards, towards) * dot(other, other)) for other in others]


def likeliest(probs: list[Vector]) -> list[int]:
    return [p.index(max(p)) for p in probs]


def tokens(grid: Grid, newline: Vector, window: int, branches: Sequence[Kernel], chosen: Sequence[int],
           order: str = "region") -> list[Vector]:  # fmt: skip
    """Eq. 1. Order "region": region by region, a newline after each row of regions; "row": a map row after the other,
    in each the tokens that begin there, and a newline where there is one."""
    return gated_tokens(grid, newline, window, branches, chosen, gate="none", probs=[], frozen=[], order=order)


def gated_tokens(grid: Grid, newline: Vector, window: int, branches: Sequence[Kernel], chosen: Sequence[int], *,
                 gate: str, probs: list[Vector], frozen: list[Vector],
                 order: str = "region") -> list[Vector]:  # fmt: skip
    """Eq. 2 and its two rivals, by their formulas. `frozen` stands for sg(p): a caller that moves `probs` alone, by a
    little, sees the gradient that training sees. "none" is Eq. 1.
    """
    emitted = []
    begins: dict[int, dict[int, Vector]] = {}  # row, column
    for m, corner in enumerate(regions(grid, window)):
        choice = chosen[m]
        for cell in cells(grid, corner, window, branches[choice]):
            token = maximum(grid, cell)
            if gate == "paper":
                token = [v * probs[m][choice] for v in token]
            elif gate == "straight_through":
                token = [v * (1 + probs[m][choice] - frozen[m][choice]) for v in token]
            elif gate == "counterfactual":
                for k, kernel in enumerate(branches):
                    instead = resized(grid, corner, window, kernel, cell)
                    token = [v + (probs[m][k] - frozen[m][k]) * o for v, o in zip(token, instead, strict=True)]
            emitted.append(token)
            begins.setdefault(cell[0][0], {})[cell[0][1]] = token
        if corner[1] + window >= len(grid[0]):
            emitted.append(list(newline))
    if order == "row":
        return [
            token for _, row in sorted(begins.items()) for token in (*(row[at] for at in sorted(row)), list(newline))
        ]
    return emitted


def resized(grid: Grid, corner: tuple[int, int], window: int, kernel: Kernel, cell: Cell) -> Vector:
    """What branch `kernel` has to say where another branch has `cell`: the maximum of its tokens there."""
    there = [other for other in cells(grid, corner, window, kernel) if set(other) & set(cell)]
    said = [maximum(grid, other) for other in there]
    return [max(column) for column in zip(*said, strict=True)] if said else [0.0] * len(grid[0][0])


def balance(probs: list[Vector], coefficients: Sequence[float] | None = None) -> float:
    """Eq. 3-5, and Eq. 10 with coefficients rescaled to sum to K."""
    branches, total = len(probs[0]), 0.0
    coefficients = coefficients or [1.0] * branches
    for k in range(branches):
        used = sum(1 for p in probs if p.index(max(p)) == k) / len(probs)
        likely = sum(p[k] for p in probs) / len(probs)
        total += coefficients[k] * branches / sum(coefficients) * used * likely
    return branches * total


def importance(query: list[list[Vector]], key: list[list[Vector]], scaling: float) -> list[float]:
    """Eq. 6-8 of query [token][head] and key [token][group], which turned already."""
    heads, groups = len(query[0]), len(key[0])
    worth = [0.0] * len(key)
    for asker in query:
        shares = [softmax([scaling * dot(asker[h], seen[h * groups // heads]) for seen in key]) for h in range(heads)]
        for j in range(len(key)):
            worth[j] += max(share[j] for share in shares) / len(query)
    return worth


def kept(worth: Sequence[float], threshold: float) -> list[int]:
    """Eq. 9: the most important first, earlier ones of equals, until their share is reached."""
    order = sorted(range(len(worth)), key=lambda j: (-worth[j], j))
    reached, count = 0.0, 0
    while count < len(order) and (threshold >= 1 or reached < threshold * sum(worth)):
        reached += worth[order[count]]
        count += 1
    return sorted(order[:count])


def turned(x: Vector, position: int, theta: float) -> Vector:
    """Rotary embedding of one head's vector: dimension i turns with dimension i + d/2."""
    half = len(x) // 2
    angles = [position * theta ** (-2 * i / len(x)) for i in range(half)]
    first = [x[i] * math.cos(a) - x[i + half] * math.sin(a) for i, a in enumerate(angles)]
    second = [x[i + half] * math.cos(a) + x[i] * math.sin(a) for i, a in enumerate(angles)]
    return first + second
