"""The paper's first stage (projector alignment): python training/pretrain.py --config FILE"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from training.trainer import main

if __name__ == "__main__":
    main(("training.experiments.task", "ExperimentTask"), "Pre-trains the joint model with all visual tokens.")
