"""Rows of prompts: where they come from, and what a batch of them is."""
