"""Measurements of what is fast and by how much: `python -m tools.bench.<part> --out build/bench`, or `make bench`."""
