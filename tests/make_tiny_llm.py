"""Train the offline stand-in LLM: a byte-level Llama of 1.8M parameters, 3.6 MB, in tiny_llm/.

    python tests/make_tiny_llm.py --minutes 20               # 26 minutes on 2 busy CPU cores
    python tests/make_tiny_llm.py --steps 20 --out tiny_try  # about 4 minutes

It learns from the English docstrings of the packages that torch and transformers bring along, so
it needs no download and anyone can make it again (other package versions: slightly other text).
A token is a byte; byte 0 separates docstrings.

Prints a line every 100 steps and last: RESULT {...} with the validation nats per byte of the
trained model, of its untrained self, and of the trained model with the values inside each weight
tensor permuted: same histogram, no structure. Uniform guessing is ln 256 = 5.55. The bundled files
(the first command, which the clock ended after 1015 steps, torch 2.15, transformers 5.23, seed 0):
trained 1.24, untrained 5.58, layers permuted 9.40, all tensors permuted 8.37.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import re
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

# B batch, T bytes in a window, V = 256 byte values. Packages that are not installed are skipped.
PACKAGES = "torch torchvision transformers numpy huggingface_hub safetensors tokenizers sympy"
PACKAGES += " networkx jinja2 fsspec tqdm mpmath"
COMMON_WORDS = re.compile(r"\b(the|of|to|is|a|and|in|for|be|that|with)\b")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_llm")
    p.add_argument("--steps", type=int, default=1300, help="of 32 windows of 256 bytes")
    p.add_argument("--minutes", type=float, default=math.inf, help="end training by then, annealed")
    p.add_argument("--lr", type=float, default=3e-3, help="peak; 5%% warm-up, cosine to a tenth")
    p.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of matmuls")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args(argv)


def docstrings(root):
    """Yield (is_validation, text) for every docstring under a package; nothing is imported."""
    for path in sorted(root.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates and test fixtures; ValueError: not UTF-8
            continue
        # Whole files are held out (about one in 20): neighbours in a file often share sentences.
        name = path.relative_to(root.parent).as_posix()
        is_val = hashlib.sha256(name.encode()).digest()[0] < 13
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node, clean=True) or ""  # clean: inspect.cleandoc
                yield is_val, re.sub(r"[^\n -~]", "", text)


def is_english(text):
    """Prose rather than a formula, a table or a doctest session."""
    letters = sum(c.isalpha() for c in text)
    dense = letters > 0.8 * len(re.sub(r"\s", "", text))
    return len(text) >= 80 and dense and 40 * len(COMMON_WORDS.findall(text)) > len(text)


def load_text():
    """Return the training and the validation bytes, two 1-d uint8 tensors."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in other people's sources
        for package in PACKAGES.split():
            spec = importlib.util.find_spec(package)  # locates a top-level package, runs nothing
            if spec and spec.submodule_search_locations:
                found += docstrings(Path(spec.submodule_search_locations[0]))
    # One text per first line: copied functions differ in a parameter only. Training files go
    # first, so that no validation text opens like one the model was trained on.
    splits, seen = ([], []), set()
    for is_val, text in sorted(found, key=lambda item: item[0]):
        first_line = text.split("\n")[0]
        if is_english(text) and first_line not in seen:
            seen.add(first_line)
            splits[is_val].append(text)
    joined = ["\0".join(texts).encode("ascii") for texts in splits]
    return [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in joined]


@torch.no_grad()
def nats_per_byte(model, data):
    """Mean over all predicted bytes of consecutive windows (the first byte has no context)."""
    model.eval()
    windows = data[: len(data) // 256 * 256].view(-1, 256).long()  # (windows, T)
    total = 0.0
    for x in windows.split(64):  # (B, T)
        logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()  # (B, T-1, V)
        total += F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
    return round(total / (len(windows) * 255), 4)


def train(model, data, args):
    """One pass of AdamW over random windows; returns the number of steps done."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]  # of the norms: not decayed
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    generator, start, mean_loss = torch.Generator().manual_seed(args.seed), time.time(), 0.0
    model.train()
    for step in range(1, args.steps + 1):
        # Done so far, 0 to 1; the clock counts only where it runs ahead of the steps.
        minutes = (time.time() - start) / 60
        done = max((step - 1) / args.steps, min(minutes / args.minutes, 1.0))
        lr = args.lr * min(step / (0.05 * args.steps), 0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        offsets = torch.randint(len(data) - 256, (32, 1), generator=generator)
        x = data[offsets + torch.arange(256)].long()  # (B, T)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(input_ids=x, labels=x, use_cache=False).loss  # it shifts the labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss += loss.item() / 100
        if step % 100 == 0:
            print(
                f"step {step} | loss {mean_loss:.4f} | lr {lr:.1e} | {minutes:.1f} min", flush=True
            )
            mean_loss = 0.0
        if done >= 1:
            break
    return step


@torch.no_grad()
def shuffle_(parameters, seed):
    """Permute the values inside each tensor, in place."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        order = torch.randperm(p.numel(), generator=generator)
        p.copy_(p.flatten()[order].view_as(p))


def main(args):
    start = time.time()
    torch.set_num_threads(args.threads)
    data, val_data = load_text()
    print(f"{len(data)} training bytes, {len(val_data)} validation bytes", flush=True)

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    nats = {"untrained": nats_per_byte(model, val_data)}
    steps = train(model, data, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "generation_config.json").unlink(missing_ok=True)  # never asked to generate

    # Judge the files, not the object in memory: bf16 values read back, arithmetic in fp32.
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    nats["trained"] = nats_per_byte(model, val_data)
    shuffle_(model.model.layers.parameters(), args.seed)  # embedding and final norm kept
    nats["shuffled_layers"] = nats_per_byte(model, val_data)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    shuffle_(model.parameters(), args.seed)
    nats["shuffled_all"] = nats_per_byte(model, val_data)

    result = {"val_nats_per_byte": nats, "train_bytes": len(data), "val_bytes": len(val_data)}
    result |= {"steps": steps, "seed": args.seed, "seconds": round(time.time() - start)}
    result["params"] = sum(p.numel() for p in model.parameters())
    result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    print("RESULT " + json.dumps(result))
    return result


if __name__ == "__main__":
    main(parse_args())
