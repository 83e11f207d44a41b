//! The operator LinearAttention of ONNX, as ONNX Runtime and the reference evaluator of onnx compute it; their results are
//! recorded by benches/peers/linear_attention_values.py.

use attn_kernels::DeltaOptions;
use attn_kernels::cpu::{self, delta, gated_linear};
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::problem::{StateShapes, View};
use safetensors::SafeTensors;

use super::paths;

const SCALE: f64 = 0.4;

struct Tensor {
    data: Vec<f32>,
    dims: Vec<usize>,
}

impl Tensor {
    fn new(file: &SafeTensors<'_>, name: &str) -> Self {
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let data = tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        Self { data, dims: tensor.shape().to_vec() }
    }

    fn view(&self) -> View<'_> {
        View::contiguous(&self.data[..], &self.dims).unwrap()
    }
}

fn assert_near(what: &str, got: &[f32], expected: &Tensor) {
    assert_eq!(got.len(), expected.data.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let far = norm(&mut got.iter().zip(&expected.data).map(|(x, y)| x - y)) / norm(&mut expected.data.iter().copied());
    assert!(far <= 1e-5, "{what}: {far:e}");
}

/// Output and last state by the engine that has the rule.
fn run(file: &SafeTensors<'_>, rule: &str, decay: &str) -> (Vec<f32>, Vec<f32>) {
    let tensor = |name: &str| Tensor::new(file, name);
    let [q, k, v, state, beta] = ["q", "k", "v", "state", "beta"].map(tensor);
    let log_decay = (decay != "none").then(|| tensor(&format!("decay.{decay}")));
    let log_decay = log_decay.as_ref().map(Tensor::view);
    let options = DeltaOptions { log_decay, scale: Some(SCALE), ..Default::default() };
    let (state, operands) = (&state.data[..], [q.view(), k.view(), v.view()]);
    let [q, k, v] = operands;
    match (rule, decay) {
        ("linear", _) | ("gated", "token") => {
            let map = FeatureMap::Identity;
            let options = LinearOptions { causal: true, map, normalizer: None, log_decay, ..Default::default() };
            let shapes = StateShapes { s: [2, 2, 8, 6], z: [2, 2, 8], stabilizer: None };
            let (s, z) = (state.to_vec(), vec![0.0; 2 * 2 * 8]);
            let given = cpu::LinearState { s, z, stabilizer: None, position: 0, shapes };
            let (attention, last) = cpu::linear_with_state::<f32>(q, k, v, &options, Some(&given)).unwrap();
            (attention.out.iter().map(|x| SCALE as f32 * x).collect(), last.s)
        }
        ("gated", _) => {
            let attention = gated_linear::<f32>(q, k, v, &options, Some(state)).unwrap();
            (attention.out, attention.state)
        }
        _ => {
            let attention = delta::<f32>(q, k, v, beta.view(), &options, Some(state)).unwrap();
            (attention.out, attention.state)
        }
    }
}

#[test]
fn linear_attention_of_onnx() {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/onnx_linear_attention.safetensors"));
    let bytes = bytes.unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let cases = [
        ("linear", "none"),
        ("gated", "token"),
        ("gated", "channel"),
        ("delta", "none"),
        ("gated_delta", "token"),
        ("gated_delta", "channel"),
    ];
    for (rule, decay) in cases {
        for isa in paths() {
            let (out, state) = isa.force(|| run(&file, rule, decay)).expect("an available path");
            for source in ["runtime", "evaluator"] {
                let name = format!("{source}.{rule}.{decay}");
                assert_near(&format!("{isa:?} {name}.out"), &out, &Tensor::new(&file, &format!("{name}.out")));
                assert_near(&format!("{isa:?} {name}.state"), &state, &Tensor::new(&file, &format!("{name}.state")));
            }
        }
    }
}
