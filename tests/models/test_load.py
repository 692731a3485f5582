"""Loading, its errors, what is saved, and the agreement check."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM, LlamaModel

from fastpref.data.packing import pack
from fastpref.models.attention import ModelError
from fastpref.models.load import check_agreement, check_vocabulary, load_model, load_tokenizer
from fastpref.models.model import LogpModel
from fastpref.models.tiny import save_tiny, tiny_model

SMALL = {"vocab_size": 280, "hidden": 32, "layers": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, ["a few words to learn from, a few words"], **SMALL)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_round_trip(saved):
    model, tokenizer = load_model(str(saved)), load_tokenizer(str(saved))
    want = load_file(saved / "model.safetensors")
    assert all(torch.equal(x, want[name]) for name, x in model.state_dict().items())
    assert model.dtype == torch.float32 and not model.training
    assert load_model(str(saved), dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(str(saved), dtype="auto").dtype == torch.float32
    assert tokenizer.decode(tokenizer("a few würds\n").input_ids) == "a few würds\n"
    check_vocabulary(model, tokenizer)
    tokenizer.add_tokens(["one more"])
    with pytest.raises(ModelError, match=f"{len(tokenizer)} tokens, got {len(tokenizer) - 1} rows"):
        check_vocabulary(model, tokenizer)


def test_missing_files(folder, tmp_path):
    def refused(name, message, load=load_model, **options):
        with pytest.raises(ModelError, match=message):
            load(str(name), **options)

    refused(tmp_path / "nowhere", "existing folder or a hub id, got .*nowhere")
    refused("nobody/has-this-model", "hub id and a network .* 'nobody/has-this-model'")
    refused("nobody/has-this-model", "load the tokenizer of", load_tokenizer)
    refused(folder / "config.json", "folder or a hub id, got the file")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    refused(folder, r"a tokenizer \(tokenizer.json or .*got \['config.json'", load_tokenizer)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(folder, r"every weight of LlamaForCausalLM .* without \['model.layers.1.mlp.up_proj")
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, r"weights \(\*.safetensors\).*save them again as safetensors")
    (folder / "pytorch_model.bin").rename(folder / "adapter_config.json")
    refused(folder, "merge them into their base model")
    (folder / "config.json").unlink()
    refused(folder, r"a config \(config.json\)")


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="need the files of this folder to load the model"):
        load_model(str(folder))


def test_code_of_a_model_runs_only_when_asked(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedConfig as Config\n"
    (folder / "theirs.py").write_text(code)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(str(folder))
    assert not ran.exists()


def test_unfit_models_and_tokenizers(folder):
    with pytest.raises(ValueError, match=r"dtype of auto, .* got 'int8'"):
        load_model(str(folder), dtype="int8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(ModelError, match="EOS token"):
        load_tokenizer(str(folder))
    AutoConfig.for_model("t5").save_pretrained(folder)
    with pytest.raises(ModelError, match="encoder-decoder type 't5'"):
        load_model(str(folder))


PLAIN = """
import sys
sys.modules["fastpref"] = None  # not importable
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert model.config._attn_implementation == "sdpa"
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_saved_models_are_plain(tiny, groups, tmp_path, tie):
    untouched = tiny(tie=tie)
    model = LogpModel(tiny(tie=tie))
    model(pack(groups(2))).logp.sum().backward()
    model.model.save_pretrained(tmp_path / "ours")
    untouched.save_pretrained(tmp_path / "theirs")
    for theirs in (tmp_path / "theirs").iterdir():  # same files, byte for byte
        assert (tmp_path / "ours" / theirs.name).read_bytes() == theirs.read_bytes(), theirs.name
    texts = [p.read_bytes() for p in (tmp_path / "ours").iterdir()]
    assert len(texts) >= 2 and not any(b"fastpref" in text for text in texts)
    ids, logits = tmp_path / "ids.pt", tmp_path / "logits.pt"
    torch.save(pack(groups(2)).input_ids[None], ids)
    command = [sys.executable, "-c", PLAIN, tmp_path / "ours", ids, logits]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(logits), untouched(torch.load(ids)).logits)


def test_the_check_leaves_every_mode_as_it_was(tiny, groups):
    model = LogpModel(tiny())
    model.train()
    model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    check_agreement(model, groups(3)[0])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_agreement_in_other_dtypes(tiny, groups, dtype):
    check_agreement(LogpModel(tiny().to(dtype)), groups(3)[0])


def test_agreement_reads_little_of_a_long_row(tiny, groups):
    model = LogpModel(tiny())
    lengths = []
    model.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    check_agreement(model, groups(2, 2, prompt=900, longest=900)[1])
    assert 128 < max(lengths) <= 2 * 3 * 128


class Scaled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 1.5 * out.logits
        return out


class OtherInput(LlamaForCausalLM):
    def forward(self, input_ids, **kwargs):
        embeds = 1.5 * self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=embeds, **kwargs)


class Mixing(LlamaForCausalLM):
    """Each token also receives a part of the one before it in the row."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(lambda _, args, out: out + 0.1 * shifted(args[0]))


class Noisy(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(
            lambda module, _, out: nn.functional.dropout(out, 0.3, training=module.training)
        )


def shifted(hidden):
    return nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Scaled, r"nats at token \d of completion 0 .*scale 1, softcap None"),
        (OtherInput, r"nats at token \d of completion 0 .*other hidden states"),
        (Mixing, r"nats at token \d of completion \d.*mixes tokens outside the registered"),
        (Noisy, "in training mode.*dropout or noise"),
    ],
)
def test_doctored_models_are_refused(groups, kind, message):
    config = tiny_model(300, hidden=32, layers=2, initializer_range=0.2).config
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = LogpModel(kind(config).to(dtype))
        with pytest.raises(ModelError, match=f"got from {kind.__name__} in .*{message}"):
            check_agreement(model, groups(3)[0])


class Leaky(LlamaModel):
    """Packed rows, and no others, receive a little of the mean of all tokens."""

    def forward(self, *args, segments=None, **kwargs):
        out = super().forward(*args, segments=segments, **kwargs)
        if segments is not None:
            hidden = out.last_hidden_state
            out.last_hidden_state = hidden + 0.1 * hidden.mean(1, keepdim=True)
        return out


def test_perturbation_finds_what_the_tolerance_hides(groups):
    """In bf16 a leak can be smaller than rounding; what must stand still moves all the same."""
    config = tiny_model(300, hidden=32, layers=2, initializer_range=0.1).config
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    plain.model = Leaky(config)
    with pytest.raises(ModelError, match="that move when another completion changes, by"):
        check_agreement(LogpModel(plain.to(torch.bfloat16)), groups(4)[0])
