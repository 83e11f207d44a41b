//! Plans of many shapes: what devices allow, and kernels that exist.

use super::*;
use crate::problem::{DType, Mask};

fn problem(dtype: DType, weight: Weight, mask: Mask, finish: QuadraticFinish, sizes: [usize; 6]) -> Quadratic {
    let [batch, heads, queries, keys, width, value_width] = sizes;
    let shapes = QuadraticShapes {
        dtype,
        batch,
        heads,
        key_heads: heads,
        queries,
        keys,
        width,
        value_width,
        bias: Some((1, queries.max(keys))),
    };
    Quadratic::new("test", shapes, weight, mask, 0.5, None, finish).unwrap()
}

fn plans(problem: &Quadratic, facts: &DeviceFacts) -> [Plan; 2] {
    let layout = QuadraticLayout { q: [0; 3], k: [0; 3], v: [0; 3], key_mask: None, bias: 0, is_aligned: false };
    let saved = QuadraticSavedLayout {
        out: [0; 3],
        d_out: [0; 3],
        statistic: [0; 3],
        d_statistic: None,
        wide_out: false,
        d_bias: true,
    };
    let outputs = QuadraticOutputs { wide_out: false, statistic: true };
    [plan_forward(problem, &layout, outputs, facts), plan_backward(problem, &layout, &saved, facts)]
}

/// Every name in the instance lists.
fn instances() -> String {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/quadratic");
    let text = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(entry.unwrap().path()).unwrap();
    std::fs::read_dir(folder).unwrap().map(text).collect()
}

#[test]
fn every_device_takes_every_plan() {
    let instances = instances();
    let mut named = std::collections::BTreeSet::new();
    let norm = QuadraticFinish::RmsNorm { epsilon: 1e-6 };
    let kinds = [(Weight::Softmax, QuadraticFinish::None), (Weight::Relu, norm)];
    for facts in [DeviceFacts::RTX_3090, DeviceFacts::A100, DeviceFacts::H200] {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            for (weight, finish) in kinds {
                for widths in [[1, 1], [64, 64], [128, 128], [512, 40], [128, 2048], [3000, 100]] {
                    for [batch, heads, queries, keys] in
                        [[1, 1, 1, 0], [1, 4, 1, 9000], [300, 300, 2, 2], [2, 8, 999, 999]]
                    {
                        let sizes = [batch, heads, queries, keys, widths[0], widths[1]];
                        let problem = problem(dtype, weight, Mask::Causal, finish, sizes);
                        for plan in plans(&problem, &facts) {
                            plan.check(&facts).unwrap();
                            named.extend(plan.launches.into_iter().map(|launch| launch.kernel));
                        }
                    }
                }
            }
        }
    }
    for kernel in &named {
        assert!(instances.contains(&format!("ATTN_KERNEL({kernel},")), "no {kernel}");
    }
    assert_eq!(named.len(), instances.matches("ATTN_KERNEL(").count(), "kernels without a plan");
}

#[test]
fn keys_are_divided_when_blocks_are_few() {
    let forward = |sizes| {
        let problem = problem(DType::BF16, Weight::Softmax, Mask::Causal, QuadraticFinish::None, sizes);
        let [forward, _] = plans(&problem, &DeviceFacts::H200);
        forward.launches.iter().map(|launch| launch.grid).collect::<Vec<_>>()
    };
    // Decoding: 8192 keys are 128 tiles, four of which are the least that a part has.
    assert_eq!(forward([1, 4, 1, 8192, 64, 64]), [[4, 1, 32], [1, 1, 1]]);
    assert_eq!(forward([4, 32, 2048, 2048, 128, 128]), [[4096, 1, 1]]);
    assert_eq!(forward([1, 1, 1, 64, 64, 64]), [[1, 1, 1]]);
}

#[test]
fn gradients_of_a_long_bias_take_turns() {
    let problem =
        problem(DType::F32, Weight::Softmax, Mask::Full, QuadraticFinish::None, [1, 4, 40_000, 40_000, 64, 64]);
    let [_, backward] = plans(&problem, &DeviceFacts::H200);
    let turns: Vec<_> = backward.launches.iter().filter(|launch| launch.kernel.contains("queries")).collect();
    assert!(turns.len() > 1);
    assert_eq!(turns.iter().map(|launch| launch.grid[0]).sum::<u32>(), 4 * 625);
    assert!(backward.workspaces.iter().all(|&bytes| bytes <= BIAS_BYTES));
}
