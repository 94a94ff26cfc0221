"""Make the stand-in's checkpoint again from its seed: about 40 minutes on two cores.

python -m tools.pretrain                    # emonb/resources/base, the one that ships
python -m tools.pretrain --out build/base --seed 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.pretrain.checkpoint import BASE
from tools.pretrain.train import POOL, STEPS_A, STEPS_B, rebuild


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=BASE, help="folder of the checkpoint; default: the one that ships")
    parser.add_argument("--seed", type=int, default=0, help="decides pool, weights and order")
    parser.add_argument("--pool", type=int, default=POOL, help="scenes that are drawn")
    parser.add_argument("--steps-a", type=int, default=STEPS_A, help="steps of the vision tower")
    parser.add_argument("--steps-b", type=int, default=STEPS_B, help="steps of the language model")
    options = vars(parser.parse_args())
    print(rebuild(options.pop("out"), **options))


if __name__ == "__main__":
    main()
