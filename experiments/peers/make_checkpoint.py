#!/usr/bin/env python3
"""Writes a Kimi Linear checkpoint with random weights, made and saved by transformers.

usage: make_checkpoint.py DIR [--shape deep|wide] [--seed N]

DIR gets config.json and model.safetensors (float32, the released tensor names), about 60M parameters, three KDA
layers to one MLA, the first layer's MLP dense. deep: 16 layers, 8 of 64 experts, as the models of the report's
ablations (tables 1 and 2). wide: 8 layers of twice the width, 4 of 16 experts.
"""
import argparse
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import KimiLinearConfig, KimiLinearForCausalLM

SHAPES = {
    "deep": dict(layers=16, hidden=256, kda_heads=4, kda_head_dim=64, mla_heads=4, latent=128, experts=64, top_k=8, inner=64),
    "wide": dict(layers=8, hidden=512, kda_heads=4, kda_head_dim=128, mla_heads=8, latent=256, experts=16, top_k=4, inner=176),
}


def config(layers, hidden, kda_heads, kda_head_dim, mla_heads, latent, experts, top_k, inner):
    mla_layers = list(range(4, layers + 1, 4))  # counted from 1
    return KimiLinearConfig(
        vocab_size=16384,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=1024,
        linear_attn_config={
            "num_heads": kda_heads,
            "head_dim": kda_head_dim,
            "short_conv_kernel_size": 4,
            "full_attn_layers": mla_layers,
            "kda_layers": [i for i in range(1, layers + 1) if i not in mla_layers],
        },
        num_attention_heads=mla_heads,
        num_key_value_heads=mla_heads,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        kv_lora_rank=latent,
        mla_use_nope=True,
        first_k_dense_replace=1,
        num_experts=experts,
        num_experts_per_token=top_k,
        num_shared_experts=1,
        moe_intermediate_size=inner,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir")
    parser.add_argument("--shape", choices=SHAPES, default="deep")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = KimiLinearForCausalLM(config(**SHAPES[args.shape])).float().eval()
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
        "shape": args.shape,
        "seed": args.seed,
        "parameters": count(""),
        "active": count("") - experts + experts * c.num_experts_per_token // c.num_experts,
        "bytes": os.path.getsize(os.path.join(args.dir, "model.safetensors")),
        "transformers": __import__("transformers").__version__,
        "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
