"""Leaf: what people look at: explorer, report, and all that the models say about a picture of their own."""
