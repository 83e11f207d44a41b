//! Sentences as one padded batch of token ids.

use std::path::Path;

use candle_core::{Device, Result, Tensor};
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

pub struct Batch {
    /// u32 `[batch, length]`
    pub ids: Tensor,
    /// u8 `[batch, length]`, 0 on padding
    pub key_mask: Tensor,
    /// Tokens of each sentence.
    pub lengths: Vec<usize>,
}

/// # Errors
/// A tokenizer.json that cannot be read, or that does not make at least one token per sentence.
pub fn tokenize(
    path: &Path,
    sentences: &[String],
    max_length: usize,
    device: &Device,
) -> std::result::Result<Batch, String> {
    let name = |error: tokenizers::Error| format!("{}: {error}", path.display());
    let mut tokenizer = Tokenizer::from_file(path).map_err(name)?;
    // Files come with a length of their own to truncate and pad to: the longest sentence decides here.
    let pad = tokenizer.get_padding().cloned().unwrap_or_default();
    let longest = PaddingParams { strategy: tokenizers::PaddingStrategy::BatchLongest, ..pad };
    tokenizer.with_padding(Some(longest));
    tokenizer.with_truncation(Some(TruncationParams { max_length, ..Default::default() })).map_err(name)?;
    let encodings = tokenizer.encode_batch(sentences.to_vec(), true).map_err(name)?;
    let mask: Vec<Vec<u8>> =
        encodings.iter().map(|e| e.get_attention_mask().iter().map(|&keep| keep as u8).collect()).collect();
    let lengths: Vec<_> = mask.iter().map(|row| row.iter().filter(|&&keep| keep != 0).count()).collect();
    if let Some(empty) = lengths.iter().position(|&length| length == 0) {
        return Err(format!("{}: no tokens for sentence {}", path.display(), empty + 1));
    }
    let tensors = || -> Result<_> {
        let ids: Vec<_> = encodings.iter().map(|encoding| encoding.get_ids().to_vec()).collect();
        Ok((Tensor::new(ids, device)?, Tensor::new(mask, device)?))
    };
    let (ids, key_mask) = tensors().map_err(|error| error.to_string())?;
    Ok(Batch { ids, key_mask, lengths })
}
