"""What the Makefile calls: shell scripts, and the documentation site."""
