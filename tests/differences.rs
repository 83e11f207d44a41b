//! The engines' gradients against central differences of the engines' own outputs, in f64.
//!
//! The loss is L = Σ ⟨d_out, out⟩ + Σ ⟨d_lse, log-sum-exp⟩ + Σ ⟨d_state, state⟩, states in the unit that the stabiliser
//! has where the inputs are not moved. For every input x and a random direction u, ⟨dL/dx, u⟩ is
//! compared with (L(x + hu) − L(x − hu))/2h. h is so small that the kinks of ReLU between the two points do not count.

use attn_kernels::problem::DType;
use attn_kernels::reference::{Array, StateGradient};

use crate::common::backends::{self, Backend, Pass};
use crate::common::cases::{self, Case, Entry, Extra, Operation};
use crate::common::data::{Data, rows};
use crate::common::random::Random;
use crate::common::reference::Results;

const STEP: f64 = 1e-6;
/// Of the norm of the gradient by the steps; rounding of L is 1e-16·|L|/h.
const TOLERANCE: f64 = 3e-7;

/// ⟨d_state, state⟩, S and z of each head times e^{c − `unit`}.
fn state_loss(data: &Data, results: &Results, unit: &Results) -> f64 {
    let Some(StateGradient { s: d_s, z: d_z }) = &data.d_state else { return 0.0 };
    let (state, unit) = (results.state().expect("a state"), unit.state().expect("a state"));
    let factor = |b: usize, h: usize| match (&state.stabilizer, &unit.stabilizer) {
        (Some(c), Some(unit)) if c.row(0, 0, b)[h].is_finite() => (c.row(0, 0, b)[h] - unit.row(0, 0, b)[h]).exp(),
        _ => 1.0,
    };
    let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let of_s = rows(d_s).map(|[b, h, f]| factor(b, h) * product(state.s.row(b, h, f), d_s.row(b, h, f)));
    let of_z = rows(d_z).map(|[b, _, h]| factor(b, h) * product(state.z.row(b, 0, h), d_z.row(b, 0, h)));
    of_s.sum::<f64>() + of_z.sum::<f64>()
}

fn loss(case: &Case, data: &Data, unit: &Results) -> f64 {
    let results = backends::default().run(case, data, DType::F64, Pass::Forward).unwrap();
    let product = |x: &Array, d: &Array| -> f64 {
        x.data.iter().zip(&d.data).filter(|(x, _)| x.is_finite()).map(|(x, d)| x * d).sum()
    };
    let lse = results.get("log_sum_exp").zip(data.d_lse.as_ref()).map_or(0.0, |(lse, d)| product(lse, d));
    product(results.out(), &data.d_out) + lse + state_loss(data, &results, unit)
}

/// The differentiable input that belongs to a gradient.
fn input<'a>(data: &'a mut Data, gradient: &str) -> &'a mut Array {
    let [q_global, k_global] = match &mut data.global {
        Some([q, k]) => [Some(q), Some(k)],
        None => [None, None],
    };
    let input = match gradient {
        "d_q" => Some(&mut data.q),
        "d_k" => Some(&mut data.k),
        "d_v" => Some(&mut data.v),
        "d_q_global" => q_global,
        "d_k_global" => k_global,
        "d_bias" => data.extras.bias.as_mut(),
        "d_attention_bias" => data.extras.attention_bias.as_mut(),
        "d_sinks" => data.extras.sinks.as_mut(),
        "d_log_decay" => data.extras.log_decay.as_mut(),
        "d_state.s" => data.state.as_mut().map(|state| &mut state.s),
        "d_state.z" => data.state.as_mut().map(|state| &mut state.z),
        _ => None,
    };
    input.unwrap_or_else(|| panic!("no input for {gradient}"))
}

/// A random direction, in rows of any size as large as these, that leaves out what cannot be moved: masked rows, and
/// log-decays that would turn positive.
fn direction(data: &mut Data, gradient: &str) -> Array {
    let mut random = Random::new(gradient);
    let mask = data.extras.key_mask.clone();
    let x = input(data, gradient);
    let mut u = random.array(x.shape, 1.0);
    if gradient == "d_log_decay" {
        u.data.iter_mut().zip(&x.data).filter(|(_, g)| **g > -1e-3).for_each(|(u, _)| *u = 0.0);
    }
    // z may be small, and is divided by.
    if gradient == "d_state.z" {
        u.data.iter_mut().zip(&x.data).for_each(|(u, z)| *u *= z.abs().min(1.0));
    }
    if matches!(gradient, "d_q" | "d_k") {
        for [b, h, i] in rows(&u) {
            let largest = x.row(b, h, i).iter().fold(0f64, |largest, x| largest.max(x.abs()));
            if largest > 0.0 && !(1e-3..1e3).contains(&largest) {
                u.row_mut(b, h, i).iter_mut().for_each(|u| *u *= largest);
            }
        }
    }
    if let Some(mask) = mask.filter(|_| matches!(gradient, "d_k" | "d_v" | "d_k_global")) {
        for [b, h, j] in rows(&u).filter(|&[b, _, j]| mask.row(0, 0, b)[j] == 0.0) {
            u.row_mut(b, h, j).fill(0.0);
        }
    }
    u
}

fn check(case: &Case, checked: &mut usize) -> Vec<String> {
    let data = Data::new(case, DType::F64);
    let results: Results = backends::default().run(case, &data, DType::F64, Pass::Both).unwrap();
    let mut complaints = Vec::new();
    // Steps of this size are lost in f32.
    let is_wide = |kind: Option<Extra>| matches!(kind, Some(Extra::Pairs(_, Entry::Wide)));
    let is_moved = |name: &str| match name {
        "d_attention_bias" => !is_wide(case.operation.attention_bias()),
        "d_sinks" => !is_wide(case.operation.sinks()),
        _ => name.starts_with("d_"),
    };
    for (name, gradient) in results.0.iter().filter(|(name, x)| is_moved(name) && !x.data.is_empty()) {
        let u = direction(&mut data.clone(), name);
        let at = |h: f64| {
            let mut moved = data.clone();
            input(&mut moved, name)
                .data
                .iter_mut()
                .zip(&u.data)
                .filter(|(_, u)| **u != 0.0)
                .for_each(|(x, u)| *x += h * u);
            loss(case, &moved, &results)
        };
        let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        let product: f64 = gradient.data.iter().zip(&u.data).map(|(d, u)| d * u).sum();
        let norm = gradient.data.iter().zip(&u.data).map(|(d, u)| (d * u).powi(2)).sum::<f64>().sqrt();
        let noise = 1e-15 * loss_size(&data, &results) / STEP;
        *checked += 1;
        if (product - difference).abs() > TOLERANCE * norm + noise {
            complaints.push(format!("{case}: {name} gives {product:e}, differences {difference:e}, norm {norm:e}"));
        }
    }
    complaints
}

/// Σ |d_out·out| and likewise of the state, whose roundings are those of L.
fn loss_size(data: &Data, results: &Results) -> f64 {
    let size = |x: &Array, d: &Array| x.data.iter().zip(&d.data).map(|(x, d)| (x * d).abs()).sum::<f64>();
    let state = data.d_state.as_ref().zip(results.state());
    let state = state.map_or(0.0, |(d, state)| size(&state.s, &d.s) + size(&state.z, &d.z));
    (size(results.out(), &data.d_out) + state).max(1.0)
}

#[test]
fn gradients_are_differences() {
    let mut complaints = Vec::new();
    let mut checked = 0;
    for mut case in cases::all().into_iter().chain(cases::state_gradients().concat()) {
        if !case.dtypes.contains(&DType::F64) || case.queries * case.keys > 600 * 600 {
            continue;
        }
        if let Operation::Performer(options, _) = &mut case.operation {
            // The stabiliser, whose gradient is left out by definition, cancels without ε.
            options.epsilon = 0.0;
        }
        complaints.extend(check(&case, &mut checked));
    }
    assert!(checked > 1000, "{checked}");
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}
