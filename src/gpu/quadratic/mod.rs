//! Plans of the quadratic engine; the kernels are those of kernels/quadratic.

mod decode;
mod params;
#[cfg(feature = "gpu")]
mod run;
#[cfg(test)]
mod tests;
mod tiles;
mod warpgroups;

use super::params::{Field, Pointer, Type};
use super::plan::{Argument, DeviceFacts, Plan};
use crate::problem::{PerKey, Quadratic, QuadraticFinish, QuadraticShapes, Weight};
use params::{QuadraticMappedParams, QuadraticParams};
#[cfg(feature = "gpu")]
pub use run::{QuadraticGradients, QuadraticInputs, QuadraticSaved, backward, forward};
use tiles::{Config, Memory, ROWS};
use warpgroups::Warpgroups;

const THREADS: usize = 128;
/// Rows of a block of the kernels that have a warp per row.
const WARPS: usize = THREADS / 32;
/// Bytes for blocks' parts of the gradient of the bias; more blocks are launched in several turns.
const BIAS_BYTES: usize = 256 << 20;
/// Tiles of keys that are worth a block of their own.
const LEAST_TILES: usize = 4;

/// Strides of the operands in elements: batch entry, head, row; the last dimension is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuadraticLayout {
    /// Of q.
    pub q: [i64; 3],
    /// Of k.
    pub k: [i64; 3],
    /// Of v.
    pub v: [i64; 3],
    /// Batch stride of the key mask, if there is one.
    pub key_mask: Option<i64>,
    /// Head stride of the bias, if the problem has one.
    pub bias: i64,
    /// Whether q, k and v start at multiples of 16 bytes.
    pub is_aligned: bool,
}

/// What the forward pass hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QuadraticOutputs {
    /// The output is in the type of sums.
    pub wide_out: bool,
    /// The row statistic as well.
    pub statistic: bool,
}

/// Strides of what the backward pass is handed besides the operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuadraticSavedLayout {
    /// Of the output: batch entry, head, row.
    pub out: [i64; 3],
    /// Of its gradient.
    pub d_out: [i64; 3],
    /// Of the statistic.
    pub statistic: [i64; 3],
    /// Of the gradient of the log-sum-exp, if there is one.
    pub d_statistic: Option<[i64; 3]>,
    /// Output and gradient are in the type of sums.
    pub wide_out: bool,
    /// Whether the gradient of the bias is wanted.
    pub d_bias: bool,
    /// Whether the gradient of the output starts at a multiple of 16 bytes.
    pub is_aligned: bool,
}

/// The parameter structs of the engine's kernels.
pub(super) fn parameters() -> Vec<Type> {
    vec![QuadraticParams::TYPE, QuadraticMappedParams::TYPE]
}

/// The output [B, H, N, E], contiguous, and the row statistic [B, H, N] on demand, of a problem that
/// [`Quadratic::ensure_on_gpu`] lets through. Everything is overwritten.
pub fn plan_forward(
    problem: &Quadratic,
    layout: &QuadraticLayout,
    outputs: QuadraticOutputs,
    facts: &DeviceFacts,
) -> Plan {
    let (problem, layout) = &decode::folded(problem, layout).unwrap_or_else(|| (problem.clone(), *layout));
    let mut planner = Planner::new(problem, layout, facts);
    if problem.statistic_len() == 0 {
        return planner.plan;
    }
    planner.count_keys();
    let shapes = &problem.shapes;
    let is_wide = outputs.wide_out && shapes.dtype != shapes.dtype.accumulator();
    let params = &mut planner.params;
    params.is_out_wide = is_wide.into();
    params.out = Argument::Out.into();
    params.out_strides = row_major(shapes, shapes.value_width).into();
    params.statistic = outputs.statistic.then_some(Argument::Statistic).into();
    params.statistic_strides = row_major(shapes, 1).into();
    match Warpgroups::of(problem, layout, facts).and_then(|warpgroups| warpgroups.forward(&planner.params)) {
        Some(forward) => {
            planner.divide(forward.blocks, forward.tiles, is_wide);
            forward.launch(&mut planner.plan, &planner.params);
        }
        None => planner.forward(is_wide),
    }
    planner.combine();
    planner.plan
}

/// The gradients of q, k and v, contiguous, and of the bias on demand, of a problem that [`Quadratic::ensure_on_gpu`] lets
/// through. Everything is overwritten.
pub fn plan_backward(
    problem: &Quadratic,
    layout: &QuadraticLayout,
    saved: &QuadraticSavedLayout,
    facts: &DeviceFacts,
) -> Plan {
    let mut planner = Planner::new(problem, layout, facts);
    planner.count_keys();
    let shapes = &problem.shapes;
    let params = &mut planner.params;
    params.is_out_wide = (saved.wide_out && shapes.dtype != shapes.dtype.accumulator()).into();
    params.out = Argument::Out.into();
    params.out_strides = saved.out.into();
    params.d_out = Argument::DOut.into();
    params.d_out_strides = saved.d_out.into();
    params.statistic = Argument::Statistic.into();
    params.statistic_strides = saved.statistic.into();
    params.d_statistic = saved.d_statistic.map(|_| Argument::DStatistic).into();
    params.d_statistic_strides = saved.d_statistic.unwrap_or_default().into();
    planner.prepare();
    let Planner { params, plan, .. } = &mut planner;
    params.d_k = Argument::DK.into();
    params.d_v = Argument::DV.into();
    params.d_q = Argument::DQ.into();
    let warpgroups = Warpgroups::of(problem, layout, facts);
    if warpgroups.and_then(|warpgroups| warpgroups.backward(plan, params, saved)).is_none() {
        planner.keys();
        planner.queries(saved.d_bias);
    }
    planner.plan
}

/// Whether rows are divided by the norm of their sums.
fn has_norm(problem: &Quadratic) -> bool {
    matches!(problem.finish, QuadraticFinish::RmsNorm { .. })
}

/// Strides of [B, H, N, width].
fn row_major(shapes: &QuadraticShapes, width: usize) -> [i64; 3] {
    let (heads, rows, width) = (shapes.heads as i64, shapes.queries as i64, width as i64);
    [heads * rows * width, rows * width, width]
}

/// A plan in the making, with what all of its launches share.
struct Planner<'a> {
    problem: &'a Quadratic,
    facts: &'a DeviceFacts,
    params: QuadraticParams,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn new(problem: &'a Quadratic, layout: &QuadraticLayout, facts: &'a DeviceFacts) -> Self {
        Self { problem, facts, params: describe(problem, layout), plan: Plan::default() }
    }

    fn shapes(&self) -> &'a QuadraticShapes {
        &self.problem.shapes
    }

    fn is_softmax(&self) -> bool {
        self.problem.weight == Weight::Softmax
    }

    /// Bytes of a number in the type of sums.
    fn real(&self) -> usize {
        self.shapes().dtype.accumulator().size()
    }

    fn workspace(&mut self, numbers: usize) -> Pointer {
        self.plan.workspace(numbers * self.real()).into()
    }

    /// Adds a launch of a kernel that depends on the element type alone.
    fn launch_simple(&mut self, role: &str, blocks: usize) {
        self.launch(format!("quadratic_{role}_{}", self.shapes().dtype), [blocks, 1, 1], 0);
    }

    /// Adds a launch of an instance.
    fn launch_tiled(&mut self, role: &str, config: &Config, memory: Memory, grid: [usize; 3]) {
        self.params.is_resident = memory.is_resident.into();
        self.params.stages = memory.stages as i32;
        let family = if self.is_softmax() { "softmax" } else { "relu" };
        let name = format!("quadratic_{role}_{family}_{}_{}", self.shapes().dtype, config.columns);
        self.launch(name, grid, memory.bytes);
    }

    fn launch(&mut self, kernel: String, grid: [usize; 3], shared: usize) {
        let grid = grid.map(|blocks| blocks.try_into().expect("the operands of so many blocks fit in no memory"));
        self.plan.launch(kernel, grid, THREADS as u32, shared as u32, &self.params);
    }

    /// The numbers of keys that the mask leaves, where something is divided by them.
    fn count_keys(&mut self) {
        let batch = self.shapes().batch;
        if self.params.per_key != PerKey::Nothing as i32 && batch > 0 {
            self.params.inverse_counts = self.plan.workspace(batch * size_of::<f64>()).into();
            self.launch("quadratic_count".into(), [batch, 1, 1], WARPS * size_of::<i32>());
        }
    }

    /// Blocks of queries of all heads.
    fn query_blocks(&self) -> usize {
        let shapes = self.shapes();
        shapes.batch * shapes.heads * shapes.queries.div_ceil(ROWS)
    }

    /// Divides the keys among more blocks if there are few, and sets aside memory for parts of sums if they are wanted.
    fn divide(&mut self, blocks: usize, tiles: usize, needs_parts: bool) {
        let splits = splits(blocks, tiles, self.facts);
        let has_partial_sums = splits > 1 || needs_parts;
        self.params.splits = splits as i32;
        self.params.has_partial_sums = has_partial_sums.into();
        if has_partial_sums {
            self.params.partial_sums = self.workspace(splits * self.problem.output_len());
            self.params.partial_weights = self.workspace(splits * 2 * self.problem.statistic_len());
        }
    }

    /// Adds up the parts of sums, if there are any.
    fn combine(&mut self) {
        if self.params.has_partial_sums != 0 {
            self.launch_simple("combine", self.problem.statistic_len().div_ceil(WARPS));
        }
    }

    fn forward(&mut self, is_wide: bool) {
        let (problem, shapes, facts) = (self.problem, self.shapes(), self.facts);
        let config = Config::forward(shapes.dtype, self.is_softmax(), shapes.value_width);
        let memory = config.forward_memory(shapes.width, facts);
        let (blocks, value_tiles) = (self.query_blocks(), config.panels(shapes.value_width));
        let tiles = self.params.mask.span(ROWS, shapes.keys).div_ceil(config.others);
        self.divide(blocks * value_tiles, tiles, is_wide || (has_norm(problem) && value_tiles > 1));
        self.launch_tiled("forward", &config, memory, [blocks, value_tiles, self.params.splits as usize]);
    }

    fn prepare(&mut self) {
        let rows = self.problem.statistic_len();
        if rows > 0 {
            self.params.factors = self.workspace(4 * rows);
            self.launch_simple("prepare", rows.div_ceil(WARPS));
        }
    }

    fn backward_config(&self) -> Config {
        let shapes = self.shapes();
        Config::backward(shapes.dtype, self.is_softmax(), shapes.width.max(shapes.value_width))
    }

    fn keys(&mut self) {
        let (shapes, config) = (self.shapes(), self.backward_config());
        let blocks = shapes.batch * shapes.key_heads * shapes.keys.div_ceil(ROWS);
        if blocks == 0 {
            return;
        }
        let memory = config.backward_memory([shapes.width, shapes.value_width], false, self.facts);
        let panels = config.panels(shapes.width.max(shapes.value_width));
        self.launch_tiled("keys", &config, memory, [blocks, panels, 1]);
    }

    /// dq; with the gradient of the bias in turns of as many blocks as there is room for.
    fn queries(&mut self, d_bias: bool) {
        let (shapes, config) = (self.shapes(), self.backward_config());
        let blocks = self.query_blocks();
        let bias = shapes.bias.filter(|_| d_bias);
        let memory = config.backward_memory([shapes.width, shapes.value_width], bias.is_some(), self.facts);
        let mut turn = blocks.max(1);
        if let Some((heads, radius)) = bias {
            let tiles = (self.params.mask.span(ROWS, shapes.keys).div_ceil(config.others) + 1)
                .min(shapes.keys.div_ceil(config.others));
            let span = tiles * config.others + ROWS;
            turn = turn.min((BIAS_BYTES / (span * self.real())).max(1));
            self.params.bias_span = span as i64;
            self.params.d_bias = Argument::DBias.into();
            self.params.partial_bias = self.workspace(turn * span);
            self.params.first_distance = self.plan.workspace(turn * size_of::<i64>()).into();
            self.params.bias_sums = self.workspace(heads * (2 * radius + 1));
        }
        for first in (0..blocks.max(1)).step_by(turn) {
            let count = turn.min(blocks - first);
            self.params.first_block = first as i64;
            self.params.blocks = count as i64;
            if count > 0 {
                self.launch_tiled("queries", &config, memory, [count, config.panels(shapes.width), 1]);
            }
            if let Some((heads, radius)) = bias {
                self.launch_simple("reduce", (heads * (2 * radius + 1)).div_ceil(WARPS));
            }
        }
    }
}

/// Into how many parts the keys of a block are divided: one if the blocks fill the device, else the least number that
/// leaves little of it idle.
fn splits(blocks: usize, tiles: usize, facts: &DeviceFacts) -> usize {
    let processors = facts.multiprocessors as usize;
    let most = tiles / LEAST_TILES;
    if blocks * 5 >= processors * 4 || most < 2 {
        return 1;
    }
    let idle = |splits: usize| {
        let waves = (blocks * splits).div_ceil(processors);
        waves * processors - blocks * splits
    };
    let is_good = |&splits: &usize| {
        let all = blocks * splits + idle(splits);
        blocks * splits >= processors && idle(splits) * 20 <= all * 3
    };
    (1..=most).find(is_good).unwrap_or(most.min(processors.div_ceil(blocks)))
}

fn describe(problem: &Quadratic, layout: &QuadraticLayout) -> QuadraticParams {
    let shapes = &problem.shapes;
    let (finish, constant) = match problem.finish {
        QuadraticFinish::None => (0, 0.0),
        QuadraticFinish::Scale(scale) => (1, scale),
        QuadraticFinish::RowSum { epsilon } => (2, epsilon),
        QuadraticFinish::RmsNorm { epsilon } => (3, epsilon),
    };
    // Without a key mask the number of keys is known.
    let (per_key, count) = match layout.key_mask {
        Some(_) => (problem.per_key, 1.0),
        None => (PerKey::Nothing, shapes.keys.max(1) as f64),
    };
    let divisor = |of| if problem.per_key == of { count } else { 1.0 };
    let (scale, constant) = (problem.scale / divisor(PerKey::Scores), constant / divisor(PerKey::Sums));
    let null = Pointer::default();
    let (bias_heads, radius) = shapes.bias.unwrap_or_default();
    QuadraticParams {
        q: Argument::Q.into(),
        k: Argument::K.into(),
        v: Argument::V.into(),
        key_mask: layout.key_mask.map(|_| Argument::KeyMask).into(),
        bias: shapes.bias.map(|_| Argument::Bias).into(),
        d_statistic: null,
        out: null,
        d_out: null,
        statistic: null,
        d_q: null,
        d_k: null,
        d_v: null,
        d_bias: null,
        partial_sums: null,
        partial_weights: null,
        factors: null,
        partial_bias: null,
        first_distance: null,
        bias_sums: null,
        inverse_counts: null,
        q_strides: layout.q.into(),
        k_strides: layout.k.into(),
        v_strides: layout.v.into(),
        out_strides: [0; 3].into(),
        d_out_strides: [0; 3].into(),
        statistic_strides: [0; 3].into(),
        d_statistic_strides: [0; 3].into(),
        key_mask_stride: layout.key_mask.unwrap_or(0),
        bias_stride: if bias_heads > 1 { layout.bias } else { 0 },
        batch: shapes.batch as i64,
        heads: shapes.heads as i64,
        key_heads: shapes.key_heads as i64,
        queries: shapes.queries as i64,
        keys: shapes.keys as i64,
        bias_radius: radius as i64,
        bias_span: 0,
        first_block: 0,
        blocks: 0,
        mask: problem.mask.into(),
        scale,
        soft_cap: problem.soft_cap.unwrap_or(0.0),
        cap_scale: problem.soft_cap.map_or(0.0, |cap| scale / cap),
        constant,
        width: shapes.width as i32,
        value_width: shapes.value_width as i32,
        weight: problem.weight as i32,
        finish,
        is_out_wide: 0,
        splits: 1,
        has_partial_sums: 0,
        is_resident: 0,
        stages: 0,
        bias_heads: bias_heads as i32,
        per_key: per_key as i32,
    }
}
