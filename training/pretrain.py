"""The paper's first stage (projector alignment): python training/pretrain.py --config FILE"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from training.launch import main

if __name__ == "__main__":
    main(
        ("training.experiments.task", "ExperimentTask"),
        "Pre-trains with all visual tokens: on conversations the projector, on generated data the language model too.",
        on_conversations=("training.conversation_stage", "AlignmentTask"),
    )
