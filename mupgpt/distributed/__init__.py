"""Processes of one run, and how a model is spread over them."""
