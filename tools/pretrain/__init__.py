"""Pre-training of the stand-in VLM whose checkpoint is `emonb/resources/base`: `python -m tools.pretrain`."""
