"""llmblock.py: right numbers, frozen, one layer read. LLMBLOCK_DATA=DIR adds LLMs of DIR/lm."""

import copy
import json
import os
import re
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

from llmblock import FROZEN, KINDS, LLMBlock, UserError, main

ROOT = Path(__file__).parent.parent
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


def hidden_states(llm, h):
    """Tokens before the first and after every layer, as transformers' whole model computes them
    if every token is visible and at position 0."""
    model = AutoModel.from_pretrained(llm, dtype=torch.float32).eval()
    model.norm = nn.Identity()  # which Llama's last tokens have passed
    B, N, _ = h.shape
    visible = torch.zeros(B, 1, N, N)  # nothing is added to any logit
    positions = torch.zeros(B, N, dtype=torch.long)
    inputs = dict(inputs_embeds=h, attention_mask=visible, position_ids=positions)
    return model(**inputs, output_hidden_states=True).hidden_states


@pytest.fixture
def llama(tmp_path):
    return make(tmp_path / "llama", "llama")


# ---------------------------------------------------------------- right numbers
@pytest.mark.parametrize("family, extra", FAMILIES, ids=str)
def test_every_family(family, extra, tmp_path):
    """Layers compute as in transformers' own model; neither order nor padding matters; training
    leaves the LLM bit for bit alone."""
    block = LLMBlock(make(tmp_path, family, **extra), 32, [0, -2]).train()  # without dropout
    states = hidden_states(tmp_path, torch.randn(2, 9, 64))
    close(block.run_layers(states[0]), states[2])
    frozen = weights(block)
    x, order = torch.randn(2, 9, 32), torch.randperm(9)
    y = block(x)
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


@pytest.mark.parametrize("name", ["tiny_llm", "stories260K", "smollm2-135m-instruct"])
def test_the_last_layer_of_a_trained_llm(name, request):
    llm = ROOT / "tests/tiny_llm"
    if name != "tiny_llm":
        llm = request.getfixturevalue("real") / "lm" / name
    block = LLMBlock(llm, 32)
    states = hidden_states(llm, block.proj_in(torch.randn(2, 7, 32)))
    close(block.run_layers(states[-2]), states[-1])


# ---------------------------------------------------------------- kinds and hosts
def test_kinds_differ_in_one_thing_only(llama):
    x, state = torch.randn(2, 7, 32), torch.get_rng_state()
    padding = torch.tensor([[True] * 7, [False] * 7])  # a row of padding alone
    blocks = {kind: LLMBlock(llama, 32, kind=kind, seed=1).train() for kind in KINDS}
    assert torch.equal(torch.get_rng_state(), state)  # the host's initialisation stays the same
    assert blocks["none"](x) is x and not list(blocks["none"].parameters())
    one = blocks["linear"]  # its projections are those of every kind
    assert not torch.equal(LLMBlock(llama, 32, kind="linear", seed=2)(x), one(x))
    close(one(x), one.proj_out(one.proj_in(x)))
    close(blocks["mlp"](x), one.proj_out(F.layer_norm(F.gelu(one.proj_in(x)), (64,))))
    block = blocks["pretrained"]
    h = block.run_layers(one.proj_in(x / 1000))  # so small that an eps other than 1e-6 would show
    close(block(x / 1000), one.proj_out(h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()))
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
    expected = block(x, padding)
    block.layers[0].self_attn.config._attn_implementation = "eager"  # some families have no other
    close(block(x, padding), expected)


def test_random_and_shuffled_weights(llama):
    kinds = [weights(LLMBlock(llama, 32, kind=kind)) for kind in ("pretrained", *FROZEN[:2])]
    for t, random, shuffled in zip(*kinds, strict=True):
        assert random.eq(1).all() if t.ndim == 1 else 0.018 < random.std() < 0.022  # Llama's start
        assert torch.equal(shuffled.flatten().sort()[0], t.flatten().sort()[0])
        assert not torch.equal(shuffled, t)


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


def test_the_record_tells_blocks_apart(llama, tmp_path):
    other = make(tmp_path / "other", "llama", 1)
    arguments = [(other, 32), *[(llama, 32, layers) for layers in (-1, 0, [0, -1], [-1, 0])]]
    arguments += [(llama, 32, -1, kind, seed) for kind in ("random", "shuffled") for seed in (0, 1)]
    records = [LLMBlock(*a).record for a in arguments]
    assert len({record["hash"] for record in records}) == len(arguments)
    assert records[4]["layers"] == [2, 0] and records[1] == LLMBlock(llama, 32).record


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
    expected = LLMBlock(llama, 32, [1, 2]).record  # which has the hash of the weights
    assert LLMBlock(store(llama, suffix, shards), 32, [1, 2]).record == expected


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
    ("quantised", lambda llm: edit(llm, quantization_config={"quant_method": "fp8"})),
    ("unheard-of", lambda llm: edit(llm, model_type="unheard-of")),
    ("t5 is not a decoder-only", lambda llm: edit(llm, model_type="t5")),
    ("Unpickling", lambda llm: torch.save(Malicious(), store(llm, ".bin") / "pytorch_model.bin")),
]


@pytest.mark.parametrize("reason, damage", DAMAGES)
def test_damaged_files_are_reported_in_one_line(reason, damage, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(llama)
    with pytest.raises(UserError, match=f"cannot use {llama}.*{reason}") as e:
        LLMBlock(llama, 32)
    assert "\n" not in str(e.value) and not Path("made").exists()


def test_wrong_arguments_are_reported_in_one_line(llama):
    wrong = {"frozen": (llama, 32, -1, "frozen"), "999": (llama, 32, 999)}
    wrong |= {"-4": (llama, 32, [0, -4]), "nowhere": (llama / "nowhere", 32)}
    wrong |= {"no-one/llm": ("no-one/llm", 32), "no llm": ("no llm", 32)}
    for named, args in wrong.items():
        with pytest.raises(UserError, match=named) as e:
            LLMBlock(*args)
        assert "\n" not in str(e.value)


def test_description_and_benchmark(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # names beside llmblock.py work from anywhere
    main(["--llm", "tests/tiny_llm"])
    text, matrices = capsys.readouterr().out, 4 * 192**2 + 3 * 192 * 512
    flops = 2 * 197 * (matrices + 2 * 192 * 384 + 2 * 197 * 192)
    for part in ("llama", " 192, 6 heads", f"{matrices + 2 * 192:,}", f"{flops / 1e9:.2f} GFLOPs"):
        assert part in text
    tiny = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    assert bench_block.compare(bench_block.MODELS["micro"], tiny, 2) < 0.05


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
