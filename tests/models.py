"""Small open_clip models with random weights, saved as files like any other: one of each kind of tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

VIT: dict[str, Any] = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-test-vit": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-test-quick": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-test-timm": {
        "embed_dim": 24,
        "vision_cfg": {
            "timm_model_name": "test_efficientnet",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 48,
        },
        "text_cfg": TEXT,
    },
    "tiny-test-noncausal": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VIT,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "context_length": 40},
    },
    "tiny-test-coca": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
    },
}


def make(folder: Path, arch: str) -> Path:
    """Register the architecture with open_clip and save random weights for it; the path of the file."""
    config = folder / f"{arch}.json"
    config.write_text(json.dumps(CONFIGS[arch]))
    open_clip.add_model_config(config)
    torch.manual_seed(len(arch))
    model = open_clip.create_model(arch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "c_proj" in name:
                parameter.mul_(20)  # so that tokens, positions and the activation show in the vector
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    path = folder / f"{arch}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path
