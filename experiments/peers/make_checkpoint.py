#!/usr/bin/env python3
"""Writes a Kimi Linear checkpoint with random weights, made and saved by transformers.

usage: make_checkpoint.py DIR [--seed N]

DIR gets config.json and model.safetensors (float32, the released tensor names); about 60M
parameters: 8 layers, three KDA to one MLA, the first layer's MLP dense, 16 experts, top 4.
"""
import argparse
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import KimiLinearConfig, KimiLinearForCausalLM

LAYERS = 8
MLA_LAYERS = [4, 8]  # counted from 1


def config():
    return KimiLinearConfig(
        vocab_size=16384,
        hidden_size=512,
        num_hidden_layers=LAYERS,
        intermediate_size=1024,
        linear_attn_config={
            "num_heads": 4,
            "head_dim": 128,
            "short_conv_kernel_size": 4,
            "full_attn_layers": MLA_LAYERS,
            "kda_layers": [i for i in range(1, LAYERS + 1) if i not in MLA_LAYERS],
        },
        num_attention_heads=8,
        num_key_value_heads=8,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        kv_lora_rank=256,
        mla_use_nope=True,
        first_k_dense_replace=1,
        num_experts=16,
        num_experts_per_token=4,
        num_shared_experts=1,
        moe_intermediate_size=176,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = KimiLinearForCausalLM(config()).float().eval()
    # Norm weights of one and choice biases of nought would hide a loader that drops them.
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                tensor += 0.1 * torch.randn_like(tensor)
            elif name.endswith("e_score_correction_bias"):
                tensor += 0.02 * torch.randn_like(tensor)
    model.save_pretrained(args.dir)
    os.chmod(os.path.join(args.dir, "model.safetensors"), 0o644)

    count = lambda part: sum(p.numel() for n, p in model.named_parameters() if part in n)
    experts = count(".experts.")
    c = model.config
    print(json.dumps({
        "dir": args.dir,
        "seed": args.seed,
        "parameters": count(""),
        "active": count("") - experts + experts * c.num_experts_per_token // c.num_experts,
        "bytes": os.path.getsize(os.path.join(args.dir, "model.safetensors")),
        "transformers": __import__("transformers").__version__,
        "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
