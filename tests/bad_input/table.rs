//! The rows.

use attn_kernels::Sequences;
use attn_kernels::gau::{GauNorm, GauOptions, MixedChunkOptions};
use attn_kernels::linear::LinearOptions;
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::{DType, Dropout, Mask};
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{DiagOptions, DiagWeight, NormOptions};

use super::Bad;
use super::call::{BATCH, Call, DIRECTIONS, HEADS, KEY_HEADS, LENGTH, Tensor, VALUE_WIDTH, WIDTH};
use crate::common::cases::Operation;

/// Makes rows from one good call.
struct Rows {
    base: Call,
    rows: Vec<Bad>,
}

impl Rows {
    fn of(operation: Operation) -> Self {
        Self { base: Call::new(operation), rows: Vec::new() }
    }

    fn bad(
        &mut self,
        why: &'static str,
        argument: &'static str,
        words: &'static [&'static str],
        change: impl Fn(&mut Call),
    ) {
        let mut call = self.base.clone();
        change(&mut call);
        self.rows.push(Bad { why, call, argument, words });
    }
}

fn softmax() -> Operation {
    Operation::Softmax(SoftmaxOptions { mask: Mask::Causal, ..Default::default() })
}

fn linear() -> Operation {
    Operation::Linear(LinearOptions { causal: true, ..Default::default() })
}

fn norm() -> Operation {
    Operation::Norm(NormOptions { causal: true, ..Default::default() })
}

fn performer() -> Operation {
    Operation::Performer(PerformerOptions { causal: true, ..Default::default() }, DIRECTIONS)
}

fn mixed_chunk() -> Operation {
    Operation::MixedChunk(MixedChunkOptions { causal: true, chunk_size: 4, ..Default::default() })
}

/// The good calls, with every optional tensor that each can have.
pub fn baselines() -> Vec<Call> {
    let diag = Operation::Diag(DiagOptions::default());
    let gau = Operation::Gau(GauOptions::default());
    let plain = [softmax(), diag, gau, linear(), norm(), performer(), mixed_chunk()].map(Call::new);
    let mut full = plain.clone();
    for call in &mut full {
        call.key_mask = Some(key_mask());
        match call.operation {
            Operation::Softmax(_) => {
                call.bias = Some(bias());
                call.attention_bias = Some(Tensor::new(&[BATCH, 1, LENGTH, LENGTH], DType::F32, 0.5));
                call.sinks = Some(Tensor::new(&[HEADS], DType::F32, 0.5));
            }
            Operation::Gau(_) | Operation::MixedChunk(_) => call.bias = Some(bias()),
            Operation::Linear(_) | Operation::Norm(_) => {
                call.log_decay = Some(log_decay());
                call.state = Some(state(WIDTH));
            }
            Operation::Performer(..) => {
                call.state = Some(state(DIRECTIONS));
                call.stabilizer = Some(stabilizer());
            }
            Operation::Diag(_) => {}
        }
    }
    [plain, full].concat()
}

fn key_mask() -> Tensor {
    Tensor::new(&[BATCH, LENGTH], DType::U8, 1.0)
}

fn bias() -> Tensor {
    Tensor::new(&[1, 2 * LENGTH - 1], DType::F32, 0.5)
}

fn log_decay() -> Tensor {
    Tensor::new(&[BATCH, KEY_HEADS, LENGTH], DType::F32, -0.5)
}

fn stabilizer() -> Tensor {
    Tensor::new(&[BATCH, KEY_HEADS], DType::F32, 0.5)
}

fn state(features: usize) -> [Tensor; 2] {
    let dims = [BATCH, KEY_HEADS, features, VALUE_WIDTH];
    [Tensor::new(&dims, DType::F32, 0.5), Tensor::new(&dims[..3], DType::F32, 0.5)]
}

pub fn all() -> Vec<Bad> {
    let mut all = Vec::new();
    for base in baselines().into_iter().take(7) {
        let mut rows = Rows { base, rows: Vec::new() };
        operands(&mut rows);
        packings(&mut rows);
        all.extend(rows.rows);
    }
    for operation in [softmax(), Operation::Gau(GauOptions::default()), mixed_chunk()] {
        let mut rows = Rows::of(operation);
        biases(&mut rows);
        all.extend(rows.rows);
    }
    let mut rows = Rows::of(softmax());
    beside(&mut rows);
    all.extend(rows.rows);
    for operation in [linear(), norm()] {
        let mut rows = Rows::of(operation);
        decays(&mut rows);
        states(&mut rows);
        all.extend(rows.rows);
    }
    let mut rows = Rows::of(performer());
    omegas(&mut rows);
    all.extend(rows.rows);
    all.extend(quadratic_options());
    all.extend(linear_options());
    all.extend(mixed_chunks());
    all
}

/// What q, k, v and the key mask can get wrong in every operation.
fn operands(rows: &mut Rows) {
    let [b, h, kh, n, d, e] = [BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH, VALUE_WIDTH];
    rows.bad("q of rank 3", "q", &["[8, 6, 3]", "[batch, heads, queries, width]"], |c| c.q.dims = vec![b * h, n, d]);
    rows.bad("k of rank 2", "k", &["[6, 3]", "[batch, key heads, keys, width]"], |c| c.k.dims = vec![n, d]);
    rows.bad("v of rank 1", "v", &["[5]", "keys, value width]"], |c| c.v.dims = vec![e]);
    rows.bad("k of another batch", "k", &["[3, 2, 6, 3]", "batch of q", "[2, _, _, 3]"], |c| c.k.dims[0] = 3);
    rows.bad("v of another batch", "v", &["[1, 2, 6, 5]", "batch of q"], |c| c.v.dims[0] = 1);
    rows.bad("k of another width", "k", &["[2, 2, 6, 4]", "width of q", "[2, _, _, 3]"], |c| c.k.dims[3] = 4);
    rows.bad("fewer values than keys", "v", &["[2, 2, 5, 5]", "keys", "[2, _, 6, _]"], |c| c.v.dims[2] = 5);
    rows.bad("3 key heads for 4 heads", "k", &["3 heads", "divisor of", "4 heads"], |c| {
        c.k.dims[1] = 3;
        c.v.dims[1] = 3;
        c.k_lin.dims[1] = 3;
    });
    rows.bad("k in f64", "k", &["dtype f64", "needs f32"], |c| c.k.dtype = DType::F64);
    rows.bad("v in bf16", "v", &["dtype bf16", "needs f32"], |c| c.v.dtype = DType::BF16);
    rows.bad("q in f16", "k", &["dtype f32", "needs f16"], |c| c.q.dtype = DType::F16);
    rows.bad("all in u8", "q", &["dtype u8", "f32, f64, f16 or bf16"], |c| {
        [&mut c.q, &mut c.k, &mut c.v].into_iter().for_each(|x| x.dtype = DType::U8);
    });
    rows.bad("width 0", "q", &["[2, 4, 6, 0]", "width of at least 1"], |c| {
        c.q.dims[3] = 0;
        c.k.dims[3] = 0;
    });
    rows.bad("value width 0", "v", &["[2, 2, 6, 0]", "width of at least 1"], |c| c.v.dims[3] = 0);
    rows.bad("no heads", "q", &["[2, 0, 6, 3]", "at least one head"], |c| c.q.dims[1] = 0);
    rows.bad("no key heads", "k", &["[2, 0, 6, 3]", "at least one head"], |c| c.k.dims[1] = 0);
    rows.bad("a key mask of other keys", "key_mask", &["[2, 7]", "[batch, keys]", "[2, 6]"], |c| {
        c.key_mask = Some(Tensor::new(&[b, n + 1], DType::U8, 1.0));
    });
    rows.bad("a key mask per head", "key_mask", &["[2, 2, 6]", "[batch, keys]"], |c| {
        c.key_mask = Some(Tensor::new(&[b, kh, n], DType::U8, 1.0));
    });
    rows.bad("a key mask in f32", "key_mask", &["dtype f32", "needs u8"], |c| {
        c.key_mask = Some(Tensor::new(&[b, n], DType::F32, 1.0));
    });
}

/// One batch entry of sequences.
fn packed(queries: &'static [u32], keys: &'static [u32]) -> impl Fn(&mut Call) {
    move |c: &mut Call| {
        [&mut c.q, &mut c.k, &mut c.v, &mut c.q_lin, &mut c.k_lin].into_iter().for_each(|x| x.dims[0] = 1);
        c.operation = c.operation.clone().on(Sequences::with_keys(queries, keys));
    }
}

/// What the offsets of packed sequences can get wrong.
fn packings(rows: &mut Rows) {
    let good: &[u32] = &[0, 2, 6];
    let needs = &["[2, 4, 6, 3]", "packed sequences are one batch entry"];
    rows.bad("sequences in a batch", "q", needs, |c| c.operation = c.operation.clone().on(Sequences::new(&[0, 6])));
    let needs = &["no query offsets", "0 and the end of each"];
    rows.bad("no offsets", "sequences", needs, packed(&[], good));
    let needs = &["query offsets that begin with 1", "begin with 0"];
    rows.bad("tokens before the first sequence", "sequences", needs, packed(&[1, 6], good));
    let needs = &["query offsets that end with 5", "end with 6, the number of tokens"];
    rows.bad("tokens behind the last sequence", "sequences", needs, packed(&[0, 2, 5], good));
    rows.bad("one offset", "sequences", &["key offsets that end with 0", "end with 6"], packed(good, &[0]));
    let needs = &["key offsets that end with 7", "end with 6"];
    rows.bad("sequences of more keys than there are", "sequences", needs, packed(good, &[0, 2, 7]));
    let needs = &["key offsets that fall from 4 to 2", "never fall"];
    rows.bad("a sequence of less than no tokens", "sequences", needs, packed(&[0, 1, 2, 6], &[0, 4, 2, 6]));
    let needs = &["key offsets that fall from 4294967295 to 6", "never fall"];
    rows.bad("an offset beyond all memory", "sequences", needs, packed(&[0, 1, 6], &[0, u32::MAX, 6]));
    let needs = &["of 3 query and 4 key offsets", "as many of both"];
    rows.bad("sequences of keys alone", "sequences", needs, packed(good, &[0, 1, 2, 6]));
}

fn biases(rows: &mut Rows) {
    let with = |dims: &'static [usize], dtype| move |c: &mut Call| c.bias = Some(Tensor::new(dims, dtype, 0.5));
    rows.bad("bias of rank 1", "bias", &["[11]", "radius + 1"], with(&[11], DType::F32));
    rows.bad("bias of even length", "bias", &["[1, 12]", "radius + 1"], with(&[1, 12], DType::F32));
    rows.bad("bias without entries", "bias", &["[1, 0]", "radius + 1"], with(&[1, 0], DType::F32));
    rows.bad("bias of 3 heads", "bias", &["[3, 11]", "1 or 4 heads"], with(&[3, 11], DType::F32));
    rows.bad("bias in f64", "bias", &["dtype f64", "needs f32"], with(&[1, 11], DType::F64));
    rows.bad("bias too short", "bias", &["radius 2", "at least"], with(&[4, 5], DType::F32));
}

/// What attention biases and sinks can get wrong.
fn beside(rows: &mut Rows) {
    let with =
        |dims: &'static [usize], dtype| move |c: &mut Call| c.attention_bias = Some(Tensor::new(dims, dtype, 1.0));
    let needs = &["[batch, heads, queries, keys] = [2, 4, 6, 6]", "each of them or 1"];
    for (why, dims) in [
        ("attention bias of rank 2", &[6, 6][..]),
        ("attention bias of rank 3", &[4, 6, 6]),
        ("attention bias of rank 1", &[6]),
        ("attention bias of 3 entries", &[3, 1, 6, 6]),
        ("attention bias of key heads", &[1, 2, 6, 6]),
        ("attention bias of 5 queries", &[2, 4, 5, 6]),
        ("attention bias of 7 keys", &[1, 1, 1, 7]),
        ("attention bias of no head", &[1, 0, 6, 6]),
    ] {
        rows.bad(why, "attention_bias", needs, with(dims, DType::F32));
        rows.bad("the same as a mask", "attention_bias", needs, with(dims, DType::U8));
    }
    for (why, dtype, words) in [
        ("attention bias in f64", DType::F64, &["dtype f64", "f32, or u8"][..]),
        ("attention bias in bf16", DType::BF16, &["dtype bf16", "f32, or u8"]),
    ] {
        rows.bad(why, "attention_bias", words, with(&[1, 1, 6, 6], dtype));
    }
    let words = &["given", "none with packed sequences"];
    rows.bad("attention bias of packed sequences", "attention_bias", words, |c| {
        packed(&[0, 2, 6], &[0, 2, 6])(c);
        c.attention_bias = Some(Tensor::new(&[1, 1, 6, 6], DType::F32, 0.5));
    });
    let with = |dims: &'static [usize], dtype| move |c: &mut Call| c.sinks = Some(Tensor::new(dims, dtype, 1.0));
    rows.bad("sinks of key heads", "sinks", &["[2]", "heads of q", "[4]"], with(&[2], DType::F32));
    rows.bad("one sink", "sinks", &["[1]", "[4]"], with(&[1], DType::F32));
    rows.bad("sinks of batch entries", "sinks", &["[2, 4]", "[4]"], with(&[2, 4], DType::F32));
    rows.bad("sinks in f64", "sinks", &["dtype f64", "f32"], with(&[4], DType::F64));
    rows.bad("sinks in u8", "sinks", &["dtype u8", "f32"], with(&[4], DType::U8));
}

fn decays(rows: &mut Rows) {
    let with = |tensor: Tensor| move |c: &mut Call| c.log_decay = Some(tensor.clone());
    let float = |dims: &[usize]| Tensor::new(dims, DType::F32, -0.5);
    rows.bad("decay of 3 heads", "log_decay", &["[3]", "[heads]", "[2]"], with(float(&[3])));
    rows.bad("decay of rank 2", "log_decay", &["[2, 6]", "[batch, heads, keys]"], with(float(&[2, 6])));
    rows.bad("decay of query heads", "log_decay", &["[2, 4, 6]", "[2, 2, 6]"], with(float(&[2, 4, 6])));
    rows.bad("decay of other keys", "log_decay", &["[2, 2, 5]", "[2, 2, 6]"], with(float(&[2, 2, 5])));
    rows.bad(
        "decay in f64",
        "log_decay",
        &["dtype f64", "needs f32"],
        with(Tensor { dtype: DType::F64, ..log_decay() }),
    );
    rows.bad(
        "decay in f16",
        "log_decay",
        &["dtype f16", "needs f32"],
        with(Tensor { dtype: DType::F16, ..log_decay() }),
    );
    let needs = &["at most 0"];
    rows.bad("growth", "log_decay", &["is 0.5", "at most 0"], with(Tensor { fill: 0.5, ..log_decay() }));
    rows.bad("growth per head", "log_decay", &["is 0.25", "at most 0"], with(Tensor { fill: 0.25, ..float(&[2]) }));
    rows.bad("NaN", "log_decay", needs, with(Tensor { fill: f64::NAN, ..log_decay() }));
    rows.bad("+∞", "log_decay", needs, with(Tensor { fill: f64::INFINITY, ..log_decay() }));
    rows.bad("NaN per head", "log_decay", needs, with(Tensor { fill: f64::NAN, ..float(&[2]) }));
    rows.bad("decay of what is not causal", "log_decay", &["without `causal`"], |c| {
        c.log_decay = Some(log_decay());
        match &mut c.operation {
            Operation::Linear(o) => o.causal = false,
            Operation::Norm(o) => o.causal = false,
            _ => unreachable!("no decay"),
        }
    });
}

fn states(rows: &mut Rows) {
    let with = |change: fn(&mut [Tensor; 2])| {
        move |c: &mut Call| {
            let mut state = state(WIDTH);
            change(&mut state);
            c.state = Some(state);
        }
    };
    rows.bad("S of another batch", "state.s", &["[1, 2, 3, 5]", "[2, 2, 3, 5]"], with(|[s, _]| s.dims[0] = 1));
    rows.bad("S of query heads", "state.s", &["[2, 4, 3, 5]", "[2, 2, 3, 5]"], with(|[s, _]| s.dims[1] = 4));
    rows.bad("S of other features", "state.s", &["[2, 2, 8, 5]", "features"], with(|[s, _]| s.dims[2] = 8));
    rows.bad("S of other values", "state.s", &["[2, 2, 3, 6]", "value width"], with(|[s, _]| s.dims[3] = 6));
    rows.bad("S of rank 3", "state.s", &["[2, 2, 3]", "features"], with(|[s, _]| s.dims.truncate(3)));
    rows.bad("z of other features", "state.z", &["[2, 2, 4]", "[2, 2, 3]"], with(|[_, z]| z.dims[2] = 4));
    rows.bad("z of rank 4", "state.z", &["[2, 2, 3, 1]", "[2, 2, 3]"], with(|[_, z]| z.dims.push(1)));
    rows.bad("S in f64", "state.s", &["dtype f64", "needs f32"], with(|[s, _]| s.dtype = DType::F64));
    rows.bad("z in bf16", "state.z", &["dtype bf16", "needs f32"], with(|[_, z]| z.dtype = DType::BF16));
    rows.bad("a stabiliser for nothing", "state.stabilizer", &["given"], |c| {
        c.state = Some(state(WIDTH));
        c.stabilizer = Some(stabilizer());
    });
}

fn omegas(rows: &mut Rows) {
    rows.bad("ω of another width", "omega", &["[8, 4]", "width of q", "[_, 3]"], |c| c.omega.dims[1] = 4);
    rows.bad("ω of rank 1", "omega", &["[24]", "[directions, width of q]"], |c| c.omega.dims = vec![24]);
    rows.bad("ω of rank 3", "omega", &["[2, 8, 3]", "[directions, width of q]"], |c| c.omega.dims = vec![2, 8, 3]);
    rows.bad("ω without rows", "omega", &["empty", "at least one direction"], |c| c.omega.dims[0] = 0);
    rows.bad("ω in f64", "omega", &["dtype f64", "needs f32"], |c| c.omega.dtype = DType::F64);
    rows.bad("ω in f16", "omega", &["dtype f16", "needs f32"], |c| c.omega.dtype = DType::F16);
    rows.bad("a state without stabiliser", "state.stabilizer", &["missing"], |c| c.state = Some(state(DIRECTIONS)));
    rows.bad("a stabiliser of query heads", "state.stabilizer", &["[2, 4]", "[2, 2]"], |c| {
        c.state = Some(state(DIRECTIONS));
        c.stabilizer = Some(Tensor { dims: vec![BATCH, HEADS], ..stabilizer() });
    });
    rows.bad("the state of a linear attention", "state.s", &["[2, 2, 3, 5]", "[2, 2, 8, 5]"], |c| {
        c.state = Some(state(WIDTH));
        c.stabilizer = Some(stabilizer());
    });
}

fn quadratic_options() -> Vec<Bad> {
    let plain = SoftmaxOptions::default;
    let mut rows = Rows::of(softmax());
    let mut refuse = |why, argument, words, options: SoftmaxOptions<_>| {
        rows.bad(why, argument, words, |c| c.operation = Operation::Softmax(options.clone()));
    };
    for (why, scale, words) in
        [("scale NaN", f64::NAN, &["is NaN", "finite"]), ("scale ∞", f64::INFINITY, &["is inf", "finite"])]
    {
        refuse(why, "scale", words, SoftmaxOptions { scale: Some(scale), ..plain() });
    }
    for (why, cap, words) in [
        ("soft-cap 0", 0.0, &["is 0", "above 0"]),
        ("soft-cap below 0", -2.0, &["is -2", "above 0"]),
        ("soft-cap NaN", f64::NAN, &["is NaN", "above 0"]),
        ("soft-cap ∞", f64::INFINITY, &["is inf", "finite"]),
    ] {
        refuse(why, "soft_cap", words, SoftmaxOptions { soft_cap: Some(cap), ..plain() });
    }
    let mask = Mask::Blocks { size: 0, causal: false };
    for (why, p, words) in [
        ("dropout of all", 1.0, &["is 1", "below 1"][..]),
        ("dropout below 0", -0.1, &["is -0.1", "from 0"]),
        ("dropout NaN", f64::NAN, &["is NaN", "from 0"]),
    ] {
        refuse(why, "dropout", words, SoftmaxOptions { dropout: Some(Dropout { p, seed: 1 }), ..plain() });
    }
    refuse("blocks of 0", "block size", &["is 0", "at least 1"], SoftmaxOptions { mask, ..plain() });
    for (why, argument, words, mask) in [
        ("stride 0", "stride", &["is 0", "at least 1"], Mask::Strided { left: 3, stride: 0 }),
        ("fixed blocks of 0", "block size", &["is 0", "at least 1"], Mask::Fixed { size: 0, summary: 0 }),
        ("no summary", "summary", &["is 0", "from 1 to 4"], Mask::Fixed { size: 4, summary: 0 }),
        ("summary of more than a block", "summary", &["is 5", "to 4"], Mask::Fixed { size: 4, summary: 5 }),
        ("dilation 0", "dilation", &["is 0", "at least 1"], Mask::Dilated { left: 1, right: 1, dilation: 0 }),
    ] {
        refuse(why, argument, words, SoftmaxOptions { mask, ..plain() });
    }
    let mut all = rows.rows;

    let mut rows = Rows::of(Operation::Diag(DiagOptions::default()));
    let plain = DiagOptions::default;
    let mut refuse = |why, argument, words, options: DiagOptions<_>| {
        rows.bad(why, argument, words, |c| c.operation = Operation::Diag(options.clone()));
    };
    refuse("block size 0", "block size", &["is 0", "at least 1"], DiagOptions { block_size: 0, ..plain() });
    refuse("scale −∞", "scale", &["is -inf", "finite"], DiagOptions { scale: Some(f64::NEG_INFINITY), ..plain() });
    for (why, epsilon, words) in [
        ("ε 0", 0.0, &["is 0", "above 0"]),
        ("ε below 0", -1e-3, &["is -0.001", "above 0"]),
        ("ε NaN", f64::NAN, &["is NaN", "above 0"]),
    ] {
        let weight = DiagWeight::Relu { epsilon };
        refuse(why, "epsilon", words, DiagOptions { weight, ..plain() });
    }
    all.extend(rows.rows);

    let mut rows = Rows::of(Operation::Gau(GauOptions::default()));
    let mut refuse = |why, argument, words, norm| {
        rows.bad(why, argument, words, |c| c.operation = Operation::Gau(GauOptions { norm, ..Default::default() }));
    };
    refuse("ε below 0", "epsilon", &["is -1", "at least 0"], GauNorm::RowSum { epsilon: -1.0 });
    refuse("ε NaN", "epsilon", &["is NaN", "at least 0"], GauNorm::RowSum { epsilon: f64::NAN });
    refuse("fixed length 0", "length", &["is 0", "above 0"], GauNorm::Fixed { length: 0.0 });
    refuse("fixed length below 0", "length", &["is -4", "above 0"], GauNorm::Fixed { length: -4.0 });
    refuse("fixed length NaN", "length", &["is NaN", "above 0"], GauNorm::Fixed { length: f64::NAN });
    all.extend(rows.rows);
    all
}

fn linear_options() -> Vec<Bad> {
    let below: &[&str] = &["is -1", "at least 0"];
    let mut rows = Rows::of(linear());
    for (why, epsilon, words) in [("ε below 0", -1.0, below), ("ε NaN", f64::NAN, &["is NaN", "at least 0"])] {
        let options = LinearOptions { normalizer: Some(epsilon), causal: true, ..Default::default() };
        rows.bad(why, "epsilon", words, |c| c.operation = Operation::Linear(options.clone()));
    }
    let mut all = rows.rows;
    let mut rows = Rows::of(norm());
    for (why, epsilon, words) in [("ε 0", 0.0, &["is 0", "above 0"]), ("ε ∞", f64::INFINITY, &["is inf", "finite"])]
    {
        let options = NormOptions { epsilon, causal: true, ..Default::default() };
        rows.bad(why, "epsilon", words, |c| c.operation = Operation::Norm(options.clone()));
    }
    all.extend(rows.rows);
    let mut rows = Rows::of(performer());
    for (why, epsilon, words) in [("ε below 0", -1.0, below), ("ε NaN", f64::NAN, &["is NaN", "at least 0"])] {
        let options = PerformerOptions { epsilon, causal: true, ..Default::default() };
        rows.bad(why, "epsilon", words, |c| c.operation = Operation::Performer(options.clone(), DIRECTIONS));
    }
    all.extend(rows.rows);
    all
}

fn mixed_chunks() -> Vec<Bad> {
    let mut rows = Rows::of(mixed_chunk());
    rows.bad("chunk 0", "chunk_size", &["is 0", "at least 1"], |c| {
        c.operation = Operation::MixedChunk(MixedChunkOptions { chunk_size: 0, ..Default::default() });
    });
    rows.bad("scale NaN", "scale", &["is NaN", "finite"], |c| {
        let options = MixedChunkOptions { scale: Some(f64::NAN), ..Default::default() };
        c.operation = Operation::MixedChunk(options);
    });
    rows.bad("causal with more keys than queries", "k", &["[2, 2, 6, 4]", "as many keys as queries"], |c| {
        c.q.dims[2] = 5;
        c.q_lin.dims[2] = 5;
    });
    let needs = &["one of 2 queries and 3 keys", "as many keys as queries in each"];
    rows.bad("a sequence of more keys than queries", "sequences", needs, packed(&[0, 2, 6], &[0, 3, 6]));
    rows.bad("other widths in the global branch", "k", &["[2, 2, 6, 7]", "width of q"], |c| c.k_lin.dims[3] = 7);
    rows.bad("other dtypes in the branches", "k", &["dtype f64", "needs f32"], |c| c.k_lin.dtype = DType::F64);
    rows.rows
}
