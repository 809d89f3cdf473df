"""Stage 2: a prompt with visual tokens in, a stream of text out."""
