//! Every operation on random operands.

use attn_kernels::cpu::Isa;

use crate::common::check::{Expected, Scope};
use crate::common::inputs::Shape;
use crate::common::{Call, Float, Inputs, Mechanism, Pass};
use crate::{Outcome, table};

/// Grouped heads and several tiles and chunks, not a multiple of any.
const CAUSAL: Shape = Shape { batch: 2, heads: 4, key_heads: 2, queries: 300, keys: 300, width: 64, value_width: 48 };
/// Fewer queries than keys, widths that no vector divides, and a key mask.
const FULL: Shape = Shape { batch: 2, heads: 4, key_heads: 4, queries: 130, keys: 190, width: 40, value_width: 23 };

/// Prints the table and returns its cells.
///
/// # Errors
/// Those of the operations, with the case.
pub fn run() -> Result<Vec<Outcome>, String> {
    let mut outcomes = Vec::new();
    let mut table = table(&["operation", "mechanism", "dtype", "path", "fwd RMS", "fwd row", "bwd RMS", "bwd row"], 4);
    for float in Float::ALL {
        let causal = Inputs::random(float, CAUSAL).map_err(|error| error.to_string())?;
        let mut full = Inputs::random(float, FULL).map_err(|error| error.to_string())?;
        // Every seventh key and the whole tail of the second batch entry are padding.
        let is_kept = |key: usize| key % 7 != 3 && key < 2 * FULL.keys - 60;
        full.key_mask = Some((0..FULL.batch * FULL.keys).map(|key| is_kept(key).into()).collect());
        for mechanism in Mechanism::ALL {
            let passes = Pass::ALL.map(|pass| check(mechanism, pass, &causal, &full));
            let [forward, backward] = passes;
            for (forward, backward) in forward?.into_iter().zip(backward?) {
                let names = [forward.operation, forward.mechanism, forward.dtype.as_str(), forward.path];
                let cells = forward.cells().into_iter().chain(backward.cells());
                table.add_row(names.into_iter().map(String::from).chain(cells));
                outcomes.extend([forward, backward]);
            }
        }
    }
    println!("{table}");
    Ok(outcomes)
}

/// One outcome per instruction set.
fn check(mechanism: Mechanism, pass: Pass, causal: &Inputs, full: &Inputs) -> Result<Vec<Outcome>, String> {
    let paths = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    let mut outcomes: Vec<_> = paths.map(|isa| (isa, outcome(mechanism, pass, causal.float, isa))).collect();
    for (is_causal, inputs) in [(true, causal), (false, full)] {
        if !mechanism.supports(is_causal) {
            continue;
        }
        let fail = |error| format!("{} {} {}: {error}", mechanism.name(), pass.name(), inputs.float);
        let call = Call::new(mechanism, is_causal, inputs).map_err(fail)?;
        let expected = Expected::new(&call, pass, Scope::Whole);
        for (isa, outcome) in &mut outcomes {
            let check = isa.force(|| expected.check()).ok_or_else(|| format!("{} is not available", isa.name()))?;
            outcome.add(&check.map_err(fail)?.0);
        }
    }
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

/// An outcome without errors.
pub fn outcome(mechanism: Mechanism, pass: Pass, float: Float, isa: Isa) -> Outcome {
    Outcome {
        operation: mechanism.operation(),
        mechanism: mechanism.name(),
        dtype: float.to_string(),
        path: isa.name(),
        pass: pass.name(),
        rms_error: 0.0,
        rms_bound: f64::INFINITY,
        worst_row_error: 0.0,
        worst_row_bound: f64::INFINITY,
        is_within: true,
        distance_to_softmax: None,
        max_difference_to_out: None,
    }
}
