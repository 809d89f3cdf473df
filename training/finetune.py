"""The paper's second stage, both samplers: ray job submit --working-dir . -- python training/finetune.py --config F"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from training.launch import main

if __name__ == "__main__":
    main(
        ("training.experiments.task", "ExperimentTask"),
        "Fine-tunes the model end to end with both samplers.",
        on_conversations=("training.conversation_stage", "ConversationTask"),
    )
