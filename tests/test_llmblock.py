"""llmblock.py: right numbers, frozen bit for bit, one layer read. CPU, offline, tiny random LLMs.

python -m pytest tests/test_llmblock.py -q     # LLMBLOCK_DATA=DIR adds the real LLMs DIR/lm/*
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from llmblock import FROZEN, KINDS, LLMBlock, UserError, find_llm, main  # noqa: E402

SMALL = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(head_dim=16, intermediate_size=128, vocab_size=64, max_position_embeddings=64)
SMALL |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, ffn_dim=128, word_embed_proj_dim=64)
SMALL |= dict(rms_norm_eps=1e-3, residual_multiplier=0.5)  # unlike the block's eps, and not 1
SMALL |= dict(sliding_window=4)  # shorter than our sequences, where a block must not mind
FAMILIES = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi phi3 olmo2 gpt2 gpt_neox granite opt"
FAMILIES = [(name, {}) for name in f"{FAMILIES} smollm3 starcoder2 apertus ministral3".split()]
FAMILIES += [("llama", dict(num_key_value_heads=4)), ("opt", dict(do_layer_norm_before=False))]
FAMILIES += [("falcon", dict(alibi=False, head_dim=None)), ("xglm", dict(d_model=64, num_layers=3))]
FAMILIES += [("gemma4_text", dict(hidden_size_per_layer_input=0, global_head_dim=16))]
REFUSED = dict(gptj={}, bloom={}, mpt={}, mamba={}, falcon=dict(alibi=True, head_dim=None))
REFUSED["gpt_neo"] = dict(attention_types=[[["global", "local"], 1], [["global"], 1]])
REFUSED["gpt_neo"] |= dict(num_layers=3, num_heads=4, head_dim=None)


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
    config = CONFIG_MAPPING[family](**config)
    model = (AutoModel if family == "t5" else AutoModelForCausalLM).from_config(config)
    for p in model.parameters():
        p.data = 0.1 * torch.randn_like(p) + (p.data.mean() > 0.9)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # Gemma 4's: neither 0 nor 1
            buffer.fill_(0.7)
    model.save_pretrained(directory)
    return directory


def weights(block):
    """{name: tensor} of the LLM's layers in a block."""
    tensors = [layer.state_dict() for layer in block.layers]
    return {f"{i}.{name}": t for i, layer in enumerate(tensors) for name, t in layer.items()}


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture
def llama(tmp_path):
    return make(tmp_path / "llama", "llama")


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
    before = {name: t.clone() for name, t in weights(block).items()}
    checkpoint = list(load_file(llm / "model.safetensors").values())
    for t in before.values():  # nothing but what the file holds
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
    after = weights(block)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


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
    """A block of a Llama or an OPT, from the file's tensors in plain algebra."""
    config, _, _ = find_llm(llm)
    is_llama, size = config.model_type == "llama", config.hidden_size // config.num_attention_heads
    file, h = load_file(llm / "model.safetensors"), x @ block.proj_in.weight.T

    def linear(x, name):
        return x @ file[f"{name}.weight"].float().T + file.get(f"{name}.bias", 0)

    def norm(h, name):
        weight = file[f"{name}.weight"].float()
        if is_llama:
            return rms(h, weight, config.rms_norm_eps)
        return F.layer_norm(h, weight.shape, weight, file[f"{name}.bias"])

    for i in layers:
        at = f"model.layers.{i}." if is_llama else f"model.decoder.layers.{i}."
        n = norm(h, at + ("input_layernorm" if is_llama else "self_attn_layer_norm"))
        n = attend(*(linear(n, f"{at}self_attn.{name}_proj") for name in "qkv"), size)
        h = h + linear(n, at + "self_attn." + ("o_proj" if is_llama else "out_proj"))
        n = norm(h, at + ("post_attention_layernorm" if is_llama else "final_layer_norm"))
        if is_llama:
            gate = linear(n, at + "mlp.gate_proj")
            h = h + linear(
                gate * gate.sigmoid() * linear(n, at + "mlp.up_proj"), f"{at}mlp.down_proj"
            )
        else:
            h = h + linear(linear(n, at + "fc1").clamp(min=0), at + "fc2")
    return rms(h) @ block.proj_out.weight.T


@pytest.mark.parametrize("scale", [1, 1e-3])  # small inputs tell one eps from another
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_equals_a_block_written_out(family, scale, tmp_path):
    llm, x = make(tmp_path, family), scale * torch.randn(2, 7, 32)
    for layers in ([2], [2, 0]):
        block = LLMBlock(llm, 32, layers)
        close(block(x), written_out(llm, block, x, *layers))


@pytest.mark.parametrize("name", ["tiny_llm", "stories260K", "smollm2-135m-instruct"])
def test_text_trained_llamas(name):
    if name != "tiny_llm" and "LLMBLOCK_DATA" not in os.environ:
        pytest.skip("LLMBLOCK_DATA is not set")
    folder = ROOT / "tests" if name == "tiny_llm" else Path(os.environ["LLMBLOCK_DATA"]) / "lm"
    block, x = LLMBlock(folder / name, 48), torch.randn(2, 7, 48)
    last = find_llm(folder / name)[0].num_hidden_layers - 1
    close(block(x), written_out(folder / name, block, x, last), 1e-4)


def test_equals_transformers_layer_with_everything_visible_and_no_positions(llama):
    block, x = LLMBlock(llama, 32, 0), torch.randn(2, 7, 32)
    llm = AutoModel.from_pretrained(llama).eval()
    zeros = torch.zeros(1, 7, dtype=torch.long)
    h = block.proj_in(x)
    rope = llm.rotary_emb(h, zeros)
    visible = torch.zeros(1, 1, 7, 7)  # nothing is added to any logit
    h = llm.layers[0](h, attention_mask=visible, position_ids=zeros, position_embeddings=rope)
    close(block(x), block.proj_out(rms(h)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_alone_gives_no_nan(dtype, llama):
    block, mask = LLMBlock(llama, 32, dtype=dtype), torch.zeros(2, 7, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = block(torch.randn(2, 7, 32), mask)
    assert y.isfinite().all()


# ---------------------------------------------------------------- kinds


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
    assert torch.equal(blocks["finetuned"](x), blocks["pretrained"](x))
    assert torch.equal(blocks["trained"](x), blocks["random"](x))
    for kind in KINDS[1:]:
        extra = dict(mlp=2, finetuned=9, trained=9).get(kind, 0)  # beside the two projections
        assert len(list(blocks[kind].parameters())) == 2 + extra
        assert all(p.requires_grad for p in blocks[kind].parameters())
        assert blocks[kind].state_dict().keys() == dict(blocks[kind].named_parameters()).keys()


def test_random_and_shuffled_weights(llama):
    real = weights(LLMBlock(llama, 32))
    shuffled = weights(LLMBlock(llama, 32, kind="shuffled", seed=1))
    random = weights(LLMBlock(llama, 32, kind="random", seed=1))
    for kind, one in (("shuffled", shuffled), ("random", random)):
        again = weights(LLMBlock(llama, 32, kind=kind, seed=1))
        other = weights(LLMBlock(llama, 32, kind=kind, seed=2))
        for name, t in one.items():
            assert torch.equal(t, again[name]) and not torch.equal(t, real[name])
            assert not torch.equal(t, other[name]) or t.eq(1).all()
    for name, t in real.items():
        assert torch.equal(t.flatten().sort()[0], shuffled[name].flatten().sort()[0])
        new = random[name]  # as Llama begins
        assert new.eq(1).all() if t.ndim == 1 else 0.018 < new.std() < 0.022


def test_hosts_may_do_what_hosts_do(llama):
    host = nn.Sequential(nn.Linear(32, 32), LLMBlock(llama, 32))
    before = {name: t.clone() for name, t in weights(host[1]).items()}
    for m in host.modules():
        if isinstance(m, nn.Linear):
            nn.init.ones_(m.weight)
    assert host[1].proj_in.weight.eq(1).all()
    x = torch.randn(2, 7, 32)
    twin = copy.deepcopy(host)
    close(twin(x), host(x))
    assert all(torch.equal(before[k], t) for k, t in weights(twin[1]).items())
    assert not any("layers" in name for name in [*host.state_dict(), *dict(host.named_buffers())])
    assert twin.half()[1].layers[0].mlp.up_proj.weight.dtype == torch.float16  # moves along
    with torch.device("meta"):  # as a host may be built
        assert torch.equal(LLMBlock(llama, 32)(x), LLMBlock(llama, 32)(x))
    plain = nn.Sequential(nn.Linear(32, 32), LLMBlock(llama, 32, kind="none"))
    host.load_state_dict(plain.state_dict(), strict=False)  # a baseline starts a model with a block


def test_bf16_is_for_frozen_layers_alone(llama):
    x = torch.randn(2, 7, 32)
    for kind in KINDS[1:]:
        full, half = (
            LLMBlock(llama, 32, kind=kind),
            LLMBlock(llama, 32, kind=kind, dtype=torch.bfloat16),
        )
        close(half(x), full(x), 0.1 if kind in FROZEN else 0)
        assert half.record == full.record  # the hash, too
        dtypes = {t.dtype for t in weights(half).values()}
        assert dtypes <= {torch.bfloat16 if kind in FROZEN else torch.float32}


def test_the_record_tells_blocks_apart(llama, tmp_path):
    def record(llm=llama, layers=-1, kind="pretrained", seed=0):
        return LLMBlock(llm, 32, layers, kind, seed).record["hash"]

    other = make(tmp_path / "other", "llama", 1)
    hashes = [record(), record(layers=0), record(other), record(kind="random")]
    hashes += [record(kind="shuffled"), record(kind="shuffled", seed=1)]
    assert len(set(hashes)) == 6 and record() == hashes[0]
    assert LLMBlock(llama, 32, [-1, 0]).record["layers"] == [2, 0]


# ---------------------------------------------------------------- files


def store(llm, suffix, shards=1):
    """Store an LLM another way; shards part the tensors of every layer."""
    tensors, stem = load_file(llm / "model.safetensors"), "model"
    (llm / "model.safetensors").unlink()
    write = save_file
    if suffix == ".bin":
        write, stem = torch.save, "pytorch_model"
    index = {n: f"{stem}{f'-{i % shards}' * (shards > 1)}{suffix}" for i, n in enumerate(tensors)}
    for file in sorted(set(index.values())):
        write({n: t for n, t in tensors.items() if index[n] == file}, llm / file)
    if shards > 1:
        (llm / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return llm


@pytest.mark.parametrize("form", ["safetensors 3", "bin 1", "bin 3"])
def test_any_file_format_gives_the_same_block(form, llama):
    x, one = torch.randn(2, 7, 32), LLMBlock(llama, 32, [1, 2])
    suffix, shards = form.split()
    other = LLMBlock(store(llama, f".{suffix}", int(shards)), 32, [1, 2])
    assert torch.equal(other(x), one(x)) and other.record == one.record


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename(file, old, new):
    save_file({k.replace(old, new): t for k, t in load_file(file).items()}, file)


DAMAGES = {
    "other shape": lambda llm: edit(llm / "config.json", intermediate_size=64),
    "no layer": lambda llm: rename(llm / "model.safetensors", "layers.2.", "layers.7."),
    "experts": lambda llm: rename(llm / "model.safetensors", "mlp.up", "mlp.experts.0.up"),
    "no weights": lambda llm: (llm / "model.safetensors").unlink(),
    "weights cut": lambda llm: cut(llm / "model.safetensors"),
    "bin cut": lambda llm: cut(store(llm, ".bin") / "pytorch_model.bin"),
    "index cut": lambda llm: cut(store(llm, ".bin", 2) / "pytorch_model.bin.index.json"),
    "no shard": lambda llm: (store(llm, ".bin", 2) / "pytorch_model-1.bin").unlink(),
    "no config": lambda llm: (llm / "config.json").unlink(),
    "config cut": lambda llm: cut(llm / "config.json"),
    "no heads": lambda llm: edit(llm / "config.json", num_attention_heads=0),
    "quantised": lambda llm: edit(llm / "config.json", quantization_config={"quant_method": "fp8"}),
    "unknown config": lambda llm: edit(llm / "config.json", model_type="unheard-of"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_reported_in_one_line(damage, llama):
    DAMAGES[damage](llama)
    with pytest.raises(UserError, match=re.escape(str(llama))) as e:
        LLMBlock(llama, 32)
    assert "\n" not in str(e.value)
    if damage in ("experts", "no layer"):
        assert "layers.2 is in it 0 times, not once: perhaps its weights" in str(e.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_execute_nothing(llama, tmp_path):
    file, made = store(llama, ".bin") / "pytorch_model.bin", tmp_path / "made"
    torch.save(torch.load(file, weights_only=True) | {"more": Malicious(str(made))}, file)
    with pytest.raises(UserError, match="cannot use"):
        LLMBlock(llama, 32)
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists()  # it would have been made


def test_wrong_arguments_are_reported_in_one_line(llama, tmp_path):
    t5 = make(tmp_path / "t5", "t5", d_model=64, head_dim=None)
    wrong = {"frozen": (llama, 32, -1, "frozen"), "999": (llama, 32, 999), "t5": (t5, 32)}
    wrong |= {"-4": (llama, 32, [0, -4]), "nowhere": (tmp_path / "nowhere", 32)}
    wrong |= {"no-one/llm": ("no-one/llm", 32), "no llm": ("no llm", 32)}
    for named, args in wrong.items():
        with pytest.raises(UserError, match=named) as e:
            LLMBlock(*args)
        assert "\n" not in str(e.value)
    script = [sys.executable, str(ROOT / "llmblock.py"), "--llm", "no-one/llm"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(script, env=env, capture_output=True, text=True)
    assert process.returncode == 2 and re.fullmatch("error: .*no-one/llm.*\n", process.stderr)


def test_description(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # names beside llmblock.py work from anywhere
    main(["--llm", "tests/tiny_llm"])
    text, numbers = capsys.readouterr().out, 4 * 192**2 + 3 * 192 * 512 + 2 * 192
    multiply = 197 * (numbers - 2 * 192 + 2 * 192 * 384) + 2 * 197**2 * 192
    for part in ("llama", " 192, 6 heads", f"{numbers:,}", f"{4 * numbers:,} bytes"):
        assert part in text
    assert f"{2 * multiply / 1e9:.2f} GFLOPs" in text


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
    print(json.dumps([time.process_time() - start, memory("VmHWM") - before]))
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
    script = [sys.executable, "-c", BIG, str(tmp_path)]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    lines = subprocess.run(script, env=env, check=True, stdout=subprocess.PIPE).stdout.splitlines()
    for line, limit in zip(lines, (0.65, 1.3), strict=True):
        seconds, gigabytes = json.loads(line)
        assert seconds < 10 and gigabytes < limit
