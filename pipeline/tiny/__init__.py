"""The small CLIP that ships with pairsieve: paths of its files, for open_clip to load like any other model.

    open_clip.add_model_config(tiny.CONFIG)
    model, _, transform = open_clip.create_model_and_transforms(tiny.ARCH, pretrained=str(tiny.WEIGHTS))
    tokenizer = open_clip.get_tokenizer(tiny.ARCH, bpe_path=str(tiny.BPE))

What it was trained on, under which licences, and how well it does: README.md beside this file.
"""

from pathlib import Path

_HERE = Path(__file__).parent
ARCH = "pairsieve-tiny"
CONFIG = _HERE / "pairsieve-tiny.json"
"""open_clip's model config; its stem is ARCH."""
WEIGHTS = _HERE / "model.safetensors"
BPE = _HERE / "merges.txt.gz"
"""The first 13,500 merges of open_clip's own vocabulary: a table of 14,014 tokens instead of 49,408."""
