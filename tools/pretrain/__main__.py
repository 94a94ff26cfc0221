"""Make what ships again from its seed: the stand-in's checkpoint (about 40 minutes on two cores), or a network's.

python -m tools.pretrain                    # emonb/resources/base, the one that ships
python -m tools.pretrain --out build/base --seed 1
python -m tools.pretrain vit                # emonb/resources/networks; also resnet, vgg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.pretrain import networks, train
from tools.pretrain.checkpoint import BASE


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("base", *networks.STEPS), default="base")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; default: the one that ships")
    parser.add_argument("--seed", type=int, help="decides pool, weights and order")
    parser.add_argument("--pool", type=int, help="scenes that are drawn")
    parser.add_argument("--steps-a", type=int, help="steps of the vision tower; on windows of a picture")
    parser.add_argument("--steps-b", type=int, help="steps of the language model; on whole pictures")
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    what, out = options.pop("what"), options.pop("out", None)
    if what == "base":
        print(train.rebuild(out or BASE, **options))
    else:
        print(networks.rebuild_network(what, out or networks.NETWORKS, **options))


if __name__ == "__main__":
    main()
