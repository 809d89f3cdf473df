"""Other published ways to reduce visual tokens, behind two interfaces: `base` (the image), `layers` (the LLM)."""
