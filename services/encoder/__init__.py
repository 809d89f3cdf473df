"""Stage 1: an image in, compressed visual tokens out."""
