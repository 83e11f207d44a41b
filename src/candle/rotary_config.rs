use std::f64::consts::TAU;
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Result;
use crate::problem::ensure_value;

/// The angles of a [`Rotary`](crate::nn::Rotary) embedding: θ_i(p) = p·f_i with the frequencies f_i = base^{−2i/w}, w the width
/// that is rotated (Su et al. 2021, RoFormer), or what a scaling makes of them.
///
/// A number stands for a base alone, in JSON and by `From`.
///
/// # Example
/// ```
/// use attn_kernels::nn::{RotaryConfig, RotaryScaling};
///
/// let config: RotaryConfig = serde_json::from_str("10000.0")?;
/// assert_eq!(config, RotaryConfig::from(10000.0));
/// let config: RotaryConfig =
///     serde_json::from_str(r#"{ "base": 500000.0, "scaling": { "kind": "linear", "factor": 4.0 } }"#)?;
/// assert_eq!(config.scaling, Some(RotaryScaling::Linear { factor: 4.0 }));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RotaryConfig {
    /// Above 1, usually 10000.
    pub base: f64,
    /// Numbers at the beginning of a row that are rotated, an even number; the rest stays as it is. Default: all.
    pub width: Option<usize>,
    /// Whether neighbours are rotated against each other, x_{2i} against x_{2i+1} as in RoFormer and GPT-J, instead of the
    /// halves of the row. Default: no.
    pub interleaved: bool,
    /// For texts that are longer than those of the training. Default: none.
    pub scaling: Option<RotaryScaling>,
}

/// How frequencies f of a [`RotaryConfig`] are changed for texts of s times the length L of the training. λ = 2π/f is a
/// wavelength, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RotaryScaling {
    /// f/s: positions are interpolated (Chen et al. 2023).
    Linear {
        /// s
        factor: f64,
    },
    /// f where L/λ is above the high factor h, f/s where it is below the low factor l, and between them
    /// (1 − t) f/s + t f with t = (L/λ − l)/(h − l) (Llama 3.1, Meta 2024).
    Llama3 {
        /// s
        factor: f64,
        /// l
        low_frequency_factor: f64,
        /// h > l
        high_frequency_factor: f64,
        /// L
        original_length: usize,
    },
    /// YaRN (Peng et al. 2023): (1 − t) f_i + t f_i/s with t = (i − a)/(b − a), at least 0 and at most 1, where a and b are the i
    /// whose wavelengths fit `beta_fast` and `beta_slow` times into L; cos and sin are multiplied by the attention factor, and so
    /// are the rotated numbers of queries and keys.
    Yarn {
        /// s
        factor: f64,
        /// L
        original_length: usize,
        /// Default 32.
        #[serde(default = "fast")]
        beta_fast: f64,
        /// Default 1.
        #[serde(default = "slow")]
        beta_slow: f64,
        /// Default (1 + m ln(s)/10)/(1 + m' ln(s)/10) with m of `mscale` and m' of `mscale_all_dim`, without them
        /// 1 + ln(s)/10; 1 where s is at most 1.
        #[serde(default)]
        attention_factor: Option<f64>,
        /// m of the attention factor, in DeepSeek's models. Default: none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mscale: Option<f64>,
        /// m', given where `mscale` is. Default: none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mscale_all_dim: Option<f64>,
        /// Whether a and b are whole numbers, rounded outwards. Default: yes.
        #[serde(default = "yes")]
        truncate: bool,
    },
}

fn fast() -> f64 {
    32.0
}

fn slow() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

impl From<f64> for RotaryConfig {
    fn from(base: f64) -> Self {
        Self { base, width: None, interleaved: false, scaling: None }
    }
}

impl RotaryConfig {
    /// The numbers of a row of `width` that are rotated.
    ///
    /// # Errors
    /// What no rotation has; the error of `function` names the field, `width` by the name of `argument`.
    pub(crate) fn rotated(&self, function: &'static str, argument: &'static str, width: usize) -> Result<usize> {
        let base = self.base;
        ensure_value(base.is_finite() && base > 1.0, function, "rotary.base", base, "a finite number above 1")?;
        if let Some(part) = self.width {
            let needs = format!("an even number above 0, at most {width}");
            let fits = part > 0 && part.is_multiple_of(2) && part <= width;
            ensure_value(fits, function, "rotary.width", part, &needs)?;
        }
        let rotated = self.width.unwrap_or(width);
        let is_even = rotated > 0 && rotated.is_multiple_of(2);
        ensure_value(is_even, function, argument, rotated, "an even number above 0 with rotary embedding")?;
        if let Some(scaling) = &self.scaling {
            scaling.check(function)?;
        }
        Ok(rotated)
    }

    /// What cos and sin are multiplied by.
    pub(crate) fn attention_factor(&self) -> f64 {
        let Some(RotaryScaling::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. }) = self.scaling else {
            return 1.0;
        };
        let magnitude = |m: f64| if factor > 1.0 { 1.0 + 0.1 * m * factor.ln() } else { 1.0 };
        let usual = match (mscale, mscale_all_dim) {
            (Some(m), Some(of_all)) => magnitude(m) / magnitude(of_all),
            _ => magnitude(1.0),
        };
        attention_factor.unwrap_or(usual)
    }

    /// Frequencies of rows of which so many numbers are rotated.
    pub(crate) fn frequencies(&self, width: usize) -> Vec<f64> {
        let log = self.base.ln();
        let plain: Vec<f64> = (0..width / 2).map(|i| (-log * 2.0 / width as f64 * i as f64).exp()).collect();
        let scaled = |scale: &dyn Fn(usize, f64) -> f64| plain.iter().enumerate().map(|(i, f)| scale(i, *f)).collect();
        match self.scaling {
            None => plain,
            Some(RotaryScaling::Linear { factor }) => scaled(&|_, f| f / factor),
            Some(RotaryScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_length }) => {
                let scale = |_, f: f64| {
                    let turns = original_length as f64 * f / TAU;
                    let span = high_frequency_factor - low_frequency_factor;
                    let t = ((turns - low_frequency_factor) / span).clamp(0.0, 1.0);
                    (1.0 - t) * f / factor + t * f
                };
                scaled(&scale)
            }
            Some(RotaryScaling::Yarn { factor, original_length, beta_fast, beta_slow, truncate, .. }) => {
                let last = width as f64 - 1.0;
                // Where a wavelength fits so many times into the length.
                let place = |turns: f64| width as f64 * (original_length as f64 / (turns * TAU)).ln() / (2.0 * log);
                let (first, end) = (place(beta_fast), place(beta_slow));
                let (first, end) = if truncate { (first.floor(), end.ceil()) } else { (first, end) };
                let (first, end) = (first.max(0.0), end.min(last));
                let end = if first == end { end + 0.001 } else { end };
                let scale = |i: usize, f: f64| {
                    let t = ((i as f64 - first) / (end - first)).clamp(0.0, 1.0);
                    (1.0 - t) * f + t * f / factor
                };
                scaled(&scale)
            }
        }
    }
}

impl RotaryScaling {
    fn check(&self, function: &'static str) -> Result<()> {
        let positive = |argument, value: f64| {
            ensure_value(value.is_finite() && value > 0.0, function, argument, value, "a finite number above 0")
        };
        let length = |value: usize| ensure_value(value > 0, function, "original_length", value, "at least 1");
        match *self {
            Self::Linear { factor } => positive("factor", factor),
            Self::Llama3 { factor, low_frequency_factor: low, high_frequency_factor: high, original_length } => {
                positive("factor", factor)?;
                positive("low_frequency_factor", low)?;
                positive("high_frequency_factor", high)?;
                length(original_length)?;
                let needs = format!("above the low factor {low}");
                ensure_value(high > low, function, "high_frequency_factor", high, &needs)
            }
            Self::Yarn {
                factor,
                original_length,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate: _,
            } => {
                positive("factor", factor)?;
                positive("beta_slow", beta_slow)?;
                positive("beta_fast", beta_fast)?;
                positive("attention_factor", attention_factor.unwrap_or(1.0))?;
                positive("mscale", mscale.unwrap_or(1.0))?;
                positive("mscale_all_dim", mscale_all_dim.unwrap_or(1.0))?;
                let given = [mscale, mscale_all_dim].map(|m| m.is_some());
                let fits = given == [false; 2] || given == [true; 2] && attention_factor.is_none();
                let needs = "to be given with `mscale_all_dim`, and without `attention_factor`";
                ensure_value(fits, function, "mscale", format!("{mscale:?}"), needs)?;
                let needs = format!("above `beta_slow` {beta_slow}");
                ensure_value(beta_fast > beta_slow, function, "beta_fast", beta_fast, &needs)?;
                length(original_length)
            }
        }
    }
}

/// As it is written where it is more than a base.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    base: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    width: Option<usize>,
    #[serde(default)]
    interleaved: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scaling: Option<RotaryScaling>,
}

impl Serialize for RotaryConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let Self { base, width, interleaved, scaling } = *self;
        match *self == Self::from(base) {
            true => serializer.serialize_f64(base),
            false => Fields { base, width, interleaved, scaling }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for RotaryConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct BaseOrFields;

        impl<'de> Visitor<'de> for BaseOrFields {
            type Value = RotaryConfig;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("the base of a rotary embedding, or a map with `base`")
            }

            fn visit_f64<E: Error>(self, base: f64) -> std::result::Result<RotaryConfig, E> {
                Ok(base.into())
            }

            fn visit_u64<E: Error>(self, base: u64) -> std::result::Result<RotaryConfig, E> {
                self.visit_f64(base as f64)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<RotaryConfig, A::Error> {
                let Fields { base, width, interleaved, scaling } =
                    Fields::deserialize(MapAccessDeserializer::new(map))?;
                Ok(RotaryConfig { base, width, interleaved, scaling })
            }
        }

        deserializer.deserialize_any(BaseOrFields)
    }
}
