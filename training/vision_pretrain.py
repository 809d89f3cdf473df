"""Vision stage of models trained from nothing, in place of CLIP: python training/vision_pretrain.py --config FILE"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from training.launch import main

if __name__ == "__main__":
    main(("training.dense_labels", "DenseTask"), "Trains a vision tower on labelled procedural tiles.")
