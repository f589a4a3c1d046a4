"""Train the offline stand-in LLM: a byte-level Llama of 1.8M parameters, 3.6 MB, in tiny_llm/.

    python tests/make_tiny_llm.py                            # 26 minutes on 2 busy CPU cores
    python tests/make_tiny_llm.py --steps 20 --out tiny_try  # 4 minutes

It learns from the English docstrings of torch, transformers and what they bring along: nothing is
downloaded. A token is a byte; byte 0 separates docstrings. The last line tells the validation nats
per byte; guessing has ln 256 = 5.55. The bundled files (torch 2.15, transformers 5.23, ended by a
clock after 1015 steps) have 1.24.
"""

import argparse
import ast
import hashlib
import importlib.util
import math
import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PACKAGES = "torch torchvision transformers numpy huggingface_hub safetensors tokenizers sympy"
PACKAGES += " networkx jinja2 fsspec tqdm mpmath"  # those that are installed
COMMON_WORDS = re.compile(r"\b(the|of|to|is|a|and|in|for|be|that|with)\b")
SHAPE = dict(vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=4)
SHAPE |= dict(num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256)
SHAPE |= dict(rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)


def docstrings(root):
    """Yield (is_validation, text) for every docstring under a package; nothing is imported."""
    for path in sorted(root.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates and test fixtures; ValueError: not UTF-8
            continue
        # Whole files are held out (about one in 20): neighbours in a file often share sentences.
        name = path.relative_to(root.parent).as_posix()
        is_validation = hashlib.sha256(name.encode()).digest()[0] < 13
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield is_validation, re.sub(r"[^\n -~]", "", ast.get_docstring(node) or "")


def is_english(text):
    """Prose rather than a formula, a table or a doctest session."""
    letters = sum(c.isalpha() for c in text)
    dense = letters > 0.8 * len(re.sub(r"\s", "", text))
    return len(text) >= 80 and dense and 40 * len(COMMON_WORDS.findall(text)) > len(text)


def load_text():
    """The training and the validation bytes, two 1-d tensors."""
    found = []
    for package in PACKAGES.split():
        spec = importlib.util.find_spec(package)  # locates a top-level package, runs nothing
        if spec and spec.submodule_search_locations:
            found += docstrings(Path(spec.submodule_search_locations[0]))
    # One text per first line, training files first: copied functions differ in a parameter only.
    splits, first_lines = ([], []), set()
    for is_validation, text in sorted(found, key=lambda item: item[0]):
        first_line = text.split("\n")[0]
        if is_english(text) and first_line not in first_lines:
            first_lines.add(first_line)
            splits[is_validation].append(text)
    joined = [bytearray("\0".join(texts).encode()) for texts in splits]
    return [torch.frombuffer(text, dtype=torch.uint8).long() for text in joined]


@torch.no_grad()
def nats_per_byte(model, data):
    """Mean over windows of 256 bytes, of which the first is not predicted."""
    windows = data[: len(data) // 256 * 256].view(-1, 256)
    losses = [model(input_ids=x, labels=x).loss * len(x) for x in windows.split(64)]
    return sum(losses).item() / len(windows)


def train(model, data, steps):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]  # of the norms: not decayed
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)  # 1 to 0.1
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / (0.05 * steps), cosine)
        x = data[torch.randint(len(data) - 256, (32, 1)) + torch.arange(256)]  # (B, T)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=x, labels=x).loss  # it shifts the labels
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step + 1} | loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_llm")
    p.add_argument("--steps", type=int, default=1015, help="of 32 windows of 256 bytes")
    args = p.parse_args()
    data, validation = load_text()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    train(model, data, args.steps)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "generation_config.json").unlink(missing_ok=True)  # never asked to generate
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    print(f"validation: {nats_per_byte(model, validation):.2f} nats per byte")
