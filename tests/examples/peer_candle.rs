use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::path;

/// The answers to requests.
fn answers(requests: &[Value]) -> Vec<Value> {
    let mut command = Command::new(path("peer_candle"));
    command.env("RAYON_NUM_THREADS", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut program = command.spawn().unwrap();
    let mut lines = program.stdin.take().unwrap();
    requests.iter().for_each(|request| writeln!(lines, "{request}").unwrap());
    drop(lines);
    let output = program.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn case(mechanism: &str, pass: &str) -> Value {
    json!({
        "mechanism": mechanism, "pass": pass, "causal": true, "dtype": "f32", "batch": 1, "heads": 2, "head_dim": 8, "len": 16
    })
}

#[test]
fn every_case_is_timed() {
    let prepared = [
        json!({ "case": case("softmax", "fwd") }),
        json!({ "operations": case("softmax", "fwdbwd") }),
        json!({ "case": case("linear", "fwdbwd") }),
        json!({ "case": case("performer", "fwdbwd") }),
    ];
    let requests: Vec<_> = prepared.into_iter().flat_map(|case| [case, json!({ "sample": 2 })]).collect();
    for pair in answers(&requests).chunks(2) {
        assert_eq!(pair[0], json!({}));
        assert!(pair[1]["seconds"][0].as_f64().unwrap() > 0.0, "{pair:?}");
    }
}

#[test]
fn what_cannot_be_timed_is_refused() {
    let requests = [
        json!({ "sample": 1 }),
        json!({ "case": case("gau", "fwd") }),
        json!({ "operations": case("linear", "fwd") }),
        json!({ "case": case("softmax", "bwd") }),
        json!({ "case": case("softmax", "neither") }),
    ];
    let answers = answers(&requests);
    assert_eq!(answers.len(), requests.len());
    answers.iter().for_each(|answer| assert!(answer["error"].is_string(), "{answer}"));
}
