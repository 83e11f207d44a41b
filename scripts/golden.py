"""Writes tests/data/models: tiny models of published architectures in random weights, and what transformers makes of them.

    python -m venv target/golden
    target/golden/bin/pip install torch==2.15.0 transformers==5.24.0 safetensors==0.8.0
    target/golden/bin/python scripts/golden.py [NAME ...]           # all, or these
    target/golden/bin/python scripts/golden.py --check FOLDER ...   # models that others saved, with golden.safetensors beside

A folder has config.json and model.safetensors, bf16, as they are published, and golden.safetensors, computed from the same
weights in f32 by the eager implementation:

    tokens [2, 44]                  u32, and for an encoder `mask` and `token_types`
    logits [2, 44, vocabulary]      of one pass; for an encoder `hidden` [2, 44, width] and `pooled` [2, width]
    gradient.<name of a weight>     of the mean cross-entropy of the next tokens; for an encoder of mean h³ + mean p³

Checked here: a prompt of 4 tokens and 40 single steps through the cache give the logits of the one pass, every weight has a
gradient, and the folder opens again to the same logits.
"""

import argparse
import json
import pathlib
import sys
import zlib

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

ROOT = pathlib.Path(__file__).resolve().parents[1] / "tests/data/models"
ROWS, LENGTH, PROMPT = 2, 44, 4
SPECIAL = 3  # the first tokens, which may stand for padding
STEPPED, OPENED = 1e-4, 2e-5  # largest differences, relative to the largest value
# Shifts every score of a query alike, so that its gradient is rounding.
IDLE = "attention.self.key.bias"

PLAIN = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
ODD = PLAIN | dict(
    vocab_size=61, hidden_size=36, intermediate_size=52, num_attention_heads=3, num_key_value_heads=1, head_dim=12,
)  # fmt: skip
WIDE = ODD | dict(num_attention_heads=6, num_key_value_heads=2)
GPT2 = dict(n_positions=64, n_layer=2, bos_token_id=None, eos_token_id=None)
BERT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)

ATTENTION = "model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight"
TIED = *ATTENTION, "model.embed_tokens.weight"
QK_NORMS = *ATTENTION, "model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight"
SANDWICH = *TIED, "model.layers.0.post_attention_layernorm.weight", "model.layers.1.pre_feedforward_layernorm.weight"
FUSED = "ln_f.bias", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight", "wpe.weight", "wte.weight"
ENCODER = (
    "embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight", "encoder.layer.0.attention.self.key.weight",
    "encoder.layer.1.output.dense.weight",
)  # fmt: skip

LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.5)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)

# Family of classes, configuration, weights whose gradients are kept. `_odd` and `_linear` are written as transformers 4 and
# older published folders do: rope_theta and rope_scaling, torch_dtype, no layer_types and no head_dim where the default
# serves, a window that use_sliding_window turns off; GPT-2 without its prefix.
CASES = {
    "llama": ("Llama", PLAIN, ATTENTION),
    "llama_odd": ("Llama", ODD | dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), TIED),
    "llama_linear": ("Llama", WIDE | dict(rope_parameters=LINEAR, rms_norm_eps=1e-5), TIED),
    "mistral": ("Mistral", PLAIN | dict(sliding_window=8, head_dim=8), ATTENTION),
    "mistral_odd": ("Mistral", WIDE | dict(sliding_window=5, rms_norm_eps=1e-5), ATTENTION),
    "qwen2": ("Qwen2", PLAIN | dict(tie_word_embeddings=True), (*TIED, "model.layers.1.self_attn.k_proj.bias")),
    "qwen2_odd": ("Qwen2", ODD | dict(rope_parameters=YARN), ATTENTION),
    "qwen3": ("Qwen3", PLAIN | dict(head_dim=16, tie_word_embeddings=True), QK_NORMS),
    "qwen3_odd": ("Qwen3", WIDE | dict(attention_bias=True, use_sliding_window=True, sliding_window=7, max_window_layers=1), QK_NORMS),
    "gemma2": ("Gemma2", PLAIN | dict(head_dim=8, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0), SANDWICH),
    "gemma2_odd": ("Gemma2", WIDE | dict(num_hidden_layers=3, sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=1.5, final_logit_softcapping=2.5), SANDWICH),
    "gpt2": ("GPT2", GPT2 | dict(vocab_size=64, n_embd=32, n_head=4), tuple("transformer." + name for name in FUSED)),
    "gpt2_odd": ("GPT2", GPT2 | dict(vocab_size=61, n_embd=36, n_head=3, n_inner=52, layer_norm_epsilon=1e-6), FUSED),
    "bert": ("Bert", BERT | dict(max_position_embeddings=64), ENCODER),
    "bert_odd": ("Bert", BERT | dict(vocab_size=61, hidden_size=36, num_attention_heads=3, intermediate_size=52, max_position_embeddings=50, type_vocab_size=3, layer_norm_eps=1e-6), ENCODER),
}  # fmt: skip


def family(name):
    """The classes of a configuration and of the model."""
    model = {"GPT2": "GPT2LMHeadModel", "Bert": "BertModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, f"{name}Config"), getattr(transformers, model)


def scatter(model):
    """Random weights, representable in bf16, all of which matter: vectors around where they start, matrices that keep
    the size of what they multiply."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 1 or name == "A_log":
                fresh = weight + 0.2 * (2 * torch.rand_like(weight) - 1)
            else:
                fan_in = weight.shape[0] if isinstance(module, Conv1D) else weight[0].numel()
                fresh = torch.randn_like(weight) / fan_in**0.5
            weight.data = fresh.detach().bfloat16().float()


def inputs(name, vocabulary, types):
    tokens = torch.randint(SPECIAL, vocabulary, (ROWS, LENGTH))
    if not types:
        return {"tokens": tokens}
    mask = torch.ones_like(tokens)
    mask[1, 29:] = 0
    return {"tokens": tokens, "mask": mask, "token_types": torch.randint(types, tokens.shape)}


def evaluate(model, given):
    """What goes into golden.safetensors of one pass, and the loss."""
    names = {"tokens": "input_ids", "mask": "attention_mask", "token_types": "token_type_ids"}
    out = model(**{names[name]: value.long() for name, value in given.items()})
    if "logits" in out:
        predicted, next_tokens = out.logits[:, :-1].flatten(0, 1), given["tokens"][:, 1:].long().flatten()
        return {"logits": out.logits}, torch.nn.functional.cross_entropy(predicted, next_tokens)
    hidden, pooled = out.last_hidden_state, out.pooler_output
    return {"hidden": hidden, "pooled": pooled}, (hidden**3).mean() + (pooled**3).mean()


def difference(ours, theirs):
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


@torch.no_grad()
def stepped(model, tokens):
    """Logits of a prompt and of single tokens after it, through the cache."""
    out = model(tokens[:, :PROMPT], use_cache=True)
    logits = [out.logits]
    for token in tokens[:, PROMPT:].split(1, dim=1):
        out = model(token, cache=out.cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def published(folder):
    """Rewrites what transformers 5 saved as older published folders are."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if rope := config.pop("rope_parameters", None):
        config |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope["rope_type"] in ("linear", "yarn"):
            rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope if len(rope) > 1 else None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    if config.get("use_sliding_window") is False:
        config["sliding_window"] = 8
    if config.get("head_dim") == config.get("hidden_size", 0) // config.get("num_attention_heads", 1):
        del config["head_dim"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def opened(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModel if config.model_type == "bert" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def check(folder):
    """The largest difference of a folder's outputs from those in its golden.safetensors."""
    golden = load_file(folder / "golden.safetensors")
    given = {name: golden[name] for name in ("tokens", "mask", "token_types") if name in golden}
    outputs = {name: golden[name] for name in ("logits", "hidden", "pooled") if name in golden}
    return difference(evaluate(opened(folder), given)[0], outputs)


def write(name):
    kind, options, gradients = CASES[name]
    folder = ROOT / name
    torch.manual_seed(zlib.crc32(name.encode()))
    configuration, architecture = family(kind)
    config = configuration(**options)
    config._attn_implementation = "eager"
    model = architecture(config).eval()
    scatter(model)
    given = inputs(name, config.vocab_size, getattr(config, "type_vocab_size", 0))
    outputs, loss = evaluate(model, given)
    loss.backward()

    notes = []
    if "logits" in outputs:
        step = difference({"logits": stepped(model, given["tokens"])}, outputs)
        assert step < STEPPED, f"{name}: decoding differs by {step:.1e}"
        notes.append(f"decoding {step:.1e}")
    slopes = {key: weight.grad.abs().max().item() for key, weight in model.named_parameters() if not key.endswith(IDLE)}
    flattest = min(slopes, key=slopes.get)
    assert slopes[flattest] > 1e-6, f"{name}: {flattest} does not matter"
    notes.append(f"smallest slope {slopes[flattest]:.1e} of {flattest}")

    prefix = "" if hasattr(model, gradients[0].split(".")[0]) else "transformer."
    kept = {f"gradient.{key}": model.get_parameter(prefix + key).grad.clone() for key in gradients}
    golden = {key: value.to(torch.uint32) for key, value in given.items()} | outputs | kept
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name.endswith(("_odd", "_linear")):
        published(folder)
    save_file({key: value.detach().contiguous() for key, value in golden.items()}, folder / "golden.safetensors")

    again = check(folder)
    assert again < OPENED, f"{name}: the folder opens to a difference of {again:.1e}"
    spread = ", ".join(f"{key} {value.std():.2f}" for key, value in outputs.items())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name:16} {size >> 10:4} KiB, loss {loss:.3f}, spread of {spread}, {', '.join(notes)}, opened {again:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CASES], metavar="NAME", help="all by default")
    parser.add_argument("--check", nargs="+", type=pathlib.Path, metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.check:
        differences = {folder: check(folder) for folder in arguments.check}
        for folder, value in differences.items():
            print(f"{folder}: {value:.1e}")
        sys.exit(max(differences.values()) > OPENED)
    for name in arguments.names or CASES:
        write(name)


if __name__ == "__main__":
    main()
