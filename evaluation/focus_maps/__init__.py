"""Focus maps: what both samplers chose for an image and a question, drawn over the image.

drawing.py (one drawing of a `focusllava.FocusMap`) <- sheet.py (those of an answer, for `ask --map`)
                                                    <- page.py (also importance by layer) <- focus.py (asks)
report.py (JSON)
"""
