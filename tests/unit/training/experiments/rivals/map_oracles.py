"""Naive loops over lists that say what each rival of the vision-guided sampler gives, and images to try them on."""

import math

import torch

from training.experiments.rivals.base import RivalInput
from training.experiments.rivals.downsample import kernel_within

D, N, HEADS, WIDTH = 6, 4, 3, 5
SIZES = [(1, 1), (3, 2), (5, 7), (8, 8), (13, 6), (1, 9)]
BUDGETS = [0.1, 0.25, 0.5, 1.0]
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["plain", "tied", "flat"]


def image(size, dtype=torch.float32, kind="plain", seed=0):
    """`tied`: few values, exact in bf16, so that equals abound. `flat`: nothing stands out at all."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if kind == "tied":
            return torch.randint(1, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    # Attention with a few strong patches, as a tower's has.
    attention = torch.rand(height, width, generator=generator) ** 8
    attention = torch.randint(1, 4, (height, width), generator=generator).float() if kind == "tied" else attention
    # One of two axes, so that keys are either equal or orthogonal.
    axis = torch.randint(0, 2, (height, width, 1, 1), generator=generator)
    key = torch.zeros(height, width, HEADS, WIDTH).scatter(3, axis.expand(-1, -1, HEADS, 1), 1.0)
    return RivalInput(
        map_HWD=draw(height, width, D),
        base_ND=draw(N, D),
        newline_D=torch.full((D,), 9.0),
        attention_HW=torch.ones(height, width) if kind == "flat" else attention,
        key_HWGd=key.to(dtype) if kind != "plain" else draw(height, width, HEADS, WIDTH),
        content_hash=f"image {seed}",
    )


def rows(tensor):
    return tensor.double().flatten(0, 1).tolist() if tensor.dim() == 3 else tensor.double().tolist()


def share_of(count, budget):
    return min(max(math.ceil(budget * count - 1e-9), 1), count)


def best(scores, count):
    """Indices of the highest scores, the earlier first among equals."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    # Rounded: what is equal on paper is a tie.
    return round(dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)), 9)


def line_up(cells, width, newline_rows):
    """(source, token) pairs in order, with None and -1 for newlines."""
    out, last = [], None
    for source, token in cells:
        band = source // width // newline_rows
        if last is not None and band != last:
            out.append((-1, None))
        out.append((source, token))
        last = band
    return [*out, (-1, None)]


def check(given, reduced, cells, newline_rows=1):
    """The tokens are those cells, with newlines by the rule; as exact as their dtype."""
    expected = line_up(cells, given.map_HWD.shape[1], newline_rows)
    assert reduced.source_S.tolist() == [source for source, _ in expected]
    assert reduced.tokens_SD.dtype == given.map_HWD.dtype
    wanted = torch.tensor([[9.0] * D if token is None else token for _, token in expected], dtype=torch.float64)
    rough = given.map_HWD.dtype == torch.bfloat16
    torch.testing.assert_close(
        reduced.tokens_SD.double(), wanted, rtol=2**-8 if rough else 1e-5, atol=1e-6 if rough else 1e-5
    )
    assert reduced.content_tokens == len(cells)
    assert reduced.content_tokens + reduced.newlines == len(reduced.tokens_SD) == len(expected)


def quartile(values, at):
    ordered, place = sorted(values), at * (len(values) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])


def standing_out(values):
    first, third = quartile(values, 0.25), quartile(values, 0.75)
    return sum(v > third + 1.5 * (third - first) for v in values)


def spread(values, count):
    return [values[i * len(values) // count] for i in range(count)]


def naive_top_similarity(given, budget):
    tokens, base = rows(given.map_HWD), rows(given.base_ND)
    scores = [sum(sum(a * b for a, b in zip(t, g, strict=True)) for g in base) / len(base) for t in tokens]
    return [(j, tokens[j]) for j in sorted(best(scores, share_of(len(tokens), budget)))]


def naive_pool(given, budget, reduce):
    height, width, _ = given.map_HWD.shape
    tall, wide = kernel_within(budget)
    cells = []
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            real = [
                rows(given.map_HWD)[y * width + x]
                for y in range(top, min(top + tall, height))
                for x in range(left, min(left + wide, width))
            ]
            cells.append((top * width + left, [reduce([token[d] for token in real]) for d in range(D)]))
    return cells


def naive_visionzip(given, budget):
    tokens, attention = rows(given.map_HWD), given.attention_HW.flatten().tolist()
    keys = [
        [sum(key[g][c] for g in range(HEADS)) / HEADS for c in range(WIDTH)]
        for key in given.key_HWGd.double().flatten(0, 1).tolist()
    ]
    total = share_of(len(tokens), budget)
    contextual = math.floor(total * 10 / 64 + 0.5)
    dominant = best(attention, total - contextual)
    rest = [j for j in range(len(tokens)) if j not in dominant]
    members = {target: [target] for target in spread(rest, contextual)}
    for j in rest:
        if members and j not in members:
            # max() takes the first of equals.
            members[max(members, key=lambda target: cosine(keys[j], keys[target]))].append(j)
    merged = {t: [sum(tokens[j][d] for j in of) / len(of) for d in range(D)] for t, of in members.items()}
    return sorted([*merged.items(), *((j, tokens[j]) for j in dominant)])


def naive_prumerge(given, budget):
    tokens, attention = rows(given.map_HWD), given.attention_HW.flatten().tolist()
    count = len(tokens)
    outliers = max(standing_out(attention), 1)
    if budget is None:
        step = max(int(count / outliers / 3), 1)
        kept = sorted({*best(attention, outliers), *range(0, count, step)})
    else:
        total = share_of(count, budget)
        strongest = best(attention, min(outliers, total))
        rest = [j for j in range(count) if j not in strongest]
        kept = sorted([*strongest, *spread(rest, total - len(strongest))])
    dropped = [j for j in range(count) if j not in kept]
    keys = given.key_HWGd.double().flatten(0, 1).flatten(1).tolist()
    cells = []
    for i in kept:
        near = sorted(dropped, key=lambda j: (-cosine(keys[i], keys[j]), j))[: share_of(count, 32 / 576)]
        weights = {j: attention[j] / sum(attention) for j in near}
        whole = 1 + sum(weights.values())
        taken = [sum(w * tokens[j][d] for j, w in weights.items()) for d in range(D)]
        cells.append((i, [(tokens[i][d] + taken[d]) / whole for d in range(D)]))
    return cells


NAIVE = {
    "top_similarity": naive_top_similarity,
    "uniform_mean": lambda given, budget: naive_pool(given, budget, lambda v: sum(v) / len(v)),
    "uniform_max": lambda given, budget: naive_pool(given, budget, max),
    "visionzip": naive_visionzip,
    "prumerge_plus": naive_prumerge,
}
