"""Images a second and peak memory of a ViT that trains with a frozen LLM layer, run in two ways.

    python tests/bench_block.py           # DeiT-S with a layer shaped as LLaMA-7B's, for a GPU
    python tests/bench_block.py --tiny    # the smallest ViT and layer: seconds on a CPU

ours: the layer in bf16, fused attention. eager: as the paper's released code runs it, the layer
in fp32 under fp16 autocast, the attention matrix written out. Memory is measured on a GPU only.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llmblock import LLMBlock  # noqa: E402
from train_image import MODELS, ViT  # noqa: E402

CUDA = torch.cuda.is_available()
LLAMA_7B = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}
TINY = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


def measure(model, shape, batch, dtype, autocast, attention):
    """(output, images a second, peak memory in GB) of forward and backward passes."""
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape, num_hidden_layers=1).save_pretrained(folder)
        block = LLMBlock(folder, model["D"], kind="random", dtype=dtype)
    block.layers[0].self_attn.config._attn_implementation = attention
    vit = ViT(**model, K=1000, drop_path=0.0, llm=block).to(device)
    images = torch.randn(batch, 3, model["S"], model["S"], device=device)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for step in range(12):
        if step == 2:  # the first two warm up
            start = time.perf_counter()
        vit.zero_grad()
        with torch.autocast(device, autocast):
            output = vit(images).float()
        output.square().mean().backward()
        if CUDA:
            torch.cuda.synchronize()
    rate = 10 * batch / (time.perf_counter() - start)
    return output.detach(), rate, torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


def main(argv):
    sizes = (MODELS["micro"], TINY, 2) if "--tiny" in argv else (MODELS["small"], LLAMA_7B, 128)
    outputs = {}
    rates = {}
    for name, *way in [
        ("ours", torch.bfloat16, torch.bfloat16, "sdpa"),
        ("eager", torch.float32, torch.float16, "eager"),
    ]:
        outputs[name], rates[name], peak = measure(*sizes, *way)
        print(f"{name:6} {rates[name]:9.1f} images/s {peak:6.2f} GB")
    difference = (outputs["ours"] - outputs["eager"]).norm() / outputs["eager"].norm()
    result = rates | {"difference": difference.item()}  # between the outputs of the two
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
