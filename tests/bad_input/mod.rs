//! Bad input is refused with a message that names function, argument, what it got and what it needs; nothing is
//! computed, and nothing panics. One table for all layers.

mod call;
#[cfg(feature = "candle")]
mod candle;
mod cpu;
mod engine;
mod table;

use call::Call;

/// A call that must be refused.
struct Bad {
    why: &'static str,
    call: Call,
    /// The argument at fault.
    argument: &'static str,
    /// Parts of the message.
    words: &'static [&'static str],
}

/// Runs every row through `refuse`, which returns the message (or what went wrong).
fn check(refuse: impl Fn(&Call) -> Result<String, String>) {
    let mut complaints = Vec::new();
    let rows = table::all();
    assert!(rows.len() > 150, "{} rows", rows.len());
    for Bad { why, call, argument, words } in &rows {
        let name = call.operation.name();
        let message = match refuse(call) {
            Ok(message) => message,
            Err(problem) => {
                complaints.push(format!("{name}, {why}: {problem}"));
                continue;
            }
        };
        let names_argument = message.contains(&format!(": argument `{argument}`"));
        if !message.starts_with(name) || !names_argument || !words.iter().all(|word| message.contains(word)) {
            complaints.push(format!("{name}, {why}: expected `{argument}` and {words:?}, got: {message}"));
        }
    }
    assert!(complaints.is_empty(), "{} of {} rows\n{}", complaints.len(), rows.len(), complaints.join("\n"));
}

/// The calls that the rows change are themselves accepted.
fn check_baselines(accept: impl Fn(&Call) -> Result<(), String>) {
    for call in table::baselines() {
        if let Err(problem) = accept(&call) {
            panic!("{}: {problem}", call.operation.name());
        }
    }
}
