//! The rotary embedding of a published configuration.

use candle_core::Result;

use super::fields::Fields;
use crate::nn::{RotaryConfig, RotaryScaling};

/// Of rows of a head of so many numbers: `rope_theta` and `rope_scaling`, or both in `rope_parameters`.
pub fn rotary(fields: &mut Fields, head_width: usize) -> Result<RotaryConfig> {
    let base = fields.or("rope_theta", 10000.0)?;
    let partial: Option<f64> = fields.optional("partial_rotary_factor")?;
    let length: Option<usize> = fields.optional("max_position_embeddings")?;
    let (older, newer) = (fields.nested("rope_scaling")?, fields.nested("rope_parameters")?);
    if newer.is_some() && older.is_some() {
        candle_core::bail!("`rope_scaling` beside `rope_parameters`, needs one of them");
    }
    let Some(mut parameters) = newer.or(older) else {
        return Ok(RotaryConfig { width: rotated(head_width, partial), ..RotaryConfig::from(base) });
    };
    let base = parameters.or("rope_theta", base)?;
    let partial = parameters.optional("partial_rotary_factor")?.or(partial);
    let (name, older_name) = (parameters.optional::<String>("rope_type")?, parameters.optional::<String>("type")?);
    let scaling = scaling(&mut parameters, name.or(older_name).as_deref().unwrap_or("default"), length)?;
    parameters.finish(&[])?;
    Ok(RotaryConfig { width: rotated(head_width, partial), scaling, ..RotaryConfig::from(base) })
}

fn rotated(head_width: usize, partial: Option<f64>) -> Option<usize> {
    partial.filter(|part| *part != 1.0).map(|part| (head_width as f64 * part) as usize)
}

fn scaling(parameters: &mut Fields, name: &str, length: Option<usize>) -> Result<Option<RotaryScaling>> {
    let original_length = |parameters: &mut Fields| -> Result<usize> {
        match parameters.optional("original_max_position_embeddings")?.or(length) {
            Some(length) => Ok(length),
            None => parameters.required("original_max_position_embeddings"),
        }
    };
    Ok(match name {
        "default" => None,
        "linear" => Some(RotaryScaling::Linear { factor: parameters.required("factor")? }),
        "llama3" => Some(RotaryScaling::Llama3 {
            factor: parameters.required("factor")?,
            low_frequency_factor: parameters.required("low_freq_factor")?,
            high_frequency_factor: parameters.required("high_freq_factor")?,
            original_length: original_length(parameters)?,
        }),
        "yarn" => Some(RotaryScaling::Yarn {
            factor: parameters.required("factor")?,
            original_length: original_length(parameters)?,
            beta_fast: parameters.or("beta_fast", 32.0)?,
            beta_slow: parameters.or("beta_slow", 1.0)?,
            attention_factor: parameters.optional("attention_factor")?,
            mscale: parameters.optional("mscale")?,
            mscale_all_dim: parameters.optional("mscale_all_dim")?,
            truncate: parameters.or("truncate", true)?,
        }),
        other => candle_core::bail!("rotary scaling `{other}`, supported are default, linear, llama3 and yarn"),
    })
}
