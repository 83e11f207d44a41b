use std::path::Path;

use super::{folder, json, refuses, succeeds};

/// A model that takes milliseconds a step, on the documentation.
const SMALL: [&str; 18] = [
    "--text",
    concat!(env!("CARGO_MANIFEST_DIR"), "/docs"),
    "--width",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--context",
    "32",
    "--batch",
    "4",
    "--evaluate-every",
    "10",
    "--evaluate-on",
    "8",
    "--learning-rate",
    "0.01",
];

fn arguments<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SMALL[..], more].concat()
}

#[test]
fn every_mechanism_learns_and_writes_what_one_pass_gives() {
    let out = folder("train_lm_all");
    let names = attn_kernels::nn::LanguageModelConfig::NAMES;
    let printed = succeeds("train_lm", &arguments(&["--compare", "--steps", "60", "--out", out.to_str().unwrap()]));
    // The program fails where a step from the cache and one pass choose differently.
    assert_eq!(printed.matches("256 greedy steps").count(), names.len(), "{printed}");
    let runs = json(out.join("train_lm.json"));
    let runs = runs.as_array().unwrap();
    assert_eq!(runs.len(), names.len());
    for run in runs {
        let curve = run["curve"].as_array().unwrap();
        let bits = |at: usize| curve[at]["bits_per_byte"].as_f64().unwrap();
        let (first, last) = (bits(0), bits(curve.len() - 1));
        assert!(last <= 0.75 * first, "{}: from {first} to {last}", run["settings"]["mechanism"]);
        assert!((7.5..8.5).contains(&first), "{first} bits per byte before the first step");
    }
    let svg = std::fs::read_to_string(out.join("train_lm.svg")).unwrap();
    assert!(names.iter().all(|name| svg.contains(name)), "a curve is missing");
}

#[test]
fn an_interrupted_run_ends_in_the_same_bits() {
    for mechanism in attn_kernels::nn::LanguageModelConfig::NAMES {
        let (whole, parts) = (folder("train_lm_whole"), folder("train_lm_parts"));
        let [whole_out, parts_out] = [&whole, &parts].map(|folder| folder.to_str().unwrap());
        let redraw: &[&str] = if mechanism == "performer" { &["--redraw-every", "3"] } else { &[] };
        let run = [&["--mechanism", mechanism, "--steps", "14", "--sample", "1"], redraw].concat();
        succeeds("train_lm", &arguments(&[&run[..], &["--out", whole_out]].concat()));
        succeeds("train_lm", &arguments(&[&run[..], &["--out", parts_out, "--stop-at", "7"]].concat()));
        let checkpoint = parts.join(mechanism);
        let read = |folder: &Path, name: &str| std::fs::read(folder.join(mechanism).join(name)).unwrap();
        let name = "model.safetensors";
        assert!(read(&whole, name) != read(&parts, name), "{mechanism}: did not stop");
        succeeds("train_lm", &["--resume", checkpoint.to_str().unwrap(), "--out", parts_out, "--sample", "1"]);
        for name in ["model.safetensors", "optimizer.safetensors", "config.json"] {
            assert!(read(&whole, name) == read(&parts, name), "{mechanism}: {name} differs");
        }
        let bits = |folder: &Path| json(folder.join("train_lm.json"))[0]["curve"][2]["bits_per_byte"].clone();
        assert!(bits(&whole).is_number());
        assert_eq!(bits(&whole), bits(&parts), "{mechanism}");
    }
}

#[test]
fn text_that_cannot_be_learned_is_refused() {
    let out = folder("train_lm_text");
    let file = |name: &str, text: &str| {
        let path = out.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (empty, short) = (file("empty.txt", ""), file("short.txt", &"x".repeat(200)));
    let missing = out.join("missing.txt");
    let out = out.to_str().unwrap();
    let with_text = |text: &str, words: &[&str]| refuses("train_lm", &["--text", text, "--out", out], words);
    with_text(missing.to_str().unwrap(), &["cannot read", "missing.txt"]);
    with_text(&empty, &["empty.txt", "is empty"]);
    with_text(&short, &["short.txt", "180 bytes to learn and 20 for validation", "needs 257 of each"]);
}

#[test]
fn settings_that_cannot_be_are_refused() {
    refuses("train_lm", &["--mechanism", "cosine"], &["--mechanism", "cosine", "softmax"]);
    refuses("train_lm", &["--context", "0"], &["--context", "at least 1"]);
    refuses("train_lm", &["--heads", "3"], &["width", "128", "3"]);
    refuses("train_lm", &["--resume", "x", "--steps", "3"], &["--resume", "--steps"]);
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused() {
    let out = folder("train_lm_checkpoint");
    let (at, missing) = (out.to_str().unwrap(), out.join("missing"));
    refuses(
        "train_lm",
        &["--resume", missing.to_str().unwrap(), "--out", at],
        &["--resume", "missing", "progress.json"],
    );
    for mechanism in ["softmax", "linear"] {
        succeeds("train_lm", &arguments(&["--mechanism", mechanism, "--steps", "2", "--stop-at", "1", "--out", at]));
    }
    let softmax = out.join("softmax");
    let resume = ["--resume", softmax.to_str().unwrap(), "--out", at];
    std::fs::copy(out.join("linear/model.safetensors"), softmax.join("model.safetensors")).unwrap();
    refuses("train_lm", &resume, &["model.safetensors", "mechanism.softmax"]);
    std::fs::write(softmax.join("model.safetensors"), "no tensors").unwrap();
    refuses("train_lm", &resume, &["model.safetensors"]);
}
