//! The house rules that a machine can check.

use crate::common::sources::{code, sources};

#[test]
fn files_are_short() {
    let sources = sources(&["rs", "py", "sh", "cu", "cuh", "cpp", "hpp"]);
    assert!(sources.len() > 60, "{} files found", sources.len());
    let long = sources.iter().filter(|(_, text)| text.lines().count() > 600);
    let long: Vec<_> = long.map(|(name, text)| format!("{name}: {} lines", text.lines().count())).collect();
    assert!(long.is_empty(), "over 600 lines: {long:?}");
}

/// Whether `word` stands alone in `line`.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part))
}

#[test]
fn unsafe_code_has_its_places() {
    // Behind the first three: candle's memory that engines and plans fill, calls of a driver, an allocator that counts, which the
    // trait makes unsafe, and vectors whose rate is measured.
    let places = [
        "src/cpu/simd/",
        "src/cpu/tile/",
        "src/gpu/",
        "src/candle/engine/tensors.rs",
        "tests/gpu_calls.rs",
        "examples/common/measure.rs",
        "examples/common/chains.rs",
    ];
    let mut seen = 0;
    for (name, text) in sources(&["rs"]) {
        let lines: Vec<_> = code(&text).filter(|(_, line)| has_word(line, "unsafe") && !line.contains('"')).collect();
        if places.iter().any(|place| name.starts_with(place)) {
            seen += lines.len();
        } else {
            assert!(lines.is_empty(), "{name} has unsafe code: {lines:?}");
        }
    }
    assert!(seen > 0, "the search finds nothing");
}

#[test]
fn assembly_has_its_place() {
    let kernels = sources(&["cu", "cuh", "cpp", "hpp"]);
    let is_asm = |line: &str| has_word(line, "asm") || has_word(line, "__asm__");
    let with_asm = kernels.iter().filter(|(_, text)| code(text).any(|(_, line)| is_asm(line)));
    let with_asm: Vec<_> = with_asm.map(|(name, _)| name).collect();
    assert!(with_asm.len() > 3, "the search finds nothing");
    // The emulator changes stacks by hand.
    let is_allowed = |name: &str| name.starts_with("kernels/ptx/") || name.starts_with("tests/emulator/");
    let stray: Vec<_> = with_asm.iter().filter(|name| !is_allowed(name)).collect();
    assert!(stray.is_empty(), "assembly in {stray:?}");
}

#[test]
fn algorithms_are_the_same_everywhere() {
    for (name, text) in sources(&["cu", "cuh"]) {
        let is_ours = name.starts_with("kernels/") && !name.starts_with("kernels/ptx/");
        for (number, line) in code(&text).filter(|_| is_ours) {
            let words = ["__CUDA_ARCH__", "ATTN_EMULATOR", "__shared__", "__global__", "threadIdx", "blockIdx"];
            let word = words.iter().find(|word| has_word(line, word));
            assert!(word.is_none(), "{name}:{number}: {line}");
        }
    }
}

#[test]
fn nothing_is_left_to_do() {
    // Put together, so that this file does not find itself.
    let marks = ["todo", "unimplemented"].map(|word| format!("{word}!("));
    for (name, text) in sources(&["rs"]) {
        for (number, line) in code(&text) {
            let mark = marks.iter().find(|mark| line.contains(mark.as_str()));
            assert!(mark.is_none(), "{name}:{number}: {line}");
        }
    }
}

#[test]
fn imports_go_down_only() {
    // Folder or file, and the modules of the crate that it must not mention.
    let rules: [(&str, &[&str]); 7] = [
        ("src/error.rs", &["problem", "cpu", "gpu", "candle", "reference"]),
        ("src/problem/", &["cpu", "gpu", "candle", "reference"]),
        ("src/reference/", &["cpu", "gpu", "candle", "random_features"]),
        ("src/cpu/", &["gpu", "candle", "reference"]),
        ("src/gpu/", &["cpu", "candle", "reference"]),
        ("src/random_features.rs", &["cpu", "gpu", "candle", "reference", "problem"]),
        ("src/candle/", &["reference"]),
    ];
    let mechanisms = ["src/softmax.rs", "src/linear.rs", "src/performer.rs", "src/transnormer.rs", "src/gau.rs"];
    let forbidden: &[&str] = &["cpu", "gpu", "candle", "reference"];
    let rules = rules.into_iter().chain(mechanisms.map(|file| (file, forbidden)));
    let sources = sources(&["rs"]);
    for (place, modules) in rules {
        let files: Vec<_> = sources.iter().filter(|(name, _)| name.starts_with(place)).collect();
        assert!(!files.is_empty() || place == "src/gpu/", "{place} is gone");
        for (name, text) in files {
            let text: String = code(text).map(|(_, line)| line.trim()).collect();
            let upward = modules.iter().find(|module| mentions(&text, module));
            assert!(upward.is_none(), "{name} imports upward: {upward:?}");
        }
    }
}

/// Whether code mentions the module of the crate, by path or in a list `crate::{…}`.
fn mentions(text: &str, module: &str) -> bool {
    let in_list = |list: &str| {
        let mut depth = 0;
        let end = list.find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth < 0
        });
        let items = list[..end.unwrap_or(list.len())].split(',');
        items.into_iter().any(|item| item.split("::").next().is_some_and(|first| first.trim() == module))
    };
    ["crate::", "super::"]
        .iter()
        .any(|root| has_word(text, &format!("{root}{module}")) || text.split(&format!("{root}{{")).skip(1).any(in_list))
}

#[test]
fn mentions_are_found() {
    for text in [
        "use crate::cpu::Isa;",
        "let x = super::super::cpu::f();",
        "use crate::{Error, cpu::{Isa, x}};",
        "use crate::{a::{b, c}, cpu};",
    ] {
        assert!(mentions(text, "cpu"), "{text}");
    }
    for text in ["use crate::cpu_facts;", "use crate::problem::{cpu, x};", "use crate::{Error, problem}; fn cpu() {}"] {
        assert!(!mentions(text, "cpu"), "{text}");
    }
}
