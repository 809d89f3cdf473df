"""Seeded procedural data: scenes with small local detail, questions on them, labelled tiles, and the tokenizer."""

from training.data.questions import QuestionAnswer, questions
from training.data.rendering import render
from training.data.scenes import Card, Scene, Shape, sample_scene
from training.data.splits import canonical_spec, dataset_version, scene_at, scene_stream, split_of
from training.data.tiles import label_patches, labelled_tile, tile_batch
from training.data.vocabulary import DETAIL_KINDS, KINDS

__all__ = [
    "DETAIL_KINDS",
    "KINDS",
    "Card",
    "QuestionAnswer",
    "Scene",
    "Shape",
    "canonical_spec",
    "dataset_version",
    "label_patches",
    "labelled_tile",
    "questions",
    "render",
    "sample_scene",
    "scene_at",
    "scene_stream",
    "split_of",
    "tile_batch",
]
