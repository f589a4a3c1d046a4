"""llmblock.py: right numbers, frozen bit for bit, one layer read. CPU, offline, tiny random LLMs.

python -m pytest tests/test_llmblock.py -q     # LLMBLOCK_DATA=DIR adds the real Llamas DIR/lm/*
"""

import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from llmblock import FROZEN, KINDS, LLMBlock, UserError, count_gflops, find_llm, main  # noqa: E402

SMALL = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(head_dim=16, intermediate_size=128, vocab_size=64, max_position_embeddings=64)
SMALL |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, ffn_dim=128, word_embed_proj_dim=64)
SMALL |= dict(rms_norm_eps=1e-3, residual_multiplier=0.5)  # unlike the block's eps, and not 1
SMALL |= dict(sliding_window=4)  # shorter than our sequences, where a block must not mind
FAMILIES = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi phi3 olmo2 gpt2 gpt_neox granite opt"
FAMILIES = [(name, {}) for name in f"{FAMILIES} smollm3 starcoder2".split()]
FAMILIES += [("llama", dict(num_key_value_heads=4)), ("opt", dict(do_layer_norm_before=False))]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would only wait for each other
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def make(directory, family, seed=0, **extra):
    """Save a random model of a family; no norm's weight is 1, no bias is 0."""
    torch.manual_seed(seed)
    config = {k: v for k, v in (SMALL | extra).items() if v is not None}
    config = CONFIG_MAPPING[family](**config)
    model = (AutoModel if family == "t5" else AutoModelForCausalLM).from_config(config)
    for p in model.parameters():
        p.data = 0.1 * torch.randn_like(p) + (p.data.mean() > 0.9)
    model.save_pretrained(directory)
    return directory


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- every family


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def llm(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("llm"), request.param[0], **request.param[1])


def test_order_and_padding_do_not_matter(llm):
    block, x, order = LLMBlock(llm, 32, [-1, 0]), torch.randn(2, 9, 32), torch.randperm(9)
    y = block(x)
    close(block(x[:, order]), y[:, order])
    assert not torch.allclose(block(x[:, :-1])[:, 0], y[:, 0], atol=1e-3)  # the first sees the last
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0, 1, 1, 0]]).bool()
    x[~mask] *= 50
    for row in range(2):  # as if the padding were not there
        close(block(x, mask)[row, mask[row]], block(x[row, mask[row]][None])[0])


def test_training_leaves_the_llm_bitwise_alone(llm):
    block, host, x = LLMBlock(llm, 32, [-1, 0]), nn.Linear(32, 32), torch.randn(2, 7, 32)
    before = {name: t.clone() for name, t in block.named_buffers()}
    checkpoint = load_file(llm / "model.safetensors").values()
    for t in block.layers.buffers():  # nothing but what the file holds
        assert any(t.shape == other.shape and torch.equal(t, other) for other in checkpoint)
    y = block(x)
    assert torch.equal(block.train()(x), y)  # no dropout
    trained = [*host.parameters(), *block.parameters()]
    assert len(trained) == 4  # the host's weight and bias, proj_in, proj_out
    start = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    block(host(x)).pow(3).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in trained)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(trained, start, strict=True))
    after = dict(block.named_buffers())
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    LLMBlock(llm, 32, [-1, 0]).load_state_dict(block.state_dict())  # and so is the record


REFUSED = dict(gptj={}, bloom={}, mpt={}, mamba={}, falcon=dict(alibi=True, head_dim=None))
REFUSED["gpt_neo"] = dict(attention_types=[[["global", "local"], 1], [["global"], 1]])
REFUSED["gpt_neo"] |= dict(num_layers=3, num_heads=4, head_dim=None)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_depend_on_the_order_are_refused(family, tmp_path):
    with pytest.raises(UserError, match=family):
        LLMBlock(make(tmp_path, family, **REFUSED[family]), 32)


# ---------------------------------------------------------------- the numbers, written out


def attend(q, k, v, size):
    q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in (q, k, v))  # (B, h, N, size)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return ((q @ k.mT / size**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)  # (B, N, D)


def rms(x, weight=1.0, eps=1e-6):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def written_out(llm, block, x, *layers):
    """The stages of a block of a Llama or an OPT, from the file's tensors in plain algebra."""
    config, _, _ = find_llm(llm)
    is_llama, size = config.model_type == "llama", config.hidden_size // config.num_attention_heads
    stages = {"host": x, "proj_in": x @ block.proj_in.weight.T}
    file, h = load_file(llm / "model.safetensors"), stages["proj_in"]

    def linear(x, name):
        return x @ file[f"{name}.weight"].float().T + file.get(f"{name}.bias", 0)

    def norm(x, name):
        weight = file[f"{name}.weight"].float()
        if is_llama:
            return rms(x, weight, config.rms_norm_eps)
        return F.layer_norm(x, weight.shape, weight, file[f"{name}.bias"])

    for i in layers:
        at = f"model.layers.{i}." if is_llama else f"model.decoder.layers.{i}."
        n = norm(h, at + ("input_layernorm" if is_llama else "self_attn_layer_norm"))
        n = attend(*(linear(n, f"{at}self_attn.{name}_proj") for name in "qkv"), size)
        h = h + linear(n, at + "self_attn." + ("o_proj" if is_llama else "out_proj"))
        stages["attention"] = h
        n = norm(h, at + ("post_attention_layernorm" if is_llama else "final_layer_norm"))
        if is_llama:
            gate = linear(n, at + "mlp.gate_proj")
            n = gate * gate.sigmoid() * linear(n, at + "mlp.up_proj")
        else:
            n = linear(n, at + "fc1").clamp(min=0)
        h = stages["ffn"] = h + linear(n, at + ("mlp.down_proj" if is_llama else "fc2"))
    return stages | {"proj_out": rms(h) @ block.proj_out.weight.T}


@pytest.mark.parametrize("scale", [1, 1e-3])  # small inputs tell one eps from another
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_equals_a_block_written_out(family, scale, tmp_path):
    llm, x = make(tmp_path, family), scale * torch.randn(2, 7, 32)
    for layers in ([2], [2, 0]):
        block = LLMBlock(llm, 32, layers)
        stages, wanted = block.stages(x), written_out(llm, block, x, *layers)
        assert stages.keys() == wanted.keys() and torch.equal(stages["proj_out"], block(x))
        for name in wanted:
            close(stages[name], wanted[name])


@pytest.mark.parametrize("name", ["tiny_llm", "stories260K", "babyllama105"])
def test_text_trained_llamas(name):
    if name != "tiny_llm" and "LLMBLOCK_DATA" not in os.environ:
        pytest.skip("LLMBLOCK_DATA is not set")
    folder = ROOT / "tests" if name == "tiny_llm" else Path(os.environ["LLMBLOCK_DATA"]) / "lm"
    block, x = LLMBlock(folder / name, 48), torch.randn(2, 7, 48)
    last = find_llm(folder / name)[0].num_hidden_layers - 1
    close(block(x), written_out(folder / name, block, x, last)["proj_out"], 1e-4)


# What a layer's first module behind the attention and its norm gets: the residual stream there.
BETWEEN = dict(llama="post_attention_layernorm", gemma2="pre_feedforward_layernorm", olmo2="mlp")
BETWEEN |= dict(granite="post_attention_layernorm", gpt2="ln_2", opt="final_layer_norm")


@pytest.mark.parametrize("family", BETWEEN)
def test_stages_are_the_residual_stream(family, tmp_path):
    block, seen = LLMBlock(make(tmp_path, family), 32), []
    module = block.layers[-1].get_submodule(BETWEEN[family])
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    stages = block.stages(torch.randn(2, 7, 32))
    close(stages["attention"], seen[0].view(2, 7, 64))
    close(stages["proj_out"], block.proj_out(rms(stages["ffn"])))


@pytest.mark.parametrize("family", "llama qwen3 phi gpt_neox gemma3_text opt".split())
def test_causal_and_rotary_give_the_llm_back(family, tmp_path):
    llm, x, order = make(tmp_path, family), torch.randn(1, 4, 32), [3, 1, 0, 2]
    block, other = LLMBlock(llm, 32, 0, causal=True), x.clone()
    other[:, -1] += 1
    close(block(other)[:, :-1], block(x)[:, :-1])
    assert not torch.allclose(block(other)[:, -1], block(x)[:, -1], atol=1e-2)
    if family != "opt":  # whose positions are learned, and outside of its layers
        block = LLMBlock(llm, 32, 0, rotary=True)
        assert not torch.allclose(block(x[:, order]), block(x)[:, order], atol=1e-3)
        stages = LLMBlock(llm, 32, 0, causal=True, rotary=True).stages(x)
        whole = AutoModel.from_pretrained(llm).eval()
        whole = whole(inputs_embeds=stages["proj_in"], output_hidden_states=True)
        close(stages["ffn"], whole.hidden_states[1])


# ---------------------------------------------------------------- kinds and checkpoints


@pytest.fixture
def llama(tmp_path):
    return make(tmp_path / "llama", "llama")


def test_kinds_differ_in_one_thing_only(llama):
    x, state = torch.randn(2, 7, 32), torch.get_rng_state()
    blocks = {kind: LLMBlock(llama, 32, kind=kind, seed=1) for kind in KINDS}
    assert torch.equal(torch.get_rng_state(), state)  # the host's initialisation stays the same
    assert blocks["none"](x) is x and not list(blocks["none"].parameters())
    one, other = blocks["linear"], LLMBlock(llama, 32, kind="linear", seed=2)
    for proj in ("proj_in", "proj_out"):
        weight = getattr(one, proj).weight
        assert not torch.equal(weight, getattr(other, proj).weight)
        assert all(torch.equal(getattr(blocks[k], proj).weight, weight) for k in KINDS[1:])
    close(one(x), one.proj_out(one.proj_in(x)))
    close(blocks["mlp"](x), one.proj_out(F.layer_norm(F.gelu(one.proj_in(x)), (64,))))
    assert blocks["mlp"].stages(x).keys() == {"host", "proj_in", "proj_out"}
    assert torch.equal(blocks["finetuned"](x), blocks["pretrained"](x))
    assert torch.equal(blocks["trained"](x), blocks["random"](x))
    for kind in KINDS[1:]:
        extra = dict(mlp=2, finetuned=9, trained=9).get(kind, 0)  # beside the two projections
        assert len(list(blocks[kind].parameters())) == 2 + extra
        assert all(p.requires_grad for p in blocks[kind].parameters())
        names = {name for name, _ in blocks[kind].named_parameters()}
        assert blocks[kind].state_dict().keys() == {"_extra_state"} | names


def test_random_and_shuffled_weights(llama):
    def tensors(kind, seed=1):
        return dict(LLMBlock(llama, 32, -1, kind, seed).layers.named_buffers())

    real, random, shuffled = tensors("pretrained"), tensors("random"), tensors("shuffled")
    for kind, one in (("shuffled", shuffled), ("random", random)):
        again, other = tensors(kind), tensors(kind, seed=2)
        for name, t in one.items():
            assert torch.equal(t, again[name]) and not torch.equal(t, real[name])
            assert not torch.equal(t, other[name]) or t.eq(1).all()
    for name, t in real.items():
        assert torch.equal(t.flatten().sort()[0], shuffled[name].flatten().sort()[0])
        new = random[name]  # as Llama begins
        assert new.eq(1).all() if t.ndim == 1 else 0.018 < new.std() < 0.022


@pytest.mark.parametrize("kind", FROZEN)
def test_a_checkpoint_fits_its_own_block_only(kind, llama, tmp_path):
    def block(llm=llama, layers=-1, kind=kind, seed=0, **args):
        return LLMBlock(llm, 32, layers, kind, seed, **args)

    trained, x = block(), torch.randn(2, 7, 32)
    nn.init.normal_(trained.proj_in.weight)
    torch.save(trained.state_dict(), tmp_path / "last.pt")
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    for dtype, tolerance in ((torch.float32, 0), (torch.bfloat16, 0.1)):
        fresh = block(dtype=dtype)
        assert {t.dtype for t in fresh.layers.buffers()} == {dtype}
        assert not torch.allclose(fresh(x), trained(x), atol=0.1)
        fresh.load_state_dict(saved)
        close(fresh(x), trained(x), tolerance)
    wrong = [block(layers=0), block(causal=True), block(kind="linear"), block(rotary=True)]
    wrong += [block(kind=k) for k in FROZEN if k != kind]
    wrong += [block(seed=1)] if kind != "pretrained" else []
    wrong += [block(make(tmp_path / "other", "llama", 1))] if kind != "random" else []
    for fresh in wrong:
        with pytest.raises(UserError, match="another block"):
            fresh.load_state_dict(saved)


def test_a_host_that_initialises_its_modules_leaves_frozen_ones_alone(llama):
    host = nn.Sequential(nn.Linear(32, 32), LLMBlock(llama, 32))
    before = [t.clone() for t in host[1].layers.buffers()]
    host.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Linear) else None)
    assert all(torch.equal(a, b) for a, b in zip(before, host[1].layers.buffers(), strict=True))
    assert host[0].weight.eq(1).all() and host[1].proj_in.weight.eq(1).all()
    next(host[1].layers.buffers()).fill_(1)  # who does so all the same is found out
    with pytest.raises(UserError, match="another block: hash"):
        LLMBlock(llama, 32).load_state_dict(host[1].state_dict())


def test_other_dtypes_other_devices_and_safetensors(llama, tmp_path):
    block, x = LLMBlock(llama, 32), torch.randn(2, 7, 32)
    half = LLMBlock(llama, 32).bfloat16()
    close(half(x.bfloat16()).float(), block(x), 0.1)
    save_model(block, tmp_path / "block.safetensors")
    other = LLMBlock(llama, 32, seed=1)
    load_model(other, tmp_path / "block.safetensors")
    assert torch.equal(other(x), block(x))
    with torch.device("meta"):  # as a host may be built
        assert torch.equal(LLMBlock(llama, 32)(x), block(x))


def test_stages_that_fail_leave_no_trace(llama):
    block, x = LLMBlock(llama, 32), torch.randn(2, 7, 32)
    before = block(x)
    with pytest.raises(RuntimeError):
        block.stages(x, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(block(x), before)


# ---------------------------------------------------------------- files


def store(llm, suffix, shards=1):
    """Store an LLM another way; shards part the tensors of every layer."""
    tensors, stem = load_file(llm / "model.safetensors"), "model"
    (llm / "model.safetensors").unlink()
    save = save_file
    if suffix == ".bin":
        save, stem = torch.save, "pytorch_model"
    index = {n: f"{stem}{f'-{i % shards}' * (shards > 1)}{suffix}" for i, n in enumerate(tensors)}
    for file in sorted(set(index.values())):
        save({n: t for n, t in tensors.items() if index[n] == file}, llm / file)
    if shards > 1:
        (llm / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return llm


@pytest.mark.parametrize("form", ["safetensors 3", "bin 1", "bin 3", "bin 1 of PyTorch 1.5"])
def test_any_file_format_gives_the_same_block(form, llama, monkeypatch):
    x, one = torch.randn(2, 7, 32), LLMBlock(llama, 32, [1, 2])
    suffix, shards, *old = form.split()
    if old:
        save = functools.partial(torch.save, _use_new_zipfile_serialization=False)
        monkeypatch.setattr(torch, "save", save)
    other = LLMBlock(store(llama, f".{suffix}", int(shards)), 32, [1, 2])
    assert torch.equal(other(x), one(x)) and other.record == one.record
    assert other.bytes_read == one.bytes_read > 0


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_layer(file):
    save_file({k: t for k, t in load_file(file).items() if "layers.2." not in k}, file)


DAMAGES = {
    "other shape": lambda llm: edit(llm / "config.json", intermediate_size=64),
    "no layer": lambda llm: drop_layer(llm / "model.safetensors"),
    "no weights": lambda llm: (llm / "model.safetensors").unlink(),
    "weights cut": lambda llm: cut(llm / "model.safetensors"),
    "bin cut": lambda llm: cut(store(llm, ".bin") / "pytorch_model.bin"),
    "index cut": lambda llm: cut(store(llm, ".bin", 2) / "pytorch_model.bin.index.json"),
    "no shard": lambda llm: (store(llm, ".bin", 2) / "pytorch_model-1.bin").unlink(),
    "no config": lambda llm: (llm / "config.json").unlink(),
    "config cut": lambda llm: cut(llm / "config.json"),
    "no heads": lambda llm: edit(llm / "config.json", num_attention_heads=0),
    "no function": lambda llm: edit(llm / "config.json", hidden_act="unheard-of"),
    "quantised": lambda llm: edit(llm / "config.json", quantization_config={"quant_method": "fp8"}),
    "unknown config": lambda llm: edit(llm / "config.json", model_type="unheard-of"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_reported_in_one_line(damage, llama):
    DAMAGES[damage](llama)
    with pytest.raises(UserError, match=re.escape(str(llama))) as e:
        LLMBlock(llama, 32)
    assert "\n" not in str(e.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_execute_nothing(zipped, llama, tmp_path):
    store(llama, ".bin")
    file, made = llama / "pytorch_model.bin", tmp_path / "made"
    weights = torch.load(file, weights_only=True) | {"more": Malicious(str(made))}
    torch.save(weights, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="no weights that fit"):
        LLMBlock(llama, 32)
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists()  # it would have been made


def test_wrong_arguments_are_reported_in_one_line(llama, tmp_path, monkeypatch, capsys):
    t5 = make(tmp_path / "t5", "t5", d_model=64, head_dim=None)
    wrong = {"frozen": (llama, 32, -1, "frozen"), "999": (llama, 32, 999), "t5": (t5, 32)}
    wrong |= {"-4": (llama, 32, [0, -4]), "nowhere": (tmp_path / "nowhere", 32)}
    wrong |= {"no-one/llm": ("no-one/llm", 32), "no llm": ("no llm", 32)}
    gpt2 = make(tmp_path / "gpt2", "gpt2")
    wrong["no rotary"] = (gpt2, 32, -1, "pretrained", 0, None, False, True)
    for named, args in wrong.items():
        with pytest.raises(UserError, match=named) as e:
            LLMBlock(*args)
        assert "\n" not in str(e.value)
    monkeypatch.setattr(sys, "argv", ["llmblock.py", "--llm", "no-one/llm"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "llmblock.py"), run_name="__main__")
    assert re.fullmatch("error: .*no-one/llm.*\n", capsys.readouterr().err)


def test_description(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # names beside llmblock.py work from anywhere
    main(["--llm", "tests/tiny_llm"])
    text, numbers = capsys.readouterr().out, 4 * 192**2 + 3 * 192 * 512 + 2 * 192
    multiply = 197 * (numbers - 2 * 192 + 2 * 192 * 384) + 2 * 197**2 * 192
    for part in ("llama", " 192, 6 heads", f"{numbers:,}", f"{2 * numbers:,}"):
        assert part in text
    assert f"{2 * multiply / 1e9:.2f} GFLOPs" in text
    assert count_gflops(nn.Linear(10, 20), torch.zeros(3, 10)) == 2 * 3 * 10 * 20 / 1e9


BIG = """
import json, sys, time, torch
import transformers.models.llama.modeling_llama
from llmblock import LLMBlock
def memory(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1e6
for dtype in (torch.bfloat16, torch.float32):
    open("/proc/self/clear_refs", "w").write("5")
    before, start = memory("VmRSS"), time.process_time()
    block = LLMBlock(sys.argv[1], 384, dtype=dtype)
    seconds, peak = time.process_time() - start, memory("VmHWM") - before
    print(json.dumps([seconds, peak, block.bytes_read / 1e6]))
    del block
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_llama_7b_costs_one_layer(tmp_path):
    config = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    config = CONFIG_MAPPING["llama"](**config, num_attention_heads=32)
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
    run = [sys.executable, "-c", BIG, str(tmp_path)]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    lines = subprocess.run(run, env=env, check=True, stdout=subprocess.PIPE).stdout.splitlines()
    for line, limit in zip(lines, (0.65, 1.3), strict=True):
        seconds, gigabytes, megabytes = json.loads(line)
        assert seconds < 10 and gigabytes < limit and 404 < megabytes < 406
