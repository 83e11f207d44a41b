//! What only a caller of the engines can get wrong: outputs, gradients, and what the forward pass saved.

use attn_kernels::cpu::linear::{self, LinearGradients, LinearInputs, LinearOutputs, LinearSaved, StateMut};
use attn_kernels::cpu::quadratic::{self, QuadraticGradients, QuadraticInputs, QuadraticSaved};
use attn_kernels::linear::LinearOptions;
use attn_kernels::problem::{DType, SliceMut, View};
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::{Error, Result};

use crate::common::buffers::Buffer;

/// [B, H, N, D] and E = D for everything.
const DIMS: [usize; 4] = [2, 3, 5, 4];
const ROWS: usize = 30;
const LEN: usize = 120;

#[track_caller]
fn assert_refused(result: Result<()>, argument: &str, words: &[&str]) {
    let message = result.expect_err("must be refused").to_string();
    let fits = message.contains(&format!("argument `{argument}`")) && words.iter().all(|word| message.contains(word));
    assert!(fits, "expected `{argument}` and {words:?}, got: {message}");
}

fn input() -> Buffer {
    Buffer::filled(DType::F32, LEN, 0.5)
}

fn floats(len: usize) -> Buffer {
    Buffer::poisoned(DType::F32, len)
}

fn doubles(len: usize) -> Buffer {
    Buffer::poisoned(DType::F64, len)
}

fn view(buffer: &Buffer) -> View<'_> {
    View::contiguous(buffer.slice_from(0), &DIMS).unwrap()
}

#[test]
fn views() {
    let x = [0f32; 24];
    let refused = |dims: &[usize], strides: &[usize], words: &[&str]| {
        let message = View::new(&x[..], dims, strides).unwrap_err().to_string();
        let fits =
            message.starts_with("View::new: argument `strides`") && words.iter().all(|word| message.contains(word));
        assert!(fits, "{message}");
    };
    refused(&[2, 3], &[3], &["[2, 3]", "[3]", "equal ranks"]);
    refused(&[], &[], &["ranks from 1 to 4"]);
    refused(&[1; 5], &[1; 5], &["ranks from 1 to 4"]);
    refused(&[2, 3], &[1, 2], &["[1, 2]", "contiguous last dimension"]);
    refused(&[5, 5], &[5, 1], &["[5, 5]", "slice of 24"]);
    refused(&[2, 2], &[usize::MAX, 1], &["slice of 24"]);
    refused(&[3, usize::MAX], &[2, 1], &["slice of 24"]);
    for (dims, strides) in [(&[4, 6][..], &[6, 1][..]), (&[2, 12], &[12, 1]), (&[5, 1], &[5, 7]), (&[0, 9], &[99, 1])] {
        View::new(&x[..], dims, strides).unwrap();
    }
    assert!(View::contiguous(&x[..], &[4, 6]).is_ok() && View::contiguous(&x[..], &[5, 5]).is_err());
}

#[test]
fn quadratic_forward() {
    let x = input();
    let q = view(&x);
    let problem = SoftmaxOptions::default().problem("softmax_attention", &q, &q, &q).unwrap();
    let inputs = QuadraticInputs::new(q, q, q);
    let run = |inputs: &QuadraticInputs<'_>, mut out: Buffer, mut statistic: Buffer| {
        quadratic::forward(&problem, inputs, out.slice_mut(), Some(statistic.slice_mut()))
    };
    run(&inputs, floats(LEN), floats(ROWS)).unwrap();
    assert_refused(run(&inputs, floats(LEN - 1), floats(ROWS)), "out", &["119 elements", "120"]);
    assert_refused(run(&inputs, doubles(LEN), floats(ROWS)), "out", &["f64", "f32"]);
    assert_refused(run(&inputs, floats(LEN), floats(ROWS + 1)), "statistic", &["31 elements", "30"]);
    assert_refused(run(&inputs, floats(LEN), doubles(ROWS)), "statistic", &["f64", "f32"]);
    let other = View::contiguous(x.slice_from(0), &[2, 3, 4, 4]).unwrap();
    let inputs = QuadraticInputs { k: other, v: other, ..inputs };
    assert_refused(run(&inputs, floats(LEN), floats(ROWS)), "q, k, v", &["keys: 4", "keys: 5"]);
}

/// Gradients of the right sizes for both engines, but for one.
fn gradients(wrong: Option<(usize, Buffer)>) -> [Buffer; 3] {
    let mut all = [floats(LEN), floats(LEN), floats(LEN)];
    if let Some((index, buffer)) = wrong {
        all[index] = buffer;
    }
    all
}

#[test]
fn quadratic_backward() {
    let (x, rows) = (input(), Buffer::filled(DType::F32, ROWS, 0.5));
    let q = view(&x);
    let problem = SoftmaxOptions::default().problem("softmax_attention", &q, &q, &q).unwrap();
    let inputs = QuadraticInputs::new(q, q, q);
    let statistic = View::contiguous(rows.slice_from(0), &DIMS[..3]).unwrap();
    let saved = QuadraticSaved { out: q, statistic, d_out: q, d_statistic: None };
    let run = |saved: &QuadraticSaved<'_>, mut buffers: [Buffer; 3]| {
        let [q, k, v] = buffers.each_mut().map(Buffer::slice_mut);
        quadratic::backward(&problem, &inputs, saved, QuadraticGradients::new(q, k, v))
    };
    run(&saved, gradients(None)).unwrap();
    let names = ["gradient of q", "gradient of k", "gradient of v"];
    for (index, name) in names.into_iter().enumerate() {
        assert_refused(run(&saved, gradients(Some((index, floats(7))))), name, &["7 elements", "120"]);
        assert_refused(run(&saved, gradients(Some((index, doubles(LEN))))), name, &["f64", "f32"]);
    }
    let narrow = View::contiguous(x.slice_from(0), &[2, 3, 5, 3]).unwrap();
    let flat = View::contiguous(rows.slice_from(0), &[ROWS]).unwrap();
    let wide = doubles(ROWS);
    let wide = View::contiguous(wide.slice_from(0), &DIMS[..3]).unwrap();
    let refused = |saved, argument, words: &[&str]| assert_refused(run(&saved, gradients(None)), argument, words);
    refused(QuadraticSaved { out: narrow, ..saved }, "out", &["[2, 3, 5, 3]", "[2, 3, 5, 4]"]);
    refused(QuadraticSaved { d_out: narrow, ..saved }, "d_out", &["[2, 3, 5, 3]"]);
    refused(QuadraticSaved { statistic: flat, ..saved }, "statistic", &["[30]", "[2, 3, 5]"]);
    refused(QuadraticSaved { statistic: wide, ..saved }, "statistic", &["f64", "f32"]);
    refused(QuadraticSaved { d_statistic: Some(flat), ..saved }, "d_statistic", &["[30]", "[2, 3, 5]"]);
}

/// Runs the linear engine forward with room of the given sizes for output, statistic, S and z.
fn linear_forward(
    out: Buffer,
    statistic: Buffer,
    s: Buffer,
    z: Buffer,
    stabilizer: Option<SliceMut<'_>>,
) -> Result<()> {
    let x = input();
    let q = view(&x);
    let problem = LinearOptions::default().problem("linear_attention", &q, &q, &q)?;
    let inputs = LinearInputs { q, k: q, v: q, key_mask: None, log_decay: None, omega: None, state: None };
    let mut buffers = [out, statistic, s, z];
    let [out, statistic, s, z] = buffers.each_mut().map(Buffer::slice_mut);
    let state = Some(StateMut { s, z, stabilizer });
    linear::forward(&problem, &inputs, LinearOutputs { out, statistic: Some(statistic), state })
}

#[test]
fn linear_forward_outputs() {
    let (s, z) = (2 * 3 * 4 * 4, 2 * 3 * 4);
    linear_forward(floats(LEN), floats(ROWS), floats(s), floats(z), None).unwrap();
    let refused = |result, argument, words: &[&str]| assert_refused(result, argument, words);
    refused(linear_forward(floats(1), floats(ROWS), floats(s), floats(z), None), "out", &["1 elements", "120"]);
    refused(linear_forward(doubles(LEN), floats(ROWS), floats(s), floats(z), None), "out", &["f64", "f32"]);
    refused(linear_forward(floats(LEN), floats(3), floats(s), floats(z), None), "statistic", &["3 elements", "30"]);
    refused(linear_forward(floats(LEN), floats(ROWS), floats(2), floats(z), None), "state.s", &["2 elements", "96"]);
    refused(linear_forward(floats(LEN), floats(ROWS), floats(s), doubles(z), None), "state.z", &["f64", "f32"]);
    let mut c = floats(6);
    let stabilizer = Some(c.slice_mut());
    let result = linear_forward(floats(LEN), floats(ROWS), floats(s), floats(z), stabilizer);
    refused(result, "state.stabilizer", &["6 elements", "0 elements"]);
}

#[test]
fn linear_backward() {
    let (x, rows) = (input(), Buffer::filled(DType::F32, ROWS, 0.5));
    let q = view(&x);
    let problem = LinearOptions::default().problem("linear_attention", &q, &q, &q).unwrap();
    let inputs = LinearInputs { q, k: q, v: q, key_mask: None, log_decay: None, omega: None, state: None };
    let statistic = View::contiguous(rows.slice_from(0), &DIMS[..3]).unwrap();
    let saved = LinearSaved { out: q, statistic: Some(statistic), d_out: q, d_state: None };
    let run =
        |inputs: &LinearInputs<'_>, saved: &LinearSaved<'_>, mut buffers: [Buffer; 3], decay: Option<SliceMut<'_>>| {
            let [q, k, v] = buffers.each_mut().map(Buffer::slice_mut);
            linear::backward(&problem, inputs, saved, LinearGradients { q, k, v, log_decay: decay, state: None })
        };
    run(&inputs, &saved, gradients(None), None).unwrap();
    let names = ["gradient of q", "gradient of k", "gradient of v"];
    for (index, name) in names.into_iter().enumerate() {
        let result = run(&inputs, &saved, gradients(Some((index, floats(7)))), None);
        assert_refused(result, name, &["7 elements", "120"]);
    }
    let result = run(&inputs, &LinearSaved { statistic: None, ..saved }, gradients(None), None);
    assert_refused(result, "statistic", &["missing"]);
    let mut decay = floats(30);
    let result = run(&inputs, &saved, gradients(None), Some(decay.slice_mut()));
    assert_refused(result, "gradient of log_decay", &["per token"]);
    let omega = View::contiguous(x.slice_from(0), &[30, 4]).unwrap();
    let with_omega = LinearInputs { omega: Some(omega), ..inputs };
    assert_refused(run(&with_omega, &saved, gradients(None), None), "omega", &["30 directions", "none"]);
    let short = View::contiguous(x.slice_from(0), &[2, 3, 4, 4]).unwrap();
    let other = LinearInputs { k: short, v: short, ..inputs };
    assert_refused(run(&other, &saved, gradients(None), None), "q, k, v", &["keys: 4", "keys: 5"]);
}

/// Strides of 0 make tensors of any size out of one number.
#[test]
fn sizes_that_overflow() {
    let x = [0.5f32];
    let huge = |dims: [usize; 4]| View::new(&x[..], &dims, &[0, 0, 0, 1]).unwrap();
    for dims in [[1 << 33, 1 << 33, 1, 1], [1 << 32, 1, 1 << 32, 1]] {
        let q = huge(dims);
        let forward = || {
            let problem = SoftmaxOptions::default().problem("softmax_attention", &q, &q, &q)?;
            let inputs = QuadraticInputs::new(q, q, q);
            quadratic::forward(&problem, &inputs, floats(0).slice_mut(), None)
        };
        assert!(forward().is_err(), "{dims:?}");
        let forward = || {
            let problem = LinearOptions::default().problem("linear_attention", &q, &q, &q)?;
            let inputs = LinearInputs { q, k: q, v: q, key_mask: None, log_decay: None, omega: None, state: None };
            linear::forward(
                &problem,
                &inputs,
                LinearOutputs { out: floats(0).slice_mut(), statistic: None, state: None },
            )
        };
        assert!(forward().is_err(), "{dims:?}");
    }
}

#[test]
fn errors_are_values() {
    let x = input();
    let q = view(&x);
    let error = SoftmaxOptions { soft_cap: Some(0.0), ..Default::default() }.problem("f", &q, &q, &q).unwrap_err();
    let needs = "a finite number above 0".to_string();
    assert_eq!(error, Error::Value { function: "f", argument: "soft_cap", got: "0".into(), needs });
    fn is_error<E: std::error::Error + Send + Sync + Clone + 'static>(_: &E) {}
    is_error(&error);
}
