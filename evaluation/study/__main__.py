"""The paper's tables and figures in small: python -m evaluation.study --table 9 --budget-minutes 120"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys

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
        settings = [] if arguments.page else settings_of(arguments.table, arguments.figure)
        left = conduct(study, settings, minutes=arguments.budget_minutes)
        results = load_results(study.folder)
        # Focus maps are drawn from a model with both samplers, the study's own; without its weights the old ones stay.
        write_page(results, study.folder, weights_of(study, SETTINGS[OURS], 0, results))
    except (InvalidInput, RuntimeError) as error:
        sys.exit(str(error))
    print(f"page: {study.folder / 'index.html'}, {len(results)} results")
    if left:
        print(f"{len(left)} runs left; the same command goes on with them:")
        print("\n".join(f"  {name}" for name in left))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    own = "9, the gate, and 10, the order of tokens, are the study's own"
    what.add_argument("--table", type=int, help=f"{min(TABLES)} to {max(TABLES)}; {own}")
    what.add_argument("--figure", type=int, help=f"{min(FIGURES)} to {max(FIGURES)}")
    what.add_argument("--all", action="store_true", help="the gate first, then the samplers and rivals, then the rest")
    what.add_argument("--page", action="store_true", help="run nothing, write the page from the results that there are")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start no run that would end later")
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


if __name__ == "__main__":
    main()
