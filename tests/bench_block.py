"""How fast is the frozen block? Against this machine's matmul rate and the paper's own code.

    python tests/bench_block.py             # LLaMA-7B's layer, 788 tokens, 1 to 2 minutes, 2.8 GB

Prints medians of interleaved rounds: fp32 and matmul (the block's seven matrices alone, forward and
input gradient, in fp32 and in bf16), ours (LLMBlock, forward and backward), paper (written out:
fp32, on CUDA fp16 autocast; checked against ours); last RESULT {...}. AMD EPYC with AVX512-BF16,
2 cores, torch 2.15: fp32 169, matmul 411, ours 362 (89 %), paper 165 GFLOP/s, ours 2.19 times as
fast. Other jobs on the machine change these: 71 to 91 %, 1.95 to 2.55 times.
CUDA: not run yet.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llmblock import LLMBlock, count_gflops  # noqa: E402

DIM, D, HEADS, MLP = 384, 4096, 32, 11008  # host: DeiT-S, LLM: LLaMA-7B


class PaperBlock(nn.Module):
    """The block as the paper's released code runs it: fp32 weights, attention written out."""

    def __init__(self, ours):
        super().__init__()
        self.proj_in, self.proj_out = copy.deepcopy(ours.proj_in), copy.deepcopy(ours.proj_out)
        params = [nn.Parameter(w.float(), requires_grad=False) for w in ours.layers.buffers()]
        self.gains = nn.ParameterList(p for p in params if p.ndim == 1)
        linear = partial(nn.Linear, bias=False, device="meta")
        self.linears = nn.ModuleList(linear(*p.shape[::-1]) for p in params if p.ndim == 2)
        for m, p in zip(self.linears, params, strict=False):  # q, k, v, o, gate, up, down
            m.weight = p

    def forward(self, x):
        q, k, v, o, gate, up, down = self.linears
        h = self.proj_in(x)  # (B, N, D)
        z = self.norm(h) * self.gains[0]
        q, k, v = (m(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (q, k, v))
        scores = q @ k.transpose(2, 3) / (D // HEADS) ** 0.5  # (B, HEADS, N, N)
        z = F.softmax(scores.float(), dim=-1).type_as(q) @ v  # (B, HEADS, N, D / HEADS)
        h = h + o(z.transpose(1, 2).flatten(2))  # (B, N, D)
        z = self.norm(h) * self.gains[1]
        h = h + down(F.silu(gate(z)) * up(z))
        return self.proj_out(self.norm(h))  # (B, N, DIM)

    def norm(self, h):
        return (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(h)


def step(block, x, g, dtype):
    """Forward and backward: the output and the gradients of x and of both projections."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = block(x)
    inputs = x, block.proj_in.weight, block.proj_out.weight
    return y, *torch.autograd.grad(y, inputs, g.to(y.dtype))


def measure(run, cuda):
    """(seconds per call, peak bytes above what was allocated before; 0 on the CPU)."""
    if not cuda:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 20, torch.cuda.max_memory_allocated() - before


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, default=788, help="of each sample")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--repeat", type=int, default=5, help="rounds, each with all measurements")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = p.parse_args()
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    fast = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": D, "num_attention_heads": HEADS, "intermediate_size": MLP}
        LlamaConfig(**shape, num_hidden_layers=1).save_pretrained(folder)
        ours = LLMBlock(folder, DIM, kind="random", dtype=dtype).to(device)
    blocks = {"ours": ours, "paper": PaperBlock(ours)}
    x, g = torch.randn(2, args.batch, args.tokens, DIM, device=device)
    x.requires_grad_()
    weights = [w for w in ours.layers.buffers() if w.ndim == 2]  # (out, in)
    flat = torch.randn(args.batch * args.tokens, MLP, device=device, dtype=dtype)
    pairs = [(w, *(flat[:, :k].contiguous() for k in w.shape)) for w in weights]
    linears = blocks["paper"].linears
    slow = [(m.weight, dy.float(), z.float()) for m, (_, dy, z) in zip(linears, pairs, strict=True)]
    runs = {
        "fp32": lambda: [(F.linear(z, w), dy @ w) for w, dy, z in slow],
        "matmul": lambda: [(F.linear(z, w), dy @ w) for w, dy, z in pairs],
        "ours": lambda: step(ours, x, g, dtype),
        "paper": lambda: step(blocks["paper"], x, g, torch.float16 if cuda else torch.float32),
    }
    results = zip(runs["ours"](), runs["paper"](), strict=True)  # output and gradients; a warm-up
    error = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in results)
    assert error < 0.05, f"the two blocks differ by {error:.1%}"
    runs["matmul"](), runs["fp32"]()
    rounds = [{k: measure(run, cuda) for k, run in runs.items()} for _ in range(args.repeat)]
    linear = sum(2 * len(flat) * w.numel() for w in weights) / 1e9
    # Backward costs what forward does for frozen weights, twice that for everything else.
    whole = 3 * count_gflops(ours, x) - linear
    result = vars(args) | {"device": torch.cuda.get_device_name() if cuda else "cpu"}
    for k in runs:
        seconds = statistics.median(r[k][0] for r in rounds)
        rate = (whole if k in blocks else 2 * linear) / seconds
        result |= {f"{k}_s": round(seconds, 5), f"{k}_gflops_per_s": round(rate, 1)}
        print(f"{k:6} {seconds:9.4f} s {rate:9.1f} GFLOP/s", end="")
        if cuda and k in blocks:
            own = sum(t.nbytes for t in [*blocks[k].parameters(), *blocks[k].buffers()])
            result[f"{k}_peak_mb"] = round((rounds[-1][k][1] + own) / 1e6)
            print(f" {result[f'{k}_peak_mb']:6} MB at the peak, weights included", end="")
        print()
    share = statistics.median(r["matmul"][0] / r["ours"][0] for r in rounds) * whole / linear / 2
    speedup = statistics.median(r["paper"][0] / r["ours"][0] for r in rounds)
    print(f"ours: {share:.1%} of the matmul rate, {speedup:.2f} x paper, differs by {error:.2%}")
    result |= {"share": round(share, 4), "speedup": round(speedup, 3), "error": round(error, 5)}
    print("RESULT", json.dumps(result | {"dtype": str(dtype)[6:], "torch": torch.__version__}))


if __name__ == "__main__":
    main()
