//! Text and tokens.

use std::path::Path;

use tokenizers::Tokenizer;

/// What makes tokens of text.
pub enum Text {
    Tokenizer(Box<Tokenizer>),
    /// Tokens are bytes.
    Bytes,
}

impl Text {
    /// That of the folder, or bytes.
    ///
    /// # Errors
    /// A tokenizer.json that cannot be read.
    pub fn open(folder: Option<&Path>) -> Result<Self, String> {
        let Some(folder) = folder else { return Ok(Self::Bytes) };
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).map_err(|error| format!("--model: {}: {error}", path.display()))?;
        Ok(Self::Tokenizer(Box::new(tokenizer)))
    }

    /// # Errors
    /// Those of the tokenizer; a text without tokens.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
        let tokens = match self {
            Self::Tokenizer(tokenizer) => {
                let encoding = tokenizer.encode(text, true).map_err(|error| format!("--prompt: {error}"))?;
                encoding.get_ids().to_vec()
            }
            Self::Bytes => text.bytes().map(u32::from).collect(),
        };
        if tokens.is_empty() { Err("--prompt: no tokens, needs one at least".into()) } else { Ok(tokens) }
    }

    /// What makes text of tokens that come one by one: as much as is complete with each.
    pub fn writer(&self) -> Box<dyn FnMut(u32) -> String + '_> {
        match self {
            Self::Tokenizer(tokenizer) => {
                let mut stream = tokenizer.decode_stream(true);
                Box::new(move |token| stream.step(token).ok().flatten().unwrap_or_default())
            }
            Self::Bytes => {
                let mut bytes = Vec::new();
                Box::new(move |token| {
                    bytes.push(token as u8);
                    match std::str::from_utf8(&bytes) {
                        // A character goes on.
                        Err(error) if error.error_len().is_none() => String::new(),
                        _ => String::from_utf8_lossy(&std::mem::take(&mut bytes)).into_owned(),
                    }
                })
            }
        }
    }
}
