"""The closed world that the procedural scenes speak of: colours, shapes, words, positions and phrasings."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 42),
    "orange": (245, 138, 28),
    "yellow": (246, 216, 58),
    "green": (38, 158, 72),
    "cyan": (70, 205, 220),
    "blue": (36, 82, 212),
    "purple": (122, 44, 158),
    "pink": (246, 142, 192),
}

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond")

# fmt: off
WORDS: tuple[str, ...] = (
    "ant", "bee", "bird", "bus", "cake", "cat", "cup", "dog", "fish", "fox", "hat", "hen",
    "jar", "key", "lamp", "leaf", "map", "oak", "owl", "pig", "ship", "sun", "tent", "wolf",
)
# fmt: on

NUMBERS: range = range(10, 100)

POSITIONS: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")

KINDS: tuple[str, ...] = ("number", "word", "colour", "shape", "count", "where", "left_of", "presence")

# The kinds whose evidence is one small region: what compression can lose.
DETAIL_KINDS: tuple[str, ...] = ("number", "colour", "word", "shape")

# Both spellings of "colour", for people type both.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "number": (
        "What number is on the {colour} card?",
        "Which number does the {colour} card show?",
        "Read the number on the {colour} card.",
    ),
    "word": (
        "What word is on the {colour} card?",
        "Which word does the {colour} card show?",
        "Read the word on the {colour} card.",
    ),
    "colour of number": (
        "What colour is the card with the number {text}?",
        "What color is the card with the number {text}?",
        "Which colour is the card that says {text}?",
    ),
    "colour of word": (
        "What colour is the card with the word {text}?",
        "What color is the card with the word {text}?",
        "Which colour is the card that says {text}?",
    ),
    "colour of shape": (
        "What colour is the {shape}?",
        "What color is the {shape}?",
        "Which colour is the {shape}?",
    ),
    "shape": ("What shape is {colour}?", "Which shape is {colour}?", "What is the {colour} shape?"),
    "count": ("How many {plural} are there?", "How many {plural} can you see?", "Count the {plural}."),
    "where": ("Where is the {thing}?", "In which corner is the {thing}?"),
    "left_of": ("Is the {thing} left of the {other}?", "Is the {thing} to the left of the {other}?"),
    "presence": ("Is there {thing}?", "Can you see {thing}?", "Does the image have {thing}?"),
}
