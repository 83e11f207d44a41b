use super::{folder, json, refuses, succeeds};

/// The program fails where a prompt gives another text in the batch.
#[test]
fn prompts_of_a_file_go_through_a_batch() {
    let out = folder("serve_batch");
    let file = out.join("prompts.txt");
    std::fs::write(&file, "to be or not to be\n\na\nthat is the question, whether it is nobler in the mind\n").unwrap();
    let [file, at] = [&file, &out].map(|path| path.to_str().unwrap());
    let small = ["--width", "32", "--layers", "2", "--heads", "2", "--samples", "1", "--out", at];
    for mechanism in ["softmax", "flash"] {
        let run =
            ["--prompts", file, "--mechanism", mechanism, "--at-once", "2", "--tokens", "20", "--temperature", "0.9"];
        let printed = succeeds("serve_batch", &[&run[..], &small].concat());
        assert!(printed.contains("3 prompts of 73 tokens, 60 written"), "{printed}");
        let report = json(out.join("serve_batch.json"));
        let written = report["written"].as_array().unwrap();
        assert_eq!((written.len(), report["mechanism"].as_str()), (3, Some(mechanism)));
        assert!(written[0] != written[1] && report["batch_tokens_per_s"].as_f64().unwrap() > 0.0);
    }
    succeeds("serve_batch", &[&["--tokens", "2"][..], &small].concat());
}

#[test]
fn a_trained_model_serves() {
    let out = folder("serve_batch_trained");
    let at = out.to_str().unwrap();
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/docs");
    let small = ["--width", "32", "--layers", "2", "--heads", "2", "--context", "32", "--evaluate-on", "2"];
    let run = ["--text", docs, "--mechanism", "linear", "--steps", "2", "--stop-at", "1", "--out", at];
    succeeds("train_lm", &[&run[..], &small].concat());
    let model = out.join("linear");
    succeeds("serve_batch", &["--model", model.to_str().unwrap(), "--tokens", "3", "--samples", "1", "--out", at]);
}

#[test]
fn what_cannot_be_served_is_refused() {
    let out = folder("serve_batch_refused");
    let (at, empty) = (out.to_str().unwrap(), out.join("empty.txt"));
    std::fs::write(&empty, "\n\n").unwrap();
    let empty = empty.to_str().unwrap();
    refuses("serve_batch", &["--prompts", empty, "--out", at], &["--prompts", "empty.txt", "has no line"]);
    refuses("serve_batch", &["--prompts", "nowhere.txt", "--out", at], &["--prompts nowhere.txt"]);
    refuses("serve_batch", &["--model", at, "--out", at], &["--model", "config.json"]);
    refuses("serve_batch", &["--at-once", "0"], &["--at-once", "at least 1"]);
    refuses("serve_batch", &["--temperature=-1", "--out", at], &["`temperature` is -1"]);
}
