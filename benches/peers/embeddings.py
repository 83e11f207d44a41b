"""Sentence embeddings of a BERT checkpoint in PyTorch: what examples/embed.rs is compared with.

    python benches/peers/embeddings.py FOLDER [SENTENCES] [OUT]

FOLDER has config.json, model.safetensors and tokenizer.json. All sentences go through the model as one padded batch, in
f64, and are averaged over their tokens. Needs, beside requirements.txt, transformers and safetensors.
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(folder, sentences=ROOT / "examples/embed/sentences.txt", out=ROOT / "tests/data/minilm_sentences.safetensors"):
    lines = [line for line in pathlib.Path(sentences).read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    batch = tokenizer(lines, padding="longest", truncation=True, max_length=model.config.max_position_embeddings, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].double()
    embeddings = (hidden * mask).sum(1) / mask.sum(1)
    tokens = batch["attention_mask"].sum(1)
    save_file({"embeddings": embeddings.float().contiguous(), "tokens": tokens.int()}, out)
    print(f"{len(lines)} sentences of {tokens.tolist()} tokens -> {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
