"""emonb: EmoVLM-KD (CVPR Workshops 2025) reproduced in numbered notebooks.

Importing the package is cheap: heavy libraries load in the room that uses them.
"""

__version__ = "0.2.0"
