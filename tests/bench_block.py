"""Images a second and peak memory of a ViT that trains with a frozen LLM layer, run in two ways.

    python tests/bench_block.py    # DeiT-S with a layer shaped as LLaMA-7B's, for a GPU

ours: the layer in bf16, fused attention. eager: as the paper's released code runs it, the layer
in fp32 under fp16 autocast, the attention matrix written out. Memory is measured on a GPU only.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llmblock import LLMBlock  # noqa: E402
from train_image import MODELS, ViT  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA_7B = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}


def measure(name, model, shape, batch, dtype, autocast):
    """Print the speed of forward and backward passes, return the output."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape, num_hidden_layers=1).save_pretrained(folder)
        block = LLMBlock(folder, model["D"], kind="random", dtype=dtype)
    if name == "eager":
        block.layers[0].self_attn.config._attn_implementation = "eager"
    vit = ViT(**model, K=1000, drop_path=0.0, llm=block).to(DEVICE)
    images = torch.randn(batch, 3, model["S"], model["S"], device=DEVICE)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(12):
        if step == 2:  # the first two warm up
            start = time.perf_counter()
        vit.zero_grad()
        with torch.autocast(DEVICE, autocast):
            output = vit(images).float()
        output.square().mean().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    rate = 10 * batch / (time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0
    print(f"{name:6} {rate:9.1f} images/s {peak:6.2f} GB")
    return output.detach()


def compare(*sizes):
    """Measure both ways, return the relative difference of their outputs."""
    ours = measure("ours", *sizes, torch.bfloat16, torch.bfloat16)
    eager = measure("eager", *sizes, torch.float32, torch.float16)
    return ((ours - eager).norm() / eager.norm()).item()


if __name__ == "__main__":
    print(f"difference of the outputs: {compare(MODELS['small'], LLAMA_7B, 128):.4f}")
