"""The study: the paper's tables and figures in small, trained and scored from one command."""
