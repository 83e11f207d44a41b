use std::path::Path;

use super::{folder, refuses, succeeds};

/// A tiny published model with a tokenizer of two words.
fn model(name: &str) -> String {
    let folder = folder(name);
    let published = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/llama");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(published.join(file), folder.join(file)).unwrap();
    }
    let tokenizer = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"yes": 3, "no": 4}, "unk_token": "no"}}"#;
    std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
    folder.to_str().unwrap().to_string()
}

#[test]
fn a_published_model_goes_on() {
    let model = model("chat");
    let run = ["--model", model.as_str(), "--prompt", "yes no yes", "--tokens", "8"];
    let others = ["linear", "performer", "norm", "diag", "retention"].map(|name| vec!["--mechanism", name]);
    let plain = [vec![], vec!["--dtype", "bf16", "--temperature", "0.8"], vec!["--window", "2"]];
    for more in plain.iter().chain(&others) {
        let printed = succeeds("chat", &[&run[..], more].concat());
        assert!(printed.starts_with("yes no yes") && printed.contains("3 tokens, "), "{printed}");
    }
    let printed = succeeds("chat", &[&run[..], &["--context", "30"]].concat());
    assert!(printed.contains("30 tokens, "), "{printed}");
}

#[test]
fn what_cannot_go_on_is_refused() {
    let model = model("chat_refused");
    refuses("chat", &["--model", "nowhere"], &["--model", "tokenizer.json"]);
    refuses("chat", &["--model", &model, "--prompt", ""], &["--prompt", "no tokens"]);
    refuses("chat", &["--model", &model, "--temperature=-1"], &["`temperature` is -1"]);
    std::fs::write(Path::new(&model).join("config.json"), r#"{ "model_type": "other" }"#).unwrap();
    refuses("chat", &["--model", &model], &["config.json", "`other`", "llama"]);
}
