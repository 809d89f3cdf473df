"""The benchmark: generated high-resolution images, questions from coarse to fine, and their scores by kind.

`python -m evaluation.scenes --split test --images 3 --out FOLDER` writes some of them.
"""

from evaluation.scenes.images import SEEDS, asked_of, benchmark_images, training_questions
from evaluation.scenes.scoring import Tally, exact_match, is_exact
from evaluation.scenes.version import benchmark_version
from training.data.pairs import PosterSplit
from training.data.poster_questions import COARSE_KINDS, FINE_KINDS, POSTER_KINDS

__all__ = [
    "COARSE_KINDS",
    "FINE_KINDS",
    "POSTER_KINDS",
    "SEEDS",
    "PosterSplit",
    "Tally",
    "asked_of",
    "benchmark_images",
    "benchmark_version",
    "exact_match",
    "is_exact",
    "training_questions",
]
