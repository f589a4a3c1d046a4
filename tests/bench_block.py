"""How fast is the frozen block? Against this machine's matmul rate and the paper's own code.

    python tests/bench_block.py             # LLaMA-7B's layer, 788 tokens, 1 to 2 minutes, 2.8 GB

Prints medians of interleaved rounds, last RESULT {...}: matmul (the block's seven matrices alone,
forward and input gradient), ours (LLMBlock, forward and backward), paper (as its released code
runs it: fp32 or, on a GPU, fp16 autocast, the attention matrix written out; checked against ours).
On a GPU, and on a CPU with AVX512-BF16, ours and matmul are in bf16.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llmblock import LLMBlock  # noqa: E402

DIM, D, HEADS, MLP = 384, 4096, 32, 11008  # host: DeiT-S, LLM: LLaMA-7B


class PaperBlock(nn.Module):
    """The block as the paper's released code runs it: fp32 weights, attention written out."""

    def __init__(self, ours):
        super().__init__()
        self.proj_in = copy.deepcopy(ours.proj_in)
        self.proj_out = copy.deepcopy(ours.proj_out)
        self.layer = copy.deepcopy(ours.layers[0]).float()

    def forward(self, x):
        h = self.proj_in(x)  # (B, N, D)
        attn = self.layer.self_attn
        z = self.norm(h) * self.layer.input_layernorm.weight
        q, k, v = attn.q_proj(z), attn.k_proj(z), attn.v_proj(z)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(2, 3) / (D // HEADS) ** 0.5  # (B, HEADS, N, N)
        z = F.softmax(scores.float(), dim=-1).type_as(q) @ v  # (B, HEADS, N, D / HEADS)
        h = h + attn.o_proj(z.transpose(1, 2).flatten(2))  # (B, N, D)
        z = self.norm(h) * self.layer.post_attention_layernorm.weight
        mlp = self.layer.mlp
        h = h + mlp.down_proj(F.silu(mlp.gate_proj(z)) * mlp.up_proj(z))
        return self.proj_out(self.norm(h))  # (B, N, DIM)

    def norm(self, h):
        return (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(h)


def step(block, x, g, dtype):
    """Forward and backward: the output and the gradients of x and of both projections."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = block(x)
    inputs = (x, block.proj_in.weight, block.proj_out.weight)
    return y, *torch.autograd.grad(y, inputs, g.to(y.dtype))


def measure(run, cuda):
    """(seconds of a call, bytes at its peak above those before; 0 on the CPU)."""
    calls = 20 if cuda else 1
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / calls
    return seconds, torch.cuda.max_memory_allocated() - before if cuda else 0


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, default=788, help="of each sample")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--repeat", type=int, default=5, help="rounds, each with all measurements")
    args = p.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    fast = cuda or torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": D, "num_attention_heads": HEADS, "intermediate_size": MLP}
        LlamaConfig(**shape, num_hidden_layers=1).save_pretrained(folder)
        ours = LLMBlock(folder, DIM, kind="random", dtype=dtype).to(device)
    paper = PaperBlock(ours)
    x = torch.randn(args.batch, args.tokens, DIM, device=device, requires_grad=True)
    g = torch.randn_like(x)
    rows = args.batch * args.tokens
    weights = [w for w in ours.layers[0].parameters() if w.ndim == 2]  # (out, in)
    flat = torch.randn(rows, MLP, device=device, dtype=dtype)
    pairs = [(w, *(flat[:, :k].contiguous() for k in w.shape)) for w in weights]
    runs = {
        "matmul": lambda: [(F.linear(z, w), dy @ w) for w, dy, z in pairs],
        "ours": lambda: step(ours, x, g, dtype),
        "paper": lambda: step(paper, x, g, torch.float16 if cuda else torch.float32),
    }
    results = zip(runs["ours"](), runs["paper"](), strict=True)  # a warm-up, too
    error = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in results)
    assert error < 0.05, f"the two blocks differ by {error:.1%}"
    runs["matmul"]()
    rounds = [{k: measure(run, cuda) for k, run in runs.items()} for _ in range(args.repeat)]

    result = vars(args) | {"device": torch.cuda.get_device_name() if cuda else "cpu"}
    for k in runs:
        result[f"{k}_s"] = round(statistics.median(r[k][0] for r in rounds), 5)
        result[f"{k}_peak_mb"] = round(rounds[-1][k][1] / 1e6)
        print(f"{k:6} {result[f'{k}_s']:9.4f} s {result[f'{k}_peak_mb']:6} MB above what was there")
    result["speedup"] = round(statistics.median(r["paper"][0] / r["ours"][0] for r in rounds), 3)
    result["matmul_share"] = round(
        statistics.median(r["matmul"][0] / r["ours"][0] for r in rounds), 3
    )
    result |= {"error": round(error, 5), "dtype": str(dtype)[6:], "torch": torch.__version__}
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
