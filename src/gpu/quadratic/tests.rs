//! Plans of many shapes: what devices allow, and kernels that exist.

use super::*;
use crate::problem::{DType, Dropout, Mask, PairTerm};

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
        attention_bias: None,
        sinks: None,
        sequences: None,
    };
    Quadratic::new("test", shapes, weight, mask, 0.5, None, finish).unwrap()
}

fn plans(problem: &Quadratic, facts: &DeviceFacts) -> [Plan; 2] {
    let key_mask = (problem.per_key != PerKey::Nothing).then_some(0);
    let layout = QuadraticLayout { q: [0; 3], k: [0; 3], v: [0; 3], key_mask, bias: 0, is_aligned: false };
    let saved = QuadraticSavedLayout {
        out: [0; 3],
        d_out: [0; 3],
        statistic: [0; 3],
        d_statistic: None,
        wide_out: false,
        d_bias: true,
        is_aligned: false,
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
    for dtype in [DType::F16, DType::BF16] {
        let softmax = [(Mask::Full, 64), (Mask::Full, 128), (Mask::Causal, 128), (Mask::Causal, 256)];
        let softmax = softmax.map(|(mask, width)| plain(dtype, mask, width));
        for problem in [softmax.as_slice(), &[rectified(dtype, 128, 1024), rectified(dtype, 64, 128)]].concat() {
            for plan in [aligned_plan(&problem, &DeviceFacts::H200), aligned_gradients(&problem, |_| {})] {
                plan.check(&DeviceFacts::H200).unwrap();
                named.extend(plan.launches.into_iter().map(|launch| launch.kernel));
            }
        }
    }
    let counted = problem(DType::F32, Weight::ReluSquared, Mask::Full, QuadraticFinish::None, [2, 1, 9, 9, 8, 8]);
    for plan in plans(&counted.per_key(PerKey::Scores), &DeviceFacts::H200) {
        plan.check(&DeviceFacts::H200).unwrap();
        named.extend(plan.launches.into_iter().map(|launch| launch.kernel));
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

/// Softmax without extras, 8 batch entries, 4 query heads and 2 key heads of 1000 rows.
fn plain(dtype: DType, mask: Mask, width: usize) -> Quadratic {
    let sizes = [8, 4, 1000, 1000, width, width];
    let with_bias = problem(dtype, Weight::Softmax, mask, QuadraticFinish::None, sizes);
    let shapes = QuadraticShapes { bias: None, key_heads: 2, ..with_bias.shapes };
    Quadratic::new("test", shapes, Weight::Softmax, mask, 0.5, None, QuadraticFinish::None).unwrap()
}

fn contiguous(problem: &Quadratic) -> QuadraticLayout {
    let shapes = &problem.shapes;
    let strides = |heads: usize, rows: usize, width: usize| {
        [heads * rows * width, rows * width, width].map(|stride| stride as i64)
    };
    QuadraticLayout {
        q: strides(shapes.heads, shapes.queries, shapes.width),
        k: strides(shapes.key_heads, shapes.keys, shapes.width),
        v: strides(shapes.key_heads, shapes.keys, shapes.value_width),
        key_mask: None,
        bias: 0,
        is_aligned: true,
    }
}

fn aligned_plan(problem: &Quadratic, facts: &DeviceFacts) -> Plan {
    let outputs = QuadraticOutputs { wide_out: false, statistic: true };
    plan_forward(problem, &contiguous(problem), outputs, facts)
}

#[test]
fn warpgroups_take_what_they_are_for() {
    let problem = plain(DType::BF16, Mask::Full, 128);
    let first = |plan: Plan| plan.launches[0].kernel.clone();
    let on = |problem: &Quadratic, facts| first(aligned_plan(problem, facts));
    let with = |change: fn(&mut QuadraticLayout)| {
        let mut layout = contiguous(&problem);
        change(&mut layout);
        first(plan_forward(&problem, &layout, QuadraticOutputs::default(), &DeviceFacts::H200))
    };
    let (twin, portable) = ("quadratic_forward_sm90_bf16_128_176", "quadratic_forward_softmax_bf16_128");
    assert_eq!(on(&problem, &DeviceFacts::H200), twin);
    assert_eq!(on(&problem, &DeviceFacts::A100), portable);
    assert_eq!(with(|layout| layout.q = [1 << 30, 128, 512]), twin);
    assert_eq!(with(|layout| layout.is_aligned = false), portable);
    assert_eq!(with(|layout| layout.k[2] += 4), portable);
    assert_eq!(with(|layout| layout.v[1] = 0), portable);
    assert_eq!(with(|layout| layout.key_mask = Some(1000)), portable);
    let mut negative = problem;
    negative.scale = -0.5;
    assert_eq!(on(&negative, &DeviceFacts::H200), portable);
    assert_eq!(on(&plain(DType::F32, Mask::Full, 128), &DeviceFacts::H200), "quadratic_forward_softmax_f32_64");
    assert_eq!(on(&plain(DType::BF16, Mask::Full, 264), &DeviceFacts::H200), portable);
}

/// relu² without extras, one head for two of queries.
fn rectified(dtype: DType, width: usize, value_width: usize) -> Quadratic {
    let problem = plain(dtype, Mask::Causal, width);
    let shapes = QuadraticShapes { value_width, ..problem.shapes };
    Quadratic { shapes, weight: Weight::ReluSquared, scale: -0.5, ..problem }
}

#[test]
fn rectified_weights_have_tiles_of_values() {
    let on = |problem: &Quadratic| aligned_plan(problem, &DeviceFacts::H200).launches[0].kernel.clone();
    let (twin, portable) = ("quadratic_forward_sm90_relu_bf16_128_80", "quadratic_forward_relu_bf16_64");
    assert_eq!(on(&rectified(DType::BF16, 64, 64)), twin);
    assert_eq!(on(&rectified(DType::BF16, 128, 2048)), twin);
    assert_eq!(on(&rectified(DType::BF16, 136, 64)), portable);
    let finish = QuadraticFinish::RmsNorm { epsilon: 1e-6 };
    assert_eq!(on(&Quadratic { finish, ..rectified(DType::BF16, 128, 256) }), twin);
    assert_eq!(on(&Quadratic { finish, ..rectified(DType::BF16, 128, 264) }), portable);
}

#[test]
fn warpgroups_divide_keys() {
    let problem = plain(DType::BF16, Mask::Causal, 128);
    let launches = |problem: &Quadratic, wide_out| {
        let outputs = QuadraticOutputs { wide_out, statistic: true };
        let plan = plan_forward(problem, &contiguous(problem), outputs, &DeviceFacts::H200);
        plan.check(&DeviceFacts::H200).unwrap();
        plan.launches.into_iter().map(|launch| (launch.kernel, launch.grid)).collect::<Vec<_>>()
    };
    let expected = |grid, rows| {
        let kernels = ["quadratic_forward_sm90_bf16_128_128", "quadratic_combine_bf16"];
        kernels.map(String::from).into_iter().zip([grid, [rows, 1, 1]]).collect::<Vec<_>>()
    };
    assert_eq!(launches(&problem, true), expected([132, 1, 1], 8000));
    let shapes = QuadraticShapes { batch: 1, queries: 300, keys: 9000, ..problem.shapes };
    assert_eq!(launches(&Quadratic { shapes, ..problem }, false), expected([12, 1, 11], 300));
}

#[test]
fn query_heads_become_rows() {
    let grids = |mask, queries, change: fn(&mut QuadraticLayout)| {
        let problem = plain(DType::F16, mask, 128);
        let shapes = QuadraticShapes { batch: 1, queries, keys: 9000, ..problem.shapes };
        let problem = Quadratic { shapes, mask, ..problem };
        let mut layout = contiguous(&problem);
        change(&mut layout);
        let plan = plan_forward(&problem, &layout, QuadraticOutputs::default(), &DeviceFacts::H200);
        plan.launches[0].grid
    };
    // Four query heads, two key heads.
    assert_eq!(grids(Mask::Causal, 1, |_| {})[0], 2);
    assert_eq!(grids(Mask::Causal, 1, |layout| layout.q[1] = 1 << 20)[0], 2);
    assert_eq!(grids(Mask::Causal, 2, |_| {})[0], 4);
    assert_eq!(grids(Mask::Window { left: Some(8000), right: None }, 1, |_| {})[0], 4);
    assert_eq!(grids(Mask::Full, 64, |_| {})[0], 2);
    assert_eq!(grids(Mask::Full, 65, |_| {})[0], 4);
    assert_eq!(grids(Mask::Full, 64, |layout| layout.q = [0, 128, 512])[0], 4);
}

/// On an H200.
fn aligned_gradients(problem: &Quadratic, change: fn(&mut QuadraticSavedLayout)) -> Plan {
    let shapes = &problem.shapes;
    let mut saved = QuadraticSavedLayout {
        out: row_major(shapes, shapes.value_width),
        d_out: row_major(shapes, shapes.value_width),
        statistic: row_major(shapes, 1),
        d_statistic: None,
        wide_out: false,
        d_bias: false,
        is_aligned: true,
    };
    change(&mut saved);
    plan_backward(problem, &contiguous(problem), &saved, &DeviceFacts::H200)
}

#[test]
fn warpgroups_take_gradients() {
    let names = |plan: Plan| plan.launches.into_iter().map(|launch| launch.kernel).collect::<Vec<_>>();
    let of = |width, change| names(aligned_gradients(&plain(DType::F16, Mask::Causal, width), change));
    let all = |keys, queries| ["prepare_f16", keys, queries].map(|name| format!("quadratic_{name}"));
    let twins = all("keys_sm90_f16_64_112", "queries_sm90_f16_64_96");
    let portable = all("keys_softmax_f16_64", "queries_softmax_f16_64");
    assert_eq!(of(64, |_| {}), twins);
    assert_eq!(of(64, |saved| saved.is_aligned = false), portable);
    assert_eq!(of(64, |saved| saved.d_out = [0; 3]), portable);
    assert_eq!(of(64, |saved| saved.wide_out = true), portable);
    assert_eq!(of(256, |_| {}), all("keys_sm90_f16_256_64", "queries_sm90_f16_256_48"));
    assert_eq!(of(264, |_| {}), all("keys_softmax_f16_128", "queries_softmax_f16_128"));
    let rectified = |dtype, width| names(aligned_gradients(&rectified(dtype, 128, width), |_| {}))[1].clone();
    assert_eq!(rectified(DType::BF16, 128), "quadratic_keys_sm90_relu_bf16_128_64");
    assert_eq!(rectified(DType::F16, 128), "quadratic_keys_relu_f16_64");
    assert_eq!(rectified(DType::BF16, 136), "quadratic_keys_relu_bf16_64");
}

#[test]
fn plans_say_what_is_copied() {
    let plan = aligned_plan(&plain(DType::BF16, Mask::Causal, 128), &DeviceFacts::H200).to_string();
    assert!(
        plan.starts_with("quadratic_forward_sm90_bf16_128_128<<<132×1×1, 384, 163968 bytes>>> QuadraticMappedParams")
    );
    let k = "k_map: K bf16 [128, 1000, 2, 8] by [256, 256000, 512000] bytes in boxes of [64, 128, 1, 1], swizzled";
    assert!(plan.contains(k), "{plan}");
}

#[test]
fn sections_of_heads_fit_in_the_cache() {
    let section = |plan: Plan, launch: usize| {
        let printed = plan.launches[launch].to_string();
        let (_, number) = printed.rsplit_once("section: ").unwrap();
        number.trim_end_matches(" }").parse::<usize>().unwrap()
    };
    let of = |keys, queries| {
        let mut problem = plain(DType::BF16, Mask::Causal, 128);
        (problem.shapes.keys, problem.shapes.queries) = (keys, queries);
        let forward = section(aligned_plan(&problem, &DeviceFacts::H200), 0);
        let backward = || aligned_gradients(&problem, |_| {});
        [forward, section(backward(), 1), section(backward(), 2)]
    };
    // Keys and values of 8192 positions are 4 MiB, queries of both heads of a group 8 MiB.
    assert_eq!(of(8192, 8192), [16, 4, 16]);
    assert_eq!(of(1000, 1000), [32, 16, 32]);
    assert_eq!(of(1 << 16, 512), [2, 16, 2]);
}

#[test]
fn what_kernels_do_not_have_is_refused() {
    let sizes = [1, 2, 9, 9, 8, 8];
    let plain = problem(DType::F32, Weight::Softmax, Mask::Causal, QuadraticFinish::None, sizes);
    plain.ensure_on_gpu().unwrap();
    let refused = |problem: Quadratic| problem.ensure_on_gpu().unwrap_err().to_string();
    let shapes = || plain.shapes.clone();
    let term = PairTerm { dims: [1, 1, 1, 1], dtype: DType::F32 };
    for (problem, argument) in [
        (
            Quadratic { shapes: QuadraticShapes { attention_bias: Some(term), ..shapes() }, ..plain.clone() },
            "attention_bias",
        ),
        (Quadratic { shapes: QuadraticShapes { sinks: Some(DType::F32), ..shapes() }, ..plain.clone() }, "sinks"),
        (plain.clone().with_dropout(Some(Dropout { p: 0.1, seed: 1 })).unwrap(), "dropout"),
        (Quadratic { mask: Mask::Prefix { len: 3 }, ..plain.clone() }, "mask"),
        (Quadratic { mask: Mask::Streaming { sinks: 1, left: 2 }, ..plain.clone() }, "mask"),
        (Quadratic { mask: Mask::Strided { left: 1, stride: 2 }, ..plain.clone() }, "mask"),
        (Quadratic { mask: Mask::Fixed { size: 4, summary: 2 }, ..plain.clone() }, "mask"),
        (Quadratic { mask: Mask::Dilated { left: 1, right: 1, dilation: 2 }, ..plain.clone() }, "mask"),
    ] {
        let message = refused(problem);
        assert!(message.contains(&format!("argument `{argument}`")) && message.contains("on a GPU"), "{message}");
    }
}
