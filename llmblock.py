"""One frozen transformer block of a text-only language model, as a layer of a visual encoder.

    block = LLMBlock("HuggingFaceTB/SmolLM2-135M", dim=384)     # a hub name or a local directory
    y = block(x)                        # x (B, N, dim) -> y (B, N, dim)
    y = block(x, mask)                  # mask (B, N) bool, True = real token, False = padding

    python llmblock.py --llm NAME|DIR [--layers -1]             # describe the block

The method of "Frozen Transformers in Language Models Are Effective Visual Encoder Layers" (ICLR
2024, https://arxiv.org/abs/2310.12973): proj_in -> a decoder layer of the LLM, as transformers
implements it -> RMSNorm -> proj_out. No causal mask, no positions, and the layer never trains.

Letters: B batch, N tokens, D width of the LLM, dim width of the host (the visual encoder).
"""

import argparse
import hashlib
import inspect
import json
import os
import pickle
import sys
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from huggingface_hub import errors, hf_hub_download, hf_hub_url, snapshot_download, utils
from safetensors import safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

# none: the plain host. linear, mlp: no LLM layer. finetuned, trained: the LLM layer trains, too.
FROZEN = ("random", "shuffled", "pretrained")  # where a frozen layer's values come from
KINDS = ("none", "linear", "mlp", *FROZEN, "finetuned", "trained")
MASKED = -3e4  # added to the attention logits of padding: finite, also in fp16


class LLMBlock(nn.Module):
    """Decoder layer(s) of an LLM between two trained linear layers: (B, N, dim) -> (B, N, dim).

    llm: directory or Hugging Face name. layers: one or more indices, negative from the end.
    kind: one of KINDS. seed: of projections and of random or shuffled weights. dtype: of frozen
    layers; whatever trains stays fp32. Raises UserError: wrong argument, unfit LLM, damaged file.

    Frozen layers stand in a plain list, so PyTorch does not see them as a part of this module: no
    optimiser, weight decay, initialisation of the host, DDP broadcast or checkpoint meets them.
    `.to()`, `.cuda()`, `.half()` move them all the same. (`.to_empty()` would wipe them.)
    """

    def __init__(self, llm, dim, layers=-1, kind="pretrained", seed=0, dtype=torch.float32):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"unknown kind of block '{kind}': choose from {', '.join(KINDS)}")
        self.kind = kind
        self.layers = []
        self.record = {"kind": kind}  # describes the block: its LLM, layers and hash follow
        if kind == "none":
            return  # the plain host
        config, root, repo = find_llm(llm)
        D = config.hidden_size
        n = config.num_hidden_layers
        layers = [layers] if isinstance(layers, int) else layers
        if not all(-n <= i < n for i in layers):
            raise UserError(f"layers {layers}: {llm} has {n}, 0 to {n - 1} or -{n} to -1")
        layers = [i % n for i in layers]  # -1 is the last one, n - 1
        self.record |= {"llm": str(llm), "layers": layers}
        # The host's random numbers stay as they were, and every kind gets the same projections.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
            self.proj_in = nn.Linear(dim, D, bias=False)
            self.proj_out = nn.Linear(D, dim, bias=False)
            if kind == "mlp":
                self.norm = nn.LayerNorm(D)  # the paper's control
            elif kind != "linear":
                with reading(f"{llm} ({config.model_type}: unfit or damaged)"):
                    self._add_layers(config, root, repo, layers, dtype)
        if kind in FROZEN:
            self.record["hash"] = hash_weights(self.layers)

    def _add_layers(self, config, root, repo, indices, dtype):
        """Lay out the LLM (meta device: no memory), find its stack, fill only the wanted layers."""
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)  # no dropout, also in layers that train
        with torch.device("meta"):
            llm = AutoModel.from_config(config, dtype=torch.float32)
        stacks = {k: m for k, m in llm.named_modules() if isinstance(m, nn.ModuleList)}
        path = next(k for k, m in stacks.items() if len(m) == config.num_hidden_layers)
        frozen = self.kind in FROZEN
        for i in indices:
            layer = stacks[path][i].requires_grad_(not frozen)
            unsaved = set(dict(layer.named_buffers())) - set(layer.state_dict())
            if unsaved or getattr(config, "alibi", False):  # GPT-Neo; Falcon
                raise ValueError("a layer has positions or a mask built in")
            for module in layer.modules():
                if hasattr(module, "is_causal"):
                    module.is_causal = False  # every token may look at every other
            if self.kind in ("random", "trained"):
                layer.to_empty(device="cpu").apply(llm._init_weights)  # as before pre-training
            else:
                names = list(layer.state_dict())  # self_attn.q_proj.weight and so on
                layer.load_state_dict(read_layer(root, repo, f"{path}.{i}", names), assign=True)
            if self.kind == "shuffled":  # every tensor keeps its values and loses their order
                for p in layer.parameters():
                    p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
            self.layers.append(layer.eval().to(dtype if frozen else torch.float32))
        if not frozen:
            self.layers = nn.ModuleList(self.layers)  # what trains is a part of this module

        # What the layers want to be called with: rotary positions, and oddities of some families.
        self.argument_names = set(inspect.signature(layer.forward).parameters)
        self.rotary_emb = None
        self.rotary_types = [()] * len(indices)  # further arguments of rotary_emb, for each layer
        if hasattr(llm, "rotary_emb"):
            self.rotary_emb = type(llm.rotary_emb)(llm.config)  # llm's own has no numbers (meta)
            if "layer_type" in inspect.signature(self.rotary_emb.forward).parameters:  # Gemma 3
                self.rotary_types = [(config.layer_types[i],) for i in indices]
        self._check_order(config.hidden_size)

    def _apply(self, fn, recurse=True):
        """What `.to()`, `.cuda()` and the like call: frozen layers move along."""
        if self.kind in FROZEN:
            for layer in self.layers:
                layer._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, x, mask=None):
        """x (B, N, dim), mask (B, N) bool or None -> (B, N, dim)."""
        if self.kind == "none":
            return x
        h = self.proj_in(x)  # (B, N, D)
        if self.kind == "mlp":
            h = self.norm(F.gelu(h))  # stands in for the LLM
        elif self.kind != "linear":
            h = self.run_layers(h, mask)
            # NOTE(paper): the released code has this norm (gain fixed at 1), the text does not.
            h = F.rms_norm(h.float(), h.shape[-1:], eps=1e-6).to(self.proj_out.weight.dtype)
        return self.proj_out(h)  # (B, N, dim)

    def run_layers(self, h, mask=None):
        """The LLM's own layers without causal mask and positions: (B, N, D) -> (B, N, D)."""
        B, N, D = h.shape
        h = h.to(next(self.layers[0].parameters()).dtype)  # bf16, if the layers are
        if mask is not None:
            # Numbers, not bool: eager attention adds its mask, and would add True as 1.
            mask = torch.zeros_like(mask, dtype=h.dtype).masked_fill(~mask, MASKED)
            mask = mask[:, None, None, :].expand(B, 1, N, N)  # keys, alike for every query
        # Every token is at position 0, where the rotation of queries and keys is the identity.
        positions = torch.zeros(1, N, dtype=torch.long, device=h.device)
        extra = {"position_ids": positions, "alibi": None, "shared_kv_states": {}}
        given = {name: value for name, value in extra.items() if name in self.argument_names}
        for layer, rotary_type in zip(self.layers, self.rotary_types, strict=True):
            if self.rotary_emb is not None:
                given["position_embeddings"] = self.rotary_emb(h, positions, *rotary_type)
            h = layer(h, attention_mask=mask, **given)
            if isinstance(h, tuple):  # (tokens, attention weights or cache)
                h = h[0]
        return h

    @torch.no_grad()
    def _check_order(self, D):
        """No causal mask and no positions: permuted tokens, with padding behind them, must give
        permuted outputs. A family for which this fails is refused."""
        # Small, so that the layer's own output decides the comparison, not the residual.
        x = torch.randn(1, 5, D) / 100
        order = [3, 0, 4, 1, 2]
        padded = torch.cat([x[:, order], torch.randn(1, 2, D)], dim=1)
        mask = torch.tensor([[True] * 5 + [False] * 2])
        expected = self.run_layers(x)[:, order].float()
        output = self.run_layers(padded, mask)[:, :5].float()
        error = (output - expected).abs().max() / expected.abs().max()  # relative
        if not error < 0.05:  # bf16 has 8 bits; and NaN is not less than anything
            raise ValueError("a layer depends on the order of its tokens, or is not finite")


def hash_weights(layers):
    """Hash of all weights, rounded to bf16 so that an fp32 and a bf16 copy of a layer agree."""
    digest = hashlib.sha256()
    for layer in layers:
        for name, t in sorted(layer.state_dict().items()):  # in an order that never changes
            bits = t.bfloat16().contiguous().view(torch.int16)
            digest.update(name.encode())
            digest.update(bits.numpy().data)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- reading one layer, no more
def find_llm(llm):
    """(config of the text model, directory that holds it, hub name or None if it is local)."""
    folders = [p for p in (Path(llm), Path(__file__).parent / llm) if p.is_dir()]
    repo = None if folders else str(llm)  # (tests/tiny_llm is beside this file)
    with reading(llm if folders else f"{llm} (no directory here)"):
        root = folders[0] if folders else Path(hf_hub_download(repo, "config.json")).parent
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
        text = config.get_text_config()
        if config.is_encoder_decoder or not hasattr(text, "num_hidden_layers"):
            raise ValueError(f"{config.model_type} is not a decoder-only language model")
        if getattr(config, "quantization_config", None):  # its scales are tensors of their own
            raise ValueError("it is quantised: name the model that it was made from")
    return text, root, repo


def read_layer(root, repo, prefix, names):
    """{parameter: tensor} of the layer that stands under `prefix`, say layers.31."""
    for stem in (f"llmblock.{prefix}.safetensors", "model.safetensors", "pytorch_model.bin"):
        index = root / f"{stem}.index.json"
        if index.exists():
            files = json.loads(index.read_text())["weight_map"]
        elif (root / stem).exists():
            files = dict.fromkeys(read_tensors(root / stem), stem)
        else:
            continue
        keys = match(files, prefix, names)
        if all((root / files[key]).exists() for key in keys.values()):
            # A file is opened anew for each tensor: an open one keeps in memory all that was read.
            return {name: read_tensors(root / files[key], key) for name, key in keys.items()}
    if repo is None:
        raise FileNotFoundError("no model.safetensors or pytorch_model.bin, or a shard is missing")
    fetch_layer(repo, root, prefix, names)
    return read_layer(root, None, prefix, names)  # None: from now on it is a local directory


def match(keys, prefix, names):
    """{parameter: its key in the file}, which may begin with, say, model. before layers.31."""
    keys = set(keys)
    tail = f"{prefix}.{names[0]}"
    outer = {key.removesuffix(tail) for key in keys if f".{key}".endswith(f".{tail}")}
    outer = [o for o in outer if all(f"{o}{prefix}.{name}" in keys for name in names)]
    if len(outer) != 1:
        why = "perhaps it was not saved, or has fused or renamed weights, as experts often have"
        raise ValueError(f"{prefix} is in it {len(outer)} times, not once: {why}")
    return {name: f"{outer[0]}{prefix}.{name}" for name in names}


def read_tensors(file, key=None):
    """Tensor `key`, or without it the names of all. Mapped into memory: no other one is read."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as f:
            return f.get_tensor(key) if key else list(f.keys())
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return state[key].clone() if key else list(state)


def fetch_layer(repo, root, prefix, names):
    """Put one layer of a hub model into the cache's folder of that model, as a file of its own."""
    path = root / f"llmblock.{prefix}.safetensors"
    part = path.with_suffix(".part")
    with FileLock(f"{path}.lock"):  # torchrun starts several processes at once
        if path.exists():
            return  # another process was faster
        data = fetch_ranges(repo, root.name, prefix, names)  # root is named by its commit
        if data:
            part.write_bytes(data)
            os.replace(part, path)  # so that a half-written file is never found there
        else:
            print(f"{repo}: no safetensors, or no byte ranges of them: fetching the whole model")
            weights = ["*.safetensors*", "*.bin*"]
            snapshot_download(repo, revision=root.name, allow_patterns=weights)


def fetch_ranges(repo, commit, prefix, names):
    """The bytes of a small safetensors file with one layer; b"" without safetensors or byte ranges.

    The format: 8 bytes with the length of the header; the header in JSON, {name: {dtype, shape,
    data_offsets}}; the data.
    """
    files = None
    shards = ["model.safetensors"]
    with suppress(errors.RemoteEntryNotFoundError):  # which means: it is a single file
        index = hf_hub_download(repo, "model.safetensors.index.json", revision=commit)
        files = json.loads(Path(index).read_text())["weight_map"]
        shards = sorted({files[key] for key in match(files, prefix, names).values()})
    header = {}
    pieces = []
    size = 0  # of the pieces in bytes
    for shard in shards:
        url = hf_hub_url(repo, shard, revision=commit)
        begin = find_data(url)
        if begin is None:
            return b""
        tensors = json.loads(read_range(url, 8, begin))
        for key in match(files or tensors, prefix, names).values():  # a single file has no index
            if key in tensors:
                start, stop = tensors[key]["data_offsets"]
                pieces.append(read_range(url, begin + start, begin + stop))
                header[key] = tensors[key] | {"data_offsets": [size, size + stop - start]}
                size += stop - start
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(pieces)


def find_data(url):
    """Where the data of a safetensors file begin; None if there is none, or no byte ranges."""
    # 206 is a range. At 200 the whole file is coming: a stream lets us hang up at once.
    with ask(utils.http_stream_backoff, url, 0, 8) as answer:
        if answer.status_code in (200, 404):
            return None
        utils.hf_raise_for_status(answer)
        return 8 + int.from_bytes(answer.read(), "little")


def read_range(url, start, stop):
    answer = ask(utils.http_backoff, url, start, stop)  # retries if a connection breaks
    utils.hf_raise_for_status(answer)
    return answer.content


def ask(request, url, start, stop):
    """Ask for bytes [start, stop) of a file."""
    span = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    return request("GET", url, headers=utils.build_hf_headers() | span, timeout=30)


# ---------------------------------------------------------------- files and mistakes
class UserError(Exception):
    """A mistake that only the user can mend. One line: what was found and what to do."""

    def __init__(self, text):
        # An error in a DataLoader's worker arrives with its whole traceback as text: keep our part.
        text = str(text).rpartition("UserError: ")[2]
        super().__init__(" ".join(text.split()))


def fail(message):
    print("error:", UserError(message), file=sys.stderr)  # UserError makes it one line
    sys.exit(2)


def run(main):
    """Run a script. A mistake of the user's is one line and exit code 2."""
    try:
        main()
    except (UserError, OSError) as e:
        fail(e)
    except KeyboardInterrupt:
        print("stopped: the same command resumes a training", file=sys.stderr)
        sys.exit(130)


@contextmanager
def reading(name):
    """Whatever goes wrong while a file or an LLM is read becomes one line with its name."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # a damaged file may raise anything
        raise UserError(f"cannot use {name}: {type(e).__name__}: {e}") from e


def read(path, task=None):
    """Load what torch.save wrote, only tensors and plain values. task: the script it must be of."""
    with reading(path):
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a wrong checksum, which torch.load would not notice")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:  # its own text advises weights_only=False
            raise ValueError("damaged, or more than tensors and plain values") from e
        if task and (not isinstance(state, dict) or state.get("task") != task):
            raise ValueError(f"it was not written by train_{task}.py")
    return state


def save(state, path):
    """Write a checkpoint wholly or not at all."""
    part = path.with_suffix(f".part{os.getpid()}")  # two processes may write at the same time
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}, what was there is kept: {e}") from e


def main(argv=None):
    parser = argparse.ArgumentParser(description="Describe the block made of an LLM's layer(s).")
    parser.add_argument("--llm", required=True, help="hub name or local directory")
    parser.add_argument("--layers", type=int, nargs="+", default=[-1], help="-1 is the last")
    args = parser.parse_args(argv)
    config, root, _ = find_llm(args.llm)
    block = LLMBlock(args.llm, 384, args.layers)
    size = sum(p.numel() for layer in block.layers for p in layer.parameters())
    print(f"family      {config.model_type}, from {root}")
    print(f"layers      {block.record['layers']} of {config.num_hidden_layers}")
    print(f"width       {config.hidden_size}, {config.num_attention_heads} heads")
    print(f"parameters  {size:,} frozen, {4 * size:,} bytes, hash {block.record['hash']}")
    # 197 tokens: 14 x 14 patches and CLS. MATH: the counter does not know fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        block(torch.zeros(1, 197, 384))
    print(f"compute     {counter.get_total_flops() / 1e9:.2f} GFLOPs per 197 tokens")


if __name__ == "__main__":
    run(main)
