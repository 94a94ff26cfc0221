"""Leaf: what people look at: explorer, report, and all that the models say about a picture of their own.

Nothing is computed here that a table needs: ignore it until you wonder how a page is made.
"""
