//! The example programs, run as users run them. `cargo test` builds them beside the tests.

mod chat;
mod decode;
mod embed;
mod length_scaling;
mod peer_candle;
mod recall;
mod serve_batch;
mod train_lm;

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// An empty folder of the test's own.
fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).unwrap();
    }
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn path(program: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(|deps| deps.parent()).unwrap().join("examples").join(program);
    path.with_extension(std::env::consts::EXE_EXTENSION)
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let path = path(program);
    // Tests run beside each other, and candle's threads wait busily.
    let output = Command::new(&path).args(arguments).env("RAYON_NUM_THREADS", "1").output();
    output.unwrap_or_else(|error| panic!("{}: {error}; `cargo build --examples` makes it", path.display()))
}

/// What a run that succeeds prints.
fn succeeds(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {out}\n{error}");
    out.into_owned()
}

/// Asserts that a run is refused, without a panic, by a message with all of `words`.
fn refuses(program: &str, arguments: &[&str], words: &[&str]) {
    let output = run(program, arguments);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{program} {arguments:?} succeeds");
    assert!(message.starts_with("error: ") && !message.contains("panicked"), "{program} {arguments:?}: {message}");
    for word in words {
        assert!(message.contains(word), "{program} {arguments:?}: expected `{word}`, got: {message}");
    }
}

fn json(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap()
}

/// Asserts that a record has a bound on this machine, a time's share of it and the rates behind it.
fn has_share(record: &Value) {
    let number = |name: &str| record[name].as_f64().unwrap_or_else(|| panic!("{name} of {record}"));
    let share = number("bound_ms") / number("median_ms");
    assert!((number("share_of_bound") / share - 1.0).abs() < 1e-6, "{record}");
    // Loose: other work on the machine may meet either measurement.
    assert!(share > 0.0 && share < 10.0, "{record}");
    assert!(number("bound_gflops") > 0.0 && number("bound_gbytes_per_s") > 0.0, "{record}");
    assert!(record["bound_by"] == "flops" || record["bound_by"] == "bytes", "{record}");
}
