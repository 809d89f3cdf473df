"""Code generated from protos/focusllava/v1 by `make protos`; protos/generate.py --check holds it current."""
