//! Keys read in place against packed keys, whichever the rule would take, on every instruction set.

use half::{bf16, f16};

use super::super::rooms::Rooms;
use super::super::rows::Number;
use super::super::simd::Isa;
use super::super::tile::Verbs;
use super::precision::Plain;
use super::{Context, QuadraticInputs, decode, forward};
use crate::problem::{DType, Mask, PerKey, Quadratic, QuadraticFinish, QuadraticShapes, Slice, View, Weight};

const CAUSAL: Mask = Mask::Causal;

/// A problem of two batch entries, and which keys its mask leaves: all of them unless it is given.
struct Setting {
    heads: [usize; 2],
    lengths: [usize; 2],
    widths: [usize; 2],
    weight: Weight,
    finish: QuadraticFinish,
    mask: Mask,
    scale: f64,
    soft_cap: Option<f64>,
    has_bias: bool,
    keeps: Option<fn(usize, usize) -> bool>,
}

impl Setting {
    fn new(lengths: [usize; 2], mask: Mask) -> Self {
        Self {
            heads: [4, 2],
            lengths,
            widths: [16, 24],
            weight: Weight::Softmax,
            finish: QuadraticFinish::None,
            mask,
            scale: 0.4,
            soft_cap: None,
            has_bias: false,
            keeps: None,
        }
    }

    fn keeping(self, keeps: fn(usize, usize) -> bool) -> Self {
        Self { keeps: Some(keeps), ..self }
    }

    fn weighing(self, weight: Weight, finish: QuadraticFinish) -> Self {
        Self { weight, finish, ..self }
    }
}

fn settings() -> Vec<Setting> {
    let window = |left, right| Mask::Window { left, right };
    let blocks = |size, causal| Mask::Blocks { size, causal };
    let some: fn(usize, usize) -> bool = |batch, key| (key * 7 + batch) % 5 > 1 && key >= 3;
    let late: fn(usize, usize) -> bool = |batch, key| batch == 1 && key >= 1100;
    let (squared, relu) = (Weight::ReluSquared, Weight::Relu);
    let row_sum = QuadraticFinish::RowSum { epsilon: 1e-3 };
    let norm = QuadraticFinish::RmsNorm { epsilon: 1e-4 };
    vec![
        Setting::new([1, 1], CAUSAL),
        Setting::new([1, 16], CAUSAL),
        Setting { heads: [1, 1], ..Setting::new([1, 3000], CAUSAL) },
        Setting { heads: [8, 1], widths: [128, 128], ..Setting::new([1, 1500], Mask::Full) },
        Setting { heads: [6, 2], widths: [5, 67], ..Setting::new([2, 1030], CAUSAL) },
        Setting { widths: [1, 3], ..Setting::new([3, 700], CAUSAL) },
        Setting { widths: [111, 40], scale: 0.5, ..Setting::new([5, 2100], CAUSAL) },
        Setting { scale: -0.7, ..Setting::new([7, 1025], Mask::Full) },
        Setting { scale: 0.0, ..Setting::new([2, 50], CAUSAL) },
        Setting { heads: [2, 2], widths: [64, 64], ..Setting::new([65, 300], CAUSAL) },
        Setting::new([9, 4], CAUSAL),
        Setting::new([3, 0], Mask::Full),
        Setting::new([0, 5], Mask::Full),
        Setting::new([4, 2600], window(Some(1300), Some(0))),
        Setting::new([40, 90], window(Some(3), Some(2))),
        Setting::new([5, 1300], blocks(700, false)),
        Setting::new([30, 64], blocks(7, true)),
        Setting::new([3, 2100], CAUSAL).keeping(some),
        Setting { soft_cap: Some(1.5), has_bias: true, ..Setting::new([2, 1100], CAUSAL) }.keeping(some),
        Setting { has_bias: true, ..Setting::new([6, 40], window(Some(9), Some(4))) },
        Setting::new([2, 2300], Mask::Full).keeping(late),
        Setting::new([3, 1500], CAUSAL).weighing(squared, row_sum),
        Setting::new([3, 1100], CAUSAL).weighing(squared, QuadraticFinish::Scale(0.1)).keeping(some),
        Setting { has_bias: true, ..Setting::new([1, 2500], Mask::Full).weighing(squared, QuadraticFinish::None) },
        Setting::new([4, 1200], blocks(1100, true)).weighing(relu, norm).keeping(some),
        Setting::new([2, 1200], CAUSAL).weighing(squared, row_sum).keeping(late),
    ]
}

/// Elements of a dtype.
enum Elements {
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    U8(Vec<u8>),
}

impl Elements {
    fn new(dtype: DType, numbers: Vec<f64>) -> Self {
        let numbers = numbers.into_iter();
        match dtype {
            DType::F16 => Self::F16(numbers.map(f16::from_f64).collect()),
            DType::BF16 => Self::BF16(numbers.map(bf16::from_f64).collect()),
            DType::F32 => Self::F32(numbers.map(|x| x as f32).collect()),
            DType::F64 => Self::F64(numbers.collect()),
            _ => Self::U8(numbers.map(|x| x as u8).collect()),
        }
    }

    fn slice(&self) -> Slice<'_> {
        match self {
            Self::F16(x) => Slice::F16(x),
            Self::BF16(x) => Slice::BF16(x),
            Self::F32(x) => Slice::F32(x),
            Self::F64(x) => Slice::F64(x),
            Self::U8(x) => Slice::U8(x),
        }
    }
}

/// A tensor with NaN between its rows, or as `[batch, rows, heads, width]` without gaps.
struct Operand {
    elements: Elements,
    dims: [usize; 4],
    strides: [usize; 4],
}

impl Operand {
    /// `keeps` says of [batch, row] whether it is not NaN.
    fn new(dtype: DType, dims: [usize; 4], gap: usize, seed: usize, keeps: impl Fn(usize, usize) -> bool) -> Self {
        let [batch, heads, rows, width] = dims;
        let strides = match gap {
            0 => [rows * heads * width, width, heads * width, 1],
            _ => [heads * rows * (width + gap), rows * (width + gap), width + gap, 1],
        };
        let row = width + gap;
        let mut numbers = vec![f64::NAN; (batch * heads * rows * row).saturating_sub(gap)];
        let mut state = seed as u64 * 2 + 1;
        for index in 0..batch * heads * rows {
            let (b, h, i) = (index / (heads * rows), index / rows % heads, index % rows);
            for x in 0..width {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let number = (state >> 40) as f64 / (1u64 << 24) as f64 * 4.0 - 2.0;
                let at = b * strides[0] + h * strides[1] + i * strides[2] + x;
                numbers[at] = if keeps(b, i) { number } else { f64::NAN };
            }
        }
        Self { elements: Elements::new(dtype, numbers), dims, strides }
    }

    fn view(&self) -> View<'_> {
        View::new(self.elements.slice(), &self.dims, &self.strides).unwrap()
    }
}

/// A setting in memory.
struct Case {
    problem: Quadratic,
    operands: [Operand; 3],
    key_mask: Option<Elements>,
    bias: Option<Elements>,
}

impl Case {
    fn new(setting: &Setting, dtype: DType, gap: usize) -> Self {
        let Setting { heads: [heads, key_heads], lengths: [queries, keys], widths: [width, value_width], .. } =
            *setting;
        let all = |_, _| true;
        let keeps = setting.keeps.unwrap_or(all);
        let q = Operand::new(dtype, [2, heads, queries, width], gap, 1, all);
        let k = Operand::new(dtype, [2, key_heads, keys, width], gap, 2, keeps);
        let v = Operand::new(dtype, [2, key_heads, keys, value_width], gap, 3, keeps);
        let kept = || (0..2 * keys).map(|at| if keeps(at / keys, at % keys) { 1.0 } else { 0.0 }).collect();
        let key_mask = setting.keeps.map(|_| Elements::new(DType::U8, kept()));
        let radius = queries.max(keys);
        let bias = setting.has_bias.then(|| (0..heads * (2 * radius + 1)).map(|i| (i as f64 * 0.7).sin()).collect());
        let shapes = QuadraticShapes {
            dtype,
            batch: 2,
            heads,
            key_heads,
            queries,
            keys,
            width,
            value_width,
            bias: setting.has_bias.then_some((heads, radius)),
            attention_bias: None,
            sinks: None,
            sequences: None,
        };
        let Setting { weight, mask, scale, soft_cap, finish, .. } = *setting;
        let problem = Quadratic::new("test", shapes, weight, mask, scale, soft_cap, finish).unwrap();
        let per_key = if setting.widths[0] == 16 && weight != Weight::Softmax { PerKey::Sums } else { PerKey::Nothing };
        let bias = bias.map(|bias| Elements::new(dtype, bias));
        Self { problem: problem.per_key(per_key), operands: [q, k, v], key_mask, bias }
    }

    /// Output and statistic of keys in place, and of packed keys, in the type of sums.
    fn both<T: Number>(&self, verbs: &'static Verbs<T>) -> [Vec<T>; 2] {
        let [q, k, v] = self.operands.each_ref().map(Operand::view);
        let shapes = &self.problem.shapes;
        let key_mask = self.key_mask.as_ref().map(|x| View::contiguous(x.slice(), &[2, shapes.keys]).unwrap());
        let (heads, radius) = shapes.bias.unwrap_or_default();
        let bias = self.bias.as_ref().map(|x| View::contiguous(x.slice(), &[heads, 2 * radius + 1]).unwrap());
        let inputs = QuadraticInputs { key_mask, bias, ..QuadraticInputs::new(q, k, v) };
        let context = Context::new(&self.problem, &inputs, verbs);
        [true, false].map(|is_in_place| {
            let mut results = vec![T::from_f64(f64::NAN); self.problem.output_len() + self.problem.statistic_len()];
            let (out, statistic) = results.split_at_mut(self.problem.output_len());
            let rooms = |all| Rooms::of(T::slice_mut(all), shapes.batch * shapes.heads);
            let (out, statistic) = (rooms(out), Some(rooms(statistic)));
            match is_in_place {
                true => decode::run(&context, out, statistic),
                false => forward::run(&context, Plain, out, statistic),
            }
            results
        })
    }
}

/// The largest difference of outputs or statistics, relative to the largest of them if that is above 1; ∞ where only one of
/// two numbers is finite.
fn difference<T: Number>(case: &Case, verbs: &'static Verbs<T>) -> f64 {
    let [x, y] = case.both(verbs);
    let len = case.problem.output_len();
    [0..len, len..x.len()].into_iter().fold(0.0, |worst, part| {
        let pairs = || x[part.clone()].iter().zip(&y[part.clone()]).map(|(x, y)| (x.to_f64(), y.to_f64()));
        let size = pairs().map(|(_, y)| y.abs()).filter(|y| y.is_finite()).fold(1.0, f64::max);
        pairs().filter(|(x, y)| x != y).fold(worst, |worst, (x, y)| match x.is_finite() && y.is_finite() {
            true => worst.max((x - y).abs() / size),
            false => f64::INFINITY,
        })
    })
}

#[test]
fn keys_in_place_are_packed_keys() {
    let mut count = 0;
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for (index, setting) in settings().iter().enumerate() {
            for (dtype, gap) in [(DType::F32, 0), (DType::F32, 3), (DType::F16, 1), (DType::BF16, 0), (DType::F64, 5)] {
                let case = Case::new(setting, dtype, gap);
                let (worst, bound) = match dtype {
                    DType::F64 => (difference(&case, Verbs::<f64>::get(isa)), 1e-14),
                    _ => (difference(&case, Verbs::<f32>::get(isa)), 5e-6),
                };
                assert!(worst <= bound, "{isa:?}, setting {index}, {dtype}, gaps of {gap}: {worst:e}");
                count += 1;
            }
        }
    }
    assert!(count >= 100, "{count}");
}

#[test]
fn threads_leave_no_trace() {
    let setting = Setting { heads: [2, 1], ..Setting::new([3, 5000], CAUSAL) };
    let case = Case::new(&setting, DType::F32, 0);
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.both(Verbs::<f32>::get(Isa::current()))[0].iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    };
    let alone = on(1);
    for threads in [1, 2, 3, 7] {
        assert!(alone == on(threads), "{threads} threads");
    }
}
