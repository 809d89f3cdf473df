"""Training data: conversations from files, and seeded procedural scenes and posters with questions on them."""
