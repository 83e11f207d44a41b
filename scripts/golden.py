"""Writes tests/data/models: tiny models of published architectures in random weights, and what transformers makes of them.

    python -m venv target/golden
    target/golden/bin/pip install torch==2.15.0 transformers==5.24.0 safetensors==0.8.0
    target/golden/bin/python scripts/golden.py [NAME ...]           # the folders that are there, or these
    target/golden/bin/python scripts/golden.py --check FOLDER ...   # models that others saved, with golden.safetensors beside

A folder has config.json and model.safetensors, bf16, as they are published, and golden.safetensors, computed from the same
weights in f32 by the eager implementation:

    tokens [2, 44]                  u32, and for an encoder `mask` and `token_types`
    logits [2, 44, vocabulary]      of one pass; for an encoder `hidden` [2, 44, width] and `pooled` [2, width]
    gradient.<name of a weight>     of the mean cross-entropy of the next tokens; for an encoder of mean h³ + mean p³

Some names are of models that this crate does not open yet: its tests open every folder.

Checked here: a prompt of 4 tokens and 40 single steps through the cache give the logits of the one pass, every weight has a
gradient, and the folder opens again to the same logits.
"""

import argparse
import contextlib
import inspect
import json
import pathlib
import re
import sys
import zlib

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import golden_fla
from golden_cases import CASES

ROOT = pathlib.Path(__file__).resolve().parents[1] / "tests/data/models"
ROWS, LENGTH, PROMPT = 2, 44, 4
SPECIAL = 3  # the first tokens, which may stand for padding
STEPPED, OPENED = 1e-4, 2e-5  # largest differences, relative to the largest value
# Without a gradient: what shifts every score of a query alike, and the router to a single expert.
IDLE = "attention.self.key.bias", "mlp.gate.weight"
# Parts of published names, and of those in transformers.
ALIASES = ("", ""), ("", "transformer."), (".language_model", ""), ("self_attn", "self_attn.forget_gate")


def family(name):
    """The classes of a configuration and of the model."""
    model = {"GPT2": "GPT2LMHeadModel", "Bert": "BertModel"}.get(name, f"{name}ForCausalLM")
    config = {"Qwen3_5": "Qwen3_5TextConfig"}.get(name, f"{name}Config")
    source = golden_fla if hasattr(golden_fla, config) else transformers
    return getattr(source, config), getattr(source, model)


def scatter(model):
    """Random weights, representable in bf16, all of which matter: vectors around where they start, matrices that keep
    the size of what they multiply."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.squeeze().ndim == 1 or name == "A_log":
                fresh = weight + 0.2 * (2 * torch.rand_like(weight) - 1)
                # Gated delta rules start by forgetting within a token, which shows little and rounds badly.
                fresh -= 2.5 if name == "A_log" and type(module).__name__.endswith("GatedDeltaNet") else 0
            else:
                fan_in = weight.shape[0 if isinstance(module, Conv1D) else -1]
                fresh = torch.randn_like(weight) / fan_in**0.5
            weight.data = fresh.detach().bfloat16().float()


def inputs(vocabulary, types):
    tokens = torch.randint(SPECIAL, vocabulary, (ROWS, LENGTH))
    if not types:
        return {"tokens": tokens}
    mask = torch.ones_like(tokens)
    mask[1, 29:] = 0
    return {"tokens": tokens, "mask": mask, "token_types": torch.randint(types, tokens.shape)}


def evaluate(model, given):
    """What goes into golden.safetensors of one pass, and the loss."""
    names = {"tokens": "input_ids", "mask": "attention_mask", "token_types": "token_type_ids"}
    out = model(use_cache=False, **{names[name]: value.long() for name, value in given.items()})
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
    takes_places = "position_ids" in inspect.signature(model.forward).parameters
    without_softmax = set(getattr(model.config, "layer_types", None) or ()) == {"linear_attention"}
    logits, cache = [], {}
    for places in torch.arange(LENGTH).split([PROMPT] + [1] * (LENGTH - PROMPT)):
        # What the caches of some hybrids cannot tell: how many tokens they hold, and that there is nothing to mask.
        known = {"position_ids": places[None]} if takes_places else {}
        if takes_places and without_softmax:
            known["attention_mask"] = {"linear_attention": None}
        out = model(tokens[:, places], use_cache=True, **known, **cache)
        logits, cache = [*logits, out.logits], {"cache": out.cache}
    return torch.cat(logits, 1)


def published(folder):
    """Rewrites what transformers 5 saved as older published folders are."""
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    kind, types = config["model_type"], config.pop("layer_types", None)
    renamed = lambda old, new: {re.sub(old, new, name): weight for name, weight in weights.items()}
    config["torch_dtype"] = config.pop("dtype")
    if rope := config.pop("rope_parameters", None):
        config |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope["rope_type"] in ("linear", "yarn"):
            rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope if len(rope) > 1 else None
    if config.get("use_sliding_window") is False:
        config["sliding_window"] = 8
    if config.get("head_dim") == config.get("hidden_size", 0) // config.get("num_attention_heads", 1):
        del config["head_dim"]
    match kind:
        case "gpt2":
            weights = renamed("^transformer.", "")
        case "mamba2":
            config["time_step_limit"] = [0.0, float("inf")]  # no JSON, and yet what they have
        case "minimax":
            config["layer_types"] = types
        case "qwen3_next" | "qwen3_5_text":
            config["full_attention_interval"] = types.index("full_attention") + 1
        case "kimi_linear":
            layers = lambda wanted: [place for place, name in enumerate(types, 1) if name == wanted]
            config["linear_attn_config"] = {
                "full_attn_layers": layers("full_attention"),
                "kda_layers": layers("linear_attention"),
                "head_dim": config.pop("linear_head_dim"),
                "num_heads": config.pop("linear_num_heads"),
                "short_conv_kernel_size": config.pop("linear_conv_kernel_dim"),
            }
            config["first_k_dense_replace"] = config.pop("mlp_layer_types").count("dense")
            weights = renamed("block_sparse_moe", "mlp")  # the name of experts, which transformers gives to both
    if kind == "qwen3_5_text":
        config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": config}
        weights = renamed("^model", "model.language_model")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def parameter(model, name):
    """The weight of a published name."""
    for theirs, ours in ALIASES:
        with contextlib.suppress(AttributeError):
            return model.get_parameter(name.replace(theirs, ours, 1))
    raise KeyError(name)


def opened(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModel if config.model_type == "bert" else transformers.AutoModelForCausalLM
    options = dict(dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    model, found = auto.from_pretrained(folder, **options)
    missing, excess = found["missing_keys"] - dict(model.named_buffers()).keys(), found["unexpected_keys"]
    assert not missing and not excess, f"{folder}: {missing} absent, {excess} too many"
    return model.eval()


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
    given = inputs(config.vocab_size, getattr(config, "type_vocab_size", 0))
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

    kept = {f"gradient.{key}": parameter(model, key).grad.clone() for key in gradients}
    golden = {key: value.to(torch.uint32) for key, value in given.items()} | outputs | kept
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()  # buffers stay
    model.save_pretrained(folder)
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
    parser.add_argument("names", nargs="*", choices=[[], *CASES], metavar="NAME", help="by default those that are there")
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
    for name in arguments.names or [name for name in CASES if (ROOT / name).exists()]:
        write(name)


if __name__ == "__main__":
    main()
