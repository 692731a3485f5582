"""Every architecture that was tried: trained with shared prompts, without, or refused by name."""

from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING

from fastpref.data.packing import pack
from fastpref.models.attention import ModelError
from fastpref.models.load import check_agreement
from fastpref.models.model import LogpModel

SHARED, ALONE = True, False
WINDOW = {"sliding_window": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURE = EXPERTS | {"num_local_experts": 4}
NAMED_MIXTURE = EXPERTS | {"num_experts": 4}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "kv_heads": 4},
    **{"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
MAMBA = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64},
    **{"mamba_n_groups": 1, "mamba_chunk_size": 4, "mamba_expand": 2},
}
BOTH = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = BOTH | {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
ZAMBA = {"layer_types": ["linear_attention", "hybrid"], "kv_heads": 4, "mamba_d_state": 8} | {
    **{"attention_head_dim": 16, "attention_hidden_size": 64, "n_mamba_heads": 4},
}
ARCHITECTURES = [
    # dense
    ("apertus", {}, SHARED),
    ("arcee", {}, SHARED),
    ("bitnet", {}, SHARED),
    ("cohere", {"logit_scale": 0.25}, SHARED),
    ("cohere2", WINDOW, SHARED),
    ("diffllama", {}, SHARED),
    ("ernie4_5", {}, SHARED),
    ("exaone4", WINDOW, SHARED),
    ("gemma", {}, SHARED),
    ("gemma2", WINDOW | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}, SHARED),
    ("gemma3_text", WINDOW, SHARED),
    ("glm", {}, SHARED),
    ("glm4", {}, SHARED),
    ("gpt2", {"n_inner": None}, SHARED),
    ("gpt_neox", {}, SHARED),
    (
        "granite",
        {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
        SHARED,
    ),
    ("helium", {}, SHARED),
    ("hunyuan_v1_dense", {}, SHARED),
    ("llama", {}, SHARED),
    ("minicpm3", LATENT, SHARED),
    ("mistral", WINDOW, SHARED),
    ("olmo2", {}, SHARED),
    ("olmo3", WINDOW, SHARED),
    ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}, SHARED),
    ("persimmon", {}, SHARED),
    ("phi", {}, SHARED),
    ("phi3", {}, SHARED),
    ("qwen2", {}, SHARED),
    ("qwen3", {}, SHARED),
    ("seed_oss", {}, SHARED),
    ("smollm3", {}, SHARED),
    ("starcoder2", {}, SHARED),
    ("vaultgemma", WINDOW, SHARED),
    # experts
    ("deepseek_v2", LATENT | ROUTED | {"first_k_dense_replace": 1}, SHARED),
    ("deepseek_v3", LATENT | ROUTED | {"first_k_dense_replace": 1}, SHARED),
    ("ernie4_5_moe", NAMED_MIXTURE, SHARED),
    ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}, SHARED),
    ("glm4_moe", ROUTED, SHARED),
    ("granitemoe", MIXTURE, SHARED),
    ("granitemoeshared", MIXTURE, SHARED),
    ("hunyuan_v1_moe", {"num_experts": 4}, SHARED),
    ("jetmoe", {"num_local_experts": 4}, SHARED),
    ("minimax_m2", MIXTURE, SHARED),
    ("mixtral", MIXTURE, SHARED),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, SHARED),
    ("qwen2_moe", NAMED_MIXTURE | {"shared_expert_intermediate_size": 16}, SHARED),
    ("qwen3_moe", NAMED_MIXTURE, SHARED),
    # recurrent layers
    ("bamba", MAMBA | {"attn_layer_indices": [1]}, ALONE),
    ("falcon_h1", MAMBA, ALONE),
    ("falcon_mamba", {}, ALONE),
    ("granitemoehybrid", MIXTURE | MAMBA | {"layer_types": ["mamba", "attention"]}, ALONE),
    (
        "jamba",
        {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8}
        | {"attn_layer_offset": 1, "attn_layer_period": 2},
        ALONE,
    ),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, ALONE),
    (
        "lfm2_moe",
        NAMED_MIXTURE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        ALONE,
    ),
    ("mamba", {}, ALONE),
    ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, ALONE),
    ("minimax", {"num_local_experts": 4, "block_size": 4} | BOTH, ALONE),
    (
        "nemotron_h",
        {"layer_types": ["linear_attention", "full_attention", "moe"], "layers": 3}
        | ROUTED
        | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1}
        | {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": 16},
        ALONE,
    ),
    ("olmo_hybrid", BOTH, ALONE),
    ("qwen3_5_text", DELTA, ALONE),
    ("qwen3_next", DELTA | NAMED_MIXTURE | {"shared_expert_intermediate_size": 16}, ALONE),
    ("recurrent_gemma", {"layers": 3}, ALONE),
    ("rwkv", {}, ALONE),
    ("xlstm", {}, ALONE),
    ("zamba", ZAMBA | {"n_mamba_heads": 2}, ALONE),
    (
        "zamba2",
        ZAMBA
        | {"mamba_ngroups": 1, "mamba_headdim": 16, "num_mem_blocks": 1, "hybrid_layer_ids": [1]},
        ALONE,
    ),
    # refused
    ("bloom", {}, "AttentionInterface, got BloomForCausalLM that stays with 'eager'"),
    ("codegen", {}, "AttentionInterface, got CodeGenForCausalLM that stays with 'eager'"),
    ("doge", {}, r"without a mask .* from DogeAttention of layer 0"),
    ("falcon", {}, "AttentionInterface, got FalconForCausalLM that stays with 'sdpa'"),
    ("gpt_oss", MIXTURE, "got s_aux from GptOssAttention of layer 0"),
    ("gptj", {}, "AttentionInterface, got GPTJForCausalLM that stays with 'eager'"),
    ("llama4_text", MIXTURE, "got Llama4ForCausalLM with chunked attention"),
    (
        "modernbert-decoder",
        {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        "a trunk and a head, got ModernBertDecoderForCausalLM without a trunk",
    ),
    ("mpt", {}, "AttentionInterface, got MptForCausalLM that stays with 'eager'"),
    ("nemotron", {}, "got none in NemotronAttention: .* do not hand keyword arguments on"),
    ("phimoe", MIXTURE, "choose alike .* got PhimoeForCausalLM with router_jitter_noise"),
    ("stablelm", {}, "got none in StableLmAttention: .* do not hand keyword arguments on"),
    ("xglm", {}, "AttentionInterface, got XGLMForCausalLM that stays with 'eager'"),
]


def logps(model, groups):
    batch = pack(groups, share=model.shares_prompts)
    with torch.no_grad():
        return model(batch).logp.split(batch.completions.diff().tolist())


@pytest.mark.parametrize(
    ("architecture", "options", "outcome"), ARCHITECTURES, ids=[name for name, *_ in ARCHITECTURES]
)
def test_every_architecture(tiny, groups, architecture, options, outcome):
    """Agreement with the plain model; one completion changed, no other log-prob moves."""
    if architecture not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    plain = tiny(architecture, **options)
    if isinstance(outcome, str):
        with pytest.raises(ModelError, match=outcome):
            check_agreement(LogpModel(plain), groups(3)[0])
        return
    model = LogpModel(plain)
    assert model.shares_prompts is outcome
    for count in (1, 3):
        check_agreement(model, groups(count)[0])
    first, second = groups(3, 2)
    vocab = model.model.config.vocab_size
    one, two, three = first.completions
    changed = replace(first, completions=(one, [(t + 1) % vocab for t in two], three))
    before, after = logps(model, [first, second]), logps(model, [changed, second])
    # another token leaves other rows to an expert, and so another order of its sums
    rounding = 1e-5 if "num_experts_per_tok" in plain.config.to_dict() else 0.0
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        gap = float((a - b).abs().max())
        assert gap > 1e-3 if i == 1 else gap <= rounding, f"completion {i} moved by {gap}"


def test_recurrent_layers_say_why_and_refuse_shared_prompts(tiny, groups, caplog):
    model = LogpModel(tiny("lfm2", layer_types=["conv", "full_attention"]))
    assert "Lfm2ForCausalLM computes prompts once per completion" in caplog.text
    assert "layers of kind conv" in caplog.text
    before = len(caplog.records)
    assert model.frozen_copy().shares_prompts is False
    assert len(caplog.records) == before  # said once
    with pytest.raises(ModelError, match=r"share=False.*recurrent"):
        model(pack(groups(2)))
    ids = pack(groups(1)).input_ids[None]
    untouched = tiny("lfm2", layer_types=["conv", "full_attention"])
    with model.plain() as plain:
        new = plain.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(new, untouched.generate(ids, max_new_tokens=4, do_sample=False))
    model(pack(groups(2), share=False))


def test_the_check_finds_a_state_that_nothing_declares(tiny, groups, monkeypatch):
    monkeypatch.setattr("fastpref.models.model.recurrence", lambda model: None)
    model = LogpModel(tiny("lfm2", layer_types=["conv", "full_attention"]))
    with pytest.raises(ModelError, match=r"Lfm2ForCausalLM in float32 .*mixes tokens outside"):
        check_agreement(model, groups(3)[0])
