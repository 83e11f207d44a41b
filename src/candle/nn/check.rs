//! What a configuration must hold to be a layer.

use std::f64::consts::TAU;

use super::config::{AttentionConfig, QueryKeyNorm};
use super::mechanism::Mechanism;
use super::norm::NormConfig;
use super::recurrent::sizes;
use crate::gau::GauNorm;
use crate::problem::ensure_value;
use crate::random_features::FeatureKind;
use crate::transnormer::DiagWeight;

/// Refuses a size of 0, and one whose products could go beyond the numbers of the machine.
pub(super) fn check_size(argument: &'static str, size: usize) -> crate::Result<()> {
    const LARGEST: usize = 1 << 20;
    let needs = format!("at least 1 and at most {LARGEST}");
    ensure_value((1..=LARGEST).contains(&size), "AttentionConfig", argument, size, &needs)
}

/// Refuses choices of the mechanism that no layer can have.
pub(super) fn check_mechanism(config: &AttentionConfig) -> crate::Result<()> {
    let function = "AttentionConfig";
    let positive = |argument, value: usize| ensure_value(value > 0, function, argument, value, "at least 1");
    let above_zero = |argument, value: f64| {
        ensure_value(value.is_finite() && value > 0.0, function, argument, value, "a finite number above 0")
    };
    let at_least_zero = |value: f64| {
        ensure_value(value.is_finite() && value >= 0.0, function, "epsilon", value, "a finite number, at least 0")
    };
    match &config.mechanism {
        Mechanism::Softmax { window, soft_cap } => {
            window.map_or(Ok(()), |window| positive("window", window))?;
            soft_cap.map_or(Ok(()), |cap| above_zero("soft_cap", cap))
        }
        Mechanism::Linear { .. } => Ok(()),
        Mechanism::Performer { features, directions, epsilon, .. } => {
            check_size("features", *features)?;
            at_least_zero(*epsilon)?;
            let fits = *directions != FeatureKind::HyperbolicPairs || features.is_multiple_of(2);
            ensure_value(fits, function, "features", features, "an even number for hyperbolic pairs")
        }
        Mechanism::Norm { epsilon, .. } => above_zero("epsilon", *epsilon),
        Mechanism::Diag { block, weight } => {
            positive("block", *block)?;
            match weight {
                DiagWeight::Softmax => Ok(()),
                DiagWeight::Relu { epsilon } => above_zero("epsilon", *epsilon),
            }
        }
        Mechanism::Retention { log_decay, epsilon, .. } => {
            above_zero("epsilon", *epsilon)?;
            ensure_value(config.causal, function, "causal", "false", "`true` for retention")?;
            let Some(log_decay) = log_decay else { return Ok(()) };
            let needs = format!("one number for each of {} heads of keys", config.key_heads());
            let count = log_decay.len();
            ensure_value(count == config.key_heads(), function, "log_decay", format!("{count} numbers"), &needs)?;
            let bad = log_decay.iter().find(|decay| decay.is_nan() || **decay > 0.0);
            ensure_value(bad.is_none(), function, "log_decay", bad.copied().unwrap_or(0.0), "at most 0")
        }
        Mechanism::Gau { key_width, expansion, norm, bias_reach } => {
            bias_reach.map_or(Ok(()), |reach| check_size("bias_reach", reach))?;
            check_size("key_width", *key_width)?;
            check_size("expansion", *expansion)?;
            match *norm {
                GauNorm::Fixed { length } => above_zero("length", length)?,
                GauNorm::RowSum { epsilon } => at_least_zero(epsilon)?,
                GauNorm::Length | GauNorm::LengthWidth => {}
            }
            one_head(config, "key_width")
        }
        Mechanism::Flash { chunk, key_width, expansion, .. } => {
            check_size("chunk", *chunk)?;
            check_size("key_width", *key_width)?;
            check_size("expansion", *expansion)?;
            one_head(config, "key_width")
        }
        Mechanism::Gla { low_rank, gate_divisor, epsilon, .. } => {
            check_size("low_rank", *low_rank)?;
            above_zero("gate_divisor", *gate_divisor)?;
            check_recurrent(config, *epsilon)
        }
        Mechanism::Deltanet { epsilon, .. } | Mechanism::Kda { epsilon, .. } => {
            equal_heads(config)?;
            check_recurrent(config, *epsilon)
        }
        Mechanism::GatedDeltanet { epsilon, .. } | Mechanism::Mamba2 { epsilon, .. } => {
            check_recurrent(config, *epsilon)
        }
        Mechanism::Mamba { states, convolution, .. } => {
            check_size("states", *states)?;
            check_size("rank", config.mechanism.rank(config.width))?;
            check_size("convolution", *convolution)?;
            let (function, heads) = ("AttentionConfig", config.heads);
            ensure_value(heads == 1, function, "heads", heads, "1 for mamba, whose inner width is `head_width`")?;
            has_no_positions(config)
        }
        Mechanism::Lightning { place, epsilon, .. } => {
            check_place(*place)?;
            equal_heads(config)?;
            check_recurrent(config, *epsilon)
        }
        Mechanism::Rwkv7 { place, epsilon, .. } => {
            check_place(*place)?;
            equal_heads(config)?;
            config.mechanism.ranks(config.width).into_iter().try_for_each(|rank| check_size("ranks", rank))?;
            check_recurrent(config, *epsilon)
        }
        Mechanism::S4d { states } => {
            check_size("states", *states)?;
            one_head(config, "width")?;
            has_no_positions(config)
        }
        Mechanism::Lru { states, radii, phase } => {
            check_size("states", states.unwrap_or(config.width))?;
            let [inner, outer] = *radii;
            let is_ring = 0.0 <= inner && inner < outer && outer <= 1.0;
            ensure_value(is_ring, function, "radii", format!("{radii:?}"), "0 ≤ inner < outer ≤ 1")?;
            let is_angle = *phase > 0.0 && *phase <= TAU;
            ensure_value(is_angle, function, "phase", phase, "above 0 and at most 2π")?;
            one_head(config, "width")?;
            has_no_positions(config)
        }
    }
}

/// Refuses options that the mechanism does not have.
pub(super) fn check_options(config: &AttentionConfig) -> crate::Result<()> {
    let (function, kind) = ("AttentionConfig", config.mechanism.name());
    let is_softmax = matches!(config.mechanism, Mechanism::Softmax { .. });
    let has_heads = !config.mechanism.is_recurrent() && !config.mechanism.is_gated_unit();
    let options = [
        ("scale", config.scale.is_some(), is_softmax),
        ("query_key_norm", config.query_key_norm.is_some(), has_heads),
        ("sinks", config.sinks, is_softmax),
        ("output_gate", config.output_gate, is_softmax),
    ];
    for (argument, is_given, is_possible) in options {
        ensure_value(!is_given || is_possible, function, argument, "given", &format!("none for {kind}"))?;
    }
    if let Some(scale) = config.scale {
        ensure_value(scale.is_finite() && scale > 0.0, function, "scale", scale, "a finite number above 0")?;
    }
    if let Some(QueryKeyNorm { norm: NormConfig { epsilon, .. }, .. }) = config.query_key_norm {
        ensure_value(epsilon.is_finite() && epsilon > 0.0, function, "epsilon", epsilon, "a finite number above 0")?;
    }
    // Of features it would scale the numerator and not the divisor.
    let factor = config.rotary.map_or(1.0, |rotary| rotary.attention_factor());
    let has_scores = is_softmax || matches!(config.mechanism, Mechanism::Diag { .. });
    let needs = format!("1 for {kind}: it is of scores, in softmax and diag");
    ensure_value(factor == 1.0 || has_scores, function, "attention_factor", factor, &needs)
}

/// The number of a layer, and how many there are.
fn check_place(place: Option<[usize; 2]>) -> crate::Result<()> {
    let is_below = place.is_none_or(|[layer, layers]| layer < layers);
    let needs = "a layer's number below how many there are";
    ensure_value(is_below, "AttentionConfig", "place", format!("{place:?}"), needs)
}

/// What holds for all layers with a matrix for a state.
fn check_recurrent(config: &AttentionConfig, epsilon: f64) -> crate::Result<()> {
    has_no_positions(config)?;
    let function = "AttentionConfig";
    ensure_value(epsilon.is_finite() && epsilon > 0.0, function, "epsilon", epsilon, "a finite number above 0")?;
    check_size("key_width", sizes(config).key_width)?;
    let taps = match config.mechanism {
        Mechanism::Gla { convolution, .. } => convolution.unwrap_or(1),
        Mechanism::Deltanet { convolution, .. }
        | Mechanism::GatedDeltanet { convolution, .. }
        | Mechanism::Kda { convolution, .. }
        | Mechanism::Mamba2 { convolution, .. } => convolution,
        _ => 1,
    };
    check_size("convolution", taps)
}

fn has_no_positions(config: &AttentionConfig) -> crate::Result<()> {
    let (function, kind) = ("AttentionConfig", config.mechanism.name());
    ensure_value(config.causal, function, "causal", "false", &format!("`true` for {kind}"))?;
    let got = config.rotary.map_or(0.0, |rotary| rotary.base);
    ensure_value(config.rotary.is_none(), function, "rotary", got, &format!("none for {kind}: it has no positions"))
}

/// The rules without groups of heads.
fn equal_heads(config: &AttentionConfig) -> crate::Result<()> {
    let needs = format!("{}, as `heads`, for {}", config.heads, config.mechanism.name());
    ensure_value(config.key_heads() == config.heads, "AttentionConfig", "key_heads", config.key_heads(), &needs)
}

/// Layers of one head, whose width another field says.
fn one_head(config: &AttentionConfig, field: &str) -> crate::Result<()> {
    let (function, kind) = ("AttentionConfig", config.mechanism.name());
    ensure_value(config.heads == 1, function, "heads", config.heads, &format!("1 for {kind}"))?;
    ensure_value(config.key_heads() == 1, function, "key_heads", config.key_heads(), &format!("1 for {kind}"))?;
    let given = config.head_width;
    let got = given.unwrap_or_default();
    ensure_value(given.is_none(), function, "head_width", got, &format!("none for {kind}: its width is `{field}`"))
}
