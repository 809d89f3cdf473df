"""A benchmark of six scenes in a folder, for lmms-eval's `--include_path`; needs no hub."""
