"""
Augments a collection on several GPUs and nodes, each process its share:

accelerate launch --config_file recipes/accelerate_configs/ddp.yaml scripts/augment.py \
    --model runs/nfcorpus --collection data/nfcorpus --output augmentations/nfcorpus

The options are those of `coaug augment`. All processes must see the output folder, which is all they share: a node that
is gone may be replaced, and another number of processes may go on.
"""

import sys

from coaug_trl.cli.main import main


if __name__ == "__main__":
    sys.exit(main(["augment", *sys.argv[1:]]))
