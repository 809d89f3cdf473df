"""Scores of a checkpoint on easy-VQA's test split, by question kind: python -m evaluation.easy_vqa_score CHECKPOINT

The questions go through the served code (`services/local`), with every combination of the samplers.
"""

from __future__ import annotations

from evaluation.score import Percents, load, parser_of, positive, report
from services.common.errors import InvalidInput
from training.data.easy_vqa import EASY_VQA_KINDS, IMAGES, easy_vqa

GROUPS: dict[str, tuple[str, ...]] = {"what": ("shape", "colour"), "yes or no": ("presence", "absence")}
"""Two questions in three are answered by one of two words, so a score over all says little of what was seen."""
TOLD = Percents(groups=GROUPS, columns=("all", *GROUPS, *EASY_VQA_KINDS), digits=2)  # of 9,673 questions one is 0.01


def main() -> None:
    parser = parser_of(__doc__)
    help_images = "the split's first ones; all when left out"
    parser.add_argument("--images", type=positive, default=IMAGES["test"], help=help_images)
    arguments = parser.parse_args()
    if arguments.images > IMAGES["test"]:
        parser.error(f"--images: must be 1 to {IMAGES['test']}, not {arguments.images}")
    try:
        data, training = easy_vqa("test")[: arguments.images], easy_vqa("train")
    except InvalidInput as error:
        parser.error(str(error))
    questions = [question for _, asked in training for question in asked]
    report(arguments, load(arguments), data, questions, "easy-VQA test", TOLD)


if __name__ == "__main__":
    main()
