"""The paper's tables and figures in small: python -m evaluation.study --table 9 --budget-minutes 120"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys

from evaluation.study.figures import draw_figure
from evaluation.study.page import write_page
from evaluation.study.results import load_results
from evaluation.study.runs import ROOT, Study, conduct, weights_of
from evaluation.study.settings import OURS, SETTINGS
from evaluation.study.tables import FIGURES, TABLES, settings_of
from services.common.errors import InvalidInput


def main() -> None:
    arguments = _arguments()
    study = Study(
        start=arguments.start.expanduser().resolve(),
        folder=arguments.folder.expanduser().resolve(),
        scratch=arguments.scratch.expanduser().resolve(),
        seeds=arguments.seeds,
        steps=arguments.steps,
        images=arguments.images,
        cores=arguments.runs_at_once,
    )
    try:
        settings = settings_of(arguments.table, arguments.figure)
        left = conduct(study, settings, minutes=arguments.budget_minutes)
        results = load_results(study.folder)
        # Focus maps are drawn from a model with both samplers, the study's own; without its weights the old ones stay.
        checkpoint = weights_of(study, SETTINGS[OURS], 0, results)
        if arguments.figure is not None and not left:
            print(f"drawn: {draw_figure(arguments.figure, results, study.folder, checkpoint or study.start)}")
        write_page(results, study.folder, checkpoint)
    except (InvalidInput, RuntimeError) as error:
        sys.exit(str(error))
    print(f"page: {study.folder / 'index.html'}, {len(results)} results")
    if left:
        print(f"{len(left)} runs left; the same command goes on with them:")
        print("\n".join(f"  {name}" for name in left))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--table",
        type=int,
        help=f"{min(TABLES)} to {max(TABLES)}; the study's own are 9, the gate, 10, the order of tokens, "
        "11 and 12, longer training, 13, keep or drop",
    )
    what.add_argument("--figure", type=int, help=f"{min(FIGURES)} to {max(FIGURES)}")
    what.add_argument("--all", action="store_true", help="the gate first, then the samplers and rivals, then the rest")
    parser.add_argument(
        "--budget-minutes", type=_not_negative, default=math.inf, help="start no run that would end later"
    )
    parser.add_argument("--start", type=pathlib.Path, default=ROOT / "checkpoints/focusllava-tiny-start",
                        help="checkpoint that every run starts from")  # fmt: skip
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "docs/study", help="of the results and the page")
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("~/focusllava/study"),
                        help="of logs, training checkpoints and trained weights")  # fmt: skip
    parser.add_argument("--seeds", type=_positive, default=3)
    parser.add_argument("--steps", type=_positive, default=200)
    parser.add_argument("--images", type=_positive, default=200, help="of each split")
    parser.add_argument("--runs-at-once", type=_positive, default=Study.cores, help="one thread each")
    return parser.parse_args()


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def _not_negative(text: str) -> float:
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return float(text)


if __name__ == "__main__":
    main()
