"""One frozen transformer block of a text-only language model, as a layer of a visual encoder.

    block = LLMBlock("HuggingFaceTB/SmolLM2-135M", dim=384)     # a hub name or a local directory
    y = block(x)                        # x (B, N, dim) -> y (B, N, dim)
    y = block(x, mask)                  # mask (B, N) bool, True = real token, False = padding

    python llmblock.py --llm NAME|DIR [--layers -1]             # describe the block

The method of "Frozen Transformers in Language Models Are Effective Visual Encoder Layers" (ICLR
2024, https://arxiv.org/abs/2310.12973): proj_in -> a decoder layer of the LLM, as transformers
implements it -> RMSNorm -> proj_out. No causal mask, no positions, and the layer never trains.

Letters: B batch, N tokens, D width of the LLM, dim width of the host encoder.
"""

import argparse
import hashlib
import inspect
import json
import os
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from huggingface_hub import errors, hf_hub_download, hf_hub_url, utils
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

FROZEN = ("random", "shuffled", "pretrained")
KINDS = ("none", "linear", "mlp", *FROZEN, "finetuned", "trained")


class UserError(Exception):
    """A mistake that only the user can mend. One line: what was found and what to do."""

    def __init__(self, text):
        super().__init__(" ".join(str(text).split()))


class LLMBlock(nn.Module):
    """Decoder layer(s) of an LLM between two trained linear layers: (B, N, dim) -> (B, N, dim).

    llm: local directory or Hugging Face name; layers: index or indices, negative from the end;
    kind: one of KINDS; seed: of the projections and of random or shuffled weights; dtype: of frozen
    weights, trained ones stay fp32; causal, rotary: give the LLM its own mask and positions back
    (controls). Raises UserError for a wrong argument or a damaged file.
    """

    def __init__(
        self, llm, dim, layers=-1, kind="pretrained", seed=0, dtype=None, causal=False, rotary=False
    ):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"unknown kind of block '{kind}': choose from {', '.join(KINDS)}")
        self.kind, self.causal, self.rotary = kind, False, False
        self.layers, self.bytes_read = nn.ModuleList(), 0
        self.record = {"kind": kind}  # goes into checkpoints, see set_extra_state
        if kind == "none":
            return
        config, root, repo = find_llm(llm)
        n = config.num_hidden_layers
        layers = [layers] if isinstance(layers, int) else list(layers)
        if not layers or min(layers) < -n or max(layers) >= n:
            given = " ".join(map(str, layers))
            raise UserError(f"layer {given}: {llm} has {n} layers, 0 to {n - 1} or -{n} to -1")
        layers = [i % n for i in layers]
        # Leaves the host's random numbers as they were.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # Every kind starts from the same projections. torch.manual_seed would seed GPUs, too.
            torch.default_generator.manual_seed(seed)
            self.proj_in = nn.Linear(dim, config.hidden_size, bias=False)
            self.proj_out = nn.Linear(config.hidden_size, dim, bias=False)
            if kind == "mlp":
                self.norm = nn.LayerNorm(config.hidden_size)
            elif kind != "linear":
                dtype = dtype if dtype and kind in FROZEN else torch.float32
                self._add_layers(config, root, repo, layers, dtype)
        if rotary and self.layers and not hasattr(self, "rotary_emb"):
            raise UserError(f"rotary: {config.model_type} has no rotary positions in its layers")
        self.causal, self.rotary = causal, rotary
        self.record |= {"llm": str(llm), "layers": layers, "causal": causal, "rotary": rotary}
        if kind in FROZEN:
            freeze(self.layers)
            self.record["hash"] = hash_tensors(self.layers)

    def _add_layers(self, config, root, repo, indices, dtype):
        """Lay the whole LLM out without memory (meta device), then fill the wanted layers alone."""
        n = config.num_hidden_layers
        try:
            with torch.device("meta"):
                llm = AutoModel.from_config(config, dtype=torch.float32)
            stacks = [(k, m) for k, m in llm.named_modules() if isinstance(m, nn.ModuleList)]
            path, stack = next((k, m) for k, m in stacks if len(m) == n)
        except Exception as e:  # an impossible config.json may raise anything
            raise UserError(f"{root}: config.json does not give {n} layers: {e!r}") from e
        self.rope_args = [()] * len(indices)
        if hasattr(llm, "rotary_emb"):
            self.rotary_emb = type(llm.rotary_emb)(llm.config)  # once more, off the meta device
            if "layer_type" in inspect.signature(self.rotary_emb.forward).parameters:  # Gemma 3
                self.rope_args = [(config.layer_types[i],) for i in indices]
        for i in indices:
            layer = stack[i]
            if next(layer.buffers(), None) is not None:  # GPT-J's positions, GPT-Neo's causal mask
                raise UserError(f"{config.model_type}: a layer has positions or a mask built in")
            for m in layer.modules():
                if hasattr(m, "is_causal"):
                    m.is_causal = False
            if self.kind in ("random", "trained"):
                layer.to_empty(device="cpu").apply(llm._init_weights)
            else:
                load_layer(layer, root, repo, f"{path}.{i}")
                self.bytes_read += sum(p.nbytes for p in layer.parameters())
            if self.kind == "shuffled":  # every tensor keeps its values and loses their order
                for p in layer.parameters():
                    p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
            self.layers.append(layer.requires_grad_().to(dtype).eval())
        self._check_equivariance(config)

    @torch.no_grad()
    def _check_equivariance(self, config):
        """No mask and no positions means: permuting the tokens permutes the outputs."""
        # Small, so that the layer's own output and not the residual decides the comparison.
        x, order = torch.randn(1, 5, config.hidden_size) / 100, [3, 0, 4, 1, 2]
        try:
            every = torch.ones(1, 5, dtype=torch.bool)  # to mask nothing must change nothing
            y, z = self._run_layers(x, None), self._run_layers(x[:, order], every)
        except Exception as e:  # ALiBi, recurrence, ...
            raise UserError(f"{config.model_type}: a layer does not run alone: {e}") from e
        if not y.isfinite().all():
            raise UserError(f"{config.model_type}: a layer's weights or outputs are not finite")
        if not torch.allclose(y[:, order], z, rtol=0.05, atol=0.05 * y.abs().max().item()):
            raise UserError(f"{config.model_type}: a layer depends on the order of its tokens")

    def forward(self, x, mask=None):
        if self.kind == "none":
            return x  # (B, N, dim)
        h = self.proj_in(x)  # (B, N, D)
        if self.kind == "mlp":
            h = self.norm(F.gelu(h))
        elif self.kind != "linear":
            h = self._run_layers(h, mask)
            # NOTE(paper): the released code has this norm (gain fixed at 1), the text does not.
            h = F.rms_norm(h.float(), h.shape[-1:], eps=1e-6).to(self.proj_out.weight.dtype)
        return self.proj_out(h)  # (B, N, dim)

    def _run_layers(self, h, mask, which=slice(None)):
        h = h.to(tensors(self.layers)[0].dtype)
        seen = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, N)
        if self.causal:
            triangle = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
            seen = triangle[None, None] if seen is None else seen & triangle  # (B, 1, N, N)
        if seen is not None:  # added to the logits: eager attention would add True as 1
            hidden = torch.finfo(h.dtype).min
            seen = torch.zeros_like(seen, dtype=h.dtype).masked_fill(~seen, hidden)
        # Rotary off: every token is at position 0, where the rotation is the identity.
        positions = torch.arange(h.shape[1], device=h.device)[None] * int(self.rotary)  # (1, N)
        for layer, rope_args in list(zip(self.layers, self.rope_args, strict=True))[which]:
            rope = {}
            if hasattr(self, "rotary_emb"):
                rope["position_embeddings"] = self.rotary_emb(h, positions, *rope_args)
            h = first(layer(h, attention_mask=seen, **rope))
        return h  # (B, N, D)

    def stages(self, x, mask=None):
        """What forward computes on its way: host (B, N, dim), proj_in, attention, ffn (B, N, D),
        proj_out (B, N, dim). attention and ffn are the residual stream of the last layer after
        its attention and after its FFN; a kind without layers has no such stages.
        """
        seen = {"host": x}
        if self.kind != "none":
            h = seen["proj_in"] = self.proj_in(x)
        if self.layers:
            h = self._run_layers(h, mask, slice(-1))
            # With a silent FFN, which is the last child that holds matrices, or ends with it.
            ffn = [m for m in self.layers[-1].children() if any(t.ndim > 1 for t in tensors(m))][-1]
            with ffn.register_forward_hook(lambda m, args, y: first(y) * 0):
                seen["attention"] = self._run_layers(h, mask, slice(-1, None))
            seen["ffn"] = self._run_layers(h, mask, slice(-1, None))
        return seen | {"proj_out": self(x, mask)}

    def train(self, mode=True):
        super().train(mode)
        self.layers.eval()  # the LLM's dropout stays off, also when it is fine-tuned
        return self

    def apply(self, fn):
        """As of every module, but frozen layers are left alone: hosts initialise theirs with it."""
        for m in self.children():
            if m is not self.layers or self.kind not in FROZEN:
                m.apply(fn)
        fn(self)
        return self

    def get_extra_state(self):
        """The record, with a hash of the frozen tensors as they are now, as bytes in a tensor."""
        if self.kind in FROZEN:
            self.record["hash"] = hash_tensors(self.layers)
        return torch.tensor(list(json.dumps(self.record).encode()), dtype=torch.uint8)

    def set_extra_state(self, saved):
        self.get_extra_state()
        saved = json.loads(bytes(saved.tolist()))
        for key, mine in self.record.items():
            if key != "llm" and saved.get(key) != mine:  # a directory may have moved
                theirs = f"{saved.get(key)} (LLM {saved.get('llm')})"
                raise UserError(f"checkpoint of another block: {key} is {theirs}, not {mine}")


def tensors(module):
    return (*module.parameters(), *module.buffers())


def first(output):
    """Layers return a tensor, or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def freeze(module):
    """Turn parameters into non-persistent buffers: they move with the model, but no optimiser,
    weight decay, gradient synchronisation or checkpoint ever meets them."""
    for m in module.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            delattr(m, name)
            m.register_buffer(name, p.detach(), persistent=False)


def hash_tensors(module):
    """Hash of all buffers, rounded to bf16 so that an fp32 and a bf16 copy of a layer agree."""
    digest = hashlib.sha256()
    for name, t in sorted(module.named_buffers()):
        bits = t.bfloat16().contiguous().view(torch.int16).cpu()
        digest.update(name.encode() + bits.numpy().data)
    return digest.hexdigest()[:16]


def count_gflops(module, *inputs):
    """GFLOPs (two per multiply-add) of the matrix multiplications in one forward pass."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 1e9


# ---------------------------------------------------------------- checkpoints and mistakes


def fail(message):
    print("error:", UserError(message), file=sys.stderr)  # on one line
    sys.exit(2)


def save(state, path):
    """Write a checkpoint wholly or not at all."""
    part = path.with_suffix(f".part{os.getpid()}")  # the same command may run twice
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}, what was there is kept: {e}") from e


def read(path, mmap=False):
    """What torch.save wrote to a file: nothing but tensors and plain values."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if part := file.testzip():  # torch.load does not look
                    raise zipfile.BadZipFile(f"wrong checksum of {part}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # a damaged file may raise anything
        why = f"{type(e).__name__}: {e}".partition(". ")[0]  # then PyTorch advises against safety
        raise UserError(f"{path} is missing, damaged or no checkpoint: {why}") from e


# ---------------------------------------------------------------- reading one layer, no more


def find_llm(llm):
    """(config of the text model, directory that holds it, hub name or None if local)."""
    root = next((p for p in (Path(llm), Path(__file__).parent / llm) if p.is_dir()), None)
    repo = None if root else str(llm)
    try:
        if repo:  # the cache keeps each commit in a folder named by its hash
            root = Path(hf_hub_download(repo, "config.json")).parent
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
    except Exception as e:
        raise UserError(f"{llm} is no directory or hub model with a known config: {e}") from e
    text = config.get_text_config()
    if config.is_encoder_decoder or not hasattr(text, "num_hidden_layers"):
        raise UserError(f"{llm}: {config.model_type} is not a decoder-only language model")
    if getattr(config, "quantization_config", None):  # whose scales stand beside the weights
        raise UserError(f"{llm} is quantised: name the model that it was made from")
    return text, root, repo


def load_layer(layer, root, repo, prefix):
    """Fill a layer with the tensors that stand under `prefix`, say layers.31."""
    names = [name for name, _ in layer.named_parameters()]
    try:
        files = {file.name: file for file in root.iterdir()}
        if repo:
            files = {"model.safetensors": fetch_layer(root, repo, prefix, names)}
        places = locate(files.get, prefix, names)
        values = {name: read_file(*place) for name, place in places.items()}
        layer.load_state_dict(values, assign=True)
    except Exception as e:
        raise UserError(f"{repo or root}: no weights that fit config.json: {e}") from e


def locate(get, prefix, names):
    """{parameter: (shard's path, key in it)}, by get(file name) -> path, or None if missing."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if index := get(f"{single}.index.json"):
            shard = json.loads(index.read_text())["weight_map"]
            keys = match(shard, prefix, names)
            if missing := [shard[k] for k in keys.values() if not get(shard[k])]:
                raise FileNotFoundError(f"{missing[0]} is missing")
            return {n: (get(shard[k]), k) for n, k in keys.items()}
        if file := get(single):
            return {n: (file, k) for n, k in match(read_file(file), prefix, names).items()}
    raise FileNotFoundError("neither model.safetensors nor pytorch_model.bin, nor an index of them")


def match(keys, prefix, names):
    """{parameter: its key}: layers.31 may stand under model. or language_model.model. or alone."""
    keys, tail = set(keys), f"{prefix}.{names[0]}"
    outer = {k.removesuffix(tail) for k in keys if k == tail or k.endswith(f".{tail}")}
    outer = [o for o in outer if all(f"{o}{prefix}.{n}" in keys for n in names)]
    if len(outer) != 1:
        raise ValueError(f"{len(outer)} layers match {prefix}.({'|'.join(names)})")
    return {n: f"{outer[0]}{prefix}.{n}" for n in names}


def read_file(file, key=None):
    """One tensor (or all names). The file is only mapped, so memory holds no more than that."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as f:
            return f.get_tensor(key) if key else list(f.keys())
    mmap = zipfile.is_zipfile(file)  # PyTorch's format since 1.6
    state = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    return state[key].clone() if key else list(state)


def download(repo, name, commit):
    """Path of a whole file of a hub repository, None if the repository lacks it."""
    try:
        return Path(hf_hub_download(repo, name, revision=commit))
    except errors.RemoteEntryNotFoundError:
        return None


def fetch_layer(root, repo, prefix, names):
    """Path of a small safetensors file in the hub's cache with one layer of a hub model."""
    path = root / f"llmblock.{prefix}.safetensors"
    with FileLock(f"{path}.lock"):  # torchrun starts several processes at once
        if not path.exists():
            part = path.with_suffix(".part")
            if not fetch_ranges(repo, root.name, prefix, names, part):
                print(f"{repo}: no byte ranges of safetensors, fetching the whole shard")
                places = locate(lambda name: download(repo, name, root.name), prefix, names)
                save_file({key: read_file(file, key) for file, key in places.values()}, part)
            os.replace(part, path)
    return path


def fetch_ranges(repo, commit, prefix, names, part):
    """Fetch only the bytes of a layer into a safetensors file `part`, resuming what is there.

    False if the server ignores ranges or has no safetensors. The format is: 8 bytes with the
    length of the header, the header {name: {dtype, shape, data_offsets}} in JSON, the data.
    """
    index = download(repo, "model.safetensors.index.json", commit)
    shards = json.loads(index.read_text())["weight_map"] if index else None
    ours = match(shards, prefix, names).values() if shards else None
    header, ranges, size = {}, [], 0
    for shard in sorted({shards[key] for key in ours}) if shards else ["model.safetensors"]:
        url = hf_hub_url(repo, shard, revision=commit)
        with utils.http_stream_backoff("GET", url, headers=byte_range(0, 8), timeout=30) as r:
            if r.status_code in (200, 404):  # known before a byte of a 13 GB body has come
                return False
            utils.hf_raise_for_status(r)
            data = 8 + int.from_bytes(r.read(), "little")
        theirs = json.loads(b"".join(read_range(url, 8, data)))
        for key in ours or match(theirs, prefix, names).values():
            if key in theirs:
                start, stop = theirs[key]["data_offsets"]
                ranges.append((url, data + start, data + stop))
                header[key] = {**theirs[key], "data_offsets": [size, size + stop - start]}
                size += stop - start
    head = json.dumps(header).encode()
    head = len(head).to_bytes(8, "little") + head
    with open(part, "ab") as f:
        if f.tell() < len(head):
            f.truncate(0)
            f.write(head)
        have = f.tell() - len(head)
        for url, start, stop in ranges:
            skip = min(have, stop - start)
            have -= skip
            for piece in read_range(url, start + skip, stop):
                f.write(piece)
        if f.tell() != len(head) + size:
            f.truncate(0)
            raise OSError(f"{part} has a wrong length, start again")
    return True


def byte_range(start, stop):
    span = f"bytes={start}-{stop - 1}"
    return {**utils.build_hf_headers(), "Range": span, "Accept-Encoding": "identity"}


def read_range(url, start, stop, step=1 << 25):
    """Bytes [start, stop) in pieces; http_backoff asks again for a piece that broke off."""
    for a in range(start, stop, step):
        r = utils.http_backoff("GET", url, headers=byte_range(a, min(a + step, stop)), timeout=30)
        utils.hf_raise_for_status(r)
        if r.status_code != 206:
            raise OSError(f"{url} answers a range with status {r.status_code}")
        yield r.content


def main(argv=None):
    parser = argparse.ArgumentParser(description="Describe the block made of an LLM's layer(s).")
    parser.add_argument("--llm", required=True, help="hub name or local directory")
    parser.add_argument("--layers", type=int, nargs="+", default=[-1], help="-1 is the last")
    args = parser.parse_args(argv)
    config, root, _ = find_llm(args.llm)
    block = LLMBlock(args.llm, 384, args.layers)
    print(f"family      {config.model_type}, from {root}")
    print(f"layers      {block.record['layers']} of {config.num_hidden_layers}")
    print(f"width       {config.hidden_size}, {config.num_attention_heads} heads")
    print(f"parameters  {sum(b.numel() for b in block.layers.buffers()):,} frozen")
    print(f"bytes read  {block.bytes_read:,}, hash {block.record['hash']}")
    print(f"compute     {count_gflops(block, torch.zeros(1, 197, 384)):.2f} GFLOPs per 197 tokens")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        fail(e)
