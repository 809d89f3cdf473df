"""Focus maps: what both samplers chose for an image and a question, drawn over the image.

geometry.py (token -> pixels) <- focus.py (runs the two stages) <- drawing.py (one map, a picture), report.py (JSON),
page.py (all maps of a question on one page).
"""
