"""Checkpoints: the typed config, shards split by stage, import from and export to other formats."""
