use super::*;
use crate::gau::GlobalNorm;
use crate::linear::FeatureMap;
use crate::performer::FavorMap;
use crate::problem::{DType, Operand};

/// Sizes without elements.
struct Shape(Vec<usize>, DType);

impl Operand for Shape {
    fn dims(&self) -> &[usize] {
        &self.0
    }

    fn dtype(&self) -> DType {
        self.1
    }
}

/// Batch, heads, positions, width and value width.
fn problem(sizes: [usize; 5], dtype: DType, map: Map, scan: Scan, finish: LinearFinish) -> Linear {
    grouped(sizes, sizes[1], dtype, map, scan, finish)
}

/// The same with fewer heads of keys and values.
fn grouped(sizes: [usize; 5], key_heads: usize, dtype: DType, map: Map, scan: Scan, finish: LinearFinish) -> Linear {
    let [batch, heads, positions, width, value_width] = sizes;
    let rows = |heads, width| Shape(vec![batch, heads, positions, width], dtype);
    let [q, k, v] = [rows(heads, width), rows(key_heads, width), rows(key_heads, value_width)];
    let shapes = LinearShapes::new("test", scan, [&q, &k, &v], None, None, None).unwrap();
    Linear::new("test", shapes, map, scan, finish).unwrap()
}

const NORMALIZE: LinearFinish = LinearFinish::Normalize { epsilon: 1e-6 };
const ELU: Map = Map::Plain(FeatureMap::EluPlusOne);
const FAVOR: Map = Map::Favor { map: FavorMap::Positive, directions: 256 };
const LAYOUT: LinearLayout = LinearLayout {
    q: [0; 3],
    k: [0; 3],
    v: [0; 3],
    key_mask: None,
    log_decay: [0; 3],
    omega: 0,
    state: None,
    is_aligned: false,
};
const SAVED: SavedLayout = SavedLayout {
    out: [0; 3],
    d_out: [0; 3],
    statistic: [0; 3],
    wide_out: false,
    d_log_decay: false,
    is_aligned: false,
};

fn forward(problem: &Linear, facts: &DeviceFacts) -> Plan {
    plan_forward(problem, &LAYOUT, ForwardOutputs { statistic: true, state: true, wide_out: false }, facts)
}

/// Kernels and numbers of blocks.
fn launches(plan: &Plan) -> Vec<(&str, u32)> {
    plan.launches.iter().map(|launch| (launch.kernel.as_str(), launch.grid[0])).collect()
}

#[test]
fn many_heads_take_one_launch() {
    let problem = problem([4, 64, 4096, 64, 64], DType::BF16, ELU, Scan::Causal, NORMALIZE);
    let plan = forward(&problem, &DeviceFacts::H200);
    assert_eq!(launches(&plan), [("linear_outputs_bf16", 256)]);
    assert!(plan.workspaces.is_empty(), "{plan}");
    let backward = plan_backward(&problem, &LAYOUT, &SAVED, &DeviceFacts::H200);
    let expected = [("linear_deltas_bf16", 1 << 18), ("linear_queries_bf16", 256), ("linear_keys_bf16", 256)];
    assert_eq!(launches(&backward), expected);
}

#[test]
fn few_heads_are_cut_into_segments() {
    let problem = problem([1, 8, 8192, 64, 64], DType::F16, ELU, Scan::Causal, NORMALIZE);
    let plan = forward(&problem, &DeviceFacts::H200);
    let expected = [("linear_states_f16", 256), ("linear_scan_f16", 8 * 33), ("linear_outputs_f16", 256)];
    assert_eq!(launches(&plan), expected);
    // One sum per segment, not one per tile.
    assert_eq!(plan.workspaces[0], 8 * 33 * 64 * 64 * 4);
}

#[test]
fn one_token_takes_one_launch() {
    let plan = |[batch, heads, value_width]: [usize; 3], map, finish| {
        let problem = problem([batch, heads, 1, 128, value_width], DType::BF16, map, Scan::Causal, finish);
        forward(&problem, &DeviceFacts::H200)
    };
    let rms = |scope| LinearFinish::RmsNorm { epsilon: 1e-6, scope };
    // Narrow blocks for few heads.
    assert_eq!(launches(&plan([1, 16, 128], ELU, NORMALIZE)), [("linear_step_bf16", 64)]);
    assert_eq!(launches(&plan([32, 64, 128], ELU, NORMALIZE)), [("linear_step_bf16", 2048)]);
    // Nothing is prepared for FAVOR+, and a row's norm needs the row.
    assert_eq!(launches(&plan([1, 16, 100], FAVOR, rms(NormScope::Head))), [("linear_step_bf16", 16)]);
    let joint = plan([1, 16, 128], ELU, rms(NormScope::AllHeads));
    assert_eq!(launches(&joint), [("linear_step_bf16", 64), ("linear_normalize_bf16", 1)]);
    let many_features =
        problem([1, 16, 1, 256, 64], DType::F64, Map::Plain(FeatureMap::Taylor), Scan::Causal, NORMALIZE);
    assert_eq!(forward(&many_features, &DeviceFacts::H200).launches[0].kernel, "linear_outputs_spilled_f64");
}

#[test]
fn chunks_end_segments() {
    let scan = Scan::ChunkExclusive { chunk: 100 };
    let mut planner_problem = problem([1, 1, 5000, 8, 8], DType::F32, ELU, scan, LinearFinish::None);
    planner_problem.finish = LinearFinish::ChunkNorm { norm: GlobalNorm::Mean, chunk: 100 };
    let mut planner = Planner::new(&planner_problem, &LAYOUT, &DeviceFacts::H200);
    planner.cut(1);
    assert_eq!((planner.params.segment_length, planner.params.segments), (300, 17));
}

#[test]
fn nothing_to_do() {
    let empty = problem([0, 2, 5, 8, 8], DType::F32, ELU, Scan::Causal, NORMALIZE);
    assert!(forward(&empty, &DeviceFacts::H200).launches.is_empty());
    // The state is still handed on.
    let no_token = problem([1, 2, 0, 8, 8], DType::F32, ELU, Scan::Causal, NORMALIZE);
    assert_eq!(launches(&forward(&no_token, &DeviceFacts::H200)), [("linear_outputs_f32", 2)]);
    assert!(plan_backward(&no_token, &LAYOUT, &SAVED, &DeviceFacts::H200).launches.is_empty());
}

/// What does not fit in shared memory lies elsewhere; every device takes every plan.
#[test]
fn any_size_fits() {
    let rms = |scope| LinearFinish::RmsNorm { epsilon: 1e-6, scope };
    let taylor = Map::Plain(FeatureMap::Taylor);
    for facts in [DeviceFacts::A100, DeviceFacts::RTX_3090, DeviceFacts::H200] {
        for dtype in [DType::F64, DType::BF16] {
            for (map, width, value_width) in [(ELU, 512, 2048), (taylor, 64, 128), (FAVOR, 64, 64), (ELU, 1, 1)] {
                for finish in [NORMALIZE, rms(NormScope::Head), rms(NormScope::AllHeads)] {
                    for scan in [Scan::Causal, Scan::Full] {
                        let problem = problem([1, 2, 3000, width, value_width], dtype, map, scan, finish);
                        let plans = [forward(&problem, &facts), plan_backward(&problem, &LAYOUT, &SAVED, &facts)];
                        plans.iter().for_each(|plan| assert_eq!(plan.check(&facts), Ok(()), "{plan}"));
                    }
                }
            }
        }
    }
}

/// The usual head sizes leave room for two blocks, and spill nothing.
#[test]
fn usual_sizes_stay_in_shared_memory() {
    let problem = problem([4, 64, 4096, 128, 128], DType::BF16, ELU, Scan::Causal, NORMALIZE);
    let plan = forward(&problem, &DeviceFacts::H200);
    assert!(plan.launches[0].shared_bytes <= 113 * 1024, "{plan}");
    let backward = plan_backward(&problem, &LAYOUT, &SAVED, &DeviceFacts::H200);
    // Nothing but the row products of outputs and their gradients.
    assert_eq!(backward.workspaces, [4 * 64 * 4096 * 4]);
}

/// Strides of contiguous operands, as the copy engine has them.
fn contiguous(problem: &Linear) -> LinearLayout {
    let shapes = &problem.shapes;
    let strides = |heads: usize, rows: usize, width: usize| [heads * rows * width, rows * width, width].map(to_i64);
    LinearLayout {
        q: strides(shapes.query_heads, shapes.queries, shapes.width),
        k: strides(shapes.key_heads, shapes.keys, shapes.width),
        v: strides(shapes.value_heads, shapes.keys, shapes.value_width),
        is_aligned: true,
        ..LAYOUT
    }
}

#[test]
fn warpgroups_take_what_they_can() {
    let rms = LinearFinish::RmsNorm { epsilon: 1e-6, scope: NormScope::Head };
    let outputs = |state| ForwardOutputs { statistic: true, state, wide_out: false };
    let plan = |sizes, dtype, map, finish| {
        let problem = problem(sizes, dtype, map, Scan::Causal, finish);
        plan_forward(&problem, &contiguous(&problem), outputs(false), &DeviceFacts::H200)
    };
    let identity = Map::Plain(FeatureMap::Identity);
    let one = plan([4, 32, 4096, 128, 128], DType::BF16, ELU, NORMALIZE);
    assert_eq!(launches(&one), [("linear_outputs_sm90_bf16_128_128", 128),]);
    assert!(one.to_string().contains("linear_outputs_sm90_bf16_128_128<<<"), "{one}");
    let many = plan([2, 16, 16384, 128, 128], DType::BF16, identity, LinearFinish::None);
    let expected = [
        ("linear_states_sm90_bf16_128_128", 128),
        ("linear_scan_bf16", 32 * 129),
        ("linear_outputs_sm90_bf16_128_128", 128),
    ];
    assert_eq!(launches(&many), expected);
    let wide = plan([8, 32, 2048, 64, 200], DType::F16, ELU, rms);
    let kernels: Vec<_> = launches(&wide).into_iter().map(|(kernel, _)| kernel).collect();
    assert_eq!(kernels, ["linear_outputs_sm90_f16_64_128", "linear_normalize_f16"]);
    let widest = plan([8, 32, 2048, 256, 256], DType::BF16, identity, LinearFinish::None);
    assert_eq!(launches(&widest), [("linear_outputs_sm90_bf16_256_64", 1024)]);
    for (sizes, dtype, map) in [
        ([8, 32, 2048, 264, 64], DType::BF16, ELU),
        ([8, 32, 2048, 60, 64], DType::BF16, ELU),
        ([8, 32, 2048, 64, 64], DType::F32, ELU),
        ([8, 32, 2048, 72, 64], DType::BF16, FAVOR),
        ([8, 32, 2048, 64, 64], DType::F16, Map::Plain(FeatureMap::Exp)),
        ([8, 32, 1, 64, 64], DType::BF16, ELU),
    ] {
        let plan = plan(sizes, dtype, map, NORMALIZE);
        assert!(launches(&plan).iter().all(|(kernel, _)| !kernel.contains("sm90")), "{plan}");
    }
}

#[test]
fn warpgroups_take_favor_features() {
    let plan = |sizes, dtype, map, scan, state| {
        let problem = problem(sizes, dtype, map, scan, NORMALIZE);
        let outputs = ForwardOutputs { statistic: true, state, wide_out: false };
        plan_forward(&problem, &contiguous(&problem), outputs, &DeviceFacts::H200)
    };
    let favor = |map, directions| Map::Favor { map, directions };
    let (bf16, f16) = (DType::BF16, DType::F16);
    let one = plan([4, 64, 4096, 64, 64], bf16, FAVOR, Scan::Causal, false);
    assert_eq!(launches(&one), [("linear_favor_outputs_sm90_bf16_64_256", 256)]);
    assert!(one.workspaces.is_empty(), "{one}");
    // Two tiles of values, and as many segments as there is room for.
    let many = plan([1, 8, 8192, 64, 128], f16, favor(FavorMap::Hyperbolic, 64), Scan::Causal, true);
    let expected = [
        ("linear_favor_states_sm90_f16_64_128", 128),
        ("linear_scan_f16", 8 * 129),
        ("linear_favor_outputs_sm90_f16_64_128", 128),
    ];
    assert_eq!(launches(&many), expected);
    let full = plan([4, 64, 4096, 64, 64], bf16, FAVOR, Scan::Full, false);
    let kernels: Vec<_> = launches(&full).into_iter().map(|(kernel, _)| kernel).collect();
    assert_eq!(
        kernels,
        ["linear_favor_states_sm90_bf16_64_256", "linear_scan_bf16", "linear_favor_full_sm90_bf16_64_256"]
    );
    // The third terms of ω, for a state as exact as f32, still fit.
    let exact = plan([4, 64, 4096, 64, 64], bf16, FAVOR, Scan::Causal, true);
    let bytes = |plan: &Plan| plan.launches[0].shared_bytes;
    assert!(bytes(&exact) > bytes(&one) && exact.check(&DeviceFacts::H200).is_ok(), "{exact}");
    for (map, width) in [(favor(FavorMap::Hyperbolic, 129), 64), (FAVOR, 128)] {
        let plan = plan([4, 64, 4096, width, 64], bf16, map, Scan::Causal, false);
        assert!(launches(&plan).iter().all(|(kernel, _)| !kernel.contains("sm90")), "{plan}");
    }
}

/// Each query head has a state of its own, unless somebody sees it.
#[test]
fn warpgroups_take_grouped_heads() {
    let problem = grouped([2, 64, 4096, 128, 128], 8, DType::BF16, ELU, Scan::Causal, NORMALIZE);
    let plan = |state, layout: &LinearLayout| {
        let outputs = ForwardOutputs { state, ..ForwardOutputs::default() };
        plan_forward(&problem, layout, outputs, &DeviceFacts::H200)
    };
    let layout = contiguous(&problem);
    assert_eq!(launches(&plan(false, &layout)), [("linear_outputs_sm90_bf16_128_128", 128)]);
    let entering = StateLayout { s: [0; 3], z: [0; 2], stabilizer: [0; 2], position: 0 };
    for plan in [plan(true, &layout), plan(false, &LinearLayout { state: Some(entering), ..layout })] {
        assert!(launches(&plan).iter().all(|(kernel, _)| !kernel.contains("sm90")), "{plan}");
    }
}

#[test]
fn warpgroups_read_without_scores() {
    let plan = |sizes, map, scan, finish| {
        let problem = problem(sizes, DType::BF16, map, scan, finish);
        plan_forward(&problem, &contiguous(&problem), ForwardOutputs::default(), &DeviceFacts::H200)
    };
    let identity = Map::Plain(FeatureMap::Identity);
    // The sums of all keys come first, though there is no more than a segment.
    let full = plan([4, 64, 4096, 128, 128], ELU, Scan::Full, NORMALIZE);
    let expected = [
        ("linear_states_sm90_bf16_128_128", 256),
        ("linear_scan_bf16", 256 * 129),
        ("linear_full_sm90_bf16_128_128", 256),
    ];
    assert_eq!(launches(&full), expected);
    let chunks = |chunk, width, map| {
        let finish = LinearFinish::ChunkNorm { norm: GlobalNorm::Mean, chunk };
        plan([8, 1, 8192, width, 1536], map, Scan::ChunkExclusive { chunk }, finish)
    };
    assert_eq!(launches(&chunks(256, 128, identity)), [("linear_exclusive_sm90_bf16_128_128", 8 * 12)]);
    for plan in [chunks(100, 128, identity), chunks(256, 136, identity), chunks(256, 128, ELU)] {
        assert!(launches(&plan).iter().all(|(kernel, _)| !kernel.contains("sm90")), "{plan}");
    }
}

#[test]
fn warpgroups_take_gradients() {
    let rms = |scope| LinearFinish::RmsNorm { epsilon: 1e-6, scope };
    let identity = Map::Plain(FeatureMap::Identity);
    let plan = |sizes: [usize; 5], dtype, map, finish, change: fn(&mut SavedLayout)| {
        let problem = problem(sizes, dtype, map, Scan::Causal, finish);
        let [_, heads, rows, _, width] = sizes;
        let d_out = [heads * rows * width, rows * width, width].map(to_i64);
        let mut saved = SavedLayout { out: d_out, d_out, is_aligned: true, ..SAVED };
        change(&mut saved);
        let plan = plan_backward(&problem, &contiguous(&problem), &saved, &DeviceFacts::H200);
        assert_eq!(plan.check(&DeviceFacts::H200), Ok(()), "{plan}");
        launches(&plan).into_iter().map(|(kernel, blocks)| (kernel.to_string(), blocks)).collect::<Vec<_>>()
    };
    let expected = |launches: &[(&str, u32)]| {
        launches.iter().map(|&(kernel, blocks)| (kernel.to_string(), blocks)).collect::<Vec<_>>()
    };
    let usual = |change| plan([4, 32, 4096, 128, 128], DType::BF16, ELU, NORMALIZE, change);
    assert_eq!(
        usual(|_| ()),
        expected(&[
            ("linear_deltas_bf16", 1 << 17),
            ("linear_queries_sm90_bf16_128", 128),
            ("linear_keys_sm90_bf16_128", 256)
        ])
    );
    assert_eq!(
        plan([1, 8, 8192, 64, 64], DType::F16, identity, LinearFinish::None, |_| ()),
        expected(&[
            ("linear_states_sm90_f16_64_64", 256),
            ("linear_scan_f16", 8 * 33),
            ("linear_queries_sm90_f16_64", 256),
            ("linear_d_states_sm90_f16_64", 256),
            ("linear_d_scan_f16", 8 * 33),
            ("linear_keys_sm90_f16_64", 512)
        ])
    );
    // Features in four blocks, and values in three.
    assert_eq!(
        plan([8, 32, 2048, 256, 192], DType::BF16, ELU, rms(NormScope::Head), |saved| saved.is_aligned = false),
        expected(&[
            ("linear_unfinish_bf16", 1 << 17),
            ("linear_queries_sm90_bf16_256", 1024),
            ("linear_keys_sm90_bf16_256", 7 * 256)
        ])
    );
    let joint = plan([8, 32, 2048, 64, 128], DType::F16, ELU, rms(NormScope::AllHeads), |_| ());
    let kernels: Vec<_> = joint.iter().map(|(kernel, _)| kernel.as_str()).collect();
    let norm = ["linear_deltas_f16", "linear_unfinish_f16"];
    assert_eq!(kernels, [norm, ["linear_queries_sm90_f16_128", "linear_keys_sm90_f16_128"]].concat());
    let is_portable = |launches: Vec<(String, u32)>| launches.iter().all(|(kernel, _)| !kernel.contains("sm90"));
    assert!(is_portable(usual(|saved| saved.wide_out = true)));
    assert!(is_portable(usual(|saved| saved.is_aligned = false)));
    let with_decay = |saved: &mut SavedLayout| saved.d_log_decay = true;
    assert!(!is_portable(usual(with_decay)));
    assert!(is_portable(plan([4, 32, 4096, 256, 64], DType::BF16, ELU, NORMALIZE, with_decay)));
    assert!(is_portable(plan([4, 32, 4096, 64, 264], DType::BF16, ELU, NORMALIZE, |_| ())));
    assert!(is_portable(plan([4, 32, 4096, 64, 64], DType::BF16, FAVOR, NORMALIZE, |_| ())));
}
