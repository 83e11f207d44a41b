use super::{folder, json, refuses, succeeds};

#[test]
fn softmax_recalls_and_a_small_state_forgets() {
    let out = folder("recall");
    succeeds("recall", &["--quick", "--out", out.to_str().unwrap()]);
    let records = json(out.join("recall.json"));
    let accuracy = |mechanism: &str, width: u64| {
        let is_it = |record: &&serde_json::Value| record["mechanism"] == mechanism && record["state_width"] == width;
        let record = records.as_array().unwrap().iter().find(is_it).unwrap();
        record["accuracy"].as_array().unwrap().last().unwrap()[1].as_f64().unwrap()
    };
    assert!(accuracy("softmax", 16) >= 0.99, "{}", accuracy("softmax", 16));
    assert!(accuracy("linear", 8) < accuracy("linear", 16), "more state recalls less");
    assert!(std::fs::read_to_string(out.join("recall.svg")).unwrap().contains("linear"));
}

#[test]
fn more_pairs_than_keys_are_refused() {
    refuses("recall", &["--pairs", "129"], &["--pairs 129", "at most 128"]);
    refuses("recall", &["--quick", "--pairs", "8"], &["--quick", "--pairs"]);
}
