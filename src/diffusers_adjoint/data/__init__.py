"""Datasets of prompts: loading, checking and batching their rows."""
