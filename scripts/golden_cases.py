"""The models that golden.py builds: a family of classes, options of its configuration, weights whose gradients are kept.

`_odd` and `_linear` are written as transformers 4 and older published folders do: rope_theta and rope_scaling, torch_dtype,
no layer_types and no head_dim where the default serves, a window that use_sliding_window turns off; GPT-2 without its prefix,
Qwen 3.5 as part of a model that also sees.
"""


def case(family, gradients, *tables, **options):
    for table in reversed(tables):
        options = table | options
    return family, options, gradients


# What the families share, plain and odd.
TOKENS = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
TOKENS_ODD = TOKENS | dict(vocab_size=61, hidden_size=36)
NO_MARKS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
HEADS = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
HEADS_ODD = HEADS | dict(intermediate_size=52, num_attention_heads=3, num_key_value_heads=1, head_dim=12)
PLAIN = TOKENS | HEADS | NO_MARKS
ODD = TOKENS_ODD | HEADS_ODD | NO_MARKS | dict(rms_norm_eps=1e-3)
WIDE = ODD | dict(num_attention_heads=6, num_key_value_heads=2)

LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.5)
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
CAPS_ODD = dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.5)
GPT2 = dict(n_positions=64, n_layer=2) | NO_MARKS
GPT2_ODD = GPT2 | dict(vocab_size=61, n_embd=36, n_head=3, n_inner=52, layer_norm_epsilon=1e-3)
BERT = dict(num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
BERT_ODD = dict(num_attention_heads=3, intermediate_size=52, max_position_embeddings=50, type_vocab_size=3)

STATES = NO_MARKS | dict(expand=2, conv_kernel=4)
STATES_ODD = NO_MARKS | dict(expand=2, conv_kernel=3, use_bias=True, layer_norm_epsilon=1e-3)
MAMBA2 = dict(state_size=16, num_heads=8, head_dim=8, n_groups=1, chunk_size=16)
MAMBA2_ODD = dict(state_size=10, num_heads=6, head_dim=12, n_groups=2, chunk_size=7)
TWO, THREE = ["linear_attention", "full_attention"], ["linear_attention", "linear_attention", "full_attention"]
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
DELTA_ODD = dict(linear_key_head_dim=6, linear_value_head_dim=10, linear_num_key_heads=1, linear_num_value_heads=3)
HYBRID = PLAIN | DELTA | dict(head_dim=16, layer_types=TWO, rms_norm_eps=1e-4)
HYBRID_ODD = WIDE | DELTA_ODD | dict(num_hidden_layers=3, layer_types=THREE, linear_conv_kernel_dim=3)
HYBRID_ODD |= dict(partial_rotary_factor=0.5)
EXPERT = dict(num_local_experts=1, num_experts_per_tok=1)
FACTORS = dict(full_attn_alpha_factor=0.9, full_attn_beta_factor=1.2, linear_attn_alpha_factor=1.1)
FACTORS |= dict(linear_attn_beta_factor=0.8, mlp_alpha_factor=1.3, mlp_beta_factor=0.7)
LATENT = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10, num_key_value_heads=4)
KIMI = PLAIN | LATENT | dict(linear_num_heads=4, linear_head_dim=8, layer_types=TWO)
KIMI |= dict(mlp_layer_types=["dense", "dense"])
KIMI_ODD = KIMI | TOKENS_ODD | dict(linear_num_heads=3, linear_head_dim=12, linear_conv_kernel_dim=3)
KIMI_ODD |= dict(layer_types=["linear_attention"] * 2, rms_norm_eps=1e-3)
RANKS = dict(decay_low_rank_dim=6, gate_low_rank_dim=8, a_low_rank_dim=5, v_low_rank_dim=4)
FLA = NO_MARKS | TOKENS | dict(intermediate_size=48)
FLA_ODD = NO_MARKS | TOKENS_ODD | dict(intermediate_size=52, fuse_norm=False, tie_word_embeddings=True)


def weights(layer, *names):
    """`0.norm` of a layer, `/norm` of the model."""
    return tuple(name[1:] if name[0] == "/" else layer + name for name in names)


BLOCK = "model.layers."
ATTENTION = weights(BLOCK, "/model.norm.weight", "0.self_attn.k_proj.weight", "1.mlp.gate_proj.weight")
TIED = *ATTENTION, "model.embed_tokens.weight"
BIASED = *TIED, "model.layers.1.self_attn.k_proj.bias"
NORMED = *ATTENTION, *weights(BLOCK, "0.self_attn.q_norm.weight", "1.self_attn.k_norm.weight")
SANDWICH = *TIED, *weights(BLOCK, "0.post_attention_layernorm.weight", "1.pre_feedforward_layernorm.weight")
FUSED = "ln_f.bias", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight", "wpe.weight"
PREFIXED = tuple("transformer." + name for name in FUSED)
ENCODER = weights("encoder.layer.", "0.attention.self.key.weight", "1.output.dense.weight")
ENCODER += "embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight"
SCANNED = weights("backbone.layers.", "/backbone.norm_f.weight", "0.mixer.A_log", "1.mixer.conv1d.weight")
STEPS = *SCANNED, "backbone.layers.1.mixer.dt_proj.bias"
INPUTS = *SCANNED, "backbone.layers.1.mixer.x_proj.weight"
STEPS2 = *SCANNED, "backbone.layers.1.mixer.dt_bias"
GROUPED = *SCANNED, "backbone.layers.1.mixer.norm.weight"
DECAYS = "0.linear_attn.A_log", "0.linear_attn.dt_bias", "0.linear_attn.conv1d.weight", "0.linear_attn.norm.weight"
GATED = weights(BLOCK, *DECAYS, "1.self_attn.q_proj.weight")
MIXED = weights(BLOCK, *DECAYS, "1.linear_attn.in_proj_ba.weight", "2.self_attn.k_norm.weight")
SEEING = "/lm_head.weight", *DECAYS, "1.linear_attn.in_proj_a.weight", "2.self_attn.k_norm.weight"
SEEING = weights("model.language_model.layers.", *SEEING)
LIGHTNING = weights(BLOCK, "0.self_attn.k_proj.weight", "1.self_attn.norm.weight", "1.self_attn.output_gate.weight")
LIGHTNING_ODD = weights(BLOCK, "2.self_attn.k_proj.weight", "1.self_attn.norm.weight", "1.self_attn.output_gate.weight")
FORGETTING = "0.self_attn.A_log", "0.self_attn.dt_bias", "0.self_attn.f_a_proj.weight", "0.self_attn.o_norm.weight"
LATENTS = weights(BLOCK, *FORGETTING, "1.self_attn.kv_b_proj.weight")
CHANNELS = weights(BLOCK, *FORGETTING, "1.self_attn.b_proj.weight")
SHIFTS = "0.attn.x_w", "0.attn.w_lora.lora.0.weight", "0.attn.k_a", "1.attn.r_k", "1.ffn.x_k"
SHIFTED = weights(BLOCK, *SHIFTS, "1.attn.v_lora.lora.2.bias")
SHIFTED_ODD = weights(BLOCK, *SHIFTS, "1.attn.g_norm.weight")
RETAINED = weights(BLOCK, "/model.norm.weight", "0.attn.k_proj.weight", "1.attn.g_norm_swish_gate.weight")
RETAINED_ODD = weights(BLOCK, "/model.norm.weight", "0.attn.k_proj.weight", "1.attn.g_norm.weight")

CASES = {
    "llama": case("Llama", ATTENTION, PLAIN),
    "llama_odd": case("Llama", TIED, ODD, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama_linear": case("Llama", TIED, WIDE, rope_parameters=LINEAR),
    "mistral": case("Mistral", ATTENTION, PLAIN, sliding_window=8, head_dim=8),
    "mistral_odd": case("Mistral", ATTENTION, WIDE, sliding_window=5),
    "qwen2": case("Qwen2", BIASED, PLAIN, tie_word_embeddings=True),
    "qwen2_odd": case("Qwen2", ATTENTION, ODD, rope_parameters=YARN),
    "qwen3": case("Qwen3", NORMED, PLAIN, head_dim=16, tie_word_embeddings=True),
    "qwen3_odd": case("Qwen3", NORMED, WIDE, attention_bias=True, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "gemma2": case("Gemma2", SANDWICH, PLAIN, CAPS, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma2_odd": case("Gemma2", SANDWICH, WIDE, CAPS_ODD, num_hidden_layers=3, sliding_window=6, query_pre_attn_scalar=20),
    "gpt2": case("GPT2", PREFIXED, GPT2, vocab_size=64, n_embd=32, n_head=4),
    "gpt2_odd": case("GPT2", FUSED, GPT2_ODD),
    "bert": case("Bert", ENCODER, TOKENS, BERT),
    "bert_odd": case("Bert", ENCODER, TOKENS_ODD, BERT_ODD, layer_norm_eps=1e-3),
    "mamba": case("Mamba", STEPS, TOKENS, STATES, state_size=8),
    "mamba_odd": case("Mamba", INPUTS, TOKENS_ODD, STATES_ODD, state_size=5, time_step_rank=4, tie_word_embeddings=False),
    "mamba2": case("Mamba2", STEPS2, TOKENS, STATES, MAMBA2),
    "mamba2_odd": case("Mamba2", GROUPED, TOKENS_ODD, STATES_ODD, MAMBA2_ODD, tie_word_embeddings=True),
    "qwen3_next": case("Qwen3Next", GATED, HYBRID, num_experts=0),
    "qwen3_next_odd": case("Qwen3Next", MIXED, HYBRID_ODD, num_experts=4, mlp_only_layers=[0, 1, 2]),
    "qwen3_5": case("Qwen3_5", GATED, HYBRID, tie_word_embeddings=True),
    "qwen3_5_odd": case("Qwen3_5", SEEING, HYBRID_ODD),
    "minimax": case("MiniMax", LIGHTNING, PLAIN, EXPERT, block_size=16),
    "minimax_odd": case("MiniMax", LIGHTNING_ODD, ODD, EXPERT, FACTORS, num_hidden_layers=3, layer_types=THREE, block_size=7),
    "kimi_linear": case("KimiLinear", LATENTS, KIMI),
    "kimi_linear_odd": case("KimiLinear", CHANNELS, KIMI_ODD),
    "rwkv7": case("RWKV7", SHIFTED, FLA, RANKS, head_dim=8),
    "rwkv7_odd": case("RWKV7", SHIFTED_ODD, FLA_ODD, RANKS, head_dim=12),
    "retnet": case("RetNet", RETAINED, FLA, num_heads=4),
    "retnet_odd": case("RetNet", RETAINED_ODD, FLA_ODD, num_heads=3, num_kv_heads=1, norm_eps=1e-3),
}
