"""The documentation site: `make docs`.

docs/*.md, generated reference -> pages.py -> build/site/docs -> Zensical -> build/site/html -> links.py
"""
