"""llmblock.py: right numbers, frozen bit for bit, one layer read. CPU, offline, tiny random LLMs.

python -m pytest tests/test_llmblock.py -q     # LLMBLOCK_DATA=DIR adds the real LLMs DIR/lm/*
"""

import copy
import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import bench_block
import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from llmblock import FROZEN, KINDS, LLMBlock, UserError, hash_weights, main  # noqa: E402

SMALL = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(head_dim=16, intermediate_size=128, vocab_size=64, max_position_embeddings=64)
SMALL |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, ffn_dim=128, word_embed_proj_dim=64)
SMALL |= dict(rms_norm_eps=1e-3, residual_multiplier=0.5)  # unlike the block's eps, and not 1
SMALL |= dict(attention_dropout=0.5)  # which a block must turn off
SMALL |= dict(sliding_window=4)  # shorter than our sequences, where a block must not mind
FAMILIES = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi phi3 olmo2 gpt2 gpt_neox granite opt"
FAMILIES = [(name, {}) for name in f"{FAMILIES} smollm3 starcoder2 apertus ministral3".split()]
FAMILIES += [("llama", dict(num_key_value_heads=4)), ("opt", dict(do_layer_norm_before=False))]
FAMILIES += [("falcon", dict(alibi=False, head_dim=None)), ("xglm", dict(d_model=64, num_layers=3))]
FAMILIES += [("gemma4_text", dict(hidden_size_per_layer_input=0, global_head_dim=16))]
EXPERTS = dict(num_local_experts=4)
NEO = dict(num_hidden_layers=2, attention_types=[[["global", "local"], 1]], head_dim=None)
REFUSED = [("bloom", {}, "NoneType"), ("mpt", {}, "position_bias"), ("mamba", {}, "size of tensor")]
REFUSED += [("falcon", dict(alibi=True, head_dim=None), "positions"), ("gpt_neo", NEO, "positions")]
REFUSED += [("granitemoehybrid", EXPERTS, "fused"), ("mixtral", EXPERTS, "fused")]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would only wait for each other
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def make(directory, family, seed=0, **extra):
    """Save a random model of a family; no norm's weight is 1, no bias is 0."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    torch.manual_seed(seed)
    config = {k: v for k, v in (SMALL | extra).items() if v is not None}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config))
    for p in model.parameters():
        p.data = 0.1 * torch.randn_like(p) + (p.data.mean() > 0.9)
    for module in model.modules():
        if hasattr(module, "layer_scalar"):  # Gemma 4's: neither 0 nor 1
            module.layer_scalar.fill_(0.7)
    model.save_pretrained(directory)
    return directory


def weights(block):
    """Copies of the tensors of the LLM's layers in a block."""
    return [t.clone() for layer in block.layers for t in layer.state_dict().values()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture
def llama(tmp_path):
    return make(tmp_path / "llama", "llama")


# ---------------------------------------------------------------- right numbers
@pytest.mark.parametrize("family, extra", FAMILIES, ids=str)
def test_every_family(family, extra, tmp_path):
    """Neither order nor padding matters; training leaves the LLM bit for bit alone."""
    block = LLMBlock(make(tmp_path, family, **extra), 32, [-1, 0]).train()
    frozen = weights(block)
    file = load_file(tmp_path / "model.safetensors").values()
    for t in frozen:  # nothing but what the file holds
        assert any(t.shape == other.shape and torch.equal(t, other) for other in file)
    x, order = torch.randn(2, 9, 32), torch.randperm(9)
    y = block(x)
    assert torch.equal(block(x), y)  # no dropout
    close(block(x[:, order]), y[:, order])
    assert not torch.allclose(block(x[:, :-1])[:, 0], y[:, 0], atol=1e-3)  # the first sees the last
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0, 1, 1, 0]]).bool()
    x[~mask] *= 50
    for row in range(2):  # as if the padding were not there
        close(block(x, mask)[row, mask[row]], block(x[row, mask[row]][None])[0])

    trained = list(block.parameters())
    assert len(trained) == 2  # proj_in, proj_out
    assert not any(p.requires_grad for layer in block.layers for p in layer.parameters())
    block(x.requires_grad_()).pow(3).sum().backward()
    assert all(t.grad.abs().max() > 0 for t in [x, *trained])
    torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5).step()
    assert not torch.allclose(block(x), y) and same(weights(block), frozen)


@pytest.mark.parametrize("family, extra, reason", REFUSED)
def test_families_that_cannot_be_served_are_refused(family, extra, reason, tmp_path):
    with pytest.raises(UserError, match=f"{family}.*{reason}"):
        LLMBlock(make(tmp_path, family, **extra), 32)


def llama_layer(llm, h, i):
    """As transformers computes it, everything visible and every token at position 0."""
    model = AutoModel.from_pretrained(llm, dtype=torch.float32).eval()
    zeros = torch.zeros(1, 7, dtype=torch.long)
    rope = model.rotary_emb(h, zeros)
    visible = torch.zeros(1, 1, 7, 7)  # nothing is added to any logit
    return model.layers[i](h, attention_mask=visible, position_embeddings=rope)


def opt_layer(llm, h, i):
    """From the file's tensors, in plain algebra."""
    file = load_file(llm / "model.safetensors")

    def weight_and_bias(name):
        return [file[f"model.decoder.layers.{i}.{name}.{kind}"] for kind in ("weight", "bias")]

    n = F.layer_norm(h, (64,), *weight_and_bias("self_attn_layer_norm"))
    q, k, v = (F.linear(n, *weight_and_bias(f"self_attn.{name}_proj")) for name in "qkv")
    q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, 16)
    n = ((q @ k.mT / 16**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    h = h + F.linear(n, *weight_and_bias("self_attn.out_proj"))
    n = F.layer_norm(h, (64,), *weight_and_bias("final_layer_norm"))
    n = F.linear(n, *weight_and_bias("fc1")).relu()
    return h + F.linear(n, *weight_and_bias("fc2"))


@pytest.mark.parametrize("scale", [1, 1e-3])  # small inputs tell one eps from another
@pytest.mark.parametrize(
    "name", ["llama", "opt", "tiny_llm", "stories260K", "smollm2-135m-instruct"]
)
def test_equals_a_reference(name, scale, tmp_path):
    llm = ROOT / "tests/tiny_llm"
    if name in ("llama", "opt"):
        llm = make(tmp_path, name)
    elif name != "tiny_llm":
        if "LLMBLOCK_DATA" not in os.environ:
            pytest.skip("LLMBLOCK_DATA is not set")
        llm = Path(os.environ["LLMBLOCK_DATA"]) / "lm" / name
    for layers in ([-1], [-1, 0]):
        block, x = LLMBlock(llm, 32, layers), scale * torch.randn(2, 7, 32)
        h = block.proj_in(x)
        for i in layers:
            h = opt_layer(llm, h, i % 3) if name == "opt" else llama_layer(llm, h, i)
        h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        close(block(x), block.proj_out(h))


# ---------------------------------------------------------------- kinds and hosts
def test_kinds_differ_in_one_thing_only(llama):
    x, state = torch.randn(2, 7, 32), torch.get_rng_state()
    padding = torch.tensor([[True] * 7, [False] * 7])  # a row of padding alone
    blocks = {kind: LLMBlock(llama, 32, kind=kind, seed=1).train() for kind in KINDS}
    assert torch.equal(torch.get_rng_state(), state)  # the host's initialisation stays the same
    assert blocks["none"](x) is x and not list(blocks["none"].parameters())
    one, other = blocks["linear"], LLMBlock(llama, 32, kind="linear", seed=2)
    for proj in ("proj_in", "proj_out"):
        weight = getattr(one, proj).weight
        assert not torch.equal(weight, getattr(other, proj).weight)
        assert all(torch.equal(getattr(blocks[k], proj).weight, weight) for k in KINDS[1:])
    close(one(x), one.proj_out(one.proj_in(x)))
    close(blocks["mlp"](x), one.proj_out(F.layer_norm(F.gelu(one.proj_in(x)), (64,))))
    assert torch.equal(blocks["finetuned"](x), blocks["pretrained"](x))  # no dropout either
    assert torch.equal(blocks["trained"](x), blocks["random"](x))
    for kind in KINDS[1:]:
        extra = dict(mlp=2, finetuned=9, trained=9).get(kind, 0)  # beside the two projections
        assert len(list(blocks[kind].parameters())) == 2 + extra
        assert all(p.requires_grad for p in blocks[kind].parameters())
        assert blocks[kind].state_dict().keys() == dict(blocks[kind].named_parameters()).keys()
        half = LLMBlock(llama, 32, kind=kind, seed=1, dtype=torch.bfloat16)
        close(half(x), blocks[kind](x), 0.1 if kind in FROZEN else 0)
        assert half.record == blocks[kind].record  # the hash, too
        dtype = torch.bfloat16 if kind in FROZEN else torch.float32
        assert all(t.dtype == dtype for t in weights(half))
        with torch.autocast("cpu", torch.bfloat16):
            y = half(x, padding)
        for output in (y, half(x, padding), blocks[kind](x, padding)):
            assert output.isfinite().all()
            close(output[0].float(), blocks[kind](x)[0], 0.1)
    block = blocks["pretrained"]
    expected = block(x, padding)
    block.layers[0].self_attn.config._attn_implementation = "eager"  # some families have no other
    close(block(x, padding), expected)


def test_random_and_shuffled_weights(llama):
    real = weights(LLMBlock(llama, 32))
    for kind in ("random", "shuffled"):
        one, again, other = (weights(LLMBlock(llama, 32, kind=kind, seed=s)) for s in (1, 1, 2))
        assert same(one, again)
        for t, new, differs in zip(real, one, other, strict=True):
            if kind == "shuffled":
                assert torch.equal(t.flatten().sort()[0], new.flatten().sort()[0])
            else:  # as Llama begins
                assert new.eq(1).all() if t.ndim == 1 else 0.018 < new.std() < 0.022
            assert not torch.equal(new, t)
            assert not torch.equal(new, differs) or new.eq(1).all()


def test_hosts_may_do_what_hosts_do(llama, tmp_path):
    host, x = nn.Sequential(nn.Linear(32, 32), LLMBlock(llama, 32)), torch.randn(2, 7, 32)
    frozen = weights(host[1])
    host.apply(lambda m: isinstance(m, nn.Linear) and nn.init.normal_(m.weight, 5))
    assert host[1].proj_in.weight.mean() > 4
    torch.save(host, tmp_path / "host.pt")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    twins = [copy.deepcopy(host), torch.load(tmp_path / "host.pt", weights_only=False)]
    twins.append(DistributedDataParallel(copy.deepcopy(host).double().float()))
    twins.append(torch.compile(copy.deepcopy(host), backend="aot_eager", fullgraph=True))
    for twin in twins:
        y = twin(x)
        close(y, host(x))
        assert len(twin.state_dict()) == len(list(twin.parameters())) == 4
        y.sum().backward()
        torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.5).step()
        assert not torch.allclose(twin(x), y)
        (block,) = (m for m in twin.modules() if isinstance(m, LLMBlock))
        assert same(weights(block), frozen)
    torch.distributed.destroy_process_group()
    plain = nn.Sequential(nn.Linear(32, 32), LLMBlock(llama, 32, kind="none"))
    host.load_state_dict(plain.state_dict(), strict=False)  # a baseline starts a model with a block
    padding = torch.zeros(2, 7, dtype=torch.bool)
    assert host.half()[1](x.half(), padding).isfinite().all()
    assert all(t.dtype == torch.float16 for t in weights(host[1]))
    with torch.device("meta"):  # as a host may be built
        assert same(weights(LLMBlock(llama, 32)), frozen)


def test_the_record_tells_blocks_apart(llama, tmp_path):
    other = make(tmp_path / "other", "llama", 1)
    arguments = [(llama, 32), (llama, 32, 0), (llama, 32, [0, -1]), (llama, 32, [-1, 0])]
    arguments += [(other, 32), (llama, 32, -1, "random")]
    arguments += [(llama, 32, -1, "shuffled", seed) for seed in (0, 1)]
    records = [LLMBlock(*a).record for a in arguments]
    assert len({record["hash"] for record in records}) == len(arguments)
    assert records[3]["layers"] == [2, 0] and records[0] == LLMBlock(llama, 32).record
    linear = nn.Linear(4, 4)  # the same tensors under other names
    a, b = (hash_weights([nn.ModuleDict({name: linear})]) for name in "ab")
    assert a != b


# ---------------------------------------------------------------- files
def store(llm, suffix, shards=1):
    """Store an LLM another way; shards part the tensors of every layer."""
    tensors = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    write, stem = (torch.save, "pytorch_model") if suffix == ".bin" else (save_file, "model")
    stems = [stem] if shards == 1 else [f"{stem}-{i}" for i in range(shards)]
    index = {name: f"{stems[i % shards]}{suffix}" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        write({n: t for n, t in tensors.items() if index[n] == file}, llm / file)
    if shards > 1:
        (llm / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return llm


@pytest.mark.parametrize("suffix, shards", [(".safetensors", 3), (".bin", 1), (".bin", 3)])
def test_any_file_format_gives_the_same_block(suffix, shards, llama):
    x, one = torch.randn(2, 7, 32), LLMBlock(llama, 32, [1, 2])
    other = LLMBlock(store(llama, suffix, shards), 32, [1, 2])
    assert torch.equal(other(x), one(x)) and other.record == one.record


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def edit(llm, **changes):
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | changes))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("made",)


DAMAGES = [
    ("size mismatch", lambda llm: edit(llm, intermediate_size=64)),
    ("layers.7 is in it 0 times", lambda llm: edit(llm, num_hidden_layers=8)),
    ("no model.safetensors", lambda llm: (llm / "model.safetensors").unlink()),
    ("SafetensorError", lambda llm: cut(llm / "model.safetensors")),
    ("central directory", lambda llm: cut(store(llm, ".bin") / "pytorch_model.bin")),
    ("JSONDecodeError", lambda llm: cut(store(llm, ".bin", 2) / "pytorch_model.bin.index.json")),
    ("a shard is missing", lambda llm: (store(llm, ".bin", 2) / "pytorch_model-1.bin").unlink()),
    ("model_type", lambda llm: (llm / "config.json").unlink()),
    ("Zero", lambda llm: edit(llm, num_attention_heads=0)),
    ("quantised", lambda llm: edit(llm, quantization_config={"quant_method": "fp8"})),
    ("unheard-of", lambda llm: edit(llm, model_type="unheard-of")),
    ("t5 is not a decoder-only", lambda llm: edit(llm, model_type="t5")),
    (
        "UnpicklingError",
        lambda llm: torch.save(Malicious(), store(llm, ".bin") / "pytorch_model.bin"),
    ),
]


@pytest.mark.parametrize("reason, damage", DAMAGES)
def test_damaged_files_are_reported_in_one_line(reason, damage, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(llama)
    with pytest.raises(UserError, match=f"cannot use {llama}.*{reason}") as e:
        LLMBlock(llama, 32)
    assert "\n" not in str(e.value) and not Path("made").exists()


def test_wrong_arguments_are_reported_in_one_line(llama, monkeypatch, capsys):
    wrong = {"frozen": (llama, 32, -1, "frozen"), "999": (llama, 32, 999)}
    wrong |= {"-4": (llama, 32, [0, -4]), "nowhere": (llama / "nowhere", 32)}
    wrong |= {"no-one/llm": ("no-one/llm", 32), "no llm": ("no llm", 32)}
    for named, args in wrong.items():
        with pytest.raises(UserError, match=named) as e:
            LLMBlock(*args)
        assert "\n" not in str(e.value)
    assert str(UserError("Traceback: ...\nllmblock.UserError: a\n  b")) == "a b"
    monkeypatch.setattr(sys, "argv", ["llmblock.py", "--llm", "no-one/llm"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "llmblock.py"), run_name="__main__")
    assert re.fullmatch("error: .*no-one/llm.*\n", capsys.readouterr().err)


def test_description_and_benchmark(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # names beside llmblock.py work from anywhere
    main(["--llm", "tests/tiny_llm"])
    text, matrices = capsys.readouterr().out, 4 * 192**2 + 3 * 192 * 512
    flops = 2 * 197 * (matrices + 2 * 192 * 384 + 2 * 197 * 192)
    for part in ("llama", " 192, 6 heads", f"{matrices + 2 * 192:,}", f"{flops / 1e9:.2f} GFLOPs"):
        assert part in text
    assert bench_block.main(["--tiny"])["difference"] < 0.05


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_llama_7b_costs_one_layer(tmp_path):
    config = CONFIG_MAPPING["llama"]()  # LLaMA-7B's sizes
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    header, size = {}, 0
    for name, t in tensors.items():
        ends = [size, size := size + 2 * t.numel()]
        header[name] = dict(dtype="F16", shape=list(t.shape), data_offsets=ends)
    header = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as f:  # a hole of 13.5 GB: zeros, no disk
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(f.tell() + size)
    for dtype, limit in ((torch.bfloat16, 650_000), (torch.float32, 1_300_000)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is what is used now
        before, start = resident_peak(), time.process_time()
        LLMBlock(tmp_path, 384, dtype=dtype)
        assert resident_peak() - before < limit and time.process_time() - start < 10


def resident_peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
