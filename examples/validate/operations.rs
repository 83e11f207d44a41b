//! Every operation on random operands.

use crate::Outcome;
use crate::common::check::{Expected, Scope};
use crate::common::inputs::Shape;
use crate::common::table::table;
use crate::common::{Call, Device, Float, Inputs, Mechanism, Pass};

/// Grouped heads and several tiles and chunks, not a multiple of any.
const CAUSAL: Shape = Shape { batch: 2, heads: 4, key_heads: 2, queries: 300, keys: 300, width: 64, value_width: 48 };
/// Fewer queries than keys, widths that no vector divides, and a key mask.
const FULL: Shape = Shape { batch: 2, heads: 4, key_heads: 4, queries: 130, keys: 190, width: 40, value_width: 23 };

/// Prints the table and returns its cells.
///
/// # Errors
/// Those of the operations, with the case.
pub fn run(device: &Device) -> Result<Vec<Outcome>, String> {
    let mut outcomes = Vec::new();
    let mut table = table(&["operation", "mechanism", "dtype", "path", "fwd RMS", "fwd row", "bwd RMS", "bwd row"], 4);
    for float in Float::ALL {
        let causal = Inputs::random(float, CAUSAL).map_err(|error| error.to_string())?;
        let mut full = Inputs::random(float, FULL).map_err(|error| error.to_string())?;
        // Every seventh key and the whole tail of the second batch entry are padding.
        let is_kept = |key: usize| key % 7 != 3 && key < 2 * FULL.keys - 60;
        full.key_mask = Some((0..FULL.batch * FULL.keys).map(|key| is_kept(key).into()).collect());
        for mechanism in Mechanism::ALL {
            let passes = Pass::ALL.map(|pass| check(device, mechanism, pass, &causal, &full));
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

/// One outcome per path of the device.
fn check(
    device: &Device,
    mechanism: Mechanism,
    pass: Pass,
    causal: &Inputs,
    full: &Inputs,
) -> Result<Vec<Outcome>, String> {
    let paths = device.paths().into_iter();
    let mut outcomes: Vec<_> = paths.map(|path| (path, outcome(mechanism, pass, causal.float, path.name))).collect();
    for (is_causal, inputs) in [(true, causal), (false, full)] {
        if !mechanism.supports(is_causal) {
            continue;
        }
        let fail = |error| format!("{} {} {}: {error}", mechanism.name(), pass.name(), inputs.float);
        let call = Call::new(mechanism, is_causal, inputs).map_err(fail)?;
        let expected = Expected::new(&call, pass, Scope::Whole);
        for (path, outcome) in &mut outcomes {
            outcome.add(&path.run(|| expected.check(device))?.map_err(fail)?.0);
        }
    }
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

/// An outcome without errors.
pub fn outcome(mechanism: Mechanism, pass: Pass, float: Float, path: &'static str) -> Outcome {
    Outcome {
        operation: mechanism.operation(),
        mechanism: mechanism.name(),
        dtype: float.to_string(),
        path,
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
