"""Structured output: what an answer that must match a constraint may go on with."""
