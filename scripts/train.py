"""
Trains a co-augmentation policy from a recipe.

accelerate launch --config_file recipes/accelerate_configs/single.yaml scripts/train.py \
    --config recipes/nfcorpus/qwen2.5-7b-bm25.yaml --output_dir runs/nfcorpus
"""

import sys

from coaug_trl.cli.main import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
