//! Requests and answers, a line of JSON each.

use std::io::{BufRead, Result, Write};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A request, or why the line is none; nothing at the end.
pub type Next<R> = Option<std::result::Result<R, String>>;

pub fn read<R: DeserializeOwned>() -> Result<Next<R>> {
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line).map_err(|error| error.to_string())))
}

/// Writes an answer and returns the next request.
pub fn answer<R: DeserializeOwned>(value: &Value) -> Result<Next<R>> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    out.flush()?;
    read()
}

pub fn fail<R: DeserializeOwned>(message: &str) -> Result<Next<R>> {
    answer(&json!({ "error": message }))
}

pub fn reply(result: std::result::Result<Value, String>) -> Value {
    result.unwrap_or_else(|message| json!({ "error": message }))
}
