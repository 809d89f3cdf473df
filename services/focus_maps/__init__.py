"""What both samplers chose of an image, in its own pixels: grid (common/grid.py) -> layout.py -> compose.py."""
